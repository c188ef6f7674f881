"""Layout: which of the neurons, which stand side by side, belong to which coverage point."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor


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
    start
        Where the neurons begin among those of all points, of which these may be a part.
    """

    classes: int
    sizes: tuple[int, ...]
    values: tuple[int, ...]
    start: int = 0

    @property
    def neurons(self) -> int:
        """How many neurons there are in all."""
        return sum(self.sizes)

    @property
    def span(self) -> slice:
        """Where the neurons stand among those of all points."""
        return slice(self.start, self.start + self.neurons)

    @cached_property
    def value_columns(self) -> Tensor:
        """Where the means and values stand among all neurons, int64 of shape (V,)."""
        begins = zip(_places(self.sizes), self.values, strict=True)
        return torch.cat([torch.arange(begin, begin + n) for (begin, _), n in begins])

    def values_of(self, neurons: Tensor) -> Tensor:
        """Return the means and values among neurons (B, N), shape (B, V)."""
        return neurons.index_select(1, self.value_columns.to(neurons.device))

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each point's neurons of values (B, N), shape (B, L).

        float64, or int32 of truth values, which counting is faster.
        """
        kind = torch.int32 if values.dtype == torch.bool else torch.float64
        return torch.cat([block.sum(2, dtype=kind) for block in blocks(values, self.sizes)], 1)

    def means(self, values: Tensor) -> Tensor:
        """Return the mean over each point's neurons of values (B, N), float64 of shape (B, L)."""
        sums = self.sums(values)
        return sums / torch.tensor(self.sizes, dtype=torch.float64, device=sums.device)

    def pieces(self, most: int) -> Iterator["Layout"]:
        """Yield runs of whole points, each of at most so many neurons or one point."""
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
        yield part.unflatten(1, (count, width))


def _places(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each point begins, and its size."""
    return zip(accumulate(sizes, initial=0), sizes, strict=False)
