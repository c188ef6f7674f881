"""A small network that trains in seconds, and a run of it that many tests read."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import doctest_folder
import numpy as np
import pytest
import torch

import covcli
from covcli.core import runtime, signals
from covcli.core.progress import Silent
from covcli.core.signals import Interrupts
from covcli.data import datasets
from covcli.data.images import DataRecord
from covcli.data.listing import Split
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.models import checkpoint as checkpoints
from covcli.signature.build import SignatureConfig, SignatureResult, build_signature
from covcli.training.train import TrainConfig, TrainResult, train

PLUGIN = Path(__file__).parent / "tiny_model.py"
# To import them registers a device for the rest of the process; see `test_devices.py`.
collect_ignore = ["simulated_device.py", "device_worker.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(doctest_folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is no UTF-8 in captured output: reports travel between processes as UTF-8."""
    report = yield
    report.sections = [(title, _utf8(text)) for title, text in report.sections]
    return report


def _utf8(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the key of the tests out of the user's home; commands that tests start share it."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session", autouse=True)
def _tiny_model() -> None:
    import runpy

    runpy.run_path(str(PLUGIN))
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    runtime.configure(0, 0)


def hears_hang_up() -> None:
    """Begin a process as a terminal does; under `nohup` this one ignores SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    """Handlers of signals, as a command installs them."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    installed = Interrupts()
    installed.install()
    yield installed
    for number, handler in before.items():
        signal.signal(number, handler)


def reload_own(record: DataRecord, split: Split) -> datasets.ImageSet:
    """Load what a record names, as from a file that the user's own covcli has written."""
    return datasets.reload(replace(record, seal="own"), split, None, "")


def tiny_config(runs: Path, **changes: object) -> TrainConfig:
    settings = {
        "trusted": "digits", "model": "tiny", "epochs": 4, "batch_size": 32, "runs": runs,
        "learning_rate": 0.1, "calibration_split": 0.25, "signature_every": 1, "name": "tiny",
        "confidence_weight": 0.1,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, _tiny_model: None) -> TrainResult:
    """A trained run; tests that write into it take `run` instead."""
    runtime.configure(0, 0)
    config = tiny_config(tmp_path_factory.mktemp("runs"), untrusted=("photos?limit=64",))
    return train(config, Silent())


@pytest.fixture(scope="session")
def signed(trained: TrainResult) -> SignatureResult:
    return build_signature(SignatureConfig(trained.checkpoint, method="mrc"), Silent())


@pytest.fixture
def run(signed: SignatureResult, tmp_path: Path) -> Path:
    """A private copy of the trained and signed run, in a `runs` folder of its own."""
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(signed.path.parent, folder)
    (folder.parent / "latest").symlink_to("tiny")
    return folder


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as so many ranks on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    command += ["-m", "covcli", *map(str, arguments), "--plugin", str(PLUGIN)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


UNTRUSTED = ("photos?limit=200", "noise:uniform?limit=100", "attack:fgsm?limit=60&eps=0.3")


def neurons_of(path: Path, images: datasets.ImageSet) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Run a network by plain PyTorch, hooking its coverage layers by hand."""
    model = checkpoints.load(path).model
    seen: list[torch.Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, covcli.CoverageLayer)]
    for layer in layers:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    pixels = images.batch(torch.arange(len(images)), model.spec.shape).float() / 255
    with torch.no_grad():
        logits = model(pixels)
    parts = [torch.cat([s.mean((2, 3)), s.amax((2, 3))], 1) if s.ndim == 4 else s for s in seen]
    return torch.cat(parts, 1).numpy(), logits.numpy(), [p.shape[1] for p in parts]


@pytest.fixture(scope="session")
def foolbox() -> None:
    """Skip the test if the library of attacks, an optional package, is not installed."""
    pytest.importorskip("foolbox")


@pytest.fixture
def evaluated(run: Path, foolbox: None) -> Path:
    evaluate(
        EvaluationConfig(UNTRUSTED, runs=run.parent, baselines=("energy",), explain=1), Silent()
    )
    return run
