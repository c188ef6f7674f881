"""What `check` is told."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from covcli.core.choices import Mode, Seed
from covcli.core.errors import CovcliError
from covcli.core.settings import settle
from covcli.core.specs import escaped

RowFormat: TypeAlias = Literal["table", "csv", "jsonl", "json"]
FAULTS = ("untrusted", "unsure", "unreadable", "drift")  # what a command can fail on


@dataclass(frozen=True)
class CheckConfig:
    """What `check` is told; `None` takes the newest run's, or the signature's own.

    Attributes
    ----------
    images
        What to check, in order: image files, folders, specifications of data, or "-" for a list of
        files on standard input.
    checkpoint, signature, method
        The files; by default the newest of the newest run, or the newest signature of a method.
    alpha, guarantee, max_error
        See `covcli.signature.guarantee.Guarantee`.
    why
        Whether to name the three coverage points that tell most of each image.
    drift
        With at least probability 1 − δ the stream raises no alarm while nothing has changed; None
        watches for none.
    drift_state
        The file that keeps what the watch has seen from one call to the next.
    batch_size
        How many images to run at once; 0: as many as `evaluate` does.
    runs
        The folder of run folders.
    data_dir, device
        As in `covcli.SignatureConfig`.
    seed
        Of the lots that decide between equal scores, in a watch that begins.

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
    alpha: float | None = None
    guarantee: Mode | None = None
    max_error: float | None = None
    why: bool = False
    drift: Annotated[float, Interval(gt=0, lt=1)] | None = None
    drift_state: Path | None = None
    batch_size: Annotated[int, Interval(ge=0)] = 0
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
