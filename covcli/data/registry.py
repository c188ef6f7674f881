"""DATASETS: the table of data, and what a loader in it is asked for."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from covcli.core.errors import CovcliError
from covcli.core.specs import Registry, Spec
from covcli.data.digests import user_cache
from covcli.data.images import ImageSet
from covcli.data.listing import Split


@dataclass(frozen=True)
class Request:
    """What a loader is asked for.

    Attributes
    ----------
    spec
        The parsed specification; `PARTS` of it are applied by `load`, not by loaders.
    split
        "train" or "test".
    folder
        The folder that downloaded sets live in; None for the one of `default_data_dir`.
    ran_in
        Where relative paths begin too, if there is nothing where the command runs.
    """

    spec: Spec
    split: Split
    folder: Path | None = None
    ran_in: Path | None = None

    @property
    def data_dir(self) -> Path:
        """The folder that downloaded sets live in."""
        return self.folder or default_data_dir()


log = logging.getLogger(__name__)
Loader: TypeAlias = Callable[[Request], ImageSet]
DATASETS: Registry[Loader] = Registry("dataset")
# The parameters that every form of data has: which part of it to take.
PARTS = ["split", "offset", "limit", "shuffle", "first"]


def default_data_dir() -> Path:
    """Return COVCLI_DATA_DIR, or covcli's folder in the user's cache.

    Raises
    ------
    CovcliError
        If neither is known: the user has no home.
    """
    if folder := os.environ.get("COVCLI_DATA_DIR"):
        return Path(folder)
    if (cache := user_cache()) is None:
        raise CovcliError("the user has no home folder to keep data in", fix="name a --data-dir")
    return cache


@cache
def say_once(note: str) -> None:
    """Log a warning, unless this process has logged it before."""
    log.warning("%s", note)


def without_argument(request: Request, allowed: Sequence[str] = ()) -> None:
    """Raise a CovcliError if a specification has an argument, or a parameter that is unknown."""
    request.spec.only([*PARTS, *allowed])
    if request.spec.argument:
        raise CovcliError(f"{request.spec.name!r} takes no argument", where=request.spec.text)
