"""Calibration: the combination of evidence to a score, and the scores of trusted images.

Calibration uses trusted images that trained neither the network nor the signature. One in four of
them, drawn at random, fits the combination of the evidence. The others rank new scores. So a new
image and the ranking images are scored by a rule that was fitted on neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.core.placement import placed
from covcli.methods.logits import doubt
from covcli.signature.combination import Arrangement, Combination, fit_combination, plain_mean
from covcli.signature.error_bound import doubt_threshold, least_answers
from covcli.signature.guarantee import (
    CONFIDENCE,
    DEFAULT_GUARANTEE,
    Guarantee,
    Rule,
    make_rule,
)
from covcli.signature.ties import Ties

FIT_EVERY = 4
MINIMUM_IMAGES = 8
LEAST_DOUBT = math.nextafter(0.0, 1.0)


@dataclass(frozen=True)
class Observed:
    """The network's results on the calibration images, in the order in which they were read.

    Attributes
    ----------
    evidence
        The evidence against trust, float64 of shape (n, P).
    softmax
        Softmax scores, see `softmax_score`, float64 of shape (n,).
    predicted
        Predicted classes, int64 of shape (n,).
    wrong
        Which predictions are wrong, bool of shape (n,); None without labels.
    """

    evidence: Tensor
    softmax: Tensor
    predicted: Tensor
    wrong: Tensor | None


@dataclass(frozen=True)
class Calibration:
    """The combination of evidence to a score, and the scores of the calibration images.

    Attributes
    ----------
    combination
        Combines evidence to a score.
    fitting
        Which of the calibration images it was fitted on, bool of shape (N,); see `fits`.
    scores
        Scores of the other calibration images, ascending, float64 of shape (n,).
    softmax
        The softmax scores of the same images (one minus the highest probability), in the order of
        `scores`. The softmax baseline gets its thresholds from them by the same rule.
    predicted
        The predicted classes of the same images, in the order of `scores`, int64 of shape (n,).
    wrong
        Which of these predictions are wrong, bool of shape (n,); None without labels.
    guarantee
        The default guarantee of evaluations and monitors.
    """

    combination: Combination
    fitting: Tensor
    scores: Tensor
    softmax: Tensor
    predicted: Tensor
    wrong: Tensor | None = None
    guarantee: Guarantee = DEFAULT_GUARANTEE

    def score(self, evidence: Tensor) -> Tensor:
        """Return the score of evidence (B, columns), float64 of shape (B,).

        A score that several calibration images share is returned for scores that differ from it by
        rounding, so that equal images have equal scores in every batch; see `Ties`.
        """
        return self.ties.joined(self.combination.score(evidence))

    @cached_property
    def ties(self) -> Ties:
        """The scores that several calibration images share, on the device of the scores."""
        return placed(Ties.among(self.scores), self.scores.device)

    def rule(self, guarantee: Guarantee, classes: tuple[str, ...]) -> Rule:
        """Return the rule with the thresholds that keep a guarantee.

        Parameters
        ----------
        guarantee
            The guarantee.
        classes
            Class names.

        Raises
        ------
        CovcliError
            If there are too few calibration scores (of a predicted class, if the guarantee holds
            for each class); the message says how many images are needed. Also if no answers can be
            shown to keep the error rate of the guarantee.
        """
        self._refuse_too_few(guarantee, classes)
        rule = make_rule(self.scores, self.predicted, len(classes), guarantee)
        if guarantee.max_error is None:
            return rule
        return replace(rule, doubts=self._doubts(rule, guarantee.max_error))

    def _doubts(self, rule: Rule, max_error: float) -> Tensor:
        """Return the softmax score below which an answer passes, by predicted class; see `Rule`."""
        if self.wrong is None:
            raise CovcliError(
                "needs calibration images with labels", where=f"max-error {max_error:g}"
            )
        classes = len(rule.thresholds)
        by_class = rule.guarantee.mode == "by-class"
        familiar = self.scores < rule.error_limits[self.predicted]
        groups = [familiar.nonzero()[:, 0]]
        if by_class:
            kinds, order = self.predicted[groups[0]].sort(stable=True)
            sizes = torch.bincount(kinds, minlength=classes).tolist()
            groups = list(groups[0][order].split(sizes))
        failure = (1 - CONFIDENCE) / len(groups)
        levels = self.softmax.clamp_min(LEAST_DOUBT).log()
        shared = Ties.among(levels)
        levels = shared.joined(levels)
        found = [
            _below_ties(doubt_threshold(levels[mine], self.wrong[mine], max_error, failure), shared)
            for mine in groups
        ]
        doubts = torch.tensor(found, dtype=torch.float64).expand(classes).clone()
        if bool((doubts == -math.inf).all()):
            wrong = int(self.wrong[familiar].sum())
            raise self._no_answer_passes(rule.guarantee, int(familiar.sum()), wrong, failure)
        return doubts

    def _no_answer_passes(
        self, guarantee: Guarantee, known: int, wrong: int, failure: float
    ) -> CovcliError:
        """Return the error that no answer can pass, of `known` answers below the threshold."""
        max_error, by_class = guarantee.max_error, guarantee.mode == "by-class"
        assert max_error is not None
        least = least_answers(max_error, failure)
        each = " of each predicted class" if by_class else ""
        if known < least * (len(self.predicted.unique()) if by_class else 1):
            return CovcliError(
                f"{known} calibration answers are too few to show an error rate of at most "
                f"{max_error:g}",
                fix=f"at least {images_for(math.ceil(least / (1 - guarantee.alpha)))} "
                f"calibration images{each} are needed, and more if answers are wrong",
            )
        return CovcliError(
            f"no share of the answers can be shown to be wrong at most {max_error:g} of the time: "
            f"{wrong} of {known} calibration answers are wrong",
            fix="raise --max-error, or calibrate on more images",
        )

    def softmax_rule(self, guarantee: Guarantee, classes: tuple[str, ...]) -> Rule:
        """Return the rule of the softmax baseline, with thresholds as in `rule`, no error bound."""
        self._refuse_too_few(guarantee, classes)
        plain = replace(guarantee, max_error=None)
        return make_rule(self.softmax, self.predicted, len(classes), plain)

    def _refuse_too_few(self, guarantee: Guarantee, classes: tuple[str, ...]) -> None:
        least = guarantee.minimum()
        if len(self.scores) < least:
            raise too_few(f"{len(self.scores)} calibration scores", guarantee, images_for(least))
        if not guarantee.each_class:
            return
        counts = torch.bincount(self.predicted, minlength=len(classes))
        fewest, short = int(counts.argmin()), int((counts < least).sum())
        if short:
            raise too_few(
                f"{counts[fewest]} calibration scores of images predicted as {classes[fewest]!r} "
                f"(short: {short} of {len(classes)} classes)",
                guarantee,
                images_for(least),
                drawn=self.guarantee.each_class,
            )


def _below_ties(level: float, shared: Ties) -> float:
    """Return the doubt below which answers pass, from its logarithm.

    Where it is a doubt that several images share, rounding must not take theirs below it.
    """
    if level in shared.values.tolist():
        level -= 2 * shared.reach
    return math.exp(level) if math.isfinite(level) else level


def softmax_score(logits: Tensor) -> Tensor:
    """Return one minus the highest softmax probability of logits (B, C), float64 of shape (B,).

    Examples
    --------
    >>> [f"{score:.2g}" for score in softmax_score(torch.tensor([[0.0, 0.0], [50.0, 0.0]]))]
    ['0.5', '1.9e-22']
    """
    return torch.exp(doubt(logits))


def fits(images: int, seed: int, groups: Tensor | None = None) -> Tensor:
    """Return which of the calibration images fit the combination; the others rank new scores.

    One in four is drawn at random, with a seed. The choice does not depend on the position in a
    file, since files are often sorted or interleaved from several sources.

    Parameters
    ----------
    images
        The number of calibration images.
    seed
        The seed.
    groups
        The group of each image, int64 of shape (images,), if each group needs scores of its own:
        then of each group at most one in four is drawn, rounded up. Within a group all images are
        equally likely to be drawn.

    Returns
    -------
    Tensor
        bool of shape (images,).

    Examples
    --------
    >>> int(fits(6, seed=0).sum())
    2
    >>> groups = torch.tensor([0, 1] * 8)
    >>> groups[fits(16, seed=0, groups=groups)].bincount().tolist()
    [2, 2]
    """
    chosen = torch.zeros(images, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(images, generator=generator)
    if groups is not None:
        order = order[_alternating(groups[order], generator)]
    chosen[order[: -(-images // FIT_EVERY)]] = True
    return chosen


def _alternating(groups: Tensor, generator: torch.Generator) -> Tensor:
    """Return an order in which each group is spread evenly; a quarter of each comes first.

    Parameters
    ----------
    groups
        The group of each image, in a random order, int64 of shape (n,).
    generator
        Draws where each group begins.
    """
    sizes = torch.bincount(groups)
    by_group = groups.argsort(stable=True)
    rank = torch.empty_like(by_group)
    rank[by_group] = torch.arange(len(groups)) - (sizes.cumsum(0) - sizes)[groups[by_group]]
    starts = torch.rand(len(sizes), generator=generator)
    place = (rank + starts[groups]) / sizes[groups]
    return torch.where(rank * FIT_EVERY < sizes[groups], place, place + 1).argsort(stable=True)


def images_for(scores: int) -> int:
    """Return the number of calibration images for that many scores; one in four gives none."""
    return -(-scores * FIT_EVERY // (FIT_EVERY - 1))


def too_few(given: str, guarantee: Guarantee, images: int, drawn: bool = True) -> CovcliError:
    """Return the error for a guarantee that needs more calibration images.

    Parameters
    ----------
    given
        What there is.
    guarantee
        The guarantee.
    images
        The number of images that it needs, of each predicted class if it holds for each.
    drawn
        Whether one in four of each predicted class fits the combination; if not, one in four of
        all, and a class may have fewer scores than three quarters of its images.
    """
    least = guarantee.minimum()
    each = " of each predicted class" if guarantee.each_class else ""
    how = "" if drawn else f", of each class if the signature is built with {guarantee.mode}"
    return CovcliError(
        f"{given} are too few for {guarantee.mode} alpha {guarantee.alpha:g}",
        fix=f"at least {images} calibration images{each} are needed, for {least} scores: three "
        f"of four images give one{how}",
    )


def check_images(images: int, guarantee: Guarantee, classes: int) -> None:
    """Raise a CovcliError if the calibration images are too few for a guarantee in any case.

    Whether each class is predicted often enough is checked later by `Calibration.rule`, after the
    network has run.
    """
    groups = classes if guarantee.each_class else 1
    if images < images_for(groups * guarantee.minimum()):
        raise too_few(f"{images} calibration images", guarantee, images_for(guarantee.minimum()))


def calibrate(
    observed: Observed,
    fitting: Tensor,
    outliers: Sequence[Tensor] = (),
    *,
    arrangement: Arrangement = Arrangement(),
    plain: bool = False,
) -> Calibration:
    """Fit the combination on some of the calibration images, and rank the scores of the others.

    Parameters
    ----------
    observed
        The network's results on the calibration images.
    fitting
        Which of them fit the combination, bool of shape (n,); see `fits`.
    outliers
        For each expert, the evidence of surrogate outliers, float64 of shape (m, P). They are
        computed from the fitting images, so that the others stay exchangeable with new trusted
        images.
    arrangement
        The meaning of the columns of the evidence.
    plain
        Whether the score is the mean of the columns, and nothing is fitted.

    Raises
    ------
    CovcliError
        If there are fewer than 8 images.
    """
    if len(fitting) < MINIMUM_IMAGES:
        raise CovcliError(
            f"{len(fitting)} calibration images are too few",
            fix=f"at least {MINIMUM_IMAGES} are needed, and 26 for an alpha of 0.05",
        )
    evidence = observed.evidence
    combination = (
        plain_mean(evidence.shape[1])
        if plain
        else fit_combination(evidence[fitting], outliers, arrangement)
    )
    scores = combination.score(evidence[~fitting])
    scores = Ties.among(scores).joined(scores)
    order = scores.argsort(stable=True)
    ranking = (~fitting).nonzero()[:, 0][order]
    return Calibration(
        combination=combination,
        fitting=fitting,
        scores=scores[order],
        softmax=observed.softmax[ranking],
        predicted=observed.predicted[ranking],
        wrong=None if observed.wrong is None else observed.wrong[ranking],
    )
