"""Range coverage: which neurons left the values that trusted images of the class gave them.

Rossolini, Biondi and Buttazzo, "Increasing the Confidence of Deep Neural Networks by Coverage
Analysis", IEEE TSE 2022 (arXiv 2101.12100), section IV: single-range and multi-range coverage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from covcli.methods.base import METHODS, Method, by_class, cell_index, log_sums, picked
from covcli.methods.soft import hinge, interpolated
from covcli.methods.state import Expected, Layout, State, bag_counts, bag_starts, whole_sums

# In soft costs a range narrower than this share of its neuron's mean width counts as that wide.
LEAST_WIDTH = 0.05
# So many neurons are counted at once: what that takes stays in the cache.
COUNTED_AT_ONCE = 1 << 20
# So many neurons, of one image or several, fit the cache with what they are compared with: each
# image's ends, or those of one class.
WHOLE = 1 << 20
PIECE = 1 << 18
ENDS = ("low", "high")
ALL = slice(None)


@METHODS.add("src")
@dataclass(frozen=True)
class SingleRange(Method):
    """Single-range coverage: the cost is 1 where a neuron is outside its class's range, else 0.

    The range of class k and neuron j is [min, max] of its activation over the trusted images of
    class k. Ends belong to it. A class without trusted images has an empty range.
    """

    name: ClassVar[str] = "src"
    at_once: ClassVar[int] = 1 << 25

    def begin(self, layout: Layout) -> State:
        """Return empty ranges, (+inf, -inf), and counts of 0."""
        classes, neurons = layout.classes, layout.neurons
        state = State()
        state.declare("low", torch.full((classes, neurons), torch.inf), "min")
        state.declare("high", torch.full((classes, neurons), -torch.inf), "max")
        state.declare("count", torch.zeros(classes, dtype=torch.int64), "sum")
        return state

    def observe(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Widen the ranges to what the batch shows, and count its images."""
        self.widen(state, neurons, labels)
        state["count"].add_(torch.bincount(labels, minlength=layout.classes))

    def widen(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Widen the ranges to what the batch shows."""
        for k, rows, _ in by_class(labels):
            mine = picked(neurons, rows)
            torch.minimum(state["low"][k], mine.amin(0), out=state["low"][k])
            torch.maximum(state["high"][k], mine.amax(0), out=state["high"][k])

    def costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return 1 outside the range, 0 inside."""
        return self.costs_at(ALL, ready, neurons, classes)

    def costs_at(self, span: slice, ready: State, neurons: Tensor, classes: Tensor | int) -> Tensor:
        """Return the costs of neurons (B, width) that stand at `span`; `classes` may be one."""
        low, high = (_held(ready[key], classes, span) for key in ENDS)
        return _differ(neurons, neurons.clamp(low, high))

    def soft_costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the distance outside the range in widths of the range, 0 inside."""
        low, high, width = (part[classes] for part in _ranges(ready, neurons.dtype))
        return hinge(neurons, low, high, width)

    def inside(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons lie in the closed range of their class."""
        low, high = self.span(ready, layout, classes)
        return (neurons >= low) & (neurons <= high)

    def evidence(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the log of each point's mean cost; see `Method.evidence`.

        Many neurons are read class by class and a few points at a time: what a class compares these
        with is read from memory once, for all of its images.
        """
        # There are caches to fit on a CPU alone; elsewhere fewer and larger operations pay.
        few = len(neurons) != 1 and neurons.numel() <= WHOLE
        if few or neurons.device.type != "cpu":
            sums = self.sums_at(ALL, layout, ready, neurons, classes)
            return log_sums(whole_sums(sums, layout), layout)
        found = []
        for k, rows, count in by_class(classes):
            mine = [
                self.sums_at(span, part, ready, picked(neurons[:, span], rows), k)
                for span, part in layout.pieces(PIECE // count)
            ]
            found.append((rows, torch.cat(mine, 1)))
        sums = neurons.new_empty((len(neurons), found[0][1].shape[1]), dtype=torch.float64)
        for rows, theirs in found:
            sums[rows] = theirs.double()
        return log_sums(whole_sums(sums, layout), layout)

    def sums_at(
        self, span: slice, part: Layout, ready: State, neurons: Tensor, classes: Tensor | int
    ) -> Tensor:
        """Return the sums of costs of the points that stand at `span`, or of their bags.

        Returns
        -------
        Tensor
            Shape (B, points), or (B, bags) where a point's neurons are cut into `bags`.
        """
        return part.sums(self.costs_at(span, ready, neurons, classes))

    def span(self, ready: State, layout: Layout, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranges of those classes."""
        low, high = (_held(ready[key], classes, ALL) for key in ENDS)
        return low, high

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
    """Multi-range coverage: the range is cut into sections, and rare sections cost more.

    With c the number of trusted images of the class (n in all) whose activation lies in the same
    one of Q equal sections, the cost is

    - "share", the paper's: 1 − c/n inside the range, 1 outside;
    - "surprisal": −log((c + ½)/(n + Q/2)), with c = 0 outside; the Krichevsky-Trofimov estimate,
      which tells apart what the paper's cost lumps together near 1.

    Parameters
    ----------
    sections
        Q.
    cost
        "surprisal" or "share".
    """

    name: ClassVar[str] = "mrc"
    sections: int = 10
    cost: str = "surprisal"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.cost not in ("surprisal", "share"):
            raise ValueError(f"cost={self.cost!r} is unknown; known: surprisal, share")

    def proceed(self, state: State, layout: Layout) -> State | None:
        """Settle the ranges after the first pass, and count sections in a second."""
        if "sections" in state.tensors:
            return None
        classes, neurons = state["low"].shape
        device = state["low"].device
        counting = State()
        counting.declare("low", state["low"], "same")
        counting.declare("high", state["high"], "same")
        counting.declare("count", torch.zeros_like(state["count"]), "sum")
        counting.declare(
            "sections",
            torch.zeros((classes, neurons, self.sections), dtype=torch.int32, device=device),
            "sum",
        )
        return counting

    def observe(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Widen the ranges in the first pass; count sections in the second."""
        if "sections" not in state.tensors:
            super().observe(state, layout, neurons, labels)
            return
        size = max(1, COUNTED_AT_ONCE // neurons.shape[1])
        for some, theirs in zip(neurons.split(size), labels.split(size), strict=True):
            self._count(state, some, theirs)
        count = state["count"]
        count += torch.bincount(labels, minlength=len(count))

    def _count(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        low, high = (state[end].index_select(0, labels) for end in ("low", "high"))
        section = self.section(neurons - low, self._scale(low, high))
        cells = cell_index(section, labels, self.sections).flatten()
        counts = state["sections"].view(-1)
        counts.scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))

    def align(self, parts: Sequence[State], layout: Layout) -> list[State]:
        """Return the parts counted in sections of the range that holds all of their ranges.

        A section is counted where its centre lies, so no image moves by more than one section of
        its part. Parts with equal ranges stay as they are.
        """
        low, high = united(parts)
        return [self._recounted(part, low, high) for part in parts]

    def _recounted(self, part: State, low: Tensor, high: Tensor) -> State:
        known = (part["count"] > 0)[:, None]  # without images there is nothing to count
        begin = torch.where(known, part["low"] - low, 0.0)
        width = torch.where(known, part["high"] - part["low"], 0.0)
        scale = self._scale(low, high)
        counts = torch.zeros_like(part["sections"])
        for q in range(self.sections):
            centre = begin + width * ((q + 0.5) / self.sections)
            places = self.section(centre, scale)
            counts.scatter_add_(2, places[:, :, None], part["sections"][:, :, q, None])
        tensors = {**part.tensors, "low": low, "high": high, "sections": counts}
        return State(tensors, dict(part.reductions))

    def prepare(self, state: State, layout: Layout) -> State:
        """Return the ranges and a table of costs.

        The table has shape (classes, Q + 2, N): the cost of each section, of the last one again,
        for the upper end, and outside. Neighbouring neurons often lie in the same section, and
        then are neighbours in it. `columns` numbers the neurons.
        """
        low, high, count, sections = (state[key] for key in ("low", "high", "count", "sections"))
        shape = (len(count), self.sections + 2, low.shape[1])
        table = torch.empty(shape, dtype=torch.float32, device=low.device)
        for mine, found, n in zip(table, sections, count.float(), strict=True):
            mine[:-2] = self._cost(found.T.float(), n)
            mine[-2] = mine[-3]
            mine[-1] = self._cost(torch.zeros_like(n), n)
        # The ends of an empty range are infinite, and 0 times infinity is not a number.
        scale = torch.where(low > high, 1.0, self._scale(low, high))
        kind = torch.int32 if table.numel() < 1 << 31 else torch.int64  # the smaller is faster
        columns = torch.arange(shape[2], dtype=kind, device=low.device)
        return State({
            "low": low, "high": high, "count": count, "scale": scale, "table": table,
            "columns": columns,
        })  # fmt: skip

    def costs_at(self, span: slice, ready: State, neurons: Tensor, classes: Tensor | int) -> Tensor:
        """Return the cost of the section that each neuron lies in."""
        table, cells = self._cells(span, ready, neurons, classes)
        return table.index_select(0, cells.view(-1)).view_as(neurons)

    def sums_at(
        self, span: slice, part: Layout, ready: State, neurons: Tensor, classes: Tensor | int
    ) -> Tensor:
        """Return the sums of bags of costs; a CPU looks them up and adds them in one step."""
        if neurons.device.type != "cpu":
            return super().sums_at(span, part, ready, neurons, classes)
        table, cells = self._cells(span, ready, neurons, classes)
        starts = bag_starts(part.sizes, len(neurons), cells.dtype)
        sums: Tensor = embedding_bag(cells.view(-1), table[:, None], starts, mode="sum")
        return sums.view(len(neurons), sum(bag_counts(part.sizes)))

    def _cells(
        self, span: slice, ready: State, neurons: Tensor, classes: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """Return a table of costs, flat, and where it holds each neuron's."""
        low, high, scale = (_held(ready[key], classes, span) for key in (*ENDS, "scale"))
        within = neurons.clamp(low, high)
        outside = _differ(neurons, within)
        row = self.place(within.sub_(low), scale).add_(outside, alpha=self.sections + 1)
        row.clamp_max_(self.sections + 1)
        columns, table = ready["columns"][span], ready["table"]
        rows, width = table.shape[1:]
        if isinstance(classes, int):
            table = table[classes]
        else:
            columns = columns + (classes * (rows * width)).to(columns.dtype)[:, None]
        # Written over what nobody reads any more, if that is as wide: it is in the cache.
        fits = columns.dtype.itemsize == outside.dtype.itemsize
        cells = outside.view(columns.dtype) if fits else outside.to(columns.dtype)
        cells.copy_(row)
        return table.view(-1), torch.add(columns, cells, alpha=width, out=cells)

    def _cost(self, found: Tensor, n: Tensor) -> Tensor:
        """Return the cost of sections that hold `found` of n images."""
        if self.cost == "share":
            return 1 - found / n.clamp_min(1)
        return -torch.log((found + 0.5) / (n + self.sections / 2))

    def soft_costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the cost interpolated between section centres, plus the distance outside.

        Half a section beyond the range the cost is that of a neuron outside; from there on only
        the distance, in widths of the range, has a gradient.
        """
        low, high, width = (part[classes] for part in _ranges(ready, neurons.dtype))
        rows = [-1, *range(self.sections), -1]
        table = ready["table"][:, rows].mT.to(neurons.dtype)
        distance = hinge(neurons, low, high, width)
        span = torch.where(high > low, high - low, 1.0)
        place = (neurons - low) / span * self.sections + 0.5  # 0 is the centre left of the range
        place = torch.where(high > low, place, 1 - distance)  # one section, fading on both sides
        return interpolated(table, classes, place) + distance

    def section(self, above: Tensor, scale: Tensor) -> Tensor:
        """Return each neuron's section, 0 to Q−1, int64; parameters as of `place`."""
        return self.place(above, scale).long().clamp_max_(self.sections - 1)

    def place(self, above: Tensor, scale: Tensor) -> Tensor:
        """Return how many sections each neuron lies above the lower end, 0 to Q, float32.

        Counting and scoring both take it from here: rounding may move an edge between sections,
        but the same for both.

        Parameters
        ----------
        above
            How far neurons inside their range lie above its lower end; changed in place.
        scale
            Sections per unit of activation, see `_scale`.
        """
        return above.mul_(scale).clamp_(0, self.sections)

    def _scale(self, low: Tensor, high: Tensor) -> Tensor:
        """Return Q/(high − low), float32 and finite; 0 for a range of no width."""
        width = high.double() - low.double()
        scale = torch.where(width > 0, self.sections / width, 0.0)
        return scale.clamp_max(torch.finfo(torch.float32).max).float()

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        shape = (layout.classes, layout.neurons, self.sections)
        return {**super().expected(layout), "sections": (torch.int32, shape)}


def _held(tensor: Tensor, classes: Tensor | int, span: slice) -> Tensor:
    """Return what a tensor (classes, N) holds at `span` of one class, or of each image's."""
    if isinstance(classes, int):
        return tensor[classes, span]
    return tensor[:, span].index_select(0, classes)


def _differ(values: Tensor, others: Tensor) -> Tensor:
    """Return 1 where they differ, else 0, as numbers: truth values are slow to make and use."""
    return torch.ne(values, others, out=torch.empty_like(values))


def united(parts: Sequence[State]) -> tuple[Tensor, Tensor]:
    """Return the ends of the ranges that hold the ranges of all parts."""
    low = torch.stack([part["low"] for part in parts]).amin(0)
    return low, torch.stack([part["high"] for part in parts]).amax(0)


def _ranges(ready: State, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ends and a positive width of each class's ranges, finite, each (classes, N)."""
    known = (ready["count"] > 0)[:, None]
    low = torch.where(known, ready["low"], 0.0).to(dtype)
    high = torch.where(known, ready["high"], 0.0).to(dtype)
    width = high - low
    typical = width.sum(0) / known.sum().clamp_min(1)
    least = torch.where(typical > 0, LEAST_WIDTH * typical, 1.0)
    return low, high, torch.maximum(width, least)
