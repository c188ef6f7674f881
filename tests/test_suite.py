"""The suite: it calibrates as the command does, ranks rightly, and computes nothing twice."""

import importlib
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats

from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.methods import make_method
from covcli.models import architectures
from covcli.models.architectures import ModelSpec
from covcli.signature.fit import How, fit_judge, fit_signature

FOLDER = Path(__file__).parents[1] / "benchmarks"
CLASSES = ("a", "b", "c")


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    runpy.run_path(str(Path(__file__).parent / "tiny_vgg.py"))
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("suite")


def subject(suite: ModuleType, folder: Path, count: int) -> Any:
    """Return a network of random weights on digits, under the classes that it predicts."""
    evidence = sys.modules["suite_evidence"]
    mean, deviation = architectures.architecture("tiny-vgg").statistics
    torch.manual_seed(0)
    model = architectures.build(ModelSpec("tiny-vgg", 3, (3, 32, 32), mean, deviation))

    class OnDigits(evidence.Subject):  # type: ignore[misc, name-defined]
        def split(self, split: Any) -> ImageSet:
            images = datasets.load("digits?limit=300", split)
            return replace(images, labels=torch.arange(len(images)) % 3, classes=CLASSES)

    sizes = evidence.Sizes(60, count, 20, 10, 5, 5)
    return OnDigits("tiny", model, "cifar10", False, suite.Data(Path()), folder, sizes)


def test_a_draw_calibrates_as_the_command_does(suite: ModuleType, tmp_path: Path) -> None:
    network = subject(suite, tmp_path / "evidence", 80)
    seen = sys.modules["suite_evidence"].Evidence(network, ["src"], [], Silent())
    pool = suite.Pool(seen.shown("pool", lambda: network.pool, False), {}, {"src": ()})
    calibration = pool.calibration("src", 3, 40)
    rows = torch.randperm(80, generator=torch.Generator().manual_seed(3))[:40]
    signature, _, _ = fit_signature(
        network.model, network.fitted, How(make_method("src")), Silent()
    )
    judge = fit_judge(network.model, signature, network.pool.select(rows), Silent(), seed=3)
    assert torch.equal(calibration.fitting, judge.calibration.fitting)
    torch.testing.assert_close(calibration.scores, judge.calibration.scores)


def test_what_is_kept_is_not_computed_again(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = sys.modules["suite_evidence"]
    network = subject(suite, tmp_path / "evidence", 20)
    first = evidence.Evidence(network, ["src", "gauss"], ["energy"], Silent())
    before = first.shown("pool", lambda: network.pool)

    def refuse(*_: object) -> None:
        raise AssertionError("a pass over what is kept")

    monkeypatch.setattr(evidence, "sweep", refuse)
    monkeypatch.setattr(evidence, "fit_signature", refuse)
    again = evidence.Evidence(network, ["src", "gauss"], ["energy"], Silent())
    after = again.shown("pool", lambda: network.pool)
    assert all(torch.equal(after.evidence[m], before.evidence[m]) for m in ("src", "gauss"))
    assert torch.equal(after.baselines["energy"], before.baselines["energy"])
    assert torch.equal(after.logits, before.logits)


def test_ranks_are_taken_within_each_network(suite: ModuleType) -> None:
    def row(network: str, score: str, *draws: float) -> Any:
        return suite.Row(network, score, [{"far": {"x": draw}} for draw in draws])

    by_score = {
        "first": [row("n", "first", 0.9, 0.8), row("m", "first", 0.2, 0.4)],
        "second": [row("n", "second", 0.5), row("m", "second", 0.9)],
        "third": [row("n", "third", 0.6), row("m", "third", 0.1)],
    }
    ranks = suite.worst_ranks(by_score, ["far"])
    assert {score: by_group["far"] for score, by_group in ranks.items()} == {
        "first": (1.5, 2.0), "second": (2.0, 3.0), "third": (2.5, 3.0),
    }  # fmt: skip
    mean, spread = suite.over_networks(by_score["first"], "far")
    assert mean == pytest.approx(100 * (0.9 + 0.8 + 0.2 + 0.4) / 4)
    assert spread == " ± 3.5"  # of the draws' means over the networks, 55 and 60


def test_the_loss_is_judged_by_students_interval_corrected_for_the_comparisons(
    suite: ModuleType,
) -> None:
    loss = importlib.import_module("confidence_loss")
    before, after = [0.81, 0.83, 0.80, 0.84], [0.83, 0.84, 0.835, 0.84]
    difference = loss.Difference.of(list(zip(before, after, strict=True)), comparisons=6)
    low, high = stats.ttest_rel(after, before).confidence_interval(1 - 0.05 / 6)
    assert difference.mean == pytest.approx(50 * (low + high))
    assert difference.half == pytest.approx(50 * (high - low))
