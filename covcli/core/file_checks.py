"""Checks of untrusted files before they are parsed: sizes and headers must match the content."""

import ast
import gzip
import json
import math
import os
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

from covcli.core.errors import CovcliError
from covcli.core.opening import allowance, open_regular, reading

LONGEST_HEADER = 1 << 16
LARGEST_JSON = 256 << 20


def check_torch_archive(file: IO[bytes], path: Path) -> None:
    """Raise a CovcliError unless a file is a ZIP archive as torch.save writes it.

    Every entry must be uncompressed, occur once, and be no larger than the file.
    """
    size = os.fstat(file.fileno()).st_size
    with reading(path, "is not a PyTorch checkpoint", says=True), zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    stored = all(
        e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries
    )
    if not any(Path(name).name == "data.pkl" for name in names):
        raise CovcliError(
            "is not a PyTorch checkpoint: it is a ZIP archive of other files", where=path
        )
    if not stored or len(set(names)) < len(names) or sum(e.file_size for e in entries) > size:
        raise CovcliError("is not a PyTorch checkpoint: its archive is not sound", where=path)
    file.seek(0)


def read_npz(
    path: Path, names: Collection[str] | None = None, *, inside: Path | None = None
) -> dict[str, np.ndarray]:
    """Read the arrays of a NumPy archive; arrays of Python objects are refused.

    Each array must be as large as its header claims. The unpacked size may be at most 64 MB or 50
    times the file's size, whichever is larger.

    Parameters
    ----------
    path
        The archive.
    names
        The arrays to read, of those present; None reads all.
    inside
        A folder that the path, with links followed, must not leave.

    Raises
    ------
    CovcliError
        If the file cannot be read, is no NumPy archive, or has a header that does not match its
        content.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> np.savez("x.npz", images=np.zeros((2, 8, 8), np.uint8))
    >>> read_npz(Path("x.npz"))["images"].shape
    (2, 8, 8)
    """
    complaint = "cannot be read as a NumPy archive"
    with reading(path, complaint, says=True), open_regular(path, inside=inside) as file:
        _check_npz(file, path, names)
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if names is None or name in names}


def _check_npz(file: IO[bytes], path: Path, names: Collection[str] | None) -> None:
    limit = allowance(os.fstat(file.fileno()).st_size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > limit:
            raise CovcliError(
                f"unpacks to more than {limit >> 20} MB", where=path, fix="store it plain"
            )
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("not sound")
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if names is not None and name not in names:
                continue
            if not _header_holds(archive.open(entry), entry.file_size, f"{path}, array {name!r}"):
                raise ValueError("not sound")


def _header_holds(file: IO[bytes], size: int, where: str) -> bool:
    """Return whether a header has a plain type and matches the number of bytes after it."""
    with file:
        start = file.read(8)
        if start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
            return False
        width, form = (2, "<H") if start[6] == 1 else (4, "<I")
        length = struct.unpack(form, file.read(width))[0] if size > 8 + width else LONGEST_HEADER
        if length >= LONGEST_HEADER:
            return False
        header = ast.literal_eval(file.read(length).decode("latin1"))
    kind, shape = header["descr"], header["shape"]
    if kind == "|O":
        raise CovcliError(
            "holds Python objects, which are never unpickled",
            where=where,
            fix="store numbers, or text as in np.array(['cat', 'dog'])",
        )
    if not isinstance(kind, str) or kind.lstrip("<>|=")[:1] not in tuple("biufcUS"):
        return False
    count = int(kind.lstrip("<>|=")[1:]) * (4 if "U" in kind else 1)  # UCS-4
    for side in shape:
        if not isinstance(side, int) or side < 0:
            return False
        count *= side
    return bool(count == size - 8 - width - length)


def read_gzip(path: Path, *, inside: Path | None = None) -> bytes:
    """Unpack a gzip file; one that is damaged or unpacks to too much raises a CovcliError."""
    complaint = "cannot be read as gzip: cut short, or a bomb"
    with reading(path, complaint), open_regular(path, inside=inside) as file:
        limit = allowance(os.fstat(file.fileno()).st_size)
        with gzip.GzipFile(fileobj=file) as unpacker:
            content: bytes = unpacker.read(limit + 1)
    if not 0 < len(content) <= limit:
        raise CovcliError(complaint, where=path)
    return content


def read_text(path: Path, *, inside: Path | None = None) -> bytes:
    """Return the bytes of a document of at most 256 MB; otherwise raise a CovcliError."""
    with reading(path, "cannot be read"), open_regular(path, inside=inside) as file:
        content: bytes = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise CovcliError(f"is larger than {LARGEST_JSON >> 20} MB", where=path)
    return content


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file; raise a ValueError for a malformed header."""
    if len(content) < 8:
        raise ValueError("no header")
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(metadata, dict):
        raise ValueError("no metadata")
    return metadata


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number is beyond all floats")
    return value


def _whole(digits: str) -> int:
    _finite(digits)
    return int(digits)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise a ValueError for a repeated key, NaN, or a number beyond all floats."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) < len(pairs):
            raise ValueError("a key occurs twice")
        return document

    try:
        return json.loads(
            text, object_pairs_hook=unique, parse_constant=refuse, parse_float=_finite,
            parse_int=_whole,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("nested too deeply") from None
