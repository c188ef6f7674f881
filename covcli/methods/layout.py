"""Layout: the assignment of neurons to coverage points."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from operator import itemgetter

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The assignment of neurons (columns) to coverage points; a point's neurons are consecutive.

    Attributes
    ----------
    classes
        The number of classes of the network.
    sizes
        The number of neurons of each point.
    values
        How many neurons of each point are a channel's mean or a unit's value. They come first; the
        others are maxima of the same channels.
    start
        The first column, if the points are a part of all points.

    Examples
    --------
    >>> layout = Layout(classes=10, sizes=(4, 2), values=(2, 2))  # two means, two maxima; two units
    >>> layout.neurons, layout.value_columns.tolist()
    (6, [0, 1, 4, 5])
    >>> layout.means(torch.tensor([[1.0, 1.0, 3.0, 3.0, 5.0, 5.0]])).tolist()
    [[2.0, 5.0]]
    """

    classes: int
    sizes: tuple[int, ...]
    values: tuple[int, ...]
    start: int = 0

    @property
    def neurons(self) -> int:
        """The number of neurons of all points."""
        return sum(self.sizes)

    @property
    def span(self) -> slice:
        """The columns of these neurons among those of all points."""
        return slice(self.start, self.start + self.neurons)

    @cached_property
    def value_columns(self) -> Tensor:
        """The columns of the means and values, int64 of shape (V,)."""
        begins = zip(_places(self.sizes), self.values, strict=True)
        return torch.cat([torch.arange(begin, begin + n) for (begin, _), n in begins])

    def values_of(self, neurons: Tensor) -> Tensor:
        """Return the means and values of neurons (B, N), shape (B, V)."""
        parts = zip(neurons.split(self.sizes, 1), self.values, strict=True)
        return torch.cat([part[:, :count] for part, count in parts], 1)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each point's neurons of values (B, N), shape (B, L).

        float64; int32 for bool, because counting is faster.
        """
        return self._by_width(values, _sums)

    def means(self, values: Tensor) -> Tensor:
        """Return the mean over each point's neurons of values (B, N), float64 of shape (B, L)."""
        return self._by_width(values, lambda block: _sums(block).double() / block.shape[2])

    @property
    def step(self) -> int:
        """The largest width into which every point can be divided."""
        return max(1, math.gcd(*self.sizes))

    def membership(self) -> Tensor:
        """Return the point of each run of `step` neurons: 1 or 0, float64 of shape (N/step, L)."""
        runs = torch.tensor([size // self.step for size in self.sizes])
        return torch.eye(len(self.sizes), dtype=torch.float64).repeat_interleave(runs, 0)

    def blocks(self, values: Tensor) -> Iterator[Tensor]:
        """Yield the values (B, N) of each run of consecutive points of equal width.

        Yields
        ------
        Tensor
            A view of shape (B, points, width).
        """
        shapes = [(len(list(run)), width) for width, run in groupby(self.sizes)]
        parts = values.split_with_sizes([count * width for count, width in shapes], 1)
        for shape, part in zip(shapes, parts, strict=True):
            yield part.view(-1, *shape)

    def _by_width(self, values: Tensor, reduced: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce the values of all points (B, N) to one number a point, shape (B, L).

        All points of one width are reduced together: where narrow and wide ones alternate, as in a
        network of bottlenecks, that takes far fewer operations than one by one.
        """
        runs: dict[int, list[Tensor]] = {}
        numbers: dict[int, list[int]] = {}
        first = 0
        for block in self.blocks(values):
            _, count, width = block.shape
            runs.setdefault(width, []).append(block)
            numbers.setdefault(width, []).extend(range(first, first + count))
            first += count
        wholes = [
            reduced(each[0] if len(each) == 1 else torch.cat(each, 1)) for each in runs.values()
        ]
        order = [number for each in numbers.values() for number in each]
        return in_order(wholes, order, 1)

    def pieces(self, most: int) -> Iterator["Layout"]:
        """Yield runs of consecutive points, each of at most `most` neurons or a single point."""
        if self.neurons <= most:
            yield self
            return
        first, start = 0, 0
        for number, (begin, size) in enumerate(_places(self.sizes)):
            end = begin + size
            if number > first and end - start > most:
                yield self._run(first, number, start)
                first, start = number, begin
        yield self._run(first, len(self.sizes), start)

    def _run(self, first: int, end: int, start: int) -> "Layout":
        sizes, values = self.sizes[first:end], self.values[first:end]
        return Layout(self.classes, sizes, values, self.start + start)


def in_order(parts: Sequence[Tensor], numbers: Sequence[int], dim: int) -> Tensor:
    """Join parts along a dimension, their slices in ascending order of the slices' numbers.

    Examples
    --------
    >>> in_order([torch.tensor([[10, 12]]), torch.tensor([[11]])], [0, 2, 1], 1)
    tensor([[10, 11, 12]])
    """
    if list(numbers) == sorted(numbers):
        return torch.cat(list(parts), dim)
    slices = [each for part in parts for each in part.split(1, dim)]
    ordered = sorted(zip(numbers, slices, strict=True), key=itemgetter(0))
    return torch.cat([each for _, each in ordered], dim)


def _sums(block: Tensor) -> Tensor:
    """Return the sums over the last dimension, in float64, or int32 for bool."""
    return block.sum(2, dtype=torch.int32 if block.dtype == torch.bool else torch.float64)


def _places(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each point's first column, and its size."""
    ends = accumulate(sizes)
    return ((end - size, size) for end, size in zip(ends, sizes, strict=True))
