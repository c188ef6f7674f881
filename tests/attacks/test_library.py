"""foolbox, an optional package: what runs without it, and what says that it is missing."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_config

from covcli.attacks.attacks import ATTACKS, check_attack, run_attack
from covcli.attacks.library import library
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.core.specs import parse
from covcli.data import datasets
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.models import checkpoint as checkpoints
from covcli.monitoring.registries import list_registered
from covcli.training.train import TrainResult, train

ADVICE = r"foolbox .*run `pip install 'covcli\[attacks\]'`"


@pytest.fixture
def _without_foolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)


@pytest.fixture
def _with_an_old_foolbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """foolbox is installed, but what it imports is gone, as with SciPy 2."""
    monkeypatch.delitem(sys.modules, "foolbox", raising=False)
    (tmp_path / "foolbox.py").write_text("import scipy.ndimage.gone")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_without_foolbox")
def test_attacks_without_foolbox_are_refused_before_anything_is_made(
    run: Path, trained: TrainResult, tmp_path: Path
) -> None:
    untrusted, runs = ("photos?limit=20", "attack:pgd?limit=9"), tmp_path / "new"
    digits = datasets.load("digits?limit=5", "test")
    model = checkpoints.load(trained.checkpoint).model
    before = sorted(run.parent.rglob("*"))
    refused: list[Callable[[], object]] = [
        lambda: evaluate(EvaluationConfig(untrusted, runs=run.parent), Silent()),
        lambda: train(tiny_config(runs, untrusted=untrusted), Silent()),
        lambda: run_attack(parse(untrusted[1]), model, digits, digits.known_labels(), Silent()),
    ]
    for work in refused:
        with pytest.raises(CovcliError, match=ADVICE) as error:
            work()
        assert "\n" not in str(error.value)
    assert sorted(run.parent.rglob("*")) == before
    assert not runs.exists()


@pytest.mark.usefixtures("_without_foolbox")
def test_what_needs_no_foolbox_works_without_it(run: Path) -> None:
    untrusted = ("noise:uniform?limit=40", "attack:adaptive-pgd?limit=9&steps=2")
    done = evaluate(EvaluationConfig(untrusted, runs=run.parent), Silent())
    assert [result.name for result in done.untrusted] == list(untrusted)
    assert {e.name for e in list_registered(["attacks"]).entries} == set(ATTACKS)


@pytest.mark.usefixtures("_with_an_old_foolbox")
def test_a_foolbox_that_cannot_be_imported_says_what_is_missing() -> None:
    with pytest.raises(CovcliError, match=f"scipy.ndimage.gone.*{ADVICE.split('.*')[1]}"):
        check_attack(parse("attack:fgsm"))
    with pytest.raises(CovcliError, match="attack:"):
        library("attack:fgsm")
