"""The settings of `build-signature` and `merge-signatures`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from annotated_types import Interval

from covcli.core.choices import AmpMode, GranularityChoice, Mode, Rate, Seed
from covcli.core.errors import CovcliError
from covcli.core.settings import settle

PixelStatistics: TypeAlias = tuple[float, ...]  # one number per channel


@dataclass(frozen=True)
class SignatureConfig:
    """The settings of `build-signature`.

    Attributes
    ----------
    checkpoint
        The network: a checkpoint, or a bare state dict.
    method
        The specification of a method, such as `mrc?sections=4`. None: the method of the training,
        or `ensemble`.
    granularity
        How activations become neurons: "channel" or "unit".
    trusted
        The images to build from. None: those that trained the network.
    calibration
        Held-out trusted images. None: the split that training held out.
    confidence_threshold
        A correctly classified image is trusted if its softmax confidence is at least this, in
        [0, 1]. None: the value of the training, or 0.9.
    alpha, guarantee, max_error
        See `covcli.signature.guarantee.Guarantee`.
    model, statistics
        For a bare state dict: its model, and mean and deviation of the pixels that it was trained
        with, in [0, 1].
    preprocess
        For a bare state dict: the preprocessing of images, as in `--preprocess`.
    logits
        For a bare state dict whose model returns several tensors: the name of the logits.
    points
        Patterns that choose coverage points; empty: those of the training.
    runs, output
        The folder of run folders, and the signature's file. None: a file beside the checkpoint.
    data_dir
        The folder of downloaded sets; None: the user's cache.
    force
        Whether to overwrite an existing signature.
    mergeable
        Whether to keep what `merge-signatures` needs. The file of `ensemble` or `gauss` is then
        much larger; other methods' files can always be merged.
    device
        The device: cpu, cuda, cuda:1 or auto.
    amp
        Whether to compute in bfloat16: "off", "bf16" or "auto".
    seed
        The seed of all random choices, from 0 to 2³¹ − 1.

    Raises
    ------
    CovcliError
        If a value has the wrong type or is out of bounds.

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
    alpha: Rate = 0.05
    guarantee: Mode = "marginal"
    max_error: Rate | None = None
    model: str | None = None
    statistics: tuple[PixelStatistics, PixelStatistics] | None = None
    preprocess: str | None = None
    logits: str = ""
    points: tuple[str, ...] = ()
    runs: Path = Path("runs")
    data_dir: Path | None = None
    output: Path | None = None
    force: bool = False
    mergeable: bool = False
    device: str = "auto"
    amp: AmpMode = "off"
    seed: Seed = 0

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class MergeConfig:
    """The settings of `merge-signatures`.

    Attributes
    ----------
    parts
        The signatures to merge, at least two.
    output
        The merged signature's file.
    checkpoint
        Their network. None: checkpoint.pt beside the first signature.
    calibration
        The calibration images that they share. None: those that the first signature records, which
        may name a path only if the same user built it.
    data_dir, force, device, seed
        As in `SignatureConfig`.

    Examples
    --------
    >>> MergeConfig(["a.safetensors", "b.safetensors"], "whole.safetensors").parts[0]
    PosixPath('a.safetensors')
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
    """Parse `--mean` and `--std`: three numbers each, separated by commas; both or neither.

    Raises
    ------
    CovcliError
        If one is missing or is not three finite numbers, or a deviation is not positive.

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
