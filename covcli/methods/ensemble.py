"""The ensemble: ranges, distances and a direction that noise takes, told apart by experts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, Expected, Layout, State, blocks
from covcli.methods.gaussian import Gauss, class_means, matrices
from covcli.methods.ranges import SingleRange

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
    noisy: ClassVar[bool] = True
    experts: ClassVar[bool] = True

    def begin(self, layout: Layout) -> State:
        """Return the empty states of `src` and `gauss` and sums of 0 for noisy copies."""
        state = super().begin(layout)
        ranges = RANGES.begin(layout)
        for key in RANGE_TENSORS:
            state.declare(key, ranges[key], ranges.reductions[key])
        return state

    def observe(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Widen the ranges, and add to the sums."""
        super().observe(state, layout, neurons, labels)
        RANGES.widen(state, neurons, labels)

    def observe_noisy(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Add noisy copies to their sums."""
        values = neurons[:, layout.value_columns].double()
        state["noisy_total"].index_add_(0, labels, values)
        state["noisy_count"].add_(torch.bincount(labels, minlength=layout.classes))

    def prepare(self, state: State, layout: Layout) -> State:
        """Return what `gauss` reads, the ranges, and each point's unit vector along Σ⁻¹d."""
        ready = super().prepare(state, layout)
        count = state["noisy_count"].to(torch.float64)
        shift = (state["noisy_total"] - count[:, None] * class_means(state)).sum(0)
        directions = []
        whitening = matrices(ready["whitening"].double(), layout)
        for white, part in zip(whitening, shift.split(layout.values), strict=True):
            moved = white @ part
            directions.append(white.T @ moved / moved.norm().clamp_min(1e-12))
        ready.tensors |= {key: state[key] for key in (*RANGE_TENSORS, "count")}
        ready.tensors["direction"] = torch.cat(directions).float()
        return ready

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
        away = self._away(ready, layout, neurons, classes)
        distances = self._log_distances(ready, layout, away)
        steps = blocks(away * ready["direction"], layout.values)
        along = [step.sum(2, dtype=torch.float64) for step in steps]
        return torch.cat([outside, distances, *along], 1)

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
        ranges = RANGES.expected(layout)
        return {
            **super().expected(layout),
            **{key: ranges[key] for key in RANGE_TENSORS},
            "noisy_total": (torch.float64, (layout.classes, sum(layout.values))),
            "noisy_count": (torch.int64, (layout.classes,)),
        }
