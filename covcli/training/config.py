"""What `train` is told."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from covcli.core.choices import AmpMode, AugmentationChoice, Seed
from covcli.core.errors import CovcliError
from covcli.core.settings import settle

Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class TrainConfig:
    """What `train` is told.

    Attributes
    ----------
    method
        The method of the signature that the run is meant for.
    trusted
        The images to learn: a specification of labelled data.
    untrusted
        Sets to watch beside, in which coverage is logged every epoch.
    model, pretrained
        The network, and whether it starts from the library's ImageNet weights.
    preprocess
        How images are prepared for it; by default as its architecture has it.
    logits
        Where it returns several tensors: the logits' name.
    points
        Patterns that choose coverage points; by default those of the network, see `Survey.choose`.
    epochs, batch_size
        Passes over the training images, and images a step, of all ranks together.
    learning_rate, weight_decay
        The peak of the one-cycle schedule, and the decay of matrices and kernels.
    confidence_threshold
        Softmax confidence from which on a correct answer is trusted.
    confidence_weight
        The weight of the ConfidenceLoss; 0 trains without it.
    signature_every
        Epochs between two refreshes of the running signature.
    calibration_split
        Share of the images held out to calibrate.
    save_every
        Save what `resume` needs every so many epochs ("2"), or minutes ("10m").
    augment
        How training images are changed.
    seed
        Of every random choice.
    device, amp
        Where to compute (cpu, cuda, cuda:1 or auto), and whether in bfloat16.
    name, runs
        The run folder's name, by default made of model, method and time; and the folder of all.
    data_dir
        The folder that downloaded sets live in; by default the user's cache.

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
    epochs: Annotated[int, Interval(ge=1)] = 10
    batch_size: Annotated[int, Interval(ge=2)] = 64
    learning_rate: Annotated[float, Interval(gt=0, lt=math.inf)] = 0.05
    weight_decay: Amount = 5e-4
    confidence_threshold: ShareBelowOne = 0.9
    confidence_weight: Amount = 0.1
    signature_every: Annotated[int, Interval(ge=1)] = 1
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
                "must be a number of epochs, or of minutes as 10m",
                where=f"--save-every {self.save_every}",
            )


def save_interval(text: str) -> tuple[int | None, float | None] | None:
    """Read `--save-every`: `2` means epochs and `10m` minutes, as (epochs, seconds); else None.

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
    if not (0 <= value < math.inf and (minutes or value >= 1)):
        return None
    return (None, 60 * value) if minutes else (int(value), None)
