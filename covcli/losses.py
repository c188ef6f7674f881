"""ConfidenceLoss: a penalty, with a gradient, on activations outside their class's pattern.

Rossolini, Biondi and Buttazzo (arXiv 2101.12100) score activations by comparisons and counts,
which have no gradient. The penalties below are their continuous counterparts.
"""

import torch
from torch import Tensor, nn

from covcli.methods import State
from covcli.methods.soft import hinge, interpolated

# A range narrower than this share of its point's mean width counts as that wide, or a neuron that
# never fired on trusted images would outweigh all others.
LEAST_WIDTH = 0.05
# A range of fewer images says nothing yet: its class is not penalised.
LEAST_IMAGES = 10


class ConfidenceLoss(nn.Module):
    """Mean over images and neurons of the penalty of a class's trusted pattern.

    For a state of single ranges it is the hinge distance outside the range, in widths of the
    range. For a state with sections it is that, plus the paper's cost 1 − c_q/n made continuous:
    each activation is shared out between the two nearest section centres (a soft-binned
    distribution), and pays the mean of their costs. In expectation over a batch this is one minus
    the overlap Σ_q p_q·λ_q of the batch's soft distribution with the signature's.

    Parameters
    ----------
    state
        A complete state of `src` or `mrc`; a class with fewer than 10 images is not penalised.
    sizes
        Neurons of each coverage point.
    """

    low: Tensor
    high: Tensor
    width: Tensor
    known: Tensor
    costs: Tensor | None

    def __init__(self, state: State, sizes: list[int]) -> None:
        super().__init__()
        known = state["count"] >= LEAST_IMAGES
        low = torch.where(known[:, None], state["low"], 0.0)
        high = torch.where(known[:, None], state["high"], 0.0)
        width = high - low
        floors = []
        for part in width[known].split(sizes, 1):
            typical = part.mean() if part.numel() else part.new_zeros(())
            floor = LEAST_WIDTH * typical if typical > 0 else part.new_ones(())
            floors.append(floor.expand(part.shape[1]))
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("width", torch.maximum(width, torch.cat(floors)))
        self.register_buffer("known", known)
        costs = None
        if "sections" in state.tensors:
            counts = state["sections"].to(low.dtype)
            costs = 1 - counts / state["count"].clamp_min(1)[:, None, None].to(low.dtype)
        self.register_buffer("costs", costs)

    def forward(self, neurons: Tensor, labels: Tensor) -> Tensor:
        """Return the penalty of neurons (B, N) of images of those classes (B,), a scalar."""
        low, high, width = self.low[labels], self.high[labels], self.width[labels]
        penalty = hinge(neurons, low, high, width)
        if self.costs is not None:
            penalty = penalty + self._soft_cost(neurons, low, high, labels)
        return (penalty * self.known[labels, None]).mean()

    def _soft_cost(self, neurons: Tensor, low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
        """Interpolate the cost linearly between the centres of the sections, constant beyond."""
        assert self.costs is not None
        sections = self.costs.shape[2]
        flat = high == low
        span = torch.where(flat, torch.ones_like(low), high - low)
        cost = interpolated(self.costs, labels, (neurons - low) / span * sections - 0.5)
        return torch.where(flat, torch.zeros_like(cost), cost)
