"""Coverage points: where activations are recorded, and how they become neurons."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from covcli.core.errors import CovcliError
from covcli.methods.state import Granularity
from covcli.models.pooling import pool, statistics

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
    values
        How many of them, the first ones, are means or values; the others are maxima.
    """

    name: str
    module: str
    call: int
    channel_dim: int
    neurons: int
    values: int


T = TypeVar("T")


class _PerThread(threading.local, Generic[T]):
    """State of the forward pass that runs in this thread; a copy begins anew.

    Parameters
    ----------
    begin
        Returns the state that a thread begins with.
    """

    def __init__(self, begin: Callable[[], T]) -> None:  # called in each thread
        self.begin = begin
        self.state = begin()

    def __reduce__(self) -> tuple[type["_PerThread[T]"], tuple[Callable[[], T]]]:
        return _PerThread, (self.begin,)


@dataclass
class _Pass:
    """What a pass has shown so far, if it is recorded, and memory for the units of the next."""

    listening: bool = False
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    units: Tensor | None = None
    spare: Tensor | None = None

    def clear(self) -> None:
        """Forget the pass."""
        self.parts.clear()
        self.units = None


class Outputs:
    """Shows every point's whole output during a `with` block; the hooks are always removed.

    Passes in several threads are counted apart, each by itself.

    Parameters
    ----------
    model
        The network.
    points
        Its coverage points, or some of them.
    see
        Called with a point and its output.
    """

    def __init__(
        self, model: nn.Module, points: Sequence[Point], see: Callable[[Point, Tensor], None]
    ) -> None:
        modules = dict(model.named_modules())
        self._model = model
        self._see = see
        by_module: dict[str, dict[int, Point]] = {}
        for point in points:
            by_module.setdefault(point.module, {})[point.call] = point
        self._calls = _PerThread[Counter[str]](Counter)
        # Not closures, which could neither be pickled nor copied with the network.
        self._hooks = [
            (modules[name], partial(self._end, name, calls)) for name, calls in by_module.items()
        ]
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on the network."""
        self._handles = [self._model.register_forward_pre_hook(self._begin)]
        self._handles += [module.register_forward_hook(hook) for module, hook in self._hooks]

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, _model: nn.Module, _inputs: Any) -> None:
        self._calls.state.clear()

    def _end(
        self, name: str, points: Mapping[int, Point], _module: nn.Module, _inputs: Any, output: Any
    ) -> None:
        calls = self._calls.state
        call = calls[name]
        calls[name] = call + 1
        point = points.get(call)
        if point is not None:
            self._see(point, output)

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()


class Recorder:
    """What the last forward pass showed at the points; records during a `with` block.

    Pooling happens inside the hooks, so a later in-place operation cannot change what was seen
    and no full activation is kept, except for contributions. Gradients flow through it.

    It records the passes of the thread that the block runs in, and no others: several threads can
    record at once, each its own passes, while others call the network unrecorded.

    Parameters
    ----------
    model
        The network.
    points
        Its coverage points.
    granularity
        What the neurons are.
    """

    def __init__(self, model: nn.Module, points: Sequence[Point], granularity: Granularity) -> None:
        self.points = points
        self.granularity = granularity
        self._outputs = Outputs(model, points, self._note)
        self._stays = False
        self._passes = _PerThread(_Pass)

    def stay(self) -> None:
        """Leave the hooks on the network until `leave`; outside `with` blocks they do nothing."""
        self._stays = True
        self._outputs.attach()

    def leave(self) -> None:
        """Take the hooks off again."""
        self._stays = False
        self._outputs.detach()

    def __enter__(self) -> Self:
        seen = self._passes.state
        seen.clear()
        seen.listening = True
        if not self._stays:
            self._outputs.attach()
        return self

    def __exit__(self, *_error: object) -> None:
        seen = self._passes.state
        seen.listening = False
        seen.clear()
        if not self._stays:
            self._outputs.detach()

    def reuse(self, neurons: Tensor | None) -> None:
        """Let this thread's next pass write its units over these, which nobody reads any more."""
        self._passes.state.spare = neurons

    def _note(self, point: Point, output: Tensor) -> None:
        """Keep what a hook saw: neurons, or for contributions the activations until `take`."""
        seen = self._passes.state
        if not seen.listening:
            return
        if self.granularity == "contribution":
            seen.parts[point.name] = [output]
        elif self.granularity == "unit" and not torch.is_grad_enabled():
            seen.parts[point.name] = [self._keep(seen, point, output)]
        else:
            seen.parts[point.name] = statistics(output, point.channel_dim, self.granularity)

    def _keep(self, seen: _Pass, point: Point, output: Tensor) -> Tensor:
        """Copy a point's units to their place among all neurons, which saves copying them twice."""
        sizes = [each.neurons for each in self.points]
        if seen.units is None:
            seen.units = self._room(seen, output, sum(sizes))
        place: Tensor = seen.units.split(sizes, 1)[self.points.index(point)]
        last = output.movedim(point.channel_dim, -1)
        place.unflatten(1, last.shape[1:]).copy_(last)
        return place

    def _room(self, seen: _Pass, output: Tensor, neurons: int) -> Tensor:
        """Return memory for a batch's units; touching fresh memory costs more than the copying."""
        shape, dtype = (output.shape[0], neurons), torch.promote_types(output.dtype, torch.float32)
        spare, seen.spare = seen.spare, None
        wanted = (shape, dtype, output.device)
        if spare is not None and (spare.shape, spare.dtype, spare.device) == wanted:
            return spare
        return output.new_empty(shape, dtype=dtype)

    def take(self, logits: Tensor) -> Tensor:
        """Return the neurons of all points side by side, shape (B, N), and start anew.

        Parameters
        ----------
        logits
            What the pass returned, shape (B, classes): contributions are of their certainty.

        Raises
        ------
        CovcliError
            If a point was not reached by the forward pass.
        """
        seen = self._passes.state
        missing = [p.name for p in self.points if p.name not in seen.parts]
        if missing:
            raise CovcliError(f"coverage point {missing[0]!r} was not reached", where="the network")
        parts = [part for point in self.points for part in seen.parts[point.name]]
        if self.granularity == "contribution":
            dims = [point.channel_dim for point in self.points]
            products = contributions(logits, parts)
            parts = [pool(p, d, "contribution") for p, d in zip(products, dims, strict=True)]
        neurons = seen.units
        if neurons is None:
            neurons = torch.cat(parts, 1) if parts else torch.empty(0, 0)
        seen.clear()
        return neurons


def contributions(logits: Tensor, activations: Sequence[Tensor]) -> list[Tensor]:
    """Return each activation times the derivative of the network's certainty by it.

    Certainty is the Kullback-Leibler divergence of the softmax from the uniform distribution, but
    for a constant the mean of −log p (Liu et al., "Neuron Activation Coverage", ICLR 2024,
    section 3.1).

    Parameters
    ----------
    logits
        Shape (B, classes), with a graph that reaches the activations.
    activations
        Of any shapes (B, ...).
    """
    certainty = -(logits.softmax(1) + 1e-12).log().mean(1).sum()
    gradients = torch.autograd.grad(certainty, list(activations))
    return [(a * g).detach() for a, g in zip(activations, gradients, strict=True)]


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
            halves = 2 if granularity == "channel" and output.ndim > 2 else 1
            points.append(Point(label, name, call, dim, neurons, neurons // halves))

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
