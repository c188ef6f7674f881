"""Neuron rank coverage: are the most active neurons those that are most active for the class.

After the third method of Rossolini, Biondi and Buttazzo (arXiv 2101.12100). The paper describes it
in words, so the exact formulas are ours. The paper's direction is `signature`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, CostScorer, Method, add_counts
from covcli.methods.layout import Layout
from covcli.methods.ranges import held
from covcli.methods.state import Expected, State


@METHODS.add("nrc")
@dataclass(frozen=True)
class NeuronRank(Method):
    """Neuron rank coverage, on channel means and values.

    The top of a point with V values has m = ⌈share·V⌉ neurons. The top of an input are the neurons
    with the m largest values. The top of class k are the m neurons that are most often in the top
    of its trusted images; neuron j is in the top of a share f_kj of them. A neuron of rank
    r = 0 … m−1 has the weight w_r = 1 − r/m. Of equal values, the first neuron ranks higher. The
    cost of an input predicted as k depends on the direction:

    - "signature", as in the paper: Σ_r w_r·[j(r) is not in the input's top] / Σ_r w_r over the
      neurons j(r) of the class's top. Ranks and weights are fixed by the signature.
    - "input": Σ_r w_r·(1 − f_k,j(r)) / Σ_r w_r over the neurons j(r) of the input's own top.

    Parameters
    ----------
    share
        The share of a point's values in its top, in (0, 1].
    direction
        "signature" or "input".

    Examples
    --------
    >>> NeuronRank(share=0.2).spec()
    'nrc?share=0.2&direction=signature'
    """

    name: ClassVar[str] = "nrc"
    counts: ClassVar[tuple[str, ...]] = ("top",)
    share: float = 0.1
    direction: str = "signature"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is not in (0, 1]")
        if self.direction not in DIRECTIONS:
            known = ", ".join(DIRECTIONS)
            raise ValueError(f"direction={self.direction!r} is unknown; known: {known}")

    def begin(self, layout: Layout) -> State:
        """Return counts of 0."""
        return State.of_sums(layout, self.expected(layout))

    def observe(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Count in how many images each neuron is in the top, by class."""
        top = rank_weights(state.layout, neurons, self.share) > 0
        state["top"].index_add_(0, labels, top.int())
        add_counts(state["count"], labels)

    def prepare(self, state: State) -> "RankScorer":
        """Return the scorer, which compares with how often each neuron was in the top."""
        often = state["top"] / state["count"].clamp_min(1)[:, None]
        return DIRECTIONS[self.direction](state.layout, often, self.share)

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        return {
            "top": (torch.int32, (layout.classes, layout.neurons)),
            "count": (torch.int64, (layout.classes,)),
        }


class RankScorer(CostScorer):
    """Scores an input's own top, see `NeuronRank`.

    Parameters
    ----------
    layout
        The assignment of neurons to coverage points.
    often
        The share of a class's trusted images in which each neuron is in the top, float32 of shape
        (classes, N).
    share
        The share of a point's values in its top.
    """

    often: Tensor

    def __init__(self, layout: Layout, often: Tensor, share: float) -> None:
        super().__init__(layout, {"often": often})
        self.share = share

    def costs_at(self, part: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each top neuron's part of the cost, times the number of neurons of its point."""
        weights = scaled(part, rank_weights(part, neurons, self.share))
        return weights * (1 - held(self.often, part, classes))

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are not in the top, or were in the top of a trusted image."""
        weights = rank_weights(self.layout, neurons, self.share)
        return (weights == 0) | (self.often.index_select(0, classes) > 0)

    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return infinite bounds: a rank depends on other neurons too, not only on the value."""
        shape = (classes.shape[0], self.layout.neurons)
        high = torch.full(shape, torch.inf, device=classes.device)
        return -high, high


class SignatureRankScorer(RankScorer):
    """Scores the class's top, see `NeuronRank`."""

    weights: Tensor

    def __init__(self, layout: Layout, often: Tensor, share: float) -> None:
        super().__init__(layout, often, share)
        self.register_buffer("weights", scaled(layout, rank_weights(layout, often, share)))

    def costs_at(self, part: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the weight of each neuron of the class's top that is not in the input's top."""
        missing = rank_weights(part, neurons, self.share) == 0
        return held(self.weights, part, classes) * missing

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are not in the class's top, or also in the input's top."""
        return self.costs(neurons, classes) == 0


DIRECTIONS: dict[str, type[RankScorer]] = {"signature": SignatureRankScorer, "input": RankScorer}


def scaled(layout: Layout, weights: Tensor) -> Tensor:
    """Scale weights (B, N) so that they sum to the number of neurons of each point."""
    return torch.cat(
        [
            (block / block.sum(2, keepdim=True) * block.shape[2]).flatten(1)
            for block in layout.blocks(weights)
        ],
        1,
    )


def rank_weights(layout: Layout, neurons: Tensor, share: float) -> Tensor:
    """Return 1 − r/m for neurons in the top, 0 for others and for maxima, shape (B, N)."""
    parts = []
    for part, values in zip(neurons.split(layout.sizes, 1), layout.values, strict=True):
        m = -int(-share * values // 1)
        order = part[:, :values].argsort(dim=1, descending=True, stable=True)[:, :m]
        ranked = 1 - torch.arange(m, device=part.device, dtype=part.dtype) / m
        parts.append(torch.zeros_like(part).scatter(1, order, ranked.expand_as(order)))
    return torch.cat(parts, 1)
