"""MODELS: architectures by name, and what is known of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from covcli.core.specs import Registry
from covcli.data.preprocessing import InputShape
from covcli.models.spec import CIFAR10, Normalisation

Build: TypeAlias = Callable[[int, bool], nn.Module]


@dataclass(frozen=True)
class Published:
    """Weights that somebody trained on ImageNet, and what they expect of images.

    Attributes
    ----------
    name
        What they are called.
    shape
        The input that they were trained for, and how images become such.
    statistics
        Mean and deviation of the pixels.
    state
        Reads, or downloads, their state dict.
    """

    name: str
    shape: InputShape
    statistics: Normalisation
    state: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Architecture:
    """How a model is built.

    Attributes
    ----------
    build
        Takes the number of classes and whether the layout is that of the published weights.
    shape
        Channels, height and width of its input, and how images become such.
    statistics
        Mean and deviation assumed for weights that come without a checkpoint.
    published
        The weights that `--pretrained` starts from, or None where there are none.
    layouts
        Whether it has a layout of its own, (False,), and another for published weights, (False,
        True).
    """

    build: Build
    shape: InputShape
    statistics: Normalisation = CIFAR10
    published: Published | None = None
    layouts: tuple[bool, ...] = (False,)

    def expects(self, pretrained: bool) -> tuple[InputShape, Normalisation]:
        """Return the input's shape, and the pixels' mean and deviation, of one of the layouts."""
        if pretrained and self.published is not None:
            return self.published.shape, self.published.statistics
        return self.shape, self.statistics

    def shapes(self, classes: int, pretrained: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a network's weights and buffers, by name.

        Where the network can be built without, no memory is taken for the weights.
        """
        try:
            with torch.device("meta"):
                network = self.build(classes, pretrained)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            network = self.build(classes, pretrained)  # it computes with its first weights
        state = network.state_dict().items()
        return {name: tuple(value.shape) for name, value in state if isinstance(value, Tensor)}


MODELS: Registry[Architecture] = Registry("model")
