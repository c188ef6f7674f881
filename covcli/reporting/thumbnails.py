"""Small images: one image as a data URI, and several as a sheet."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

from covcli.reporting.blocks import Thumbnail

LARGEST = 128  # pixels per side
PLAIN = 64  # an image of at most this many pixels per side is stored as PNG
SHOWN = 64  # pixels per side on a sheet
PER_ROW = 8


def data_uri(image: np.ndarray) -> str:
    """Return an image as a data URI: PNG, or JPEG if it is large.

    Parameters
    ----------
    image
        uint8 of shape (C, H, W), with 1 or 3 channels.
    """
    small = _image(image)
    small.thumbnail((LARGEST, LARGEST))
    plain = max(image.shape[1:]) <= PLAIN
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if plain else "JPEG", optimize=True, quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{'png' if plain else 'jpeg'};base64,{encoded}"


def sheet(thumbnails: list[Thumbnail]) -> bytes:
    """Return images in rows of eight as one PNG."""
    columns = min(len(thumbnails), PER_ROW)
    rows = -(-len(thumbnails) // PER_ROW)
    page = Image.new("RGB", (columns * SHOWN, rows * SHOWN), "white")
    for k, thumbnail in enumerate(thumbnails):
        small = _image(thumbnail.image).resize((SHOWN - 4, SHOWN - 4), Image.Resampling.NEAREST)
        page.paste(small, (k % PER_ROW * SHOWN + 2, k // PER_ROW * SHOWN + 2))
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def heat(image: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """Overlay a channel's activation on the grey image; a higher activation is more opaque.

    Parameters
    ----------
    image
        uint8 of shape (C, H, W).
    fires
        The channel's activation, shape (h, w).

    Returns
    -------
    ndarray
        uint8 of shape (3, H', W'), at least as large as the image and as 64 pixels a side.
    """
    spread = float(fires.max() - fires.min())
    strength = (fires - fires.min()) / spread if spread > 0 else np.zeros_like(fires)
    times = -(-SHOWN // min(image.shape[1:]))
    size = (image.shape[2] * times, image.shape[1] * times)
    over = _stretched(strength, size)[..., None]
    grey = 64 + _stretched(image.mean(0), size)[..., None] * (127 / 255)
    coloured = 255 * colormaps["inferno"](over[..., 0])[..., :3]
    mixed = grey + 0.75 * over * (coloured - grey)
    pixels: np.ndarray = np.clip(np.rint(mixed), 0, 255).astype(np.uint8).transpose(2, 0, 1)
    return pixels


def _stretched(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(image.resize(size, Image.Resampling.NEAREST))
