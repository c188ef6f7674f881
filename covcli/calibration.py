"""From evidence to one score, a p-value, a confidence and a verdict.

Everything here is measured on calibration images: trusted ones that trained neither the network
nor the signature. One in four of them fits how the evidence is combined, the others rank new
scores, so that a new image and those are scored by a rule that has seen none of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from scipy.stats import betabinom
from torch import Tensor

from covcli.combination import Combination, fit_combination
from covcli.errors import CovcliError

FIT_EVERY = 4
MINIMUM_IMAGES = 8


@dataclass(frozen=True)
class Calibration:
    """What the calibration images say of the scores.

    Attributes
    ----------
    combination
        How evidence becomes a score.
    scores
        Scores of the other calibration images, ascending, float64 of shape (n,).
    softmax
        The same images' softmax scores (one minus the highest probability), ascending: the
        baseline gets a threshold by the same rule.
    """

    combination: Combination
    scores: Tensor
    softmax: Tensor

    def score(self, evidence: Tensor) -> Tensor:
        """Return the score of evidence (B, P), float64 of shape (B,); larger is less trusted."""
        return self.combination.score(evidence)

    def p_value(self, scores: Tensor) -> Tensor:
        """Return the conformal p-value (1 + #{calibration scores ≥ s}) / (n + 1) of each score.

        For inputs exchangeable with the calibration images, P(p ≤ α) ≤ α whatever the
        distribution (Vovk et al., 2005; Bates et al., "Testing for outliers with conformal
        p-values", 2023, section 2).
        """
        n = len(self.scores)
        below = torch.searchsorted(self.scores, scores.to(self.scores).contiguous(), side="left")
        return (1 + n - below).double() / (n + 1)

    def rank(self, alpha: float) -> int:
        """Return floor(α(n + 1)), how many of n + 1 exchangeable scores may raise the alarm.

        Raises
        ------
        CovcliError
            If α is not between 0 and 1, or n is too small for it.
        """
        if not 0 < alpha < 1:
            raise CovcliError("must lie between 0 and 1", where=f"alpha {alpha}")
        exact = Fraction(repr(alpha))  # 0.29 means 29/100, not the double below it
        rank = math.floor(exact * (len(self.scores) + 1))
        if rank < 1:
            raise CovcliError(
                f"{len(self.scores)} calibration scores are too few for alpha {alpha}",
                fix=f"at least {math.ceil(1 / exact) - 1} are needed (of four images three count)",
            )
        return rank

    def threshold(self, alpha: float) -> float:
        """Return τ: a score above it has a p-value of at most α, and only such a score."""
        return float(self.scores[len(self.scores) - self.rank(alpha)])

    def softmax_threshold(self, alpha: float) -> float:
        """Return the baseline's threshold, by the same rule as `threshold`."""
        return float(self.softmax[len(self.softmax) - self.rank(alpha)])

    def confidence(self, scores: Tensor, alpha: float) -> Tensor:
        """Return 2^(−s/τ), 1 for s ≤ 0: below one half exactly where the verdict is "untrusted".

        The paper's confidence exp(−s·ln 2/τ) with the calibrated threshold τ (arXiv 2101.12100,
        section IV).
        """
        tau = self.threshold(alpha)
        scores = scores.double()
        shape = torch.exp2(-scores.clamp_min(0) / tau) if tau > 0 else (scores <= tau).double()
        half = math.nextafter(0.5, 0.0)
        return torch.where(scores > tau, shape.clamp_max(half), shape.clamp_min(0.5))

    def promise(self, alpha: float, images: int) -> tuple[float, float]:
        """Return where the share of alarms among so many trusted images lies with 95% probability.

        The count is beta-binomial with parameters k = floor(α(n+1)) and n + 1 − k, over the draw
        of both the calibration and the new images (Vovk, "Conditional validity of inductive
        conformal predictors", 2012), if no two scores are equal.
        """
        k = self.rank(alpha)
        law = betabinom(images, k, len(self.scores) + 1 - k)
        return float(law.ppf(0.025)) / images, float(law.ppf(0.975)) / images


def softmax_score(logits: Tensor) -> Tensor:
    """Return one minus the highest softmax probability of logits (B, C), float64 of shape (B,).

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    in Neural Networks", ICLR 2017; summed over the other classes, so that saturated images, whose
    highest probability rounds to 1, still differ.
    """
    exact = logits.double()
    others = exact.scatter(1, exact.argmax(1, keepdim=True), -torch.inf)
    return torch.exp(torch.logsumexp(others, 1) - torch.logsumexp(exact, 1))


def calibrate(
    evidence: Tensor, softmax_scores: Tensor, outliers: Sequence[Tensor] = ()
) -> Calibration:
    """Fit the combination on every fourth image, and rank the scores of the others.

    Parameters
    ----------
    evidence
        Of calibration images, float64 of shape (n, P).
    softmax_scores
        The same images' softmax scores, float64 of shape (n,).
    outliers
        For each expert the evidence of surrogate outliers, float64 of shapes (m, P); made from
        the images that the combination is fitted on, so that the others stay exchangeable with
        new trusted images.

    Raises
    ------
    CovcliError
        If there are fewer than 8 images.
    """
    if len(evidence) < MINIMUM_IMAGES:
        raise CovcliError(
            f"{len(evidence)} calibration images are too few",
            fix=f"at least {MINIMUM_IMAGES} are needed, and 26 for an alpha of 0.05",
        )
    fitting = torch.arange(len(evidence)) % FIT_EVERY == 0
    combination = fit_combination(evidence[fitting], outliers)
    scores = combination.score(evidence[~fitting])
    return Calibration(combination, scores.sort().values, softmax_scores[~fitting].sort().values)
