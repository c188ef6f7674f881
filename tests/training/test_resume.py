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

from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.core.runtime import Interrupted, Interrupts
from covcli.evaluation import evaluate as evaluation
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.models import checkpoint as checkpoints
from covcli.training.train import TrainConfig, resume, train


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
    made = Interrupts()
    made.install()
    yield made
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
    (tmp_path / "runs" / "latest").unlink()
    (tmp_path / "runs" / "latest").symlink_to("cut")
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


def test_a_second_signal_does_not_wait_for_the_step(interrupts: Interrupts) -> None:
    reached = []

    def step() -> None:
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("held back")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("never")

    with pytest.raises(Interrupted):
        step()
    assert reached == ["held back"]
    with pytest.raises(Interrupted):
        interrupts.check()


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


def test_a_cut_evaluation_does_not_repeat_finished_sets(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("photos?limit=40", "attack:pgd?limit=30", "noise:uniform?limit=20")
    plain = evaluate(EvaluationConfig(sets, runs=run.parent, output=tmp_path / "plain"), Silent())
    measured: list[str] = []
    measure = evaluation.measure

    def counting(*arguments: object) -> object:
        images = arguments[1]
        measured.append(images.name)  # type: ignore[attr-defined]
        if measured.count("noise:uniform?limit=20") == 1 and len(measured) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "measure", counting)
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
