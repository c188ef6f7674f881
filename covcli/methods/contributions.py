"""Neuron activation coverage: the contributions of activations to the network's certainty.

Liu, Tian, Li, Zhao and Xie, "Neuron Activation Coverage: Rethinking Out-of-Distribution Detection
and Generalization", ICLR 2024 (arXiv 2306.02879), section 3. Details that the paper leaves open
follow the authors' program (ood_coverage, its postprocessor for OpenOOD).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, CostScorer, Method, cell_index
from covcli.methods.layout import Layout
from covcli.methods.state import Expected, State

# The edges of the bins are logarithms to this base of evenly spaced numbers.
BASE = 1000.0


@METHODS.add("nac")
@dataclass(frozen=True)
class ActivationCoverage(Method):
    """NAC: a neuron's state is σ(α·a·∂KL/∂a), KL the divergence of the softmax from uniform.

    The activation a and the derivative are each summed over a channel's positions before they are
    multiplied. States are divided into bins, narrow around ½ and wide near 0 and 1. The cost of a
    neuron is 1 − min(c/full, 1), where c is the number of trusted images with a state in the same
    bin. The mean over a point is one minus its coverage. With `classes=all`, as in the paper,
    images of all classes are counted; with `classes=own`, those of the predicted class. It needs a
    backward pass.

    The defaults are those of the authors' program for the last pooling layer of a ResNet-18 on
    CIFAR-10. There, each layer has its own steepness; here, all points have the same.

    Parameters
    ----------
    bins
        M of the authors' program, at least 4. It gives 2·(⌊M/2⌋ − 1) bins: 48 by default.
    steepness
        α.
    full
        The number of images for full coverage of a bin (O* in the paper).
    classes
        "all" or "own".

    Examples
    --------
    >>> ActivationCoverage(full=20).intervals
    48
    """

    name: ClassVar[str] = "nac"
    counts: ClassVar[tuple[str, ...]] = ("counts",)
    contributions: ClassVar[bool] = True
    bins: int = 50
    steepness: float = 100.0
    full: int = 50
    classes: str = "all"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.classes not in ("all", "own"):
            raise ValueError(f"classes={self.classes!r} is unknown; known: all, own")
        if self.bins < 4:
            raise ValueError(f"bins={self.bins} is too few: choose at least 4")

    @property
    def intervals(self) -> int:
        """The number of bins."""
        return 2 * (self.bins // 2 - 1)

    def begin(self, layout: Layout) -> State:
        """Return counts of 0."""
        return State.of_sums(layout, self.expected(layout))

    def observe(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Count the bins of a batch."""
        bins = self.bin(neurons, self.edges().to(neurons.device))
        places = cell_index(bins, labels, self.intervals).flatten()
        counts = state["counts"].view(-1)
        counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def prepare(self, state: State) -> "BinScorer":
        """Return the scorer, with the counts of all classes or of each class."""
        counts = state["counts"].int()
        if self.classes == "all":
            counts = counts.sum(0, keepdim=True, dtype=torch.int32).expand_as(counts).contiguous()
        return BinScorer(state.layout, counts, self)

    def bin(self, neurons: Tensor, edges: Tensor) -> Tensor:
        """Return the bin of each neuron's state, from 0; an edge belongs to the upper bin.

        NaN, which lies above every edge, is in the last bin.
        """
        states = torch.sigmoid(self.steepness * neurons)
        return (torch.bucketize(states, edges, right=True) - 1).clamp_max_(self.intervals - 1)

    def edges(self) -> Tensor:
        """Return the edges of the bins, shape (intervals + 1,).

        Below ½ they are log₁₀₀₀ x for x evenly spaced from 1 to √1000; above ½ they are mirrored.
        The last edge is above 1, so that a state of 1 belongs to the last bin.
        """
        spaced = torch.linspace(1, math.sqrt(BASE), self.bins // 2, dtype=torch.float64)
        lower = spaced.log() / math.log(BASE)
        edges = torch.cat([lower[:-1], (1 - lower).flip(0)])
        edges[-1] += 0.01
        return edges.float()

    def expected(self, layout: Layout) -> Expected:
        """Return the tensors of a complete state."""
        shape = (layout.classes, layout.neurons, self.intervals)
        return {"counts": (torch.int32, shape)}


class BinScorer(CostScorer):
    """Scores bins, see `ActivationCoverage`."""

    counts: Tensor
    edges: Tensor

    def __init__(self, layout: Layout, counts: Tensor, method: ActivationCoverage) -> None:
        super().__init__(layout, {"counts": counts, "edges": method.edges().to(counts.device)})
        self.method = method

    def costs_at(self, part: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return one minus the coverage of each neuron's bin."""
        return 1 - (self._seen(part, neurons, classes) / self.method.full).clamp_max(1)

    def inside(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons are in a bin of at least one trusted image."""
        return self._seen(self.layout, neurons, classes) > 0

    def span(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values where the first covered bin begins and the last one ends."""
        covered = (self.counts.index_select(0, classes) > 0).int()
        first = covered.argmax(2)
        last = self.method.intervals - 1 - covered.flip(2).argmax(2)
        inner = torch.logit(self.edges[1:-1]) / self.method.steepness
        ends = inner.new_full((1,), torch.inf)
        edges = torch.cat([-ends, inner, ends])
        return edges[first], edges[last + 1]

    def _seen(self, part: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the number of trusted images in each neuron's bin."""
        columns = torch.arange(part.span.start, part.span.stop, device=neurons.device)
        return self.counts[classes[:, None], columns, self.method.bin(neurons, self.edges)]
