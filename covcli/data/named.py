"""Data sets with a name: those that torchvision downloads, and those included in scikit-learn."""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covcli.core import distributed
from covcli.core.errors import CovcliError
from covcli.core.opening import is_folder, real
from covcli.data.forms import of_files
from covcli.data.image_files import FileSource
from covcli.data.images import ImageSet, Origin, in_memory
from covcli.data.lmdb_source import LmdbSource, open_part
from covcli.data.reading import OF_FILES, Reading
from covcli.data.registry import DATASETS, Request, without_argument

log = logging.getLogger(__name__)
DIGITS = tuple("0123456789")
SCENES = (
    "bedroom", "bridge", "church_outdoor", "classroom", "conference_room", "dining_room", "kitchen",
    "living_room", "restaurant", "tower",
)  # fmt: skip


def _from_torchvision(
    request: Request, open_set: Callable[[bool], Any], allowed: Sequence[str] = ()
) -> Any:
    """Open a torchvision set in the data folder; download it if it is missing."""
    without_argument(request, allowed)
    with distributed.one_at_a_time():
        return _opened(request, open_set)


def _opened(request: Request, open_set: Callable[[bool], Any]) -> Any:
    damaged = CovcliError(
        "is damaged", where=f"{request.spec.text} in {request.data_dir}", fix="delete it there"
    )
    try:
        return open_set(False)
    except RuntimeError:  # missing
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
            f"is incomplete in {request.data_dir} and could not be downloaded ({error})",
            where=request.spec.text,
            fix="check the network, or point --data-dir or COVCLI_DATA_DIR at a copy",
        ) from None


def _cifar(request: Request, class_name: str) -> ImageSet:
    from torchvision import datasets

    opened = _from_torchvision(
        request,
        lambda download: getattr(datasets, class_name)(
            request.data_dir, train=request.split == "train", download=download
        ),
    )
    pixels = torch.from_numpy(opened.data).permute(0, 3, 1, 2)
    return in_memory(
        request.spec.text, pixels, np.array(opened.targets), tuple(opened.classes), True
    )


@DATASETS.add("cifar10")
def cifar10(request: Request) -> ImageSet:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour images, 32×32 pixels, 10 classes."""
    return _cifar(request, "CIFAR10")


@DATASETS.add("cifar100")
def cifar100(request: Request) -> ImageSet:
    """CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 colour images, 32×32 pixels, 100 classes."""
    return _cifar(request, "CIFAR100")


def _mnist(request: Request, class_name: str, flips: bool) -> ImageSet:
    from torchvision import datasets

    opened = _from_torchvision(
        request,
        lambda download: getattr(datasets, class_name)(
            request.data_dir, train=request.split == "train", download=download
        ),
    )
    return in_memory(
        request.spec.text, opened.data[:, None], opened.targets, tuple(opened.classes), flips
    )


@DATASETS.add("mnist")
def mnist(request: Request) -> ImageSet:
    """MNIST (LeCun et al., 1998): 60,000 + 10,000 grey handwritten digits, 28×28 pixels."""
    return _mnist(request, "MNIST", False)


@DATASETS.add("fashion-mnist")
def fashion_mnist(request: Request) -> ImageSet:
    """Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 grey garments, 28×28 pixels."""
    return _mnist(request, "FashionMNIST", True)


@DATASETS.add("kmnist")
def kmnist(request: Request) -> ImageSet:
    """Kuzushiji-MNIST (Clanuwat et al., 2018): 60,000 + 10,000 grey characters, 28×28 pixels."""
    return _mnist(request, "KMNIST", False)


@DATASETS.add("emnist-letters")
def emnist_letters(request: Request) -> ImageSet:
    """EMNIST's letters (Cohen et al., 2017): 124,800 + 20,800 grey letters, 28×28 pixels."""
    from torchvision import datasets

    opened = _from_torchvision(
        request,
        lambda download: datasets.EMNIST(
            request.data_dir, split="letters", train=request.split == "train", download=download
        ),
    )
    # The files store images transposed, and count letters from 1.
    pixels, labels = opened.data.transpose(1, 2)[:, None], opened.targets - 1
    return in_memory(request.spec.text, pixels, labels, tuple(opened.classes[1:]))


@DATASETS.add("textures")
def textures(request: Request) -> ImageSet:
    """DTD, describable textures (Cimpoi et al., 2014): 47 classes, 3,760 + 1,880 photographs.

    The first partition. `train` includes its validation images.
    """
    from torchvision import datasets

    def opened(download: bool) -> list[Any]:
        parts = ["train", "val"] if request.split == "train" else ["test"]
        return [datasets.DTD(request.data_dir, split=p, download=download) for p in parts]

    parts = _from_torchvision(request, opened, OF_FILES)
    pairs = [pair for p in parts for pair in zip(p._image_files, p._labels, strict=True)]
    return _of_paths(request, pairs, tuple(parts[0].classes))


@DATASETS.add("places365")
def places365(request: Request) -> ImageSet:
    """Places365 (Zhou et al., 2017), small version: 1.8 million + 36,500 photographs of scenes.

    `test` is the validation split: the labels of the test split are not public.
    """
    from torchvision import datasets

    split = "train-standard" if request.split == "train" else "val"
    opened = _from_torchvision(
        request,
        lambda download: datasets.Places365(
            request.data_dir, split=split, small=True, download=download
        ),
        OF_FILES,
    )
    names = sorted(opened.class_to_idx, key=opened.class_to_idx.get)
    return _of_paths(request, opened.imgs, tuple(name.lstrip("/") for name in names))


@DATASETS.add("inaturalist")
def inaturalist(request: Request) -> ImageSet:
    """INaturalist 2021 (Van Horn et al.): 10,000 species, 500,000 + 100,000 photographs.

    `train` is its mini set.
    """
    from torchvision import datasets

    version = "2021_train_mini" if request.split == "train" else "2021_valid"
    opened = _from_torchvision(
        request,
        lambda download: datasets.INaturalist(request.data_dir, version, download=download),
        OF_FILES,
    )
    names = opened.all_categories
    pairs = [(Path(opened.root) / names[k] / file, k) for k, file in sorted(opened.index)]
    return _of_paths(request, pairs, tuple(names))


def _of_paths(
    request: Request, pairs: Sequence[tuple[str | Path, int]], classes: tuple[str, ...]
) -> ImageSet:
    """Return the set of image files that torchvision lists with their labels."""
    folder = request.data_dir
    names = [os.path.relpath(path, folder) for path, _ in pairs]
    key = f"{request.spec.name} {request.split}"
    source = FileSource(folder, names, key, Reading.of(request.spec).max_pixels)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return of_files(request, source, labels, classes, Origin(request.spec.text))


@DATASETS.add("lsun")
def lsun(request: Request) -> ImageSet:
    """LSUN (Yu et al., 2015): 9.9 million + 3,000 photographs of 10 kinds of scenes.

    It is not downloaded automatically: the folders `bedroom_val_lmdb` and so on must be in the data
    folder. Reading them needs the package lmdb.
    """
    without_argument(request, OF_FILES)
    split = "train" if request.split == "train" else "val"
    folders = {name: request.data_dir / f"{name}_{split}_lmdb" for name in SCENES}
    missing = [folder.name for folder in folders.values() if not is_folder(folder)]
    if missing:
        raise CovcliError(
            f"lacks {', '.join(missing)}",
            where=request.data_dir,
            fix="fetch them from the LSUN authors' server, or name another --data-dir",
        )
    parts = [open_part(real(folder)) for folder in folders.values()]
    labels = torch.repeat_interleave(torch.tensor([len(part.keys) for part in parts]))
    source = LmdbSource(tuple(parts), Reading.of(request.spec).max_pixels)
    return ImageSet(
        request.spec.text, source, torch.arange(len(labels)), labels, SCENES, flips=True,
        by_class=True, origin=Origin(request.spec.text),
    )  # fmt: skip


@DATASETS.add("svhn")
def svhn(request: Request) -> ImageSet:
    """SVHN (Netzer et al., 2011): 73,257 + 26,032 house numbers in colour, 32×32."""
    from torchvision import datasets

    opened = _from_torchvision(
        request,
        lambda download: datasets.SVHN(request.data_dir, split=request.split, download=download),
    )
    return in_memory(request.spec.text, opened.data, opened.labels, DIGITS)


@DATASETS.add("digits")
def digits(request: Request) -> ImageSet:
    """scikit-learn's handwritten digits, 8×8 grey: 1,437 to train, 360 to test.

    The split is random and stratified by class, because the images are ordered by writer.

    Examples
    --------
    >>> from covcli.data.datasets import load
    >>> len(load("digits", "train")), len(load("digits", "test"))
    (1437, 360)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    without_argument(request)
    bunch = load_digits()
    train, test = train_test_split(
        np.arange(len(bunch.target)), test_size=360, random_state=0, stratify=bunch.target
    )
    rows = train if request.split == "train" else test
    pixels = np.rint(bunch.images[rows, None] * (255 / 16)).astype(np.uint8)
    return in_memory(request.spec.text, pixels, bunch.target[rows], DIGITS)


@DATASETS.add("photos")
def photos(request: Request) -> ImageSet:
    """2,000 square patches per split, 64 to 256 pixels wide, of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    from covcli.data.images import adapt

    without_argument(request)
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
