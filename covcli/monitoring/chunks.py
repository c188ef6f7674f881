"""The images of a command: files, folders, data sets and lists, read in chunks on demand.

Only a few chunks are in memory at a time. The images of a chunk depend on the names only, so any
number of ranks computes the same bits.
"""

import contextlib
import os
import queue
import select
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast
from urllib.parse import unquote_to_bytes

import torch
from torch import Tensor

from covcli.core import distributed
from covcli.core.errors import CovcliError, one_line
from covcli.core.specs import suggestion
from covcli.data import datasets, listing, reading
from covcli.data.archives import ArchiveReader, ArchiveSource
from covcli.data.decoding import UnreadableError, decode
from covcli.data.image_files import FileSource, decoders
from covcli.data.images import ImageSet, adapt, compute_alone
from covcli.data.listing import printable
from covcli.data.preprocessing import Shape
from covcli.data.registry import say_once

T = TypeVar("T")
STDIN = "-"
BLOCK = 1 << 16  # bytes of a list that are read at once
LONGEST_NAME = 1 << 20  # bytes; no file system knows names of a hundredth of that
PATIENCE = 1.0  # seconds without a new name after which the names of a list are processed
ARCHIVES = ("npz", "csv")  # endings of files that hold many images, and the datasets of them
UTF8_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"  # starts a text file of some Windows programs
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
AHEAD = 1  # chunks that are read in advance while the network runs


@dataclass(frozen=True)
class Chunk:
    """Images that are run at once.

    Attributes
    ----------
    names
        Their names, in order.
    pixels
        The readable ones, uint8 of shape (n, C, H, W).
    reasons
        For each name, the reason why its image cannot be read, or None.
    """

    names: list[str]
    pixels: Tensor
    reasons: list[str | None]


Reader: TypeAlias = Callable[[], Chunk]
Image: TypeAlias = "Tensor | str"  # its pixels, or why it cannot be read
Listed: TypeAlias = Iterator[str | None]  # None where the writer of the list pauses
Part: TypeAlias = Path | ImageSet | Listed


class Named:
    """The named images; their names are resolved and validated, but no image is read yet.

    Parameters
    ----------
    names
        Image files, folders, specifications of data, or "-".
    data_dir
        The folder of downloaded data sets.

    Raises
    ------
    CovcliError
        If a name is unknown or ambiguous, a folder contains no image, or a data set is invalid.
    """

    def __init__(self, names: Sequence[str], data_dir: Path | None) -> None:
        if names.count(STDIN) > 1:
            raise CovcliError("is named twice", where=STDIN)
        self._parts = [_part(name, data_dir) for name in names]

    def chunks(self, size: int, shape: Shape) -> Iterator[Reader]:
        """Yield a function for each chunk of at most `size` images that reads it, in order.

        Call each before the next one is called, or not at all. Consecutive files, folders and
        lists are joined before they are divided into chunks. A list that pauses ends a chunk.
        """
        most = reading.current().max_pixels
        for is_set, parts in groupby(self._parts, lambda part: isinstance(part, ImageSet)):
            if is_set:
                for images in parts:
                    yield from _of_set(cast(ImageSet, images), size, shape)
                continue
            paths = chain.from_iterable(_paths(cast("Path | Listed", part)) for part in parts)
            for taken in _divided(paths, size):
                yield partial(_read_files, taken, shape, most)


def _divided(paths: Listed, size: int) -> Iterator[list[str]]:
    """Yield lists of at most `size` paths; a pause ends a list early."""
    taken: list[str] = []
    for path in paths:
        if path is not None:
            taken.append(path)
        if taken and (path is None or len(taken) == size):
            yield taken
            taken = []
    if taken:
        yield taken


def _part(name: str, data_dir: Path | None) -> Part:
    """Return a file or folder, a data set, or the names on standard input."""
    if name == STDIN:
        return _listed()
    dataset = name.partition("?")[0].partition(":")[0]
    path = _existing(name)
    if path is not None and dataset in datasets.DATASETS:
        raise CovcliError(
            "is a path here and a dataset", where=name, fix=f"for the path write ./{name}"
        )
    if path is None:
        if dataset not in datasets.DATASETS:
            known = suggestion(dataset, list(datasets.DATASETS))
            raise CovcliError("no such file or folder, nor a dataset", where=name, fix=known)
        return datasets.load(name, "test", data_dir, in_order=True)
    if path.is_dir() and not listing.holds_image(path):
        raise CovcliError(
            "holds no image", where=path, fix=f"known endings: {', '.join(listing.SUFFIXES)}"
        )
    return path


def _existing(name: str) -> Path | None:
    """Return the existing path of a name: as written, with `%E9` for a byte, or with `~`."""
    if not name:
        raise CovcliError("an empty name", where=repr(name))
    bytewise = os.fsdecode(unquote_to_bytes(name))
    meant = {Path(name), Path(bytewise), Path(os.path.expanduser(name))}  # noqa: PTH111
    there = [path for path in meant if os.path.lexists(path)]
    if len(there) > 1:
        raise CovcliError("stands for two files", where=name, fix="name it in a list: -")
    return there[0] if there else None


def _paths(part: Path | Listed) -> Listed:
    """Yield the files of a part: itself, those of a folder, or those of a list."""
    if not isinstance(part, Path):
        yield from part
    elif part.is_dir():
        notes: list[str] = []
        for below in listing.walk(part, notes):
            yield os.path.join(part, below)  # noqa: PTH118 - a million Paths take seconds
        for note in notes:
            say_once(note)
    else:
        yield str(part)


def _listed() -> Listed:
    """Return the names on standard input; with several ranks, the first reads the whole list."""
    if distributed.size() == 1:
        return read_list(0)
    names = [name for name in read_list(0) if name] if distributed.is_first() else []
    return iter(distributed.agree(names))


def read_list(descriptor: int) -> Listed:
    """Yield the names of a list, each as soon as it is complete, and None where its writer pauses.

    Names end with NUL if the first block of the list contains one, otherwise with a newline. Empty
    names are ignored. A name may contain any other bytes. A carriage return at the end of a line
    and a mark of UTF-8 before the first one are left out, unless such a file exists.

    Parameters
    ----------
    descriptor
        The file descriptor of the list.

    Raises
    ------
    CovcliError
        If it cannot be read, is in UTF-16, a list of lines contains NUL, or a name has no end.
    """
    ending, rest, first = b"", b"", True
    try:
        while True:
            if not first and _pauses(descriptor):
                yield None
            if not (block := os.read(descriptor, BLOCK)):
                break
            if first and block.startswith(UTF16_MARKS):
                raise CovcliError("is in UTF-16", where="the list on stdin", fix="write UTF-8")
            ending = ending or (b"\0" if b"\0" in block else b"\n" if b"\n" in block else b"")
            if ending == b"\n" and b"\0" in block:
                raise CovcliError(
                    "names end with newlines, and then with NUL", where="the list on stdin"
                )
            *whole, rest = (rest + block).split(ending) if ending else (rest + block,)
            yield from filter(None, (_name(line, ending) for line in whole))
            if len(rest) > LONGEST_NAME:
                raise CovcliError("a name is longer than a megabyte", where="the list on stdin")
            first = False
    except OSError as error:
        raise CovcliError(f"cannot be read ({error.strerror})", where="stdin") from None
    if rest:
        yield _name(rest, ending)


def _pauses(descriptor: int) -> bool:
    """Return whether nothing more can be read for a while."""
    if os.name != "posix":
        return False
    return not select.select([descriptor], [], [], PATIENCE)[0]


def _name(listed: bytes, ending: bytes) -> str:
    """Return the name on a line, without what Windows programs write around it."""
    name = os.fsdecode(listed)
    shorter = name.removeprefix(UTF8_MARK).removesuffix("\r")
    return name if ending == b"\0" or name == shorter or os.path.lexists(name) else shorter


def _read_files(paths: Sequence[str], shape: Shape, most: int) -> Chunk:
    def one(path: str) -> Image:
        try:
            return adapt(decode(Path(path), most), shape)
        except CovcliError as error:
            return _reason(error)

    return _chunk([printable(path) for path in paths], list(decoders().map(one, paths)), shape)


def _of_set(images: ImageSet, size: int, shape: Shape) -> Iterator[Reader]:
    parts = torch.arange(len(images)).split(size)
    if not isinstance(images.source, ArchiveSource):
        for rows in parts:
            yield partial(_read_rows, images, rows, shape)
        return
    with ArchiveReader(images.source) as reader:
        for rows in parts:
            yield partial(_read_on, images, rows, shape, reader)


def _read_on(images: ImageSet, rows: Tensor, shape: Shape, reader: ArchiveReader) -> Chunk:
    pixels = adapt(reader.read(images.rows[rows]), shape)
    return Chunk(_names(images, rows), pixels, [None] * len(rows))


def _read_rows(images: ImageSet, rows: Tensor, shape: Shape) -> Chunk:
    source, of_source = images.source, images.rows[rows].tolist()
    if isinstance(source, FileSource):
        images_read = list(decoders().map(lambda row: _image(source.one, row, shape), of_source))
    else:
        try:
            return Chunk(_names(images, rows), images.batch(rows, shape), [None] * len(rows))
        except CovcliError:  # one of them cannot be read
            images_read = [_image(_by_itself(images), row, shape) for row in rows.tolist()]
    return _chunk(_names(images, rows), images_read, shape)


def _by_itself(images: ImageSet) -> Callable[[int, Shape], Tensor]:
    return lambda row, shape: images.batch(torch.tensor([row]), shape)


def _image(read: Callable[[int, Shape], Tensor], row: int, shape: Shape) -> Image:
    try:
        return read(row, shape)
    except CovcliError as error:
        return _reason(error)


def _reason(error: CovcliError) -> str:
    if not isinstance(error, UnreadableError):
        return one_line(str(error))
    kind = error.path.suffix.removeprefix(".")
    is_archive = kind in ARCHIVES and error.path.is_file()
    hint = f"; its images are named {kind}:{error.path}" if is_archive else ""
    return one_line(f"{error.reason}{hint}")


def _chunk(names: list[str], images_read: Sequence[Image], shape: Shape) -> Chunk:
    whole = [image for image in images_read if not isinstance(image, str)]
    pixels = torch.cat(whole) if whole else torch.empty((0, *shape), dtype=torch.uint8)
    return Chunk(
        names, pixels, [image if isinstance(image, str) else None for image in images_read]
    )


def _names(images: ImageSet, rows: Tensor) -> list[str]:
    """Return the images' files, or the set's name and their rows in the source."""
    of_source = images.rows[rows].tolist()
    source = images.source
    if isinstance(source, FileSource):
        return [printable(str(source.path(row))) for row in of_source]
    return [f"{images.name}#{row}" for row in of_source]


def ahead(items: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield what each of the callables returns, and call the next one in the background.

    A thread calls them. It is not joined at the end, because it may be waiting for a list whose
    writer is still running.
    """
    done: queue.Queue[tuple[bool, Any]] = queue.Queue(AHEAD)
    left = threading.Event()

    def hand_over(result: tuple[bool, Any]) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                done.put(result, timeout=0.5)
                return

    def work() -> None:
        compute_alone()
        try:
            for item in items:
                if left.is_set():
                    return
                hand_over((True, item()))
            hand_over((False, None))
        except BaseException as error:
            hand_over((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            more, result = done.get()
            if more:
                yield result
            elif result is None:
                return
            else:
                raise result
    finally:
        left.set()
