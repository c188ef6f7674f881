"""From the costs of the coverage points to one score, a p-value, a confidence and a verdict.

Everything here is measured on calibration images: trusted ones that trained neither the network
nor the signature. One in four of them fits the scale of the points, the others rank new scores,
so that a new image and those are scored by a rule that has seen none of them.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from scipy.stats import betabinom
from torch import Tensor

from covcli.errors import CovcliError

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
        The same images' softmax scores (one minus the highest probability), ascending: the
        baseline gets a threshold by the same rule.
    """

    neurons: Tensor
    center: Tensor
    scale: Tensor
    floor: float
    scores: Tensor
    softmax: Tensor

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

    def contributions(self, point_costs: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each coverage point adds to `score`.

        Parameters
        ----------
        point_costs
            As for `score`, float64 of shape (B, L).

        Returns
        -------
        tuple of Tensor
            The standardised log costs z, and each point's share of the score: the softmax of z/T
            over the points, which is the derivative of the soft maximum by z. Both float64 of
            shape (B, L); an image's shares sum to 1.
        """
        z = (_log_costs(point_costs, self.neurons) - self.center) / self.scale
        return z, torch.softmax(z / TEMPERATURE, 1)

    def p_value(self, scores: Tensor) -> Tensor:
        """Return the conformal p-value (1 + #{calibration scores ≥ s}) / (n + 1) of each score.

        For inputs exchangeable with the calibration images, P(p ≤ α) ≤ α whatever the
        distribution (Vovk et al., 2005; Bates et al., "Testing for outliers with conformal
        p-values", 2023, section 2).
        """
        n = len(self.scores)
        below = torch.searchsorted(self.scores, scores.to(self.scores).contiguous(), side="left")
        return (1 + n - below).double() / (n + 1)

    def rank(self, alpha: float) -> int:
        """Return floor(α(n + 1)), how many of n + 1 exchangeable scores may raise the alarm.

        Raises
        ------
        CovcliError
            If α is not between 0 and 1, or n is too small for it.
        """
        if not 0 < alpha < 1:
            raise CovcliError("must lie between 0 and 1", where=f"alpha {alpha}")
        exact = Fraction(repr(alpha))  # 0.29 means 29/100, not the double below it
        rank = math.floor(exact * (len(self.scores) + 1))
        if rank < 1:
            raise CovcliError(
                f"{len(self.scores)} calibration scores are too few for alpha {alpha}",
                fix=f"at least {math.ceil(1 / exact) - 1} are needed (of four images three count)",
            )
        return rank

    def threshold(self, alpha: float) -> float:
        """Return τ: a score above it has a p-value of at most α, and only such a score."""
        return float(self.scores[len(self.scores) - self.rank(alpha)])

    def softmax_threshold(self, alpha: float) -> float:
        """Return the baseline's threshold, by the same rule as `threshold`."""
        return float(self.softmax[len(self.softmax) - self.rank(alpha)])

    def confidence(self, scores: Tensor, alpha: float) -> Tensor:
        """Return 2^(−s/τ), 1 for s ≤ 0: below one half exactly where the verdict is "untrusted".

        The paper's confidence exp(−s·ln 2/τ) with the calibrated threshold τ (arXiv 2101.12100,
        section IV).
        """
        tau = self.threshold(alpha)
        scores = scores.double()
        shape = torch.exp2(-scores.clamp_min(0) / tau) if tau > 0 else (scores <= tau).double()
        half = math.nextafter(0.5, 0.0)
        return torch.where(scores > tau, shape.clamp_max(half), shape.clamp_min(0.5))

    def promise(self, alpha: float, images: int) -> tuple[float, float]:
        """Return where the share of alarms among so many trusted images lies with 95% probability.

        The count is beta-binomial with parameters k = floor(α(n+1)) and n + 1 − k, over the draw
        of both the calibration and the new images (Vovk, "Conditional validity of inductive
        conformal predictors", 2012), if no two scores are equal.
        """
        k = self.rank(alpha)
        law = betabinom(images, k, len(self.scores) + 1 - k)
        return float(law.ppf(0.025)) / images, float(law.ppf(0.975)) / images


def softmax_score(logits: Tensor) -> Tensor:
    """Return one minus the highest softmax probability of logits (B, C), float64 of shape (B,).

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    in Neural Networks", ICLR 2017; summed over the other classes, so that saturated images, whose
    highest probability rounds to 1, still differ.
    """
    exact = logits.double()
    others = exact.scatter(1, exact.argmax(1, keepdim=True), -torch.inf)
    return torch.exp(torch.logsumexp(others, 1) - torch.logsumexp(exact, 1))


def calibrate(point_costs: Tensor, neurons: list[int], softmax_scores: Tensor) -> Calibration:
    """Fit the scale of the points on every fourth image, and rank the scores of the others.

    Parameters
    ----------
    point_costs
        Mean cost over each point's neurons, of calibration images, float64 of shape (n, L).
    neurons
        How many neurons each point has.
    softmax_scores
        The same images' softmax scores, float64 of shape (n,).

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
    softmax = softmax_scores[~fitting].sort().values
    return Calibration(sizes, center, scale, floor, scores.sort().values, softmax)


def _log_costs(point_costs: Tensor, neurons: Tensor) -> Tensor:
    return torch.log(point_costs + 1 / neurons)


def _combine(point_costs: Tensor, neurons: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    z = (_log_costs(point_costs, neurons) - center) / scale
    return TEMPERATURE * (torch.logsumexp(z / TEMPERATURE, 1) - math.log(z.shape[1]))
