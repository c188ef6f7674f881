"""The file that a paused training goes on from: its format, and what it says of the run."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from covcli.core import settings
from covcli.core.errors import CovcliError
from covcli.core.files import Format
from covcli.training.config import TrainConfig

PAUSED_FILE = "last.pt"
PAUSED = Format(
    "covcli paused training",
    schema=1,
    keys=frozenset(
        {"settings", "threads", "trusted", "model", "optimizer", "schedule", "running",
         "reductions", "history", "step", "sums", "generator"}
    ),
)  # fmt: skip
# Settings that runs of earlier versions do not record.
ADDED = {"preprocess", "logits"}


def read(run: Path) -> dict[str, Any]:
    """Read what `Session.save` wrote of a run; a run without it is a CovcliError."""
    path = run / PAUSED_FILE
    if not path.is_file():
        raise CovcliError("holds nothing to resume", where=run)
    return PAUSED.load(path)


def restored_config(content: Mapping[str, Any], run: Path, data_dir: Path | None) -> TrainConfig:
    """Return what a saved run was told; its folder and its data may have moved.

    Raises
    ------
    CovcliError
        If the settings are none that a run can have.
    """
    try:
        recorded = content["settings"]
        names = [field.name for field in fields(TrainConfig)]
        told = {name: recorded[name] for name in names if name in recorded or name not in ADDED}
        moved = {"runs": run.parent, "name": run.name, "data_dir": data_dir or told["data_dir"]}
        return settings.read(TrainConfig, told | moved)
    except (LookupError, TypeError, ValueError) as error:
        raise CovcliError(f"does not hold together ({error})", where=run / PAUSED_FILE) from None
