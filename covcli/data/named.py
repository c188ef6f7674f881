"""Sets that are known by a name: what torchvision downloads, and what scikit-learn brings."""

import contextlib
import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from covcli.core import distributed
from covcli.core.errors import CovcliError
from covcli.data.images import ImageSet, in_memory
from covcli.data.registry import DATASETS, Request, without_argument

log = logging.getLogger(__name__)
DIGITS = tuple("0123456789")


def _from_torchvision(request: Request, open_set: Callable[[bool], Any]) -> Any:
    """Open a torchvision set where it lies; download it if it is not there."""
    without_argument(request)
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
    """2,000 square patches a split, 64 to 256 pixels wide, of scikit-learn's two photographs."""
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
