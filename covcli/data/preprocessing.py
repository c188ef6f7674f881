"""Preprocessing of images to a network's input size: resize, then crop the centre."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from covcli.core.errors import CovcliError
from covcli.core.specs import suggestion

Shape: TypeAlias = tuple[int, int, int]
Interpolation: TypeAlias = Literal["bilinear", "bicubic", "nearest"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
COVER = "cover"
MOST_SIDE = 4096
KEYS = ("resize", "crop", "interpolation")


@dataclass(frozen=True)
class Preprocess:
    """How images are resized before the centre is cropped.

    Attributes
    ----------
    resize
        The length of the shorter side in pixels, or height and width. None scales the image just
        enough to cover the network's input.
    interpolation
        "bilinear", "bicubic" (both with antialiasing) or "nearest".

    Examples
    --------
    >>> Preprocess(256).size((480, 640), (224, 224))
    (256, 341)
    """

    resize: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"

    def size(self, sides: Sequence[int], wanted: Sequence[int]) -> tuple[int, int]:
        """Return the height and width to resize to, in pixels.

        Parameters
        ----------
        sides
            Height and width of the image.
        wanted
            Height and width of the network's input.
        """
        if isinstance(self.resize, tuple):
            return self.resize
        height, width = sides
        if self.resize is None:
            scale = self.scale(sides, wanted) or 1
            return max(round(height * scale), wanted[0]), max(round(width * scale), wanted[1])
        # As torchvision's Resize: the longer side is rounded down.
        longer = int(self.resize * max(sides) / min(sides))
        return (self.resize, longer) if height <= width else (longer, self.resize)

    def scale(self, sides: Sequence[int], wanted: Sequence[int]) -> float | None:
        """Return the scale factor of an image; None if height and width scale differently."""
        if isinstance(self.resize, tuple):
            return None
        if self.resize is not None:
            return self.resize / min(sides)
        return max(wanted[0] / sides[0], wanted[1] / sides[1])

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        resize = list(self.resize) if isinstance(self.resize, tuple) else self.resize
        return {"resize": resize, "interpolation": self.interpolation}

    @classmethod
    def from_dict(cls, document: Any) -> "Preprocess":
        """Rebuild from the result of `as_dict`.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the document is malformed.
        """
        resize, interpolation = document["resize"], document["interpolation"]
        if isinstance(resize, list):
            height, width = (_side(str(side)) for side in resize)
            resize = height, width
        elif resize is not None:
            resize = _side(str(resize))
        return cls(resize, _interpolation(str(interpolation)))

    def describe(self, shape: Shape) -> str:
        """Return the text that `--preprocess` parses, for a network of that input shape.

        Examples
        --------
        >>> Preprocess(256, "bicubic").describe((3, 224, 224))
        'resize=256,crop=224,interpolation=bicubic'
        """
        resize = self.resize if self.resize is not None else COVER
        crop = shape[1] if shape[1] == shape[2] else shape[1:]
        sides = ("x".join(map(str, s)) if isinstance(s, tuple) else s for s in (resize, crop))
        return "resize={},crop={},interpolation={}".format(*sides, self.interpolation)


COVERING = Preprocess()


class InputShape(tuple[int, int, int]):
    """Channels, height and width of a network's inputs, with the preprocessing of images.

    It is an ordinary shape tuple. Code that reads images in the shape of a network therefore
    applies the network's preprocessing automatically.

    Attributes
    ----------
    preprocess
        How images are resized.

    Examples
    --------
    >>> shape = InputShape((3, 224, 224), Preprocess(256))
    >>> shape == (3, 224, 224), shape.preprocess.resize
    (True, 256)
    """

    preprocess: Preprocess

    def __new__(cls, sides: Sequence[int], preprocess: Preprocess = COVERING) -> "InputShape":
        """Create a shape from (channels, height, width) and the preprocessing."""
        shape = super().__new__(cls, sides)
        shape.preprocess = preprocess
        return shape

    def changed(self, text: str | None) -> "InputShape":
        """Return the shape with the changes that the text of `--preprocess` names.

        Parameters
        ----------
        text
            For example "resize=256,crop=224,interpolation=bicubic"; None changes nothing.

        Raises
        ------
        CovcliError
            If the text is malformed, or the crop would be larger than the resized image.

        Examples
        --------
        >>> shape = InputShape((3, 224, 224)).changed("resize=256,crop=192")
        >>> tuple(shape), shape.preprocess.resize
        ((3, 192, 192), 256)
        """
        if text is None:
            return self
        where = f"--preprocess {text}"
        shape, how = tuple(self), self.preprocess
        for key, value in _pairs(text, where).items():
            try:
                if key == "crop":
                    height, width = _sides(value)
                    shape = shape[0], height, width
                elif key == "resize":
                    how = replace(how, resize=_resize(value))
                else:
                    how = replace(how, interpolation=_interpolation(value))
            except ValueError as error:
                raise CovcliError(f"{key}={value}: {error}", where=where) from None
        resize = how.resize if isinstance(how.resize, tuple) else (how.resize or MOST_SIDE,) * 2
        if resize[0] < shape[1] or resize[1] < shape[2]:
            raise CovcliError(
                f"resizes to {how.resize}, less than the crop of {shape[1]}×{shape[2]}",
                where=where,
                fix="name a larger resize, or resize=cover",
            )
        return InputShape(shape, how)


def _pairs(text: str, where: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if key not in KEYS:
            raise CovcliError(f"unknown key {key!r}", where=where, fix=suggestion(key, list(KEYS)))
        if not equals or not value or key in pairs:
            raise CovcliError(
                f"cannot read {part!r}",
                where=where,
                fix="write resize=256,crop=224,interpolation=bicubic, each once",
            )
        pairs[key] = value
    return pairs


def _resize(text: str) -> int | tuple[int, int] | None:
    if text == COVER:
        return None
    return _sides(text) if "x" in text else _side(text)


def _sides(text: str) -> tuple[int, int]:
    """Parse `224` or `224x160`: height and width."""
    height, _, width = text.partition("x")
    return _side(height), _side(width or height)


def _side(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_SIDE):
        raise ValueError(f"expected pixels from 1 to {MOST_SIDE}")
    return int(text)


def _interpolation(text: str) -> Interpolation:
    for known in INTERPOLATIONS:
        if text == known:
            return known
    raise ValueError(f"unknown; {suggestion(text, list(INTERPOLATIONS))}")
