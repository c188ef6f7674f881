"""Run folders: `runs/<name>/`, one process at a time, and `runs/latest` at the newest."""

import contextlib
import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from covcli.core.errors import CovcliError
from covcli.core.files import refuse_existing, try_lock
from covcli.core.opening import check_replaceable, exists, is_folder, open_own, open_regular, real

log = logging.getLogger(__name__)


def new_run(runs: Path, name: str | None, stem: str) -> Path:
    """Name a run folder that is to be made, `runs/<name>` or `runs/<stem>-<timestamp>`.

    It is made by `locked`, which looks again, so that of two runs under one name one is refused.

    Raises
    ------
    CovcliError
        If the name is none, the folder holds a run already, or `runs/latest` is no link.
    """
    if name and (name in (".", "..", "latest") or Path(name).name != name):
        raise CovcliError("is not a name for a run", where=f"--name {name!r}")
    check_latest(runs)
    folder = runs / (name or f"{stem}-{timestamp()}")
    _refuse_used(folder)
    return folder


def _refuse_used(folder: Path) -> None:
    """Raise a CovcliError unless a folder is missing, or holds no more than a killed run left."""
    try:
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise CovcliError("this run exists", where=folder, fix="choose another --name")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CovcliError(f"cannot be made ({error.strerror})", where=folder) from None


@contextmanager
def locked(folder: Path, new: bool = False) -> Iterator[None]:
    """Hold a run folder during the block, and remove it after if nothing was written into it.

    Parameters
    ----------
    folder
        The folder; it is made where it is missing.
    new
        Whether no run may be in it.

    Raises
    ------
    CovcliError
        If it cannot be made, another process holds it, or it holds a run where none may be.
    """
    with _held(folder / ".lock", "run", folder, new):
        if new:
            _refuse_used(folder)
        yield


@contextmanager
def writing(file: Path, force: bool) -> Iterator[None]:
    """Hold a file during the block that makes it: of two commands that make it one is refused.

    Parameters
    ----------
    file
        The file; its folder is made where it is missing.
    force
        Whether the file may be there already.

    Raises
    ------
    CovcliError
        If the file is there and may not, another process holds it, or its folder cannot be made.
    """
    check_replaceable(file)
    with _held(file.with_name(f".{file.name}.lock"), "file", file):
        refuse_existing(file, force)
        yield


@contextmanager
def _held(lock: Path, kind: str, what: Path, new: bool = False) -> Iterator[None]:
    """Hold a lock file during the block; folders that nothing came into go again."""
    folder = lock.parent
    passing = [f for f in (folder, *folder.parents) if not exists(f)] or [folder] * new
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CovcliError(f"cannot be made ({error.strerror})", where=folder) from None
    with _lock(lock, kind, what):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # one holds something
                for empty in passing:
                    empty.rmdir()


def _lock(path: Path, kind: str, what: Path) -> IO[bytes]:
    """Return the locked file at a path; one that another process has locked is a CovcliError."""
    while True:
        file = open_own(path)
        if not try_lock(file):
            file.close()
            raise CovcliError(f"another process is writing this {kind}", where=what)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), os.fstat(file.fileno())):
                return file
        file.close()  # its last holder has removed it: take the next one


def check_latest(runs: Path) -> None:
    """Raise a CovcliError if something stands where the link to the newest run is to be."""
    link = runs / "latest"
    if exists(link) and not link.is_symlink():
        raise CovcliError(
            "is in the way of the link to the newest run", where=link, fix="rename it"
        )


def mark_latest(folder: Path) -> None:
    """Point `runs/latest` at a run folder, atomically; warn where that cannot be done."""
    temporary = folder.parent / f".latest.{os.getpid()}"
    try:
        check_latest(folder.parent)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        temporary.replace(folder.parent / "latest")
    except (CovcliError, OSError) as error:  # the run itself is whole
        log.warning("runs/latest does not point at %s: %s", folder.name, error)


def last_interrupted(runs: Path, paused: str) -> Path:
    """Return the run that was saved last of those that wait to go on; none is a CovcliError.

    Parameters
    ----------
    runs
        The folder of run folders.
    paused
        The name of the file that a run waits with.
    """
    waiting = sorted(runs.glob(f"*/{glob.escape(paused)}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(waiting):
        if not path.parent.is_symlink() and not _is_held(path.parent / ".lock"):
            return path.parent
    raise CovcliError("holds no run to resume", where=runs)


def _is_held(lock: Path) -> bool:
    """Return whether another process holds a lock file."""
    try:
        with open_regular(lock) as file:
            return not try_lock(file)
    except (OSError, CovcliError):
        return False


def newest_run(runs: Path) -> Path:
    """Return the folder that `runs/latest` points at; without one it is a CovcliError.

    Examples
    --------
    >>> from pathlib import Path
    >>> newest_run(Path("runs"))  # where runs/latest leads
    PosixPath('runs/demo')
    """
    folder = runs / "latest"
    if not is_folder(folder):
        raise CovcliError(
            "no run yet", where=runs, fix="run `covcli train`, or name a --checkpoint"
        )
    if real(folder).parent != real(runs):
        raise CovcliError("is a link that leaves its folder", where=folder, fix="remove it")
    return short(folder)


def short(path: Path) -> Path:
    """Return where a path leads, links followed: relative if below the current folder."""
    target = real(path)
    here = Path.cwd()
    return target.relative_to(here) if target.is_relative_to(here) else target


def timestamp() -> str:
    """Return the local time as it stands in file names, to the microsecond."""
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")
