"""Listing of folders: which subfolders are splits or classes, and which files are images.

No file is opened, so a folder of a million images is listed in seconds.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from covcli.core.errors import CovcliError, first_few

Split: TypeAlias = Literal["train", "test"]
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tif", ".tiff",
)  # fmt: skip
# Entries that operating systems, file servers, editors and archivers create, in any case; hidden
# ones are also ignored.
LEFT_BY_OTHERS = frozenset({
    "__macosx", "__pycache__", "lost+found", "system volume information", "$recycle.bin",
    "recycler", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",
    "network trash folder", "temporary items", "_vti_cnf", "_gsdata_", "thumbs.db", "ehthumbs.db",
    "desktop.ini", "picasa.ini", "icon\r",
})  # fmt: skip
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
    "valid": "val", "validation": "val", "dev": "val", "eval": "val",
}  # fmt: skip
# Names of splits with more to them, as in `training_set`, `seg_train` or `val-images`.
LONGER = re.compile(
    r"(?:^|[^a-z])(train|training|test|testing|val|valid|validation|dev|eval)"
    r"(?:set|data|images?)?(?:[^a-z]|$)"
)
# The parts that can serve as a split, in order of preference.
SERVING: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


@dataclass
class Listing:
    """The image files of a folder, and their classes.

    Attributes
    ----------
    root
        The folder.
    files
        The files' paths relative to the folder, sorted by path components.
    counts
        The number of files of each class; the files are in the order of the classes. Empty without
        classes.
    classes
        The class names, sorted by code points; empty if there are no subfolders.
    notes
        What was ignored and why, one sentence each.
    """

    root: Path
    files: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def printable(name: str) -> str:
    r"""Return a name with bytes that are not UTF-8 escaped, as in `caf\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def class_name(name: str) -> str:
    """Return the name of a class: printable, and with composed letters (Unicode's form NFC).

    macOS stores an é as two characters, and other systems as one. They look the same.
    """
    return unicodedata.normalize("NFC", printable(name))


def is_left_by_others(name: str) -> bool:
    """Return whether an entry is hidden, or created by a system or an editor."""
    return name.startswith((".", "~$")) or name.lower() in LEFT_BY_OTHERS


def list_classes(root: Path) -> Listing:
    """List a folder in which every subfolder is a class; without subfolders, list its files.

    Symbolic links to files and folders are followed. A link to a folder above itself is ignored.

    Raises
    ------
    CovcliError
        If a folder cannot be read.

    Examples
    --------
    >>> for name in ("cat", "dog"):
    ...     Path("photos", name).mkdir(parents=True)
    ...     Path("photos", name, "1.jpg").touch()
    >>> listing = list_classes(Path("photos"))
    >>> listing.classes, listing.files, listing.counts
    (('cat', 'dog'), ['cat/1.jpg', 'dog/1.jpg'], [1, 1])
    """
    listing = Listing(root)
    names = sorted(_subfolders(root))
    walk = _Walk(str(root), listing.notes)
    if not names:
        listing.files = walk.files("")
        listing.notes += walk.ignored()
        return listing
    outside = sum(1 for entry in _entries(str(root)) if _is_image(entry))
    if outside:
        listing.notes.append(f"{root}: {outside} images beside the class folders are ignored")
    for name in names:
        files = walk.files(name)
        listing.files += files
        listing.counts.append(len(files))
    listing.classes = tuple(map(class_name, names))
    _check_distinct(listing)
    listing.notes += walk.ignored()
    if len(names) == 1 and len(below := sorted(_subfolders(root / names[0]))) > 1:
        listing.notes.append(
            f"{root}: {_listed(names)} is the only class; if its subfolders ({_few(below)}) are "
            f"the classes, name folder:{root / names[0]}"
        )
    return listing


def _check_distinct(listing: Listing) -> None:
    """Raise a CovcliError for class folders with the same name in different forms of Unicode."""
    for name, count in Counter(listing.classes).items():
        if count > 1:
            raise CovcliError(
                f"{count} class folders are named {name!r}, in different forms of Unicode",
                where=listing.root,
                fix="put their images in one folder",
            )


def walk(root: Path, notes: list[str]) -> Iterator[str]:
    """Yield every image below a folder, whatever its subfolders mean, sorted by path components.

    Files are images, and folders are followed, as in `list_classes`. One folder's names are in
    memory at a time.

    Parameters
    ----------
    root
        The folder; what is yielded begins below it.
    notes
        Takes a sentence on what was ignored and why.

    Raises
    ------
    CovcliError
        If a folder cannot be read.
    """
    walked = _Walk(str(root), notes)
    yield from walked.names("")
    notes += walked.ignored()


def holds_image(path: Path) -> bool:
    """Return whether a folder or a folder below it holds an image; stops at the first."""
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


def split_folder(root: Path, split: Split) -> tuple[Path, list[str]]:
    """Return the folder that holds a split, and remarks about the choice.

    If all subfolders are named after splits, they are splits. Beside other subfolders, such names
    are splits if they name two different splits. A single such name is a class if its folder holds
    images directly, as the other folders do. Longer names, as `training_set` and `test_set`, are
    splits if two of them are there and their folders hold the same class folders.

    Parameters
    ----------
    root
        The folder.
    split
        "train" or "test".

    Returns
    -------
    tuple
        The folder of the split (`root` itself if there are no splits), and the remarks.

    Raises
    ------
    CovcliError
        If the split is missing, two folders match it, or it cannot be distinguished from a class.
    """
    names = sorted(_subfolders(root))
    parts = {name: SPLITS[name.casefold()] for name in names if name.casefold() in SPLITS}
    notes = []
    if len(set(parts.values())) < 2 and (longer := _longer_names(root, names)):
        parts = longer
        notes.append(f"{root}: {_listed(list(parts))} are read as splits, not as classes")
    others = [name for name in names if name not in parts and holds_image(root / name)]
    if not parts:
        return root, []
    if others and len(set(parts.values())) == 1:
        if not any(holds_image(root / name / below)
                   for name in parts for below in _subfolders(root / name)):  # fmt: skip
            return root, []
        raise CovcliError(
            f"{_listed(list(parts))} may be a split or a class beside {_listed(others)}",
            where=root,
            fix=f"name {root / next(iter(parts))} itself, or rename it",
        )
    if others:
        notes.append(f"{root}: {_listed(others)}: not a split, ignored")
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


def _longer_names(root: Path, names: list[str]) -> dict[str, str]:
    """Return the splits among folders with longer names; empty unless they are clearly splits."""
    found = {name: match[1] for name in names if (match := LONGER.search(name.casefold()))}
    parts = {name: SPLITS[word] for name, word in found.items()}
    below = [set(_subfolders(root / name)) for name in parts]
    classes = [folders for folders in below if folders]
    if len(set(parts.values())) < 2 or not classes or not set.intersection(*classes):
        return {}
    return parts


class _Walk:
    """Walks through the folders below a root; follows links, but not in a cycle."""

    def __init__(self, root: str, notes: list[str]) -> None:
        self._root = root
        self._notes = notes
        self._others: Counter[str] = Counter()

    def ignored(self) -> list[str]:
        """Return a note on the files without an image's file name extension, if there are any."""
        if not self._others:
            return []
        kinds = [f"{count} {suffix or 'without extension'}"
                 for suffix, count in self._others.most_common(5)]  # fmt: skip
        return [f"{self._root}: ignored files without an image's extension: {', '.join(kinds)}"]

    def files(self, below: str) -> list[str]:
        """Return the image files below a subfolder ("" for the root), sorted by path components."""
        return list(self.names(below))

    def names(self, below: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
        """Yield what `files` returns, and hold one folder's names at a time.

        `above` are the folders that lead there, by device and number.
        """
        path = os.path.join(self._root, below)  # noqa: PTH118 - a million Paths take seconds
        status = os.stat(path)  # noqa: PTH116
        mine = (status.st_dev, status.st_ino)
        if mine in above:
            self._notes.append(f"{path}: a link to a folder above itself is ignored")
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
            for name in files:
                yield prefix + name
            return
        for name in sorted([*files, *folders]):
            if name in folders:
                yield from self.names(prefix + name, (*above, mine))
            else:
                yield prefix + name


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


def _few(names: list[str]) -> str:
    return first_few(list(map(printable, names)), 3)


def _listed(names: list[str]) -> str:
    return ", ".join(map(printable, names))
