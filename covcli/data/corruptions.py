"""CORRUPTIONS: the common corruptions of Hendrycks and Dietterich (ICLR 2019), in five severities.

Settings are published for images of 32, 64 and 224 pixels (CIFAR-10-C, Tiny-ImageNet-C and
ImageNet-C). The settings of the size nearest to an image are used. Each image has its own random
generator.
"""

import hashlib
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, signal
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.core.specs import Registry
from covcli.data.images import LUMA, Source, adapt
from covcli.data.preprocessing import InputShape, Shape

Colours: TypeAlias = NDArray[np.float64]  # (H, W, 3), in [0, 1]
Plane: TypeAlias = NDArray[np.float64]  # (H, W)
Corrupt: TypeAlias = Callable[[Colours, Any, np.random.Generator], Colours]
SEVERITIES = 5
SIZES = (32, 64, 224)
WHITE_WATER = np.array([175, 238, 238]) / 255
MUD = np.array([63, 42, 20]) / 255


@dataclass(frozen=True)
class Corruption:
    """A corruption and its published settings.

    Attributes
    ----------
    apply
        Corrupts a picture (H, W, 3) in [0, 1], given a setting and a generator. Its result is
        clipped to [0, 1].
    settings
        The settings of the five severities, for each of SIZES.

    Examples
    --------
    >>> corrupt = CORRUPTIONS.get("contrast")
    >>> picture = np.zeros((32, 32, 3))
    >>> picture[:16] = 1.0
    >>> corrupted = corrupt(picture, severity=5, generator=np.random.default_rng(0))
    >>> corrupted.shape, round(float(corrupted.max() - corrupted.min()), 2)
    ((32, 32, 3), 0.15)
    """

    apply: Corrupt
    settings: tuple[Sequence[Any], Sequence[Any], Sequence[Any]]

    def __call__(self, picture: Colours, severity: int, generator: np.random.Generator) -> Colours:
        """Corrupt a picture (H, W, 3) in [0, 1], with a severity from 1 to 5."""
        setting = self.setting(min(picture.shape[:2]), severity)
        return self.apply(picture, setting, generator).clip(0, 1)

    def setting(self, side: int, severity: int) -> Any:
        """Return the setting for images of `side` pixels: that of the nearest published size."""
        nearest = min(range(len(SIZES)), key=lambda i: abs(math.log(side / SIZES[i])))
        return self.settings[nearest][severity - 1]


CORRUPTIONS: Registry[Corruption] = Registry("corruption")


def corruption(name: str, *settings: Sequence[Any]) -> Callable[[Corrupt], Corrupt]:
    """Return a decorator that registers a corruption under a name.

    Parameters
    ----------
    name
        The name in `corrupt:NAME`.
    settings
        Three sequences of five settings: for images of 32, 64 and 224 pixels, by severity.

    Examples
    --------
    >>> @corruption("dimming", *[(0.9, 0.8, 0.7, 0.6, 0.5)] * 3)
    ... def dimming(picture, factor, generator):
    ...     return picture * factor
    >>> CORRUPTIONS.get("dimming")(np.ones((32, 32, 3)), 5, np.random.default_rng(0)).max()
    np.float64(0.5)
    """
    small, middle, large = settings

    def decorate(apply: Corrupt) -> Corrupt:
        CORRUPTIONS.add(name)(Corruption(apply, (small, middle, large)))
        return apply

    return decorate


# Noise


@corruption(
    "gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10), (0.04, 0.08, 0.12, 0.15, 0.18),
    (0.08, 0.12, 0.18, 0.26, 0.38),
)  # fmt: skip
def gaussian_noise(picture: Colours, deviation: float, generator: np.random.Generator) -> Colours:
    """Add normal noise, as in low light.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    deviation
        The standard deviation of the noise.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> gaussian_noise(grey, 0.1, generator).shape
    (32, 32, 3)
    """
    return picture + generator.normal(0, deviation, picture.shape)


@corruption("shot_noise", (500, 250, 100, 75, 50), (250, 100, 50, 30, 15), (60, 25, 12, 5, 3))
def shot_noise(picture: Colours, photons: float, generator: np.random.Generator) -> Colours:
    """Draw Poisson noise: a white pixel receives `photons` photons on average.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    photons
        The mean number of photons of a white pixel.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> shot_noise(grey, 60, generator).shape
    (32, 32, 3)
    """
    return generator.poisson(picture * photons) / photons


@corruption(
    "impulse_noise", (0.01, 0.02, 0.03, 0.05, 0.07), (0.01, 0.02, 0.05, 0.08, 0.14),
    (0.03, 0.06, 0.09, 0.17, 0.27),
)  # fmt: skip
def impulse_noise(picture: Colours, share: float, generator: np.random.Generator) -> Colours:
    """Set a share of the values to black or white.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    share
        The share of values to change, in [0, 1].
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> impulse_noise(grey, 0.05, generator).shape
    (32, 32, 3)
    """
    hit = generator.random(picture.shape) <= share
    return np.where(hit, generator.random(picture.shape) <= 0.5, picture)


@corruption(
    "speckle_noise", (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.25, 0.3, 0.35),
    (0.15, 0.2, 0.35, 0.45, 0.6),
)  # fmt: skip
def speckle_noise(picture: Colours, deviation: float, generator: np.random.Generator) -> Colours:
    """Add normal noise proportional to the pixel's value.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    deviation
        The standard deviation of the noise at a white pixel.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> speckle_noise(grey, 0.2, generator).shape
    (32, 32, 3)
    """
    return picture * (1 + generator.normal(0, deviation, picture.shape))


# Blur


def _smooth(values: NDArray[Any], sigma: float) -> NDArray[np.float64]:
    """Blur the first two axes with a Gaussian; the border is repeated."""
    sigmas = (sigma, sigma, 0)[: values.ndim]
    smoothed: NDArray[np.float64] = ndimage.gaussian_filter(
        values, sigmas, mode="nearest", output=np.float64
    )
    return smoothed


@corruption("gaussian_blur", (0.4, 0.6, 0.7, 0.8, 1), (0.5, 0.75, 1, 1.25, 1.5), (1, 2, 3, 4, 6))
def gaussian_blur(picture: Colours, sigma: float, _: np.random.Generator) -> Colours:
    """Blur with a Gaussian.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    sigma
        The standard deviation of the Gaussian, in pixels.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> gaussian_blur(grey, 1.0, generator).shape
    (32, 32, 3)
    """
    return _smooth(picture, sigma)


@corruption(
    "defocus_blur",
    ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
)
def defocus_blur(picture: Colours, setting: tuple[float, float], _: np.random.Generator) -> Colours:
    """Spread every pixel over a disk, as an unfocused lens does.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        The radius of the disk, and the deviation of the Gaussian that smooths its edge, in pixels.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> defocus_blur(grey, (1.5, 0.1), generator).shape
    (32, 32, 3)
    """
    radius, softness = setting
    kernel = _disk(radius, softness)
    reach = kernel.shape[0] // 2
    margins = ((reach, reach), (reach, reach), (0, 0))
    padded = np.pad(picture, margins, mode="reflect" if reach < min(picture.shape[:2]) else "wrap")
    return signal.oaconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))  # type: ignore[no-any-return]


def _disk(radius: float, softness: float) -> Plane:
    """Return a disk that sums to 1, with its edge smoothed by a small Gaussian."""
    line, size = (np.arange(-8, 9), 3) if radius <= 8 else (np.arange(-radius, radius + 1), 5)
    disk: Plane = (line[:, None] ** 2 + line[None] ** 2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    places = np.arange(size) - size // 2
    weights = np.exp(-(places**2) / (2 * softness**2))
    weights /= weights.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, weights, axis, mode="mirror")
    return disk


@corruption(
    "glass_blur",
    ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
)
def glass_blur(
    picture: Colours, setting: tuple[float, int, int], generator: np.random.Generator
) -> Colours:
    """Displace pixels locally, as frosted glass does.

    The published program intends to swap two pixels, but it assigns from views and so copies the
    second pixel over the first. The published images were made this way, and so are these.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        The deviation of the blur in pixels, the largest displacement in pixels, and the number of
        rounds.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> glass_blur(grey, (0.4, 1, 2), generator).shape
    (32, 32, 3)
    """
    sigma, reach, rounds = setting
    height, width = picture.shape[:2]
    taken = np.arange(height * width).reshape(height, width).tolist()
    for _ in range(rounds):
        rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
        moves = generator.integers(-reach, reach, (len(rows), len(columns), 2)).tolist()
        for row, across in zip(rows, moves, strict=True):
            for column, (right, down) in zip(columns, across, strict=True):
                taken[row][column] = taken[row + down][column + right]
    smoothed = np.floor(_smooth(picture, sigma) * 255) / 255
    return _smooth(smoothed.reshape(-1, 3)[np.array(taken)], sigma)


@corruption(
    "motion_blur",
    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
)
def motion_blur(
    picture: Colours, setting: tuple[int, float], generator: np.random.Generator
) -> Colours:
    """Blur along a straight line, at most 45 degrees from the horizontal.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        The radius of the kernel and the deviation of its Gaussian, in pixels.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> motion_blur(grey, (6, 1.5), generator).shape
    (32, 32, 3)
    """
    return _moved(picture, *setting, generator.uniform(-45, 45))


def _moved(values: NDArray[Any], radius: int, sigma: float, angle: float) -> NDArray[Any]:
    """Blur along a line with half a Gaussian, one step per pixel, as ImageMagick's motion blur."""
    height, width = values.shape[:2]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    down = -np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    right = -np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    blurred = np.zeros_like(values, dtype=np.float64)
    for weight, y, x in zip(weights, down, right, strict=True):
        if abs(y) >= height or abs(x) >= width:
            break
        rows = (np.arange(height) - y).clip(0, height - 1)
        columns = (np.arange(width) - x).clip(0, width - 1)
        blurred += weight * values[rows[:, None], columns]
    return blurred


@corruption(
    "zoom_blur",
    tuple(np.arange(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)),
    tuple(np.arange(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)),
    (np.arange(1, 1.11, 0.01), np.arange(1, 1.16, 0.01), np.arange(1, 1.21, 0.02),
     np.arange(1, 1.26, 0.02), np.arange(1, 1.31, 0.03)),
)  # fmt: skip
def zoom_blur(picture: Colours, factors: NDArray[Any], _: np.random.Generator) -> Colours:
    """Average several zooms towards the centre, as a moving camera does.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    factors
        The factors of the zooms, at least 1.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> zoom_blur(grey, np.array([1.0, 1.05, 1.1]), generator).shape
    (32, 32, 3)
    """
    total = picture + sum(_zoomed(picture, float(factor)) for factor in factors)
    return total / (len(factors) + 1)


def _zoomed(values: NDArray[Any], factor: float) -> NDArray[Any]:
    """Enlarge the centre of an array (H, W) or (H, W, C) to the size of the whole array."""
    sides = values.shape[:2]
    cuts = [math.ceil(side / factor) for side in sides]
    starts = [(side - cut) // 2 for side, cut in zip(sides, cuts, strict=True)]
    middle = values[starts[0] : starts[0] + cuts[0], starts[1] : starts[1] + cuts[1]]
    enlarged = ndimage.zoom(middle, (factor, factor, 1)[: values.ndim], order=1)
    trims = [(e - side) // 2 for e, side in zip(enlarged.shape, sides, strict=False)]
    return enlarged[trims[0] : trims[0] + sides[0], trims[1] : trims[1] + sides[1]]  # type: ignore[no-any-return]


# Weather


@corruption(
    "snow",
    ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
     (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
     (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    ((0.1, 0.2, 1, 0.6, 8, 3, 0.8), (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
     (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
     (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6)),
    ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
     (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
     (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
)  # fmt: skip
def snow(picture: Colours, setting: Sequence[float], generator: np.random.Generator) -> Colours:
    """Add falling snow, and whiten the picture.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        Mean and deviation of the flakes, their zoom and threshold, radius and deviation of the fall
        in pixels, and the weight of the picture.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> snow(grey, (0.1, 0.2, 1, 0.6, 8, 3, 0.95), generator).shape
    (32, 32, 3)
    """
    mean, deviation, zoom, least, radius, sigma, kept = setting
    flakes = _zoomed(generator.normal(mean, deviation, picture.shape[:2]), zoom)
    flakes = np.where(flakes < least, 0, flakes).clip(0, 1)
    angle = generator.uniform(-135, -45)
    fallen = _moved(np.floor(flakes * 255) / 255, int(radius), sigma, angle)[..., None]
    grey = (picture * LUMA.numpy().reshape(3)).sum(2, keepdims=True)
    whitened: Colours = kept * picture + (1 - kept) * np.maximum(picture, grey * 1.5 + 0.5)
    whitened += fallen + np.rot90(fallen, 2)
    return whitened


@corruption(
    "frost",
    tuple((*mix, 0.2) for mix in ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    tuple((*mix, 0.3) for mix in ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55))),
    tuple((*mix, 1.0) for mix in ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
)
def frost(picture: Colours, setting: Sequence[float], generator: np.random.Generator) -> Colours:
    """Overlay a photograph of frost; the photographs are in the package imagecorruptions.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        The weights of the picture and of the frost, and the scale of the photographs.
    generator
        The source of randomness.
    """
    kept, added, scale = setting
    sheets = _frost_photographs(scale)
    sheet = sheets[int(generator.integers(5))]  # of six, as the published program draws
    height, width = picture.shape[:2]
    while sheet.shape[0] <= height or sheet.shape[1] <= width:
        sheet = np.concatenate([sheet, sheet[::-1]])
        sheet = np.concatenate([sheet, sheet[:, ::-1]], 1)
    top = int(generator.integers(sheet.shape[0] - height))
    left = int(generator.integers(sheet.shape[1] - width))
    return kept * picture + added * sheet[top : top + height, left : left + width]


@cache
def _frost_photographs(scale: float) -> list[Colours]:
    spec = importlib.util.find_spec("imagecorruptions")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder, "frost").glob("frost?.*"))
    if len(files) < 5:
        raise CovcliError(
            "needs the photographs of frost in the package imagecorruptions",
            where="corrupt:frost",
            fix="pip install imagecorruptions",
        )
    sheets = []
    for file in files:
        image = Image.open(file, formats=["PNG", "JPEG"]).convert("RGB")
        size = [round(side * scale) for side in image.size]
        sheets.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR)) / 255)
    return sheets


@corruption(
    "fog",
    ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
)
def fog(picture: Colours, setting: tuple[float, float], generator: np.random.Generator) -> Colours:
    """Overlay a fractal of light.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        The density of the fog, and the decay of its roughness per scale.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> fog(grey, (1.5, 1.75), generator).shape
    (32, 32, 3)
    """
    density, decay = setting
    height, width = picture.shape[:2]
    side = 1 << math.ceil(math.log2(max(height, width)))
    clouds = _clouds(side, decay, generator)[:height, :width, None]
    brightest = float(picture.max())
    foggy: Colours = (picture + density * clouds) * brightest / (brightest + density)
    return foggy


def _clouds(side: int, decay: float, generator: np.random.Generator) -> Plane:
    """Return a plasma fractal in [0, 1] by the diamond-square algorithm, on a torus."""
    heights = np.zeros((side, side))
    step, roughness = side, 100.0

    def between(sums: Plane) -> Plane:
        """Return the means of four neighbours, each with a random displacement."""
        return sums / 4 + roughness * generator.uniform(-roughness, roughness, sums.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        rows = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = between(rows + np.roll(rows, -1, 1))
        middles = heights[half::step, half::step]
        sums = middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        heights[::step, half::step] = between(sums)
        sums = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        heights[half::step, ::step] = between(sums)
        step, roughness = half, roughness / decay
    heights -= heights.min()
    heights /= heights.max()
    return heights


@corruption(
    "spatter",
    ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
     (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
    ((0.62, 0.1, 0.7, 0.7, 0.6, 0), (0.65, 0.1, 0.8, 0.7, 0.6, 0), (0.65, 0.3, 1, 0.69, 0.6, 0),
     (0.65, 0.1, 0.7, 0.68, 0.6, 1), (0.65, 0.1, 0.5, 0.67, 0.6, 1)),
    ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
     (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1)),
)  # fmt: skip
def spatter(picture: Colours, setting: Sequence[float], generator: np.random.Generator) -> Colours:
    """Splash water, or from severity 4 on mud, over the picture.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        Mean, deviation and blur of the liquid, its threshold, its strength, and whether it is mud.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> spatter(grey, (0.65, 0.3, 1, 0.69, 0.6, 1), generator).shape
    (32, 32, 3)
    """
    mean, deviation, sigma, least, strength, is_mud = setting
    liquid = _smooth(generator.normal(mean, deviation, picture.shape[:2]), sigma)
    liquid = np.where(liquid < least, 0, liquid)
    if is_mud:
        cover = _smooth((liquid > least).astype(np.float64), strength)
        cover = np.where(cover < 0.8, 0, cover)[..., None]
        return picture * (1 - cover) + MUD * cover
    shine = _shine((liquid.clip(0, 1) * 255).astype(np.uint8))
    brightest = shine.max()
    shine = shine / brightest * strength if brightest > 0 else shine
    return picture + shine[..., None] * WHITE_WATER


def _shine(liquid: NDArray[np.uint8]) -> Plane:
    """Return the brightness of drops of a liquid: highest on one side of their edges."""
    edges = _edges(liquid)
    # Without any edge, the distance to the nearest edge counts as large.
    distance = ndimage.distance_transform_edt(~edges) if edges.any() else np.full(edges.shape, 20.0)
    near = ndimage.uniform_filter(np.minimum(distance, 20), 3, mode="mirror")
    flat = _equalised(near.astype(np.uint8)).astype(np.float64)
    slope = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    lit = ndimage.correlate(flat, slope, mode="mirror").clip(0, 255)
    shine: Plane = liquid * np.rint(ndimage.uniform_filter(lit, 3, mode="mirror"))
    return shine


def _equalised(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Equalise the histogram of grey values over 0 to 255."""
    counts = np.bincount(values.ravel(), minlength=256)
    sums = counts.cumsum()
    lowest = counts[values.min()]
    if lowest == values.size:
        return values
    table = np.rint((sums - lowest) * 255 / (values.size - lowest)).clip(0, 255)
    spread: NDArray[np.uint8] = table.astype(np.uint8)[values]
    return spread


def _edges(values: NDArray[np.uint8], low: float = 50, high: float = 150) -> NDArray[np.bool_]:
    """Return Canny's edges (1986): ridges of the gradient above `low` that reach above `high`."""
    grey = values.astype(np.int64)
    across = ndimage.sobel(grey, 1, mode="nearest")
    down = ndimage.sobel(grey, 0, mode="nearest")
    size = np.abs(across) + np.abs(down)
    padded = np.pad(size, 1)
    steep = np.abs(down) > np.abs(across) * math.tan(math.radians(67.5))
    flat = np.abs(down) < np.abs(across) * math.tan(math.radians(22.5))
    rising = (across ^ down) < 0
    height, width = grey.shape

    def moved(y: int, x: int) -> NDArray[np.int64]:
        return padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    ridge = np.select(
        [flat, steep, rising],
        [(size > moved(0, -1)) & (size >= moved(0, 1)),
         (size > moved(-1, 0)) & (size >= moved(1, 0)),
         (size > moved(-1, 1)) & (size > moved(1, -1))],
        (size > moved(-1, -1)) & (size > moved(1, 1)),
    )  # fmt: skip
    weak = ridge & (size > low)
    groups, _ = ndimage.label(weak, np.ones((3, 3)))
    strong = np.unique(groups[weak & (size > high)])
    return np.isin(groups, strong[strong > 0])


# Digital


@corruption("contrast", (0.75, 0.5, 0.4, 0.3, 0.15), *[(0.4, 0.3, 0.2, 0.1, 0.05)] * 2)
def contrast(picture: Colours, factor: float, _: np.random.Generator) -> Colours:
    """Move every value towards the mean of its channel.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    factor
        The factor of the distance from the mean, in [0, 1].

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> contrast(grey, 0.3, generator).shape
    (32, 32, 3)
    """
    means: Colours = picture.mean((0, 1), keepdims=True)
    return (picture - means) * factor + means


@corruption("brightness", (0.05, 0.1, 0.15, 0.2, 0.3), *[(0.1, 0.2, 0.3, 0.4, 0.5)] * 2)
def brightness(picture: Colours, added: float, _: np.random.Generator) -> Colours:
    """Increase the value channel of HSV.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    added
        The increase of the value, in [0, 1].

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> brightness(grey, 0.2, generator).shape
    (32, 32, 3)
    """
    return _in_hsv(picture, 2, 1, added)


@corruption(
    "saturate",
    ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
    ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
)
def saturate(picture: Colours, setting: tuple[float, float], _: np.random.Generator) -> Colours:
    """Make colours paler or stronger.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        The factor and the increase of the saturation.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> saturate(grey, (2.0, 0.1), generator).shape
    (32, 32, 3)
    """
    return _in_hsv(picture, 1, *setting)


def _in_hsv(picture: Colours, part: int, factor: float, added: float) -> Colours:
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    parts = rgb_to_hsv(picture)
    parts[..., part] = (parts[..., part] * factor + added).clip(0, 1)
    changed: Colours = hsv_to_rgb(parts)
    return changed


@corruption("jpeg_compression", (80, 65, 58, 50, 40), (65, 58, 50, 40, 25), (25, 18, 15, 10, 7))
def jpeg_compression(picture: Colours, quality: int, _: np.random.Generator) -> Colours:
    """Store the picture as a JPEG of low quality.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    quality
        The quality of the JPEG file, 1 to 95.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> jpeg_compression(grey, 40, generator).shape
    (32, 32, 3)
    """
    buffer = io.BytesIO()
    _as_image(picture).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=["JPEG"]) as image:
        return np.asarray(image) / 255


@corruption(
    "pixelate", (0.95, 0.9, 0.85, 0.75, 0.65), (0.9, 0.8, 0.7, 0.6, 0.5), (0.6, 0.5, 0.4, 0.3, 0.25)
)
def pixelate(picture: Colours, scale: float, _: np.random.Generator) -> Colours:
    """Reduce the picture, and enlarge it again without smoothing.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    scale
        The scale of the reduced picture, in (0, 1].

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> pixelate(grey, 0.6, generator).shape
    (32, 32, 3)
    """
    image = _as_image(picture)
    small = image.resize([max(1, int(side * scale)) for side in image.size], Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def _as_image(picture: Colours) -> Image.Image:
    return Image.fromarray(np.rint(picture * 255).astype(np.uint8))


@corruption(
    "elastic_transform",
    tuple((32 * a, 32 * b, 32 * c) for a, b, c in (
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
    tuple((64 * a, 64 * b, 64 * c) for a, b, c in (
        (0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02))),
    tuple((244 * a, 244 * b, 244 * c) for a, b, c in (  # published so, for 224 pixels
        (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))),
)  # fmt: skip
def elastic_transform(
    picture: Colours, setting: tuple[float, float, float], generator: np.random.Generator
) -> Colours:
    """Deform the picture locally, after an affine transformation given by three points.

    Parameters
    ----------
    picture
        float64 of shape (H, W, 3), in [0, 1].
    setting
        The strength and smoothness of the local shifts, and the reach of the affine transformation,
        in pixels.
    generator
        The source of randomness.

    Examples
    --------
    >>> grey, generator = np.full((32, 32, 3), 0.5), np.random.default_rng(0)
    >>> elastic_transform(grey, (3.2, 0.96, 0.96), generator).shape
    (32, 32, 3)
    """
    strength, sigma, reach = setting
    height, width = picture.shape[:2]
    middle, arm = np.array([height // 2, width // 2]), min(height, width) // 3
    before = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + generator.uniform(-reach, reach, before.shape)
    homogeneous = np.concatenate([after, np.ones((3, 1))], 1)
    back = np.linalg.solve(homogeneous, before)  # where each point of the result comes from
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), 2)  # x, y
    sources = places @ back[:2] + back[2]
    moved = _taken(picture, sources[..., 1], sources[..., 0], "mirror")
    shifts = [_shifts(generator, (height, width), sigma) * strength for _ in range(2)]
    return _taken(moved, places[..., 1] + shifts[1], places[..., 0] + shifts[0], "reflect")


def _shifts(generator: np.random.Generator, shape: tuple[int, int], sigma: float) -> Plane:
    drawn = generator.uniform(-1, 1, shape)
    smoothed: Plane = ndimage.gaussian_filter(drawn, sigma, mode="reflect", truncate=3)
    return smoothed


def _taken(picture: Colours, rows: Plane, columns: Plane, mode: str) -> Colours:
    """Interpolate a picture bilinearly at fractional positions."""
    channels = [
        ndimage.map_coordinates(picture[..., c], [rows, columns], order=1, mode=mode)
        for c in range(3)
    ]
    return np.stack(channels, 2)


@dataclass(frozen=True)
class CorruptSource:
    """The corrupted images of another source; an image is corrupted equally in any batch."""

    source: Source
    name: str
    severity: int
    seed: int

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Read the rows in colour, and corrupt each with its own generator."""
        colour: Shape = (3, shape[1], shape[2])
        if isinstance(shape, InputShape):
            colour = InputShape(colour, shape.preprocess)
        images = self.source.read(rows, colour)
        corrupt = CORRUPTIONS.get(self.name)
        corrupted = torch.empty_like(images)
        for place, row in enumerate(rows.tolist()):
            generator = np.random.Generator(np.random.Philox(key=[self.seed, row]))
            picture = images[place].permute(1, 2, 0).numpy() / 255
            # The published images were truncated to 8 bits, not rounded.
            changed = np.floor(corrupt(picture, self.severity, generator) * 255 + 1e-9)
            corrupted[place] = torch.from_numpy(changed.astype(np.uint8)).permute(2, 0, 1)
        return adapt(corrupted, (shape[0], shape[1], shape[2]))

    @property
    def files(self) -> Sequence[str] | None:
        """The names of the uncorrupted files; None if the images are not in files."""
        names: Sequence[str] | None = getattr(self.source, "files", None)
        return names

    @cached_property
    def fingerprint(self) -> str:
        """The digest of everything that determines the pixels."""
        text = f"{self.name} {self.severity} {self.seed} {self.source.fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()
