"""The file that a paused training goes on from: its format, and what it says of the run."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from covcli.core import settings
from covcli.core.errors import CovcliError
from covcli.core.files import Format
from covcli.core.opening import is_file
from covcli.training.config import TrainConfig

PAUSED_FILE = "last.pt"
PAUSED = Format(
    "covcli paused training",
    schema=1,
    keys=frozenset(
        {"settings", "threads", "trusted", "model", "optimizer", "schedule", "running",
         "reductions", "history", "step", "sums", "generator"}
    ),
    sealed=True,
)  # fmt: skip
# Settings that runs of earlier versions do not record.
ADDED = {"preprocess", "logits", "points"}


def read(run: Path) -> tuple[dict[str, Any], bool]:
    """Read what `Session.save` wrote of a run, and whether this user's covcli has written it.

    Raises
    ------
    CovcliError
        If the run does not wait to go on, or its file is damaged.
    """
    path = run / PAUSED_FILE
    if not is_file(path):
        raise CovcliError("holds nothing to resume", where=run)
    return PAUSED.load_own(path)


def restored_config(
    content: Mapping[str, Any], own: bool, run: Path, data_dir: Path | None
) -> TrainConfig:
    """Return what a saved run was told; its folder and its data may have moved.

    Parameters
    ----------
    own
        Whether this user's covcli has saved it; another's folder of data is not read.

    Raises
    ------
    CovcliError
        If the settings are none that a run can have.
    """
    try:
        recorded = content["settings"]
        names = [field.name for field in fields(TrainConfig)]
        told = {name: recorded[name] for name in names if name in recorded or name not in ADDED}
        folder = data_dir or (told["data_dir"] if own else None)
        moved = {"runs": run.parent, "name": run.name, "data_dir": folder}
        return settings.read(TrainConfig, told | moved)
    except (LookupError, TypeError, ValueError) as error:
        raise CovcliError(f"is inconsistent ({error})", where=run / PAUSED_FILE) from None
