"""DATASETS: the registry of data loaders, and the request that a loader receives."""

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
    """The request that a loader receives.

    A plugin registers a loader by `@DATASETS.add(NAME)`; it takes a Request and returns an
    `ImageSet`.

    Attributes
    ----------
    spec
        The parsed specification. `load` applies its parameters in `PARTS`; loaders ignore them.
    split
        "train" or "test".
    folder
        The folder of downloaded sets; None: the one of `default_data_dir`.
    ran_in
        A second folder for relative paths, used if a path is not in the working directory.
    in_order
        Whether the images will be read once and in their order, so that a source may hold no more
        than it reads.

    Examples
    --------
    >>> import torch
    >>> from covcli.data.datasets import load
    >>> from covcli.data.images import in_memory
    >>> @DATASETS.add("black")
    ... def black(request):
    ...     without_argument(request)
    ...     pixels = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    ...     return in_memory(request.spec.text, pixels, labels=None)
    >>> len(load("black?limit=5", "test"))
    5
    """

    spec: Spec
    split: Split
    folder: Path | None = None
    ran_in: Path | None = None
    in_order: bool = False

    @property
    def data_dir(self) -> Path:
        """The folder of downloaded sets."""
        return self.folder or default_data_dir()


log = logging.getLogger(__name__)
Loader: TypeAlias = Callable[[Request], ImageSet]
DATASETS: Registry[Loader] = Registry("dataset")
# The parameters of every data specification, which select a part of the data.
PARTS = ["split", "offset", "limit", "shuffle", "first"]


def default_data_dir() -> Path:
    """Return the folder of downloaded sets: COVCLI_DATA_DIR, or covcli's folder in the cache.

    Raises
    ------
    CovcliError
        If COVCLI_DATA_DIR is not set and the user has no home folder.
    """
    if folder := os.environ.get("COVCLI_DATA_DIR"):
        return Path(folder)
    if (cache := user_cache()) is None:
        raise CovcliError("the user has no home folder to keep data in", fix="name a --data-dir")
    return cache


@cache
def say_once(note: str) -> None:
    """Log a warning once per process."""
    log.warning("%s", note)


def without_argument(request: Request, allowed: Sequence[str] = ()) -> None:
    """Raise a CovcliError if a specification has an argument or an unknown parameter.

    Parameters
    ----------
    request
        The request.
    allowed
        Parameters that are known besides `PARTS`.
    """
    request.spec.only([*PARTS, *allowed])
    if request.spec.argument:
        raise CovcliError(f"{request.spec.name!r} takes no argument", where=request.spec.text)
