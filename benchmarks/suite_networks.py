"""The networks of the suite: their images, and how those that come without weights are trained.

Three networks learn six classes of ten; the other four are untrusted images of the same kind. All
of them are small and trained for few epochs, so that the suite takes an hour, not a day.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from covcli.core import runtime
from covcli.core.progress import Progress
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.data.listing import Split
from covcli.models import architectures
from covcli.training.paused import PAUSED_FILE
from covcli.training.train import TrainConfig, resume, train

KEPT_CLASSES = (0, 1, 2, 4, 5, 9)
SHAPE = (3, 32, 32)


class Residual(nn.Module):
    """Two convolutions and a way around them (He et al., CVPR 2016)."""

    def __init__(self, channels: int, kernels: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, kernels, 3, stride, 1, bias=False), nn.BatchNorm2d(kernels),
            nn.ReLU(), nn.Conv2d(kernels, kernels, 3, 1, 1, bias=False), nn.BatchNorm2d(kernels),
        )  # fmt: skip
        self.around = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(channels, kernels, 1, stride, bias=False), nn.BatchNorm2d(kernels)
        )  # fmt: skip
        self.end = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both ways, rectified."""
        output: Tensor = self.end(self.convolutions(inputs) + self.around(inputs))
        return output


@architectures.model("resnet8")
def resnet8(classes: int, _pretrained: bool) -> nn.Module:
    """Build a residual network of three stages of one block; its first convolution halves."""
    blocks = [Residual(24, 24, 1), Residual(24, 48, 2), Residual(48, 96, 2)]
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes),
    )  # fmt: skip


def small(normalised: bool, classes: int, _pretrained: bool) -> nn.Module:
    """Build six convolutions and a hidden layer: a minute or two of training on one core."""

    def block(channels: int, kernels: int, stride: int) -> list[nn.Module]:
        norm: list[nn.Module] = [nn.BatchNorm2d(kernels)] if normalised else []
        convolution = nn.Conv2d(channels, kernels, 3, stride, 1, bias=not normalised)
        if not normalised:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        return [convolution, *norm, nn.ReLU()]

    return nn.Sequential(
        *block(3, 16, 2), *block(16, 32, 1), *block(32, 64, 2), *block(64, 64, 1),
        *block(64, 128, 2), *block(128, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip


architectures.model("small")(partial(small, True))
architectures.model("small-plain")(partial(small, False))


@architectures.model("small-vit")
def small_vit(classes: int, _pretrained: bool) -> nn.Module:
    """Build a vision transformer (Dosovitskiy et al., ICLR 2021) of 3 layers and 64 patches."""
    network: nn.Module = VisionTransformer(
        image_size=32, patch_size=4, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=classes,
    )  # fmt: skip
    return network


@dataclass(frozen=True)
class Recipe:
    """How a network of the suite is trained.

    Attributes
    ----------
    model
        The architecture.
    data
        "cifar10" or "fashion-mnist".
    images
        How many training images; None for all of the kept classes.
    epochs, learning_rate
        As of `covcli train`.
    """

    model: str
    data: str
    images: int
    epochs: int
    learning_rate: float = 0.05


RECIPES: Mapping[str, Recipe] = {
    "resnet8": Recipe("resnet8", "cifar10", 10_000, 6),
    "small": Recipe("small-plain", "fashion-mnist", 12_000, 8, 0.02),
    "vit": Recipe("small-vit", "fashion-mnist", 10_000, 6, 0.02),
}


@dataclass(frozen=True)
class Data:
    """The folder of real images: cifar10/*.npz, and torchvision's MNIST and FashionMNIST."""

    folder: Path

    def load(self, name: str, split: Split) -> ImageSet:
        """Return CIFAR-10 or Fashion-MNIST, wherever of the two forms it lies."""
        if name == "cifar10" and (self.folder / "cifar10" / "train.npz").is_file():
            images = datasets.load(f"npz:{self.folder / 'cifar10'}", split)
        else:
            images = datasets.load(name, split, self.folder)
        return images.named(images.classes or tuple(str(k) for k in range(10)))


def part(images: ImageSet, kept: bool) -> ImageSet:
    """Return the images of the six classes, numbered anew, or those of the other four."""
    labels = images.known_labels()
    chosen = torch.isin(labels, torch.tensor(KEPT_CLASSES)) == kept
    mine = images.select(chosen.nonzero()[:, 0])
    return mine if not kept else relabelled(mine)


def relabelled(images: ImageSet) -> ImageSet:
    """Return the images of the six classes under the numbers 0 to 5."""
    numbers = torch.full((10,), -1)
    numbers[list(KEPT_CLASSES)] = torch.arange(len(KEPT_CLASSES))
    classes = tuple(images.classes[k] for k in KEPT_CLASSES)
    return replace(images, labels=numbers[images.known_labels()], classes=classes)


def write_npz(path: Path, images: ImageSet) -> None:
    """Write a set as an `npz:` source, 32 by 32 in colour."""
    pixels = images.batch(torch.arange(len(images)), SHAPE).permute(0, 2, 3, 1).numpy()
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary, images=pixels, labels=images.known_labels().numpy().astype(np.uint8),
        classes=np.array(images.classes),
    )  # fmt: skip
    temporary.replace(path)


def six_classes(data: Data, name: str, folder: Path) -> Path:
    """Write the six classes of a data set where they are not there yet; return their folder."""
    home = folder / f"{name}-six"
    home.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        if not (home / f"{split}.npz").is_file():
            write_npz(home / f"{split}.npz", part(data.load(name, split), kept=True))
    return home


def trained(name: str, data: Data, folder: Path, progress: Progress) -> Path:
    """Return the checkpoint of a recipe; train where there is none, or go on where it was cut."""
    run = folder / "runs" / name
    checkpoint = run / "checkpoint.pt"
    if checkpoint.is_file():
        return checkpoint
    recipe = RECIPES[name]
    trusted = f"npz:{six_classes(data, recipe.data, folder)}?limit={recipe.images}&shuffle=0"
    runtime.configure(0, torch.get_num_threads())
    if (run / PAUSED_FILE).is_file():
        return resume(run, progress, named=[trusted]).checkpoint
    config = TrainConfig(
        trusted=trusted, model=recipe.model, epochs=recipe.epochs,
        learning_rate=recipe.learning_rate, confidence_weight=0, calibration_split=0, name=name,
        runs=folder / "runs", device="cpu", save_every="1m",
    )  # fmt: skip
    return train(config, progress).checkpoint
