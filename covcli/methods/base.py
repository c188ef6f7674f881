"""The frame of every method: a state folded over batches, and costs read from it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.specs import Registry, fraction, parse, up_to
from covcli.methods.layout import Layout
from covcli.methods.state import Expected, Granularity, State

# So many neurons of each image are read at once, or one point's if that has more.
PIECE = 1 << 16
# Some rows, as numbers, int64; or all of them.
Rows: TypeAlias = Tensor | slice


@dataclass(frozen=True)
class Method(ABC):
    """One way to summarise trusted activations and to score a new input against them.

    A subclass is a frozen dataclass; its fields are the method's parameters, written in a
    specification as `name?field=value`. It states its equations for a batch of neurons; folding,
    merging, saving, standardising and calibration are written once, elsewhere. Larger means less
    trusted, always.

    Attributes
    ----------
    name
        The name in the registry.
    contributions
        Whether its neurons are what activations contribute to the network's certainty, which
        takes gradients, rather than the activations.
    experts
        Whether its calibration learns from surrogate outliers which columns of the evidence tell.
    plain
        Whether its score is the mean of its columns as they are, without standardising them.
    """

    name: ClassVar[str]
    contributions: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    plain: ClassVar[bool] = False

    def reads(self, granularity: Granularity) -> Granularity:
        """Return what the method's neurons are where a user asks for this granularity.

        Raises
        ------
        CovcliError
            If the method knows no such neurons.
        """
        if not self.contributions:
            return granularity
        if granularity == "unit":
            raise CovcliError("reads channels only", where=f"method {self.name}")
        return "contribution"

    @abstractmethod
    def begin(self, layout: Layout) -> State:
        """Return the empty state of the first pass over the trusted data."""

    @abstractmethod
    def observe(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Fold one batch into the state.

        Parameters
        ----------
        state
            What `begin` or `proceed` returned; changed in place.
        layout
            Which neurons belong to which point.
        neurons
            float32 of shape (B, N), finite.
        labels
            int64 of shape (B,).
        """

    def proceed(self, state: State, layout: Layout) -> State | None:
        """Return the empty state of the next pass after a complete one; None if it was the last."""
        return None

    def align(self, parts: Sequence[State], layout: Layout) -> list[State]:
        """Return complete states, made from other images each, in a form in which they merge.

        By default as they are. A method that settles something in an earlier pass, on which its
        parts differ, brings them to common ground and says what that costs.
        """
        return list(parts)

    def begin_noisy(self, state: State, layout: Layout) -> State | None:
        """Return the empty state of a pass over noisy copies; None for a method that needs none.

        The copies are of some of the trusted images that made the complete `state`, which takes up
        the tensors of this one in the end.
        """
        return None

    def observe_noisy(self, noisy: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Fold a batch of noisy copies into what `begin_noisy` returned."""
        raise NotImplementedError

    @abstractmethod
    def prepare(self, state: State, layout: Layout) -> "Scorer":
        """Return what scores new neurons against the complete state, on the state's device."""

    def columns(self, layout: Layout) -> int:
        """Return how many columns the evidence has: one a point, or several blocks of those."""
        return len(layout.sizes)

    @abstractmethod
    def expected(self, layout: Layout) -> Expected:
        """Return each complete tensor's type and shape, to check files against."""

    def spec(self) -> str:
        """Return the specification that makes this method again."""
        parameters = "&".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}?{parameters}" if parameters else self.name


class Scorer(nn.Module, ABC):
    """What a method prepares to score new neurons: buffers, bound to the layout of the neurons.

    All of it is plain tensor operations: Python's control flow depends on the layout alone, never
    on values or on how many images there are, and nothing waits for a GPU. So `torch.export` and
    `torch.compile` accept it, with any number of images.

    Parameters
    ----------
    layout
        Which neurons belong to which point.
    buffers
        What the neurons are measured against, by the name of the attribute.
    """

    def __init__(self, layout: Layout, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layout = layout
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    @property
    def columns(self) -> int:
        """How many columns the evidence has: one a point, or several blocks of such columns."""
        return len(self.layout.sizes)

    @abstractmethod
    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the evidence: what speaks against trust, in columns to standardise.

        Parameters
        ----------
        neurons
            Shape (B, N).
        classes
            The class that each image is measured against, int64 of shape (B,).

        Returns
        -------
        Tensor
            float64 of shape (B, columns); larger is less trusted.
        """

    def soft(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return a stand-in of the evidence with a gradient in the neurons, for attacks.

        By default the evidence itself. A method that compares or counts overrides this. The
        parameters and the shape are those of `forward`.
        """
        return self(neurons, classes)  # type: ignore[no-any-return]

    @abstractmethod
    def costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each neuron's cost against the class of its image, (B, N), at least 0."""

    @abstractmethod
    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons lie inside the class's trusted pattern, bool of shape (B, N)."""

    def coverage(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the share of each point's neurons inside, float64 of shape (B, L)."""
        return self.layout.means(self.inside(neurons, classes))

    @abstractmethod
    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of the trusted pattern that `inside` tests, to explain a verdict.

        Parameters
        ----------
        classes
            The class of each image, int64 of shape (B,).

        Returns
        -------
        tuple of Tensor
            The lowest and the highest trusted value of each neuron, shape (B, N) each; infinite
            where the pattern has no end on that side.
        """


class CostScorer(Scorer):
    """A scorer whose evidence is the log of each point's mean cost.

    One more neuron's worth is added to the mean, so that 0 has a log. Points are read in pieces:
    what a piece takes of memory and cache does not grow with the network.
    """

    widths: Tensor

    def __init__(self, layout: Layout, buffers: Mapping[str, Tensor]) -> None:
        super().__init__(layout, buffers)
        widths = torch.tensor(layout.sizes, dtype=torch.float64)
        self.register_buffer("widths", widths.to(next(self.buffers()).device))

    @abstractmethod
    def costs_at(self, part: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the costs of the neurons of some neighbouring points, shape (B, width)."""

    def soft_costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return a stand-in of `costs` with a gradient in the neurons; by default the costs."""
        return self.costs(neurons, classes)

    def costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each neuron's cost against the class of its image, (B, N), at least 0."""
        return self.costs_at(self.layout, neurons, classes)

    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return log(mean cost + 1/neurons) of each point, float64 of shape (B, L)."""
        sums = [
            part.sums(self.costs_at(part, neurons[:, part.span], classes))
            for part in self.layout.pieces(PIECE)
        ]
        return self.of_sums(torch.cat(sums, 1))

    def soft(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the same from the soft costs, with a gradient in the neurons."""
        return self.of_sums(self.layout.sums(self.soft_costs(neurons, classes)))

    def of_sums(self, sums: Tensor) -> Tensor:
        """Return the evidence from the sums of each point's costs, (B, L)."""
        return torch.log((sums + 1) / self.widths)


def cell_index(cells: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return where counts of shape (classes, N, count), flattened, hold each neuron's cell.

    Parameters
    ----------
    cells
        Each neuron's cell, 0 to count − 1, int64 of shape (B, N).
    classes
        The class that each image is measured against, int64 of shape (B,).
    """
    width = cells.shape[1]
    rows = classes[:, None] * width + torch.arange(width, device=cells.device)
    return rows * count + cells


def by_class(classes: Tensor) -> Iterator[tuple[int, Rows, int]]:
    """Yield each class that occurs, which rows are of it, and how many."""
    rows: dict[int, list[int]] = {}
    for row, k in enumerate(classes.tolist()):
        rows.setdefault(k, []).append(row)
    for k, mine in rows.items():
        every = len(mine) == len(classes)
        yield k, slice(None) if every else torch.tensor(mine, device=classes.device), len(mine)


def picked(values: Tensor, rows: Rows) -> Tensor:
    """Return those rows; a view if it is all of them."""
    return values if isinstance(rows, slice) else values.index_select(0, rows)


METHODS: Registry[type[Method]] = Registry("method")
# How a parameter is read from a specification, by the type of its default.
MOST = 1000  # sections or bins of each neuron and class: they take memory
READERS: Mapping[type, Callable[[str], Any]] = {int: up_to(MOST), float: fraction, str: str}


def make_method(text: str) -> Method:
    """Make a method from `name` or `name?field=value&…`.

    Raises
    ------
    CovcliError
        If the name, a field or a value is unknown.
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
