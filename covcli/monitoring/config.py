"""Configuration of `check`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from covcli.core.choices import MOST, Mode, Rate, Seed
from covcli.core.errors import CovcliError
from covcli.core.settings import settle
from covcli.core.specs import escaped

RowFormat: TypeAlias = Literal["table", "csv", "jsonl", "json"]
FAULTS = ("untrusted", "unsure", "unreadable", "drift")  # what a command can fail on


@dataclass(frozen=True)
class CheckConfig:
    """Configuration of `check`; `None` selects the newest run, or the signature's own value.

    Attributes
    ----------
    images
        The images, in order: image files, folders, specifications of data sets, or "-" for a list
        of files on standard input.
    checkpoint, signature, method
        The files; by default the newest of the newest run, or the newest signature of a method.
    alpha, guarantee, max_error
        See `covcli.signature.guarantee.Guarantee`.
    why
        Whether to name the three coverage points with the largest shares of each image's score.
    drift
        δ in (0, 1): while nothing changes, the probability of any drift alarm is at most δ. None
        for no drift watch.
    drift_state
        The file of the drift watch's state, which continues from one call to the next.
    batch_size
        How many images to run at once; 0 selects the number that `evaluate` uses.
    runs
        The folder of run folders.
    data_dir, device
        As in `covcli.SignatureConfig`.
    seed
        Seed of the random numbers that order equal scores, for a new drift watch.

    Examples
    --------
    >>> CheckConfig(["photos/"], drift=2)
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: --drift 2: must be less than 1
    """

    images: tuple[str, ...]
    checkpoint: Path | None = None
    signature: Path | None = None
    method: str | None = None
    alpha: Rate | None = None
    guarantee: Mode | None = None
    max_error: Rate | None = None
    why: bool = False
    drift: Rate | None = None
    drift_state: Path | None = None
    batch_size: Annotated[int, Interval(ge=0, le=MOST)] = 0
    runs: Path = Path("runs")
    data_dir: Path | None = None
    device: str = "auto"
    seed: Seed = 0

    def __post_init__(self) -> None:
        names = tuple(escaped(os.fspath(name)) for name in self.images)
        object.__setattr__(self, "images", names)
        settle(self)
        if not self.images:
            raise CovcliError("name images: files, folders, data, or - for a list on stdin")
        if self.drift_state is not None and self.drift is None:
            raise CovcliError(
                "keeps nothing", where=f"--drift-state {self.drift_state}", fix="add --drift 0.01"
            )
