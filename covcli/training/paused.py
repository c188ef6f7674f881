"""The file from which an interrupted training is resumed."""

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
# Settings that earlier versions did not record.
ADDED = {"preprocess", "logits", "points"}


def read(run: Path) -> tuple[dict[str, Any], bool]:
    """Read the file that `Session.save` wrote; also return whether this user's covcli wrote it.

    Raises
    ------
    CovcliError
        If the run has nothing to resume, or its file is damaged.
    """
    path = run / PAUSED_FILE
    if not is_file(path):
        raise CovcliError("holds nothing to resume", where=run)
    return PAUSED.load_own(path)


def restored_config(
    content: Mapping[str, Any], own: bool, run: Path, data_dir: Path | None
) -> TrainConfig:
    """Return the settings of a saved run; its folder and its data may have moved.

    Parameters
    ----------
    content
        The content of the file.
    own
        Whether this user's covcli wrote it; otherwise its data folder is ignored.
    run
        The run folder.
    data_dir
        The folder of downloaded sets; None: the recorded one.

    Raises
    ------
    CovcliError
        If the settings are invalid.
    """
    try:
        recorded = content["settings"]
        names = [field.name for field in fields(TrainConfig)]
        known = {name: recorded[name] for name in names if name in recorded or name not in ADDED}
        folder = data_dir or (known["data_dir"] if own else None)
        moved = {"runs": run.parent, "name": run.name, "data_dir": folder}
        return settings.read(TrainConfig, known | moved)
    except (LookupError, TypeError, ValueError) as error:
        raise CovcliError(f"is inconsistent ({error})", where=run / PAUSED_FILE) from None
