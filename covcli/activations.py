"""Coverage points: where activations are recorded, and how they become neurons."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from covcli.errors import CovcliError

Granularity: TypeAlias = Literal["channel", "unit"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus, nn.Tanh,
)  # fmt: skip
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class CoverageLayer(nn.Module):
    """The identity; marks a place in a custom network where covcli records activations.

    Parameters
    ----------
    channel_dim
        The dimension of the input that counts channels: 1 for (B, C, H, W) and (B, C), -1 for
        tokens of shape (B, T, C).
    """

    def __init__(self, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


@dataclass(frozen=True)
class Point:
    """One coverage point.

    Attributes
    ----------
    name
        The module's name in the network; `#2` and so on follow where it is called repeatedly.
    module
        The module's name alone.
    call
        Which call of the module within one forward pass, from 0 on.
    channel_dim
        Which dimension of its output counts channels.
    neurons
        How many neurons it has at the granularity asked for.
    """

    name: str
    module: str
    call: int
    channel_dim: int
    neurons: int


def pool(output: Tensor, channel_dim: int, granularity: Granularity) -> Tensor:
    """Turn a layer's output into neurons.

    Parameters
    ----------
    output
        Shape (B, C, ...) or (B, ..., C).
    channel_dim
        The dimension that counts the channels.
    granularity
        "channel": each channel's mean and maximum over its positions, or its value in a fully
        connected layer. "unit": every value.

    Returns
    -------
    Tensor
        Shape (B, 2C), the means first; (B, C) for a fully connected layer; (B, C·positions) for
        units.
    """
    if output.ndim == 2 or granularity == "unit":
        return output.flatten(1).clone()  # not a view: a later in-place layer would change it
    rest = [d for d in range(1, output.ndim) if d != channel_dim % output.ndim]
    return torch.cat([output.mean(rest), _largest(output, channel_dim, rest)], 1)


def _largest(output: Tensor, channel_dim: int, rest: list[int]) -> Tensor:
    """Return each channel's maximum; amax is the faster way forward, and the slower one back."""
    if output.requires_grad:
        return output.movedim(channel_dim, -1).flatten(1, -2).max(1).values
    return output.amax(rest)


class Recorder:
    """The neurons of the last forward pass, filled by hooks."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = points
        self._values: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    def note(self, point: Point, neurons: Tensor) -> None:
        """Keep what a hook saw."""
        self._values[point.name] = neurons

    def next_call(self, module: str) -> int:
        """Count the calls of a module within one forward pass, from 0 on."""
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        return call

    def take(self) -> Tensor:
        """Return the neurons of all points side by side, shape (B, N), and start anew.

        Raises
        ------
        CovcliError
            If a point was not reached by the forward pass.
        """
        missing = [p.name for p in self.points if p.name not in self._values]
        if missing:
            raise CovcliError(f"coverage point {missing[0]!r} was not reached", where="the network")
        parts = [self._values[point.name] for point in self.points]
        neurons = torch.cat(parts, 1) if parts else torch.empty(0, 0)
        self._values.clear()
        self._calls.clear()
        return neurons


@contextmanager
def capture(
    model: nn.Module, points: Sequence[Point], granularity: Granularity
) -> Iterator[Recorder]:
    """Record neurons at the points during the block; the hooks are always removed.

    Pooling happens inside the hooks, so a later in-place operation cannot change what was seen
    and no full activation is kept. Gradients flow through it.
    """
    recorder = Recorder(points)
    modules = dict(model.named_modules())
    by_module: dict[str, dict[int, Point]] = {}
    for point in points:
        by_module.setdefault(point.module, {})[point.call] = point

    def hook_for(name: str, calls: dict[int, Point]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            point = calls.get(recorder.next_call(name))
            if point is not None:
                recorder.note(point, pool(output, point.channel_dim, granularity))

        return hook

    handles = [
        modules[name].register_forward_hook(hook_for(name, calls))
        for name, calls in by_module.items()
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def find_points(model: nn.Module, example: Tensor, granularity: Granularity) -> list[Point]:
    """Choose a network's coverage points by watching one forward pass.

    CoverageLayer modules where the network has any; else its activation functions; else its
    normalisation layers; else its convolutions and linear layers but the last.

    Parameters
    ----------
    model
        The network.
    example
        One batch of images, shape (B, C, H, W); the values do not matter.
    granularity
        Decides how many neurons a point has.

    Raises
    ------
    CovcliError
        If the network calls no layer of any of these kinds.
    """
    kinds: list[tuple[type[nn.Module], ...]] = [
        (CoverageLayer,), ACTIVATIONS, NORMALISATIONS, (nn.Conv2d, nn.Linear)
    ]  # fmt: skip
    for kind in kinds:
        points = _watch(model, example, granularity, kind)
        if kind == kinds[-1]:
            points = points[:-1]
        if points:
            return points
    raise CovcliError("no layer to record", where=type(model).__name__, fix="place CoverageLayer()")


def _watch(
    model: nn.Module, example: Tensor, granularity: Granularity, kind: tuple[type[nn.Module], ...]
) -> list[Point]:
    points: list[Point] = []
    calls: dict[str, int] = {}
    linear_outputs: list[Tensor] = []  # kept alive, so that identities stay unique

    def remember(_module: nn.Module, _inputs: Any, output: Any) -> None:
        linear_outputs.append(output)

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim < 2:
                return
            call = calls[name] = calls.get(name, -1) + 1
            dim = getattr(module, "channel_dim", None)
            if dim is None:
                # After a linear layer the channels come last (transformers, ConvNeXt).
                last = output.ndim == 3 or any(inputs[0] is seen for seen in linear_outputs)
                dim = -1 if last else 1
            label = name if call == 0 else f"{name}#{call + 1}"
            neurons = pool(output, dim, granularity).shape[1]
            points.append(Point(label, name, call, dim, neurons))

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(remember))
        if isinstance(module, kind):
            handles.append(module.register_forward_hook(hook_for(name)))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return points
