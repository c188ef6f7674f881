"""NumPy archives larger than memory: their images are read one after another, when needed."""

import hashlib
import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Self

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from covcli.core.opening import open_regular, reading
from covcli.data.images import adapt
from covcli.data.preprocessing import Shape

COMPLAINT = "cannot be read as a NumPy archive"
SKIPPED = 1 << 20  # bytes that are read over at once
MEMBER = "images.npy"


@dataclass(frozen=True)
class ArchiveSource:
    """The array `images` of an archive, uint8, read in the order of its rows.

    No more than one batch is in memory. To go back is to begin again, so rows must ascend within
    a read and from one part of a stream to the next.

    Attributes
    ----------
    file
        The archive.
    sides
        Shape of the array: (N, H, W) or (N, H, W, C).
    """

    file: Path
    sides: tuple[int, ...]

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return the images of those ascending rows, uint8 of shape (len(rows), *shape)."""
        with ArchiveReader(self) as reader:
            return adapt(reader.read(rows), shape)

    def stream(self, parts: Iterable[Tensor], shape: Shape) -> Iterator[Tensor]:
        """Yield the images of each part; all of the rows ascend.

        Raises
        ------
        CovcliError
            If the archive cannot be read, or ends early.
        """
        with ArchiveReader(self) as reader:
            for rows in parts:
                yield adapt(reader.read(rows), shape)

    @cached_property
    def fingerprint(self) -> str:
        """Digest the pixels, as of a set in memory."""
        height, width, channels = (*self.sides[1:], 1)[:3]
        shape = (self.sides[0], channels, height, width)
        digest = hashlib.sha256(repr(shape).encode())
        with ArchiveReader(self) as reader:
            for rows in torch.arange(self.sides[0]).split(64):
                digest.update(np.ascontiguousarray(reader.read(rows).numpy()).data)
        return digest.hexdigest()


class ArchiveReader:
    """Goes once over the images of an archive.

    Parameters
    ----------
    source
        The archive.

    Raises
    ------
    CovcliError
        If it cannot be opened.
    """

    def __init__(self, source: ArchiveSource) -> None:
        self._file = source.file
        self._sides = (*source.sides[1:], 1)[:3]
        self._place = 0
        self._open = ExitStack()
        self._member = self._open.enter_context(_opened(source.file))
        read_header(self._member)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, rows: Tensor) -> Tensor:
        """Return the next images, as they are stored: uint8 of shape (len(rows), C, H, W).

        Parameters
        ----------
        rows
            Which ones, ascending, and behind all that were read before.

        Raises
        ------
        CovcliError
            If the archive cannot be read, or ends early.
        """
        images = np.empty((len(rows), *self._sides), np.uint8)
        each = math.prod(self._sides)
        for image, row in zip(images, rows.tolist(), strict=True):
            if row < self._place:
                raise ValueError("rows of an archive are read in ascending order")
            with reading(self._file, COMPLAINT, says=True):
                _pass_over(self._member, each * (row - self._place))
                stored = np.frombuffer(_exactly(self._member, each), np.uint8)
            image[:] = stored.reshape(self._sides)
            self._place = row + 1
        return torch.from_numpy(images).permute(0, 3, 1, 2)


def array_names(file: Path) -> list[str]:
    """Return the names of an archive's arrays, in the order of the file.

    Examples
    --------
    >>> np.savez("x.npz", images=np.zeros((2, 8, 8), np.uint8), labels=[0, 1])
    >>> array_names(Path("x.npz"))
    ['images', 'labels']
    """
    with (
        reading(file, COMPLAINT, says=True),
        open_regular(file) as opened,
        zipfile.ZipFile(opened) as archive,
    ):
        return [name.removesuffix(".npy") for name in archive.namelist()]


def stored_shape(file: Path) -> tuple[int, ...] | None:
    """Return the shape of an archive's images if they can be read one after another.

    Returns
    -------
    tuple of int or None
        None for an array that lies otherwise, or is missing, or is not of bytes.

    Raises
    ------
    CovcliError
        If the file cannot be read, or is no such archive.
    """
    with reading(file, COMPLAINT, says=True), open_regular(file) as opened:
        with zipfile.ZipFile(opened) as archive:
            if MEMBER not in archive.namelist():
                return None
        with _opened(file) as member:
            shape, transposed, kind = read_header(member)
    readable = kind == np.uint8 and not transposed and len(shape) in (3, 4) and 0 not in shape
    channels = shape[3] if len(shape) == 4 else 1
    one_image = len(shape) == 3 and is_one_in_colour(shape)
    return shape if readable and channels <= 4 and not one_image else None


def is_one_in_colour(sides: Sequence[int]) -> bool:
    """Return whether three sides are rather height, width and channels than (N, H, W)."""
    return sides[2] in (3, 4) and sides[1] >= 8


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    with reading(file, COMPLAINT, says=True):
        opened = open_regular(file)
    with opened, zipfile.ZipFile(opened) as archive, archive.open(MEMBER) as member:
        yield member


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read an array's header; return its shape, whether columns come first, and its type."""
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, transposed, kind = read(member)
    return shape, transposed, kind


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = b"".join(_chunks(file, size))
    if len(content) < size:
        raise ValueError("cut short")
    return content


def _chunks(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(size)):
        size -= len(chunk)
        yield chunk


def _pass_over(file: IO[bytes], size: int) -> None:
    for _ in range(math.ceil(size / SKIPPED)):
        step = min(SKIPPED, size)
        _exactly(file, step)
        size -= step
