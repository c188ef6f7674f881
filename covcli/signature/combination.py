"""From the columns of evidence to one score: standardise, let experts weigh, take the loudest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

# Temperatures of the soft maximum, over the columns and over the voices.
COLUMNS = 2.0
VOICES = 0.4
# Weight of an expert's squared weights beside its mean logistic loss.
RIDGE = 0.003
# What an expert is trained on is cut off at so many deviations: beyond, nothing is left to learn.
LOUDEST = 8.0
# No standardised voice reaches this level.
NEVER = 1e6


@dataclass(frozen=True)
class Combination:
    """How the columns of evidence become one score.

    Each column is standardised by trusted images. The generalist is the soft maximum
    T·log(mean(exp(z/T))) of all columns with T = 2: between the mean, which a single loud column
    cannot move, and the maximum, which hears it. Each expert is a weighted sum, its weights at
    least 0 and fitted to tell trusted images from one kind of surrogate outliers. The voices of
    the generalist and the experts are standardised too, and the score is their soft maximum with
    T = 0.4, as good as the loudest.

    Attributes
    ----------
    center, scale
        Mean and deviation of each column, float64 of shape (P,).
    weights
        The experts, float64 of shape (E, P); E is 0 for a method without any.
    level, spread
        Mean and deviation of each voice, the generalist's first, float64 of shape (1 + E,).
    floor
        The lowest score of the images that all this was fitted on.
    """

    center: Tensor
    scale: Tensor
    weights: Tensor
    level: Tensor
    spread: Tensor
    floor: float

    def shares(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each column adds to `score`.

        Parameters
        ----------
        evidence
            float64 of shape (B, P).

        Returns
        -------
        tuple of Tensor
            The standardised columns z, and each column's share of the score, both float64 of
            shape (B, P); an image's shares sum to 1. A voice's part is the derivative of the soft
            maximum by it; the generalist's is shared out in the same way, an expert's by what its
            columns add to its sum.
        """
        z = (evidence - self.center) / self.scale
        voices = (_voices(z, self.weights) - self.level) / self.spread
        heard = torch.softmax(voices / VOICES, 1)
        shares = heard[:, :1] * torch.softmax(z / COLUMNS, 1)
        if len(self.weights):
            added = (self.weights * z[:, None]).clamp_min(0) + torch.finfo(z.dtype).tiny
            shares = shares + (heard[:, 1:, None] * added / added.sum(2, keepdim=True)).sum(1)
        return z, shares

    def score(self, evidence: Tensor) -> Tensor:
        """Return the score of evidence (B, P), float64 of shape (B,); larger is less trusted.

        0 is the lowest score seen in fitting.
        """
        offset, slope, experts, gain, shift, last = self._folded
        z = torch.addcmul(offset, evidence, slope)
        loud = torch.cat([torch.logsumexp(z, 1, keepdim=True) * gain, z @ experts], 1)
        return torch.logsumexp(loud - shift, 1) * VOICES - last

    @cached_property
    def _folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """The constants of `score`, folded into few: single images are scored in many small steps.

        z/COLUMNS is evidence times a slope plus an offset; of each voice over VOICES the factor is
        in `gain` and `experts`, and what is subtracted in `shift`.
        """
        slope = 1 / (COLUMNS * self.scale)
        size = 1 / (self.spread * VOICES)
        mean = COLUMNS * math.log(len(self.center))  # of the generalist, see `_soft_maximum`
        shift = torch.cat([self.level[:1] + mean, self.level[1:]]) * size
        experts = (self.weights * size[1:, None] * COLUMNS).T.contiguous()
        last = VOICES * math.log(len(self.level)) + self.floor
        return -self.center * slope, slope, experts, COLUMNS * size[0], shift, last


def plain_mean(columns: int) -> Combination:
    """Return the combination whose score is the mean of so many columns as they are.

    A single expert weighs all columns alike, and a generalist of a level that is never reached is
    not heard beside it.
    """
    ones = torch.ones(columns, dtype=torch.float64)
    return Combination(
        center=torch.zeros_like(ones),
        scale=ones,
        weights=ones[None] / columns,
        level=ones.new_tensor([NEVER, 0.0]),
        spread=ones.new_ones(2),
        floor=-VOICES * math.log(2),  # what the soft maximum of a voice and of silence lacks
    )


def fit_combination(evidence: Tensor, outliers: Sequence[Tensor]) -> Combination:
    """Fit the scales to trusted images, and an expert to each set of surrogate outliers.

    Parameters
    ----------
    evidence
        Of trusted images, float64 of shape (n, P), n at least 2.
    outliers
        Evidence of surrogate outliers, float64 of shapes (m, P).
    """
    center = evidence.mean(0)
    # A column silent on all n images, of a range method, leaves its range with a chance of about
    # 1/(n + 2), then by log 2: the least deviation to believe.
    least = math.log(2) / math.sqrt(len(evidence) + 2)
    scale = evidence.std(0).clamp_min(least)
    z = (evidence - center) / scale
    experts = [fit_expert(z, (other - center) / scale) for other in outliers]
    weights = torch.stack(experts) if experts else z.new_zeros(0, z.shape[1])
    level, spread = z.new_zeros(1 + len(weights)), z.new_ones(1 + len(weights))
    if experts:
        voices = _voices(z, weights)
        # An expert that found nothing to weigh is silent: its voice is 0 everywhere.
        level, spread = voices.mean(0), torch.where(voices.std(0) > 0, voices.std(0), 1.0)
    combination = Combination(center, scale, weights, level, spread, 0.0)
    return replace(combination, floor=float(combination.score(evidence).min()))


def fit_expert(trusted: Tensor, outliers: Tensor) -> Tensor:
    """Return weights of at least 0 that tell outliers from trusted images.

    Logistic regression with both sides weighed equally and a slight ridge; the intercept is
    dropped, since voices are standardised. No weight is negative: evidence never speaks for trust,
    or an outlier of another kind could buy itself free.

    Parameters
    ----------
    trusted, outliers
        Standardised columns, float64 of shapes (n, P) and (m, P).

    Returns
    -------
    Tensor
        float64 of shape (P,).
    """
    x = torch.cat([trusted, outliers]).clamp(-LOUDEST, LOUDEST).numpy()
    sign = np.concatenate([-np.ones(len(trusted)), np.ones(len(outliers))])
    weight = np.where(sign < 0, 0.5 / len(trusted), 0.5 / len(outliers))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, intercept = parameters[:-1], parameters[-1]
        margin = sign * (x @ w + intercept)
        pull = -sign * weight * np.exp(-np.logaddexp(0, margin))
        value = weight @ np.logaddexp(0, -margin) + RIDGE * w @ w
        return float(value), np.append(x.T @ pull + 2 * RIDGE * w, pull.sum())

    columns = x.shape[1]
    bounds = [(0, None)] * columns + [(None, None)]
    start = np.append(np.full(columns, 0.01), 0.0)
    with threadpool_limits(1):  # sums over more threads would round otherwise
        fit = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return torch.from_numpy(fit.x[:-1].copy())


def _voices(z: Tensor, weights: Tensor) -> Tensor:
    return torch.cat([_soft_maximum(z, COLUMNS)[:, None], z @ weights.T], 1)


def _soft_maximum(z: Tensor, temperature: float) -> Tensor:
    return temperature * (torch.logsumexp(z / temperature, 1) - math.log(z.shape[1]))
