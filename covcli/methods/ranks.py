"""Neuron rank coverage: whether the neurons that fire most are those that do for the class.

The third method of Rossolini, Biondi and Buttazzo (arXiv 2101.12100) in spirit: it is described
to us in words only, so the exact formula is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, CostScorer, Method
from covcli.methods.layout import Layout, blocks
from covcli.methods.state import Expected, State


@METHODS.add("nrc")
@dataclass(frozen=True)
class NeuronRank(Method):
    """Neuron rank coverage, on channel means and values.

    Each input ranks the V values of a point; its m = ⌈share·V⌉ largest are its top. f_kj is how
    often neuron j is in the top of class k's trusted images. An input predicted as k costs
    Σ_r w_r·(1 − f_k,j(r)) / Σ_r w_r over its own top, j(r) the neuron of rank r = 0 … m−1 and
    w_r = 1 − r/m: the foremost weigh most. Of equal values the first neuron ranks higher.

    Parameters
    ----------
    share
        How much of a point is its top, in (0, 1].
    """

    name: ClassVar[str] = "nrc"
    share: float = 0.1

    def __post_init__(self) -> None:
        """Check the parameter."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} does not lie in (0, 1]")

    def begin(self, layout: Layout) -> State:
        """Return counts of 0."""
        return State.of_sums(self.expected(layout))

    def observe(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Count whose top each neuron belongs to."""
        top = rank_weights(layout, neurons, self.share) > 0
        state["top"].index_add_(0, labels, top.int())
        state["count"].add_(torch.bincount(labels, minlength=layout.classes))

    def prepare(self, state: State, layout: Layout) -> "RankScorer":
        """Return what scores new neurons against how often each was in the top."""
        return RankScorer(layout, state, self.share)

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        return {
            "top": (torch.int32, (layout.classes, layout.neurons)),
            "count": (torch.int64, (layout.classes,)),
        }


class RankScorer(CostScorer):
    """Scores ranks, see `NeuronRank`."""

    top: Tensor
    count: Tensor

    def __init__(self, layout: Layout, state: State, share: float) -> None:
        super().__init__(layout, {"top": state["top"], "count": state["count"]})
        self.share = share

    def costs_at(self, part: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each top neuron's part of the cost, times the neurons of its point."""
        weights = rank_weights(part, neurons, self.share)
        scaled = [
            block / block.sum(2, keepdim=True) * block.shape[2]
            for block in blocks(weights, part.sizes)
        ]
        rare = 1 - self._frequencies(part.span, classes)
        return torch.cat([block.flatten(1) for block in scaled], 1) * rare

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are not in the top, or have been for a trusted image too."""
        weights = rank_weights(self.layout, neurons, self.share)
        return (weights == 0) | (self._frequencies(self.layout.span, classes) > 0)

    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return no ends: a rank depends on the other neurons, not on a value alone."""
        shape = (classes.shape[0], self.layout.neurons)
        high = torch.full(shape, torch.inf, device=classes.device)
        return -high, high

    def _frequencies(self, span: slice, classes: Tensor) -> Tensor:
        top = self.top[:, span].index_select(0, classes)
        return top / self.count.index_select(0, classes).clamp_min(1)[:, None]


def rank_weights(layout: Layout, neurons: Tensor, share: float) -> Tensor:
    """Return 1 − r/m for the neurons of the top, 0 for others and for maxima; (B, N)."""
    parts = []
    for part, values in zip(neurons.split(layout.sizes, 1), layout.values, strict=True):
        m = -int(-share * values // 1)
        order = part[:, :values].argsort(dim=1, descending=True, stable=True)[:, :m]
        ranked = 1 - torch.arange(m, device=part.device, dtype=part.dtype) / m
        parts.append(torch.zeros_like(part).scatter(1, order, ranked.expand_as(order)))
    return torch.cat(parts, 1)
