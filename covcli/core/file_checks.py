"""Looks at files from strangers, before anything reads them, for claims that do not hold."""

import ast
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

from covcli.core.errors import CovcliError

# A small file may unpack to this much; a larger one to so many times its own size.
ALWAYS_ALLOWED = 64 << 20
MOST_TIMES_LARGER = 50
LONGEST_HEADER = 1 << 16


def allowance(size: int) -> int:
    """Return how many bytes a file of so many bytes may unpack to."""
    return max(ALWAYS_ALLOWED, MOST_TIMES_LARGER * size)


def check_torch_archive(path: Path) -> None:
    """Raise a CovcliError unless a file is a ZIP archive as torch.save writes it.

    Every entry is stored as it is, none stands twice, and none claims more than the file holds.
    """
    size = path.stat().st_size
    entries = _entries(path, "is not a PyTorch checkpoint")
    names = [entry.filename for entry in entries]
    stored = all(
        e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries
    )
    if not stored or len(set(names)) < len(names) or sum(e.file_size for e in entries) > size:
        raise CovcliError("is not a PyTorch checkpoint: its archive is not sound", where=path)


def check_npz(path: Path) -> None:
    """Raise a CovcliError unless each array of a NumPy archive is as large as its header claims.

    The arrays together may unpack to 64 MB, or to 50 times the file's size.
    """
    entries = _entries(path, "cannot be read as a NumPy archive")
    limit = allowance(path.stat().st_size)
    names = [entry.filename for entry in entries]
    if sum(e.file_size for e in entries) > limit:
        raise CovcliError(
            f"unpacks to more than {limit >> 20} MB", where=path, fix="store it plain"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            sound = len(set(names)) == len(names) and all(
                _header_holds(archive.open(entry), entry.file_size) for entry in entries
            )
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError):
        sound = False
    if not sound:
        raise CovcliError("cannot be read as a NumPy archive: it is not sound", where=path)


def _entries(path: Path, complaint: str) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except FileNotFoundError:
        raise CovcliError("no such file", where=path) from None
    except OSError as error:
        raise CovcliError(f"cannot be read ({error.strerror})", where=path) from None
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, EOFError):
        raise CovcliError(complaint, where=path) from None


def _header_holds(file: IO[bytes], size: int) -> bool:
    """Return whether an array's header names a plain type, and the bytes that follow it."""
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
    if not isinstance(kind, str) or kind.lstrip("<>|=")[:1] not in tuple("biufcU"):
        return False
    count = int(kind.lstrip("<>|=")[1:]) * (4 if "U" in kind else 1)  # UCS-4
    for side in shape:
        if not isinstance(side, int) or side < 0:
            return False
        count *= side
    return bool(count == size - 8 - width - length)


def read_gzip(path: Path) -> bytes:
    """Unpack a gzip file, at most 64 MB or 50 times its size; else it is a CovcliError."""
    packed = path.read_bytes()
    unpacker = zlib.decompressobj(wbits=31)
    limit = allowance(len(packed))
    try:
        content = unpacker.decompress(packed, limit)
    except zlib.error as error:
        raise CovcliError(f"cannot be unpacked ({error})", where=path) from None
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise CovcliError("cannot be unpacked: cut short, or a bomb", where=path)
    return content


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; a key that stands twice, or a number that is none, is a ValueError."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a key stands twice")
        return made

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
