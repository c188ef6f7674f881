"""Neuron activation coverage: what activations contribute to the network's certainty.

Liu, Tian, Li, Zhao and Xie, "Neuron Activation Coverage: Rethinking Out-of-Distribution Detection
and Generalization", ICLR 2024 (arXiv 2306.02879), section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from covcli.methods.base import METHODS, Method, cell_index
from covcli.methods.state import Expected, Layout, State

SMALLEST = 1e-6


@METHODS.add("nac")
@dataclass(frozen=True)
class ActivationCoverage(Method):
    """NAC: a neuron's state is σ(α·a·∂KL/∂a), KL the divergence of the softmax from uniform.

    States fall into bins, dense near 0 and 1; a neuron costs 1 − min(c/full, 1), c the trusted
    images whose state lay in the same bin. The mean over a point is one minus its coverage; with
    `classes=all`, as in the paper, images of all classes count, with `classes=own` those of the
    predicted class. Computing it takes a backward pass.

    Parameters
    ----------
    bins
        How many bins: geometric from 1e-6 to ½, mirrored above.
    steepness
        α.
    full
        From how many images on a bin is covered wholly (O* in the paper).
    classes
        "all" or "own".
    """

    name: ClassVar[str] = "nac"
    contributions: ClassVar[bool] = True
    bins: int = 50
    steepness: float = 100.0
    full: int = 50
    classes: str = "all"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.classes not in ("all", "own"):
            raise ValueError(f"classes={self.classes!r} is unknown; known: all, own")
        if self.bins < 2:
            raise ValueError("bins=1 tells nothing apart: take at least 2")

    def begin(self, layout: Layout) -> State:
        """Return counts of 0."""
        return State.of_sums(self.expected(layout))

    def observe(self, state: State, layout: Layout, neurons: Tensor, labels: Tensor) -> None:
        """Count the bins of a batch."""
        places = self._places(neurons, labels).flatten()
        counts = state["counts"].view(-1)
        counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def prepare(self, state: State, layout: Layout) -> State:
        """Return the counts that an image is measured against, by class."""
        counts = state["counts"]
        if self.classes == "all":
            counts = counts.sum(0, keepdim=True, dtype=torch.int32).expand_as(counts).contiguous()
        return State({"counts": counts})

    def costs(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return one minus the coverage of each neuron's bin."""
        found = ready["counts"].view(-1)[self._places(neurons, classes)]
        return 1 - (found / self.full).clamp_max(1)

    def inside(self, ready: State, layout: Layout, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons lie in a bin where a trusted image has been."""
        return ready["counts"].view(-1)[self._places(neurons, classes)] > 0

    def span(self, ready: State, layout: Layout, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values where the first covered bin begins and the last one ends."""
        covered = (ready["counts"][classes] > 0).int()
        first = covered.argmax(2)
        last = self.bins - 1 - covered.flip(2).argmax(2)
        edges = torch.logit(self._edges().to(classes.device)) / self.steepness
        edges[0], edges[-1] = -torch.inf, torch.inf
        return edges[first], edges[last + 1]

    def bin(self, neurons: Tensor) -> Tensor:
        """Return the bin of each neuron's state, 0 to bins − 1; an edge belongs to the lower."""
        states = torch.sigmoid(self.steepness * neurons).clamp(SMALLEST, 1 - SMALLEST)
        inner = torch.bucketize(states, self._edges().to(states.device)) - 1
        return inner.clamp(0, self.bins - 1)

    def _edges(self) -> Tensor:
        lower = self.bins // 2
        first, last = torch.log10(torch.tensor([SMALLEST, 0.5])).tolist()
        left = torch.logspace(first, last, lower + 1)
        right = 1 - torch.logspace(first, last, self.bins - lower + 1).flip(0)
        return torch.cat([left, right[1:]])

    def _places(self, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return the index of each neuron's bin in the flattened counts."""
        return cell_index(self.bin(neurons), classes, self.bins)

    def expected(self, layout: Layout) -> Expected:
        """Return what a complete state holds."""
        shape = (layout.classes, layout.neurons, self.bins)
        return {"counts": (torch.int32, shape)}
