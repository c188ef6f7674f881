"""The settings of `train`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from covcli.core.choices import MOST, AmpMode, AugmentationChoice, Seed
from covcli.core.errors import CovcliError
from covcli.core.settings import settle

Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `train`.

    Attributes
    ----------
    method
        The method of the later signature.
    trusted
        The training images: a specification of labelled data.
    untrusted
        Untrusted sets whose coverage is logged every epoch.
    model, pretrained
        The network, and whether it starts from published ImageNet weights.
    preprocess
        The preprocessing of images, as in `--preprocess`. None: that of the architecture.
    logits
        For a model that returns several tensors: the name of the logits.
    points
        Patterns that choose coverage points; empty: the default points, see `Survey.choose`.
    epochs, batch_size
        Passes over the training images, and images per step (over all ranks), at least 2.
    learning_rate, weight_decay
        The peak of the one-cycle schedule, and the weight decay of matrices and kernels.
    confidence_threshold
        The smallest softmax confidence of a trusted correct answer, in [0, 1).
    confidence_weight
        The weight of the ConfidenceLoss; 0 trains without it.
    signature_every
        The number of epochs between two updates of the running signature.
    calibration_split
        The share of the images held out for calibration, in [0, 1).
    save_every
        How often to save the state for `resume`: a number of epochs ("2"), or minutes ("10m").
    augment
        The augmentation: "none", "crop", "crop-flip" or "auto".
    seed
        The seed of all random choices, from 0 to 2³¹ − 1.
    device, amp
        The device (cpu, cuda, cuda:1 or auto), and whether to compute in bfloat16.
    name, runs
        The name of the run folder (None: model, method and time), and the folder of all runs.
    data_dir
        The folder of downloaded sets; None: the user's cache.

    Raises
    ------
    CovcliError
        If a value has the wrong type or is out of bounds.

    Examples
    --------
    >>> TrainConfig(trusted="digits", epochs=0)
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: --epochs 0: must be greater than or equal to 1
    """

    method: str = "ensemble"
    trusted: str = "cifar10"
    untrusted: tuple[str, ...] = ()
    model: str = "vgg19"
    pretrained: bool = False
    preprocess: str | None = None
    logits: str = ""
    points: tuple[str, ...] = ()
    epochs: Annotated[int, Interval(ge=1, le=MOST)] = 10
    batch_size: Annotated[int, Interval(ge=2, le=MOST)] = 64
    learning_rate: Annotated[float, Interval(gt=0, lt=math.inf)] = 0.05
    weight_decay: Amount = 5e-4
    confidence_threshold: ShareBelowOne = 0.9
    confidence_weight: Amount = 0.1
    signature_every: Annotated[int, Interval(ge=1, le=MOST)] = 1
    calibration_split: ShareBelowOne = 0.1
    save_every: str = "1"
    augment: AugmentationChoice = "auto"
    seed: Seed = 0
    device: str = "auto"
    amp: AmpMode = "off"
    name: str | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        settle(self)
        if save_interval(self.save_every) is None:
            raise CovcliError(
                "must be a number of epochs, or of minutes such as 10m",
                where=f"--save-every {self.save_every}",
            )


def save_interval(text: str) -> tuple[int | None, float | None] | None:
    """Parse `--save-every`: `2` are epochs, `10m` minutes; return (epochs, seconds), or None.

    Examples
    --------
    >>> save_interval("2"), save_interval("10m"), save_interval("never")
    ((2, None), (None, 600.0), None)
    """
    minutes = text.endswith("m")
    try:
        value = float(text.removesuffix("m")) if minutes else int(text)
    except ValueError:
        return None
    if not (0 <= value <= MOST and (minutes or value >= 1)):
        return None
    return (None, 60 * value) if minutes else (int(value), None)
