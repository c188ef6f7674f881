"""What `train` is told, and what it logs."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.models.sweep import Amp
from covcli.reporting.documents import EpochLog, Watch, WatchedSet
from covcli.training.epoch import Augmentation

PAUSED_FILE = "last.pt"

PAUSED = "covcli paused training"


@dataclass(frozen=True)
class TrainConfig:
    """What `train` is told."""

    method: str = "ensemble"
    trusted: str = "cifar10"
    untrusted: tuple[str, ...] = ()
    model: str = "vgg19"
    pretrained: bool = False
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
    device: str = "cpu"
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


def restored_config(content: Mapping[str, Any], run: Path, data_dir: Path | None) -> TrainConfig:
    """Return what a saved run was told; its folder and its data may have moved."""
    try:
        known = {field.name: content["settings"][field.name] for field in fields(TrainConfig)}
        known["untrusted"] = tuple(known["untrusted"])
        old = known["data_dir"]
        known |= {"runs": run.parent, "name": run.name}
        known["data_dir"] = data_dir or (Path(old) if old else None)
        return TrainConfig(**known)
    except (KeyError, TypeError) as error:
        raise CovcliError(f"does not hold together ({error!r})", where=run / PAUSED_FILE) from None


def restored_entry(document: Mapping[str, Any]) -> EpochLog:
    """Rebuild an entry of the log from its dictionary."""
    watched = document["watched"]
    if watched is not None:
        watched = Watch(watched["points"], [WatchedSet(**entry) for entry in watched["sets"]])
    return EpochLog(**{**document, "watched": watched})


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
