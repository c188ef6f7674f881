"""Which of n calibration scores may be the threshold, so that false alarms stay below a rate.

A verdict is "untrusted" for scores above the k-th largest calibration score. If the calibration
scores and the new ones are drawn alike and no two are equal, the share of new scores above it is
Beta(k, n + 1 − k) distributed over the draw of the calibration scores (Wilks, "Determination of
sample sizes for setting tolerance limits", 1941; Vovk, "Conditional validity of inductive
conformal predictors", 2012, proposition 2a). Equal scores only lower it. docs/method.md has the
proof.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from scipy.stats import betabinom, binom, binomtest
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.core.specs import suggestion

Mode: TypeAlias = Literal["marginal", "certified"]
MODES: tuple[Mode, ...] = get_args(Mode)
CONFIDENCE = 0.95
_DOUBT = 0.05  # 1 − 0.95 is a little more in binary

ENDS = (
    "This ends where inputs are no longer exchangeable with the calibration images: another "
    "camera, another mixture of classes, a shifted time."
)


def _exact(alpha: float) -> Fraction:
    """Return the decimal that was written: 0.29 means 29/100, not the double below it."""
    return Fraction(repr(float(alpha)))


def rank_marginal(scores: int, alpha: float) -> int:
    """Return floor(α(n + 1)): so many of n + 1 exchangeable scores may raise the alarm.

    A new score exceeds the k-th largest of n others with a probability of at most k/(n + 1)
    (Vovk et al., "Algorithmic learning in a random world", 2005).
    """
    return math.floor(_exact(alpha) * (scores + 1))


def rank_certified(scores: int, alpha: float) -> int:
    """Return the largest k with P(Beta(k, n + 1 − k) ≤ α) ≥ 0.95, or 0 if there is none.

    The same as P(Binomial(n, α) ≥ k) ≥ 0.95: the upper tolerance limit of Wilks (1941).
    """
    return int(binom.ppf(_DOUBT, scores, alpha))


def minimum_marginal(alpha: float) -> int:
    """Return the fewest scores with a rank of at least 1: 19 for α = 0.05, 99 for 0.01."""
    return math.ceil(1 / _exact(alpha)) - 1


def minimum_certified(alpha: float) -> int:
    """Return the fewest scores with (1 − α)^n ≤ 0.05: 59 for α = 0.05, 299 for 0.01."""
    return math.ceil(math.log(_DOUBT) / math.log1p(-alpha))


def alarms_interval(rank: int, scores: int, images: int) -> tuple[float, float]:
    """Return where the share of alarms among new images lies with 95% probability.

    The count of scores above the k-th largest of n is beta-binomial with parameters k and
    n + 1 − k, over the draw of both the calibration and the new images, if no two are equal.
    """
    law = betabinom(images, rank, scores + 1 - rank)
    return float(law.ppf(0.025)) / images, float(law.ppf(0.975)) / images


def alarms_bound(rank: int, scores: int, images: int) -> float:
    """Return what the share of alarms among new images stays at or below with 95% probability."""
    return float(betabinom(images, rank, scores + 1 - rank).ppf(CONFIDENCE)) / images


def binomial_interval(alarms: int, images: int) -> tuple[float, float]:
    """Return the exact 95% interval of a rate (Clopper and Pearson, 1934)."""
    interval = binomtest(alarms, images).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Guarantee:
    """A false-alarm rate, and the sense in which it is not exceeded.

    Attributes
    ----------
    alpha
        The rate, in (0, 1).
    mode
        "marginal": a new image raises the alarm with a probability of at most α, the draw of the
        calibration images counted in. "certified": with 95% confidence over that draw, the rate
        of the monitor that came of it is at most α, over all images and by predicted class.

    Raises
    ------
    CovcliError
        If α is not between 0 and 1, or the mode unknown.
    """

    alpha: float = 0.05
    mode: Mode = "marginal"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise CovcliError("must lie between 0 and 1", where=f"alpha {self.alpha}")
        if self.mode not in MODES:
            raise CovcliError(
                f"unknown guarantee {self.mode!r}", fix=suggestion(self.mode, list(MODES))
            )

    def changed(self, alpha: float | None, mode: Mode | None) -> "Guarantee":
        """Return the guarantee with another α, or mode; None keeps this one's."""
        return Guarantee(self.alpha if alpha is None else alpha, mode or self.mode)

    def rank(self, scores: int) -> int:
        """Return which of so many scores, from the largest on, is the threshold; 0: too few."""
        rank = rank_certified if self.mode == "certified" else rank_marginal
        return rank(scores, self.alpha)

    def minimum(self) -> int:
        """Return how many scores have a rank."""
        minimum = minimum_certified if self.mode == "certified" else minimum_marginal
        return minimum(self.alpha)

    def statement(self) -> str:
        """Return what is guaranteed, in words, with where it ends."""
        if self.mode == "certified":
            return (
                f"With 95% confidence over the draw of the calibration images, this monitor's "
                f"false-alarm rate on images like them is at most {self.alpha:g}; and so it is, "
                f"with 95% confidence each, among the images predicted as each one class. {ENDS}"
            )
        return (
            f"An image like the calibration images raises a false alarm with a probability of at "
            f"most {self.alpha:g}, the draw of those images counted in: the rate of this one "
            f"calibration may lie above, and nothing is promised of a single class. {ENDS}"
        )


DEFAULT_GUARANTEE = Guarantee()


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
