"""The network's own errors: how well a score detects them, and the effect of rejecting images.

Selective prediction: the images with the highest scores are rejected first, and the selective risk
is the share of errors among the images kept (Geifman and El-Yaniv, "Selective Classification for
Deep Neural Networks", NeurIPS 2017). AURC and its excess over the optimum are from Geifman, Uziel
and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019. AUGRC,
the area under the generalised risk, counts the errors kept relative to all images (Traub et al.,
"Overcoming Common Flaws in the Evaluation of Selective Classification Systems", NeurIPS 2024).

Images with equal scores have no order. Every metric is the mean over all orders of such images, in
closed form, so that it does not depend on the order of the images.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.special import xlogy

from covcli.evaluation.intervals import (
    RATES,
    Floats,
    Influence,
    Placements,
    Span,
    combined,
    exponential_curves,
    log_span,
)
from covcli.evaluation.metrics import Counts, Curves
from covcli.reporting.documents import Estimate, OwnErrors, Risk
from covcli.signature.guarantee import binomial_interval

CURVE_POINTS = 101


def own_errors(
    scores: dict[str, Floats], correct: npt.NDArray[np.bool_]
) -> dict[str, OwnErrors] | None:
    """Measure how well scores detect a network's own errors, with 95% intervals.

    The intervals take into account that the share of errors also depends on the draw of images.

    Parameters
    ----------
    scores
        The scores by name, each of shape (n,), finite; larger means less trusted.
    correct
        Which images are classified correctly, bool of shape (n,).

    Returns
    -------
    dict or None
        The metrics by name of the score; None if no image, or every image, is misclassified.

    Examples
    --------
    >>> import numpy as np
    >>> correct = np.arange(100) < 90
    >>> errors = own_errors({"score": np.arange(100.0)}, correct)
    >>> errors["score"].auroc.value, round(errors["score"].augrc.value, 3), errors["score"].wrong
    (1.0, 0.005, 10)
    """
    if correct.all() or not correct.any():
        return None
    return {name: _own_errors(values, correct) for name, values in scores.items()}


def _own_errors(scores: Floats, correct: npt.NDArray[np.bool_]) -> OwnErrors:
    _, places = np.unique(scores, return_inverse=True)
    tied, wrong = _count(places, correct)
    placements = Curves(scores[correct], scores[~correct]).placements()
    ranking = Ranking(tied, wrong, placements)
    area, least = aurc(tied, wrong), least_aurc(tied, wrong)
    return OwnErrors(
        wrong=int(wrong.sum()),
        auroc=placements.estimate(),
        aurc=ranking.aurc_span().around(area),
        excess_aurc=ranking.excess_span().around(area - least),
        curve=risk_curve(tied, wrong),
        augrc=ranking.augrc(),
    )


@dataclass(frozen=True)
class Ranking:
    """The order of correct and wrong images by score, with metrics at this and other error rates.

    The metrics depend on two random quantities: the share of errors p, and the ranks of the errors
    among the correct images. The intervals combine those of both, each with the other fixed.

    Parameters
    ----------
    tied, wrong
        The number of images at each distinct score, and of wrong ones among them, by ascending
        score, shapes (d,).
    placements
        The placements of the correct images among the wrong ones, and vice versa.
    """

    tied: Counts
    wrong: Counts
    placements: Placements

    @cached_property
    def rate(self) -> float:
        """The share of errors."""
        return float(self.wrong.sum() / self.tied.sum())

    @cached_property
    def rates(self) -> Span:
        """The exact interval of that share."""
        return Span(*binomial_interval(int(self.wrong.sum()), int(self.tied.sum())))

    def augrc(self) -> Estimate:
        """Return p²/2 + (1 − A)·p·(1 − p), with A the AUROC of the errors."""
        areas = self.placements.estimate()
        value = _augrc(self.rate, areas.value)
        by_rate = Span(*(_augrc(rate, areas.value) for rate in _ends(self.rates)))
        by_rank = Span(_augrc(self.rate, areas.high), _augrc(self.rate, areas.low))
        return _combined(value, by_rate, by_rank).around(value)

    def aurc_span(self) -> Span:
        """Return the interval of the area under the risk-coverage curve."""
        value, least = self.area(self.rate), least_area(self.rate)
        by_rate = Span(*(self.area(rate) for rate in _ends(self.rates)))
        by_rank = Span(*(least + end for end in _ends(self._excess_at_rate())))
        return _combined(value, by_rate, by_rank)

    def excess_span(self) -> Span:
        """Return the interval of the excess of the area over the optimum."""
        value = self.excess(self.rate)
        ends = [self.excess(rate) for rate in _ends(self.rates)]  # rises first, then falls
        return _combined(value, Span(min(ends), max(ends)), self._excess_at_rate())

    def area(self, rate: float) -> float:
        """Return the AURC of a large sample in this order with a given share of errors.

        An error that is kept from a coverage of g on adds −log g. For images with equal scores,
        that is averaged over the block.
        """
        before, after = self._coverage(rate)
        sums = (after - xlogy(after, after)) - (before - xlogy(before, before))
        used = self.wrong > 0
        logs = sums[used] / (after - before)[used]
        return float(rate * self.wrong[used] @ logs / self.wrong.sum())

    def excess(self, rate: float) -> float:
        """Return the excess of that area over the optimum."""
        return max(self.area(rate) - least_area(rate), 0.0)

    def _coverage(self, rate: float) -> tuple[Floats, Floats]:
        """Return the share of images kept before and with each distinct score."""
        right = self.tied - self.wrong
        share = rate * self.wrong / self.wrong.sum() + (1 - rate) * right / right.sum()
        after = np.cumsum(share)
        return np.concatenate([[0.0], after[:-1]]), after

    def _excess_at_rate(self) -> Span:
        """Return the interval of the excess for a fixed share of errors."""
        own = log_span(self.excess(self.rate), self._influence())
        return self.placements.backed(own, lambda area: modelled_excess(area, self.rate))

    def _influence(self) -> Influence:
        """Return the influence of each correct and each wrong image on the area."""
        before, after = self._coverage(self.rate)
        middle = (before + after) / 2
        # An image that is kept before an error raises the coverage at which the error is kept.
        pull = -self.rate * self.wrong / self.wrong.sum() / middle
        pulls = np.cumsum(pull[::-1])[::-1] - pull / 2
        of_wrong = self.rate * (pulls - np.log(middle))
        right = self.tied - self.wrong
        return Influence(np.repeat((1 - self.rate) * pulls, right), np.repeat(of_wrong, self.wrong))


def _ends(span: Span) -> tuple[float, float]:
    return span.low, span.high


def _augrc(rate: float, area: float) -> float:
    return rate**2 / 2 + (1 - area) * rate * (1 - rate)


def _combined(value: float, *parts: Span) -> Span:
    """Return the interval of a value from the intervals of its independent causes of variation."""
    below = np.array([value - part.holding(value).low for part in parts])
    above = np.array([part.holding(value).high - value for part in parts])
    return combined(value, below, above)


def least_area(rate: float) -> float:
    """Return the optimal AURC of a large sample with a share of errors: all errors rank last.

    It is p + (1 − p)·log(1 − p) (Geifman, Uziel and El-Yaniv 2019, section 3).
    """
    return float(rate + xlogy(1 - rate, 1 - rate))


def modelled_excess(area: Span, rate: float) -> Span:
    """Return the interval of the E-AURC of `exponential_curves` for an interval of the area.

    Parameters
    ----------
    area
        The interval of the AUROC of the errors.
    rate
        The share of errors.
    """

    def areas(false: Floats) -> float:
        kept = rate * (1 - RATES) + (1 - rate) * (1 - false)
        return float(rate * -np.log(kept).mean())

    low, high = (
        [areas(false) - areas(np.zeros_like(RATES)) for false in exponential_curves(end)]
        for end in (area.high, area.low)
    )
    return Span(min(low), max(high))


def _count(places: Counts, correct: npt.NDArray[np.bool_]) -> tuple[Counts, Counts]:
    """Return the number of images at each distinct score, and of wrong ones among them."""
    tied = np.bincount(places)
    wrong = np.bincount(places[~correct], minlength=len(tied))
    return tied[tied > 0], wrong[tied > 0]


def aurc(tied: Counts, wrong: Counts) -> float:
    """Return the area under the risk-coverage curve.

    Consider m images with equal scores and e errors, ranked after k images with E errors. The first
    j of them contain e·j/m errors on average. Their risks (E + e·j/m)/(k + j), j from 1 to m, sum
    to e + (E − k·e/m)·(H(k + m) − H(k)) with the harmonic numbers H.

    Parameters
    ----------
    tied, wrong
        The number of images at each distinct score, and of wrong ones among them, by ascending
        score, shapes (d,); no count in `tied` is 0.

    Examples
    --------
    >>> aurc(np.array([1, 1]), np.array([0, 1]))  # risks 0 and 1/2
    0.25
    """
    kept, errors = np.cumsum(tied), np.cumsum(wrong)
    n = kept[-1]
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
    before = kept - tied
    rate = wrong / tied
    sums = wrong + (errors - wrong - before * rate) * (harmonic[kept] - harmonic[before])
    return float(sums.sum() / n)


def least_aurc(tied: Counts, wrong: Counts) -> float:
    """Return the area of a score that ranks every error last; the parameters are those of `aurc`.

    Examples
    --------
    >>> least_aurc(np.array([1, 1]), np.array([1, 0]))
    0.25
    """
    n, errors = int(tied.sum()), int(wrong.sum())
    parts = np.array([n - errors, errors])
    return aurc(parts[parts > 0], np.array([0, errors])[parts > 0])


def risk_curve(tied: Counts, wrong: Counts) -> list[Risk]:
    """Return the risk when k images are kept, for at most 101 evenly spread k from 1 to n.

    The parameters are those of `aurc`.

    Examples
    --------
    >>> [(point.kept, point.risk) for point in risk_curve(np.array([1, 1]), np.array([0, 1]))]
    [(0.5, 0.0), (1.0, 0.5)]
    """
    kept, errors = np.cumsum(tied), np.cumsum(wrong)
    n = int(kept[-1])
    ks = np.unique(np.linspace(1, n, min(n, CURVE_POINTS)).round())
    among = np.interp(ks, np.concatenate([[0], kept]), np.concatenate([[0], errors]))
    return [Risk(float(k / n), float(e / k)) for k, e in zip(ks, among, strict=True)]
