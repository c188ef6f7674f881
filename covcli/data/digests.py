"""Digests of files, kept in the user's cache so that an unchanged file is read only once."""

import contextlib
import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from covcli.core import file_checks, files
from covcli.core.errors import CovcliError
from covcli.core.opening import open_regular

log = logging.getLogger(__name__)
SIZE = hashlib.sha256().digest_size
EMPTY = hashlib.sha256().digest()
# The digest of a file that cannot be read; decoding it reports the reason.
UNREADABLE = hashlib.sha256(b"cannot be read").digest()
UNKNOWN = (-1, 0, 0, 0)  # the stamp of anything but a regular file
AT_ONCE = 256  # files that a thread takes from the queue at once
# A file modified less than one tick of the file system's clock before it was read may change again
# without a new time stamp. In nanoseconds; two seconds for clocks that show whole seconds.
TICK = 50_000_000
COARSE_TICK = 2_000_000_000
ANNOUNCED_FROM = 20_000  # reading this many files is announced in the log
Digests = NDArray[np.uint8]  # (N, SIZE)
Stamps = NDArray[np.int64]  # (N, 4): size, modification and change in nanoseconds, inode


def user_cache() -> Path | None:
    """Return covcli's folder in the user's cache; None if the user has no home."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "covcli"
    try:
        return Path.home() / ".cache" / "covcli"
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Files:
    """A list of files with cached digests.

    Attributes
    ----------
    folder
        The folder that the names are relative to.
    names
        The files.
    key
        Distinguishes lists of the same folder; a list replaces the cache of another list with the
        same key.
    pool
        The threads that read.
    """

    folder: Path
    names: Sequence[str]
    key: str
    pool: Executor


def content_digests(listed: Files) -> Digests:
    """Return the SHA-256 of each file's content; unchanged files are not read again."""
    empty = np.frombuffer(EMPTY, np.uint8)
    return remembered(listed, "content", _read, empty)


def readable(listed: Files, decodes: Callable[[Path], object], what: str) -> NDArray[np.bool_]:
    """Return which files can be decoded; unchanged readable files are not decoded again.

    Parameters
    ----------
    listed
        The files.
    decodes
        Decodes a file, or raises a CovcliError.
    what
        Names the decoder and its settings; with other settings, files are decoded again.

    Returns
    -------
    ndarray
        bool of shape (N,).
    """

    def tried(paths: Sequence[str]) -> Digests:
        rows = np.zeros((len(paths), SIZE), np.uint8)
        for row, path in zip(rows, paths, strict=True):
            with contextlib.suppress(CovcliError):
                decodes(Path(path))
                row[:] = np.frombuffer(EMPTY, np.uint8)
        return rows

    can: NDArray[np.bool_] = np.asarray(remembered(listed, what, tried).any(1))
    return can


def remembered(
    listed: Files,
    what: str,
    read: Callable[[Sequence[str]], Digests],
    of_empty: Digests | None = None,
) -> Digests:
    """Return a function's result for each file, from the cache for unchanged files.

    A file counts as unchanged if its path, size, times of modification and change, and inode are
    the same as when it was read.

    Parameters
    ----------
    listed
        The files.
    what
        Names the function.
    read
        Takes paths and returns a row for each; a row of zeros is not cached.
    of_empty
        The result for an empty file, if it is known without reading.

    Returns
    -------
    ndarray
        uint8 of shape (N, 32).
    """
    names = listed.names
    paths = [os.path.join(listed.folder, name) for name in names]  # noqa: PTH118 - of a million files
    stamps = _stamps(paths)
    blob = b"\0".join(map(os.fsencode, names))
    cache = _Cache.at(os.fsencode(os.path.realpath(listed.folder)), f"{what} {listed.key}")
    digests = cache.known(blob, names, stamps)
    if of_empty is not None:
        digests[stamps[:, 0] == 0] = of_empty
    missing = np.flatnonzero(~digests.any(1)).tolist()
    if not missing:
        return digests
    if len(missing) >= ANNOUNCED_FROM:
        log.info("%s: reading %d files once; digests are cached", listed.folder, len(missing))
    parts = [missing[i : i + AT_ONCE] for i in range(0, len(missing), AT_ONCE)]
    began = time.time_ns()
    for part, rows in zip(
        parts, listed.pool.map(lambda part: read([paths[i] for i in part]), parts), strict=True
    ):
        digests[part] = rows
    again = _stamps([paths[i] for i in missing])
    changed = (again != stamps[missing]).any(1) | _fresh(again, began)
    keep = np.ones(len(names), bool)
    keep[np.array(missing)[changed]] = False
    cache.store(blob, stamps, np.where(keep[:, None], digests, 0).astype(np.uint8))
    return digests


def _stamps(paths: Iterable[str]) -> Stamps:
    rows = []
    for path in paths:
        try:
            s = os.stat(path)  # noqa: PTH116
        except OSError:
            rows.append(UNKNOWN)
            continue
        stamp = (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino & (2**63 - 1))
        rows.append(stamp if stat.S_ISREG(s.st_mode) else UNKNOWN)
    return np.array(rows, np.int64).reshape(-1, 4)


def _fresh(stamps: Stamps, now: int) -> NDArray[np.bool_]:
    times = stamps[:, 1:3].max(1)
    tick = np.where(times % 1_000_000_000 == 0, COARSE_TICK, TICK)
    fresh: NDArray[np.bool_] = times > now - tick
    return fresh


def _read(paths: Iterable[str]) -> Digests:
    digests = []
    for path in paths:
        try:
            with open_regular(Path(path)) as file:
                digests.append(hashlib.file_digest(file, hashlib.sha256).digest())
        except (OSError, CovcliError):
            digests.append(UNREADABLE)
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, SIZE)


@dataclass(frozen=True)
class _Cache:
    """The cached stamps and digests of one list of files; `path` is None without a cache."""

    path: Path | None

    @classmethod
    def at(cls, folder: bytes, key: str) -> "_Cache":
        root = user_cache()
        name = hashlib.sha256(folder + b"\0" + key.encode("utf-8", "surrogateescape")).hexdigest()
        return cls(root and root / "digests" / f"{name[:32]}.npz")

    def known(self, blob: bytes, names: Sequence[str], stamps: Stamps) -> Digests:
        """Return the digests of unchanged files; rows of zeros for others."""
        digests = np.zeros((len(names), SIZE), np.uint8)
        held = self._load()
        if held is None:
            return digests
        old_blob, old_stamps, old_digests = held
        if old_blob == blob:
            rows = np.arange(len(names))
        else:
            places = {name: i for i, name in enumerate(old_blob.split(b"\0"))}
            rows = np.array([places.get(os.fsencode(name), -1) for name in names], np.int64)
        same = (rows >= 0) & (old_stamps[rows] == stamps).all(1) & (stamps[:, 0] >= 0)
        digests[same] = old_digests[rows[same]]
        return digests

    def _load(self) -> tuple[bytes, Stamps, Digests] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            held = file_checks.read_npz(self.path)
            names, stamps, digests = held["names"], held["stamps"], held["digests"]
        except (CovcliError, KeyError):
            return None  # unusable: the files are read again
        blob = names.tobytes()
        count = blob.count(b"\0") + 1
        fits = [str(a.dtype) for a in (names, stamps, digests)] == ["uint8", "int64", "uint8"]
        if not fits or stamps.shape != (count, 4) or digests.shape != (count, SIZE):
            return None
        return blob, stamps, digests

    def store(self, blob: bytes, stamps: Stamps, digests: Digests) -> None:
        """Write the list; if the cache cannot be written, the files are read again next time."""
        if self.path is None:
            return
        names = np.frombuffer(blob, np.uint8)
        with contextlib.suppress(CovcliError, OSError), files.atomic(self.path) as file:
            np.savez(file, names=names, stamps=stamps, digests=digests)
