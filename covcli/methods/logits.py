"""Evidence against trust from the logits."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Read: TypeAlias = Callable[[Tensor], Tensor]
# The log of the smallest positive double: a lower bound, also for a single class.
LEAST_LOG = -745.0


def doubt(logits: Tensor) -> Tensor:
    """Return the log of one minus the highest softmax probability, float64 of shape (B,).

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    in Neural Networks", ICLR 2017. The probabilities of the other classes are summed, so that
    images whose highest probability rounds to 1 still have different values.

    Parameters
    ----------
    logits
        Shape (B, C).

    Examples
    --------
    >>> doubt(torch.tensor([[60.0, 0.0], [0.0, 0.0]])).tolist()
    [-60.0, -0.6931471805599453]
    """
    exact = logits.double()
    others = exact.scatter(1, exact.argmax(1, keepdim=True), -torch.inf)
    return (torch.logsumexp(others, 1) - torch.logsumexp(exact, 1)).clamp_min(LEAST_LOG)


def energy(logits: Tensor) -> Tensor:
    """Return the free energy −log Σ exp(logits), float64 of shape (B,).

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.
    """
    return -torch.logsumexp(logits.double(), 1)


READS: Mapping[str, Read] = {"doubt": doubt, "energy": energy}
# The columns of evidence, by the value of a method's parameter `logits`.
LOGIT_EVIDENCE: Mapping[str, tuple[str, ...]] = {
    "both": ("doubt", "energy"), "doubt": ("doubt",), "energy": ("energy",), "none": (),
}  # fmt: skip


def read_logits(name: str, logits: Tensor) -> Tensor:
    """Return the columns that a name in LOGIT_EVIDENCE stands for, float64 of shape (B, L)."""
    columns = [READS[column](logits) for column in LOGIT_EVIDENCE[name]]
    return torch.stack(columns, 1) if columns else logits.new_zeros(len(logits), 0).double()
