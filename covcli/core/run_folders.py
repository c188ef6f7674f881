"""Run folders: `runs/<name>/`, one process at a time, and `runs/latest` at the newest."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from covcli.core.errors import CovcliError
from covcli.core.files import try_lock


def new_run(runs: Path, name: str | None, stem: str) -> Path:
    """Make a run folder, `runs/<name>` or `runs/<stem>-<timestamp>`; it must not exist."""
    folder = runs / (name or f"{stem}-{timestamp()}")
    if name and (name in (".", "..", "latest") or Path(name).name != name):
        raise CovcliError("is not a name for a run", where=f"--name {name!r}")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise CovcliError("this run exists", where=folder, fix="choose another --name") from None
    except OSError as error:
        raise CovcliError(f"cannot be made ({error.strerror})", where=folder) from None
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder during the block; one that another process holds is a CovcliError."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    except OSError as error:
        raise CovcliError(f"cannot be written ({error.strerror})", where=folder) from None
    with file:
        if not try_lock(file):
            raise CovcliError("another process is writing this run", where=folder)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def mark_latest(folder: Path) -> None:
    """Point `runs/latest` at a run folder, atomically."""
    link = folder.parent / "latest"
    if link.exists() and not link.is_symlink():
        raise CovcliError("is in the way of the link to the newest run", where=link)
    temporary = folder.parent / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    temporary.replace(link)


def newest_run(runs: Path) -> Path:
    """Return the folder that `runs/latest` points at; without one it is a CovcliError."""
    folder = runs / "latest"
    if not folder.is_dir():
        raise CovcliError(
            "no run yet", where=runs, fix="run `covcli train`, or name a --checkpoint"
        )
    return short(folder)


def short(path: Path) -> Path:
    """Return where a path leads, links followed: relative if below the current folder."""
    target = path.resolve()
    here = Path.cwd()
    return target.relative_to(here) if target.is_relative_to(here) else target


def timestamp() -> str:
    """Return the local time as it stands in file names, to the microsecond."""
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")
