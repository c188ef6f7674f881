"""Range coverage: which neurons left the values that trusted images of the class gave them.

Rossolini, Biondi and Buttazzo, "Increasing the Confidence of Deep Neural Networks by Coverage
Analysis", IEEE TSE 2022 (arXiv 2101.12100), section IV: single-range and multi-range coverage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, Expected, Layout, Method, State, cell_index
from covcli.methods.soft import hinge, interpolated

# In soft costs a range narrower than this share of its neuron's mean width counts as that wide.
LEAST_WIDTH = 0.05


@METHODS.add("src")
@dataclass(frozen=True)
class SingleRange(Method):
    """Single-range coverage: the cost is 1 where a neuron is outside its class's range, else 0.

    The range of class k and neuron j is [min, max] of its activation over the trusted images of
    class k. Ends belong to it. A class without trusted images has an empty range.
    """

    name: ClassVar[str] = "src"

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
        for k in labels.unique().tolist():
            mine = neurons[labels == k]
            torch.minimum(state["low"][k], mine.amin(0), out=state["low"][k])
            torch.maximum(state["high"][k], mine.amax(0), out=state["high"][k])

    def costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return 1 outside the range, 0 inside."""
        return (~self.inside(ready, layout, neurons, classes)).float()

    def soft_costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the distance outside the range in widths of the range, 0 inside."""
        low, high, width = (part[classes] for part in _ranges(ready, neurons.dtype))
        return hinge(neurons, low, high, width)

    def inside(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons lie in the closed range of their class."""
        return (neurons >= ready["low"][classes]) & (neurons <= ready["high"][classes])

    def span(self, ready: State, layout: Layout, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranges of those classes."""
        return ready["low"][classes], ready["high"][classes]

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
        cells = self._cells(state, neurons, labels).flatten()
        counts = state["sections"].view(-1)
        counts.scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))
        count = state["count"]
        count += torch.bincount(labels, minlength=len(count))

    def align(self, parts: Sequence[State], layout: Layout) -> list[State]:
        """Return the parts counted in sections of the range that holds all of their ranges.

        A section is counted where its centre lies, so no image moves by more than one section of
        its part. Parts with equal ranges stay as they are.
        """
        low = torch.stack([part["low"] for part in parts]).amin(0)
        high = torch.stack([part["high"] for part in parts]).amax(0)
        return [self._recounted(part, low, high) for part in parts]

    def _recounted(self, part: State, low: Tensor, high: Tensor) -> State:
        ends = {"low": low, "high": high}
        classes = torch.arange(len(low), device=low.device)
        known = (part["count"] > 0)[:, None]
        width = torch.where(known, part["high"] - part["low"], 0.0)
        counts = torch.zeros_like(part["sections"])
        for q in range(self.sections):
            centre = part["low"] + width * ((q + 0.5) / self.sections)
            centre = torch.where(known, centre, low)  # without images there is nothing to count
            places = self.section(State(dict(ends)), centre, classes)
            counts.scatter_add_(2, places[:, :, None], part["sections"][:, :, q, None])
        return State({**part.tensors, **ends, "sections": counts}, dict(part.reductions))

    def costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the cost of the section that each neuron lies in."""
        n = ready["count"][classes, None].float()
        found = ready["sections"].view(-1)[self._cells(ready, neurons, classes)].float()
        found = torch.where(self.inside(ready, layout, neurons, classes), found, 0.0)
        return self._cost(found, n)

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
        counts = torch.nn.functional.pad(ready["sections"], (1, 1))  # nothing lies outside
        n = ready["count"][:, None, None]
        table = self._cost(counts.to(neurons.dtype), n.to(neurons.dtype))
        distance = hinge(neurons, low, high, width)
        span = torch.where(high > low, high - low, 1.0)
        place = (neurons - low) / span * self.sections + 0.5  # 0 is the centre left of the range
        place = torch.where(high > low, place, 1 - distance)  # one section, fading on both sides
        return interpolated(table, classes, place) + distance

    def section(self, state: State, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the section that each neuron lies in, 0 to Q−1; the nearest if outside.

        A range of no width has one section, number 0. Computed in double precision: float32
        differences are then exact, and no width is too small or too large to divide by.
        """
        low = state["low"][classes].double()
        width = state["high"][classes].double() - low
        place = (neurons.double() - low) / width * self.sections
        return torch.where(width > 0, place, 0.0).clamp(0, self.sections - 1).long()

    def _cells(self, state: State, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the index of each neuron's section in the flattened counts."""
        return cell_index(self.section(state, neurons, classes), classes, self.sections)

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        shape = (layout.classes, layout.neurons, self.sections)
        return {**super().expected(layout), "sections": (torch.int32, shape)}


def _ranges(ready: State, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ends and a positive width of each class's ranges, finite, each (classes, N)."""
    known = (ready["count"] > 0)[:, None]
    low = torch.where(known, ready["low"], 0.0).to(dtype)
    high = torch.where(known, ready["high"], 0.0).to(dtype)
    width = high - low
    typical = width.sum(0) / known.sum().clamp_min(1)
    least = torch.where(typical > 0, LEAST_WIDTH * typical, 1.0)
    return low, high, torch.maximum(width, least)
