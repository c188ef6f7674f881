"""How well a score tells trusted from untrusted, and a confidence right from wrong.

Untrusted is the positive class, and a larger score means less trusted. The curves are computed
here rather than by scikit-learn because a thousand bootstrap samples of them are needed: the
scores are sorted once, and a sample is a vector of counts. The tests hold them to scikit-learn.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from covcli.reporting.documents import Bin, Detection, Estimate, Kept, MeanDetection

Floats = npt.NDArray[np.float64]
BOOTSTRAP_SAMPLES = 1000
BIN_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Curves:
    """The curves of two samples of scores, from counts at their distinct values.

    Parameters
    ----------
    trusted, untrusted
        Scores, shapes (n,) and (m,), finite, not empty.
    """

    def __init__(self, trusted: Floats, untrusted: Floats) -> None:
        values = np.unique(np.concatenate([trusted, untrusted]))[::-1]  # descending
        self._places = [
            len(values) - 1 - np.searchsorted(values[::-1], scores)
            for scores in (trusted, untrusted)
        ]
        self._distinct = len(values)
        self.negatives, self.positives = (
            np.bincount(places, minlength=self._distinct) for places in self._places
        )

    def resample(self, generator: np.random.Generator) -> "Curves":
        """Draw as many scores again from each sample, with replacement."""
        again = object.__new__(Curves)
        again._places, again._distinct = self._places, self._distinct
        drawn = [places[generator.integers(0, len(places), len(places))] for places in self._places]
        again.negatives, again.positives = (
            np.bincount(places, minlength=self._distinct) for places in drawn
        )
        return again

    def roc(self) -> tuple[Floats, Floats]:
        """Return false and true positive rates at descending thresholds, from (0, 0) on."""
        false = np.concatenate([[0], np.cumsum(self.negatives)])
        true = np.concatenate([[0], np.cumsum(self.positives)])
        return false / false[-1], true / true[-1]

    def auroc(self) -> float:
        """Return the area under the ROC curve, by trapezoids."""
        false, true = self.roc()
        return float(np.trapezoid(true, false))

    def aupr_out(self) -> float:
        """Return the average precision Σ (recall step)·precision of the untrusted."""
        return _average_precision(self.positives, self.negatives)

    def aupr_in(self) -> float:
        """Return the average precision of the trusted, ranked by ascending score."""
        return _average_precision(self.negatives[::-1], self.positives[::-1])

    def fpr95(self) -> float:
        """Return the false positive rate at the first threshold that catches 95%."""
        false, true = self.roc()
        return float(false[np.argmax(true >= 0.95)])


def _average_precision(hits: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> float:
    caught = np.cumsum(hits)
    flagged = caught + np.cumsum(others)
    used = hits > 0
    return float((hits[used] * caught[used] / flagged[used]).sum() / caught[-1])


def detection(
    trusted: Floats,
    untrusted: Floats,
    flagged: npt.NDArray[np.bool_] | None,
    seed: int = 0,
    samples: int = BOOTSTRAP_SAMPLES,
) -> Detection:
    """Measure how well a score separates, each figure with a 95% bootstrap interval.

    The interval speaks of the draw of the tested images; network, signature and calibration are
    taken as they are.

    Parameters
    ----------
    trusted, untrusted
        Scores, shapes (n,) and (m,); larger means less trusted.
    flagged
        Which untrusted inputs the calibrated thresholds flag, shape (m,), or None.
    seed
        Of the bootstrap.
    samples
        How many bootstrap samples to draw.
    """
    whole = Curves(trusted, untrusted)
    figures: dict[str, Callable[[Curves], float]] = {
        "auroc": Curves.auroc,
        "aupr_out": Curves.aupr_out,
        "aupr_in": Curves.aupr_in,
        "fpr95": Curves.fpr95,
    }
    estimates = _bootstrap(whole, figures, seed, samples)
    return Detection(
        auroc=estimates["auroc"],
        aupr_out=estimates["aupr_out"],
        aupr_in=estimates["aupr_in"],
        fpr95=estimates["fpr95"],
        detection_rate=None if flagged is None else share(flagged, seed, samples),
    )


def auroc(
    trusted: Floats, untrusted: Floats, seed: int = 0, samples: int = BOOTSTRAP_SAMPLES
) -> Estimate:
    """Return the area under the ROC curve alone; parameters as in `detection`."""
    whole = Curves(trusted, untrusted)
    return _bootstrap(whole, {"auroc": Curves.auroc}, seed, samples)["auroc"]


def _bootstrap(
    whole: Curves, figures: dict[str, Callable[[Curves], float]], seed: int, samples: int
) -> dict[str, Estimate]:
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(samples):
        sample = whole.resample(generator)
        for name, figure in figures.items():
            drawn[name].append(figure(sample))
    return {
        name: estimate(figure(whole), np.array(drawn[name])) for name, figure in figures.items()
    }


def mean_detection(
    score: str,
    trusted: Floats,
    untrusted: Sequence[Floats],
    seed: int = 0,
    samples: int = BOOTSTRAP_SAMPLES,
) -> MeanDetection:
    """Average AUROC and FPR95 over untrusted sets, each with a 95% bootstrap interval.

    A bootstrap sample draws the trusted images once for all sets, since all are held against the
    same ones.

    Parameters
    ----------
    score
        The score's name.
    trusted
        Scores of shape (n,).
    untrusted
        The sets' scores, each of shape (m,).
    seed
        Of the bootstrap.
    samples
        How many bootstrap samples to draw.
    """
    figures = np.zeros((2, samples + 1))
    for scores in untrusted:
        whole = Curves(trusted, scores)
        figures[:, 0] += whole.auroc(), whole.fpr95()
        for i in range(samples):
            # Its first draw is that of the trusted images: the same for every set.
            drawn = whole.resample(np.random.default_rng([seed, i]))
            figures[:, 1 + i] += drawn.auroc(), drawn.fpr95()
    auroc, fpr95 = figures / len(untrusted)
    return MeanDetection(
        score, estimate(float(auroc[0]), auroc[1:]), estimate(float(fpr95[0]), fpr95[1:])
    )


def share(
    flags: npt.NDArray[np.bool_], seed: int = 0, samples: int = BOOTSTRAP_SAMPLES
) -> Estimate:
    """Return the share of true values, with a 95% bootstrap interval."""
    value = float(flags.mean())
    drawn = np.random.default_rng(seed).binomial(len(flags), value, samples) / len(flags)
    return estimate(value, drawn)


def estimate(value: float, drawn: Floats) -> Estimate:
    """Return a value with the interval between its bootstrap samples' 2.5% and 97.5% quantiles."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def confidence_bins(name: str, confidence: Floats, correct: npt.NDArray[np.bool_]) -> list[Bin]:
    """Return the accuracy by bin of confidence; edges 0, 0.2, 0.4, 0.6, 0.8, 0.9 and 1.

    Parameters
    ----------
    name
        Which confidence it is, for the entries.
    confidence
        Shape (n,), in [0, 1].
    correct
        Which images are classified correctly, shape (n,).
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
    """Return how many images a threshold keeps, and how accurate the network is on those.

    The parameters are those of `confidence_bins`.
    """
    kept = [(threshold, confidence >= threshold) for threshold in THRESHOLDS]
    return [Kept(name, t, float(mask.mean()), _mean(correct[mask])) for t, mask in kept]


def _mean(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None
