"""MODELS: the registry of architectures, with their input shapes and normalisation."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from covcli.core.specs import Registry
from covcli.data.preprocessing import InputShape
from covcli.models.spec import CIFAR10, Normalisation

Build: TypeAlias = Callable[[int, bool], nn.Module]
Sides: TypeAlias = tuple[int, ...]
# What fills new weights: on the meta device there is nothing to fill, and pretending takes time.
FILLING = {
    Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_, Tensor.erfinv_, Tensor.mul_,
    Tensor.add_, Tensor.clamp_, nn.init.uniform_, nn.init.normal_, nn.init.constant_,
    nn.init.kaiming_uniform_, nn.init.kaiming_normal_,
}  # fmt: skip


class _Unfilled(TorchFunctionMode):
    """Leaves weights as they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function, or return the tensor that it would fill."""
        if func in FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Published:
    """Published ImageNet weights, and the preprocessing that they expect.

    Attributes
    ----------
    name
        The name of the weights.
    shape
        The input shape that they were trained with, and its preprocessing.
    statistics
        Mean and deviation of the pixels in [0, 1], per channel.
    state
        Reads or downloads their state dict.
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
        Takes the number of classes, and whether to use the layout of the published weights. Returns
        a network with random weights.
    shape
        Channels, height and width of its input, and the preprocessing of images.
    statistics
        Mean and deviation of the pixels in [0, 1], assumed for weights without a checkpoint.
    published
        The weights that `--pretrained` starts from, or None.
    layouts
        (False,) if there is one layout; (False, True) if the published weights have their own.

    Examples
    --------
    >>> import covcli.models
    >>> vgg = MODELS.get("vgg11")
    >>> tuple(vgg.shape), vgg.layouts
    ((3, 32, 32), (False, True))
    >>> vgg.shapes(classes=10, pretrained=False)["classifier.6.weight"]
    (10, 512)
    """

    build: Build
    shape: InputShape
    statistics: Normalisation = CIFAR10
    published: Published | None = None
    layouts: tuple[bool, ...] = (False,)

    def expects(self, pretrained: bool) -> tuple[InputShape, Normalisation]:
        """Return the input shape, and the pixels' mean and deviation, of a layout."""
        if pretrained and self.published is not None:
            return self.published.shape, self.published.statistics
        return self.shape, self.statistics

    def shapes(self, classes: int, pretrained: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a network's weights and buffers, by name.

        No memory is allocated for the weights, if the network can be built that way.
        """
        state = self._without_weights(classes, pretrained).state_dict().items()
        return {name: tuple(value.shape) for name, value in state if isinstance(value, Tensor)}

    def _without_weights(self, classes: int, pretrained: bool) -> nn.Module:
        """Build the network without memory for its weights, or in full if it needs their values."""
        for ways in ((torch.device("meta"), _Unfilled()), (_weights_on_meta(),)):
            with (
                contextlib.suppress(RuntimeError, NotImplementedError, TypeError, ValueError),
                contextlib.ExitStack() as stack,
            ):
                for way in ways:
                    stack.enter_context(way)
                return self.build(classes, pretrained)
        return self.build(classes, pretrained)


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Move each weight to the meta device as this thread's modules get it, before it is filled.

    So a network can be built that computes its own sizes with tensors.
    """
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == thread:
            param = nn.Parameter(param.data.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


MODELS: Registry[Architecture] = Registry("model")
