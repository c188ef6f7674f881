"""Coverage points: the places where activations are recorded and reduced to neurons."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from covcli.core.errors import CovcliError
from covcli.methods.state import Granularity
from covcli.models.functions import Calls, Function, activation_of
from covcli.models.pooling import joined, pool, statistics

# The dimension of the images of a batch in an output: the first, the second, or the first together
# with parts of each image (windows), ordered by image ("folded") or by part ("interleaved").
BatchPlace: TypeAlias = Literal["first", "second", "folded", "interleaved"]
# These modules call an activation function themselves; that call is not a separate point.
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Threshold, nn.Tanh, nn.Sigmoid,
    nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.GLU,
)  # fmt: skip


class CoverageLayer(nn.Module):
    """The identity; marks a place in a network where covcli records activations.

    Parameters
    ----------
    channel_dim
        The dimension of the channels: 1 for (B, C, H, W) and (B, C), -1 for tokens of shape
        (B, T, C).

    Examples
    --------
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), CoverageLayer(), nn.Linear(6, 2))
    >>> network(torch.rand(4, 3, 2, 2)).shape
    torch.Size([4, 2])
    """

    def __init__(self, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


@dataclass(frozen=True)
class Point:
    """One coverage point: the output of a module, or of a function called in its `forward`.

    Attributes
    ----------
    name
        The module's name in the network, then the function's name after a colon; `#2` and so on
        number repeated calls.
    module
        The module's name.
    call
        The number of the call within one forward pass, counted from 0.
    channel_dim
        The dimension of the channels in its output, after `arrange`.
    neurons
        The number of its neurons.
    values
        How many of the neurons are means or values; they come first, the maxima follow.
    function
        The function's name, such as "relu"; "" for the output of the module.
    batch
        The dimension of the images in its output.
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
        """Check a value that may come from a file."""
        if self.batch not in get_args(BatchPlace):
            raise ValueError(f"batch {self.batch!r}")

    def arrange(self, output: Tensor, images: int) -> Tensor:
        """Return an output with one entry per image in its first dimension."""
        return arrange(output, self.batch, images)


def arrange(output: Tensor, batch: BatchPlace, images: int) -> Tensor:
    """Return an output with one entry per image in its first dimension.

    Parameters
    ----------
    output
        The output.
    batch
        The dimension of the images in it.
    images
        The number of images.

    Examples
    --------
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
    """Return the output of a module if it is a tensor, or the first of a tuple, or None.

    Examples
    --------
    >>> first_tensor((torch.zeros(2), None)).shape
    torch.Size([2])
    """
    if isinstance(output, Tensor):
        return output
    first = output[0] if isinstance(output, tuple | list) and output else None
    return first if isinstance(first, Tensor) else None


T = TypeVar("T")


class _PerThread(threading.local, Generic[T]):
    """Thread-local state of a forward pass; a copy starts with fresh state.

    Parameters
    ----------
    begin
        Returns a thread's initial state.
    """

    def __init__(self, begin: Callable[[], T]) -> None:  # called in each thread
        self.begin = begin
        self.state = begin()

    def __reduce__(self) -> tuple[type["_PerThread[T]"], tuple[Callable[[], T]]]:
        return _PerThread, (self.begin,)


@dataclass
class _Pass:
    """The recorded outputs of the current pass, and memory for the units of the next pass."""

    listening: bool = False
    begun: bool = False
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    units: Tensor | None = None
    spare: Tensor | None = None

    def clear(self) -> None:
        """Discard the recorded outputs."""
        self.begun = False
        self.parts.clear()
        self.units = None


@dataclass
class _Place:
    """The progress of a thread's forward pass: images, modules entered and calls counted."""

    running: bool = False
    images: int = 0
    count: dict[tuple[str, str], int] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)  # whose forward runs, the innermost last
    calls: Calls | None = None


class Outputs:
    """Reports every point's full output during a `with` block; the hooks are always removed.

    Passes in several threads are tracked separately. If a point is a function, hooks on all modules
    track which module is running, and torch reports its function calls during each pass.

    Parameters
    ----------
    model
        The network.
    points
        Its coverage points, or some of them.
    see
        Called with a point and its output, arranged by image.
    raw
        Whether outputs are reported without `arrange`, to take gradients.
    when
        Called at the start of each pass; returns whether to report it. None reports every pass.
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
        """The number of images of this thread's last pass."""
        return self._places.state.images

    def attach(self) -> None:
        """Register the hooks on the network."""
        self._handles = [self._model.register_forward_pre_hook(self._begin)]
        for name, module in self._model.named_modules() if self._functions else ():
            before = module.register_forward_pre_hook(partial(self._enter, name))
            after = module.register_forward_hook(self._leave, always_call=True)
            self._handles += [before, after]
        self._handles += [module.register_forward_hook(hook) for module, hook in self._hooks]
        self._handles.append(self._model.register_forward_hook(self._finish, always_call=True))

    def detach(self) -> None:
        """Remove the hooks."""
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
        # A function that an activation module calls is not a separate point.
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
        call = state.count.get((module, function), 0)
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
    """Records the neurons of the last forward pass during a `with` block.

    Outputs are pooled inside the hooks, so that later in-place operations cannot change them and
    full activations are not kept (except for contributions). Gradients are preserved.

    Only passes in the thread of the block are recorded. Several threads can record at the same
    time, each its own passes.

    Parameters
    ----------
    model
        The network.
    points
        Its coverage points.
    granularity
        What the neurons are, see `pool`.

    Examples
    --------
    >>> from covcli.models.survey import find_points
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> images = torch.rand(4, 3, 2, 2)
    >>> with Recorder(network, find_points(network, images, "channel"), "channel") as recorder:
    ...     neurons = recorder.take(network(images))
    >>> neurons.shape
    torch.Size([4, 6])
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
        """Keep the hooks registered until `leave`; outside `with` blocks they do nothing.

        Each block records one pass then. A second one, of a hook that runs the network within that
        pass, raises a CovcliError: the outputs of the two would be mixed.
        """
        self._stays = True
        self._outputs.attach()

    def leave(self) -> None:
        """Remove the hooks."""
        self._stays = False
        self._outputs.detach()

    def begin(self) -> None:
        """Begin to record, as a `with` block does."""
        seen = self._passes.state
        self._refuse_nested(seen.listening)
        seen.clear()
        seen.listening = True
        if not self._stays:
            self._outputs.attach()

    def end(self) -> None:
        """End what `begin` began."""
        seen = self._passes.state
        seen.listening = False
        seen.clear()
        if not self._stays:
            self._outputs.detach()

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *_error: object) -> None:
        self.end()

    def reuse(self, neurons: Tensor | None) -> None:
        """Let this thread's next pass reuse the memory of these units, which are not used again."""
        self._passes.state.spare = neurons

    def _listens(self) -> bool:
        seen = self._passes.state
        self._refuse_nested(seen.begun)
        seen.begun = seen.listening
        return seen.listening

    def _refuse_nested(self, nested: bool) -> None:
        if self._stays and nested:
            raise CovcliError("is run again within its own pass", where="the network")

    def _note(self, point: Point, output: Tensor) -> None:
        """Store a hook's output: neurons, or for contributions the activations until `take`."""
        seen = self._passes.state
        if self.granularity == "contribution":
            seen.parts[point.name] = [output]
        elif self.granularity == "unit" and not torch.is_grad_enabled():
            seen.parts[point.name] = [self._keep(seen, point, output)]
        elif output.requires_grad and torch.is_grad_enabled():
            # Of its own, so that checkpointing, which counts saved tensors, does not count these.
            with saved_tensors_hooks(_same, _same):
                seen.parts[point.name] = statistics(output, point.channel_dim, self.granularity)
        else:
            seen.parts[point.name] = statistics(output, point.channel_dim, self.granularity)

    def _keep(self, seen: _Pass, point: Point, output: Tensor) -> Tensor:
        """Copy a point's units to their columns of the result, so that they are copied once."""
        sizes = [each.neurons for each in self.points]
        if seen.units is None:
            seen.units = self._memory(seen, output, sum(sizes))
        place: Tensor = seen.units.split(sizes, 1)[self.points.index(point)]
        last = output.movedim(point.channel_dim, -1)
        place.unflatten(1, last.shape[1:]).copy_(last)
        return place

    def _memory(self, seen: _Pass, output: Tensor, neurons: int) -> Tensor:
        """Return memory for a batch's units; reusing it is faster than allocating new memory."""
        shape, dtype = (output.shape[0], neurons), torch.promote_types(output.dtype, torch.float32)
        spare, seen.spare = seen.spare, None
        wanted = (shape, dtype, output.device)
        if spare is not None and (spare.shape, spare.dtype, spare.device) == wanted:
            return spare
        return output.new_empty(shape, dtype=dtype)

    def take(self, logits: Tensor) -> Tensor:
        """Return the neurons of all points, shape (B, N), and clear the record.

        Parameters
        ----------
        logits
            The logits of the pass, shape (B, classes); contributions are computed from them.

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
            neurons = joined(parts) if parts else torch.empty(0, 0)
        seen.clear()
        return neurons

    def _total(self, point: Point, output: Tensor) -> Tensor:
        """Return the sums over the positions of a raw output, or of its derivative."""
        arranged = point.arrange(output.detach(), self._outputs.images)
        return pool(arranged, point.channel_dim, "contribution")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def certainty_gradients(logits: Tensor, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the derivative of the network's certainty with respect to each activation.

    Certainty is the Kullback-Leibler divergence of the softmax from the uniform distribution. Up to
    a constant, that is the mean of −log p (Liu et al., "Neuron Activation Coverage", ICLR 2024,
    section 3.1).

    Parameters
    ----------
    logits
        Shape (B, classes), computed from the activations, with a gradient.
    activations
        Of any shapes (B, ...).
    """
    certainty = -logits.log_softmax(1).mean(1).sum()
    return torch.autograd.grad(certainty, list(activations))
