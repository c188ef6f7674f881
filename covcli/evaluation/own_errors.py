"""The network's own errors: how well a score finds them, and what rejecting images pays.

Selective prediction: the images that a score trusts least are rejected first, and the selective
risk is the share of errors among those kept (Geifman and El-Yaniv, "Selective Classification for
Deep Neural Networks", NeurIPS 2017). AURC and its excess over the best possible are those of
Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers",
ICLR 2019.

Images with equal scores have no order. Every figure is the mean over all orders of such images,
which has a closed form, so that it does not depend on the order in which they come.
"""

import numpy as np
import numpy.typing as npt

from covcli.evaluation import metrics
from covcli.evaluation.metrics import BOOTSTRAP_SAMPLES, Floats
from covcli.reporting.documents import OwnErrors, Risk

Counts = npt.NDArray[np.int64]
CURVE_POINTS = 101


def own_errors(
    scores: dict[str, Floats],
    correct: npt.NDArray[np.bool_],
    seed: int = 0,
    samples: int = BOOTSTRAP_SAMPLES,
) -> dict[str, OwnErrors] | None:
    """Measure how well scores find a network's own errors, with 95% bootstrap intervals.

    Parameters
    ----------
    scores
        By name, each of shape (n,), finite; larger means less trusted.
    correct
        Which images are classified correctly, shape (n,).
    seed
        Of the bootstrap.
    samples
        How many bootstrap samples to draw.

    Returns
    -------
    dict or None
        By name; None where the network makes no error, or nothing but errors.
    """
    if correct.all() or not correct.any():
        return None
    return {name: _own_errors(values, correct, seed, samples) for name, values in scores.items()}


def _own_errors(
    scores: Floats, correct: npt.NDArray[np.bool_], seed: int, samples: int
) -> OwnErrors:
    _, places = np.unique(scores, return_inverse=True)
    generator = np.random.default_rng(seed)
    drawn = [
        _areas(places[rows], correct[rows])
        for rows in (generator.integers(0, len(scores), len(scores)) for _ in range(samples))
    ]
    area, excess = _areas(places, correct)
    areas, excesses = np.array(drawn).T
    return OwnErrors(
        wrong=int((~correct).sum()),
        auroc=metrics.auroc(scores[correct], scores[~correct], seed, samples),
        aurc=metrics.estimate(area, areas),
        excess_aurc=metrics.estimate(excess, excesses),
        curve=risk_curve(*_count(places, correct)),
    )


def _areas(places: Counts, correct: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return AURC and E-AURC."""
    tied, wrong = _count(places, correct)
    area = aurc(tied, wrong)
    return area, area - least_aurc(tied, wrong)


def _count(places: Counts, correct: npt.NDArray[np.bool_]) -> tuple[Counts, Counts]:
    """Return how many images have each distinct score, and how many of them are wrong."""
    tied = np.bincount(places)
    wrong = np.bincount(places[~correct], minlength=len(tied))
    return tied[tied > 0], wrong[tied > 0]


def aurc(tied: Counts, wrong: Counts) -> float:
    """Return the area under the risk-coverage curve.

    Of a tie of m images with e errors, after k images with E errors, the first j hold e·j/m errors
    on average. Their risks (E + e·j/m)/(k + j), j from 1 to m, sum to
    e + (E − k·e/m)·(H(k + m) − H(k)) with the harmonic numbers H.

    Parameters
    ----------
    tied, wrong
        How many images have each distinct score, and how many of them are wrong, by ascending
        score, shapes (d,); no count in `tied` is 0.
    """
    kept, errors = np.cumsum(tied), np.cumsum(wrong)
    n = kept[-1]
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
    before = kept - tied
    rate = wrong / tied
    sums = wrong + (errors - wrong - before * rate) * (harmonic[kept] - harmonic[before])
    return float(sums.sum() / n)


def least_aurc(tied: Counts, wrong: Counts) -> float:
    """Return the area of a score that ranks every error last; parameters as in `aurc`."""
    n, errors = int(tied.sum()), int(wrong.sum())
    parts = np.array([n - errors, errors])
    return aurc(parts[parts > 0], np.array([0, errors])[parts > 0])


def risk_curve(tied: Counts, wrong: Counts) -> list[Risk]:
    """Return the risk when k images are kept, for at most 101 evenly spread k from 1 to n.

    The parameters are those of `aurc`.
    """
    kept, errors = np.cumsum(tied), np.cumsum(wrong)
    n = int(kept[-1])
    ks = np.unique(np.linspace(1, n, min(n, CURVE_POINTS)).round())
    among = np.interp(ks, np.concatenate([[0], kept]), np.concatenate([[0], errors]))
    return [Risk(float(k / n), float(e / k)) for k, e in zip(ks, among, strict=True)]
