"""Decoding of one image file to pixels: the formats, the conversions and what is refused."""

import contextlib
import ctypes
import io
import logging
import math
import re
import struct
import threading
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, _imaging
from torch import Tensor

from covcli.core import progress
from covcli.core.contents import LOOKED_AT, recognised
from covcli.core.errors import CovcliError
from covcli.core.opening import IrregularError, open_regular

Pixels = NDArray[np.uint8]  # (H, W, C), of 1 to 4 channels
# The formats that PIL may decode, recognised by content, not by file name. Formats that start a
# program (EPS runs Ghostscript) or do not store photographs are excluded.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
MAX_PIXELS = 89_478_485  # PIL's own limit: 256 MiB of RGB pixels
# Larger images are decoded one at a time, so that several threads do not need more memory.
LARGE = 16_000_000
ORIENTATION = 0x0112  # tags of EXIF and TIFF
BITS, WHITE_IS_ZERO, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339
TILE_WIDTH, TILE_LENGTH = 322, 323
SEPARATE_PLANES, SIGNED = 2, 2
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Small files whose decoding takes hours: JPEGs of many scans, each of which passes over all pixels,
# and texts of many comments, each of which PIL cuts out of a megabyte.
MOST_SCANS = 100
MOST_COMMENTS = 1000
MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")  # of a JPEG, less those without a length
START_OF_SCAN, END_OF_IMAGE = b"\xda", b"\xd9"
# The errors that PIL raises on damaged files; signals and exhausted memory are excluded.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError,
    AssertionError, RuntimeError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_one_large = threading.Lock()


def _silence_libtiff() -> None:
    """Stop PIL's libtiff from writing to stderr; PIL raises the same errors as exceptions."""
    with contextlib.suppress(AttributeError, OSError):  # without libtiff, or linked statically
        setter = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
        setter(None)


_silence_libtiff()
# What PIL logs of a broken file it raises too; without a handler it would be a line on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnreadableError(CovcliError):
    """An image file that cannot be read.

    Attributes
    ----------
    path, reason
        The file, and why it cannot be read.
    """

    def __init__(self, path: Path, reason: str, fix: str = "repair or remove it") -> None:
        super().__init__(f"cannot be read as an image ({reason})", where=path, fix=fix)
        self.path = path
        self.reason = reason


def decode(path: Path, most: int = MAX_PIXELS) -> Tensor:
    """Read one image file.

    The first frame of an animation is read. The EXIF orientation is applied. 16 bits are scaled to
    8 bits. Palettes, CMYK, YCbCr and LAB become RGB. Grey stays grey. Transparency becomes the last
    channel.

    Parameters
    ----------
    path
        The file.
    most
        The maximum number of pixels.

    Returns
    -------
    Tensor
        uint8 of shape (1, C, H, W): grey, grey and alpha, RGB, or RGB and alpha.

    Raises
    ------
    UnreadableError
        If the content is in none of the FORMATS, is damaged, has more than `most` pixels, or has
        pixels without a defined range (float, 32-bit, signed).

    Examples
    --------
    >>> Image.new("L", (3, 2)).save("x.png")
    >>> decode(Path("x.png")).shape
    torch.Size([1, 1, 2, 3])
    """
    try:
        with open_regular(path) as file:
            return _decoded(file, path, most)
    except IrregularError:
        raise UnreadableError(path, "it is no regular file", "remove it") from None
    except OSError as error:
        raise UnreadableError(path, error.strerror or str(error)) from None


def decode_bytes(content: bytes, where: Path, most: int = MAX_PIXELS) -> Tensor:
    """Read the content of an image file as `decode` does; `where` names it in errors."""
    return _decoded(io.BytesIO(content), where, most)


def _decoded(file: BinaryIO, path: Path, most: int) -> Tensor:
    progress.working_on(path)
    try:
        pixels = _opened(file, most)
    except UnidentifiedImageError:
        raise _unidentified(file, path) from None
    except DECODER_ERRORS as error:
        raise UnreadableError(path, str(error) or type(error).__name__) from None
    finally:
        progress.working_on(None)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]


def _opened(file: BinaryIO, most: int) -> Pixels:
    with Image.open(file, formats=FORMATS) as image:
        count = image.width * image.height
        if count > most:
            raise ValueError(
                f"{image.width}×{image.height} are more than {most} pixels: raise --max-pixels"
            )
        _check_work(image, file, most)
        with _one_large if count > LARGE else contextlib.nullcontext():
            return _upright(image, _pixels(image))


def _check_work(image: ImageFile.ImageFile, file: BinaryIO, most: int) -> None:
    """Raise a ValueError for a file that takes far more time or memory than its pixels need."""
    tags: Any = getattr(image, "tag_v2", {})
    sides = (max(_values(tags, side), default=0) for side in (TILE_WIDTH, TILE_LENGTH))
    if math.prod(sides) > most:
        raise ValueError(f"its tiles have more than {most} pixels")
    decoder = image.tile[0][0] if image.tile else ""
    if decoder == "ppm_plain" and _content(file).count(b"#") > MOST_COMMENTS:
        raise ValueError(f"more than {MOST_COMMENTS} comments")
    if "progressive" in image.info and _scans(_content(file)) > MOST_SCANS:
        raise ValueError(f"more than {MOST_SCANS} scans")


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _scans(content: bytes) -> int:
    """Return the number of a JPEG's scans, at most one more than `MOST_SCANS`."""
    place = count = 0
    while count <= MOST_SCANS and (marker := MARKER.search(content, place)):
        if marker[1] == END_OF_IMAGE:
            break
        count += marker[1] == START_OF_SCAN
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
    return count


def _unidentified(file: BinaryIO, path: Path) -> UnreadableError:
    known = ", ".join(FORMATS)
    file.seek(0)
    start = file.read(LOOKED_AT)
    content = recognised(start)
    if start[:4] in TIFF_STARTS:
        reason = "a TIFF of a kind that is not decoded, as with 64-bit pixels"
    else:
        reason = "its content is of no format that covcli decodes"
        reason += f": it is {content.what}" if content else ""
    cure = content.cure if content else None
    return UnreadableError(path, reason, f"{cure or f'store it as one of {known}'}, or remove it")


def _pixels(image: ImageFile.ImageFile) -> Pixels:
    """Return an image's pixels before rotation, in 8 bits."""
    _check_range_is_known(image)
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        wanted = "LA" if image.mode in ("LA", "La") else "RGBA"
    else:
        wanted = "L" if image.mode in ("1", "L") else "RGB"
    _scale_transparent_grey(image)
    image.load()
    pixels = np.array(image if image.mode == wanted else image.convert(wanted))
    if image.format == "BMP" and wanted == "RGBA" and not pixels[..., 3].any():
        pixels = pixels[..., :3]  # many programs leave the fourth byte empty, and all show colours
    return pixels.reshape(*pixels.shape[:2], -1)


def _scale_transparent_grey(image: ImageFile.ImageFile) -> None:
    """Scale the transparent level of a grey PNG of 2 or 4 bits: PIL scales only the pixels."""
    level = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(level, int) and image.tile:
        arguments = image.tile[0][3]  # a plain tuple before Pillow 11
        highest = {"L;2": 3, "L;4": 15}.get(str(arguments), 0)
        if level <= highest:
            image.info["transparency"] = level * 255 // max(highest, 1)


def _check_range_is_known(image: ImageFile.ImageFile) -> None:
    """Raise a ValueError for pixels that PIL reads wrongly or that have no defined range."""
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range: store 8 or 16 bits")
    if SIGNED in _values(tags, SAMPLE_FORMAT):
        raise ValueError("signed pixels have no agreed range: store them unsigned")
    if image.mode == "I" and image.format == "TIFF":
        raise ValueError("32-bit pixels have no agreed range: store 8 or 16 bits")
    if SEPARATE_PLANES in _values(tags, PLANAR) and max(_values(tags, BITS), default=8) > 8:
        raise ValueError("16-bit colours in separate planes are not decoded: store them together")


def _from_16_bits(image: ImageFile.ImageFile) -> Pixels:
    tags: Any = getattr(image, "tag_v2", {})
    highest = 2 ** max(_values(tags, BITS), default=16) - 1  # scanners and cameras store 12 too
    deep = np.asarray(image).astype(np.int64)
    if 0 in _values(tags, WHITE_IS_ZERO):
        deep = highest - deep
    pixels: Pixels = ((deep * 255 + highest // 2) // highest).clip(0, 255).astype(np.uint8)
    level = image.info.get("transparency")
    if not isinstance(level, int):
        return pixels[..., None]
    return np.stack([pixels, np.where(deep == level, 0, 255).astype(np.uint8)], axis=-1)


def _values(tags: Any, tag: int) -> tuple[int, ...]:
    value = tags.get(tag, ())
    return value if isinstance(value, tuple) else (value,)


def _upright(image: ImageFile.ImageFile, pixels: Pixels) -> Pixels:
    """Rotate pixels by the EXIF orientation; damaged EXIF data is ignored."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except DECODER_ERRORS:
        return pixels
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels.transpose(1, 0, 2) if orientation in (5, 6, 7, 8) else pixels
