"""95% intervals with correct coverage, also near 0 and 1 and for a few dozen images.

Every interval refers to the draw of the tested images. Network, signature and calibration are
fixed. Nothing here is random.

- A *share* of images: exact binomial, `guarantee.binomial_interval`.
- A metric on which every image has a small influence: the standard error comes from the influences.
  The interval is symmetric on the logit scale, and its width is Student's quantile times the
  standard error. For the AUROC, the influences are the placements of DeLong, DeLong and
  Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
  characteristic curves: a nonparametric approach", Biometrics 1988, computed by sorting (Sun and
  Xu, "Fast implementation of DeLong's algorithm for comparing the areas under correlated receiver
  operating characteristic curves", IEEE Signal Processing Letters 2014).
- If few images are misordered, that standard error is 0, or too small by chance. Then the interval
  is extended to contain that of Newcombe, "Confidence intervals for an effect size measure based on
  the Mann-Whitney statistic. Part 2: asymptotic methods and evaluation", Statistics in Medicine
  2006, method 5, which takes the variance from a model at each candidate value. At an AUROC of 0
  or 1, it is Newcombe's interval.
- A metric composed of several uncertain ones: the squared distances to their limits are added (Zou
  and Donner, "Construction of confidence limits about effect measures: a general approach",
  Statistics in Medicine 2008).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binom, norm
from scipy.stats import t as student

from covcli.reporting.documents import Estimate
from covcli.signature.guarantee import binomial_interval

Floats = npt.NDArray[np.float64]
TAIL = 0.025  # the probability beyond either limit
NORMAL = float(norm.isf(TAIL))
# With fewer misordered images of either kind, the standard error is not reliable.
FEW = 30
# A smaller variance is treated as rounding error.
LEAST_VARIANCE = 1e-18
# The smallest of this many scores is below their 5% quantile with 92.3% confidence. With fewer
# scores, the confidence is too low.
FEWEST = 50
# True positive rates at which a model's ROC curve is summed.
RATES = (np.arange(2000) + 0.5) / 2000


@dataclass(frozen=True)
class Span:
    """An interval [low, high]."""

    low: float
    high: float

    def joined(self, other: "Span") -> "Span":
        """Return the smallest interval that contains both."""
        return Span(min(self.low, other.low), max(self.high, other.high))

    def holding(self, value: float) -> "Span":
        """Return the smallest interval that contains this one and a value."""
        return self.joined(Span(value, value))

    def around(self, value: float) -> Estimate:
        """Return a value with this interval, which is extended to contain it."""
        wide = self.holding(value)
        return Estimate(value, wide.low, wide.high)


@dataclass(frozen=True)
class Influence:
    """The first-order influence of each image on a metric, for each of two independent samples.

    Attributes
    ----------
    first, second
        Shapes (n,) and (m,); each is defined up to an additive constant.
    """

    first: Floats
    second: Floats

    @property
    def variance(self) -> float:
        """The metric's variance; 0 if it is rounding error, or a sample has only one image."""
        if min(len(self.first), len(self.second)) < 2:
            return 0.0
        variance = sum(_variance(part) for part in (self.first, self.second))
        return variance if variance > LEAST_VARIANCE else 0.0

    @property
    def reach(self) -> float:
        """Half the interval's width: Student's 97.5% quantile times the standard error.

        A variance estimated from n values of kurtosis κ has a relative variance of (κ − 1)/n, so
        2n/(κ − 1) degrees of freedom. Two variances are added by Satterthwaite's formula ("An
        approximate distribution of estimates of variance components", 1946). The fewer images
        determine a metric, the larger is the kurtosis, and the wider the interval.
        """
        variance = self.variance
        if not variance:
            return 0.0
        doubt = sum(
            _variance(part) ** 2 * (_kurtosis(part) - 1) / len(part)
            for part in (self.first, self.second)
        )
        freedom = max(1.0, 2 * variance**2 / doubt) if doubt > 0 else math.inf
        return float(student.isf(TAIL, freedom) * math.sqrt(variance))


def _variance(values: Floats) -> float:
    return float(values.var(ddof=1)) / len(values)


def _kurtosis(values: Floats) -> float:
    squares = (values - values.mean()) ** 2
    return float((squares**2).mean() / squares.mean() ** 2) if squares.any() else 1.0


def logit_span(value: float, influence: Influence) -> Span | None:
    """Return the interval that is symmetric around a value on the logit scale.

    None if there is no such interval: at 0 and 1, and if the variance is 0.
    """
    if not influence.variance or not 0 < value < 1:
        return None
    reach = influence.reach / (value * (1 - value))
    return Span(float(expit(logit(value) - reach)), float(expit(logit(value) + reach)))


def log_span(value: float, influence: Influence) -> Span | None:
    """Return the interval that is symmetric on the logarithmic scale; None if there is none."""
    if not influence.variance or value <= 0:
        return None
    factor = math.exp(min(influence.reach / value, 50.0))
    return Span(value / factor, value * factor)


def combined(value: float, below: Floats, above: Floats, correlation: Floats | None = None) -> Span:
    """Return the interval, within [0, 1], of the sum of uncertain parts.

    Parameters
    ----------
    value
        The sum.
    below, above
        The distances of each part's 95% limits from its value, shapes (k,), at least 0.
    correlation
        The correlation of the parts, shape (k, k); None for independent parts.

    Examples
    --------
    >>> combined(0.5, np.array([0.03, 0.04]), np.array([0.06, 0.08]))
    Span(low=0.45, high=0.6)
    """
    together = np.eye(len(below)) if correlation is None else correlation
    squares = [max(float(part @ together @ part), 0.0) for part in (below, above)]
    return Span(max(value - math.sqrt(squares[0]), 0.0), min(value + math.sqrt(squares[1]), 1.0))


# The area under the ROC curve


@dataclass(frozen=True)
class Placements:
    """The rank of each image of one kind among those of the other; equal scores count half.

    Attributes
    ----------
    trusted
        The share of untrusted images that score above each trusted one, shape (n,).
    untrusted
        The share of trusted images that score below each untrusted one, shape (m,).
    """

    trusted: Floats
    untrusted: Floats

    @property
    def area(self) -> float:
        """The area under the ROC curve, which is the mean of either array."""
        return float(self.untrusted.mean())

    @property
    def influence(self) -> Influence:
        """The placements as influences on the area."""
        return Influence(self.trusted, self.untrusted)

    @property
    def few(self) -> bool:
        """Whether few images of either kind are misordered with an image of the other kind."""
        right = 1.0 if self.area >= 0.5 else 0.0
        wrong = [int((part != right).sum()) for part in (self.trusted, self.untrusted)]
        return min(wrong) < FEW

    def span(self) -> Span:
        """Return the interval of the area."""
        own = logit_span(self.area, self.influence)
        return self.backed(own, lambda area: area)

    def estimate(self) -> Estimate:
        """Return the area with its interval."""
        return self.span().around(self.area)

    def backed(self, own: Span | None, modelled: Callable[[Span], Span]) -> Span:
        """Return the interval of a metric of the same curve, with a model if few are misordered.

        Parameters
        ----------
        own
            The metric's interval from its variance; None if there is none.
        modelled
            Converts Newcombe's interval of the area to that of the metric.
        """
        if own is not None and not self.few:
            return own
        model = modelled(newcombe(self.area, len(self.trusted), len(self.untrusted)))
        return model if own is None else own.joined(model)


def newcombe(area: float, trusted: int, untrusted: int) -> Span:
    """Return the interval of an area under the ROC curve with the variance of a model.

    It contains every θ with |area − θ| ≤ 1.96·√V(θ), where for n trusted and m untrusted images
    V(θ) = θ(1 − θ)[1 + (N − 1)((1 − θ)/(2 − θ) + θ/(1 + θ))]/(nm) with N = (n + m)/2: the variance
    of Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic
    (ROC) curve", Radiology 1982, with both numbers of images replaced by their mean (Newcombe 2006,
    method 5).

    Parameters
    ----------
    area
        The area, in [0, 1].
    trusted, untrusted
        The number of images of each kind.

    Examples
    --------
    >>> round(newcombe(1.0, 50, 50).low, 3)
    0.96
    """
    if area < 0.5:
        mirrored = newcombe(1 - area, trusted, untrusted)
        return Span(1 - mirrored.high, 1 - mirrored.low)
    mean = (trusted + untrusted) / 2

    def squared_reach(theta: float) -> float:  # over 1 − θ
        inner = 1 + (mean - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return NORMAL**2 * theta * inner / (trusted * untrusted)

    if area == 1:  # one root is 1 itself, and is divided out
        return Span(float(brentq(lambda theta: 1 - theta - squared_reach(theta), 0, 1)), 1.0)

    def excess(theta: float) -> float:
        return float((area - theta) ** 2 - (1 - theta) * squared_reach(theta))

    return Span(float(brentq(excess, 0, area)), float(brentq(excess, area, 1)))


def exponential_curves(area: float) -> Iterator[Floats]:
    """Yield the false positive rates at RATES of the two curves of the model behind V(θ).

    In the model, scores are exponential; either the untrusted or the trusted scores have the larger
    mean.

    Parameters
    ----------
    area
        The area under both curves, in [0, 1].
    """
    ratio = (1 - area) / max(area, 1e-9)
    yield RATES ** (1 / ratio) if ratio else np.zeros_like(RATES)
    yield 1 - (1 - RATES) ** ratio


# The threshold that catches 95%


@lru_cache(maxsize=1024)
def threshold_ranks(images: int) -> tuple[int, int]:
    """Return the ranks of sorted scores that bound their 5% quantile, each with 97.5% confidence.

    Returns
    -------
    tuple of int
        Counted from 1 for the smallest; 0 and `images` + 1 mean that there is no such score.
    """
    low, high = binom.ppf([TAIL, 1 - TAIL], images, 0.05)
    return int(low), int(high) + 1


@dataclass(frozen=True)
class Fpr95:
    """The share of trusted images flagged at the threshold that catches 95% of the untrusted.

    Attributes
    ----------
    flagged
        Which trusted images are flagged, bool of shape (n,).
    binomial
        The exact interval of the share if the threshold were known.
    threshold
        The shares flagged at the limits of the threshold's interval.
    bounded
        Whether there are enough untrusted images for such an interval.
    """

    flagged: npt.NDArray[np.bool_]
    binomial: Span
    threshold: Span
    bounded: bool

    @classmethod
    def of(cls, trusted: Floats, untrusted: Floats) -> "Fpr95":
        """Compute the FPR95 of scores of shapes (n,) and (m,).

        With fewer than 72 untrusted images, no score bounds the 5% quantile from below with 97.5%
        confidence. With 50 or more, the smallest score does with 92.3%, and the upper limit is the
        exact limit of the share flagged there. With fewer than 50, the upper limit is 1. If scores
        are equal, the share jumps from one threshold to the next, and at each limit of the
        threshold its own exact limit counts.
        """
        sorted_scores, m, n = np.sort(untrusted), len(untrusted), len(trusted)
        missed = int(m - np.argmax(np.arange(1, m + 1) / m >= 0.95) - 1)
        flagged = trusted >= sorted_scores[missed]
        value = float(flagged.mean())
        tied = len(np.unique(trusted)) < n or len(np.unique(untrusted)) < m

        def limit(rank: int, side: int) -> float:
            caught = int((trusted >= sorted_scores[rank - 1]).sum())
            jumped = tied and caught != int(flagged.sum())
            return binomial_interval(caught, n)[side] if jumped else caught / n

        first, last = threshold_ranks(m)
        low = limit(last, 0) if last <= m else 0.0
        binomial = Span(*binomial_interval(int(flagged.sum()), n))
        if first:
            return cls(flagged, binomial, Span(low, limit(first, 1)), True)
        caught = int((trusted >= sorted_scores[0]).sum())
        high = binomial_interval(caught, n)[1] if m >= FEWEST else 1.0
        return cls(flagged, Span(binomial.low, value), Span(low, high), False)

    @property
    def value(self) -> float:
        """The share."""
        return float(self.flagged.mean())

    def reach(self) -> tuple[Floats, Floats]:
        """Return the distances of both parts' limits below and above the value, shapes (2,)."""
        spans = (self.binomial, self.threshold)
        below = np.array([self.value - span.low for span in spans])
        above = np.array([span.high - self.value for span in spans])
        return below, above

    def span(self) -> Span:
        """Return the interval."""
        return combined(self.value, *self.reach())

    def estimate(self) -> Estimate:
        """Return the share with its interval."""
        return self.span().around(self.value)


# Means over sets that share their trusted images


def mean_area(sets: list[Placements]) -> Estimate:
    """Return the mean area of sets that share their trusted images, with its interval.

    It combines the interval of each set. The correlation of two sets comes from their trusted
    placements; it is 1 if a variance is 0.
    """
    value = float(np.mean([one.area for one in sets]))
    areas, spans = [one.area for one in sets], [one.span() for one in sets]
    below = np.array([area - span.low for area, span in zip(areas, spans, strict=True)])
    above = np.array([span.high - area for area, span in zip(areas, spans, strict=True)])
    shared = _covariance(np.stack([one.trusted for one in sets])) / len(sets[0].trusted)
    own = np.array([one.influence.variance for one in sets])
    correlation = _correlation(shared, own)
    return combined(value, below / len(sets), above / len(sets), correlation).around(value)


def mean_fpr95(sets: list[Fpr95]) -> Estimate:
    """Return the mean FPR95 of sets that share their trusted images, with its interval.

    The correlation of the binomial parts is that of the flags on the shared trusted images. The
    sets' thresholds are independent. But the distances of thresholds that are not bounded are added
    linearly, because they are not symmetric.
    """
    k = len(sets)
    shared = _covariance(np.stack([one.flagged for one in sets]).astype(float))
    unbounded = np.array([not one.bounded for one in sets], float)
    correlation = np.zeros((2 * k, 2 * k))
    correlation[:k, :k] = _correlation(shared, np.diagonal(shared))
    correlation[k:, k:] = np.maximum(np.outer(unbounded, unbounded), np.eye(k))
    reaches = [one.reach() for one in sets]
    below, above = (np.stack([reach[side] for reach in reaches]).T.ravel() for side in (0, 1))
    value = float(np.mean([one.value for one in sets]))
    return combined(value, below / k, above / k, correlation).around(value)


def _covariance(rows: Floats) -> Floats:
    if rows.shape[1] < 2:
        return np.zeros((len(rows), len(rows)))
    covariance: Floats = np.atleast_2d(np.cov(rows))
    return covariance


def _correlation(shared: Floats, variances: Floats) -> Floats:
    """Return covariances divided by the roots of both variances; 1 if a variance is 0."""
    scale = np.sqrt(np.outer(variances, variances))
    known = scale > 0
    correlation: Floats = np.where(known, shared / np.where(known, scale, 1.0), 1.0)
    np.fill_diagonal(correlation, 1.0)
    return correlation
