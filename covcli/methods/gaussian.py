"""Gaussian coverage: the Mahalanobis distance of each layer's channel means from the class.

Lee, Lee, Lee and Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks", NeurIPS 2018, section 2: class means and one covariance for all classes. Here
the distance to the predicted class is computed at every coverage point, with a shrunk covariance.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.methods.base import METHODS, Method, Scorer, add_counts
from covcli.methods.layout import Layout, blocks
from covcli.methods.state import Expected, State

# The smallest deviation of a neuron, as a share of its point's root mean square deviation. Without
# it, a neuron that never fired on trusted images would outweigh all others.
LEAST_DEVIATION = 0.01
MOST_VALUES = 4096
SPAN = 3.0
# Values are rounded to integers of at most this many bits. Products of two integers, and their sums
# over a batch, are then exact in float64; sums over 8 million images are exact in int64.
BITS = 20
STRIP = 128


@METHODS.add("gauss")
@dataclass(frozen=True)
class Gauss(Method):
    """Layer-wise Mahalanobis distance of the channel means to the predicted class.

    With μ_k the mean of class k's trusted images and Σ the covariance around these means, shared
    by the classes, a point of V channel means x costs d²/V, where d² = (x − μ_k)ᵀ Σ⁻¹ (x − μ_k):
    about 1 for trusted images. Σ is shrunk towards its diagonal (Ledoit and Wolf, 2004, with a
    fixed intensity). Maxima are not used.

    Parameters
    ----------
    shrinkage
        Intensity in (0, 1]: 1 keeps only the diagonal.

    Examples
    --------
    >>> Gauss(shrinkage=0.1).spec()
    'gauss?shrinkage=0.1'
    """

    name: ClassVar[str] = "gauss"
    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        """Check the parameter."""
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage} is not in (0, 1]")

    def begin(self, layout: Layout) -> State:
        """Return peaks of 0: the first pass determines the largest magnitude of each value.

        Raises
        ------
        CovcliError
            If a point has more than 4,096 values: their covariance would be too large.
        """
        refuse_wide(layout, self.name)
        state = State(layout)
        state.declare("peak", torch.zeros(sum(layout.values)), "max")
        return state

    def observe(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Find the largest values in the first pass; sum values and their products in the second.

        Integers are summed, so the result does not depend on the order or grouping of images.
        """
        if "unit" in state.tensors:
            self.add(state, neurons, labels)
        elif len(neurons):
            largest = state.layout.values_of(neurons).abs().amax(0)
            torch.maximum(state["peak"], largest, out=state["peak"])

    def add(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Add a batch to the sums of the second pass."""
        layout = state.layout
        whole = whole_numbers(state, layout.values_of(neurons))
        state["total"].index_add_(0, labels, whole.long())
        add_counts(state["count"], labels)
        parts = whole.split(layout.values, 1)
        for products, part in zip(_triangles(state["products"], layout), parts, strict=True):
            _add_products(products, part)

    def proceed(self, state: State) -> State | None:
        """Choose each value's unit after the first pass: a power of two, about peak/2^20."""
        if "unit" in state.tensors:
            return None
        return self.summing(state.layout, state["peak"])

    def summing(self, layout: Layout, peaks: Tensor) -> State:
        """Return sums of 0, with units for values of at most these peaks, shape (V,)."""
        units = [math.ldexp(1.0, math.frexp(peak)[1] - BITS) for peak in peaks.tolist()]
        summing = State.of_sums(layout, self.sums(layout)).to(peaks.device)
        summing.declare("unit", peaks.new_tensor(units, dtype=torch.float64), "same")
        return summing

    def align(self, parts: Sequence[State]) -> list[State]:
        """Return the parts in the largest of their units; each sum is rounded once."""
        unit = torch.stack([part["unit"] for part in parts]).amax(0)
        return [self._scaled(part, part["unit"] / unit, unit) for part in parts]

    def _scaled(self, part: State, ratio: Tensor, unit: Tensor) -> State:
        """Return a part in another unit; `ratio` is the old unit divided by the new one."""
        pairs = torch.cat([_pack(r[:, None] * r) for r in ratio.split(part.layout.values)])
        scaled = {
            "unit": unit,
            "total": rescaled(part["total"], ratio),
            "products": rescaled(part["products"], pairs),
        }
        return part.holding(part.tensors | scaled)

    def prepare(self, state: State) -> "GaussScorer":
        """Return the scorer that computes distances.

        Raises
        ------
        CovcliError
            If a point's covariance is singular: too few images for so little shrinkage.
        """
        return GaussScorer(state.layout, whiten(state, self.shrinkage, self.spec()))

    def sums(self, layout: Layout) -> Expected:
        """Return the type and shape of the tensors that the second pass sums."""
        packed = sum(n * (n + 1) // 2 for n in layout.values)
        return {
            "count": (torch.int64, (layout.classes,)),
            "total": (torch.int64, (layout.classes, sum(layout.values))),
            "products": (torch.int64, (packed,)),
        }

    def expected(self, layout: Layout) -> Expected:
        """Return the tensors of a complete state."""
        return {**self.sums(layout), "unit": (torch.float64, (sum(layout.values),))}


def refuse_wide(layout: Layout, method: str) -> None:
    """Raise a CovcliError if a point has too many values for a covariance."""
    if max(layout.values) > MOST_VALUES:
        raise CovcliError(
            f"{method} cannot hold the covariance of {max(layout.values)} neurons",
            fix="use --granularity channel, or take the method src or mrc",
        )


@dataclass(frozen=True)
class Whitening:
    """The mean and covariance of trusted values, in float64.

    Attributes
    ----------
    mean
        The mean of each class, shape (classes, V).
    deviation
        The deviation around the class means, shape (V,).
    matrices
        For each point, a lower triangular W of shape (V, V) with WᵀW = Σ⁻¹.
    """

    mean: Tensor
    deviation: Tensor
    matrices: list[Tensor]


def whiten(state: State, shrinkage: float, where: str) -> Whitening:
    """Factor each point's covariance.

    Parameters
    ----------
    state
        A complete state of `gauss`.
    shrinkage
        See `Gauss`.
    where
        The method's name, for errors.

    Raises
    ------
    CovcliError
        If a point's covariance is singular: too few images for so little shrinkage.
    """
    layout = state.layout
    mean, count = class_means(state), state["count"].double()
    deviations, matrices = [], []
    parts = zip(
        _triangles(state["products"], layout),
        mean.split(layout.values, 1),
        state["unit"].split(layout.values),
        strict=True,
    )
    for number, (triangle, center, unit) in enumerate(parts):
        products = _unpack(triangle, len(unit)) * unit * unit[:, None]
        between = (center * count[:, None]).T @ center
        covariance = (products - between) / count.sum().clamp_min(1)
        deviation, matrix = _factor(covariance, shrinkage)
        if matrix is None:
            raise CovcliError(
                f"the covariance at coverage point {number + 1} is singular",
                where=where,
                fix="take more trusted images or more shrinkage",
            )
        deviations.append(deviation)
        matrices.append(matrix)
    return Whitening(mean, torch.cat(deviations), matrices)


def _factor(covariance: Tensor, shrinkage: float) -> tuple[Tensor, Tensor | None]:
    """Return the deviations and the whitening matrix of a covariance; None if it is singular."""
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    typical = float(deviation.square().mean().sqrt())
    deviation = deviation.clamp_min(LEAST_DEVIATION * typical if typical > 0 else 1.0)
    correlation = covariance / deviation / deviation[:, None]
    shrunk = (1 - shrinkage) * correlation
    shrunk.diagonal().copy_(torch.ones_like(deviation))  # shrinkage does not change the diagonal
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if bool(failed):
        return deviation, None
    unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return deviation, torch.linalg.solve_triangular(factor, unit, upper=False) / deviation


class GaussScorer(Scorer):
    """Computes distances, see `Gauss`, and displacements along given directions.

    Parameters
    ----------
    layout
        The assignment of neurons to coverage points.
    whitening
        The mean and covariance of trusted values.
    directions
        For each point, further vectors to multiply with its values, shape (directions, V). They are
        multiplied together with the whitening matrix, which costs little.
    """

    mean: Tensor
    deviation: Tensor
    places: Tensor
    counts: Tensor

    def __init__(
        self, layout: Layout, whitening: Whitening, directions: Sequence[Tensor] | None = None
    ) -> None:
        matrices = whitening.matrices
        if directions is not None:
            matrices = [torch.cat(pair) for pair in zip(matrices, directions, strict=True)]
        device = whitening.mean.device
        buffers = {
            "mean": whitening.mean.float(),
            "deviation": whitening.deviation.float(),
            "places": layout.value_columns.to(device, copy=True),
            "counts": torch.tensor(layout.values, dtype=torch.float64, device=device),
        }
        super().__init__(layout, {**buffers, **_halves(matrices)})

    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return log(d²/V) of each point, float64 of shape (B, L)."""
        return self.distances(self.products(neurons, classes))

    def products(self, neurons: Tensor, classes: Tensor) -> list[Tensor]:
        """Return the product of each point's matrix with its values minus the class means.

        Returns
        -------
        list of Tensor
            One tensor per run of points of equal width V, of shape (points, V + directions, B).
        """
        products = []
        for number, block in enumerate(blocks(self._away(neurons, classes), self.layout.values)):
            upper, lower = (self.get_buffer(f"{half}_{number}") for half in ("upper", "lower"))
            values = block.permute(1, 2, 0)
            products.append(torch.cat([upper @ values[:, : upper.shape[2]], lower @ values], 1))
        return products

    def distances(self, products: list[Tensor]) -> Tensor:
        """Return log(d²/V), made finite, float64 of shape (B, L)."""
        widths = [width for width, _ in groupby(self.layout.values)]
        squares = [
            part[:, :width].square().sum(1, dtype=torch.float64)
            for part, width in zip(products, widths, strict=True)
        ]
        limits = torch.finfo(torch.float64)
        costs = torch.cat(squares).T / self.counts
        return torch.log(costs.clamp(limits.tiny, limits.max))

    def costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each value's squared distance in units of its deviation; 0 for maxima."""
        apart = self._away(neurons, classes) / self.deviation
        return torch.zeros_like(neurons).index_copy(1, self.places, apart.square())

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which values are within three deviations of their class; maxima always are."""
        low, high = self.span(classes)
        return (neurons >= low) & (neurons <= high)

    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class mean ± three deviations; infinite bounds for maxima."""
        mean, reach = self.mean.index_select(0, classes), SPAN * self.deviation
        free = mean.new_full((classes.shape[0], self.layout.neurons), torch.inf)
        low, high = mean - reach, mean + reach
        return -free.index_copy(1, self.places, -low), free.index_copy(1, self.places, high)

    def _away(self, neurons: Tensor, classes: Tensor) -> Tensor:
        return neurons.index_select(1, self.places) - self.mean.index_select(0, classes)


def _halves(matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """Split lower triangular matrices into upper and lower halves; zero quarters are omitted.

    Consecutive matrices of equal width become one tensor, float32 of shape (points, rows, columns).
    """
    halves = {}
    runs = groupby(matrices, lambda matrix: matrix.shape[1])
    for number, (width, run) in enumerate(runs):
        whole = torch.stack(list(run)).float()
        halves[f"upper_{number}"] = whole[:, : width // 2, : width // 2].contiguous()
        halves[f"lower_{number}"] = whole[:, width // 2 :].contiguous()
    return halves


def class_means(state: State) -> Tensor:
    """Return each class's mean (K, V), float64; the overall mean for a class without images."""
    count = state["count"].to(torch.float64)[:, None]
    total = state["total"] * state["unit"]
    overall = total.sum(0) / count.sum().clamp_min(1)
    return torch.where(count > 0, total / count.clamp_min(1), overall)


def rescaled(sums: Tensor, ratio: Tensor) -> Tensor:
    """Return integer sums times a power of two, rounded; unchanged where the factor is 1."""
    return torch.where(ratio == 1, sums, (sums * ratio).round().long())


def whole_numbers(state: State, values: Tensor) -> Tensor:
    """Return values (B, V) as integer multiples of their units, in float64."""
    return values.double().div_(state["unit"]).round_()


def _add_products(products: Tensor, part: Tensor) -> None:
    """Add partᵀ·part to a packed lower triangle, in strips that skip most of the upper half."""
    width = part.shape[1]
    for begin in range(0, width, STRIP):
        end = min(begin + STRIP, width)
        strip = part[:, begin:end].T @ part[:, :end]
        first, last = begin * (begin + 1) // 2, end * (end + 1) // 2
        lower = _lower(begin, end).to(part.device)
        products[first:last] += strip.view(-1).index_select(0, lower).long()


@cache
def _lower(begin: int, end: int) -> Tensor:
    """Return the indices of the lower triangle in its flattened rows `begin` to `end`."""
    rows, columns = torch.tril_indices(end - begin, end, begin)
    places: Tensor = rows * end + columns
    return places


def _triangles(flat: Tensor, layout: Layout) -> Iterator[Tensor]:
    """Yield each point's part of the flat tensor of lower triangles."""
    yield from flat.split([n * (n + 1) // 2 for n in layout.values])


def _pack(square: Tensor) -> Tensor:
    """Return the lower triangle of a symmetric matrix, row by row."""
    rows, columns = torch.tril_indices(len(square), len(square), device=square.device)
    return square[rows, columns]


def _unpack(triangle: Tensor, n: int) -> Tensor:
    """Return the symmetric matrix of a packed lower triangle, in float64."""
    square = triangle.new_zeros(n, n, dtype=torch.float64)
    rows, columns = torch.tril_indices(n, n, device=triangle.device)
    square[rows, columns] = triangle.double()
    square[columns, rows] = triangle.double()
    return square
