"""From evidence to one score, a p-value, a confidence and a verdict.

Everything here is measured on calibration images: trusted ones that trained neither the network
nor the signature. One in four of them fits how the evidence is combined, the others rank new
scores, so that a new image and those are scored by a rule that has seen none of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.signature.combination import Combination, fit_combination
from covcli.signature.guarantee import DEFAULT_GUARANTEE, Guarantee, Rule, make_rule

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
        The same images' softmax scores (one minus the highest probability), in the order of
        `scores`: the baseline gets thresholds by the same rule.
    predicted
        The same images' predicted classes, in the order of `scores`, int64 of shape (n,).
    guarantee
        What is kept unless an evaluation or a monitor is told otherwise.
    """

    combination: Combination
    scores: Tensor
    softmax: Tensor
    predicted: Tensor
    guarantee: Guarantee = DEFAULT_GUARANTEE

    def score(self, evidence: Tensor) -> Tensor:
        """Return the score of evidence (B, P), float64 of shape (B,); larger is less trusted."""
        return self.combination.score(evidence)

    def p_value(self, scores: Tensor) -> Tensor:
        """Return the conformal p-value (1 + #{calibration scores ≥ s}) / (n + 1) of each score.

        For inputs exchangeable with the calibration images, P(p ≤ α) ≤ α whatever the
        distribution (Vovk et al., 2005; Bates et al., "Testing for outliers with conformal
        p-values", 2023, section 2). A marginal verdict is p ≤ α; a certified one, by the
        thresholds of `rule`, flags fewer, and p keeps its marginal meaning.
        """
        n = len(self.scores)
        below = torch.searchsorted(self.scores, scores.to(self.scores).contiguous(), side="left")
        return (1 + n - below).double() / (n + 1)

    def rule(self, guarantee: Guarantee, classes: tuple[str, ...]) -> Rule:
        """Return the thresholds that keep a guarantee.

        Parameters
        ----------
        guarantee
            What to keep.
        classes
            Class names.

        Raises
        ------
        CovcliError
            If there are too few calibration scores, of one predicted class where the guarantee
            is certified; it says how many images are needed.
        """
        self._refuse_too_few(guarantee, classes)
        return make_rule(self.scores, self.predicted, len(classes), guarantee)

    def softmax_rule(self, guarantee: Guarantee, classes: tuple[str, ...]) -> Rule:
        """Return the baseline's thresholds, the same way as `rule`."""
        self._refuse_too_few(guarantee, classes)
        return make_rule(self.softmax, self.predicted, len(classes), guarantee)

    def _refuse_too_few(self, guarantee: Guarantee, classes: tuple[str, ...]) -> None:
        least = guarantee.minimum()
        if len(self.scores) < least:
            raise too_few(f"{len(self.scores)} calibration scores", guarantee, images_for(least))
        if guarantee.mode == "marginal":
            return
        counts = torch.bincount(self.predicted, minlength=len(classes))
        fewest, short = int(counts.argmin()), int((counts < least).sum())
        if short:
            raise too_few(
                f"{counts[fewest]} calibration scores of images predicted as {classes[fewest]!r} "
                f"(short: {short} of {len(classes)} classes)",
                guarantee,
                images_for(least),
            )


def softmax_score(logits: Tensor) -> Tensor:
    """Return one minus the highest softmax probability of logits (B, C), float64 of shape (B,).

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    in Neural Networks", ICLR 2017; summed over the other classes, so that saturated images, whose
    highest probability rounds to 1, still differ.
    """
    exact = logits.double()
    others = exact.scatter(1, exact.argmax(1, keepdim=True), -torch.inf)
    return torch.exp(torch.logsumexp(others, 1) - torch.logsumexp(exact, 1))


def fits(images: int) -> Tensor:
    """Return which of so many calibration images fit the combination; the others rank new scores.

    One in four, bool of shape (images,).

    Examples
    --------
    >>> fits(6).tolist()
    [True, False, False, False, True, False]
    """
    return torch.arange(images) % FIT_EVERY == 0


def images_for(scores: int) -> int:
    """Return how many calibration images give so many scores: one in four fits the combination."""
    return math.ceil(scores * FIT_EVERY / (FIT_EVERY - 1))


def too_few(given: str, guarantee: Guarantee, images: int) -> CovcliError:
    """Word the refusal of a guarantee that needs more calibration images."""
    least = guarantee.minimum()
    each = " of each predicted class" if guarantee.mode == "certified" else ""
    return CovcliError(
        f"{given} are too few for {guarantee.mode} alpha {guarantee.alpha:g}",
        fix=f"at least {images} calibration images{each} are needed, for {least} scores: three "
        "of four images give one",
    )


def check_images(images: int, guarantee: Guarantee, classes: int) -> None:
    """Raise a CovcliError if so few calibration images cannot keep a guarantee, however they score.

    Whether each class is predicted often enough is known only after the network has run:
    `Calibration.rule`.
    """
    groups = classes if guarantee.mode == "certified" else 1
    if images < images_for(groups * guarantee.minimum()):
        raise too_few(f"{images} calibration images", guarantee, images_for(guarantee.minimum()))


def calibrate(
    evidence: Tensor, softmax_scores: Tensor, predicted: Tensor, outliers: Sequence[Tensor] = ()
) -> Calibration:
    """Fit the combination on the images that `fits` names, and rank the scores of the others.

    Parameters
    ----------
    evidence
        Of calibration images, float64 of shape (n, P).
    softmax_scores
        The same images' softmax scores, float64 of shape (n,).
    predicted
        The same images' predicted classes, int64 of shape (n,).
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
    fitting = fits(len(evidence))
    combination = fit_combination(evidence[fitting], outliers)
    scores = combination.score(evidence[~fitting])
    order = scores.argsort(stable=True)
    softmax, classes = softmax_scores[~fitting][order], predicted[~fitting][order]
    return Calibration(combination, scores[order], softmax, classes)
