"""Coverage points: where activations are recorded, and how they become neurons."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from covcli.core.errors import CovcliError
from covcli.methods.state import Granularity
from covcli.models.functions import Calls, Function, activation_of
from covcli.models.pooling import pool, statistics

# Where an output holds the images of a batch: in its first or second dimension, or in the first
# together with parts of each image (windows), image by image or part by part.
BatchPlace: TypeAlias = Literal["first", "second", "folded", "interleaved"]
# An activation's module calls a function itself, which is no point of its own.
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Threshold, nn.Tanh,
)  # fmt: skip


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
    """One coverage point: what a module returns, or a function that is called in its `forward`.

    Attributes
    ----------
    name
        The module's name in the network, and the function's after a colon; `#2` and so on follow
        where it is called repeatedly.
    module
        The module's name alone.
    call
        Which call of the module, or of the function in it, within one forward pass, from 0 on.
    channel_dim
        Which dimension of its output counts channels, after `arrange`.
    neurons
        How many neurons it has at the granularity asked for.
    values
        How many of them, the first ones, are means or values; the others are maxima.
    function
        The function's name, as "relu"; "" for what the module returns.
    batch
        Where its output holds the images of a batch.
    """

    name: str
    module: str
    call: int
    channel_dim: int
    neurons: int
    values: int
    function: str = ""
    batch: BatchPlace = "first"

    def __post_init__(self) -> None:
        """Check what was read of a file."""
        if self.batch not in get_args(BatchPlace):
            raise ValueError(f"batch {self.batch!r}")

    def arrange(self, output: Tensor, images: int) -> Tensor:
        """Return an output with the images of the batch in its first dimension, one each."""
        return arrange(output, self.batch, images)


def arrange(output: Tensor, batch: BatchPlace, images: int) -> Tensor:
    """Return an output with the images of a batch in its first dimension, one each.

    >>> windows = torch.zeros(6, 49, 32)  # three of each of two images
    >>> arrange(windows, "folded", 2).shape
    torch.Size([2, 3, 49, 32])
    """
    if batch == "first":
        return output
    if batch == "second":
        return output.transpose(0, 1)
    if batch == "folded":
        folded: Tensor = output.unflatten(0, (images, -1))
        return folded
    interleaved: Tensor = output.unflatten(0, (-1, images))
    return interleaved.transpose(0, 1)


def first_tensor(output: Any) -> Tensor | None:
    """Return what a module returned if it is a tensor, or the first of a tuple (attention)."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


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


@dataclass
class _Place:
    """Where the forward pass of a thread is: how many images, in which modules, what was called."""

    running: bool = False
    images: int = 0
    count: Counter[tuple[str, str]] = field(default_factory=Counter)
    inside: list[str] = field(default_factory=list)  # whose forward runs, the innermost last
    calls: Calls | None = None


class Outputs:
    """Shows every point's whole output during a `with` block; the hooks are always removed.

    Passes in several threads are counted apart, each by itself. Where a point is a function, hooks
    on all modules follow which one calls it, and torch shows its functions during each pass.

    Parameters
    ----------
    model
        The network.
    points
        Its coverage points, or some of them.
    see
        Called with a point and its output, arranged by image.
    raw
        Whether outputs are shown as they are instead, for gradients.
    when
        Asked at the beginning of each pass whether to show it; None shows every pass.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[Point],
        see: Callable[[Point, Tensor], None],
        raw: bool = False,
        when: Callable[[], bool] | None = None,
    ) -> None:
        self._model = model
        self._see = see
        self._raw = raw
        self._when = when
        self._points = {(p.module, p.function, p.call): p for p in points}
        self._functions = {(p.module, p.function) for p in points if p.function}
        self._places = _PerThread(_Place)
        self._handles: list[RemovableHandle] = []
        modules = dict(model.named_modules())
        if missing := [p for p in points if p.module not in modules]:
            raise CovcliError(f"has no module {missing[0].module!r}", where="the network")
        # Not closures, which could neither be pickled nor copied with the network.
        self._hooks = [
            (modules[name], partial(self._end, name))
            for name in dict.fromkeys(p.module for p in points if not p.function)
        ]

    @property
    def images(self) -> int:
        """How many images this thread's last pass had."""
        return self._places.state.images

    def attach(self) -> None:
        """Put the hooks on the network."""
        self._handles = [self._model.register_forward_pre_hook(self._begin)]
        for name, module in self._model.named_modules() if self._functions else ():
            before = module.register_forward_pre_hook(partial(self._enter, name))
            after = module.register_forward_hook(self._leave, always_call=True)
            self._handles += [before, after]
        self._handles += [module.register_forward_hook(hook) for module, hook in self._hooks]
        self._handles.append(self._model.register_forward_hook(self._finish, always_call=True))

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, _model: nn.Module, inputs: Any) -> None:
        state = self._places.state
        state.running = self._when is None or self._when()
        state.images = inputs[0].shape[0]  # `len` would fix the batch of an export
        state.count.clear()
        state.inside.clear()
        if self._functions and state.running:
            state.calls = Calls(self._called)
            state.calls.__enter__()

    def _finish(self, _model: nn.Module, _inputs: Any, _output: Any) -> None:
        state = self._places.state
        state.running = False
        if state.calls is not None:
            state.calls.__exit__(None, None, None)
            state.calls = None

    def _enter(self, name: str, module: nn.Module, _inputs: Any) -> None:
        # What an activation's module calls is no function of a point.
        self._places.state.inside.append(
            name if not isinstance(module, ACTIVATIONS) else f"{name}:"
        )

    def _leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._places.state.inside:
            self._places.state.inside.pop()

    def _called(
        self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        activation = activation_of(function, args, kwargs)
        inside = self._places.state.inside
        if activation is not None and inside and (inside[-1], activation) in self._functions:
            self._show(inside[-1], activation, output)

    def _end(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._show(name, "", output)

    def _show(self, module: str, function: str, output: Any) -> None:
        state = self._places.state
        if not state.running:
            return
        call = state.count[module, function]
        state.count[module, function] = call + 1
        point = self._points.get((module, function, call))
        tensor = first_tensor(output)
        if point is not None and tensor is not None:
            self._see(point, tensor if self._raw else point.arrange(tensor, state.images))

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
        self._passes = _PerThread(_Pass)
        self._outputs = Outputs(
            model, points, self._note, raw=granularity == "contribution", when=self._listens
        )
        self._stays = False

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

    def _listens(self) -> bool:
        return self._passes.state.listening

    def _note(self, point: Point, output: Tensor) -> None:
        """Keep what a hook saw: neurons, or for contributions the activations until `take`."""
        seen = self._passes.state
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
            parts = [
                self._total(point, activation) * self._total(point, gradient)
                for point, activation, gradient in zip(
                    self.points, parts, certainty_gradients(logits, parts), strict=True
                )
            ]
        neurons = seen.units
        if neurons is None:
            neurons = torch.cat(parts, 1) if parts else torch.empty(0, 0)
        seen.clear()
        return neurons

    def _total(self, point: Point, output: Tensor) -> Tensor:
        """Return the sums over the positions of a raw output, or of its derivative."""
        arranged = point.arrange(output.detach(), self._outputs.images)
        return pool(arranged, point.channel_dim, "contribution")


def certainty_gradients(logits: Tensor, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the derivative of the network's certainty by each activation, of its shape.

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
    certainty = -logits.log_softmax(1).mean(1).sum()
    return torch.autograd.grad(certainty, list(activations))
