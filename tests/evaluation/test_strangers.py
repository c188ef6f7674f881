"""Results belong together, forged ones are refused, and a foreign file cannot cause a read."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

from covcli.core import files
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.evaluation import sets
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.reporting.report import report
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.merge import MergeConfig, merge_signatures
from covcli.training import train as training
from covcli.training.train import TrainResult, resume, train

NOISE = ("noise:uniform?limit=20",)


@pytest.fixture
def private(tmp_path: Path) -> str:
    """Digits in a folder that only its owner would name."""
    folder = tmp_path / "private"
    folder.mkdir()
    for split in ("train", "test"):
        images = datasets.load("digits", split)
        pixels = images.batch(torch.arange(len(images)), (1, 8, 8)).permute(0, 2, 3, 1)
        np.savez(folder / f"{split}.npz", images=pixels.numpy(), labels=images.labels.numpy())
    return f"npz:{folder}"


@pytest.fixture
def mine(private: str, tmp_path: Path) -> TrainResult:
    return train(tiny_config(tmp_path / "runs", trusted=private, epochs=4), Silent())


def another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))


def test_the_same_user_goes_from_stage_to_stage_unasked(mine: TrainResult) -> None:
    built = build_signature(SignatureConfig(mine.checkpoint, method="src"), Silent())
    evaluate(EvaluationConfig(NOISE, signature=built.path, baselines=("energy",)), Silent())


def test_nobody_else_reads_the_path_unless_he_names_it(
    mine: TrainResult, private: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, folder = mine.checkpoint, tmp_path / "out"
    parts = [
        build_signature(
            SignatureConfig(checkpoint, method="src", trusted=f"{private}?{part}",
                            output=folder / f"{part}.safetensors"), Silent(),
        ).path
        for part in ("limit=700", "offset=700")
    ]  # fmt: skip
    evaluation = EvaluationConfig(NOISE, checkpoint, parts[0], output=folder / "e")
    merge = MergeConfig(tuple(parts), folder / "m.safetensors", checkpoint)
    another_user(tmp_path, monkeypatch)
    build = SignatureConfig(checkpoint, method="src", output=folder / "s.safetensors")
    stages: list[tuple[str, Callable[[bool], object]]] = [
        ("trusted", lambda named: build_signature(
            replace(build, trusted=private if named else None), Silent())),
        ("trusted", lambda named: evaluate(
            replace(evaluation, trusted=private if named else None), Silent())),
        ("calibration", lambda named: merge_signatures(
            replace(merge, calibration=private if named else None), Silent())),
    ]  # fmt: skip
    for option, stage in stages:
        before = sorted(folder.iterdir())
        with pytest.raises(CovcliError, match=f"has not written; name it by --{option} npz:"):
            stage(False)
        assert sorted(folder.iterdir()) == before
        stage(True)
    config = replace(evaluation, trusted="digits", baselines=("energy",), force=True)
    with pytest.raises(CovcliError, match="leave --baseline out"):
        evaluate(config, Silent())
    again = EvaluationConfig(NOISE, checkpoint, folder / "s.safetensors", output=folder / "f")
    evaluate(again, Silent())  # what he has built himself is his own
    with pytest.raises(CovcliError, match="has not written"):  # a part of it was not his
        evaluate(replace(again, signature=folder / "m.safetensors", output=folder / "g"), Silent())


def test_a_paused_run_of_somebody_else_reads_no_path(
    private: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CovcliError("No space left on device")

    watched = f"{private}/test.npz?limit=9"
    config = tiny_config(tmp_path / "runs", trusted=private, epochs=1, untrusted=(watched,))
    with monkeypatch.context() as patched:
        patched.setattr(training, "_write", full)
        with pytest.raises(CovcliError, match="No space"):
            train(config, Silent())
    run = tmp_path / "runs" / "tiny"
    with monkeypatch.context() as patched:
        another_user(tmp_path, patched)
        with pytest.raises(CovcliError, match="has not written; name it by --trusted npz:"):
            resume(run, Silent(), None)
        with pytest.raises(CovcliError, match="has not written; name it by --untrusted npz:"):
            resume(run, Silent(), None, named=[f"{private}?split=train"])
    assert resume(run, Silent(), None).checkpoint.is_file()


def test_planted_results_of_a_set_are_not_believed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluationConfig((*NOISE, "photos?limit=30"), runs=run.parent, output=tmp_path / "a")
    plain = evaluate(config, Silent())
    kept: dict[str, tuple[sets.Measured, object]] = {}
    keep = sets.Parts.keep
    with monkeypatch.context() as patched:
        patched.setattr(sets.Parts, "clear", lambda _: None)
        patched.setattr(
            sets.Parts, "keep",
            lambda self, of, measured, images: (
                kept.update({of: (measured, images)}), keep(self, of, measured, images)),
        )  # fmt: skip
        evaluate(replace(config, output=tmp_path / "b"), Silent())
    parts = sorted((tmp_path / "b").glob(".part-*.pt"))
    assert len(parts) == len(kept) == 3
    perfect = {
        of: (replace(m, scores={k: v + 1e6 * (i > 0) for k, v in m.scores.items()}), images)
        for i, (of, (m, images)) in enumerate(kept.items())
    }

    def by_another_user(folder: Path) -> None:
        with monkeypatch.context() as patched:
            another_user(tmp_path, patched)
            patched.setattr(sets.Parts, "clear", lambda _: None)
            patched.setattr(
                sets.Parts, "keep",
                lambda self, of, measured, images: keep(self, of, *perfect[of]),
            )  # fmt: skip
            evaluate(replace(config, output=folder), Silent())
        for file in folder.glob("[!.]*"):
            file.unlink()

    def by_name(folder: Path) -> None:
        folder.mkdir()
        for part, other in zip(parts, [*parts[1:], parts[0]], strict=True):
            (folder / part.name).write_bytes(other.read_bytes())

    for plant in (by_another_user, by_name):
        folder = tmp_path / plant.__name__
        plant(folder)
        assert len(list(folder.iterdir())) == 3
        result = evaluate(replace(config, output=folder), Silent())
        assert (result.trusted, result.untrusted) == (plain.trusted, plain.untrusted)


def test_a_mixture_of_two_evaluations_is_refused(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {path.name: path.read_bytes() for path in evaluated.iterdir() if path.is_file()}
    again = EvaluationConfig(NOISE, runs=evaluated.parent, force=True)
    rename = Path.replace
    for killed_after in (1, 2):
        renamed = 0

        def counted(path: Path, target: Path, killed_after: int = killed_after) -> Path:
            nonlocal renamed
            if target.parent == evaluated and not target.name.startswith("."):
                if renamed == killed_after:
                    raise KeyboardInterrupt
                renamed += 1
            return rename(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(sets.Parts, "keep", lambda *_: None)
            patched.setattr(Path, "replace", counted)
            with pytest.raises(KeyboardInterrupt):
                evaluate(again, Silent())
        changed = [
            name for name, content in old.items() if (evaluated / name).read_bytes() != content
        ]
        assert len(changed) == killed_after
        assert "evaluation.json" not in changed
        with pytest.raises(CovcliError, match="does not belong to the evaluation"):
            report(evaluated)
        assert not (evaluated / "report.html").exists()
    evaluate(again, Silent())
    report(evaluated)


def test_files_that_belong_together_are_all_written_or_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "c").mkdir()  # in the way of the last one
    contents = {tmp_path / "a": b"new", tmp_path / "b": b"new", tmp_path / "c": b"new"}
    with pytest.raises(CovcliError, match="not replaced"):
        files.publish(contents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
    assert (tmp_path / "a").read_bytes() == b"old"
    (tmp_path / "c").rmdir()
    files.publish(contents)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        "abc", b"new"
    )


class Waiting(Silent):
    """Stops a build where it begins to work."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def start(self, title: str, total: int) -> None:
        self.reached.set()
        assert self.go_on.wait(60)


@pytest.mark.parametrize("force", [False, True])
def test_of_two_builds_of_one_output_one_wins_and_the_other_is_refused(
    run: Path, tmp_path: Path, force: bool
) -> None:
    config = SignatureConfig(
        run / "checkpoint.pt", method="src", output=tmp_path / "s.safetensors", force=force
    )
    first, built = Waiting(), []
    thread = threading.Thread(target=lambda: built.append(build_signature(config, first)))
    thread.start()
    assert first.reached.wait(60)
    with pytest.raises(CovcliError, match="another process is writing this"):
        build_signature(config, Silent())
    other = replace(config, output=tmp_path / "t.safetensors")
    build_signature(other, Silent())  # of another output at the same time
    first.go_on.set()
    thread.join(60)
    assert built[0].path == config.output
    assert files.digest_file(config.output) == built[0].signature_fingerprint
    if not force:
        with pytest.raises(CovcliError, match="exists"):
            build_signature(config, Silent())
