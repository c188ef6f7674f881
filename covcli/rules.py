"""Rules: calibrated thresholds, and the verdicts and confidences that they give."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from covcli.guarantees import Guarantee


@dataclass(frozen=True)
class Rule:
    """Which scores are untrusted, so that a guarantee is kept.

    Attributes
    ----------
    guarantee
        What is kept.
    overall
        The threshold that the scores of all calibration images give.
    thresholds
        The threshold of images predicted as each class, float64 of shape (C,): the overall one,
        or in certified mode the larger of that and the class's own.
    counts
        How many calibration scores are of images predicted as each class, int64 of shape (C,).
    """

    guarantee: Guarantee
    overall: float
    thresholds: Tensor
    counts: Tensor

    def untrusted(self, scores: Tensor, predicted: Tensor) -> Tensor:
        """Return the verdicts: whether each score exceeds its class's threshold.

        Parameters
        ----------
        scores
            float64 of shape (B,).
        predicted
            Predicted classes, int64 of shape (B,).
        """
        return scores > self.thresholds[predicted]

    def confidence(self, scores: Tensor, predicted: Tensor) -> Tensor:
        """Return 2^(−s/τ), 1 for s ≤ 0: below one half exactly where the verdict is "untrusted".

        The paper's confidence exp(−s·ln 2/τ) with the calibrated threshold τ of the predicted
        class (arXiv 2101.12100, section IV). The parameters are those of `untrusted`.
        """
        tau = self.thresholds[predicted]
        flagged = scores > tau
        shape = torch.exp2(-(scores.clamp_min(0) / tau))
        if not self._all_positive:  # then nothing lies between trust and none
            shape = torch.where(tau > 0, shape, (~flagged).double())
        half = math.nextafter(0.5, 0.0)
        return torch.where(flagged, shape.clamp_max(half), shape.clamp_min(0.5))

    @cached_property
    def _all_positive(self) -> bool:
        return bool((self.thresholds > 0).all())


def make_rule(scores: Tensor, predicted: Tensor, classes: int, guarantee: Guarantee) -> Rule:
    """Take the thresholds from calibration scores.

    Parameters
    ----------
    scores
        float64 of shape (n,). Fewer than the guarantee's minimum, in certified mode of a
        predicted class, give a threshold of infinity.
    predicted
        The same images' predicted classes, int64 of shape (n,).
    classes
        How many classes there are, C.
    guarantee
        What to keep.
    """
    overall = _largest(scores, guarantee.rank(len(scores)))
    thresholds = torch.full((classes,), overall, dtype=torch.float64)
    counts = torch.bincount(predicted, minlength=classes)
    if guarantee.mode == "certified":
        own = [scores[predicted == k] for k in range(classes)]
        of_class = [_largest(mine, guarantee.rank(len(mine))) for mine in own]
        thresholds = thresholds.maximum(torch.tensor(of_class, dtype=torch.float64))
    return Rule(guarantee, overall, thresholds, counts)


def _largest(scores: Tensor, rank: int) -> float:
    """Return the score of that rank, 1 being the largest; of rank 0, what no score exceeds."""
    return float(scores.sort(descending=True).values[rank - 1]) if rank else math.inf
