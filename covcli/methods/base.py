"""The base classes of methods: a state accumulated over batches, and a scorer computed from it."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.specs import Registry, fraction, parse, up_to
from covcli.methods.layout import Layout
from covcli.methods.state import Expected, Granularity, State, check_tensors

# At most this many neurons of each image are scored at once, or those of one point if it has more.
PIECE = 1 << 16
# The largest number of entries of a matrix that sums the costs of all points.
MEMBERS = 1 << 17
# Row numbers, int64; or a slice of all rows.
Rows: TypeAlias = Tensor | slice
COUNT_TYPES = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Method(ABC):
    """A method that summarises trusted activations and scores new inputs against the summary.

    A subclass is a frozen dataclass, registered by `@METHODS.add(NAME)`. Its fields are the
    parameters, written in a specification as `name?field=value`. It implements the equations for a
    batch of neurons; accumulation, merging, files, standardisation and calibration are generic. A
    larger score always means less trusted.

    Attributes
    ----------
    name
        The name in the registry.
    kinds
        The number of kinds of evidence. Each kind has a column per coverage point.
    contributions
        Whether its neurons are contributions to the network's certainty (activations times
        gradients) instead of activations.
    experts
        Whether its calibration learns weights of the evidence columns from surrogate outliers.
    plain
        Whether its score is the mean of its columns, without standardisation.
    mergeable
        Whether condensed states can be merged; otherwise only complete ones.
    counts
        The names of the state's int32 tensors of many counts.

    Examples
    --------
    A method whose evidence is the distance from the mean of all trusted images:

    >>> from covcli.signature.fit import fold
    >>> class DistanceScorer(Scorer):
    ...     def forward(self, neurons, classes):
    ...         return self.layout.means(self.costs(neurons, classes))
    ...     def costs(self, neurons, classes):
    ...         return (neurons - self.mean).abs()
    ...     def inside(self, neurons, classes):
    ...         return self.costs(neurons, classes) < 1
    ...     def span(self, classes):
    ...         mean = self.mean.expand(len(classes), -1)
    ...         return mean - 1, mean + 1
    >>> @METHODS.add("distance")
    ... @dataclass(frozen=True)
    ... class Distance(Method):
    ...     name = "distance"
    ...     def begin(self, layout):
    ...         return State.of_sums(layout, self.expected(layout))
    ...     def observe(self, state, neurons, labels):
    ...         state["total"].add_((neurons.double() * 1024).round().long().sum(0))
    ...         state["count"].add_(len(neurons))
    ...     def prepare(self, state):
    ...         mean = state["total"] / 1024 / state["count"]
    ...         return DistanceScorer(state.layout, {"mean": mean})
    ...     def expected(self, layout):
    ...         return {"total": (torch.int64, (layout.neurons,)), "count": (torch.int64, ())}
    >>> layout = Layout(classes=2, sizes=(3,), values=(3,))
    >>> batch = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
    >>> scorer = Distance().prepare(fold(Distance(), layout, lambda: [batch]))
    >>> scorer(torch.full((1, 3), 4.0), torch.tensor([0])).tolist()
    [[3.0]]
    """

    name: ClassVar[str]
    kinds: ClassVar[int] = 1
    contributions: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """Raise a CovcliError if an overridden function takes other parameters."""
        for name in Method.__dict__.keys() & cls.__dict__.keys():
            function, own = (getattr(kind, name) for kind in (Method, cls))
            if name.startswith("_") or not (inspect.isfunction(function) and callable(own)):
                continue
            wanted, taken = (list(inspect.signature(f).parameters) for f in (function, own))
            if len(taken) != len(wanted):
                raise CovcliError(
                    f"{name} takes ({', '.join(taken)})",
                    where=f"method {cls.__name__}",
                    fix=f"let it take ({', '.join(wanted)})",
                )

    def reads(self, granularity: Granularity) -> Granularity:
        """Return the granularity of the method's neurons for a requested granularity.

        Raises
        ------
        CovcliError
            If the method does not support the requested granularity.
        """
        if not self.contributions:
            return granularity
        if granularity == "unit":
            raise CovcliError("reads channels only", where=f"method {self.name}")
        return "contribution"

    @abstractmethod
    def begin(self, layout: Layout) -> State:
        """Return the initial state, for a layout, of the first pass over the trusted images."""

    @abstractmethod
    def observe(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Accumulate one batch into the state.

        Parameters
        ----------
        state
            The state from `begin` or `proceed`; changed in place.
        neurons
            float32 of shape (B, N), finite.
        labels
            int64 of shape (B,).
        """

    def proceed(self, state: State) -> State | None:
        """Return the initial state of the next pass; None if the completed pass was the last."""
        return None

    def align(self, parts: Sequence[State]) -> list[State]:
        """Return complete states of disjoint images, converted so that they can be merged.

        The default returns them unchanged. A method whose first pass fixes values that differ
        between the parts, such as ranges, converts the parts to common values here.
        """
        return list(parts)

    def begin_noisy(self, state: State) -> State | None:
        """Return the initial state of a pass over noisy copies; None if the method needs none.

        The copies are made from some of the trusted images. The tensors of the pass are added to
        the complete `state` afterwards.
        """
        return None

    def observe_noisy(self, noisy: State, neurons: Tensor, labels: Tensor) -> None:
        """Accumulate a batch of noisy copies into the state from `begin_noisy`."""
        raise NotImplementedError

    def condense(self, sums: State, room: int | None = None) -> State:
        """Return what scoring reads, from the complete state that the passes accumulated.

        By default that is the state itself, with `counts` in the smallest type of integers that
        holds them. A method whose sums are much larger than what scoring reads computes that here,
        and sets `mergeable` to False.

        Parameters
        ----------
        sums
            The complete state, with the tensors of the pass over noisy copies.
        room
            The number of bytes that the result should take at most; None for no limit.
        """
        counts = {name: smallest(sums[name]) for name in self.counts}
        return sums.holding({**sums.tensors, **counts})

    def complete(self, state: State) -> State:
        """Return the complete state of a condensed one, if the method is `mergeable`."""
        kinds = self.expected(state.layout)
        return state.holding({name: t.to(kinds[name][0]) for name, t in state.tensors.items()})

    @abstractmethod
    def prepare(self, state: State) -> "Scorer":
        """Return the scorer of a condensed state, on the state's device."""

    @property
    def logit_evidence(self) -> str:
        """The evidence from the logits that joins the method's own: a name in LOGIT_EVIDENCE."""
        return "none"

    @property
    def generalist_kinds(self) -> tuple[int, ...]:
        """The kinds of evidence, from 0, with a generalist each; empty for one of all columns."""
        return ()

    @abstractmethod
    def expected(self, layout: Layout) -> Expected:
        """Return the type and shape of each tensor of a complete state, to check files."""

    def check(self, state: State) -> None:
        """Raise a ValueError unless a state from a file can be a condensed one."""
        expected = dict(self.expected(state.layout))
        for name in state.tensors.keys() & set(self.counts):
            if state[name].dtype in COUNT_TYPES:
                expected[name] = (state[name].dtype, expected[name][1])
        check_tensors(state, expected)
        if any(bool((state[name] < 0).any()) for name in self.counts):
            raise ValueError("a negative count")

    def spec(self) -> str:
        """Return the specification from which `make_method` recreates this method."""
        parameters = "&".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}?{parameters}" if parameters else self.name


class Scorer(nn.Module, ABC):
    """Scores neurons against a complete state: a module with buffers and a fixed layout.

    It uses only tensor operations. Python's control flow depends only on the layout, not on values
    or the batch size, and nothing synchronises with a GPU. So `torch.export` and `torch.compile`
    accept it, with a dynamic batch size.

    Parameters
    ----------
    layout
        The assignment of neurons to coverage points.
    buffers
        The tensors that neurons are compared with, by attribute name.
    """

    def __init__(self, layout: Layout, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layout = layout
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    @property
    def columns(self) -> int:
        """The number of evidence columns: one per point and kind of evidence."""
        return len(self.layout.sizes)

    @abstractmethod
    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the evidence against trust, before standardisation.

        Parameters
        ----------
        neurons
            Shape (B, N).
        classes
            The class that each image is compared with, int64 of shape (B,).

        Returns
        -------
        Tensor
            float64 of shape (B, columns); larger means less trusted.
        """

    def soft(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return a differentiable approximation of the evidence, for attacks.

        The default is the evidence itself. A method with comparisons or counts overrides this.
        Parameters and shape are those of `forward`.
        """
        return self(neurons, classes)  # type: ignore[no-any-return]

    @abstractmethod
    def costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each neuron's cost for the class of its image, shape (B, N), at least 0."""

    @abstractmethod
    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are inside the class's trusted pattern, bool of shape (B, N)."""

    def coverage(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the share of each point's neurons that are inside, float64 of shape (B, L)."""
        return self.layout.means(self.inside(neurons, classes))

    @abstractmethod
    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds of the trusted pattern that `inside` tests, to explain a verdict.

        Parameters
        ----------
        classes
            The class of each image, int64 of shape (B,).

        Returns
        -------
        tuple of Tensor
            The lowest and the highest trusted value of each neuron, each of shape (B, N); infinite
            if the pattern has no bound on that side.
        """


class CostScorer(Scorer):
    """A scorer whose evidence is the logarithm of each point's mean cost.

    1/neurons is added to the mean, so that the logarithm of 0 is finite. Points are scored in
    pieces, so that memory does not grow with the network.
    """

    widths: Tensor
    members: Tensor

    def __init__(self, layout: Layout, buffers: Mapping[str, Tensor]) -> None:
        super().__init__(layout, buffers)
        device = next(self.buffers()).device
        widths = torch.tensor(layout.sizes, dtype=torch.float64)
        self.register_buffer("widths", widths.to(device))
        small = layout.neurons // layout.step * len(layout.sizes) <= MEMBERS
        members = layout.membership() if small else torch.empty(0, 0)
        self.register_buffer("members", members.to(device))

    @abstractmethod
    def costs_at(self, part: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the costs of the neurons of some consecutive points, finite, shape (B, width)."""

    def soft_costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return a differentiable approximation of `costs`; by default the costs."""
        return self.costs(neurons, classes)

    def costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each neuron's cost for the class of its image, shape (B, N), at least 0."""
        return self.costs_at(self.layout, neurons, classes)

    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return log(mean cost + 1/neurons) of each point, float64 of shape (B, L)."""
        sums = [
            self._summed(part, self.costs_at(part, neurons[:, part.span], classes))
            for part in self.layout.pieces(PIECE)
        ]
        every = torch.cat(sums, 1)
        return self.of_sums(every @ self.members if self.members.numel() else every)

    def _summed(self, part: Layout, costs: Tensor) -> Tensor:
        """Return the sums of each point, or of the runs that `members` adds up by one product.

        That takes far fewer operations where points have many different widths.
        """
        if not self.members.numel():
            return part.sums(costs)
        runs: Tensor = costs.unflatten(1, (-1, self.layout.step))
        return runs.sum(2, dtype=torch.float64)

    def soft(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the evidence of the soft costs, which is differentiable."""
        return self.of_sums(self.layout.sums(self.soft_costs(neurons, classes)))

    def of_sums(self, sums: Tensor) -> Tensor:
        """Return the evidence from the sums of each point's costs, (B, L)."""
        return torch.log((sums + 1) / self.widths)


def smallest(counts: Tensor) -> Tensor:
    """Return counts in the smallest type of integers that holds all of them."""
    most = int(counts.max()) if counts.numel() else 0
    return counts.to(next(kind for kind in COUNT_TYPES if most <= torch.iinfo(kind).max))


def cell_index(cells: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return the index of each neuron's cell in flattened counts of shape (classes, N, count).

    Parameters
    ----------
    cells
        Each neuron's cell, 0 to count − 1, int64 of shape (B, N).
    classes
        The class that each image is compared with, int64 of shape (B,).
    count
        The number of cells of a neuron.
    """
    width = cells.shape[1]
    rows = classes[:, None] * width + torch.arange(width, device=cells.device)
    return rows * count + cells


def add_counts(counts: Tensor, labels: Tensor) -> None:
    """Add the number of images of each class to int64 counts (classes,), in place.

    `torch.bincount` would read its size from the labels, and so wait for a GPU.
    """
    counts.index_add_(0, labels, torch.ones_like(labels))


def by_class(classes: Tensor) -> Iterator[tuple[int, Rows, int]]:
    """Yield each class that occurs, its rows, and their number. This reads the values: CPU only."""
    rows: dict[int, list[int]] = {}
    for row, k in enumerate(classes.tolist()):
        rows.setdefault(k, []).append(row)
    for k, mine in rows.items():
        every = len(mine) == len(classes)
        yield k, slice(None) if every else torch.tensor(mine, device=classes.device), len(mine)


def picked(values: Tensor, rows: Rows) -> Tensor:
    """Return some rows; a view for all rows."""
    return values if isinstance(rows, slice) else values.index_select(0, rows)


METHODS: Registry[type[Method]] = Registry("method")
MOST = 1000  # the largest number of sections or bins of a neuron and class, to limit memory
# The parser of a parameter, by the type of its default.
READERS: Mapping[type, Callable[[str], Any]] = {int: up_to(MOST), float: fraction, str: str}


def make_method(text: str) -> Method:
    """Create a method from `name` or `name?field=value&…`.

    Raises
    ------
    CovcliError
        If the name or a field is unknown, or a value is invalid.

    Examples
    --------
    >>> make_method("mrc?sections=20").sections
    20
    """
    spec = parse(text)
    kind = METHODS.get(spec.name)
    spec.only([f.name for f in fields(kind)])
    values: dict[str, Any] = {}
    for entry in fields(kind):
        values[entry.name] = spec.take(entry.name, READERS[type(entry.default)], entry.default)
    try:
        return kind(**values)
    except ValueError as error:
        raise CovcliError(str(error), where=text) from None
