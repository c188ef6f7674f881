"""Image files in LMDB databases, one per class: the format of LSUN (Yu et al., 2015)."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.data.decoding import MAX_PIXELS, decode_bytes
from covcli.data.digests import Files, content_digests
from covcli.data.image_files import decoders
from covcli.data.images import adapt
from covcli.data.preprocessing import Shape

NAME = "data.mdb"


@dataclass(frozen=True)
class LmdbPart:
    """One database.

    torchvision's reader caches the keys as a pickle in the working directory and loads any file of
    that name without a check, so this class reads the keys itself.

    Attributes
    ----------
    folder
        The folder of the database.
    environment
        The database, opened for reading.
    keys
        The images' keys, in order.
    """

    folder: Path
    environment: Any
    keys: Sequence[bytes]


@cache
def open_part(folder: Path) -> LmdbPart:
    """Open a database. LMDB allows this only once per process, so the result is cached.

    Raises
    ------
    CovcliError
        If it cannot be read, or the package lmdb is not installed.
    """
    try:
        import lmdb
    except ImportError:
        raise CovcliError(
            "needs the package lmdb", where=folder, fix="pip install 'covcli[lsun]'"
        ) from None
    try:
        environment = lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, create=False
        )
        with environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))
    except lmdb.Error as error:
        raise CovcliError(f"cannot be read ({error})", where=folder) from None
    return LmdbPart(folder, environment, keys)


@dataclass(frozen=True)
class LmdbSource:
    """The image files of several databases, concatenated."""

    parts: Sequence[LmdbPart]
    most: int = MAX_PIXELS

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part.keys) for part in self.parts))

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Decode the rows in several threads, and stack them: uint8 of shape (B, *shape)."""
        if len(rows) == 0:
            return torch.empty((0, *shape), dtype=torch.uint8)
        return torch.cat(list(decoders().map(lambda row: self._one(row, shape), rows.tolist())))

    def _one(self, row: int, shape: Shape) -> Tensor:
        place = bisect_right(self._ends, row)
        part = self.parts[place]
        key = part.keys[row - (self._ends[place - 1] if place else 0)]
        with part.environment.begin() as transaction:
            content = transaction.get(key)
        where = part.folder / key.decode("ascii", "backslashreplace")
        return adapt(decode_bytes(content, where, self.most), shape)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the databases' files."""
        digest = hashlib.sha256()
        for part in self.parts:
            listed = Files(part.folder, [NAME], "", decoders())
            digest.update(content_digests(listed).tobytes())
        return digest.hexdigest()
