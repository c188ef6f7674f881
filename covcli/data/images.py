"""Sets of images: in memory, in files or drawn from a generator, read in whole batches."""

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

LONGEST = 16  # sides of the result: what of a resized image may lie outside it
# ITU-R BT.601 luma, the weights that PIL's "L" mode uses.
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


class Source(Protocol):
    """Where the pixels of a set lie."""

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return the images of those rows, uint8 of shape (len(rows), *shape)."""

    @property
    def fingerprint(self) -> str:
        """A digest of what the source holds, in hexadecimal."""


@dataclass(frozen=True)
class Origin:
    """How a set was read.

    Attributes
    ----------
    spec
        The specification that reads the same whatever a command's options are; empty for the
        set's name.
    ran_in
        The folder that a relative path in it begins at; empty without one.
    unreadable
        Files that were left out because they cannot be read, each with the reason.
    """

    spec: str = ""
    ran_in: str = ""
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """Images in their order, with their labels where they are known.

    Attributes
    ----------
    name
        The specification that the set was loaded from.
    source
        Where the pixels lie.
    rows
        Which rows of the source this set shows, int64 of shape (N,).
    labels
        Class numbers, int64 of shape (N,), or None.
    classes
        Class names, empty where unknown.
    flips
        Whether a mirrored image still belongs to its class (not so for digits).
    as_read
        The numbers that the source itself gives the labels, int64 of shape (N,), where `labels`
        are those of a network.
    by_class
        Whether the source lists one class after another, as folders do: a part of it is drawn.
    origin
        How the set was read, for whoever reads it again.
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
        """The images' files, as their folder names them; None where they are of none."""
        names: Sequence[str] | None = getattr(self.source, "files", None)
        return None if names is None else [printable(names[row]) for row in self.rows.tolist()]

    def batch(self, rows: Tensor, shape: Shape) -> Tensor:
        """Return the images of those rows, uint8 of shape (len(rows), *shape)."""
        return self.source.read(self.rows[rows], shape)

    def select(self, rows: Tensor) -> "ImageSet":
        """Return the set of those rows only; pixels are shared, not copied."""
        labels = None if self.labels is None else self.labels[rows]
        as_read = None if self.as_read is None else self.as_read[rows]
        return replace(self, rows=self.rows[rows], labels=labels, as_read=as_read)

    def spread(self, most: int) -> "ImageSet":
        """Return at most so many of the images, evenly spread; the set must hold some."""
        return self.select(torch.arange(0, len(self), -(-len(self) // most)))

    def without(self, rows: Tensor) -> "ImageSet":
        """Return the set less those rows of its source."""
        return self.select(torch.nonzero(~torch.isin(self.rows, rows))[:, 0])

    def named(self, classes: tuple[str, ...]) -> "ImageSet":
        """Return the set with other class names."""
        return replace(self, classes=classes)

    def known_labels(self) -> Tensor:
        """Return the labels; a set without any is a CovcliError."""
        if self.labels is None:
            raise CovcliError("has no labels", where=self.name, fix="name a labelled set")
        return self.labels

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the source, the rows and the labels: equal for equal data."""
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
        Whether they were made for one network: in the shape of its inputs they are not resized.
    """

    images: Tensor
    ready: bool = False

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Gather the rows and turn them to the shape asked for."""
        images = self.images[rows]
        if self.ready and tuple(images.shape[1:]) == tuple(shape):
            return images
        return adapt(images, shape)

    @cached_property
    def fingerprint(self) -> str:
        """Digest the pixels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.images.numpy()).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class NoiseSource:
    """Noise drawn per row from a counter-based generator: a row is the same in any batch."""

    distribution: Literal["gaussian", "uniform"]
    seed: int

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Draw the rows' pixels: uniform over 0..255, or normal with mean 127.5, deviation 64."""
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
        """Digest what determines the pixels."""
        return hashlib.sha256(f"noise:{self.distribution}:{self.seed}".encode()).hexdigest()


def in_memory(
    name: str,
    images: np.ndarray | Tensor,
    labels: np.ndarray | Tensor | None,
    classes: tuple[str, ...] = (),
    flips: bool = False,
    ready: bool = False,
) -> ImageSet:
    """Make a set of images that already lie in memory, uint8 of shape (N, C, H, W)."""
    pixels = torch.as_tensor(images)
    known = None if labels is None else torch.as_tensor(labels).to(torch.int64)
    source = MemorySource(pixels, ready)
    return ImageSet(name, source, torch.arange(len(pixels)), known, classes, flips)


def adapt(images: Tensor, shape: Shape) -> Tensor:
    """Turn images to a model's channels and size.

    Transparency, a second or fourth channel, shows white behind it. Grey images become three
    equal channels, colours become grey by luma. Images are resized and the middle is cut out, as
    the shape of a network says (`InputShape`); by default they are resized as little as makes them
    cover that size (bilinear, antialiased), and images of that very size stay as they are. Of an
    image more than 16 times as long as it is wide, only the part around the middle is resized.

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
    cut: Tensor = F.center_crop(images, [height, width])
    return cut


def on_white(images: Tensor) -> Tensor:
    """Lay images with transparency on a white ground.

    Parameters
    ----------
    images
        uint8 of shape (B, 2 or 4, H, W); the last channel is how opaque a pixel is.

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
    """Cut the ends off a long thin image that would be resized only to be cut off then."""
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
    # Both ends lose the same, so that the middle stays where it is.
    top, left = (high - kept[0]) // 2, (wide - kept[1]) // 2
    return images[:, :, top : high - top, left : wide - left]


def batches(
    images: ImageSet, parts: Sequence[Tensor], shape: Shape
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each part's rows and images, reading one batch ahead of the network.

    A source that reads ahead by itself has a method `stream`.
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
    """Let this thread compute by itself: its helpers would take turns with those of the network."""
    torch.get_num_threads()  # the first call in a thread sets its number
    threadpool_limits(1, user_api="openmp")  # of this thread alone


@dataclass(frozen=True)
class DataRecord:
    """Which data something was made from.

    Attributes
    ----------
    spec
        The data specification.
    source
        The fingerprint of all that the source holds.
    images
        The fingerprint of the images that were read of it.
    ran_in
        The folder that a relative path in the specification begins at; empty without one.
    seal
        By which this user's covcli knows the record again (`data.recorded`); empty otherwise.
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
        """Describe a loaded set."""
        origin = images.origin
        spec = origin.spec or images.name
        return cls(spec, images.source.fingerprint, images.fingerprint, origin.ran_in)
