"""The order of calibration files is no randomness: whatever it is, the promise is kept."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.data.images import ImageSet, Shape, Source
from covcli.methods import make_method
from covcli.models import checkpoint as checkpoints
from covcli.signature.fit import How, fit_judge, fit_signature
from covcli.training.train import TrainResult

ALPHA = 0.05
DRAWS = 30


@dataclass(frozen=True)
class Cameras:
    """Every fourth row comes from a camera whose noise is the harder the larger the row's number.

    A row stands for a digit and a camera: row % 4 is the camera, 0 the harder one.
    """

    source: Source
    fingerprint: str = "cameras"

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        images = self.source.read(rows // 4, shape).float()
        noise = torch.stack([
            torch.randn(shape, generator=torch.Generator().manual_seed(row))
            for row in rows.tolist()
        ])  # fmt: skip
        harder = (rows % 4 == 0)[:, None, None, None]
        return (images + torch.where(harder, 150.0, 6.0) * noise).round().clamp(0, 255).byte()


ORDERS = {
    "interleaved": lambda rows: torch.stack([rows[rows % 4 == c] for c in range(4)], 1).flatten(),
    "sorted": lambda rows: torch.cat([rows[rows % 4 == c] for c in range(4)]),
    "runs of eight": lambda rows: torch.stack(
        [rows[rows % 4 == c].view(-1, 2) for c in range(4)], 1
    ).flatten(),
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_the_rate_of_false_alarms_does_not_depend_on_the_order(
    order: str, trained: TrainResult
) -> None:
    """Calibrate as the command does, on cameras in a certain order, and count on all others."""
    digits = datasets.load("digits?split=train", "train")
    model = checkpoints.load(trained.checkpoint).model
    how = How(make_method("src"), threshold=0.5)
    signature, _, _ = fit_signature(model, digits.select(torch.arange(700)), how, Silent())
    pool = 4 * torch.arange(700, 1100)
    generator = np.random.default_rng(2)
    rates = []
    for seed in range(DRAWS):
        mixed = torch.from_numpy(generator.permutation(pool.numpy()))
        # Of each camera as many images, of other digits: 80 of each calibrate, 20 are new.
        rows = torch.cat([mixed[c * 100 : c * 100 + 100] + c for c in range(4)])
        new = torch.cat([rows[c * 100 + 80 : c * 100 + 100] for c in range(4)])
        known = ORDERS[order](rows[~torch.isin(rows, new)])
        images = ImageSet("cameras", Cameras(digits.source), known, None, digits.classes)
        judge = fit_judge(model, signature, images, Silent(), seed=seed)
        others = ImageSet("new", Cameras(digits.source), new, None, digits.classes)
        for batch in judge.sweep(others, Silent(), ""):
            rates += judge(batch.logits, batch.neurons).untrusted.tolist()
    share = float(np.mean(rates))
    # 2,400 new images; by place in the file the rate of interleaved ones is about a quarter.
    assert share < ALPHA + 0.025
    assert share > 0.015
