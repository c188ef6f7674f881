"""The folder that the examples of docstrings run in, with a run where they name `runs/latest`.

`conftest.py` registers this module, since what it holds itself reaches the tests beside it alone.
"""

import logging
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from covcli import (
    EvaluationConfig,
    SignatureConfig,
    TrainConfig,
    build_signature,
    evaluate,
    train,
)
from covcli.attacks.attacks import ATTACKS
from covcli.core import runtime
from covcli.core.specs import Registry
from covcli.data import reading
from covcli.data.corruptions import CORRUPTIONS
from covcli.data.datasets import DATASETS
from covcli.evaluation.baselines.detectors import BASELINES
from covcli.methods import METHODS
from covcli.models.registry import MODELS
from covcli.reporting.sections import SECTIONS

TINY = Path(__file__).parent / "tiny_model.py"
REGISTRIES: tuple[Registry[Any], ...] = (
    ATTACKS, BASELINES, CORRUPTIONS, DATASETS, METHODS, MODELS, SECTIONS,
)  # fmt: skip
SHIPPED = {registry.kind: frozenset(registry) for registry in REGISTRIES}


@pytest.fixture
def _shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries hold what comes with covcli, and the tests' network; other tests add more."""
    for registry in REGISTRIES:
        known = SHIPPED[registry.kind] | {"tiny"}
        kept = {name: entry for name, entry in registry._entries.items() if name in known}
        monkeypatch.setattr(registry, "_entries", kept)


@pytest.fixture(autouse=True)
def _reading_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_process", reading.Reading())


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make demo` leaves it, made by a small network."""
    runpy.run_path(str(TINY))
    runtime.configure(0, 0)
    runs = tmp_path_factory.mktemp("demo") / "runs"
    trained = train(
        TrainConfig(
            trusted="digits", model="tiny", epochs=4, batch_size=32, learning_rate=0.1,
            calibration_split=0.25, runs=runs, name="demo",
        )
    )  # fmt: skip
    build_signature(SignatureConfig(trained.checkpoint))
    evaluate(EvaluationConfig(("photos?limit=100",), runs=runs))
    return runs.parent


@pytest.fixture(autouse=True)
def _folder_of_the_example(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not isinstance(request.node, pytest.DoctestItem):
        return
    caplog.set_level(logging.ERROR)  # or warnings would stand in the example's output
    monkeypatch.chdir(tmp_path)
    request.getfixturevalue("_shipped")  # an example's plugin is gone after it
    docstring = request.node.dtest.docstring or ""  # type: ignore[union-attr]
    if "run_attack(" in docstring:
        pytest.importorskip("foolbox")
    if "runs/latest" in docstring:
        shutil.copytree(request.getfixturevalue("demo"), tmp_path, True, dirs_exist_ok=True)
    torch.manual_seed(0)
