"""Guarantees, and the thresholds on scores that keep them.

A verdict is "untrusted" for scores above the k-th largest calibration score. If the calibration
scores and the new scores are drawn from the same distribution and no two are equal, the share of
new scores above it has the distribution Beta(k, n + 1 − k), over the draw of the calibration scores
(Wilks, "Determination of sample sizes for setting tolerance limits", 1941; Vovk, "Conditional
validity of inductive conformal predictors", 2012, proposition 2a). Equal scores only lower it.
docs/guarantees.md has the proof.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol, Self, get_args

import numpy as np
import torch
from scipy.signal import fftconvolve
from scipy.special import betaincinv
from scipy.stats import betabinom, binom
from torch import Tensor

from covcli.core.choices import Mode
from covcli.core.errors import CovcliError
from covcli.core.specs import suggestion
from covcli.reporting.documents import Guaranteed

MODES: tuple[Mode, ...] = get_args(Mode)
CONFIDENCE = 0.95
_DOUBT = 0.05  # in floating point, 1 − 0.95 is slightly larger

ENDS = (
    "This ends where inputs are no longer exchangeable with the calibration images: another "
    "camera, another mixture of classes, a shifted time."
)


def _exact(alpha: float) -> Fraction:
    """Return a float as the decimal fraction that was written: 0.29 is exactly 29/100."""
    return Fraction(repr(float(alpha)))


def rank_marginal(scores: int, alpha: float) -> int:
    """Return k = floor(α(n + 1)), the rank of the threshold for a marginal guarantee.

    A new score exceeds the k-th largest of n others with a probability of at most k/(n + 1)
    (Vovk et al., "Algorithmic learning in a random world", 2005). A p-value k/(n + 1) that is α in
    floating point counts as α, as in α = 1/3, so that p ≤ α exactly if the verdict is "untrusted".

    Examples
    --------
    >>> rank_marginal(99, 0.05), rank_marginal(18, 0.05), rank_marginal(2, 1 / 3)
    (5, 0, 1)
    """
    rank = math.floor(_exact(alpha) * (scores + 1))
    return rank + 1 if (rank + 1) / (scores + 1) <= alpha else rank


def rank_certified(scores: int, alpha: float) -> int:
    """Return the largest k with P(Beta(k, n + 1 − k) ≤ α) ≥ 0.95, or 0 if there is none.

    This is equivalent to P(Binomial(n, α) ≥ k) ≥ 0.95, the upper tolerance limit of Wilks (1941).

    Examples
    --------
    >>> rank_certified(59, 0.05), rank_certified(58, 0.05)
    (1, 0)
    """
    return int(binom.ppf(_DOUBT, scores, alpha))


def minimum_marginal(alpha: float) -> int:
    """Return the smallest number of scores with a rank ≥ 1: 19 for α = 0.05, 99 for 0.01."""
    least = math.ceil(1 / _exact(alpha)) - 1
    return least - 1 if 1 / least <= alpha else least


def minimum_certified(alpha: float, doubt: float = _DOUBT) -> int:
    """Return the smallest n with (1 − α)^n ≤ 0.05: 59 for α = 0.05, 299 for 0.01.

    Parameters
    ----------
    alpha
        The rate, in (0, 1).
    doubt
        The chance that the rate is exceeded, in (0, 1).
    """
    number = math.log(doubt) / math.log1p(-alpha)
    return math.ceil(min(number, float(sys.maxsize)))


def alarms_interval(rank: int, scores: int, images: int) -> tuple[float, float]:
    """Return the 95% interval of the share of alarms among new images.

    The number of new scores above the k-th largest of n is beta-binomial with parameters k and
    n + 1 − k, over the draw of both the calibration and the new images, if no two are equal.

    Parameters
    ----------
    rank
        k, the rank of the threshold.
    scores
        n, the number of calibration scores.
    images
        The number of new images.

    Examples
    --------
    >>> alarms_interval(rank=5, scores=99, images=1000)
    (0.015, 0.103)
    """
    law = betabinom(images, rank, scores + 1 - rank)
    return float(law.ppf(0.025)) / images, float(law.ppf(0.975)) / images


def total_alarms_interval(groups: Sequence[tuple[int, int, int]]) -> tuple[float, float]:
    """Return the 95% interval for groups with one threshold each.

    Given the number of images of each group, the groups' counts are independent. So the
    distribution of their sum is the convolution of their distributions.

    Parameters
    ----------
    groups
        The rank, the number of calibration scores and the number of new images of each group.

    Examples
    --------
    >>> total_alarms_interval([(5, 99, 100)]) == alarms_interval(5, 99, 100)
    True
    """
    laws = [
        betabinom(images, rank, scores + 1 - rank).pmf(np.arange(images + 1))
        for rank, scores, images in groups
    ]
    while len(laws) > 1:  # of neighbours, so that the work hardly grows with the groups
        pairs = zip(laws[::2], [*laws[1::2], np.ones(1)], strict=False)
        laws = [_convolved(*pair) for pair in pairs]
    below = laws[0].clip(0).cumsum()
    low, high = (int(np.searchsorted(below, end * below[-1])) for end in (0.025, 0.975))
    images = sum(images for _, _, images in groups)
    return low / images, high / images


def _convolved(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    large = len(one) * len(other) > 1 << 20
    return fftconvolve(one, other) if large else np.convolve(one, other)


def alarms_bound(rank: int, scores: int, images: int) -> float:
    """Return the 95% upper bound of the share of alarms among new images."""
    return float(betabinom(images, rank, scores + 1 - rank).ppf(CONFIDENCE)) / images


def binomial_interval(alarms: int, images: int) -> tuple[float, float]:
    """Return the exact 95% interval of a rate (Clopper and Pearson, 1934)."""
    tail = (1 - CONFIDENCE) / 2
    low = betaincinv(alarms, images - alarms + 1, tail) if alarms else 0.0
    high = betaincinv(alarms + 1, images - alarms, 1 - tail) if alarms < images else 1.0
    return float(low), float(high)


_STATEMENTS: Mapping[Mode, str] = {
    "marginal": (
        "An image like the calibration images raises a false alarm with a probability of at most "
        "{alpha}, averaged over the draw of those images: the rate of this one calibration may be "
        "higher, and nothing is guaranteed for a single class."
    ),
    "by-class": (
        "Among images like the calibration images that are predicted as any one class, an image "
        "raises a false alarm with a probability of at most {alpha}, averaged over the draw of "
        "those images: the rates of this one calibration may be higher."
    ),
    "certified": (
        "With 95% confidence over the draw of the calibration images, this monitor's false-alarm "
        "rate on images like them is at most {alpha}. For each class, the same holds with 95% "
        "confidence among the images predicted as that class."
    ),
    "certified-overall": (
        "With 95% confidence over the draw of the calibration images, this monitor's false-alarm "
        "rate on images like them is at most {alpha}; nothing is guaranteed for a single class."
    ),
}


@dataclass(frozen=True)
class Guarantee:
    """A bound on the false-alarm rate, its kind, and optionally a bound on the error rate.

    Attributes
    ----------
    alpha
        The largest false-alarm rate, in (0, 1).
    mode
        "marginal": a new image raises a false alarm with a probability of at most α, averaged over
        the draw of the calibration images. "by-class": the same among the images predicted as each
        class (Mondrian conformal prediction; Vovk et al., "Algorithmic learning in a random world",
        2005, section 4.5). "certified-overall": with 95% confidence over that draw, the rate of
        this monitor is at most α. "certified": the same, and also with 95% confidence for each
        class among the images predicted as it.
    max_error
        The largest share of wrong answers among those that pass, in (0, 1), with 95% confidence
        over that draw; for each predicted class in the mode "by-class". None: no bound.

    Raises
    ------
    CovcliError
        If a rate is not between 0 and 1, or the mode is unknown.

    Examples
    --------
    >>> guarantee = Guarantee(alpha=0.1, mode="certified-overall")
    >>> guarantee.minimum(), guarantee.rank(scores=100)
    (29, 5)
    """

    alpha: float = 0.05
    mode: Mode = "marginal"
    max_error: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise CovcliError("must be between 0 and 1", where=f"alpha {self.alpha}")
        if self.mode not in MODES:
            raise CovcliError(
                f"unknown guarantee {self.mode!r}", fix=suggestion(self.mode, list(MODES))
            )
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise CovcliError("must be between 0 and 1", where=f"max-error {self.max_error}")

    @property
    def certain(self) -> bool:
        """Whether it holds with 95% confidence for one monitor, instead of on average."""
        return self.mode in ("certified", "certified-overall")

    @property
    def each_class(self) -> bool:
        """Whether it holds for the images predicted as each class."""
        return self.mode in ("by-class", "certified")

    def changed(self, request: "GuaranteeRequest") -> "Guarantee":
        """Return the guarantee with what the request changes.

        Raises
        ------
        CovcliError
            As for `Guarantee`.
        """
        return Guarantee(
            self.alpha if request.alpha is None else request.alpha,
            request.guarantee or self.mode,
            self.max_error if request.max_error is None else request.max_error,
        )

    def rank(self, scores: int) -> int:
        """Return the threshold's rank among that many scores, 1 for the largest; 0: too few."""
        rank = rank_certified if self.certain else rank_marginal
        return rank(scores, self.alpha)

    def alarm_interval(self, scores: int, images: int) -> tuple[float, float]:
        """Return the 95% interval of the share of alarms among new images.

        A certified guarantee gives only an upper bound; a larger threshold can only lower the rate.

        Parameters
        ----------
        scores
            The number of calibration scores.
        images
            The number of new images.
        """
        rank = self.rank(scores)
        if self.certain:
            return 0.0, alarms_bound(rank, scores, images)
        return alarms_interval(rank, scores, images)

    def minimum(self) -> int:
        """Return the smallest number of calibration scores with a threshold."""
        minimum = minimum_certified if self.certain else minimum_marginal
        return minimum(self.alpha)

    def statement(self) -> str:
        """Return the guarantee in words, with its limits."""
        alarms = _STATEMENTS[self.mode].format(alpha=f"{self.alpha:g}")
        return f"{alarms} {self._error_statement()}{ENDS}"

    def described(self) -> Guaranteed:
        """Return the guarantee for a document of results."""
        confidence = CONFIDENCE if self.certain else None
        return Guaranteed(self.mode, self.alpha, confidence, self.statement())

    def _error_statement(self) -> str:
        if self.max_error is None:
            return ""
        each = ", whatever class is predicted," if self.mode == "by-class" else ""
        return (
            f"With 95% confidence over the draw of the calibration images, at most "
            f"{self.max_error:g} of the answers that pass on images like them{each} are wrong. "
        )


DEFAULT_GUARANTEE = Guarantee()


@dataclass(frozen=True)
class GuaranteeRequest:
    """What a user wants of a stored guarantee; None leaves it as the signature records it.

    Attributes
    ----------
    alpha, guarantee, max_error
        The rate, the mode and the bound of `Guarantee`.

    Examples
    --------
    >>> Guarantee(0.05, "certified").changed(GuaranteeRequest(alpha=0.1))
    Guarantee(alpha=0.1, mode='certified', max_error=None)
    """

    alpha: float | None = None
    guarantee: Mode | None = None
    max_error: float | None = None

    @classmethod
    def of(cls, config: "Requesting") -> Self:
        """Return what the configuration of a command requests."""
        return cls(config.alpha, config.guarantee, config.max_error)


class Requesting(Protocol):
    """The configuration of a command that can change the guarantee; see `GuaranteeRequest`."""

    @property
    def alpha(self) -> float | None:
        """The rate."""

    @property
    def guarantee(self) -> Mode | None:
        """The mode."""

    @property
    def max_error(self) -> float | None:
        """The bound on the error rate."""


AS_RECORDED = GuaranteeRequest()


@dataclass(frozen=True)
class Rule:
    """The thresholds for verdicts that keep a guarantee.

    Attributes
    ----------
    guarantee
        The guarantee.
    overall
        The threshold computed from the scores of all calibration images.
    thresholds
        The threshold of images predicted as each class, float64 of shape (C,): the overall one;
        for "by-class" the class's own; for "certified" the larger of both.
    counts
        The number of calibration scores of images predicted as each class, int64 of shape (C,).
    ranked
        The calibration scores, ascending, float64 of shape (n,).
    keys
        For each score, class·(n + 1) + the number of smaller scores of all classes, ascending,
        int64 of shape (n,). So the scores of a class are consecutive and ascending.
    doubts
        The softmax score below which an answer passes, for each predicted class, float64 of shape
        (C,); infinity without a bound on the error rate.

    Examples
    --------
    >>> scores, predicted = torch.arange(19.0), torch.zeros(19, dtype=torch.int64)
    >>> rule = make_rule(scores, predicted, classes=1, guarantee=Guarantee(0.05))
    >>> new, predicted = torch.tensor([18.0, 18.5]), torch.tensor([0, 0])
    >>> rule.untrusted(new, predicted).tolist(), rule.p_value(new, predicted).tolist()
    ([False, True], [0.1, 0.05])
    """

    guarantee: Guarantee
    overall: float
    thresholds: Tensor
    counts: Tensor
    ranked: Tensor
    keys: Tensor
    doubts: Tensor

    def untrusted(self, scores: Tensor, predicted: Tensor) -> Tensor:
        """Return whether each score exceeds the threshold of its predicted class.

        Parameters
        ----------
        scores
            float64 of shape (B,).
        predicted
            Predicted classes, int64 of shape (B,).
        """
        return scores > self.thresholds.index_select(0, predicted)

    def unsure(self, scores: Tensor, predicted: Tensor, doubt: Tensor) -> Tensor:
        """Return which answers do not pass although their images are not untrusted.

        An answer passes if its score is below `error_limits` and its doubt below `doubts`.

        Parameters
        ----------
        scores, predicted
            As for `untrusted`.
        doubt
            The softmax scores, float64 of shape (B,).
        """
        sure = (scores < self.error_limits[predicted]) & (doubt < self.doubts[predicted])
        return ~self.untrusted(scores, predicted) & ~sure

    @cached_property
    def error_limits(self) -> Tensor:
        """The score below which answers can pass, by predicted class, float64 of shape (C,).

        The limit is one order statistic for all images that the error bound covers. Given it, the
        images with smaller scores are independent draws. That would not hold for the larger of two
        thresholds, as in "certified".
        """
        if self.guarantee.mode == "by-class":
            return self.thresholds
        return torch.full_like(self.thresholds, self.overall)

    def alarm_interval(self, predicted: Tensor) -> tuple[float, float]:
        """Return the 95% interval of the share of alarms among new images.

        For "by-class", the alarms of all classes are added.

        Parameters
        ----------
        predicted
            The predicted classes of the new images, int64 of shape (N,).
        """
        if self.guarantee.mode != "by-class":
            return self.guarantee.alarm_interval(int(self.counts.sum()), len(predicted))
        tested = torch.bincount(predicted, minlength=len(self.counts)).tolist()
        return total_alarms_interval(
            [
                (self.guarantee.rank(scores), scores, images)
                for scores, images in zip(self.counts.tolist(), tested, strict=True)
                if images
            ]
        )

    def p_value(self, scores: Tensor, predicted: Tensor) -> Tensor:
        """Return the conformal p-value (1 + #{calibration scores ≥ s}) / (n + 1) of each score.

        For inputs exchangeable with the calibration images, P(p ≤ α) ≤ α whatever the
        distribution (Vovk et al., 2005; Bates et al., "Testing for outliers with conformal
        p-values", 2023, section 2). For "by-class", the scores, n and the statement are those of
        the predicted class. In the modes "marginal" and "by-class", an image is untrusted if p ≤ α.
        The certified modes flag fewer images, and p keeps its marginal meaning. The parameters are
        those of `untrusted`.
        """
        n = len(self.ranked)
        below = torch.searchsorted(self.ranked, scores.to(self.ranked).contiguous(), side="left")
        if self.guarantee.mode != "by-class":
            return (1 + n - below).double() / (n + 1)
        counts = self.counts[predicted]
        # A score of the class is smaller exactly if fewer scores are smaller than it.
        below = torch.searchsorted(self.keys, predicted * (n + 1) + below, side="left")
        below = below - self._earlier[predicted]
        return (1 + counts - below).double() / (counts + 1)

    @cached_property
    def _earlier(self) -> Tensor:
        """The number of calibration scores of earlier classes, int64 of shape (C,)."""
        return self.counts.cumsum(0) - self.counts

    def confidence(self, scores: Tensor, predicted: Tensor) -> Tensor:
        """Return 2^(−s/τ), and 1 for s ≤ 0: below 0.5 exactly if the verdict is "untrusted".

        This is the form of the paper's confidence exp(−η·ln 2/τ) (arXiv 2101.12100, section IV),
        with the calibrated threshold τ of the predicted class. Only for `mrc-paper` the score s is
        the paper's coverage η. The parameters are those of `untrusted`.
        """
        tau = self.thresholds.index_select(0, predicted)
        flagged = scores > tau
        shape = torch.exp2(-(scores.clamp_min(0) / tau))
        if not self._all_positive:  # for τ ≤ 0, confidence is 1 or 0
            shape = torch.where(tau > 0, shape, (~flagged).double())
        half = math.nextafter(0.5, 0.0)
        return torch.where(flagged, shape.clamp_max(half), shape.clamp_min(0.5))

    @cached_property
    def _all_positive(self) -> bool:
        return bool((self.thresholds > 0).all())


def make_rule(scores: Tensor, predicted: Tensor, classes: int, guarantee: Guarantee) -> Rule:
    """Compute the thresholds from calibration scores.

    Parameters
    ----------
    scores
        float64 of shape (n,). With fewer scores than the guarantee's minimum (of a predicted class,
        if it holds for each class), a threshold is infinite.
    predicted
        The predicted classes of the same images, int64 of shape (n,).
    classes
        The number of classes, C.
    guarantee
        The guarantee.
    """
    ranked, order = scores.double().sort()
    n, counts = len(ranked), torch.bincount(predicted, minlength=classes)
    smaller = torch.searchsorted(ranked, ranked, side="left")
    keys = (predicted[order] * (n + 1) + smaller).sort().values
    overall = float(_largest(ranked, torch.tensor([n]), guarantee)[0])
    thresholds = torch.full((classes,), overall, dtype=torch.float64)
    if guarantee.each_class:
        own = _largest(ranked[keys % (n + 1)], counts, guarantee)
        thresholds = own.clamp_min(overall) if guarantee.mode == "certified" else own
    return Rule(
        guarantee=guarantee,
        overall=overall,
        thresholds=thresholds,
        counts=counts,
        ranked=ranked,
        keys=keys,
        doubts=torch.full((classes,), math.inf, dtype=torch.float64),
    )


def _largest(scores: Tensor, counts: Tensor, guarantee: Guarantee) -> Tensor:
    """Return the score of the guarantee's rank in each group; infinity for rank 0.

    Parameters
    ----------
    scores
        The scores group by group, ascending in each, float64 of shape (n,).
    counts
        The number of scores of each group, int64 of shape (groups,).
    guarantee
        The guarantee.
    """
    sizes, group = counts.unique(return_inverse=True)
    ranks = torch.tensor([guarantee.rank(size) for size in sizes.tolist()])[group]
    places = (counts.cumsum(0) - ranks).clamp_max(max(0, len(scores) - 1))
    if len(scores) == 0:
        return torch.full(counts.shape, math.inf, dtype=torch.float64)
    return scores[places].where(ranks > 0, math.inf)
