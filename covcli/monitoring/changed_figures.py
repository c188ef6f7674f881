"""The differences between two evaluations: figures before and after, with intervals.

If both evaluations scored the same images, every draw of the bootstrap takes the same images in
both (paired): variation that the images have in common cancels in the difference. Otherwise each
is drawn independently. The draws of a figure near 0 or 1 vary too little. So the interval is
extended to contain the one that is combined from the intervals of the two figures, with the
correlation of their draws (Zou and Donner, "Construction of confidence limits about effect
measures", 2008; Zou, "Toward using confidence intervals to compare correlations", 2007). Without
the scores of single images, it is that one, without correlation. If both gave each image the very
same score, nothing has changed, and the difference is exactly 0.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from covcli.evaluation.config import LOWER_IS_BETTER
from covcli.reporting.documents import Estimate, EvaluationResult
from covcli.reporting.per_image import ImageScores
from covcli.signature.guarantee import binomial_interval

DRAWS = 1000
TRUSTED = "trusted"
# The figures of an untrusted set, and their keys in an evaluation.
SHOWN = (
    ("auroc", "coverage", "auroc"), ("fpr95", "coverage", "fpr95"),
    ("detection_rate", "coverage", "detection_rate"), ("softmax_auroc", "softmax", "auroc"),
)  # fmt: skip
IntervalBy: TypeAlias = Literal["paired bootstrap", "bootstrap", "both intervals", "equal scores"]
Floats: TypeAlias = npt.NDArray[np.float64]
Scores: TypeAlias = Mapping[str, ImageScores]


@dataclass(frozen=True)
class EvaluatedRelease:
    """An evaluation: its name, its figures, and its scores of single images if available."""

    name: str
    result: EvaluationResult
    scores: Scores | None


@dataclass(frozen=True)
class FigureChange:
    """A figure of two evaluations.

    Attributes
    ----------
    set
        The untrusted set; for figures of the trusted sets their name, or both names.
    figure
        "accuracy", "false_alarm_rate", "auroc", "fpr95", "detection_rate" or "softmax_auroc".
    before, after
        The figures.
    difference, low, high
        After minus before, with a 95% interval.
    how
        How the interval was computed.

    Examples
    --------
    >>> FigureChange("mnist", "fpr95", 0.1, 0.12, 0.02, -0.01, 0.05, "bootstrap").worse_by
    0.02
    """

    set: str
    figure: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    how: IntervalBy

    @property
    def worse_by(self) -> float:
        """By how much the figure became worse; negative if it became better."""
        return self.difference if self.figure in LOWER_IS_BETTER else -self.difference


@dataclass(frozen=True)
class EvaluationChange:
    """The differences between two evaluations.

    Attributes
    ----------
    figures
        The figures of the trusted set and of each common untrusted set.
    only_before, only_after
        Untrusted sets of one evaluation only.

    Examples
    --------
    >>> from covcli import compare
    >>> evaluation = "runs/latest/evaluation.json"
    >>> change = compare(evaluation, evaluation).evaluations
    >>> [(f.set, f.difference) for f in change.figures if f.figure == "auroc"], change.only_after
    ([('photos?limit=100', 0.0)], [])
    """

    figures: list[FigureChange]
    only_before: list[str]
    only_after: list[str]


def compare_evaluations(
    before: EvaluatedRelease, after: EvaluatedRelease, seed: int = 0
) -> EvaluationChange:
    """Compare the figures of two evaluations.

    Parameters
    ----------
    before, after
        The evaluations.
    seed
        Seed of the bootstrap.
    """
    first, second = before.result, after.result
    theirs = {entry.name: entry for entry in second.untrusted}
    shared = [entry.name for entry in first.untrusted if entry.name in theirs]
    figures = _trusted_figures(before, after, seed)
    for name in shared:
        figures += _set_figures(before, after, name, seed)
    return EvaluationChange(
        figures=figures,
        only_before=[entry.name for entry in first.untrusted if entry.name not in theirs],
        only_after=[name for name in theirs if name not in shared],
    )


# One set


def _trusted_figures(
    before: EvaluatedRelease, after: EvaluatedRelease, seed: int
) -> list[FigureChange]:
    names = dict.fromkeys(each.result.trusted.name for each in (before, after))
    name = " → ".join(names)
    estimates = [
        {
            "accuracy": _share(r.trusted.accuracy, r.trusted.images),
            "false_alarm_rate": Estimate(
                r.trusted.false_alarm_rate.value, r.trusted.false_alarm_rate.low,
                r.trusted.false_alarm_rate.high,
            ),
        }
        for r in (before.result, after.result)
    ]  # fmt: skip
    draw = _Draws.of(before, after, TRUSTED, seed)
    spreads: dict[str, _Spread] = {}
    if draw is not None:
        spreads["accuracy"] = draw.of_shares(_correct, "softmax")
        spreads["false_alarm_rate"] = draw.of_shares(_flagged, "coverage")
    return [
        _change(name, figure, (estimates[0][figure], estimates[1][figure]), spreads.get(figure))
        for figure in estimates[0]
    ]


def _set_figures(
    before: EvaluatedRelease, after: EvaluatedRelease, name: str, seed: int
) -> list[FigureChange]:
    entries = [next(e for e in m.result.untrusted if e.name == name) for m in (before, after)]
    draw = _Draws.of(before, after, name, seed)
    spreads: dict[str, _Spread] = {}
    if draw is not None:
        trusted = _Draws.of(before, after, TRUSTED, seed)
        assert trusted is not None
        if trusted.how != draw.how:
            draw = replace(draw, how="bootstrap")
            trusted = replace(trusted, how="bootstrap")
        ours, softmax = (draw.of_curves(trusted, score) for score in ("coverage", "softmax"))
        spreads = {**ours, "softmax_auroc": softmax["auroc"],
                   "detection_rate": draw.of_shares(_flagged, "coverage")}  # fmt: skip
    changes = []
    for figure, score, key in SHOWN:
        one, two = (getattr(entry.scores[score], key) for entry in entries)
        if one is not None and two is not None:
            changes.append(_change(name, figure, (one, two), spreads.get(figure)))
    return changes


@dataclass(frozen=True)
class _Spread:
    """A figure before and after in every draw, shapes (DRAWS,), and how the images were drawn."""

    before: Floats
    after: Floats
    how: IntervalBy

    @property
    def differences(self) -> Floats:
        """After minus before, shape (DRAWS,)."""
        return self.after - self.before

    @property
    def correlation(self) -> float:
        """The correlation of the two; 0 if one does not vary."""
        deviations = self.before.std() * self.after.std()
        if deviations == 0 or self.how != "paired bootstrap":
            return 0.0
        return float(np.cov(self.before, self.after, bias=True)[0, 1] / deviations)


def _change(
    name: str, figure: str, estimates: tuple[Estimate, Estimate], spread: _Spread | None
) -> FigureChange:
    before, after = estimates
    difference = after.value - before.value
    how: IntervalBy
    if spread is not None and spread.how == "equal scores":
        low, high, how = difference, difference, spread.how
    elif spread is None or float(spread.differences.std()) == 0:
        # Draws without variation, such as those of two perfect scores, give no interval.
        low, high = both_intervals(before, after)
        how = "both intervals"
    else:
        drawn = np.quantile(spread.differences, [0.025, 0.975]).tolist()
        combined = both_intervals(before, after, spread.correlation)
        low, high, how = min(drawn[0], combined[0]), max(drawn[1], combined[1]), spread.how
    return FigureChange(
        name, figure, before.value, after.value, difference, min(low, difference),
        max(high, difference), how,
    )  # fmt: skip


def both_intervals(
    before: Estimate, after: Estimate, correlation: float = 0.0
) -> tuple[float, float]:
    """Return the interval of a difference of two figures, from their intervals.

    The squares of the distances to the ends are added, less twice their product times the
    correlation (Zou and Donner, 2008, equations 4 and 5; Zou, 2007, equation 15).

    Parameters
    ----------
    before, after
        The figures with their 95% intervals.
    correlation
        The correlation of the two figures, in [-1, 1].

    Examples
    --------
    >>> both_intervals(Estimate(0.5, 0.4, 0.6), Estimate(0.8, 0.8, 0.8))
    (0.2, 0.4)
    """
    difference = after.value - before.value
    pairs = (
        (after.value - after.low, before.high - before.value),
        (after.high - after.value, before.value - before.low),
    )
    below, above = (math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b)) for a, b in pairs)
    return round(difference - below, 12), round(difference + above, 12)


def _share(value: float, images: int) -> Estimate:
    low, high = binomial_interval(round(value * images), images)
    return Estimate(value, low, high)


def _correct(scores: ImageScores) -> Floats:
    assert scores.label is not None
    right: Floats = (scores.label == scores.predicted).astype(np.float64)
    return right


def _flagged(scores: ImageScores) -> Floats:
    flagged: Floats = scores.untrusted.astype(np.float64)
    return flagged


# The bootstrap


@dataclass(frozen=True)
class _Draws:
    """Images of a set in two evaluations, and how often each is drawn.

    Attributes
    ----------
    name
        The set's name.
    before, after
        The scores of each evaluation.
    rows
        The rows that are drawn from, int64 of shapes (n,) and (m,). If `how` is paired, they are
        rows of the same images in the same order.
    how
        Whether the draws are paired.
    seed
        Seed of the draws.
    """

    name: str
    before: ImageScores
    after: ImageScores
    rows: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    how: IntervalBy
    seed: int

    @classmethod
    def of(
        cls, before: EvaluatedRelease, after: EvaluatedRelease, name: str, seed: int
    ) -> "_Draws | None":
        """Match the images of a set; return None if a file of scores is missing."""
        if before.scores is None or after.scores is None:
            return None
        one, two = before.scores.get(name), after.scores.get(name)
        if one is None or two is None:
            return None
        every = np.arange(len(one.predicted)), np.arange(len(two.predicted))
        if _fingerprint(before, name) == _fingerprint(after, name) and len(every[0]) == len(
            every[1]
        ):
            return cls(name, one, two, every, "paired bootstrap", seed)
        matched = _by_file(one, two)
        if matched is not None:
            return cls(name, one, two, matched, "paired bootstrap", seed)
        return cls(name, one, two, every, "bootstrap", seed)

    def counts(self, which: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield how often each row is drawn, DRAWS times, int64 of shape (n,)."""
        size, paired = len(self.rows[which]), self.how == "paired bootstrap"
        stream = [self.seed, zlib.crc32(self.name.encode()), 0 if paired else which]
        generator = np.random.default_rng(stream)
        for _ in range(DRAWS):
            yield np.bincount(generator.integers(0, size, size), minlength=size)

    def of_shares(self, look: Callable[[ImageScores], Floats], score: str) -> _Spread:
        """Return the differences of the mean of `look`, which depends on a score."""
        first, second = (
            look(scores)[rows]
            for scores, rows in zip((self.before, self.after), self.rows, strict=True)
        )
        before, after = (
            np.array([counts @ values / len(values) for counts in self.counts(which)])
            for which, values in enumerate((first, second))
        )
        equal = self.equal(score) and np.array_equal(first, second)
        return _Spread(before, after, "equal scores" if equal else self.how)

    def of_curves(self, trusted: "_Draws", score: str) -> dict[str, _Spread]:
        """Return the differences of AUROC and FPR95 by name."""
        figures = []
        for which in (0, 1):
            curve = Weighted(trusted.of_images(score)[which], self.of_images(score)[which])
            draws = zip(trusted.counts(which), self.counts(which), strict=True)
            figures.append([curve.figures(*counts) for counts in draws])
        how: IntervalBy = self.how
        if self.equal(score) and trusted.equal(score):
            how = "equal scores"
        before, after = (np.array(drawn) for drawn in figures)
        return {
            name: _Spread(before[:, column], after[:, column], how)
            for column, name in enumerate(("auroc", "fpr95"))
        }

    def of_images(self, score: str) -> tuple[Floats, Floats]:
        """Return a score of each image before and after, shapes (n,) and (m,)."""
        before, after = (each.scores[score] for each in (self.before, self.after))
        return before[self.rows[0]], after[self.rows[1]]

    def equal(self, score: str) -> bool:
        """Return whether the images are the same ones, and each has the very same score."""
        return self.how == "paired bootstrap" and np.array_equal(*self.of_images(score))


def _fingerprint(measured: EvaluatedRelease, name: str) -> str:
    result = measured.result
    if name == TRUSTED:
        return result.trusted.fingerprint
    return next(entry.fingerprint for entry in result.untrusted if entry.name == name)


def _by_file(
    one: ImageScores, two: ImageScores
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """Match images by their files, if every file of either is in the other, each once."""
    if one.file is None or two.file is None:
        return None
    first, second = one.file.tolist(), two.file.tolist()
    places = {name: row for row, name in enumerate(second)}
    if set(first) != set(second) or len(places) < len(second) or len(first) != len(second):
        return None
    return np.arange(len(first)), np.array([places[name] for name in first])


class Weighted:
    """The ROC curve of two samples of scores, in which images have weights.

    Parameters
    ----------
    trusted, untrusted
        Scores, shapes (n,) and (m,).
    """

    def __init__(self, trusted: Floats, untrusted: Floats) -> None:
        values, places = np.unique(np.concatenate([trusted, untrusted]), return_inverse=True)
        self._distinct = len(values)
        self._places = places[: len(trusted)], places[len(trusted) :]

    def figures(
        self, trusted: npt.NDArray[np.int64], untrusted: npt.NDArray[np.int64]
    ) -> tuple[float, float]:
        """Return AUROC and FPR95 for these counts of each image.

        AUROC is the chance that an untrusted image scores higher; ties count half. FPR95 is the
        share of trusted images at or above the score that 95% of the untrusted ones reach.
        """
        negatives, positives = (
            np.bincount(places, counts, self._distinct)
            for places, counts in zip(self._places, (trusted, untrusted), strict=True)
        )
        below = np.cumsum(negatives)
        area = positives @ (below - negatives / 2) / (positives.sum() * negatives.sum())
        caught = np.cumsum(positives[::-1])
        place = int(np.searchsorted(caught, 0.95 * caught[-1] * (1 - 1e-12)))
        return float(area), float(np.cumsum(negatives[::-1])[place] / negatives.sum())
