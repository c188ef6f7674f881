"""Images in files, decoded on reading by threads that are shared by the whole process."""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from covcli.core import distributed
from covcli.core.errors import CovcliError, first_few, one_line
from covcli.core.files import write_bytes
from covcli.data import digests
from covcli.data.decoding import MAX_PIXELS, UnreadableError, decode
from covcli.data.images import ImageSet, adapt, compute_alone
from covcli.data.preprocessing import Shape

log = logging.getLogger(__name__)
MOST_THREADS = 16
NAMED = 10  # at most this many unreadable files are named, the others counted
MOST_UNREADABLE = 0.05  # the largest share of files that may be skipped


@cache
def decoders() -> ThreadPoolExecutor:
    """Return the decoding threads, one per processor (PIL releases the interpreter's lock)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = min(MOST_THREADS, max(2, count or 1))
    return ThreadPoolExecutor(threads, "decode", initializer=compute_alone)


def list_unreadable(path: Path, sets: Iterable[ImageSet]) -> int:
    """Write the list of files that were skipped as unreadable; only the first rank writes.

    Parameters
    ----------
    path
        The list to write: one line per file, with the reason. Without such files, none is written.
    sets
        The sets whose skipped files are listed.

    Returns
    -------
    int
        The number of files.
    """
    lines = [line for images in sets for line in images.origin.unreadable]
    lines = list(dict.fromkeys(lines))  # two sets can contain the same files
    if lines and distributed.is_first():
        write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
        log.warning("%d files cannot be read: left out, listed in %s", len(lines), path)
    return len(lines)


@dataclass(frozen=True)
class FileSource:
    """Image files, decoded on reading; their sizes may differ.

    Attributes
    ----------
    folder
        The folder that the names are relative to.
    files
        The names of the files.
    key
        Distinguishes lists of files of one folder in the cache of digests.
    most
        The maximum number of pixels of an image.

    Examples
    --------
    >>> from PIL import Image
    >>> Image.new("RGB", (9, 8)).save("x.png")
    >>> FileSource(Path(), ["x.png"]).read(torch.tensor([0]), (3, 4, 4)).shape
    torch.Size([1, 3, 4, 4])
    """

    folder: Path
    files: Sequence[str]
    key: str = ""
    most: int = MAX_PIXELS

    def path(self, row: int) -> Path:
        """Return the path of one file."""
        return self.folder / self.files[row]

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Decode the rows in several threads, and stack them.

        Parameters
        ----------
        rows
            Which files, int64 of shape (B,).
        shape
            Channels (1 or 3), height and width to return.

        Returns
        -------
        Tensor
            uint8 of shape (B, *shape).

        Raises
        ------
        CovcliError
            If a file cannot be read; the message names all unreadable files.
        """
        if len(rows) == 0:
            return torch.empty((0, *shape), dtype=torch.uint8)
        try:
            return torch.cat(list(decoders().map(lambda row: self.one(row, shape), rows.tolist())))
        except UnreadableError as error:
            raise self._broken(error) from None

    def one(self, row: int, shape: Shape) -> Tensor:
        """Decode one row, uint8 of shape (1, *shape); an `UnreadableError` if that cannot be."""
        return adapt(decode(self.path(row), self.most), shape)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the files' relative names and contents."""
        digest = hashlib.sha256("\0".join(self.files).encode("utf-8", "surrogateescape"))
        digest.update(self._contents.tobytes())
        return digest.hexdigest()

    @cached_property
    def _contents(self) -> digests.Digests:
        return digests.content_digests(self._listed)

    @property
    def row_digests(self) -> np.ndarray:
        """A digest of each file's content, int64 of shape (N,), see `covcli.data.copies`."""
        return np.ascontiguousarray(self._contents[:, :8]).view(np.int64)[:, 0]

    @property
    def _listed(self) -> digests.Files:
        return digests.Files(self.folder, self.files, self.key, decoders())

    def unreadable(self) -> list[UnreadableError]:
        """Decode all files, and return an error for each that cannot be decoded."""
        what = f"readable by {PIL.__version__} up to {self.most}"
        can = digests.readable(self._listed, lambda path: decode(path, self.most), what)
        errors = []
        for row in (~can).nonzero()[0].tolist():
            try:
                decode(self.path(row), self.most)
            except UnreadableError as error:
                errors.append(error)
        return errors

    def _broken(self, first: UnreadableError) -> CovcliError:
        """Return the error that names all files that cannot be read."""
        if len(self.files) > 1:
            log.warning(
                "%s: cannot be read as an image: looking for others among %d files",
                first.path, len(self.files),
            )  # fmt: skip
        errors = self.unreadable() or [first]
        if len(errors) == 1:
            advice = "repair or remove it, or leave it out by --skip-unreadable"
            return UnreadableError(errors[0].path, errors[0].reason, advice)
        return CovcliError(
            f"{len(errors)} of {len(self.files)} files cannot be read as images: "
            f"{self._spelled(errors)}",
            where=self.folder,
            fix="repair or remove them, or leave them out by --skip-unreadable",
        )

    def _spelled(self, errors: Sequence[UnreadableError]) -> str:
        named = [f"{os.path.relpath(error.path, self.folder)} ({error.reason})" for error in errors]
        return first_few(named, NAMED)

    def less_unreadable(self, images: ImageSet) -> ImageSet:
        """Return a set without the files that cannot be read; its origin lists them.

        Raises
        ------
        CovcliError
            If more than 5% of the files cannot be read.
        """
        errors = self.unreadable()
        if not errors:
            return images
        share = len(errors) / len(self.files)
        if share > MOST_UNREADABLE:
            raise CovcliError(
                f"{len(errors)} of {len(self.files)} files cannot be read as images, more than "
                f"{MOST_UNREADABLE:.0%}: {self._spelled(errors)}",
                where=self.folder,
                fix="repair or remove them",
            )
        bad = {str(error.path) for error in errors}
        kept = [str(self.path(row)) not in bad for row in range(len(self.files))]
        lines = tuple(one_line(f"{error.path}: {error.reason}") for error in errors)
        return replace(
            images.select(torch.tensor(kept).nonzero()[:, 0]),
            origin=replace(images.origin, unreadable=lines),
        )
