"""Folders of image files: which are splits, which are classes, and which files are images.

Nothing is opened: a folder of a million images is listed in seconds.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from covcli.core.errors import CovcliError

Split: TypeAlias = Literal["train", "test"]
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tif", ".tiff",
)  # fmt: skip
# What operating systems, file servers and archivers leave among images; hidden entries besides.
LEFT_BY_OTHERS = frozenset({
    "__MACOSX", "__pycache__", "lost+found", "System Volume Information", "$RECYCLE.BIN",
    "@eaDir", "@Recycle", "#recycle", "#snapshot",
})  # fmt: skip
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
    "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip
# Which part serves a split, from the first choice on.
SERVING: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


@dataclass
class Listing:
    """The image files of a folder, and their classes.

    Attributes
    ----------
    root
        The folder.
    files
        The files' paths below it, in the order of their parts.
    counts
        How many of the files, one class after another, belong to each class; empty without.
    classes
        The class names, in the order of their code points; empty where there are no subfolders.
    notes
        What was passed over and why, a sentence each.
    """

    root: Path
    files: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def printable(name: str) -> str:
    r"""Return a name with the bytes that are no UTF-8 spelled out, as in `caf\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_left_by_others(name: str) -> bool:
    """Return whether an entry is hidden, or one that systems and editors leave among images."""
    return name.startswith((".", "~$")) or name in LEFT_BY_OTHERS


def list_classes(root: Path) -> Listing:
    """List a folder of which every subfolder is a class; without subfolders, its files alone.

    Symbolic links are followed, to files and to folders; one that leads to a folder above itself
    is passed over.

    Raises
    ------
    CovcliError
        If a folder cannot be read.
    """
    found = Listing(root)
    names = sorted(_subfolders(root))
    loose = _Walk(str(root), found.notes)
    if not names:
        found.files = loose.files("")
        found.notes += loose.passed_over()
        return found
    outside = sum(1 for entry in _entries(str(root)) if _is_image(entry))
    if outside:
        found.notes.append(f"{root}: {outside} images lie beside the class folders: passed over")
    for name in names:
        files = loose.files(name)
        found.files += files
        found.counts.append(len(files))
    found.classes = tuple(map(printable, names))
    found.notes += loose.passed_over()
    return found


def split_folder(root: Path, split: Split) -> tuple[Path, list[str]]:
    """Return the folder that holds a split, and what must be said about the choice.

    A folder whose subfolders are only named after splits is never one of classes. Where such
    names stand beside others, it is one of splits if they name two different ones; where they
    name a single one, the name is a class if its folder holds images as the others do.

    Raises
    ------
    CovcliError
        If the split is not there, two folders claim it, or it cannot be told from a class.
    """
    names = sorted(_subfolders(root))
    parts = {name: SPLITS[name.casefold()] for name in names if name.casefold() in SPLITS}
    others = [name for name in names if name not in parts and _holds_image(root / name)]
    if not parts:
        return root, []
    if others and len(set(parts.values())) == 1:
        if not any(_holds_image(root / name / below)
                   for name in parts for below in _subfolders(root / name)):  # fmt: skip
            return root, []
        raise CovcliError(
            f"{_listed(list(parts))} may be a split or a class beside {_listed(others)}",
            where=root,
            fix=f"name {root / next(iter(parts))} itself, or rename it",
        )
    notes = []
    if others:
        notes.append(f"{root}: {_listed(others)}: no split, passed over")
    for part in SERVING[split]:
        serving = [name for name in parts if parts[name] == part]
        if len(serving) > 1:
            raise CovcliError(
                f"{_listed(serving)} are both for {part}", where=root, fix="name one of them itself"
            )
        if serving:
            if part != split:
                notes.append(f"{root}: no {split} folder: {serving[0]} serves as the {split} split")
            return root / serving[0], notes
    raise CovcliError(
        f"holds {_listed(list(parts))} but no {' or '.join(SERVING[split])} folder",
        where=root,
        fix=f"name a folder itself, as {root / next(iter(parts))}",
    )


class _Walk:
    """Goes through the folders below a root, along links, and round in no circle."""

    def __init__(self, root: str, notes: list[str]) -> None:
        self._root = root
        self._notes = notes
        self._others: Counter[str] = Counter()

    def passed_over(self) -> list[str]:
        """Return a note on the files whose names do not end like an image's, if there are any."""
        if not self._others:
            return []
        kinds = [f"{count} {ending or 'without ending'}"
                 for ending, count in self._others.most_common(5)]  # fmt: skip
        return [f"{self._root}: passed over what is no image by its name: {', '.join(kinds)}"]

    def files(self, below: str) -> list[str]:
        """Return the image files below a subfolder ("" for the root), in the order of parts."""
        found: list[str] = []
        self._go(below, (), found)
        return found

    def _go(self, below: str, above: tuple[tuple[int, int], ...], found: list[str]) -> None:
        path = os.path.join(self._root, below)  # noqa: PTH118 - a million Paths take seconds
        status = os.stat(path)  # noqa: PTH116
        mine = (status.st_dev, status.st_ino)
        if mine in above:
            self._notes.append(f"{path}: a link to a folder above itself: passed over")
            return
        prefix = f"{below}/" if below else ""
        files, folders = [], set()
        for entry in _entries(path):
            if entry.is_dir():
                folders.add(entry.name)
            elif entry.name.lower().endswith(SUFFIXES):
                files.append(entry.name)
            else:
                self._others[os.path.splitext(entry.name)[1].lower()] += 1  # noqa: PTH122
        if not folders:
            files.sort()
            found += [prefix + name for name in files]
            return
        for name in sorted([*files, *folders]):
            if name in folders:
                self._go(prefix + name, (*above, mine), found)
            else:
                found.append(prefix + name)


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not is_left_by_others(entry.name):
                    yield entry
    except OSError as error:
        raise CovcliError(f"cannot be listed ({error.strerror})", where=path) from None


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and not entry.is_dir()


def _subfolders(path: Path) -> list[str]:
    return [entry.name for entry in _entries(str(path)) if entry.is_dir()]


def _holds_image(path: Path) -> bool:
    """Return whether an image lies anywhere in a folder; it looks no further than the first."""
    waiting, seen = [str(path)], set()
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(folder):
            if entry.is_dir():
                waiting.append(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                return True
    return False


def _listed(names: list[str]) -> str:
    return ", ".join(map(printable, names))
