"""Neuron rank coverage: whether the neurons that fire most are those that do for the class.

The third method of Rossolini, Biondi and Buttazzo (arXiv 2101.12100) in spirit: it is described
to us in words only, so the exact formula is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, Method
from covcli.methods.state import Expected, Layout, State


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
        top = self._weights(layout, neurons) > 0
        state["top"].index_add_(0, labels, top.int())
        state["count"].add_(torch.bincount(labels, minlength=layout.classes))

    def costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each top neuron's part of the cost, times the neurons of its point."""
        weights = self._weights(layout, neurons)
        parts = [
            part / part.sum(1, keepdim=True) * part.shape[1]
            for part in weights.split(layout.sizes, 1)
        ]
        return torch.cat(parts, 1) * (1 - self._frequencies(ready, classes))

    def inside(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are not in the top, or have been for a trusted image too."""
        return (self._weights(layout, neurons) == 0) | (self._frequencies(ready, classes) > 0)

    def span(self, ready: State, layout: Layout, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return no ends: a rank depends on the other neurons, not on a value alone."""
        high = torch.full((len(classes), layout.neurons), torch.inf, device=classes.device)
        return -high, high

    def _frequencies(self, ready: State, classes: Tensor) -> Tensor:
        return ready["top"][classes] / ready["count"][classes, None].clamp_min(1)

    def _weights(self, layout: Layout, neurons: Tensor) -> Tensor:
        """Return 1 − r/m for the neurons of the top, 0 for others and for maxima; (B, N)."""
        weights = torch.zeros_like(neurons)
        start = 0
        for size, values in zip(layout.sizes, layout.values, strict=True):
            m = -int(-self.share * values // 1)
            part = neurons[:, start : start + values]
            order = part.argsort(dim=1, descending=True, stable=True)[:, :m]
            ranked = 1 - torch.arange(m, device=neurons.device, dtype=neurons.dtype) / m
            weights[:, start : start + values].scatter_(1, order, ranked.expand(len(order), m))
            start += size
        return weights

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        return {
            "top": (torch.int32, (layout.classes, layout.neurons)),
            "count": (torch.int64, (layout.classes,)),
        }
