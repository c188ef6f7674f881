"""DATASETS: what a data specification such as `npz:data?split=test&limit=100` means."""

import contextlib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from covcli.core import distributed, file_checks
from covcli.core.errors import CovcliError
from covcli.core.specs import Registry, Spec, count, parse, positive_count
from covcli.data import listing
from covcli.data.digests import user_cache
from covcli.data.image_files import FileSource
from covcli.data.images import ImageSet, NoiseSource, in_memory
from covcli.data.listing import Split

log = logging.getLogger(__name__)
SELECTION = ["split", "offset", "limit"]
DIGITS = tuple("0123456789")
NOISE_IMAGES = 2000


@dataclass(frozen=True)
class Request:
    """What a loader is asked for.

    Attributes
    ----------
    spec
        The parsed specification; `offset` and `limit` are applied by `load`, not by loaders.
    split
        "train" or "test".
    folder
        The folder that downloaded sets live in; None for the one of `default_data_dir`.
    """

    spec: Spec
    split: Split
    folder: Path | None

    @property
    def data_dir(self) -> Path:
        """The folder that downloaded sets live in."""
        return self.folder or default_data_dir()


Loader: TypeAlias = Callable[[Request], ImageSet]
DATASETS: Registry[Loader] = Registry("dataset")


def default_data_dir() -> Path:
    """Return COVCLI_DATA_DIR, or covcli's folder in the user's cache.

    Raises
    ------
    CovcliError
        If neither is known: the user has no home.
    """
    if folder := os.environ.get("COVCLI_DATA_DIR"):
        return Path(folder)
    if (cache := user_cache()) is None:
        raise CovcliError("the user has no home folder to keep data in", fix="name a --data-dir")
    return cache


def load(text: str, split: Split, data_dir: Path | None = None) -> ImageSet:
    """Load the images that a specification names.

    Parameters
    ----------
    text
        For example `cifar10`, `npz:FILE-OR-FOLDER`, `folder:DIR`, `noise:uniform`, each with
        `?split=train|test&offset=N&limit=N`.
    split
        The split to read where the specification names none.
    data_dir
        The folder that downloaded sets live in; by default the one of `default_data_dir`.

    Raises
    ------
    CovcliError
        If the name or a parameter is unknown, or the data is missing, unreadable or empty.
    """
    spec = parse(text)
    loader = DATASETS.get(spec.name)
    chosen = spec.take("split", _split, split)
    images = loader(Request(spec, chosen, data_dir))
    offset = spec.take("offset", count, 0)
    limit = spec.take("limit", positive_count, len(images))
    rows = torch.arange(min(offset, len(images)), min(offset + limit, len(images)))
    if len(rows) == 0:
        raise CovcliError(
            f"no image left: the {chosen} split has {len(images)}, the offset is {offset}",
            where=text,
        )
    return images.select(rows)


@cache
def say_once(note: str) -> None:
    """Log a warning, unless this process has logged it before."""
    log.warning("%s", note)


def check_labels(images: ImageSet, classes: int) -> Tensor:
    """Return the labels of a set for a network of so many classes; others are a CovcliError."""
    labels = images.known_labels()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise CovcliError(
            f"labels from {low} to {high}, but the network has classes 0 to {classes - 1}",
            where=images.name,
        )
    return labels


def _split(text: str) -> Split:
    if text == "train":
        return "train"
    if text == "test":
        return "test"
    raise ValueError("expected train or test")


def _no_argument(request: Request, allowed: list[str] | None = None) -> None:
    request.spec.only([*SELECTION, *(allowed or [])])
    if request.spec.argument:
        raise CovcliError(f"{request.spec.name!r} takes no argument", where=request.spec.text)


def _path(request: Request) -> Path:
    request.spec.only(SELECTION)
    if not request.spec.argument:
        raise CovcliError("needs a path", where=request.spec.text, fix="write name:PATH")
    path = Path(request.spec.argument).expanduser()
    if not path.exists():
        raise CovcliError("no such file or folder", where=path)
    return path


def _from_torchvision(request: Request, open_set: Callable[[bool], Any]) -> Any:
    """Open a torchvision set where it lies; download it if it is not there."""
    _no_argument(request)
    with distributed.one_at_a_time():
        return _opened(request, open_set)


def _opened(request: Request, open_set: Callable[[bool], Any]) -> Any:
    damaged = CovcliError(
        "is damaged", where=f"{request.spec.text} in {request.data_dir}", fix="delete it there"
    )
    try:
        return open_set(False)
    except RuntimeError:  # not there
        pass
    except (ValueError, OSError, AssertionError, TypeError, EOFError):
        raise damaged from None
    log.info("downloading %s into %s", request.spec.name, request.data_dir)
    try:
        request.data_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return open_set(True)
    except (OSError, RuntimeError) as error:
        raise CovcliError(
            f"is not whole in {request.data_dir} and could not be downloaded ({error})",
            where=request.spec.text,
            fix="check the network, or point --data-dir or COVCLI_DATA_DIR at a copy",
        ) from None


def _cifar(request: Request, class_name: str) -> ImageSet:
    from torchvision import datasets

    made = _from_torchvision(
        request,
        lambda download: getattr(datasets, class_name)(
            request.data_dir, train=request.split == "train", download=download
        ),
    )
    pixels = torch.from_numpy(made.data).permute(0, 3, 1, 2)
    return in_memory(request.spec.text, pixels, np.array(made.targets), tuple(made.classes), True)


@DATASETS.add("cifar10")
def cifar10(request: Request) -> ImageSet:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32×32, 10 classes."""
    return _cifar(request, "CIFAR10")


@DATASETS.add("cifar100")
def cifar100(request: Request) -> ImageSet:
    """CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32×32, 100 classes."""
    return _cifar(request, "CIFAR100")


def _mnist(request: Request, class_name: str, flips: bool) -> ImageSet:
    from torchvision import datasets

    made = _from_torchvision(
        request,
        lambda download: getattr(datasets, class_name)(
            request.data_dir, train=request.split == "train", download=download
        ),
    )
    return in_memory(
        request.spec.text, made.data[:, None], made.targets, tuple(made.classes), flips
    )


@DATASETS.add("mnist")
def mnist(request: Request) -> ImageSet:
    """MNIST (LeCun et al., 1998): 60,000 + 10,000 grey handwritten digits of 28×28."""
    return _mnist(request, "MNIST", False)


@DATASETS.add("fashion-mnist")
def fashion_mnist(request: Request) -> ImageSet:
    """Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 grey garments of 28×28."""
    return _mnist(request, "FashionMNIST", True)


@DATASETS.add("svhn")
def svhn(request: Request) -> ImageSet:
    """SVHN (Netzer et al., 2011): 73,257 + 26,032 house numbers in colour, 32×32."""
    from torchvision import datasets

    made = _from_torchvision(
        request,
        lambda download: datasets.SVHN(request.data_dir, split=request.split, download=download),
    )
    return in_memory(request.spec.text, made.data, made.labels, DIGITS)


@DATASETS.add("digits")
def digits(request: Request) -> ImageSet:
    """scikit-learn's handwritten digits, 8×8 grey: 1,437 to train, 360 to test.

    Shuffled once (their order tells the writers apart), with each class in both parts alike.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    _no_argument(request)
    bunch = load_digits()
    train, test = train_test_split(
        np.arange(len(bunch.target)), test_size=360, random_state=0, stratify=bunch.target
    )
    rows = train if request.split == "train" else test
    pixels = np.rint(bunch.images[rows, None] * (255 / 16)).astype(np.uint8)
    return in_memory(request.spec.text, pixels, bunch.target[rows], DIGITS)


@DATASETS.add("photos")
def photos(request: Request) -> ImageSet:
    """2,000 square patches a split, 64 to 256 pixels wide, of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    from covcli.data.images import adapt

    _no_argument(request)
    sheets = [torch.tensor(sheet).permute(2, 0, 1) for sheet in load_sample_images().images]
    generator = np.random.default_rng([0, request.split == "test"])
    which = generator.integers(0, len(sheets), 2000)
    patches = []
    for sheet in (sheets[i] for i in which):
        side = int(generator.integers(64, 257))
        top = int(generator.integers(0, sheet.shape[1] - side + 1))
        left = int(generator.integers(0, sheet.shape[2] - side + 1))
        patches.append(adapt(sheet[None, :, top : top + side, left : left + side], (3, 64, 64)))
    return in_memory(request.spec.text, torch.cat(patches), which, ("china", "flower"), True)


@DATASETS.add("npz")
def npz(request: Request) -> ImageSet:
    """Read a NumPy archive with `images` (uint8, N×H×W or N×H×W×C) and, if known, `labels` (N).

    A third array, `classes`, names them: text of shape (K,), label k is class `classes[k]`. The
    path names a file, or a folder that holds train.npz and test.npz.
    """
    path = _path(request)
    file = path / f"{request.split}.npz" if path.is_dir() else path
    images, labels, classes = _read_npz(file)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise CovcliError(
            f"images are {images.dtype} of shape {images.shape}",
            where=file,
            fix="store uint8 of shape (N, H, W) or (N, H, W, C)",
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] not in (1, 2, 3, 4) or 0 in images.shape:
        raise CovcliError(
            f"images have shape {images.shape}", where=file, fix="store 1 to 4 channels, last"
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise CovcliError(
            f"{len(images)} images, but labels are {labels.dtype} of shape {labels.shape}",
            where=file,
        )
    return in_memory(
        request.spec.text,
        torch.from_numpy(images).permute(0, 3, 1, 2),
        None if labels is None else labels.astype(np.int64),
        () if labels is None else _class_names(classes, file),
        flips=True,
    )


def _class_names(classes: np.ndarray | None, file: Path) -> tuple[str, ...]:
    if classes is None:
        return ()
    if classes.dtype.kind != "U" or classes.ndim != 1 or len(set(classes.tolist())) < len(classes):
        raise CovcliError(
            f"classes are {classes.dtype} of shape {classes.shape}",
            where=file,
            fix="store their names as text of shape (K,), each once",
        )
    return tuple(classes.tolist())


def _read_npz(file: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    file_checks.check_npz(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile) or "images" not in archive:
                raise CovcliError("holds no array named `images`", where=file)
            return archive["images"], archive.get("labels"), archive.get("classes")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CovcliError(f"cannot be read as a NumPy archive ({error})", where=file) from None


@DATASETS.add("folder")
def folder(request: Request) -> ImageSet:
    """Image files: one subfolder a class, in alphabetical order, or files alone, unlabelled.

    Where the subfolders are splits (`train`, `test`, `val`, …), the split names the one to read;
    `val` serves where there is no `test`.
    """
    top = _path(request)
    if not top.is_dir():
        raise CovcliError("is a file, not a folder", where=top)
    root, notes = listing.split_folder(top, request.split)
    found = listing.list_classes(root)
    for note in notes + found.notes:
        say_once(note)
    if not found.files:
        raise CovcliError(
            "holds no image", where=root, fix=f"known endings: {', '.join(listing.SUFFIXES)}"
        )
    labels = torch.repeat_interleave(torch.tensor(found.counts)) if found.classes else None
    return ImageSet(
        request.spec.text,
        FileSource(root, found.files),
        torch.arange(len(found.files)),
        labels,
        found.classes,
        flips=True,
    )


@DATASETS.add("noise")
def noise(request: Request) -> ImageSet:
    """`noise:gaussian` (mean 127.5, deviation 64) or `noise:uniform` (0 to 255), with `seed`.

    2,000 images of the model's size unless `limit` says otherwise.
    """
    request.spec.only([*SELECTION, "seed"])
    kind = request.spec.argument
    if kind not in ("gaussian", "uniform"):
        raise CovcliError(
            f"unknown noise {kind!r}", where=request.spec.text, fix="known: gaussian, uniform"
        )
    source = NoiseSource(kind, request.spec.take("seed", count, 0))  # type: ignore[arg-type]
    last = request.spec.take("offset", count, 0) + request.spec.take(
        "limit", positive_count, NOISE_IMAGES
    )
    return ImageSet(request.spec.text, source, torch.arange(last), None)
