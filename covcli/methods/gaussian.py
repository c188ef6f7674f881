"""Gaussian coverage: how far a layer lies from its class, in the metric of trusted deviations.

Lee, Lee, Lee and Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks", NeurIPS 2018, section 2: class means and one covariance for all classes. Here
at every coverage point, towards the predicted class, and with a shrunk covariance.
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
from covcli.methods.base import METHODS, Method
from covcli.methods.state import Expected, Layout, State, blocks

# A neuron that hardly varies counts as deviating this share of its point's root mean square
# deviation, or one that never fired on trusted images would outweigh all others.
LEAST_DEVIATION = 0.01
MOST_VALUES = 4096
SPAN = 3.0
# Values are summed as whole numbers of at most so many bits: products of two, and sums of a batch
# of them, are exact in double precision, and sums over 8 million images in 64-bit integers.
BITS = 20
STRIP = 128


@METHODS.add("gauss")
@dataclass(frozen=True)
class Gauss(Method):
    """Layer-wise Mahalanobis distance of the channel means to the predicted class.

    With μ_k the mean of class k's trusted images and Σ the covariance around these means, shared
    by the classes, a point of V channel means x costs d²/V, where d² = (x − μ_k)ᵀ Σ⁻¹ (x − μ_k):
    about 1 for trusted images. Σ is shrunk towards its diagonal (Ledoit and Wolf, 2004, with a
    fixed intensity). Maxima are not looked at.

    Parameters
    ----------
    shrinkage
        Intensity in (0, 1]: 1 keeps only the diagonal.
    """

    name: ClassVar[str] = "gauss"
    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        """Check the parameter."""
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage} does not lie in (0, 1]")

    def begin(self, layout: Layout) -> State:
        """Return peaks of 0: the first pass finds how large each value gets.

        Raises
        ------
        CovcliError
            If a point has more than 4,096 values: their covariance would not fit.
        """
        self._check(layout)
        state = State()
        state.declare("peak", torch.zeros(sum(layout.values)), "max")
        return state

    def _check(self, layout: Layout) -> None:
        if max(layout.values) > MOST_VALUES:
            raise CovcliError(
                f"{self.name} cannot hold the covariance of {max(layout.values)} neurons",
                fix="use --granularity channel, or the method src or mrc",
            )

    def observe(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Find the largest values in the first pass; sum values and their products in the second.

        The sums are of whole numbers of a unit, so no order or grouping of images changes a bit.
        """
        if "unit" in state.tensors:
            self._sum(state, layout, neurons, labels)
        elif len(neurons):
            largest = layout.values_of(neurons).abs().amax(0)
            torch.maximum(state["peak"], largest, out=state["peak"])

    def _sum(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        whole = whole_numbers(state, layout.values_of(neurons))
        state["total"].add_(sums_by_class(whole, labels, layout.classes))
        state["count"].add_(torch.bincount(labels, minlength=layout.classes))
        parts = whole.split(layout.values, 1)
        for products, part in zip(_triangles(state["products"], layout), parts, strict=True):
            _add_products(products, part)

    def proceed(self, state: State, layout: Layout) -> State | None:
        """Choose each value's unit after the first pass: a power of two, 2^20 to its peak."""
        if "unit" in state.tensors:
            return None
        return self._summing(state["peak"], layout)

    def _summing(self, peaks: Tensor, layout: Layout) -> State:
        units = [math.ldexp(1.0, math.frexp(peak)[1] - BITS) for peak in peaks.tolist()]
        summing = State.of_sums(self.sums(layout)).to(peaks.device)
        summing.declare("unit", peaks.new_tensor(units, dtype=torch.float64), "same")
        return summing

    def align(self, parts: Sequence[State], layout: Layout) -> list[State]:
        """Return the parts in the larger one of their units, which rounds each sum once."""
        unit = torch.stack([part["unit"] for part in parts]).amax(0)
        return [self._scaled(part, part["unit"] / unit, unit, layout) for part in parts]

    def _scaled(self, part: State, ratio: Tensor, unit: Tensor, layout: Layout) -> State:
        """Return a part in another unit; the ratio is that of the old one to the new one."""
        pairs = torch.cat([_pack(r[:, None] * r) for r in ratio.split(layout.values)])
        scaled = {
            "unit": unit,
            "total": rescaled(part["total"], ratio),
            "products": rescaled(part["products"], pairs),
        }
        return State(part.tensors | scaled, dict(part.reductions))

    def prepare(self, state: State, layout: Layout) -> State:
        """Return class means, deviations, and each point's whitening matrix.

        Raises
        ------
        CovcliError
            If a point's covariance is singular: too few images for so little shrinkage.
        """
        mean = class_means(state)
        deviations, whitening = [], []
        triangles = _triangles(state["products"], layout)
        means = mean.split(layout.values, 1)
        units = state["unit"].split(layout.values)
        parts = zip(triangles, means, units, strict=True)
        for number, (triangle, center, unit) in enumerate(parts):
            products = _unpack(triangle, len(unit)) * unit * unit[:, None]
            deviation, white = self._whiten(products, center, state["count"], number)
            deviations.append(deviation)
            whitening.append(white)
        pairs = zip(whitening, self._directions(state, layout, whitening), strict=True)
        return State({
            "mean": mean.float(),
            "deviation": torch.cat(deviations).float(),
            **_halves([torch.cat(pair) for pair in pairs]),
        })  # fmt: skip

    def _directions(
        self, state: State, layout: Layout, whitening: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return what stands below each whitening matrix, shapes (directions, V)."""
        return [white[:0] for white in whitening]

    def _whiten(
        self, products: Tensor, mean: Tensor, count: Tensor, number: int
    ) -> tuple[Tensor, Tensor]:
        """Return the deviations (V,), and a W of shape (V, V) with WᵀW = Σ⁻¹, of one point."""
        n = count.to(mean.dtype)
        between = (mean * n[:, None]).T @ mean
        covariance = (products - between) / n.sum().clamp_min(1)
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        typical = float(deviation.square().mean().sqrt())
        deviation = deviation.clamp_min(LEAST_DEVIATION * typical if typical > 0 else 1.0)
        correlation = covariance / deviation / deviation[:, None]
        shrunk = (1 - self.shrinkage) * correlation
        shrunk.diagonal().copy_(torch.ones_like(deviation))  # both ends have the same diagonal
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        if bool(failed):
            raise CovcliError(
                f"the covariance at coverage point {number + 1} is singular",
                where=self.spec(),
                fix="take more trusted images or more shrinkage",
            )
        unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        white = torch.linalg.solve_triangular(factor, unit, upper=False)
        return deviation, white / deviation

    def evidence(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return log(d²/V) of each point, float64 of shape (B, L)."""
        whitened = self._products(ready, layout, neurons, classes)
        return log_distances([square_sums(part) for part in whitened], layout)

    def _products(
        self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor
    ) -> Iterator[Tensor]:
        """Yield the products of points' matrices with their values less the class's means.

        Yields
        ------
        Tensor
            Of neighbouring points of equal width at once, shape (points, rows, B).
        """
        away = self._away(ready, layout, neurons, classes)
        for number, block in enumerate(blocks(away, layout.values)):
            upper, lower = ready[f"upper.{number}"], ready[f"lower.{number}"]
            values = block.permute(1, 2, 0)
            yield torch.cat([upper @ values[:, : upper.shape[2]], lower @ values], 1)

    def _away(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        return layout.values_of(neurons) - ready["mean"].index_select(0, classes)

    def soft_evidence(
        self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor
    ) -> Tensor:
        """Return the evidence, which has a gradient."""
        return self.evidence(ready, layout, neurons, classes)

    def costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each value's squared distance in its own deviations; 0 for maxima."""
        costs = torch.zeros_like(neurons)
        columns = layout.value_columns.to(neurons.device)
        costs[:, columns] = self._apart(ready, layout, neurons, classes).square()
        return costs

    def inside(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which values lie within three deviations of their class; maxima always do."""
        low, high = self.span(ready, layout, classes)
        return (neurons >= low) & (neurons <= high)

    def _apart(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        return self._away(ready, layout, neurons, classes) / ready["deviation"]

    def span(self, ready: State, layout: Layout, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class's mean less and plus three deviations; no ends for maxima."""
        shape = (len(classes), layout.neurons)
        high = ready["mean"].new_full(shape, torch.inf)
        low, columns = -high, layout.value_columns
        reach = SPAN * ready["deviation"]
        low[:, columns] = ready["mean"][classes] - reach
        high[:, columns] = ready["mean"][classes] + reach
        return low, high

    def sums(self, layout: Layout) -> Expected:
        """Return the type and shape of the tensors that the second pass sums."""
        packed = sum(n * (n + 1) // 2 for n in layout.values)
        return {
            "count": (torch.int64, (layout.classes,)),
            "total": (torch.int64, (layout.classes, sum(layout.values))),
            "products": (torch.int64, (packed,)),
        }

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        return {**self.sums(layout), "unit": (torch.float64, (sum(layout.values),))}


def square_sums(whitened: Tensor) -> Tensor:
    """Return the squared norms (points, B) of whitened values (points, V, B), float64."""
    return whitened.square().sum(1, dtype=torch.float64)


def log_distances(squares: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return log(d²/V), finite, float64 of shape (B, L), from d² in parts of shape (points, B)."""
    limits = torch.finfo(torch.float64)
    costs = torch.cat(list(squares)).T / layout.value_counts.to(squares[0].device)
    return torch.log(costs.clamp(limits.tiny, limits.max))


def _halves(matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return lower triangular matrices in halves, the upper ones without their right quarters.

    Neighbouring matrices of equal width are one tensor, float32 of shape (points, rows, columns).
    """
    halves = {}
    runs = groupby(matrices, lambda matrix: matrix.shape[1])
    for number, (width, run) in enumerate(runs):
        whole = torch.stack(list(run)).float()
        halves[f"upper.{number}"] = whole[:, : width // 2, : width // 2].contiguous()
        halves[f"lower.{number}"] = whole[:, width // 2 :].contiguous()
    return halves


def class_means(state: State) -> Tensor:
    """Return each class's mean (K, V), float64; the mean of all for a class without images."""
    count = state["count"].to(torch.float64)[:, None]
    total = state["total"] * state["unit"]
    overall = total.sum(0) / count.sum().clamp_min(1)
    return torch.where(count > 0, total / count.clamp_min(1), overall)


def rescaled(sums: Tensor, ratio: Tensor) -> Tensor:
    """Return integer sums times a power of two, rounded; untouched where that is 1."""
    return torch.where(ratio == 1, sums, (sums * ratio).round().long())


def whole_numbers(state: State, values: Tensor) -> Tensor:
    """Return values (B, V) in their units, rounded, as float64."""
    return values.double().div_(state["unit"]).round_()


def sums_by_class(whole: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the sums of whole numbers (B, V) by class, int64 of shape (classes, V)."""
    members: Tensor = torch.nn.functional.one_hot(labels, classes).to(whole.dtype)
    sums: Tensor = members.T @ whole
    return sums.long()


def _add_products(products: Tensor, part: Tensor) -> None:
    """Add partᵀ·part to its packed lower triangle, in strips that leave out most of the upper."""
    width = part.shape[1]
    for begin in range(0, width, STRIP):
        end = min(begin + STRIP, width)
        strip = part[:, begin:end].T @ part[:, :end]
        first, last = begin * (begin + 1) // 2, end * (end + 1) // 2
        lower = _lower(begin, end).to(part.device)
        products[first:last] += strip.view(-1).index_select(0, lower).long()


@cache
def _lower(begin: int, end: int) -> Tensor:
    """Return where the lower triangle stands in its flattened rows `begin` to `end`, row by row."""
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
