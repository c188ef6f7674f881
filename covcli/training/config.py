"""What `train` is told, and what it logs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from covcli.models.sweep import Amp
from covcli.reporting.documents import EpochLog
from covcli.training.epoch import Augmentation


@dataclass(frozen=True)
class TrainConfig:
    """What `train` is told."""

    method: str = "ensemble"
    trusted: str = "cifar10"
    untrusted: tuple[str, ...] = ()
    model: str = "vgg19"
    pretrained: bool = False
    preprocess: str | None = None
    logits: str = ""
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    confidence_threshold: float = 0.9
    confidence_weight: float = 0.1
    signature_every: int = 1
    calibration_split: float = 0.1
    save_every: str = "1"
    augment: Augmentation | Literal["auto"] = "auto"
    seed: int = 0
    device: str = "auto"
    amp: Amp = "off"
    name: str | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None


def split_rows(images: int, calibration_split: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return which images train the network and which are held out, each in ascending order."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    held_out = round(images * calibration_split)
    return order[held_out:].sort().values, order[:held_out].sort().values


def first_penalised(epochs: int) -> int:
    """Return the first epoch, from 1 on, of the second half, once the network knows its classes."""
    return max(2, epochs // 2 + 1)


def save_interval(text: str) -> tuple[int | None, float | None] | None:
    """Read `--save-every`: `2` means epochs and `10m` minutes, as (epochs, seconds); else None."""
    minutes = text.endswith("m")
    try:
        value = float(text.removesuffix("m")) if minutes else int(text)
    except ValueError:
        return None
    if not (0 <= value < float("inf") and (minutes or value >= 1)):
        return None
    return (None, 60 * value) if minutes else (int(value), None)


def describe(entry: EpochLog, epochs: int) -> str:
    """Word one epoch in a line."""
    text = (
        f"epoch {entry.epoch}/{epochs}: loss {entry.loss:.4f} (cross-entropy "
        f"{entry.cross_entropy:.4f}, penalty {entry.penalty:.4f}), accuracy {entry.accuracy:.1%}, "
        f"held out {entry.held_out_accuracy:.1%}"
    )
    if entry.confident_accuracy is not None:
        text += f", confident {entry.confident:.1%} of which right {entry.confident_accuracy:.1%}"
    if entry.watched:
        shares = [f"{s.name} {s.mean_coverage:.1%}" for s in entry.watched.sets]
        text += f"; coverage {', '.join(shares)}"
    return text
