"""State: named tensors folded over batches, each with the reduction that merges two parts of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Reduction: TypeAlias = Literal["sum", "min", "max", "same"]
# The type and the shape of each tensor of a state.
Expected: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

# So many neurons of a point make a bag: what of them is summed in float32 loses little.
BAG = 512
Granularity: TypeAlias = Literal["channel", "unit", "contribution"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


@dataclass
class State:
    """Named tensors, each with the reduction that merges two parts of it.

    "same" marks what was settled by an earlier pass: parts must agree on it. The other
    reductions are exact and commutative for integers and extremes, so that a state does not depend
    on the size, the order or the grouping of batches. Sums of floating-point numbers would, in
    their last bits: no method here has any.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    reductions: dict[str, Reduction] = field(default_factory=dict)

    @classmethod
    def of_sums(cls, expected: Expected) -> "State":
        """Return tensors of 0 of those types and shapes, to be summed."""
        state = cls()
        for name, (dtype, shape) in expected.items():
            state.declare(name, torch.zeros(shape, dtype=dtype), "sum")
        return state

    def declare(self, name: str, initial: Tensor, reduction: Reduction) -> None:
        """Add a tensor, filled with the neutral element of its reduction."""
        self.tensors[name] = initial
        self.reductions[name] = reduction

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def merge(self, other: "State") -> None:
        """Fold another part into this one.

        Raises
        ------
        ValueError
            If the parts have other tensors, or differ in what must be the same.
        """
        if self.reductions != other.reductions:
            raise ValueError("the parts are states of different methods or passes")
        for name, reduction in self.reductions.items():
            mine, theirs = self.tensors[name], other.tensors[name]
            if mine.shape != theirs.shape:
                raise ValueError(f"the parts differ in the shape of {name!r}")
            if reduction == "same":
                if not torch.equal(mine, theirs):
                    raise ValueError(f"the parts differ in {name!r}")
            elif reduction == "sum":
                mine += theirs
            elif reduction == "min":
                torch.minimum(mine, theirs, out=mine)
            else:
                torch.maximum(mine, theirs, out=mine)

    def include(self, other: "State") -> None:
        """Take up the tensors of another state beside the own ones."""
        self.tensors |= other.tensors
        self.reductions |= other.reductions

    def to(self, device: torch.device) -> "State":
        """Return the state on a device."""
        return State({k: v.to(device) for k, v in self.tensors.items()}, dict(self.reductions))


@dataclass(frozen=True)
class Layout:
    """Which neurons belong to which coverage point; they stand side by side.

    Attributes
    ----------
    classes
        How many classes the network tells apart.
    sizes
        How many neurons each point has.
    values
        How many of them, the first ones, are a channel's mean or a unit's value; the others are
        maxima of the same channels.
    """

    classes: int
    sizes: tuple[int, ...]
    values: tuple[int, ...]

    @property
    def neurons(self) -> int:
        """How many neurons there are in all."""
        return sum(self.sizes)

    @cached_property
    def value_columns(self) -> Tensor:
        """Where the means and values stand among all neurons, int64 of shape (V,)."""
        begins = zip(_places(self.sizes), self.values, strict=True)
        return torch.cat([torch.arange(begin, begin + n) for (begin, _), n in begins])

    def values_of(self, neurons: Tensor) -> Tensor:
        """Return the means and values among neurons (B, N), shape (B, V)."""
        return neurons.index_select(1, self.value_columns.to(neurons.device))

    def means(self, values: Tensor) -> Tensor:
        """Return the mean over each point's neurons of values (B, N), float64 of shape (B, L)."""
        return self.sums(values) / self.widths.to(values.device)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each point's neurons of values (B, N), shape (B, L).

        float64, or int32 of truth values, which counting is faster.
        """
        kind = torch.int32 if values.dtype == torch.bool else torch.float64
        return torch.cat([block.sum(2, dtype=kind) for block in blocks(values, self.sizes)], 1)

    def pieces(self, most: int) -> Iterator[tuple[slice, "Layout"]]:
        """Yield runs of whole points, of at most so many neurons or one point.

        Yields
        ------
        tuple of slice and Layout
            Where the run's neurons stand among all, and which of them belong to which point.
        """
        first, start, end = 0, 0, 0
        for number, size in enumerate(self.sizes):
            if number > first and end - start + size > most:
                yield slice(start, end), self._points(first, number)
                first, start = number, end
            end += size
        yield slice(start, end), self._points(first, len(self.sizes))

    def _points(self, first: int, end: int) -> "Layout":
        return Layout(self.classes, self.sizes[first:end], self.values[first:end])

    @cached_property
    def widths(self) -> Tensor:
        """How many neurons each point has, float64 of shape (L,)."""
        return torch.tensor(self.sizes, dtype=torch.float64)

    @cached_property
    def value_counts(self) -> Tensor:
        """How many means or values each point has, float64 of shape (L,)."""
        return torch.tensor(self.values, dtype=torch.float64)


def blocks(values: Tensor, widths: Sequence[int]) -> Iterator[Tensor]:
    """Yield what neighbouring points of equal width hold, as one tensor for all of them.

    Parameters
    ----------
    values
        The points side by side, shape (B, sum of widths).
    widths
        How much of it belongs to each point.

    Yields
    ------
    Tensor
        A view of shape (B, points, width).
    """
    runs = [(width, len(list(equal))) for width, equal in groupby(widths)]
    parts = values.split([width * count for width, count in runs], 1)
    for (width, count), part in zip(runs, parts, strict=True):
        yield part.view(len(values), count, width)


def bag_counts(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return into how many bags of neighbouring neurons points of these sizes are cut."""
    return tuple(-(-size // BAG) for size in sizes)


def whole_sums(sums: Tensor, layout: Layout) -> Tensor:
    """Return the sum of each point's costs, float64, from that or from the sums of bags."""
    if sums.shape[1] == len(layout.sizes):
        return sums.double()
    counts = bag_counts(layout.sizes)
    return Layout(layout.classes, counts, counts).sums(sums)


@lru_cache(maxsize=1024)
def bag_starts(sizes: tuple[int, ...], images: int, dtype: torch.dtype) -> Tensor:
    """Return where each bag starts among the neurons of so many images, flattened."""
    starts = [start for begin, size in _places(sizes) for start in range(begin, begin + size, BAG)]
    every = torch.arange(images)[:, None] * sum(sizes) + torch.tensor(starts)
    return every.view(-1).to(dtype)


def _places(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each point begins, and its size."""
    return zip(accumulate(sizes, initial=0), sizes, strict=False)
