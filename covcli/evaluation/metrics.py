"""Metrics: how well a score separates untrusted from trusted, and the accuracy by confidence.

Untrusted is the positive class, and a larger score means less trusted. The curves are computed
here, not by scikit-learn, because the intervals need the influence of each image. The tests compare
them with scikit-learn.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from covcli.evaluation.intervals import (
    RATES,
    Floats,
    Fpr95,
    Influence,
    Placements,
    Span,
    exponential_curves,
    logit_span,
    mean_area,
    mean_fpr95,
)
from covcli.reporting.documents import Bin, Detection, Estimate, Kept, MeanDetection
from covcli.signature.guarantee import binomial_interval

Counts = npt.NDArray[np.int64]
BIN_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Curves:
    """The curves of two samples of scores, from counts at their distinct values.

    Parameters
    ----------
    trusted, untrusted
        Scores, shapes (n,) and (m,), finite, not empty.

    Examples
    --------
    >>> curves = Curves(np.arange(100.0), np.arange(50.0, 150.0))
    >>> curves.auroc(), curves.fpr95()
    (0.875, 0.45)
    """

    def __init__(self, trusted: Floats, untrusted: Floats) -> None:
        self._scores = (trusted, untrusted)
        values = np.unique(np.concatenate(self._scores))[::-1]  # descending
        self._places = [
            len(values) - 1 - np.searchsorted(values[::-1], scores) for scores in self._scores
        ]
        self.negatives, self.positives = (
            np.bincount(places, minlength=len(values)) for places in self._places
        )

    def placements(self) -> Placements:
        """Return the rank of each image among those of the other kind."""
        n, m = (len(scores) for scores in self._scores)
        above = (np.cumsum(self.positives) - self.positives / 2) / m
        below = 1 - (np.cumsum(self.negatives) - self.negatives / 2) / n
        return Placements(above[self._places[0]], below[self._places[1]])

    def auroc(self) -> float:
        """Return the area under the ROC curve."""
        return self.placements().area

    def aupr_out(self) -> float:
        """Return the average precision Σ (recall step)·precision of the untrusted images."""
        return average_precision(self.positives, self.negatives)[0]

    def aupr_in(self) -> float:
        """Return the average precision of the trusted images, ranked by ascending score."""
        return average_precision(self.negatives[::-1], self.positives[::-1])[0]

    def fpr95(self) -> float:
        """Return the false positive rate at the first threshold that catches 95%."""
        return Fpr95.of(*self._scores).value

    def detection(self) -> Detection:
        """Return all four metrics with their intervals, without a detection rate."""
        placements = self.placements()
        out = (self.positives, self.negatives)
        inwards = (self.negatives[::-1], self.positives[::-1])
        return Detection(
            auroc=placements.estimate(),
            aupr_out=_estimate_precision(*out, placements),
            aupr_in=_estimate_precision(*inwards, placements),
            fpr95=Fpr95.of(*self._scores).estimate(),
            detection_rate=None,
        )


def average_precision(hits: Counts, others: Counts) -> tuple[float, Influence]:
    """Return the average precision Σ (recall step)·precision, and each image's influence on it.

    The influence of a positive image is the precision at its own rank, plus its effect on the
    precision at the positives that do not rank higher. The influence of a negative image is only
    that effect.

    Parameters
    ----------
    hits, others
        The numbers of positive and of negative images at each distinct value, in the order of the
        ranking, int64 of shape (d,).
    """
    m, n = int(hits.sum()), int(others.sum())
    share = m / (m + n)
    recall, fallout = np.cumsum(hits) / m, np.cumsum(others) / n
    listed = share * recall + (1 - share) * fallout
    precision = share * recall / listed
    slope = hits / m * share * (1 - share) / listed**2
    by_hit, by_other = (
        np.cumsum((slope * rate)[::-1])[::-1] * sign for rate, sign in ((fallout, 1), (recall, -1))
    )
    influence = Influence(np.repeat(precision + by_hit, hits), np.repeat(by_other, others))
    return float(hits @ precision / m), influence


def _estimate_precision(hits: Counts, others: Counts, placements: Placements) -> Estimate:
    value, influence = average_precision(hits, others)
    share = float(hits.sum() / (hits.sum() + others.sum()))
    own = logit_span(value, influence)
    return placements.backed(own, lambda area: modelled_precision(area, share)).around(value)


def modelled_precision(area: Span, share: float) -> Span:
    """Return the interval of average precision of `exponential_curves` for an interval of the area.

    Parameters
    ----------
    area
        The interval of the area under the ROC curve.
    share
        The share of positive images.
    """
    low, high = (
        [float((share * RATES / (share * RATES + (1 - share) * false)).mean())
         for false in exponential_curves(end)]
        for end in (area.low, area.high)
    )  # fmt: skip
    return Span(min(low), max(high))


def detection(
    trusted: Floats, untrusted: Floats, flagged: npt.NDArray[np.bool_] | None
) -> Detection:
    """Measure how well a score separates untrusted images, with 95% intervals.

    The intervals refer to the draw of the tested images; network, signature and calibration are
    fixed. The module `intervals` describes them, and `benchmarks/intervals.py` simulates their
    coverage.

    Parameters
    ----------
    trusted, untrusted
        Scores, shapes (n,) and (m,); larger means less trusted.
    flagged
        Which untrusted images are flagged, bool of shape (m,), or None.

    Examples
    --------
    >>> import numpy as np
    >>> figures = detection(np.arange(50.0), np.arange(60.0, 110.0), None)
    >>> figures.auroc.value, round(figures.auroc.low, 3)
    (1.0, 0.96)
    """
    figures = Curves(trusted, untrusted).detection()
    return figures if flagged is None else replace(figures, detection_rate=share(flagged))


def auroc(trusted: Floats, untrusted: Floats) -> Estimate:
    """Return only the area under the ROC curve; the parameters are those of `detection`.

    Examples
    --------
    >>> auroc(np.array([0.1, 0.2, 0.3]), np.array([0.25, 0.4])).value
    0.8333333333333334
    """
    return Curves(trusted, untrusted).placements().estimate()


def mean_detection(score: str, trusted: Floats, untrusted: Sequence[Floats]) -> MeanDetection:
    """Average AUROC and FPR95 over untrusted sets, each with a 95% interval.

    All sets are compared with the same trusted images, which the intervals take into account.

    Parameters
    ----------
    score
        The score's name.
    trusted
        Scores of shape (n,).
    untrusted
        The scores of each set, of shape (m,).

    Examples
    --------
    >>> mean = mean_detection("x", np.arange(9.0), [np.arange(5.0) + 9, np.arange(5.0) + 4])
    >>> round(mean.auroc.value, 3)
    0.861
    """
    areas = [Curves(trusted, scores).placements() for scores in untrusted]
    rates = [Fpr95.of(trusted, scores) for scores in untrusted]
    return MeanDetection(score, mean_area(areas), mean_fpr95(rates))


def share(flags: npt.NDArray[np.bool_]) -> Estimate:
    """Return the share of true values, with its exact binomial 95% interval.

    Examples
    --------
    >>> import numpy as np
    >>> rate = share(np.zeros(360, bool))
    >>> rate.value, rate.low, round(rate.high, 4)
    (0.0, 0.0, 0.0102)
    """
    low, high = binomial_interval(int(flags.sum()), len(flags))
    return Estimate(float(flags.mean()), low, high)


def confidence_bins(name: str, confidence: Floats, correct: npt.NDArray[np.bool_]) -> list[Bin]:
    """Return the accuracy by bin of confidence; edges 0, 0.2, 0.4, 0.6, 0.8, 0.9 and 1.

    Parameters
    ----------
    name
        The name of the confidence, for the entries.
    confidence
        Shape (n,), in [0, 1].
    correct
        Which images are classified correctly, bool of shape (n,).

    Examples
    --------
    >>> bins = confidence_bins("x", np.array([0.1, 0.95]), np.array([False, True]))
    >>> [(b.low, b.images, b.accuracy) for b in bins if b.images]
    [(0.0, 1, 0.0), (0.9, 1, 1.0)]
    """
    inner = len(BIN_EDGES) - 2
    places = np.clip(np.searchsorted(BIN_EDGES, confidence, side="right") - 1, 0, inner)
    return [
        Bin(name, low, high, int((places == i).sum()), _mean(correct[places == i]))
        for i, (low, high) in enumerate(pairwise(BIN_EDGES))
    ]


def confidence_thresholds(
    name: str, confidence: Floats, correct: npt.NDArray[np.bool_]
) -> list[Kept]:
    """Return the share of images above each confidence threshold, and the accuracy on them.

    The parameters are those of `confidence_bins`.

    Examples
    --------
    >>> kept = confidence_thresholds("x", np.array([0.4, 0.95]), np.array([False, True]))
    >>> [(k.threshold, k.kept, k.accuracy) for k in kept][:2]
    [(0.0, 1.0, 0.5), (0.5, 0.5, 1.0)]
    """
    kept = [(threshold, confidence >= threshold) for threshold in THRESHOLDS]
    return [Kept(name, t, float(mask.mean()), _mean(correct[mask])) for t, mask in kept]


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None
