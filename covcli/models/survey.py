"""Discovery of the places in a network where activations can be recorded, and the default choice.

Two forward passes are observed, of two and of three images. The dimension of an output that changes
is the dimension of the images.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.specs import suggestion
from covcli.methods.state import Granularity
from covcli.models import functions
from covcli.models.functions import Calls, Function, activation_of
from covcli.models.points import (
    ACTIVATIONS,
    BatchPlace,
    CoverageLayer,
    Point,
    arrange,
    first_tensor,
)
from covcli.models.pooling import pool

log = logging.getLogger(__name__)
Kind: TypeAlias = Literal[
    "marked", "activation", "attention", "normalisation", "layer", "gate", "module"
]
Key: TypeAlias = tuple[str, str, int, Kind]
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
# The default coverage points: the first of these kinds that the network has.
DEFAULTS: tuple[tuple[Kind, ...], ...] = (
    ("marked",), ("activation", "attention"), ("normalisation",), ("layer",)
)  # fmt: skip
GATES = (nn.Sigmoid, nn.Hardsigmoid)
IMAGES = (2, 3)
# The largest difference of an image's outputs in two batches, as a share of the largest value.
ALIKE = 1e-3
SHOWN = 20  # names in an error


@dataclass(frozen=True)
class Candidate:
    """A place that could be a coverage point.

    Attributes
    ----------
    point
        The coverage point that it would be.
    kind
        "marked" by a CoverageLayer, "activation", "attention" (a block with attention, or attention
        without a block), "normalisation", "layer" (a convolution or linear layer), "gate" (a
        sigmoid multiplied with another tensor than its input) or another "module".
    what
        The class of the module, or the function.
    shape
        The shape of its output for one image.
    """

    point: Point
    kind: Kind
    what: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Survey:
    """The result of observing two forward passes.

    Attributes
    ----------
    candidates
        The possible coverage points, in the order of the pass.
    unwatchable
        Names of activations whose outputs cannot be divided by image.
    outputs
        The network's outputs for two images, and for the same two and a third.
    """

    candidates: Sequence[Candidate]
    unwatchable: Sequence[str]
    outputs: tuple[Any, Any]

    def choose(self, patterns: Sequence[str] = ()) -> list[Candidate]:
        """Return the coverage points.

        The default is the first of these that the network has: CoverageLayer modules; activations
        and the outputs of attention blocks; normalisation layers; convolutions and linear layers
        except the last.

        Parameters
        ----------
        patterns
            Names with `*` and `?`. Each chooses among the default points or, if none of them
            matches, among all modules.

        Raises
        ------
        CovcliError
            If the network has no such layer, or a pattern matches none.
        """
        usual = self._usual()
        if not patterns:
            if not usual:
                raise CovcliError(
                    "no layer to record", where="the network", fix="place CoverageLayer()"
                )
            return usual
        chosen: set[str] = set()
        for pattern in patterns:
            matching = _matching(usual, pattern) or _matching(self.candidates, pattern)
            if not matching:
                names = [each.point.name for each in usual or self.candidates]
                raise CovcliError(
                    f"matches no coverage point {pattern!r}",
                    where="--points",
                    fix=suggestion(pattern, names[:SHOWN]),
                )
            chosen |= {each.point.name for each in matching}
        return [each for each in self.candidates if each.point.name in chosen]

    def _usual(self) -> list[Candidate]:
        for kinds in DEFAULTS:
            matching = [each for each in self.candidates if each.kind in kinds]
            if kinds == DEFAULTS[-1]:
                matching = matching[:-1]
            if matching:
                return matching
        return []


def _matching(candidates: Sequence[Candidate], pattern: str) -> list[Candidate]:
    return [each for each in candidates if fnmatchcase(each.point.name, pattern)]


def find_points(
    model: nn.Module,
    example: Tensor,
    granularity: Granularity,
    patterns: Sequence[str] = (),
) -> list[Point]:
    """Choose a network's coverage points by running it on noise; see `Survey.choose`.

    Parameters
    ----------
    model
        The network.
    example
        Images of the network's size and type, shape (B, C, H, W); the values do not matter.
    granularity
        What the neurons are, see `pool`.
    patterns
        Patterns of names; empty for the default points.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    >>> [(p.name, p.neurons) for p in find_points(network, torch.rand(1, 3, 8, 8), "channel")]
    [('1', 16)]
    """
    return [each.point for each in look(model, example, granularity).choose(patterns)]


def look(model: nn.Module, example: Tensor, granularity: Granularity) -> Survey:
    """Observe a network, in evaluation mode, on noise of an example's shape."""
    training = [module for module in model.modules() if module.training]
    generator = torch.Generator().manual_seed(0)
    shape = IMAGES[1], *example.shape[1:]
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    images = noise.to(example.device, example.dtype)
    watchers = [_Watcher(model), _Watcher(model)]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            few, more = (w.watch(images[:n]) for w, n in zip(watchers, IMAGES, strict=True))
    finally:
        for module in training:
            module.training = True
    candidates, unwatchable = [], []
    for key, event in watchers[0].events.items():
        batch = _batch(event, watchers[1].events.get(key))
        name = _name(key)
        if batch is not None:
            candidates.append(_candidate(key, event, batch, granularity))
        elif key[3] in ("activation", "attention"):
            unwatchable.append(name)
    return Survey(candidates, unwatchable, (few, more))


@dataclass(frozen=True)
class _Event:
    """The output at one place in a forward pass.

    Attributes
    ----------
    what
        The module's class, or the function.
    output
        The output; a tensor on the meta device if only its shape is needed.
    dim
        The likely dimension of the channels.
    """

    what: str
    output: Tensor
    dim: int


class _Gates:
    """Follows sigmoids to what they are multiplied with: `x * sigmoid(x)` is an activation."""

    def __init__(self) -> None:
        self._source: dict[int, tuple[Key, int]] = {}  # what a tensor is a sigmoid of
        self._scaled: dict[int, int] = {}  # what a tensor is a multiple of
        self._kept: list[Tensor] = []  # so that identities stay unique

    def opened(self, key: Key, given: Tensor | None, output: Tensor) -> None:
        """Note a sigmoid."""
        self._kept += [output] if given is None else [output, given]
        self._source[id(output)] = key, self._root(given)

    def see(self, function: Function, args: Sequence[Any], output: Tensor) -> Key | None:
        """Follow a call; return which sigmoid it makes a gate, if any."""
        if function in functions.RESHAPING and args:
            self._passed_on(args[0], output)
        if function not in functions.TIMES or len(args) < 2:
            return None
        one, two = args[:2]
        for this, other in ((one, two), (two, one)):
            if not isinstance(other, Tensor) or other.numel() == 1:  # a factor
                if isinstance(this, Tensor):
                    self._scaled[id(output)] = self._root(this)
                    self._kept += [this, output]
                    self._passed_on(this, output)
                return None
            key, source = self._source.get(id(this), (None, 0))
            if key is not None and self._root(other) != source:
                return key
        return None

    def _passed_on(self, tensor: Tensor, output: Tensor) -> None:
        """Let what comes of a tensor stand for the same sigmoid."""
        if id(tensor) in self._source:
            self._source[id(output)] = self._source[id(tensor)]
            self._kept.append(output)

    def _root(self, tensor: Tensor | None) -> int:
        return self._scaled.get(id(tensor), id(tensor))


class _Watcher:
    """Observes one forward pass of a network."""

    def __init__(self, model: nn.Module) -> None:
        self.events: dict[Key, _Event] = {}
        self._gates = _Gates()
        self._model = model
        self._images = 0
        self._inside: list[tuple[str, nn.Module]] = []
        self._count: Counter[tuple[str, str]] = Counter()
        self._attending: set[str] = set()
        # Kept alive, so that identities stay unique.
        self._kept: list[Tensor] = []
        self._dims: dict[int, int] = {}
        self._weights: set[int] = set()  # of attention

    def watch(self, images: Tensor) -> Any:
        """Run the network, and return its output."""
        self._images = len(images)
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(module.register_forward_hook(partial(self._leave, name)))
        try:
            with Calls(self._called):
                return self._model(images)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, _inputs: Any) -> None:
        self._inside.append((name, module))

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.pop()
        tensor = first_tensor(output)
        call = self._count[name, ""]
        self._count[name, ""] += 1
        if not name:
            self._claim_attention()
        elif tensor is not None:
            kind = self._kind(name, module)
            given = first_tensor(inputs)
            key: Key = name, "", call, kind
            self._note(key, type(module).__name__, given, tensor, module)
            if isinstance(module, GATES):
                self._gates.opened(key, given, tensor)

    def _claim_attention(self) -> None:
        """Mark modules with attention outside any block as attention."""
        for key in [key for key in self.events if key[0] in self._attending and not key[1]]:
            self._change(key, "attention")

    def _change(self, key: Key, kind: Kind) -> None:
        self.events = {
            (*old[:3], kind) if old == key else old: event for old, event in self.events.items()
        }

    def _kind(self, name: str, module: nn.Module) -> Kind:
        if isinstance(module, CoverageLayer):
            return "marked"
        if isinstance(module, ACTIVATIONS):
            return "activation"
        if not isinstance(module, nn.Sequential | nn.ModuleList) and self._ends_block(name):
            return "attention"
        if isinstance(module, NORMALISATIONS):
            return "normalisation"
        return "layer" if isinstance(module, nn.Conv2d | nn.Linear) else "module"

    def _ends_block(self, name: str) -> bool:
        """Return whether a module is an attention block: the innermost with an activation too."""

        def within(inner: str) -> bool:
            return inner == name or inner.startswith(f"{name}.")

        attending = {inner for inner in self._attending if within(inner)}
        active = any(
            key[3] == "activation" and within(key[0]) and self._of_images(event.output)
            for key, event in self.events.items()
        )
        if len(attending) != 1 or not active:  # several are a stack of blocks
            return False
        self._attending -= attending
        return True

    def _of_images(self, output: Tensor) -> bool:
        return output.shape[0] % self._images == 0 or output.shape[1] == self._images

    def _called(
        self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if not isinstance(output, Tensor) and function not in functions.ATTENTION:
            return
        if isinstance(output, Tensor) and (gate := self._gates.see(function, args, output)):
            self._change(gate, "gate")
        name, module = self._inside[-1] if self._inside else ("", self._model)
        activation = activation_of(function, args, kwargs)
        if activation is not None and not isinstance(module, ACTIVATIONS):
            call = self._count[name, activation]
            self._count[name, activation] += 1
            given = first_tensor(args)
            key: Key = name, activation, call, "activation"
            self._note(key, activation, given, output, None)
            if activation in functions.MAY_GATE:
                self._gates.opened(key, given, output)
        elif function in functions.ATTENTION or self._weighs(function, args, output):
            self._attending.add(name)
        elif function in functions.CHANNELS_LAST and output.ndim > 3:
            self._remember(output, -1)
        elif function in functions.CHANNELS_SECOND and output.ndim == 3:
            self._remember(output, 1)

    def _weighs(self, function: Function, args: Sequence[Any], output: Tensor) -> bool:
        """Return whether a call multiplies by weights that a softmax gave."""
        if function in functions.SOFTMAX:
            self._weights.add(id(output))
            self._kept.append(output)
        weights = bool(args) and id(args[0]) in self._weights
        if weights and function in functions.DROPOUT:
            self._weights.add(id(output))
            self._kept.append(output)
        return weights and function in functions.PRODUCTS

    def _remember(self, output: Tensor, dim: int) -> None:
        self._dims[id(output)] = dim
        self._kept.append(output)

    def _note(
        self, key: Key, what: str, given: Tensor | None, output: Tensor, module: nn.Module | None
    ) -> None:
        if output.ndim < 2:
            return
        usual = -1 if output.ndim == 3 else 1  # tokens, or channels after the batch
        dim = getattr(module, "channel_dim", None)
        if dim is None:
            dim = self._dims.get(id(output), self._dims.get(id(given)))
        attends = key[3] == "attention" or key[0] in self._attending
        if dim is None and attends and module is not None:
            dim = _attention_dim(module, output)
        if dim not in (None, usual):
            self._remember(output, dim)
        # With more parts than images, the values are needed to assign parts to images.
        parts = output.shape[0] != self._images and output.shape[0] % self._images == 0
        kept = output.clone() if parts else output.to("meta")
        self.events[key] = _Event(what, kept, usual if dim is None else dim)


def _attention_dim(module: nn.Module, output: Tensor) -> int | None:
    """Return the dimension of the channels of attention, by the kind of its projection layer."""
    if any(
        isinstance(m, nn.Conv2d) and m.out_channels == output.shape[1] for m in module.modules()
    ):
        return 1
    linear = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    return -1 if output.shape[-1] in linear else None


def _batch(few: _Event, more: _Event | None) -> BatchPlace | None:
    """Return the dimension of the images in an output; None if it cannot be divided by image."""
    if more is None or few.output.ndim != more.output.ndim:
        return None
    one, two = few.output.shape, more.output.shape
    changed = [d for d in range(few.output.ndim) if one[d] != two[d]]
    if changed == [1] and (one[1], two[1]) == IMAGES:
        return "second"
    if changed != [0] or one[0] * IMAGES[1] != two[0] * IMAGES[0]:
        return None
    if one[0] == IMAGES[0]:
        return "first"
    ways: tuple[BatchPlace, ...] = ("folded", "interleaved")
    return next((way for way in ways if _alike(few.output, more.output, way)), None)


def _alike(few: Tensor, more: Tensor, batch: BatchPlace) -> bool:
    """Return whether the images have the same outputs in a larger batch."""
    one, two = arrange(few, batch, IMAGES[0]), arrange(more, batch, IMAGES[1])[: IMAGES[0]]
    return alike(one, two)


def alike(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors differ only by rounding."""
    apart = (one - two).abs().max() if one.numel() else torch.zeros(())
    return bool(apart <= ALIKE * one.abs().max().clamp_min(1e-12))


def _name(key: Key) -> str:
    module, function, call, _ = key
    name = f"{module or 'forward'}:{function}" if function else module
    return name if call == 0 else f"{name}#{call + 1}"


def _candidate(key: Key, event: _Event, batch: BatchPlace, granularity: Granularity) -> Candidate:
    module, function, call, kind = key
    output, dim = arrange(event.output, batch, IMAGES[0]), event.dim
    if output.ndim > event.output.ndim and dim > 0:
        dim += 1  # the parts of an image come before its channels
    neurons = pool(output, dim, granularity).shape[1]
    halves = 2 if granularity == "channel" and output.ndim > 2 else 1
    name = _name(key)
    point = Point(name, module, call, dim, neurons, neurons // halves, function, batch)
    return Candidate(point, kind, event.what, tuple(output.shape[1:]))
