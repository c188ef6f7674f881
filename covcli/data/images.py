"""Image sets: in memory, in files or drawn from a random generator, read in batches."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from covcli.core import settings
from covcli.core.errors import CovcliError
from covcli.data.listing import printable
from covcli.data.preprocessing import COVERING, InputShape, Preprocess, Shape

LONGEST = 16  # a resized image may be at most this many times as long as the result
# ITU-R BT.601 luma, the weights that PIL's "L" mode uses.
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


class Source(Protocol):
    """The source of a set's pixels.

    A source may also have `files`, the names of its image files, and `stream`, which yields
    batches that it reads ahead itself.
    """

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return the images of those rows, uint8 of shape (len(rows), *shape)."""

    @property
    def fingerprint(self) -> str:
        """A digest of the source's content, in hexadecimal."""


@dataclass(frozen=True)
class Origin:
    """How a set was read.

    Attributes
    ----------
    spec
        The specification that reads the same images whatever a command's options are. Empty if it
        is the set's name.
    ran_in
        The folder that a relative path in it starts from; empty without a relative path.
    unreadable
        Skipped files that cannot be read, each with the reason.
    """

    spec: str = ""
    ran_in: str = ""
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """An ordered set of images, with labels if they are known.

    Attributes
    ----------
    name
        The specification that the set was loaded from.
    source
        The source of the pixels.
    rows
        The rows of the source that belong to the set, int64 of shape (N,).
    labels
        Class numbers, int64 of shape (N,), or None.
    classes
        Class names; empty if unknown.
    flips
        Whether a mirrored image still belongs to its class (not so for digits).
    as_read
        The source's own labels, int64 of shape (N,), if `labels` were renumbered for a network.
    by_class
        Whether the source lists one class after another, as folders do. A part of such a set is
        drawn at random.
    origin
        How the set was read, so that it can be read again.

    Examples
    --------
    >>> pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    >>> images = in_memory("squares", pixels, [0, 1, 0, 1], classes=("red", "blue"))
    >>> len(images), images.select(torch.tensor([1, 3])).labels.tolist()
    (4, [1, 1])
    >>> images.batch(torch.tensor([0, 2]), (1, 4, 4)).shape
    torch.Size([2, 1, 4, 4])
    """

    name: str
    source: Source
    rows: Tensor
    labels: Tensor | None
    classes: tuple[str, ...] = ()
    flips: bool = False
    as_read: Tensor | None = None
    by_class: bool = False
    origin: Origin = Origin()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def files(self) -> list[str] | None:
        """The images' file names, relative to their folder; None if the images are not in files."""
        names: Sequence[str] | None = getattr(self.source, "files", None)
        return None if names is None else [printable(names[row]) for row in self.rows.tolist()]

    def batch(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return some images, adapted to a shape.

        Parameters
        ----------
        rows
            Positions in the set, int64 of shape (B,).
        shape
            Channels (1 or 3), height and width.

        Returns
        -------
        Tensor
            uint8 of shape (B, *shape); float32 for images prepared by a program.
        """
        return self.source.read(self.rows[rows], shape)

    def select(self, rows: Tensor) -> "ImageSet":
        """Return the subset at those positions, int64 of shape (n,); pixels are not copied."""
        labels = None if self.labels is None else self.labels[rows]
        as_read = None if self.as_read is None else self.as_read[rows]
        return replace(self, rows=self.rows[rows], labels=labels, as_read=as_read)

    def spread(self, most: int) -> "ImageSet":
        """Return at most `most` images, evenly spaced; the set must not be empty."""
        return self.select(torch.arange(0, len(self), -(-len(self) // most)))

    def without(self, rows: Tensor) -> "ImageSet":
        """Return the set without those rows of its source."""
        return self.select(torch.nonzero(~torch.isin(self.rows, rows))[:, 0])

    def named(self, classes: tuple[str, ...]) -> "ImageSet":
        """Return the set with other class names."""
        return replace(self, classes=classes)

    def known_labels(self) -> Tensor:
        """Return the labels, int64 of shape (N,); raise a CovcliError if there are none."""
        if self.labels is None:
            raise CovcliError("has no labels", where=self.name, fix="name a labelled set")
        return self.labels

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the source, the rows and the labels: equal for equal data."""
        digest = hashlib.sha256(self.source.fingerprint.encode())
        digest.update(self.rows.numpy().tobytes())
        labels = self.labels if self.as_read is None else self.as_read
        digest.update(b"" if labels is None else labels.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class MemorySource:
    """All images of a set in memory.

    Attributes
    ----------
    images
        uint8 of shape (N, C, H, W).
    ready
        Whether the images have a network's input shape already; then they are not resized to it.

    Examples
    --------
    >>> source = MemorySource(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    >>> source.read(torch.tensor([0, 3]), (3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    images: Tensor
    ready: bool = False

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return the rows, adapted to the shape."""
        images = self.images[rows]
        if self.ready and tuple(images.shape[1:]) == tuple(shape):
            return images
        return adapt(images, shape)

    @cached_property
    def row_digests(self) -> np.ndarray:
        """A digest of each image, int64 of shape (N,), see `covcli.data.copies`."""
        return np.array([hash(image.tobytes()) for image in self.images.numpy()], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the pixels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.images.numpy()).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class NoiseSource:
    """Noise from a counter-based generator: a row has the same pixels in any batch.

    Attributes
    ----------
    distribution
        "gaussian" (mean 127.5, deviation 64) or "uniform" (0 to 255).
    seed
        The seed of all rows.

    Examples
    --------
    >>> source, shape = NoiseSource("uniform", seed=0), (3, 8, 8)
    >>> both = source.read(torch.tensor([4, 5]), shape)
    >>> torch.equal(both[1:], source.read(torch.tensor([5]), shape))
    True
    """

    distribution: Literal["gaussian", "uniform"]
    seed: int

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Draw the pixels of the rows, uint8 of shape (len(rows), *shape)."""
        images = np.empty((len(rows), *shape), np.uint8)
        for image, row in zip(images, rows.tolist(), strict=True):
            generator = np.random.Generator(np.random.Philox(key=[self.seed, row]))
            if self.distribution == "uniform":
                image[:] = generator.integers(0, 256, shape, np.uint8)
            else:
                image[:] = np.clip(np.rint(generator.normal(127.5, 64.0, shape)), 0, 255)
        return torch.from_numpy(images)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of everything that determines the pixels."""
        return hashlib.sha256(f"noise:{self.distribution}:{self.seed}".encode()).hexdigest()


def in_memory(
    name: str,
    images: np.ndarray | Tensor,
    labels: np.ndarray | Tensor | None,
    classes: tuple[str, ...] = (),
    flips: bool = False,
    ready: bool = False,
) -> ImageSet:
    """Return an image set of pixels in memory.

    Parameters
    ----------
    name
        The name of the set, for messages and results.
    images
        uint8 of shape (N, C, H, W), with 1 to 4 channels.
    labels
        Class numbers of shape (N,), or None.
    classes
        Class names; empty if unknown.
    flips
        Whether a mirrored image still belongs to its class.
    ready
        Whether the images have the network's input shape already and must not be resized.

    Examples
    --------
    >>> len(in_memory("noise", np.zeros((5, 1, 8, 8), np.uint8), None))
    5
    """
    pixels = torch.as_tensor(images)
    known = None if labels is None else torch.as_tensor(labels).to(torch.int64)
    source = MemorySource(pixels, ready)
    return ImageSet(name, source, torch.arange(len(pixels)), known, classes, flips)


def adapt(images: Tensor, shape: Shape) -> Tensor:
    """Convert images to a network's channels and size.

    Transparency (a second or fourth channel) is composed over white. Grey images become three equal
    channels; colours become grey by luma. Images are resized, and the centre is cropped. An
    `InputShape` determines how. By default, images are scaled just enough to cover the size
    (bilinear, antialiased), and images of the right size are unchanged. If an image is more than 16
    times as long as it is wide, only its central part is resized.

    Parameters
    ----------
    images
        uint8 of shape (B, C, H, W) with 1 to 4 channels.
    shape
        Channels (1 or 3), height and width to return.

    Returns
    -------
    Tensor
        uint8 of shape (B, *shape).

    Examples
    --------
    >>> adapt(torch.zeros(1, 1, 20, 10, dtype=torch.uint8), (3, 8, 8)).shape
    torch.Size([1, 3, 8, 8])
    """
    channels, height, width = shape
    if images.shape[1] in (2, 4):
        images = on_white(images)
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    elif images.shape[1] == 3 and channels == 1:
        images = (images * LUMA).sum(1, keepdim=True).round().to(torch.uint8)
    how = shape.preprocess if isinstance(shape, InputShape) else COVERING
    images = _without_far_ends(images, (height, width), how)
    size = list(how.size(images.shape[2:], (height, width)))
    if list(images.shape[2:]) != size:
        mode = InterpolationMode(how.interpolation)
        images = F.resize(images, size, interpolation=mode, antialias=True)
    cropped: Tensor = F.center_crop(images, [height, width])
    return cropped


def on_white(images: Tensor) -> Tensor:
    """Compose images with transparency over white.

    Parameters
    ----------
    images
        uint8 of shape (B, 2 or 4, H, W); the last channel is opacity.

    Returns
    -------
    Tensor
        uint8 of shape (B, 1 or 3, H, W).

    Examples
    --------
    >>> on_white(torch.tensor([100, 0], dtype=torch.uint8).view(1, 2, 1, 1)).item()
    255
    """
    colour, alpha = images[:, :-1].int(), images[:, -1:].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def _without_far_ends(images: Tensor, wanted: tuple[int, int], how: Preprocess) -> Tensor:
    """Crop the ends of a long thin image before resizing; they would be cropped afterwards."""
    high, wide = images.shape[2:]
    scale = how.scale((high, wide), wanted)
    if scale is None:
        return images
    kept = [
        min(side, math.ceil(LONGEST * least / scale))
        for side, least in zip((high, wide), wanted, strict=True)
    ]
    if kept == [high, wide]:
        return images
    # Both ends lose equally many pixels, so that the centre stays the same.
    top, left = (high - kept[0]) // 2, (wide - kept[1]) // 2
    return images[:, :, top : high - top, left : wide - left]


def batches(
    images: ImageSet, parts: Sequence[Tensor], shape: Shape
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows and images of each part, reading one batch ahead.

    Parameters
    ----------
    images
        The set.
    parts
        Positions in the set, one int64 tensor per batch.
    shape
        Channels, height and width.

    Yields
    ------
    tuple of Tensor
        The positions of shape (B,), and the images of shape (B, *shape).

    Examples
    --------
    >>> images = in_memory("noise", np.zeros((5, 1, 8, 8), np.uint8), None)
    >>> for rows, pixels in batches(images, torch.arange(5).split(3), (1, 8, 8)):
    ...     print(rows.tolist(), tuple(pixels.shape))
    [0, 1, 2] (3, 1, 8, 8)
    [3, 4] (2, 1, 8, 8)
    """
    stream = getattr(images.source, "stream", None)
    if stream is not None:
        yield from zip(parts, stream([images.rows[p] for p in parts], shape), strict=True)
        return
    with ThreadPoolExecutor(1, initializer=compute_alone) as pool:
        ahead = pool.submit(images.batch, parts[0], shape) if parts else None
        for i, rows in enumerate(parts):
            assert ahead is not None
            pixels = ahead.result()
            if i + 1 < len(parts):
                ahead = pool.submit(images.batch, parts[i + 1], shape)
            yield rows, pixels


def compute_alone() -> None:
    """Limit this thread to one OpenMP thread; more would compete with those of the network."""
    torch.get_num_threads()  # the first call in a thread initialises its number
    threadpool_limits(1, user_api="openmp")  # for this thread only


@dataclass(frozen=True)
class DataRecord:
    """The record of the data that a checkpoint, signature or result was computed from.

    Attributes
    ----------
    spec
        The data specification.
    source
        The fingerprint of the whole source.
    images
        The fingerprint of the images that were used.
    ran_in
        The folder that a relative path in the specification starts from; empty without one.
    seal
        The seal by which this user's covcli recognises the record (`data.recorded`), or empty.
    """

    spec: str
    source: str
    images: str
    ran_in: str = ""
    seal: str = ""

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "DataRecord":
        """Rebuild what `vars` gave of a record; a ValueError if it is malformed."""
        return settings.read(cls, document)

    @classmethod
    def of(cls, images: ImageSet) -> "DataRecord":
        """Return the record of a loaded set."""
        origin = images.origin
        spec = origin.spec or images.name
        return cls(spec, images.source.fingerprint, images.fingerprint, origin.ran_in)
