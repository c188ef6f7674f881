"""Surrogate outliers: distorted trusted images, which should not be trusted.

They are used to train the experts of a calibration, so that no untrusted images are needed.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from covcli.data.images import ImageSet, Source
from covcli.data.prepared import Scale
from covcli.data.preprocessing import Shape

Distort: TypeAlias = Callable[[Tensor, np.random.Generator], Tensor]
SEED = 0
NOISE = 8.0  # deviation of pixel values from 0 to 255
BLUR = 1.5 / 32  # deviation as a share of the image's side


def noise(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Add normal noise with a deviation of 8/255 to an image, uint8 of shape (C, H, W).

    Examples
    --------
    >>> grey = torch.full((1, 8, 8), 128, dtype=torch.uint8)
    >>> noise(grey, np.random.default_rng(0)).dtype
    torch.uint8
    """
    added = generator.standard_normal(tuple(image.shape), np.float32)
    return (image + NOISE * torch.from_numpy(added)).round().clamp(0, 255).to(torch.uint8)


def blur(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Blur an image with a Gaussian of deviation 1.5/32 of its side, at least 0.75 pixels."""
    deviation = max(0.75, BLUR * min(image.shape[1:]))
    reach = min(round(3 * deviation), min(image.shape[1:]) - 1)
    blurred: Tensor = F.gaussian_blur(image, [2 * reach + 1] * 2, [deviation] * 2)
    return blurred


def tiles(across: int) -> Distort:
    """Return a function that shuffles the `across` × `across` tiles of an image.

    Examples
    --------
    >>> image = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    >>> shuffled = tiles(2)(image, np.random.default_rng(0))
    >>> shuffled.shape, torch.equal(shuffled.sort().values.sum(), image.sum())
    (torch.Size([1, 4, 4]), True)
    """

    def shuffle(image: Tensor, generator: np.random.Generator) -> Tensor:
        high, wide = (max(1, side // across) for side in image.shape[1:])
        rows, columns = image.shape[1] // high, image.shape[2] // wide
        shuffled = image.clone()
        for place, taken in enumerate(generator.permutation(rows * columns).tolist()):
            y, x = place // columns * high, place % columns * wide
            v, u = taken // columns * high, taken % columns * wide
            shuffled[:, y : y + high, x : x + wide] = image[:, v : v + high, u : u + wide]
        return shuffled

    return shuffle


DISTORTIONS: Mapping[str, Distort] = {
    "noise": noise, "blur": blur, "tiles-4": tiles(4), "tiles-8": tiles(8),
}  # fmt: skip
# A trusted image compared with a class that it does not belong to: its inner layers do not fit the
# prediction, as under an attack.
OTHER_CLASS = "other-class"
# The surrogate outliers that each expert of a calibration is trained on.
EXPERTS: Mapping[str, tuple[str, ...]] = {
    "noise": ("noise",),
    "blur": ("blur",),
    "tiles": ("tiles-4", "tiles-8"),
    "deceit": ("noise", OTHER_CLASS),
}


@dataclass(frozen=True)
class DistortedSource:
    """The distorted images of another source; an image is distorted equally in any batch."""

    source: Source
    kind: str

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Read the rows, and distort each with its own generator."""
        images = self.source.read(rows, shape)
        # Prepared images are converted to pixels and back.
        scale: Scale | None = getattr(self.source, "scale", None)
        images = images if scale is None else scale.to_pixels(images)
        distort = DISTORTIONS[self.kind]
        copies = [
            distort(image, np.random.Generator(np.random.Philox(key=[SEED, row])))
            for image, row in zip(images, rows.tolist(), strict=True)
        ]
        distorted = torch.stack(copies) if copies else images
        return distorted if scale is None else scale.to_values(distorted)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of everything that determines the pixels."""
        return hashlib.sha256(f"{self.kind} {SEED} {self.source.fingerprint}".encode()).hexdigest()


@dataclass(frozen=True)
class Drawn:
    """The calibration images that become surrogate outliers.

    Attributes
    ----------
    rows
        Their positions among the calibration images, ascending, int64 of shape (m,).
    shifts
        The difference, modulo the number of classes, between the class that each is compared with
        and the predicted class: 1 to classes − 1, int64 of shape (m,).
    """

    rows: Tensor
    shifts: Tensor

    def other_classes(self, rows: Tensor, predicted: Tensor, classes: int) -> Tensor:
        """Return a class other than the predicted one, for the drawn images `rows`."""
        mine = torch.searchsorted(self.rows, rows)
        return (predicted + self.shifts[mine].to(predicted.device)) % classes


def draw(fitting: Tensor, most: int, classes: int, seed: int) -> Drawn:
    """Draw at most `most` of the images that fit a combination, and another class for each.

    Parameters
    ----------
    fitting
        Which calibration images fit the combination, bool of shape (n,).
    most
        The largest number to draw.
    classes
        The number of classes.
    seed
        The seed; the draw does not depend on the order of files or on batches.

    Examples
    --------
    >>> drawn = draw(torch.tensor([True, False, True, True]), most=2, classes=10, seed=0)
    >>> len(drawn.rows), bool((drawn.shifts > 0).all())
    (2, True)
    """
    generator = torch.Generator().manual_seed(seed)
    rows = fitting.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)[:most]].sort().values
    shifts = torch.randint(1, max(2, classes), (len(rows),), generator=generator)
    return Drawn(rows, shifts)


def distorted(images: ImageSet, kind: str) -> ImageSet:
    """Return the set with every image distorted; the labels are unchanged.

    Parameters
    ----------
    images
        The set.
    kind
        A key of DISTORTIONS: "noise", "blur", "tiles-4" or "tiles-8".

    Examples
    --------
    >>> from covcli.data import datasets
    >>> digits = datasets.load("digits?limit=4", "test")
    >>> len(distorted(digits, "blur")), distorted(digits, "blur").name
    (4, 'digits?limit=4 (blur)')
    """
    source = DistortedSource(images.source, kind)
    return ImageSet(f"{images.name} ({kind})", source, images.rows, images.labels, images.classes)
