"""Exact sums of the products of whole numbers: of all pairs, or of a few random combinations.

Sums of integers do not depend on the order or the grouping of images.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from covcli.methods.layout import Layout
from covcli.methods.state import Expected, State

# A point with more values gets a sketch of its products instead of all of them.
WIDEST = 4096
# The number of random combinations in a sketch.
COMBINATIONS = 80
# Values are rounded to integers of at most this many bits. Products of two integers, and their sums
# over a batch, are then exact in float64; sums over 8 million images are exact in int64.
BITS = 20
# Twice the bits of a value, plus the bits of a point's number of values, in a sketch: sums over a
# batch of 2,048 are exact in float64, and sums over 2 million images in int64.
SKETCHED_BITS = 42
STRIP = 128


def bits(width: int) -> int:
    """Return the bits of a value at a point of that many values."""
    return BITS if width <= WIDEST else (SKETCHED_BITS - (width - 1).bit_length()) // 2


class Products:
    """The products of all pairs of a point's values, as a packed lower triangle.

    Parameters
    ----------
    flat
        int64 of shape (V·(V+1)/2,); changed in place.
    width
        V.
    """

    def __init__(self, flat: Tensor, width: int) -> None:
        self.flat, self.width = flat, width

    def add(self, whole: Tensor) -> None:
        """Add partᵀ·part of integers (B, V), in strips that skip most of the upper half."""
        for begin in range(0, self.width, STRIP):
            end = min(begin + STRIP, self.width)
            strip = whole[:, begin:end].T @ whole[:, :end]
            first, last = begin * (begin + 1) // 2, end * (end + 1) // 2
            lower = _lower(begin, end).to(whole.device)
            self.flat[first:last] += strip.view(-1).index_select(0, lower).long()

    def rescale(self, ratio: Tensor) -> None:
        """Convert to other units; `ratio` (V,) is the old unit divided by the new one."""
        rows, columns = torch.tril_indices(self.width, self.width, device=self.flat.device)
        self.flat.copy_(rescaled(self.flat, ratio[rows] * ratio[columns]))

    def square(self) -> Tensor:
        """Return the products as a symmetric matrix, float64 of shape (V, V)."""
        square = self.flat.new_zeros(self.width, self.width, dtype=torch.float64)
        rows, columns = torch.tril_indices(self.width, self.width, device=self.flat.device)
        square[rows, columns] = self.flat.double()
        square[columns, rows] = self.flat.double()
        return square


class Sketch:
    """The products of a wide point's values with random combinations of them, and their squares.

    For S = Σ x·xᵀ it holds S·Ω and the diagonal of S. Ω consists of random signs.

    Tropp, Yurtsever, Udell and Cevher, "Fixed-Rank Approximation of a Positive-Semidefinite Matrix
    from Streaming Data", NeurIPS 2017.

    Parameters
    ----------
    flat
        int64 of shape (V·80,); changed in place.
    squares
        int64 of shape (V,); changed in place.
    """

    def __init__(self, flat: Tensor, squares: Tensor) -> None:
        self.products, self.squares = flat.view(len(squares), COMBINATIONS), squares

    @property
    def signs(self) -> Tensor:
        """Ω, float64 of shape (V, 80)."""
        return _signs(len(self.squares)).to(self.squares.device).double()

    def add(self, whole: Tensor) -> None:
        """Add integers (B, V)."""
        self.products += (whole.T @ (whole @ self.signs)).long()
        self.squares += whole.square().sum(0).long()

    def rescale(self, ratio: Tensor) -> None:
        """Convert to other units; `ratio` (V,) is the same for all values of the point."""
        self.products.copy_(rescaled(self.products, ratio[:, None] ** 2))
        self.squares.copy_(rescaled(self.squares, ratio**2))


def moments(state: State) -> Iterator[Products | Sketch]:
    """Yield each point's part of a state with the tensors of `expected_moments`, as views."""
    tensors, used = state.tensors, {"products": 0, "sketch": 0, "squares": 0}

    def take(name: str, count: int) -> Tensor:
        used[name] += count
        return tensors[name][used[name] - count : used[name]]

    for width in state.layout.values:
        if width <= WIDEST:
            yield Products(take("products", width * (width + 1) // 2), width)
        else:
            yield Sketch(take("sketch", width * COMBINATIONS), take("squares", width))


def expected_moments(layout: Layout) -> Expected:
    """Return the type and shape of the sums of products."""
    narrow = sum(n * (n + 1) // 2 for n in layout.values if n <= WIDEST)
    wide = sum(n for n in layout.values if n > WIDEST)
    shapes = {"products": narrow, "sketch": wide * COMBINATIONS, "squares": wide}
    return {name: (torch.int64, (size,)) for name, size in shapes.items() if size}


def common_peaks(peaks: Tensor, layout: Layout) -> Tensor:
    """Return the largest magnitudes (V,), with those of a wide point's values all the largest."""
    parts = peaks.split(layout.values)
    return torch.cat([part.amax().expand_as(part) if len(part) > WIDEST else part
                      for part in parts])  # fmt: skip


def rescaled(sums: Tensor, ratio: Tensor) -> Tensor:
    """Return integer sums times a power of two, rounded; unchanged where the factor is 1."""
    return torch.where(ratio == 1, sums, (sums * ratio).round().long())


@cache
def _lower(begin: int, end: int) -> Tensor:
    """Return the indices of the lower triangle in its flattened rows `begin` to `end`."""
    rows, columns = torch.tril_indices(end - begin, end, begin)
    places: Tensor = rows * end + columns
    return places


@cache
def _signs(width: int) -> Tensor:
    """Return random signs, the same for every point of that many values, int8 of shape (V, 80)."""
    generator = torch.Generator().manual_seed(width)
    bits = torch.randint(2, (width, COMBINATIONS), generator=generator, dtype=torch.int8)
    return 2 * bits - 1
