"""Range coverage: which neurons leave the range of values on trusted images of the class.

Rossolini, Biondi and Buttazzo, "Increasing the Confidence of Deep Neural Networks by Coverage
Analysis", IEEE TSE 2022 (arXiv 2101.12100), section IV: single-range and multi-range coverage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from covcli.methods.base import (
    METHODS,
    CostScorer,
    Method,
    add_counts,
    by_class,
    cell_index,
    picked,
)
from covcli.methods.layout import Layout
from covcli.methods.soft import hinge, interpolated
from covcli.methods.state import Expected, State

# How far rounding may move an activation, in units of the largest end of a range at its point.
ROUNDED = 1e-5
# In soft costs, the smallest width of a range, as a share of its neuron's mean width.
LEAST_WIDTH = 0.05
# The number of neurons counted at once; their memory fits into the CPU's cache.
COUNTED_AT_ONCE = 1 << 20
# The number of neurons of a class's images that fit into the CPU's cache.
CLASS_PIECE = 1 << 18
# The number of neurons of a point in one bag of `embedding_bag`.
BAG = 512


@METHODS.add("src")
@dataclass(frozen=True)
class SingleRange(Method):
    """Single-range coverage: the cost is 1 where a neuron is outside its class's range, else 0.

    The range of class k and neuron j is the closed interval [min, max] of its activation over the
    trusted images of class k. A class without trusted images has an empty range.

    Examples
    --------
    >>> from covcli.signature.fit import fold
    >>> layout = Layout(classes=1, sizes=(2,), values=(2,))
    >>> trusted = torch.tensor([[0.0, 5.0], [1.0, 6.0]]), torch.tensor([0, 0])
    >>> scorer = SingleRange().prepare(fold(SingleRange(), layout, lambda: [trusted]))
    >>> scorer.costs(torch.tensor([[0.5, 7.0]]), torch.tensor([0])).tolist()
    [[0.0, 1.0]]
    """

    name: ClassVar[str] = "src"

    def begin(self, layout: Layout) -> State:
        """Return empty ranges, (+inf, -inf), and counts of 0."""
        classes, neurons = layout.classes, layout.neurons
        state = State(layout)
        state.declare("low", torch.full((classes, neurons), torch.inf), "min")
        state.declare("high", torch.full((classes, neurons), -torch.inf), "max")
        state.declare("count", torch.zeros(classes, dtype=torch.int64), "sum")
        return state

    def observe(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Widen the ranges to include the batch, and count its images."""
        self.widen(state, neurons, labels)
        add_counts(state["count"], labels)

    def widen(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Widen the ranges to include the batch."""
        rows = labels[:, None].expand_as(neurons)
        state["low"].scatter_reduce_(0, rows, neurons, "amin")
        state["high"].scatter_reduce_(0, rows, neurons, "amax")

    def prepare(self, state: State) -> "RangeScorer":
        """Return the scorer that compares neurons with the ranges."""
        return RangeScorer(state.layout, {"low": state["low"], "high": state["high"]})

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        shape = (layout.classes, layout.neurons)
        return {
            "low": (torch.float32, shape),
            "high": (torch.float32, shape),
            "count": (torch.int64, (layout.classes,)),
        }


@METHODS.add("mrc")
@dataclass(frozen=True)
class MultiRange(SingleRange):
    """Multi-range coverage: the range is divided into sections, and rare sections cost more.

    Let n be the number of trusted images of the class, and c the number of those whose activation
    is in the same one of Q equal sections. The cost is

    - "share", as in the paper: 1 − c/n inside the range, 1 outside (`mrc-paper` also uses the
      paper's score);
    - "surprisal": −log((c + ½)/(n + Q/2)), with c = 0 outside. This is the Krichevsky-Trofimov
      estimate. It distinguishes rare sections, whose costs in the paper are all close to 1.

    Parameters
    ----------
    sections
        Q, the number of sections, at least 1.
    cost
        "surprisal" or "share".

    Examples
    --------
    >>> MultiRange(sections=4, cost="share").spec()
    'mrc?sections=4&cost=share'
    """

    name: ClassVar[str] = "mrc"
    counts: ClassVar[tuple[str, ...]] = ("sections",)
    sections: int = 10
    cost: str = "surprisal"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.cost not in ("surprisal", "share"):
            raise ValueError(f"cost={self.cost!r} is unknown; known: surprisal, share")

    def proceed(self, state: State) -> State | None:
        """Fix the ranges after the first pass; the second pass counts sections."""
        if "sections" in state.tensors:
            return None
        classes, neurons = state["low"].shape
        device = state["low"].device
        counting = State(state.layout)
        counting.declare("low", state["low"], "same")
        counting.declare("high", state["high"], "same")
        counting.declare("count", torch.zeros_like(state["count"]), "sum")
        counting.declare(
            "sections",
            torch.zeros((classes, neurons, self.sections), dtype=torch.int32, device=device),
            "sum",
        )
        return counting

    def observe(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Widen the ranges in the first pass; count sections in the second."""
        if "sections" not in state.tensors:
            super().observe(state, neurons, labels)
            return
        size = max(1, COUNTED_AT_ONCE // neurons.shape[1])
        for some, theirs in zip(neurons.split(size), labels.split(size), strict=True):
            self._count(state, some, theirs)
        add_counts(state["count"], labels)

    def _count(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        low, high = (state[end].index_select(0, labels) for end in ("low", "high"))
        section = self.section(neurons - low, self.scale(low, high))
        cells = cell_index(section, labels, self.sections).flatten()
        counts = state["sections"].view(-1)
        counts.scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))

    def align(self, parts: Sequence[State]) -> list[State]:
        """Return the parts with counts in sections of the union of their ranges.

        The count of a section goes to the new section that contains its centre, so no image moves
        by more than one section of its part. Parts with equal ranges are unchanged.
        """
        low, high = united(parts)
        return [self._recounted(part, low, high) for part in parts]

    def _recounted(self, part: State, low: Tensor, high: Tensor) -> State:
        known = (part["count"] > 0)[:, None]  # a class without images has no counts
        begin = torch.where(known, part["low"] - low, 0.0)
        width = torch.where(known, part["high"] - part["low"], 0.0)
        scale = self.scale(low, high)
        counts = torch.zeros_like(part["sections"])
        for q in range(self.sections):
            centre = begin + width * ((q + 0.5) / self.sections)
            places = self.section(centre, scale)
            counts.scatter_add_(2, places[:, :, None], part["sections"][:, :, q, None])
        return part.holding({**part.tensors, "low": low, "high": high, "sections": counts})

    def prepare(self, state: State) -> "SectionScorer":
        """Return the scorer that looks up the costs of sections."""
        return SectionScorer(state, self)

    def table(self, state: State) -> Tensor:
        """Return the costs, float32 of shape (classes, Q + 2, N).

        The rows are the Q sections, the last section again (for the upper bound), and outside.
        Consecutive neurons are often in the same section, so the neurons are the last dimension.
        """
        sections, count = state["sections"], state["count"].float()
        classes, neurons, _ = sections.shape
        table = sections.new_empty((classes, self.sections + 2, neurons), dtype=torch.float32)
        for mine, counted, n in zip(table, sections, count, strict=True):
            mine[:-2] = self._cost(counted.T.float(), n)
            mine[-2] = mine[-3]
            mine[-1] = self._cost(torch.zeros_like(n), n)
        return table

    def _cost(self, counted: Tensor, n: Tensor) -> Tensor:
        """Return the cost of sections that hold `counted` of n images."""
        if self.cost == "share":
            return 1 - counted / n.clamp_min(1)
        return -torch.log((counted + 0.5) / (n + self.sections / 2))

    def section(self, above: Tensor, scale: Tensor) -> Tensor:
        """Return each neuron's section, 0 to Q−1, int64; the parameters are those of `place`."""
        return self.place(above, scale).long().clamp_max_(self.sections - 1)

    def place(self, above: Tensor, scale: Tensor) -> Tensor:
        """Return each neuron's position in units of sections, 0 to Q, float32.

        Counting and scoring both use this function, so that rounding at the edges of sections is
        the same for both.

        Parameters
        ----------
        above
            The distance of each neuron from the lower bound of its range; changed in place.
        scale
            Sections per unit of activation, see `scale`.
        """
        return above.mul_(scale).clamp_(0, self.sections)

    def scale(self, low: Tensor, high: Tensor) -> Tensor:
        """Return Q/(high − low), float32 and finite; 0 for a range of no width."""
        width = high.double() - low.double()
        scale = torch.where(width > 0, self.sections / width, 0.0)
        return scale.clamp_max(torch.finfo(torch.float32).max).float()

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        shape = (layout.classes, layout.neurons, self.sections)
        return {**super().expected(layout), "sections": (torch.int32, shape)}


@METHODS.add("mrc-paper")
@dataclass(frozen=True)
class PaperMultiRange(MultiRange):
    """Multi-range coverage with the paper's cost, score and confidence.

    A neuron costs 1 − c/n inside the range and 1 outside (see `MultiRange`). The score is the
    coverage η itself: the mean over the L points of each point's mean cost, without logarithm,
    standardisation or soft maximum. So the confidence is the paper's too, c = exp(−η·ln 2/τ), with
    the calibrated threshold τ.

    Parameters
    ----------
    sections
        Q.
    cost
        "share".
    """

    name: ClassVar[str] = "mrc-paper"
    plain: ClassVar[bool] = True
    cost: str = "share"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.cost != "share":
            raise ValueError(f"cost={self.cost!r} is not the paper's; take mrc for it")

    def prepare(self, state: State) -> "SectionScorer":
        """Return the scorer that looks up the costs of sections."""
        return PlainSectionScorer(state, self)


def held(tensor: Tensor, part: Layout, classes: Tensor | int) -> Tensor:
    """Return the columns of some points of a tensor (classes, N), for one or each image's class."""
    if isinstance(classes, int):
        return tensor[classes, part.span]
    return tensor[:, part.span].index_select(0, classes)


@lru_cache(maxsize=1024)
def bag_starts(sizes: tuple[int, ...], images: int, dtype: torch.dtype) -> Tensor:
    """Return the first index of each bag in the flattened neurons of a batch of images."""
    begins = zip(accumulate(sizes, initial=0), sizes, strict=False)
    starts = [start for begin, size in begins for start in range(begin, begin + size, BAG)]
    every = torch.arange(images)[:, None] * sum(sizes) + torch.tensor(starts)
    return every.view(-1).to(dtype)


def united(parts: Sequence[State]) -> tuple[Tensor, Tensor]:
    """Return the bounds of the union of the ranges of all parts."""
    low = torch.stack([part["low"] for part in parts]).amin(0)
    return low, torch.stack([part["high"] for part in parts]).amax(0)


def rounding(low: Tensor, high: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return how far rounding may move each neuron, shape (N,), for ranges of shape (classes, N).

    It is relative to the largest end at the coverage point: a sum over a layer is as exact as its
    terms.
    """
    ends = torch.maximum(low.abs(), high.abs())
    largest = torch.where(ends.isfinite(), ends, 0.0).amax(0)
    return ROUNDED * torch.cat([part.amax().expand_as(part) for part in largest.split(list(sizes))])


class RangeScorer(CostScorer):
    """Compares neurons with ranges, see `SingleRange`.

    Values within rounding of a range belong to it. In images with a uniform background, many
    neurons have the same value, and this value is an end of their range. A batch of another size,
    another device or library rounds it differently, and would count all of them as outside.

    Parameters
    ----------
    layout
        The assignment of neurons to coverage points.
    buffers
        "low" and "high", the ends of the ranges, float32 of shape (classes, N), +inf and -inf for a
        class without images; and others.
    """

    low: Tensor
    high: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, layout: Layout, buffers: Mapping[str, Tensor]) -> None:
        low, high = buffers["low"], buffers["high"]
        reach = rounding(low, high, layout.sizes)
        super().__init__(layout, {**buffers, "lowest": low - reach, "highest": high + reach})

    def costs_at(self, part: Layout, neurons: Tensor, classes: Tensor | int) -> Tensor:
        """Return 1 outside the range, 0 inside; `classes` may be one class for all images."""
        return self._nearest(part, neurons, classes).ne_(neurons)  # NaN is outside

    def _nearest(self, part: Layout, neurons: Tensor, classes: Tensor | int) -> Tensor:
        """Return the nearest values in the ranges, or within rounding of them."""
        return neurons.clamp(held(self.lowest, part, classes), held(self.highest, part, classes))

    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return log(mean cost + 1/neurons) of each point, float64 of shape (B, L)."""
        # Tensors of a subclass are traced.
        if type(neurons) is Tensor and neurons.is_cpu and not torch.compiler.is_compiling():
            return self.of_sums(self._sums_by_class(neurons, classes))
        return super().forward(neurons, classes)

    def _sums_by_class(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the sums of each point's costs on a CPU, float64 of shape (B, L).

        The ranges of a class are read from memory once for all of its images, in pieces that fit
        into the cache.
        """
        sums = neurons.new_empty((len(neurons), len(self.layout.sizes)), dtype=torch.float64)
        for k, rows, count in by_class(classes):
            pieces = [
                self.class_sums(part, picked(neurons[:, part.span], rows), k)
                for part in self.layout.pieces(CLASS_PIECE // count)
            ]
            sums[rows] = torch.cat(pieces, 1)
        return sums

    def class_sums(self, part: Layout, neurons: Tensor, k: int) -> Tensor:
        """Return the sums of some points' costs for images of one class, float64 of (B, points)."""
        return part.sums(self.costs_at(part, neurons, k))

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are in the closed range of their class, or within rounding of it."""
        low, high = (ends.index_select(0, classes) for ends in (self.lowest, self.highest))
        return (neurons >= low) & (neurons <= high)

    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranges of those classes."""
        return self.low.index_select(0, classes), self.high.index_select(0, classes)

    def soft_costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the distance outside the range in units of its width, 0 inside."""
        low, high, width = (part[classes] for part in self._finite(neurons.dtype))
        return hinge(neurons, low, high, width)

    def _finite(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return finite bounds and a positive width of each class's ranges, each (classes, N)."""
        known = self.low <= self.high  # a class without images has an empty range
        low = torch.where(known, self.low, 0.0).to(dtype)
        high = torch.where(known, self.high, 0.0).to(dtype)
        width = high - low
        typical = width.sum(0) / known.sum(0).clamp_min(1)
        least = torch.where(typical > 0, LEAST_WIDTH * typical, 1.0)
        return low, high, torch.maximum(width, least)


class SectionScorer(RangeScorer):
    """Looks up the costs of sections, see `MultiRange`.

    Parameters
    ----------
    state
        The method's complete state.
    method
        Defines the sections and their costs.
    """

    scale: Tensor
    table: Tensor
    numbers: Tensor

    def __init__(self, state: State, method: MultiRange) -> None:
        ends = {"low": state["low"], "high": state["high"]}
        # The bounds of an empty range are infinite, and 0 times infinity is NaN.
        empty = ends["low"] > ends["high"]
        scale = torch.where(empty, 1.0, method.scale(ends["low"], ends["high"]))
        table = method.table(state)
        small = table.numel() < 1 << 31  # int32 is faster
        numbers = torch.arange(state.layout.neurons, dtype=torch.int32 if small else torch.int64)
        places = {"table": table, "numbers": numbers.to(table.device)}
        super().__init__(state.layout, {**ends, "scale": scale, **places})
        self.method = method

    def costs_at(self, part: Layout, neurons: Tensor, classes: Tensor | int) -> Tensor:
        """Return the cost of each neuron's section."""
        cells = self._cells(part, neurons, classes)
        return self.table.view(-1).index_select(0, cells.view(-1)).view_as(cells)

    def class_sums(self, part: Layout, neurons: Tensor, k: int) -> Tensor:
        """Return the sums of some points' costs for images of one class, looked up in one step.

        A bag of neurons is summed in float32, which loses little precision.
        """
        cells = self._cells(part, neurons, k)
        bags = tuple(-(-size // BAG) for size in part.sizes)
        starts = bag_starts(part.sizes, len(neurons), cells.dtype)
        sums = embedding_bag(cells.view(-1), self.table.view(-1, 1), starts, mode="sum")
        return Layout(part.classes, bags, bags).sums(sums.view(len(neurons), sum(bags)))

    def _cells(self, part: Layout, neurons: Tensor, classes: Tensor | int) -> Tensor:
        """Return the index of each neuron's cost in the flattened table."""
        nearest = self._nearest(part, neurons, classes)
        # Numbers instead of bool: on a CPU, filling by a mask takes longer than all the rest.
        outside = nearest.clone().ne_(neurons)
        above = nearest.sub_(held(self.low, part, classes))
        row = self.method.place(above, held(self.scale, part, classes))
        last = self.method.sections + 1
        row = row.add_(outside, alpha=last).clamp_max_(last).nan_to_num_(last)
        rows, width = self.table.shape[1:]
        first = classes * (rows * width)
        if isinstance(first, Tensor):
            first = first.to(self.numbers.dtype)[:, None]
        return torch.add(self.numbers[part.span] + first, row.to(self.numbers.dtype), alpha=width)

    def soft_costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the cost interpolated between section centres, plus the distance outside.

        From half a section beyond the range, the cost is that of a neuron outside. Farther away,
        only the distance in units of the width has a gradient.
        """
        low, high, width = (part[classes] for part in self._finite(neurons.dtype))
        sections = self.method.sections
        outside = self.table[:, -1:]
        table = torch.cat([outside, self.table[:, :sections], outside], 1).mT.to(neurons.dtype)
        distance = hinge(neurons, low, high, width)
        span = torch.where(high > low, high - low, 1.0)
        place = (neurons - low) / span * sections + 0.5  # 0 is the centre left of the range
        place = torch.where(high > low, place, 1 - distance)  # a range of zero width
        return interpolated(table, classes, place) + distance


class PlainSectionScorer(SectionScorer):
    """Looks up the costs of sections; the evidence is their plain mean, without logarithm."""

    def of_sums(self, sums: Tensor) -> Tensor:
        """Return each point's mean cost, float64 of shape (B, L)."""
        return sums.double() / self.widths
