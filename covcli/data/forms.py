"""Forms of data: archives, folders and lists of image files, and noise."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from torch import Tensor

from covcli.core import file_checks
from covcli.core.errors import CovcliError, first_few
from covcli.core.opening import exists, is_file, is_folder, reading
from covcli.core.specs import LARGEST, Spec, count, up_to
from covcli.data import listing
from covcli.data.archives import ArchiveSource, array_names, is_one_in_colour, stored_shape
from covcli.data.image_files import FileSource
from covcli.data.images import ImageSet, NoiseSource, Origin, Source, in_memory
from covcli.data.listing import SERVING
from covcli.data.reading import FORMS, Reading
from covcli.data.registry import DATASETS, PARTS, Request, say_once
from covcli.data.tables import read_table

log = logging.getLogger(__name__)
ARRAYS = ("images", "labels", "classes")  # that an archive may hold
NOISE_IMAGES = 2000
MOST_NOISE = 10_000_000  # a number is kept of each


def _located(request: Request) -> tuple[Path, Origin]:
    """Return the path that a specification names, and the record that reads it again.

    The path is tried as written, then with percent-encoded characters such as `%3F` decoded. It is
    looked up in the working directory, then in the directory where the specification was recorded.

    Raises
    ------
    CovcliError
        If the path does not exist.
    """
    spec = request.spec
    spec.only([*PARTS, *FORMS[spec.name]])
    if not spec.argument:
        raise CovcliError("needs a path", where=spec.text, fix="write name:PATH")
    decoded = unquote_to_bytes(spec.argument.encode("utf-8", "surrogateescape"))
    paths = [_at_home(text) for text in (spec.argument, os.fsdecode(decoded))]
    here = Path.cwd()
    for path in paths:
        if exists(path):
            return path, Origin(spec.text, "" if path.is_absolute() else str(here))
    for path in paths:
        if request.ran_in is not None and exists(request.ran_in / path):
            log.info("%s: not in %s: read from %s, as recorded", path, here, request.ran_in)
            return request.ran_in / path, Origin(spec.text, str(request.ran_in))
    elsewhere = f", nor from {request.ran_in}, where it was" if request.ran_in else ""
    raise CovcliError(f"no such file or folder{elsewhere}", where=paths[0])


def _at_home(text: str) -> Path:
    """Return a path with `~` and `~user` replaced by that user's home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise CovcliError("names the home folder of a user who has none", where=text) from None


def _file_of_split(path: Path, request: Request, ending: str) -> Path:
    """Return `path` if it is a file; for a folder, the file in it that holds the split."""
    if not is_folder(path):
        return path
    parts = [part for part in SERVING[request.split] if part != "val"] + [
        name for name, part in listing.SPLITS.items()
        if part == "val" and part in SERVING[request.split]
    ]  # fmt: skip
    for name in parts:
        file = path / f"{name}{ending}"
        if is_file(file):
            if name != request.split:
                say_once(f"{path}: no {request.split}{ending}: {file.name} serves as it")
            return file
    raise CovcliError(f"holds no {' or '.join(f'{name}{ending}' for name in parts)}", where=path)


@DATASETS.add("npz")
def npz(request: Request) -> ImageSet:
    """Read a NumPy archive with `images` (uint8, N×H×W or N×H×W×C) and optionally `labels` (N).

    A third array, `classes`, holds the class names: text of shape (K,), label k is class
    `classes[k]`. The path is a file, or a folder that holds train.npz and test.npz.

    Raises
    ------
    CovcliError
        If the path does not exist, the archive is damaged, or an array has another type or shape.

    Examples
    --------
    >>> from covcli.data.datasets import load
    >>> pixels = np.zeros((2, 8, 8), np.uint8)
    >>> np.savez("x.npz", images=pixels, labels=[0, 1], classes=["cat", "dog"])
    >>> images = load("npz:x.npz", "test")
    >>> len(images), images.classes
    (2, ('cat', 'dog'))
    """
    path, origin = _located(request)
    file = _file_of_split(path, request, ".npz")
    sides = stored_shape(file) if request.in_order else None
    arrays = file_checks.read_npz(file, ("labels", "classes", *(() if sides else ("images",))))
    source = _in_memory(file, arrays) if sides is None else ArchiveSource(file, sides)
    number = len(arrays["images"]) if sides is None else sides[0]
    for note in _unread(file):
        say_once(note)
    labels, classes = arrays.get("labels"), arrays.get("classes")
    if labels is not None:
        labels = _class_numbers(labels, number, file)
    names = () if labels is None else _class_names(classes, file)
    return ImageSet(
        request.spec.text,
        source,
        torch.arange(number),
        None if labels is None else _numbered(labels, names, request),
        names,
        flips=True,
        origin=origin,
    )


def _unread(file: Path) -> list[str]:
    """Return a note on arrays that are not read, if they could be the labels or their names."""
    names = array_names(file)
    others = [name for name in names if name not in ARRAYS]
    missing = [name for name in ARRAYS[1:] if name not in names]
    if not others or not missing:
        return []
    return [
        f"{file}: no array `{'`, `'.join(missing)}`; not read: {first_few(others, len(ARRAYS))}"
    ]


def _class_numbers(labels: np.ndarray, images: int, file: Path) -> np.ndarray:
    """Return labels of shape (N,) or (N, 1) as int64 of shape (N,)."""
    one_each = labels.shape in ((images,), (images, 1))
    if not one_each or labels.dtype.kind not in "iu" or labels.max(initial=0) > LARGEST:
        raise CovcliError(
            f"{images} images, but labels are {labels.dtype} of shape {labels.shape}",
            where=file,
            fix="store integers of shape (N,)",
        )
    return labels.reshape(images).astype(np.int64)


def _numbered(labels: np.ndarray, names: tuple[str, ...], request: Request) -> Tensor:
    """Return labels counted from 0; `labels-from` is the number of the first class."""
    first = 0 if names else Reading.of(request.spec).labels_from
    if first and len(labels) and int(labels.min()) < first:
        raise CovcliError(
            f"label {int(labels.min())} is below {first}",
            where=request.spec.text,
            fix="name the lowest label of all by --labels-from",
        )
    return torch.from_numpy(labels - first)


def _class_names(classes: np.ndarray | None, file: Path) -> tuple[str, ...]:
    if classes is None:
        return ()
    if classes.dtype.kind == "S":
        with reading(file, "holds class names that are not UTF-8"):
            classes = np.char.decode(classes, "utf-8")
    text = classes.dtype.kind == "U" and classes.ndim == 1
    names = tuple(map(listing.class_name, classes.tolist())) if text else ()
    if not text or len(set(names)) < len(names):
        raise CovcliError(
            f"classes are {classes.dtype} of shape {classes.shape}",
            where=file,
            fix="store their names as text of shape (K,), each once",
        )
    return names


def _in_memory(file: Path, arrays: Mapping[str, np.ndarray]) -> Source:
    """Return an archive's images as a source, if they are ones."""
    if "images" not in arrays:
        held = first_few(array_names(file), len(ARRAYS)) or "none"
        raise CovcliError(
            f"holds no array named `images`; its arrays: {held}",
            where=file,
            fix="name them images, labels and classes",
        )
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise CovcliError(
            f"images are {images.dtype} of shape {images.shape}",
            where=file,
            fix="store uint8 of shape (N, H, W) or (N, H, W, C)",
        )
    if images.ndim == 3 and is_one_in_colour(images.shape):
        raise CovcliError(
            f"images have shape {images.shape}, as a single one in colour",
            where=file,
            fix="store it as images[None], or grey ones as images[..., None]",
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] not in (1, 2, 3, 4) or 0 in images.shape:
        raise CovcliError(
            f"images have shape {images.shape}", where=file, fix="store 1 to 4 channels, last"
        )
    if images.shape[3] in (2, 4):
        say_once(f"{file}: the last of {images.shape[3]} channels is read as opacity")
    return in_memory("", torch.from_numpy(images).permute(0, 3, 1, 2), None).source


@DATASETS.add("folder")
def folder(request: Request) -> ImageSet:
    """Image files: one subfolder per class, in alphabetical order, or unlabelled files.

    If the subfolders are splits (`train`, `test`, `val`, …), the requested split is read; `val` is
    used if there is no `test`.

    Raises
    ------
    CovcliError
        If the folder does not exist, holds no image, or it is not clear which subfolders are splits
        and which are classes.

    Examples
    --------
    >>> from PIL import Image
    >>> from covcli.data.datasets import load
    >>> for name in ("cat", "dog"):
    ...     Path("photos", name).mkdir(parents=True)
    ...     Image.new("RGB", (8, 8)).save(f"photos/{name}/1.png")
    >>> images = load("folder:photos", "test")
    >>> images.classes, images.labels.tolist(), images.files
    (('cat', 'dog'), [0, 1], ['cat/1.png', 'dog/1.png'])
    """
    return of_folder(request, *_located(request))


def of_folder(request: Request, top: Path, origin: Origin) -> ImageSet:
    """Return the images of a folder: all its classes, or those of the requested split."""
    if not is_folder(top):
        raise CovcliError("is a file, not a folder", where=top)
    root, notes = listing.split_folder(top, request.split)
    listed = listing.list_classes(root)
    for note in notes + listed.notes:
        say_once(note)
    if not listed.files:
        raise CovcliError(
            "holds no image", where=root, fix=f"known endings: {', '.join(listing.SUFFIXES)}"
        )
    labels = torch.repeat_interleave(torch.tensor(listed.counts)) if listed.classes else None
    source = FileSource(root, listed.files, most=Reading.of(request.spec).max_pixels)
    return of_files(request, source, labels, listed.classes, origin)


@DATASETS.add("csv")
def csv_list(request: Request) -> ImageSet:
    r"""Read a CSV table with the columns `path` and optionally `label`: one row per image.

    Paths are relative to the table's folder. Labels are either class names or all numbers. The
    specification names a file, or a folder that holds train.csv and test.csv. See `read_table`.

    Raises
    ------
    CovcliError
        If the table does not exist, has no column `path`, or has an incomplete line.

    Examples
    --------
    >>> from covcli.data.datasets import load
    >>> _ = Path("list.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
    >>> images = load("csv:list.csv", "test")
    >>> images.classes, images.labels.tolist()
    (('cat', 'dog'), [0, 1])
    """
    path, origin = _located(request)
    file = _file_of_split(path, request, ".csv")
    table = read_table(file)
    for note in table.notes:
        say_once(note)
    most = Reading.of(request.spec).max_pixels
    source = FileSource(file.parent, table.paths, key=file.name, most=most)
    if table.labels is None:
        return of_files(request, source, None, (), origin)
    if (numbers := table.numbers()) is not None:
        return of_files(request, source, _numbered(np.array(numbers), (), request), (), origin)
    classes = sorted(set(table.labels))
    places = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([places[label] for label in table.labels])
    return of_files(request, source, labels, tuple(classes), origin)


def of_files(
    request: Request, source: FileSource, labels: Tensor | None, classes: tuple[str, ...],
    origin: Origin,
) -> ImageSet:  # fmt: skip
    """Return the set of image files; with `skip-unreadable`, without those that cannot be read."""
    images = ImageSet(
        request.spec.text, source, torch.arange(len(source.files)), labels, classes, flips=True,
        by_class=True, origin=origin,
    )  # fmt: skip
    if not Reading.of(request.spec).skip_unreadable:
        return images
    return source.less_unreadable(images)


def noise_kind(spec: Spec) -> str:
    """Return which noise a specification names; an unknown one is a CovcliError."""
    if spec.argument not in ("gaussian", "uniform"):
        raise CovcliError(
            f"unknown noise {spec.argument!r}", where=spec.text, fix="known: gaussian, uniform"
        )
    return spec.argument


@DATASETS.add("noise")
def noise(request: Request) -> ImageSet:
    """`noise:gaussian` (mean 127.5, deviation 64) or `noise:uniform` (0 to 255), with `seed`.

    2,000 images of the network's input size, or as many as `limit`.

    Examples
    --------
    >>> from covcli.data.datasets import load
    >>> images = load("noise:uniform?limit=5&seed=3", "test")
    >>> images.batch(torch.arange(5), (3, 8, 8)).shape
    torch.Size([5, 3, 8, 8])
    """
    request.spec.only([*PARTS, "seed"])
    kind = noise_kind(request.spec)
    source = NoiseSource(kind, request.spec.take("seed", count, 0))  # type: ignore[arg-type]
    limit = request.spec.take("limit", up_to(MOST_NOISE), NOISE_IMAGES)
    last = min(request.spec.take("offset", count, 0) + limit, MOST_NOISE)
    return ImageSet(request.spec.text, source, torch.arange(last), None)
