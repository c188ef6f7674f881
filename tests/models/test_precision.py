"""bfloat16: another way to compute, recorded in the signature, with nearly the same verdicts."""

import time
from pathlib import Path

import pytest
import torch

from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.methods import METHODS
from covcli.models import checkpoint
from covcli.models.architectures import Precision
from covcli.models.sweep import choose_precision
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.monitor import Monitor
from covcli.training.train import TrainResult

# At most so large a share of verdicts may differ between the precisions. A bfloat16 has 8 bits:
# a score moves by about a hundredth, and with it what lies that close to the threshold.
DIFFERENT = 0.03


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS.get(name).contributions])
def test_both_precisions_give_nearly_the_same_verdicts(
    name: str, trained: TrainResult, tmp_path: Path
) -> None:
    monitors = {}
    for amp in ("off", "bf16"):
        output = tmp_path / f"{amp}.safetensors"
        config = SignatureConfig(trained.checkpoint, method=name, amp=amp, output=output)  # type: ignore[arg-type]
        result = build_signature(config, Silent())
        assert result.precision == {"off": "float32", "bf16": "bfloat16"}[amp]
        monitors[amp] = Monitor.load(trained.checkpoint, output)
    trusted = datasets.load("digits", "test").source.read(torch.arange(360), (3, 32, 32))
    photos = datasets.load("photos?limit=200", "test").source.read(torch.arange(200), (3, 32, 32))
    images = torch.cat([trusted, photos])
    one, other = (monitors[amp](images) for amp in ("off", "bf16"))
    assert not torch.equal(one.logits, other.logits)  # it was computed otherwise
    assert other.logits.dtype == torch.float32
    assert float((one.untrusted != other.untrusted).double().mean()) <= DIFFERENT
    assert float((one.predicted[:360] != other.predicted[:360]).double().mean()) <= DIFFERENT
    assert float(other.untrusted[:360].double().mean()) < 0.1  # calibrated in its own precision


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_auto_takes_the_faster_precision(faster: Precision, trained: TrainResult) -> None:
    model = checkpoint.load(trained.checkpoint).model

    def work(images: torch.Tensor) -> None:
        assert images.shape[1:] == model.spec.shape
        time.sleep(0.0 if model.precision == faster else 0.02)

    assert choose_precision("auto", model, work) == faster
    assert model.precision == "float32"  # as before
    assert choose_precision("bf16", model, work) == "bfloat16"
    assert choose_precision("off", model, work) == "float32"
