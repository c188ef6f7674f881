"""Interrupted and killed runs go on, and end where they would have ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PLUGIN, tiny_config

from covcli.core import files, run_folders, runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.core.signals import Interrupted, Interrupts
from covcli.evaluation import sets as evaluated
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.models import checkpoint as checkpoints
from covcli.training import train as training
from covcli.training.train import TrainConfig, interrupted_run, resume, train


class StopAt(Silent):
    """Sends a signal to this process when so many images have been seen."""

    def __init__(self, images: int, number: int) -> None:
        self.left, self.number = images, number

    def advance(self, images: int) -> None:
        if 0 < self.left <= images:
            os.kill(os.getpid(), self.number)
        self.left -= images


@pytest.fixture
def interrupts() -> Interrupts:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    installed = Interrupts()
    installed.install()
    yield installed
    for number, handler in before.items():
        signal.signal(number, handler)


def config(runs: Path, name: str) -> TrainConfig:
    return tiny_config(
        runs, name=name, epochs=3, augment="crop-flip", untrusted=("noise:uniform?limit=30",)
    )


def same_weights(first: Path, second: Path) -> bool:
    one, two = (checkpoints.load(path).model.state_dict() for path in (first, second))
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("images", [100, 1078, 1500, 3000])
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path: Path, interrupts: Interrupts, images: int
) -> None:
    runtime.configure(0, 0)
    whole = train(config(tmp_path, "whole"), Silent())
    runtime.configure(0, 0)
    with pytest.raises(Interrupted) as caught:
        train(config(tmp_path, "cut"), StopAt(images, signal.SIGTERM), interrupts)
    assert caught.value.signal == signal.SIGTERM
    assert (tmp_path / "cut" / "last.pt").is_file()
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()
    runtime.configure(99, 0)  # another process starts with another generator
    again = resume(tmp_path / "cut", Silent(), None)
    assert same_weights(whole.checkpoint, again.checkpoint)
    assert not (tmp_path / "cut" / "last.pt").exists()
    for one, two in zip(whole.epochs, again.epochs, strict=True):
        assert (one.loss, one.accuracy, one.watched) == (two.loss, two.accuracy, two.watched)


def test_a_killed_run_resumes_from_its_last_save_to_the_same_bits(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "covcli", "train", "--trusted", "digits", "--model", "tiny",
        "--plugin", str(PLUGIN), "--epochs", "6", "--save-every", "0m", "--signature-every", "2",
    ]  # fmt: skip
    subprocess.run([*command, "--name", "whole"], cwd=tmp_path, check=True, capture_output=True)
    running = subprocess.Popen([*command, "--name", "cut"], cwd=tmp_path, stderr=subprocess.PIPE)
    paused = tmp_path / "runs" / "cut" / "last.pt"
    deadline = time.monotonic() + 60
    while not paused.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    running.kill()
    running.communicate()
    assert paused.exists()
    assert (tmp_path / "runs" / "latest").resolve().name == "whole"
    again = [
        sys.executable,
        "-m",
        "covcli",
        "train",
        "--plugin",
        str(PLUGIN),
        "--resume",
        "--quiet",
    ]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("cut/checkpoint.pt")
    whole = tmp_path / "runs" / "whole" / "checkpoint.pt"
    assert same_weights(whole, tmp_path / "runs" / "cut" / "checkpoint.pt")


class Signals(Silent):
    """Sends signals to this process in the middle of a step, and more while it saves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images: int, at_once: int) -> None:
        self.left, self.at_once, self.saves = images, at_once, 0
        save = files.Format.save

        def saving(*arguments: object) -> None:
            self.saves += 1
            os.kill(os.getpid(), signal.SIGTERM)
            save(*arguments)  # type: ignore[arg-type]

        def step(optimizer: torch.optim.SGD, *_: object) -> None:
            self.left -= 32
            if -32 < self.left <= 0:
                for _ in range(self.at_once):
                    os.kill(os.getpid(), signal.SIGTERM)
                monkeypatch.setattr(files.Format, "save", saving)
            plain(optimizer)

        plain = torch.optim.SGD.step
        monkeypatch.setattr(torch.optim.SGD, "step", step)


@pytest.mark.parametrize("at_once", [1, 2])
def test_more_signals_save_the_same_whole_step_once(
    tmp_path: Path, interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    runtime.configure(0, 0)
    whole = train(config(tmp_path, "whole"), Silent())
    runtime.configure(0, 0)
    with monkeypatch.context() as patched:
        sent = Signals(patched, 1500, at_once)
        with pytest.raises(Interrupted):
            train(config(tmp_path, "cut"), sent, interrupts)
    assert sent.saves == 1
    assert same_weights(whole.checkpoint, resume(tmp_path / "cut", Silent(), None).checkpoint)


def test_a_signal_while_results_are_written_leaves_them_whole(
    tmp_path: Path, interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write_json

    def writing(path: Path, document: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(path, document)

    monkeypatch.setattr(files, "write_json", writing)
    with pytest.raises(Interrupted) as caught:
        train(tiny_config(tmp_path, epochs=1), Silent(), interrupts)
    assert caught.value.resume is None  # there is nothing left to do
    names = {path.suffix for path in (tmp_path / "tiny").iterdir()}
    assert names == {".pt", ".json", ".pkl"}
    assert checkpoints.load(tmp_path / "latest" / "checkpoint.pt").training["epochs"] == 1


def test_an_error_while_results_are_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CovcliError("cannot be written (No space left on device)")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_json", full)
        with pytest.raises(CovcliError, match="No space"):
            train(tiny_config(tmp_path, epochs=1), Silent())
    kept = checkpoints.load(tmp_path / "tiny" / "checkpoint.pt").model.state_dict()
    again = resume(tmp_path / "tiny", Silent(), None)
    assert all(torch.equal(kept[k], v) for k, v in
               checkpoints.load(again.checkpoint).model.state_dict().items())  # fmt: skip
    assert again.log.is_file()


def test_a_folder_in_the_place_of_the_link_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").mkdir()
    monkeypatch.setattr(training, "Session", None)  # nothing is loaded or trained
    with pytest.raises(CovcliError, match="latest: is in the way"):
        train(tiny_config(tmp_path), Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_run_killed_before_its_first_save_starts_again_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / ".lock").touch()
    (tmp_path / "tiny" / ".last.pt.abc.tmp").write_bytes(b"half")
    result = train(tiny_config(tmp_path, epochs=1), Silent())
    assert result.checkpoint == tmp_path / "tiny" / "checkpoint.pt"
    assert not [path for path in result.run.iterdir() if path.name.startswith(".")]
    with pytest.raises(CovcliError, match="this run exists"):
        train(tiny_config(tmp_path), Silent())


def test_of_two_runs_under_one_name_one_wins(tmp_path: Path) -> None:
    run = run_folders.new_run(tmp_path, "a", "x")
    assert run_folders.new_run(tmp_path, "a", "x") == run  # neither has begun
    with run_folders.locked(run, new=True):
        with (
            pytest.raises(CovcliError, match="another process is writing"),
            run_folders.locked(run, new=True),
        ):
            pass
        files.write_json(run / "x.json", {})
    with pytest.raises(CovcliError, match="this run exists"), run_folders.locked(run, new=True):
        pass
    assert [path.name for path in run.iterdir()] == ["x.json"]


def test_resume_without_a_name_takes_the_run_that_was_saved_last(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "older", "held", "done")):
        (tmp_path / name).mkdir()
        file = tmp_path / name / ("checkpoint.pt" if name == "done" else "last.pt")
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "held" / "last.pt", (2e9, 2e9))
    (tmp_path / "latest").symlink_to("done")
    with run_folders.locked(tmp_path / "held"):  # it is running
        assert interrupted_run("latest", tmp_path) == tmp_path / "newest"
    assert interrupted_run("latest", tmp_path) == tmp_path / "held"
    assert interrupted_run("older", tmp_path) == tmp_path / "older"
    with pytest.raises(CovcliError, match="no run to resume"):
        interrupted_run("latest", tmp_path / "older")


def test_what_cannot_be_resumed_is_refused(tmp_path: Path, interrupts: Interrupts) -> None:
    with pytest.raises(CovcliError, match="nothing to resume"):
        resume(tmp_path, Silent(), None)
    with pytest.raises(Interrupted):
        train(config(tmp_path, "cut"), StopAt(100, signal.SIGINT), interrupts)
    path = tmp_path / "cut" / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CovcliError, match=r"damaged|not a PyTorch"):
        resume(tmp_path / "cut", Silent(), None)
    assert path.exists()


@pytest.mark.usefixtures("foolbox")
def test_a_cut_evaluation_does_not_repeat_finished_sets(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("photos?limit=40", "attack:pgd?limit=30", "noise:uniform?limit=20")
    plain = evaluate(EvaluationConfig(sets, runs=run.parent, output=tmp_path / "plain"), Silent())
    measured: list[str] = []
    measure = evaluated.measure

    def counting(*arguments: object) -> object:
        images = arguments[1]
        measured.append(images.name)  # type: ignore[attr-defined]
        if measured.count("noise:uniform?limit=20") == 1 and len(measured) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluated, "measure", counting)
    cut = EvaluationConfig(sets, runs=run.parent, output=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        evaluate(cut, Silent())
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    again = evaluate(cut, Silent())
    assert measured[4:] == ["noise:uniform?limit=20"]
    assert again.untrusted == plain.untrusted
    assert again.trusted == plain.trusted
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == sorted(
        p.name for p in (tmp_path / "plain").iterdir()
    )
    for name in ("scores.csv.gz",):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
