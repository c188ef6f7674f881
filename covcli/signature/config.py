"""What `build-signature` and `merge-signatures` are told."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from annotated_types import Interval

from covcli.core.choices import AmpMode, GranularityChoice, Mode, Seed
from covcli.core.errors import CovcliError
from covcli.core.settings import settle

PixelStatistics: TypeAlias = tuple[float, ...]  # a number a channel


@dataclass(frozen=True)
class SignatureConfig:
    """What `build-signature` is told; `None` takes the checkpoint's own.

    Attributes
    ----------
    checkpoint
        The network: a checkpoint, or a bare state dict.
    method
        A specification of a method, such as `mrc?sections=4`; by default the trained one, or
        `ensemble`.
    granularity
        How activations become neurons.
    trusted
        The images to build from; by default those that trained the network.
    calibration
        Held-out trusted images; by default the split that training held out.
    confidence_threshold
        Softmax confidence from which on a correct image is trusted; by default the trained one, or
        0.9.
    alpha, guarantee, max_error
        See `covcli.signature.guarantee.Guarantee`.
    model, statistics
        Of a bare state dict: its model, and mean and deviation of the pixels that it was trained
        with.
    preprocess
        Of a bare state dict: how images are prepared for its model.
    logits
        Of a bare state dict, where the model returns several tensors: the logits' name.
    points
        Patterns that choose coverage points; by default those of the training.
    runs, output
        The folder of run folders, and the signature's file; by default it stands beside the
        checkpoint.
    data_dir
        The folder that downloaded sets live in; by default the user's cache.
    force
        Whether to overwrite an earlier signature.
    device
        Where to compute: cpu, cuda, cuda:1 or auto.
    amp
        Whether to compute in bfloat16.
    seed
        Of every random choice.

    Examples
    --------
    >>> SignatureConfig("ckpt.pt", granularity="pixel")
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: --granularity pixel: must be 'channel' or 'unit'
    """

    checkpoint: Path
    method: str | None = None
    granularity: GranularityChoice = "channel"
    trusted: str | None = None
    calibration: str | None = None
    confidence_threshold: Annotated[float, Interval(ge=0, le=1)] | None = None
    alpha: float = 0.05
    guarantee: Mode = "marginal"
    max_error: float | None = None
    model: str | None = None
    statistics: tuple[PixelStatistics, PixelStatistics] | None = None
    preprocess: str | None = None
    logits: str = ""
    points: tuple[str, ...] = ()
    runs: Path = Path("runs")
    data_dir: Path | None = None
    output: Path | None = None
    force: bool = False
    device: str = "auto"
    amp: AmpMode = "off"
    seed: Seed = 0

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class MergeConfig:
    """What `merge-signatures` is told.

    Attributes
    ----------
    parts
        The signatures to merge.
    output
        The merged signature's file.
    checkpoint
        Their network; by default checkpoint.pt beside the first of them.
    calibration
        The calibration images that they share; by default as the first of them records, which may
        name a path only if the same user has built it.
    data_dir, force, device, seed
        As in `SignatureConfig`.
    """

    parts: tuple[Path, ...]
    output: Path
    checkpoint: Path | None = None
    calibration: str | None = None
    data_dir: Path | None = None
    force: bool = False
    device: str = "auto"
    seed: Seed = 0

    def __post_init__(self) -> None:
        settle(self)


def read_statistics(
    mean: str | None, deviation: str | None
) -> tuple[PixelStatistics, PixelStatistics] | None:
    """Read `--mean` and `--std`, three numbers each with commas between; both or neither.

    Raises
    ------
    CovcliError
        If one is missing or is not three finite numbers, or a deviation is not above 0.

    Examples
    --------
    >>> read_statistics("0.5,0.5,0.5", "0.2,0.2,0.2")
    ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    """
    if mean is None and deviation is None:
        return None
    try:
        means = tuple(float(part) for part in (mean or "").split(","))
        deviations = tuple(float(part) for part in (deviation or "").split(","))
    except ValueError:
        means = deviations = ()
    finite = all(map(math.isfinite, [*means, *deviations]))
    if not (len(means) == len(deviations) == 3 and finite and min(deviations) > 0):
        raise CovcliError("expected three numbers each, as 0.49,0.48,0.45", where="--mean, --std")
    return means, deviations
