"""One image file to pixels: which formats are decoded, and what is refused."""

import os
import stat
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from covcli.core import file_checks
from covcli.core.errors import CovcliError

# What PIL may decode, by content and whatever the file is called. Formats that start a program
# (EPS runs Ghostscript), or that no photograph is stored in, are left out.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read.

    Raises
    ------
    CovcliError
        If it is a pipe, a device, a socket or a folder: reading those may block, or never end.
    OSError
        If it cannot be opened.
    """
    # Without O_NONBLOCK the opening of a pipe that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CovcliError("is no regular file", where=path, fix="remove it")
    return os.fdopen(handle, "rb")


def decode(path: Path) -> Tensor:
    """Read one image file as uint8 of shape (1, C, H, W).

    Raises
    ------
    CovcliError
        If the file is of none of the FORMATS, whatever its name says, or cannot be read.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            size = os.fstat(file.fileno()).st_size
            if 3 * image.width * image.height > file_checks.allowance(size):
                raise ValueError(f"{image.width}×{image.height} pixels in so small a file")
            mode = "L" if image.mode in ("1", "L", "I", "I;16") else "RGB"
            pixels = np.array(image.convert(mode))
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise CovcliError(
            "cannot be read as an image (its content is of no format that covcli decodes)",
            where=path,
            fix=f"store it as one of {known}, or remove it",
        ) from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        ArithmeticError,
        Image.DecompressionBombError,
        MemoryError,
        struct.error,
        zlib.error,
    ) as error:  # PIL raises many kinds
        raise CovcliError(
            f"cannot be read as an image ({error})", where=path, fix="repair or remove it"
        ) from None
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes))[None]
