"""From the costs of the coverage points to one score, a p-value, a confidence and a verdict.

Everything here is measured on calibration images: trusted ones that trained neither the network
nor the signature. One in four of them fits the scale of the points, the others rank new scores,
so that a new image and those are scored by a rule that has seen none of them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from covcli.errors import CovcliError
from covcli.guarantees import DEFAULT_GUARANTEE, Guarantee
from covcli.rules import Rule, make_rule

FIT_EVERY = 4
MINIMUM_IMAGES = 8
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Calibration:
    """What the calibration images say of the scores.

    Attributes
    ----------
    neurons
        Neurons of each coverage point, float64 of shape (L,).
    center, scale
        Mean and deviation of each point's log cost, float64 of shape (L,).
    floor
        The lowest combined score of the images that the scale was fitted on.
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

    neurons: Tensor
    center: Tensor
    scale: Tensor
    floor: float
    scores: Tensor
    softmax: Tensor
    predicted: Tensor
    guarantee: Guarantee = DEFAULT_GUARANTEE

    def score(self, point_costs: Tensor) -> Tensor:
        """Combine the costs of the coverage points into one score; larger is less trusted.

        The log of each point's cost (one more neuron's worth added, so that 0 has a log) is
        standardised, and the soft maximum T·log(mean(exp(z/T))) with T = 2 taken over the points:
        between the mean, which a single loud point cannot move, and the maximum, which hears it.

        Parameters
        ----------
        point_costs
            Mean cost over each point's neurons, float64 of shape (B, L).

        Returns
        -------
        Tensor
            float64 of shape (B,); 0 is the lowest score seen when the scale was fitted.
        """
        return _combine(point_costs, self.neurons, self.center, self.scale) - self.floor

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


def images_for(scores: int) -> int:
    """Return how many calibration images give so many scores: one in four fits the scale."""
    return math.ceil(scores * FIT_EVERY / (FIT_EVERY - 1))


def too_few(found: str, guarantee: Guarantee, images: int) -> CovcliError:
    """Word the refusal of a guarantee that needs more calibration images."""
    least = guarantee.minimum()
    each = " of each predicted class" if guarantee.mode == "certified" else ""
    return CovcliError(
        f"{found} are too few for {guarantee.mode} alpha {guarantee.alpha:g}",
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
    point_costs: Tensor, neurons: list[int], softmax_scores: Tensor, predicted: Tensor
) -> Calibration:
    """Fit the scale of the points on every fourth image, and rank the scores of the others.

    Parameters
    ----------
    point_costs
        Mean cost over each point's neurons, of calibration images, float64 of shape (n, L).
    neurons
        How many neurons each point has.
    softmax_scores
        The same images' softmax scores, float64 of shape (n,).
    predicted
        The same images' predicted classes, int64 of shape (n,).

    Raises
    ------
    CovcliError
        If there are fewer than 8 images.
    """
    if len(point_costs) < MINIMUM_IMAGES:
        raise CovcliError(
            f"{len(point_costs)} calibration images are too few",
            fix=f"at least {MINIMUM_IMAGES} are needed, and 26 for an alpha of 0.05",
        )
    sizes = torch.tensor(neurons, dtype=torch.float64)
    fitting = torch.arange(len(point_costs)) % FIT_EVERY == 0
    logs = _log_costs(point_costs[fitting], sizes)
    center = logs.mean(0)
    # A point silent on all m images leaves its range with a chance of about 1/(m + 2), then by
    # log 2 in a range method: the least deviation to believe.
    least = math.log(2) / math.sqrt(int(fitting.sum()) + 2)
    scale = logs.std(0).clamp_min(least)
    floor = float(_combine(point_costs[fitting], sizes, center, scale).min())
    scores = _combine(point_costs[~fitting], sizes, center, scale) - floor
    order = scores.argsort(stable=True)
    softmax, predicted = softmax_scores[~fitting][order], predicted[~fitting][order]
    return Calibration(sizes, center, scale, floor, scores[order], softmax, predicted)


def _log_costs(point_costs: Tensor, neurons: Tensor) -> Tensor:
    return torch.log(point_costs + 1 / neurons)


def _combine(point_costs: Tensor, neurons: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    z = (_log_costs(point_costs, neurons) - center) / scale
    return TEMPERATURE * (torch.logsumexp(z / TEMPERATURE, 1) - math.log(z.shape[1]))
