"""Recognition of a file by its first bytes, to name what was given instead of what was expected.

Downloads leave web pages and pointers under the name of the file that was wanted, and file names do
not tell the format. Nothing is parsed here.
"""

from dataclasses import dataclass

LOOKED_AT = 512  # bytes; a tar archive has its mark at 257
AGAIN = "download or copy it again"
UNPACK = "unpack it"
OF_PYTORCH = "save the state_dict() of the PyTorch network by torch.save"


@dataclass(frozen=True)
class Content:
    """What a file is.

    Attributes
    ----------
    what
        A noun with its article, or "empty".
    cure
        How the user gets the file that was probably meant; None if nothing is known.
    """

    what: str
    cure: str | None = None


# The first bytes, in lower case, after white space.
TEXTS = {
    b"version https://git-lfs": Content("a pointer of Git LFS", "fetch the file by `git lfs pull`"),
    b"<!doctype html": Content("a web page", "download the file itself"),
    b"<html": Content("a web page", "download the file itself"),
    b"<svg": Content("a drawing (SVG)"),
    b"<?xml": Content("an XML document", "download the file itself"),
    b"{": Content("a JSON document"),
    b"[": Content("a JSON document"),
}
# The offset, and the bytes there.
MARKS = {
    (0, b"\x1f\x8b"): Content("compressed by gzip", UNPACK),
    (0, b"BZh"): Content("compressed by bzip2", UNPACK),
    (0, b"\xfd7zXZ\0"): Content("compressed by xz", UNPACK),
    (0, b"\x28\xb5\x2f\xfd"): Content("compressed by zstd", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c"): Content("a 7-Zip archive", UNPACK),
    (0, b"Rar!"): Content("a RAR archive", UNPACK),
    (257, b"ustar"): Content("a tar archive", UNPACK),
    (0, b"PK\3\4"): Content("a ZIP archive that is cut short, or of other files", AGAIN),
    (0, b"\x89HDF"): Content("an HDF5 file, as Keras writes it", OF_PYTORCH),
    (4, b"TFL3"): Content("a network of TensorFlow Lite", OF_PYTORCH),
    (0, b"\x93NUMPY"): Content("a single NumPy array (.npy)"),
    (0, b"\x80\2"): Content("a pickle", OF_PYTORCH),
    (0, b"\x80\3"): Content("a pickle", OF_PYTORCH),
    (0, b"\x80\4"): Content("a pickle", OF_PYTORCH),
    (0, b"\x80\5"): Content("a pickle", OF_PYTORCH),
    (0, b"\x89PNG"): Content("an image (PNG)"),
    (0, b"\xff\xd8\xff"): Content("an image (JPEG)"),
    (0, b"GIF8"): Content("an image (GIF)"),
    (8, b"WEBP"): Content("an image (WebP)"),
    (4, b"ftyphei"): Content("an image (HEIC)"),
    (4, b"ftypmif1"): Content("an image (HEIC)"),
    (4, b"ftypavif"): Content("an image (AVIF)"),
    (4, b"jP  "): Content("an image (JPEG 2000)"),
    (0, b"\0\0\1\0"): Content("an icon (ICO)"),
    (0, b"%PDF"): Content("a PDF document"),
    (0, b"%!PS"): Content("a PostScript document"),
}


def recognised(start: bytes) -> Content | None:
    """Return what a file with these first bytes is; None if it is of no known kind.

    Examples
    --------
    >>> recognised(b"<!DOCTYPE html>").what, recognised(b"").what
    ('a web page', 'empty')
    """
    if not start:
        return Content("empty", AGAIN)
    if not start.strip(b"\0"):
        return Content("full of zeros", AGAIN)
    for (offset, mark), content in MARKS.items():
        if start.startswith(mark, offset):
            return content
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, content in TEXTS.items():
        if text.startswith(beginning):
            return content
    if start.startswith(b"\x08") and any(word in start for word in (b"pytorch", b"onnx", b"ai.")):
        return Content("an ONNX graph", OF_PYTORCH)
    return None
