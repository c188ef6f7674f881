"""Tables of image files: CSV with the columns `path` and, if known, `label`."""

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from covcli.core.contents import LOOKED_AT, recognised
from covcli.core.errors import CovcliError, first_few
from covcli.core.opening import misread, open_regular
from covcli.data.listing import class_name

COMPLAINT = "cannot be read as a table"
SEPARATORS = (",", ";", "\t")
UTF16 = (b"\xff\xfe", b"\xfe\xff")
NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]{0,8}))(?:\.0*)?")  # 007 is a name
NAMED = 5


@dataclass(frozen=True)
class FileTable:
    """The rows of a table.

    Attributes
    ----------
    paths
        The images' paths, as they are written.
    labels
        A label for each, class names or numbers as text; None without such a column.
    notes
        What the reader should know, one sentence each.
    """

    paths: list[str]
    labels: list[str] | None
    notes: list[str]

    def numbers(self) -> list[int] | None:
        """Return the labels as numbers; None if one is a name.

        Whole numbers with a decimal point count, because programs write them so beside gaps.

        Examples
        --------
        >>> FileTable(["a", "b"], ["3", "1.0"], []).numbers()
        [3, 1]
        """
        found = [NUMBER.fullmatch(label) for label in self.labels or ()]
        if self.labels is None or None in found:
            return None
        return [int(match[1]) for match in found if match]


def read_table(file: Path) -> FileTable:
    r"""Read a table whose first line names its columns.

    Cells are separated by commas, semicolons or tabs. The text is UTF-8, or UTF-16 as Excel marks
    it.

    Raises
    ------
    CovcliError
        If the file cannot be read, has no column `path`, has a line without a path or a label, or
        gives one image two labels.

    Examples
    --------
    >>> _ = Path("list.csv").write_text("path;label\na.png;cat\nb.png;dog\n")
    >>> table = read_table(Path("list.csv"))
    >>> table.paths, table.labels
    (['a.png', 'b.png'], ['cat', 'dog'])
    """
    try:
        head, *rows = _rows(_text(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CovcliError(f"{COMPLAINT} ({error})", where=file) from None
    except ValueError:
        raise CovcliError("has no row", where=file, fix="write path,label") from None
    columns = [name.strip().casefold() for name in head[1]]
    if max(columns.count("path"), columns.count("label")) > 1:
        raise CovcliError("has a column twice", where=file, fix="write path,label")
    if "path" not in columns:
        raise CovcliError(
            f"has no column `path`; its first line names {first_few(columns, NAMED)}",
            where=file,
            fix="write path,label there",
        )
    if not rows:
        raise CovcliError("has no row", where=file, fix="write a line for each image")
    for line, row in rows:
        if any(cell.strip() for cell in row[len(columns) :]):
            raise CovcliError(
                f"line {line} has {len(row)} cells, and the first line {len(columns)}",
                where=file,
                fix="put cells that hold the separator in quotes",
            )
    paths = _column(file, rows, columns.index("path"), "path")
    labels, notes = None, []
    if "label" in columns:
        labels = _column(file, rows, columns.index("label"), "label")
        names = {label: class_name(label.strip()) for label in set(labels)}
        labels = [names[label] for label in labels]
        notes = _repeated(file, paths, labels)
    elif len(columns) > 1:
        others = first_few([name for name in columns if name != "path"], NAMED)
        notes = [f"{file}: no column `label`: the images have no labels (other columns: {others})"]
    return FileTable(_of_this_system(paths, file.parent), labels, notes)


def _text(file: Path) -> str:
    with open_regular(file) as opened:
        content = opened.read()
    if content and recognised(content[:LOOKED_AT]):
        raise misread(file, COMPLAINT)
    if content.startswith(UTF16):
        return content.decode("utf-16").lstrip("\ufeff")
    return content.decode("utf-8-sig", "surrogateescape")


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty, with the number of its line."""
    first = next(iter(text.splitlines()), "")
    separator = next((s for s in SEPARATORS if "path" in map(_plain, first.split(s))), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    for row in reader:
        if row:
            yield reader.line_num, row


def _plain(cell: str) -> str:
    return cell.strip(' "').casefold()


def _column(file: Path, rows: Sequence[tuple[int, list[str]]], place: int, name: str) -> list[str]:
    cells = []
    for line, row in rows:
        cell = row[place] if place < len(row) else ""
        if not cell.strip() or "\0" in cell or (name == "label" and cell.casefold() == "nan"):
            raise CovcliError(f"line {line} is incomplete: it has no {name}", where=file)
        cells.append(cell)
    return cells


def _repeated(file: Path, paths: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return a note on images that are listed again; with another label, raise a CovcliError."""
    known: dict[str, str] = {}
    for path, label in zip(paths, labels, strict=True):
        if known.setdefault(path, label) != label:
            raise CovcliError(
                f"{path} has the labels {known[path]!r} and {label!r}",
                where=file,
                fix="list each image once",
            )
    again = len(paths) - len(known)
    return [f"{file}: {again} lines name an image again"] if again else []


def _of_this_system(paths: list[str], folder: Path) -> list[str]:
    r"""Return paths that Windows wrote, as in `cats\1.png`, with the separator of this system."""
    foreign = next((path for path in paths if "\\" in path), None)
    if os.sep == "\\" or foreign is None or os.path.lexists(folder / foreign):
        return paths
    if not os.path.lexists(folder / foreign.replace("\\", "/")):
        return paths
    return [path.replace("\\", "/") for path in paths]
