"""The ensemble: ranges, distances and a direction that noise takes, told apart by experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS
from covcli.methods.gaussian import (
    Gauss,
    class_means,
    log_distances,
    rescaled,
    square_sums,
    sums_by_class,
    whole_numbers,
)
from covcli.methods.ranges import SingleRange, united
from covcli.methods.state import Expected, Layout, State

RANGES = SingleRange()
RANGE_TENSORS = ("low", "high")


@METHODS.add("ensemble")
@dataclass(frozen=True)
class Ensemble(Gauss):
    """Three kinds of evidence at each coverage point, in one pass.

    - `src`: the share of neurons outside their range.
    - `gauss`: the distance to the predicted class.
    - How far a point has gone from its class in the direction d in which slight noise moves
      trusted images: (x − μ_k)ᵀ Σ⁻¹ d / √(dᵀ Σ⁻¹ d), Fisher's linear discriminant between trusted
      images and their noisy copies, in trusted deviations. A small perturbation of every pixel,
      an adversarial one included, hides in distances of all directions, but not in this one.

    The calibration combines the 3·L columns with experts (see `covcli.combination`).

    Parameters
    ----------
    shrinkage
        As for `gauss`.
    """

    name: ClassVar[str] = "ensemble"
    experts: ClassVar[bool] = True

    def begin(self, layout: Layout) -> State:
        """Return the empty ranges of `src`: the first pass finds them, as in `gauss` the peaks."""
        self._check(layout)
        state, ranges = State(), RANGES.begin(layout)
        for key in RANGE_TENSORS:
            state.declare(key, ranges[key], ranges.reductions[key])
        return state

    def observe(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Find the ranges in the first pass; add to the sums of `gauss` in the second."""
        if "unit" in state.tensors:
            self._sum(state, layout, neurons, labels)
        else:
            RANGES.widen(state, neurons, labels)

    def proceed(self, state: State, layout: Layout) -> State | None:
        """Settle ranges and units after the first pass, and sum in a second."""
        if "unit" in state.tensors:
            return None
        ends = torch.cat([state[key] for key in RANGE_TENSORS]).abs()
        seen = torch.where(ends.isfinite(), ends, 0.0)  # infinite: a class not seen
        summing = self._summing(layout.values_of(seen).amax(0), layout)
        for key in RANGE_TENSORS:
            summing.declare(key, state[key], "same")
        return summing

    def begin_noisy(self, state: State, layout: Layout) -> State:
        """Return sums of 0, in the units of the others."""
        noisy = State.of_sums(noisy_sums(layout)).to(state["unit"].device)
        noisy.declare("unit", state["unit"], "same")
        return noisy

    def observe_noisy(self, noisy: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Add noisy copies to their sums."""
        whole = whole_numbers(noisy, layout.values_of(neurons))
        noisy["noisy_total"].add_(sums_by_class(whole, labels, layout.classes))
        noisy["noisy_count"].add_(torch.bincount(labels, minlength=layout.classes))

    def _scaled(self, part: State, ratio: Tensor, unit: Tensor, layout: Layout) -> State:
        """Return a part in another unit, noisy copies included."""
        scaled = super()._scaled(part, ratio, unit, layout)
        scaled.tensors["noisy_total"] = rescaled(part["noisy_total"], ratio)
        return scaled

    def align(self, parts: Sequence[State], layout: Layout) -> list[State]:
        """Return the parts in the larger unit, with the range that holds all of their ranges."""
        aligned = super().align(parts, layout)
        low, high = united(parts)
        for part in aligned:
            part.tensors |= {"low": low, "high": high}
        return aligned

    def prepare(self, state: State, layout: Layout) -> State:
        """Return what `gauss` reads, and the ranges."""
        ready = super().prepare(state, layout)
        ready.tensors |= {key: state[key] for key in (*RANGE_TENSORS, "count")}
        return ready

    def _directions(
        self, state: State, layout: Layout, whitening: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return each point's Σ⁻¹d/√(dᵀΣ⁻¹d), shape (1, V)."""
        count = state["noisy_count"].to(torch.float64)
        noisy = state["noisy_total"] * state["unit"]
        shift = (noisy - count[:, None] * class_means(state)).sum(0)
        directions = []
        for white, part in zip(whitening, shift.split(layout.values), strict=True):
            moved = white @ part
            directions.append((white.T @ moved / moved.norm().clamp_min(1e-12))[None])
        return directions

    def evidence(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the columns of `src`, of `gauss`, and along the direction, (B, 3·L)."""
        outside = RANGES.evidence(ready, layout, neurons, classes)
        return self._beside(outside, ready, layout, neurons, classes)

    def soft_evidence(
        self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor
    ) -> Tensor:
        """Return the evidence with the soft costs of `src`."""
        outside = RANGES.soft_evidence(ready, layout, neurons, classes)
        return self._beside(outside, ready, layout, neurons, classes)

    def _beside(
        self, outside: Tensor, ready: State, layout: Layout, neurons: Tensor, classes: Tensor
    ) -> Tensor:
        """Return the columns of `src` with those of `gauss` and along the direction beside them."""
        products = list(self._products(ready, layout, neurons, classes))
        distances = log_distances([square_sums(part[:, :-1]) for part in products], layout)
        along = torch.cat([part[:, -1] for part in products]).T
        return torch.cat([outside, distances, along.double()], 1)

    def columns(self, layout: Layout) -> int:
        """Return 3·L."""
        return 3 * len(layout.sizes)

    def costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return 1 outside the range, 0 inside."""
        return RANGES.costs(ready, layout, neurons, classes)

    def inside(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons lie in the range of their class."""
        return RANGES.inside(ready, layout, neurons, classes)

    def span(self, ready: State, layout: Layout, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranges of those classes."""
        return RANGES.span(ready, layout, classes)

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        ranges = {key: RANGES.expected(layout)[key] for key in RANGE_TENSORS}
        return {**super().expected(layout), **ranges, **noisy_sums(layout)}


def noisy_sums(layout: Layout) -> Expected:
    """Return the type and shape of the sums over noisy copies."""
    return {
        "noisy_total": (torch.int64, (layout.classes, sum(layout.values))),
        "noisy_count": (torch.int64, (layout.classes,)),
    }
