"""Run folders, `runs/<name>/`: one process at a time, and `runs/latest` links to the newest."""

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
from covcli.core.signals import unfinished

log = logging.getLogger(__name__)


def new_run(runs: Path, name: str | None, stem: str) -> Path:
    """Return the path of a new run folder, `runs/<name>` or `runs/<stem>-<timestamp>`.

    `locked` creates the folder and checks again, so that two runs cannot take the same name.

    Raises
    ------
    CovcliError
        If the name is not valid, the folder holds a run already, or `runs/latest` is no link.
    """
    if name and (name in (".", "..", "latest") or Path(name).name != name):
        raise CovcliError("is not a name for a run", where=f"--name {name!r}")
    check_latest(runs)
    folder = runs / (name or f"{stem}-{timestamp()}")
    _refuse_used(folder)
    return folder


def _refuse_used(folder: Path) -> None:
    """Raise a CovcliError unless a folder is missing or holds only hidden leftovers."""
    try:
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise CovcliError("this run exists", where=folder, fix="choose another --name")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CovcliError(f"cannot be created ({error.strerror})", where=folder) from None


@contextmanager
def locked(folder: Path, new: bool = False) -> Iterator[None]:
    """Lock a run folder during the block; remove the folder afterwards if it stayed empty.

    Parameters
    ----------
    folder
        The folder; it is created if it is missing.
    new
        Whether the folder must not hold a run yet.

    Raises
    ------
    CovcliError
        If it cannot be created, another process has locked it, or it holds a run and `new` is set.
    """
    with _held(folder / ".lock", "run", folder, new):
        if new:
            _refuse_used(folder)
        yield


@contextmanager
def writing(file: Path, force: bool) -> Iterator[None]:
    """Lock an output file during the block: a second command that writes it is refused.

    Parameters
    ----------
    file
        The file; its folder is created if it is missing.
    force
        Whether an existing file may be overwritten.

    Raises
    ------
    CovcliError
        If the file exists and `force` is False, another process has locked it, or its folder cannot
        be created.
    """
    check_replaceable(file)
    with _held(file.with_name(f".{file.name}.lock"), "file", file):
        refuse_existing(file, force)
        yield


@contextmanager
def _held(lock: Path, kind: str, what: Path, new: bool = False) -> Iterator[None]:
    """Hold a lock file during the block; afterwards remove created folders that stayed empty."""
    folder = lock.parent
    created = [f for f in (folder, *folder.parents) if not exists(f)] or [folder] * new
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CovcliError(f"cannot be created ({error.strerror})", where=folder) from None
    with _lock(lock, kind, what):
        try:
            with unfinished(lock):
                yield
        finally:
            with contextlib.suppress(OSError):  # one is not empty
                for empty in created:
                    empty.rmdir()


def _lock(path: Path, kind: str, what: Path) -> IO[bytes]:
    """Return the locked file at a path; raise a CovcliError if another process has locked it."""
    while True:
        file = open_own(path)
        if not try_lock(file):
            file.close()
            raise CovcliError(f"another process is writing this {kind}", where=what)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), os.fstat(file.fileno())):
                return file
        file.close()  # its last holder has removed it: lock the new file


def check_latest(runs: Path) -> None:
    """Raise a CovcliError if `runs/latest` exists and is not a link."""
    link = runs / "latest"
    if exists(link) and not link.is_symlink():
        raise CovcliError(
            "is in the way of the link to the newest run", where=link, fix="rename it"
        )


def mark_latest(folder: Path) -> None:
    """Let `runs/latest` link to a run folder, atomically; warn if that is not possible."""
    temporary = folder.parent / f".latest.{os.getpid()}"
    try:
        check_latest(folder.parent)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        temporary.replace(folder.parent / "latest")
    except (CovcliError, OSError) as error:  # the run itself is complete
        log.warning("runs/latest does not point at %s: %s", folder.name, error)


def last_interrupted(runs: Path, paused: str) -> Path:
    """Return the most recently saved run that can be resumed; raise a CovcliError if none.

    Parameters
    ----------
    runs
        The folder of run folders.
    paused
        The name of the file that marks an interrupted run.
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
    """Return the folder that `runs/latest` links to; raise a CovcliError if there is none.

    Examples
    --------
    >>> from pathlib import Path
    >>> newest_run(Path("runs"))
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
    """Return a path with links followed; relative if it is below the current folder."""
    target = real(path)
    here = Path.cwd()
    return target.relative_to(here) if target.is_relative_to(here) else target


def timestamp() -> str:
    """Return the local time for file names, to the microsecond."""
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")
