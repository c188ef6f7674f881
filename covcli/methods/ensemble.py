"""The ensemble: ranges, distances and the direction of noise, combined by trained experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, Method, Scorer, add_counts
from covcli.methods.codes import Coding, coding_expected, coding_of, coding_tensors
from covcli.methods.gaussian import Gauss, GaussScorer, whole_numbers
from covcli.methods.layout import Layout
from covcli.methods.logits import LOGIT_EVIDENCE
from covcli.methods.moments import rescaled
from covcli.methods.normal import (
    StoredModel,
    check_normal,
    expected_normal,
    fit_normal,
    within,
)
from covcli.methods.ranges import RangeScorer, SingleRange, united
from covcli.methods.state import Expected, State, check_tensors

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
    'ensemble?shrinkage=0.1&logits=both&generalists=each'
    """

    name: ClassVar[str] = "ensemble"
    kinds: ClassVar[int] = 3
    experts: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    shrinkage: float = Gauss.shrinkage
    logits: str = "both"
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
        return RANGES.begin(layout).only(RANGE_TENSORS)

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
        largest = torch.maximum(state["high"].amax(0), -state["low"].amin(0))
        largest = torch.where(largest.isfinite(), largest, 0.0)  # infinite: no image at all
        peaks = state.layout.values_of(largest[None])[0]
        return self.gauss.summing(state.layout, peaks, **state.tensors)

    def begin_noisy(self, state: State) -> State:
        """Return sums of 0, in the units of the other sums."""
        return State.of_sums(state.layout, noisy_sums(state.layout), unit=state["unit"])

    def observe_noisy(self, noisy: State, neurons: Tensor, labels: Tensor) -> None:
        """Add noisy copies to their sums."""
        layout = noisy.layout
        whole = whole_numbers(noisy, layout.values_of(neurons))
        noisy["noisy_total"].add_(whole.long().sum(0))
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

    def condense(self, sums: State, room: int | None = None) -> State:
        """Return the ranges, the normal model of each point and the directions of noise.

        Raises
        ------
        CovcliError
            If a point's covariance is singular: too few images for so little shrinkage.
        """
        device, sums = sums["unit"].device, sums.to(torch.device("cpu"))
        shift = noise_shift(sums)
        model = fit_normal(sums, self.shrinkage, self.spec(), shift)
        ranges = {key: sums[key] for key in RANGE_TENSORS}
        coded = cache(lambda: coded_ranges(**ranges))
        state = within(
            sums.layout,
            room,
            lambda: ranges | model.exact(),
            lambda rank: coded() | model.compact(rank),
        )
        for key, tensor in ranges.items():
            if state[key] is tensor:  # shared with the sums, which may be kept too
                state.tensors[key] = tensor.clone()
        return state.to(device)

    def prepare(self, state: State) -> "EnsembleScorer":
        """Return the scorer of all members; a state of sums is condensed first."""
        if "unit" in state.tensors:
            state = self.condense(state)
        ranges = RangeScorer(state.layout, stored_ranges(state))
        return EnsembleScorer(ranges, GaussScorer(state.layout, StoredModel.of(state)))

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

    def check(self, state: State) -> None:
        """Raise a ValueError unless a state from a file can be a condensed one."""
        layout = state.layout
        normal = expected_normal(state, directed=True)
        coded = normal["mean"][0] == torch.uint8
        shape = (layout.classes, layout.neurons)
        ranges = dict.fromkeys(RANGE_TENSORS, (torch.uint8 if coded else torch.float32, shape))
        scale = coding_expected("range", layout.neurons) if coded else {}
        check_tensors(state, {**normal, **ranges, **scale})
        check_normal(state)


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
        return 3 * len(self.layout.sizes)

    def forward(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the columns of `src`, of `gauss`, and along the direction, (B, 3·L)."""
        outside = self.ranges(neurons, classes)
        return torch.cat([outside, *self.gauss.measure(neurons, classes)], 1)

    def soft(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the evidence with the soft costs of `src`."""
        outside = self.ranges.soft(neurons, classes)
        return torch.cat([outside, *self.gauss.measure(neurons, classes)], 1)

    def costs(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return 1 outside the range, 0 inside."""
        return self.ranges.costs(neurons, classes)

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are in the range of their class."""
        return self.ranges.inside(neurons, classes)

    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranges of those classes."""
        return self.ranges.span(classes)


def coded_ranges(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Return ranges (classes, N) as codes, rounded outward.

    The code of the lower end of a class without images is larger than that of the upper end.
    """
    lowest, highest = low.amin(0), high.amax(0)  # a class without images has (inf, -inf)
    seen = lowest <= highest
    coding = Coding.over(torch.where(seen, lowest, 0.0), torch.where(seen, highest, 0.0), power=2)
    empty = low > high
    return {
        "low": coding.encode(low.masked_fill(empty, 0.0), torch.floor).masked_fill_(empty, 1),
        "high": coding.encode(high.masked_fill(empty, 0.0), torch.ceil).masked_fill_(empty, 0),
        **coding_tensors(coding, "range"),
    }


def stored_ranges(state: State) -> dict[str, Tensor]:
    """Return the ends of a condensed state's ranges, float32 of shape (classes, N) each."""
    low, high = (state[key] for key in RANGE_TENSORS)
    if low.dtype != torch.uint8:
        return {"low": low, "high": high}
    coding, empty = coding_of(state.tensors, "range", power=2), low > high
    return {
        "low": coding.decode(low).to(low.device).masked_fill_(empty, torch.inf),
        "high": coding.decode(high).to(low.device).masked_fill_(empty, -torch.inf),
    }


def noise_shift(state: State) -> Tensor:
    """Return the sum over noisy copies of their displacement from their class, shape (V,)."""
    copies = state["noisy_count"] / state["count"].clamp_min(1).double()  # of each image
    return (state["noisy_total"] - copies @ state["total"].double()) * state["unit"]


def noisy_sums(layout: Layout) -> Expected:
    """Return the type and shape of the sums over noisy copies."""
    return {
        "noisy_total": (torch.int64, (sum(layout.values),)),
        "noisy_count": (torch.int64, (layout.classes,)),
    }
