"""Gaussian coverage: the Mahalanobis distance of each layer's channel means from the class.

Lee, Lee, Lee and Shin, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks", NeurIPS 2018, section 2: class means and one covariance for all classes. Here
the distance to the predicted class is computed at every coverage point, with a shrunk covariance.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from covcli.methods.base import METHODS, Method, Scorer, add_counts
from covcli.methods.layout import Layout
from covcli.methods.moments import bits, common_peaks, expected_moments, moments, rescaled
from covcli.methods.normal import (
    StoredModel,
    check_normal,
    expected_normal,
    fit_normal,
    within,
)
from covcli.methods.state import Expected, State, check_tensors

SPAN = 3.0
# Values farther away than this many deviations count as that far, so that squares stay finite.
FARTHEST = 1e15
# The largest width in a group of points that are computed together, as a multiple of the smallest.
PADDED = 1.5
# The number of images whose products are summed in float64 at once.
EXACT_IMAGES = 2048


@METHODS.add("gauss")
@dataclass(frozen=True)
class Gauss(Method):
    """Layer-wise Mahalanobis distance of the channel means to the predicted class.

    With μ_k the mean of class k's trusted images and Σ the covariance around these means, shared
    by the classes, a point of V channel means x costs d²/V, where d² = (x − μ_k)ᵀ Σ⁻¹ (x − μ_k):
    about 1 for trusted images. Σ is shrunk towards its diagonal (Ledoit and Wolf, 2004, with a
    fixed intensity). Of a point with more than 64 values, the 64 leading directions of the
    correlation are kept, and one variance for all others (see `covcli.methods.normal`). Maxima are
    not used.

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
    mergeable: ClassVar[bool] = False
    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        """Check the parameter."""
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage} is not in (0, 1]")

    def begin(self, layout: Layout) -> State:
        """Return peaks of 0: the first pass determines the largest magnitude of each value."""
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
        for images in whole.split(EXACT_IMAGES):
            parts = images.split(layout.values, 1)
            for products, part in zip(moments(state), parts, strict=True):
                products.add(part)

    def proceed(self, state: State) -> State | None:
        """Choose each value's unit after the first pass: a power of two, about peak/2^20.

        The values of a point with more than 4,096 have one unit, of fewer bits.
        """
        if "unit" in state.tensors:
            return None
        return self.summing(state.layout, state["peak"])

    def summing(self, layout: Layout, peaks: Tensor, **same: Tensor) -> State:
        """Return sums of 0, units for values of at most these peaks, shape (V,), and `same`."""
        peaks = common_peaks(peaks, layout)
        widths = [bits(n) for n in layout.values for _ in range(n)]
        units = [
            math.ldexp(1.0, math.frexp(peak)[1] - width)
            for peak, width in zip(peaks.tolist(), widths, strict=True)
        ]
        unit = peaks.new_tensor(units, dtype=torch.float64)
        return State.of_sums(layout, self.sums(layout), unit=unit, **same)

    def align(self, parts: Sequence[State]) -> list[State]:
        """Return the parts in the largest of their units; each sum is rounded once."""
        unit = torch.stack([part["unit"] for part in parts]).amax(0)
        return [self._scaled(part, part["unit"] / unit, unit) for part in parts]

    def _scaled(self, part: State, ratio: Tensor, unit: Tensor) -> State:
        """Return a part in another unit; `ratio` is the old unit divided by the new one."""
        scaled = part.holding({k: v.clone() for k, v in part.tensors.items()})
        factors = ratio.split(part.layout.values)
        for products, factor in zip(moments(scaled), factors, strict=True):
            products.rescale(factor)
        scaled.tensors |= {"unit": unit, "total": rescaled(part["total"], ratio)}
        return scaled

    def condense(self, sums: State, room: int | None = None) -> State:
        """Return the normal model of each point, exact or compact as there is room.

        Raises
        ------
        CovcliError
            If a point's covariance is singular: too few images for so little shrinkage.
        """
        device = sums["unit"].device
        model = fit_normal(sums.to(torch.device("cpu")), self.shrinkage, self.spec())
        return within(sums.layout, room, model.exact, model.compact).to(device)

    def prepare(self, state: State) -> "GaussScorer":
        """Return the scorer that computes distances; a state of sums is condensed first."""
        if "unit" in state.tensors:
            state = self.condense(state)
        return GaussScorer(state.layout, StoredModel.of(state))

    def sums(self, layout: Layout) -> Expected:
        """Return the type and shape of the tensors that the second pass sums."""
        return {
            "count": (torch.int64, (layout.classes,)),
            "total": (torch.int64, (layout.classes, sum(layout.values))),
            **expected_moments(layout),
        }

    def expected(self, layout: Layout) -> Expected:
        """Return the tensors of a complete state."""
        return {**self.sums(layout), "unit": (torch.float64, (sum(layout.values),))}

    def check(self, state: State) -> None:
        """Raise a ValueError unless a state from a file can be a condensed one."""
        check_tensors(state, expected_normal(state, directed=False))
        check_normal(state)


class GaussScorer(Scorer):
    """Computes distances, see `Gauss`, and displacements along given directions.

    Parameters
    ----------
    layout
        The assignment of neurons to coverage points.
    model
        The normal models of trusted values.
    """

    mean: Tensor
    deviation: Tensor
    places: Tensor
    counts: Tensor
    unit: Tensor
    read: Tensor
    stored: Tensor
    order: Tensor

    def __init__(self, layout: Layout, model: StoredModel) -> None:
        device = model.mean.device
        groups = _grouped(layout.values)
        taken = [span for group in groups for span in _spans(layout, group)]
        order = torch.tensor([point for group in groups for point in group.points]).argsort()
        slots = _slots(layout, groups).to(device)
        read = slots >= 0
        units = model.deviation * torch.cat(_per_value(model.rest.sqrt(), layout))
        columns = layout.value_columns.to(device)
        buffers = {
            "mean": model.mean[:, slots].where(read, 0.0),
            "deviation": model.deviation,
            "places": columns.clone(),
            "counts": torch.tensor(layout.values, dtype=torch.float64, device=device),
            "unit": units[slots].where(read, torch.inf),  # so that what pads is 0
            "read": torch.cat([torch.arange(*span) for span in taken]).to(device),
            "stored": read.nonzero()[:, 0][slots[read].argsort()],
            "order": order.to(device),
        }
        super().__init__(layout, buffers)
        runs = list(_runs(model, groups))
        self.runs = nn.ModuleList(runs)
        self.widths = [run.width for run in runs]
        # The same columns as slices: which parts to take of the neurons, cut at their ends.
        edges = sorted({0, layout.neurons}.union(*taken))
        self.cut = [end - begin for begin, end in pairwise(edges)]
        self.kept = [i for begin, end in taken
                     for i in range(edges.index(begin), edges.index(end))]  # fmt: skip

    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return log(d²/V) of each point, float64 of shape (B, L)."""
        return self.measure(neurons, classes)[0]

    def measure(self, neurons: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return log(d²/V), made finite, and the displacement along the directions, (B, L) each."""
        apart = self._values(neurons) - self.mean.index_select(0, classes)
        values = (apart / self.unit).clamp(-FARTHEST, FARTHEST)
        parts = zip(self.runs, values.split_with_sizes(self.widths, 1), strict=True)
        squares, along = zip(*(run(part) for run, part in parts), strict=True)
        limits = torch.finfo(torch.float64)
        costs = torch.cat(squares).index_select(0, self.order).T / self.counts
        displaced = torch.cat(along).index_select(0, self.order).transpose(0, 1).flatten(1)
        return torch.log(costs.clamp(limits.tiny, limits.max)), displaced.double()

    def _values(self, neurons: Tensor) -> Tensor:
        """Return the values, in the order of the groups and padded."""
        if not torch.compiler.is_compiling():
            return neurons.index_select(1, self.read)
        parts = neurons.split_with_sizes(self.cut, 1)  # ONNX Runtime copies slices much faster
        return torch.cat([parts[i] for i in self.kept], 1)

    def costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each value's squared distance in units of its deviation; 0 for maxima."""
        mean = self._mean(classes)
        apart = (neurons.index_select(1, self.places) - mean) / self.deviation
        return torch.zeros_like(neurons).index_copy(1, self.places, apart.square())

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which values are within three deviations of their class; maxima always are."""
        low, high = self.span(classes)
        return (neurons >= low) & (neurons <= high)

    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class mean ± three deviations; infinite bounds for maxima."""
        mean, reach = self._mean(classes), SPAN * self.deviation
        free = mean.new_full((classes.shape[0], self.layout.neurons), torch.inf)
        low, high = mean - reach, mean + reach
        return -free.index_copy(1, self.places, -low), free.index_copy(1, self.places, high)

    def _mean(self, classes: Tensor) -> Tensor:
        """Return the mean of each image's class, in the order of the values, shape (B, V)."""
        return self.mean.index_select(0, classes).index_select(1, self.stored)


@dataclass(frozen=True)
class WidthGroup:
    """Points of similar width, which are computed together.

    Attributes
    ----------
    points
        Their numbers.
    width
        The width of the widest; the others are padded to it.
    """

    points: tuple[int, ...]
    width: int

    @property
    def values(self) -> int:
        """The number of values, with those that pad."""
        return len(self.points) * self.width


def _grouped(widths: Sequence[int]) -> list[WidthGroup]:
    """Group points by width: within a group, the widest is at most PADDED times the narrowest.

    A network may have dozens of widths, and many small products take longer than a few larger ones.
    """
    groups: list[list[int]] = []
    for point in sorted(range(len(widths)), key=lambda each: widths[each]):
        if not groups or widths[point] > PADDED * widths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(point)
    return [WidthGroup(tuple(sorted(points)), widths[points[-1]]) for points in groups]


def _slots(layout: Layout, groups: Sequence[WidthGroup]) -> Tensor:
    """Return the number of each value in the order of the groups; −1 for those that pad."""
    slots = []
    own = torch.arange(sum(layout.values)).split(layout.values)
    for group in groups:
        slots += [pad(own[point], (0, group.width - len(own[point])), value=-1)
                  for point in group.points]  # fmt: skip
    return torch.cat(slots)


def _spans(layout: Layout, group: WidthGroup) -> Iterator[tuple[int, int]]:
    """Yield the columns that a group of points reads, begin and end; any others pad a value."""
    ends = list(accumulate(layout.sizes))
    for point in group.points:
        size, own = layout.sizes[point], layout.values[point]
        begin = ends[point] - size
        if group.width <= size:
            yield begin, begin + group.width
        else:
            yield begin, begin + own
            yield begin, begin + group.width - own


def _per_value(of_points: Tensor, layout: Layout) -> list[Tensor]:
    """Return one number a point (L,) once a value of that point."""
    return [each.expand(width) for each, width in zip(of_points, layout.values, strict=True)]


class _Run(nn.Module):
    """The normal models of a group of points, stacked, in units of σ.

    Parameters
    ----------
    rows
        The leading directions U of each point, with rows of 0 at points of a lower rank, and then
        its further direction, if there is one: shape (points, r + 1 or r, V).
    factors
        σ/√λ of each leading direction, shape (points, 1, r).
    """

    rows: Tensor
    factors: Tensor

    def __init__(self, rows: Tensor, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("factors", factors)
        self.shape = (len(rows), rows.shape[2])
        self.width = len(rows) * rows.shape[2]
        self.ranks = [factors.shape[2], rows.shape[1] - factors.shape[2]]

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return d² and the displacements along the further directions.

        With z a point's values and q their leading components, d² is ‖z − Uᵀq‖² + Σ q²·σ²/λ. No
        term is negative, and none cancels another.

        Parameters
        ----------
        values
            The distances from the class, times 1/σ in deviations, shape (B, points·V).

        Returns
        -------
        tuple of Tensor
            d², float64 of shape (points, B), and the displacements, shape (points, B, 1 or 0).
        """
        points = values.view(-1, *self.shape).transpose(0, 1)
        components = torch.bmm(points, self.rows.mT)
        leading, along = components.split_with_sizes(self.ranks, 2)
        rest = torch.baddbmm(points, leading, self.rows.narrow(1, 0, self.ranks[0]), alpha=-1)
        terms = torch.cat([rest, leading * self.factors], 2)
        return terms.square().sum(2, dtype=torch.float64), along


def _runs(model: StoredModel, groups: Sequence[WidthGroup]) -> Iterator[_Run]:
    """Yield the models of each group, padded with zeros."""
    for points, width in ((group.points, group.width) for group in groups):
        bases, rest = [model.bases[i] for i in points], model.rest[list(points), None, None]
        rank = max(len(basis) for basis in bases)
        rows = torch.stack([_padded(basis, rank, width) for basis in bases])
        inverse = [1 / model.eigenvalues[i] for i in points]
        weights = torch.stack([pad(each, (0, rank - len(each))) for each in inverse])
        if model.directions:
            directions = [_padded(model.directions[i][None], 1, width) for i in points]
            rows = torch.cat([rows, torch.stack(directions) * rest.sqrt()], 1)
        yield _Run(rows, (weights[:, None] * rest).sqrt())


def _padded(rows: Tensor, count: int, width: int) -> Tensor:
    return pad(rows, (0, width - rows.shape[1], 0, count - len(rows)))


def whole_numbers(state: State, values: Tensor) -> Tensor:
    """Return values (B, V) as integer multiples of their units, in float64."""
    return values.double().div_(state["unit"]).round_()
