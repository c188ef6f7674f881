"""Surrogate outliers: images made from trusted ones that a network should not trust.

They teach the experts of a calibration what to look at. Nothing untrusted is needed for them.
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
NOISE = 8.0  # deviation, of 255
BLUR = 1.5 / 32  # deviation, of the image's side


def noise(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Add normal noise with a deviation of 8/255 to an image (C, H, W)."""
    added = generator.standard_normal(tuple(image.shape), np.float32)
    return (image + NOISE * torch.from_numpy(added)).round().clamp(0, 255).to(torch.uint8)


def blur(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Blur an image by a Gaussian whose deviation is 1.5/32 of its side, and at least 0.75."""
    deviation = max(0.75, BLUR * min(image.shape[1:]))
    reach = min(round(3 * deviation), min(image.shape[1:]) - 1)
    blurred: Tensor = F.gaussian_blur(image, [2 * reach + 1] * 2, [deviation] * 2)
    return blurred


def inversion(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Turn an image into its negative."""
    return 255 - image


def tiles(across: int) -> Distort:
    """Return what shuffles the tiles of an image, so many across and down."""

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
    "noise": noise, "blur": blur, "inversion": inversion, "tiles-4": tiles(4), "tiles-8": tiles(8),
}  # fmt: skip
# A trusted image measured against a class that it does not belong to: inner layers that speak for
# another class than the prediction, as under an attack.
OTHER_CLASS = "other-class"
# What each expert of a calibration learns to tell from trusted images.
EXPERTS: Mapping[str, tuple[str, ...]] = {
    "noise": ("noise",),
    "blur": ("blur",),
    "inversion": ("inversion",),
    "tiles": ("tiles-4", "tiles-8"),
    "deceit": ("noise", OTHER_CLASS),
}


@dataclass(frozen=True)
class DistortedSource:
    """The images of another source, each distorted in the same way whatever the batch."""

    source: Source
    kind: str

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Read the rows and distort each with a generator of its own."""
        images = self.source.read(rows, shape)
        # Prepared images are distorted as the pixels that they stand for.
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
        """Digest what determines the pixels."""
        return hashlib.sha256(f"{self.kind} {SEED} {self.source.fingerprint}".encode()).hexdigest()


@dataclass(frozen=True)
class Drawn:
    """Which calibration images become surrogate outliers.

    Attributes
    ----------
    rows
        Their places among the calibration images, ascending, int64 of shape (m,).
    shifts
        How far the class that each is measured against lies from the predicted one, counted in a
        circle, int64 of shape (m,): 1 to classes − 1.
    """

    rows: Tensor
    shifts: Tensor

    def other_classes(self, rows: Tensor, predicted: Tensor, classes: int) -> Tensor:
        """Return a class that is not the predicted one, for images at those of the places."""
        mine = torch.searchsorted(self.rows, rows)
        return (predicted + self.shifts[mine].to(predicted.device)) % classes


def draw(fitting: Tensor, most: int, classes: int, seed: int) -> Drawn:
    """Draw at most so many of the images that fit a combination, and another class for each.

    Parameters
    ----------
    fitting
        Which calibration images fit the combination, bool of shape (n,).
    most
        How many to draw.
    classes
        How many classes there are.
    seed
        Of the draw, which depends on nothing else: not on the order of files or on batches.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = fitting.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)[:most]].sort().values
    shifts = torch.randint(1, max(2, classes), (len(rows),), generator=generator)
    return Drawn(rows, shifts)


def distorted(images: ImageSet, kind: str) -> ImageSet:
    """Return the set with every image distorted, under the labels of the originals."""
    source = DistortedSource(images.source, kind)
    return ImageSet(f"{images.name} ({kind})", source, images.rows, images.labels, images.classes)
