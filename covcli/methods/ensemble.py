"""The ensemble: ranges, distances and the direction of noise, combined by trained experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, Method, Scorer, add_counts
from covcli.methods.gaussian import (
    Gauss,
    GaussScorer,
    Whitening,
    refuse_wide,
    rescaled,
    whiten,
    whole_numbers,
)
from covcli.methods.layout import Layout
from covcli.methods.logits import LOGIT_EVIDENCE
from covcli.methods.ranges import RangeScorer, SingleRange, united
from covcli.methods.state import Expected, State

RANGES = SingleRange()
RANGE_TENSORS = ("low", "high")


@METHODS.add("ensemble")
@dataclass(frozen=True)
class Ensemble(Method):
    """Three kinds of evidence at each coverage point, in one pass.

    - `src`: the share of neurons outside their range.
    - `gauss`: the distance to the predicted class.
    - The displacement of a point from its class in the direction d in which slight noise moves
      trusted images: (x − μ_k)ᵀ Σ⁻¹ d / √(dᵀ Σ⁻¹ d). This is Fisher's linear discriminant between
      trusted images and their noisy copies, in units of the trusted deviation. A small perturbation
      of every pixel, such as an adversarial one, hardly changes the distance but is visible here.

    The calibration combines the 3·L columns with experts and with evidence from the logits (see
    `covcli.signature.combination`).

    Parameters
    ----------
    shrinkage
        As for `gauss`.
    logits
        The evidence from the logits that joins: "both", "doubt", "energy" or "none".
    generalists
        "each" for one generalist of `src` and one of `gauss`, "one" for one of all columns.

    Examples
    --------
    >>> Ensemble(shrinkage=0.1).spec()
    'ensemble?shrinkage=0.1&logits=energy&generalists=each'
    """

    name: ClassVar[str] = "ensemble"
    kinds: ClassVar[int] = 3
    experts: ClassVar[bool] = True
    shrinkage: float = Gauss.shrinkage
    logits: str = "energy"
    generalists: str = "each"

    def __post_init__(self) -> None:
        """Check the parameters."""
        Gauss(self.shrinkage)
        if self.logits not in LOGIT_EVIDENCE:
            raise ValueError(f"logits must be one of {', '.join(LOGIT_EVIDENCE)}")
        if self.generalists not in ("each", "one"):
            raise ValueError("generalists must be each or one")

    @property
    def gauss(self) -> Gauss:
        """The member that computes distances."""
        return Gauss(self.shrinkage)

    def begin(self, layout: Layout) -> State:
        """Return the empty ranges of `src`; they also bound the values, as the peaks of `gauss`."""
        refuse_wide(layout, self.name)
        state, ranges = State(layout), RANGES.begin(layout)
        for key in RANGE_TENSORS:
            state.declare(key, ranges[key], ranges.reductions[key])
        return state

    def observe(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Widen the ranges in the first pass; add to the sums of `gauss` in the second."""
        if "unit" in state.tensors:
            self.gauss.add(state, neurons, labels)
        else:
            RANGES.widen(state, neurons, labels)

    def proceed(self, state: State) -> State | None:
        """Fix ranges and units after the first pass; the second pass computes sums."""
        if "unit" in state.tensors:
            return None
        ends = torch.cat([state[key] for key in RANGE_TENSORS]).abs()
        seen = torch.where(ends.isfinite(), ends, 0.0)  # infinite: a class not seen
        summing = self.gauss.summing(state.layout, state.layout.values_of(seen).amax(0))
        for key in RANGE_TENSORS:
            summing.declare(key, state[key], "same")
        return summing

    def begin_noisy(self, state: State) -> State:
        """Return sums of 0, in the units of the other sums."""
        noisy = State.of_sums(state.layout, noisy_sums(state.layout)).to(state["unit"].device)
        noisy.declare("unit", state["unit"], "same")
        return noisy

    def observe_noisy(self, noisy: State, neurons: Tensor, labels: Tensor) -> None:
        """Add noisy copies to their sums."""
        layout = noisy.layout
        whole = whole_numbers(noisy, layout.values_of(neurons))
        noisy["noisy_total"].index_add_(0, labels, whole.long())
        add_counts(noisy["noisy_count"], labels)

    def align(self, parts: Sequence[State]) -> list[State]:
        """Return the parts in the largest unit, with the union of their ranges."""
        low, high = united(parts)
        aligned = self.gauss.align(parts)
        for part, given in zip(aligned, parts, strict=True):
            ratio = given["unit"] / part["unit"]
            noisy = rescaled(given["noisy_total"], ratio)
            part.tensors |= {"low": low, "high": high, "noisy_total": noisy}
        return aligned

    def prepare(self, state: State) -> "EnsembleScorer":
        """Return the scorer of all members; see `Gauss.prepare`."""
        whitening = whiten(state, self.shrinkage, self.spec())
        directions = noise_directions(state, whitening)
        distances = GaussScorer(state.layout, whitening, directions)
        return EnsembleScorer(RANGES.prepare(state), distances)

    @property
    def logit_evidence(self) -> str:
        """The parameter `logits`."""
        return self.logits

    @property
    def generalist_kinds(self) -> tuple[int, ...]:
        """`src` and `gauss`, unless one generalist reads all; only experts read the directions."""
        return () if self.generalists == "one" else (0, 1)

    def expected(self, layout: Layout) -> Expected:
        """Return the tensors of a complete state."""
        ranges = {key: RANGES.expected(layout)[key] for key in RANGE_TENSORS}
        return {**self.gauss.expected(layout), **ranges, **noisy_sums(layout)}


class EnsembleScorer(Scorer):
    """The evidence of all members, see `Ensemble`; costs, inside and span are those of `src`.

    Parameters
    ----------
    ranges
        The scorer of `src`.
    gauss
        The scorer of `gauss`, with one direction per point.
    """

    def __init__(self, ranges: RangeScorer, gauss: GaussScorer) -> None:
        super().__init__(ranges.layout, {})
        self.ranges = ranges
        self.gauss = gauss

    @property
    def columns(self) -> int:
        """The number of evidence columns: 3·L."""
        return Ensemble.kinds * len(self.layout.sizes)

    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the columns of `src`, of `gauss`, and along the direction, (B, 3·L)."""
        outside = self.ranges(neurons, classes)
        return torch.cat([outside, *self._distances(neurons, classes)], 1)

    def soft(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the evidence with the soft costs of `src`."""
        outside = self.ranges.soft(neurons, classes)
        return torch.cat([outside, *self._distances(neurons, classes)], 1)

    def _distances(self, neurons: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of `gauss`, and those along the direction, (B, L) each."""
        products = self.gauss.products(neurons, classes)
        along = torch.cat([part[:, -1] for part in products]).T
        return self.gauss.distances(products), along.double()

    def costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return 1 outside the range, 0 inside."""
        return self.ranges.costs(neurons, classes)

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are in the range of their class."""
        return self.ranges.inside(neurons, classes)

    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranges of those classes."""
        return self.ranges.span(classes)


def noise_directions(state: State, whitening: Whitening) -> list[Tensor]:
    """Return each point's Σ⁻¹d/√(dᵀΣ⁻¹d), shape (1, V)."""
    count = state["noisy_count"].double()
    noisy = state["noisy_total"] * state["unit"]
    shift = (noisy - count[:, None] * whitening.mean).sum(0)
    directions = []
    for white, part in zip(whitening.matrices, shift.split(state.layout.values), strict=True):
        moved = white @ part
        directions.append((white.T @ moved / moved.norm().clamp_min(1e-12))[None])
    return directions


def noisy_sums(layout: Layout) -> Expected:
    """Return the type and shape of the sums over noisy copies."""
    return {
        "noisy_total": (torch.int64, (layout.classes, sum(layout.values))),
        "noisy_count": (torch.int64, (layout.classes,)),
    }
