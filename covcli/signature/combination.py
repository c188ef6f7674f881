"""Combination of evidence columns to one score: standardisation, experts and a soft maximum."""

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
# The factor of an expert's squared weights, added to its mean logistic loss.
RIDGE = 0.003
# Standardised columns are clipped to ± this many deviations for the training of experts.
LOUDEST = 8.0
# No standardised voice reaches this level.
NEVER = 1e6


@dataclass(frozen=True)
class Combination:
    """Combines the evidence columns to one score.

    Each column is standardised with trusted images. The generalist is the soft maximum
    T·log(mean(exp(z/T))) of all columns with T = 2. It is between the mean, on which a single large
    column has little effect, and the maximum. Each expert is a weighted sum with weights of at
    least 0, fitted to separate trusted images from one kind of surrogate outliers. The outputs of
    the generalist and the experts are called voices. They are standardised too, and the score is
    their soft maximum with T = 0.4, close to the maximum.

    Attributes
    ----------
    center, scale
        Mean and deviation of each column, float64 of shape (P,).
    weights
        The experts' weights, float64 of shape (E, P); E is 0 for a method without experts.
    level, spread
        Mean and deviation of each voice, the generalist's first, float64 of shape (1 + E,).
    floor
        The lowest score of the fitting images; it is subtracted.
    """

    center: Tensor
    scale: Tensor
    weights: Tensor
    level: Tensor
    spread: Tensor
    floor: float

    def shares(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contribution of each column to `score`.

        Parameters
        ----------
        evidence
            float64 of shape (B, P).

        Returns
        -------
        tuple of Tensor
            The standardised columns z, and each column's share of the score, both float64 of
            shape (B, P). An image's shares sum to 1. The share of a voice is the derivative of the
            soft maximum with respect to it. The generalist's share is divided among the columns in
            the same way, an expert's in proportion to the terms of its sum.
        """
        z = (evidence - self.center) / self.scale
        voices = (_voices(z, self.weights) - self.level) / self.spread
        of_voice = torch.softmax(voices / VOICES, 1)
        shares = of_voice[:, :1] * torch.softmax(z / COLUMNS, 1)
        if len(self.weights):
            terms = (self.weights * z[:, None]).clamp_min(0) + torch.finfo(z.dtype).tiny
            shares = shares + (of_voice[:, 1:, None] * terms / terms.sum(2, keepdim=True)).sum(1)
        return z, shares

    def score(self, evidence: Tensor) -> Tensor:
        """Return the score of evidence (B, P), float64 of shape (B,); larger is less trusted.

        The lowest score of the fitting images is 0.
        """
        offset, slope, experts, gain, shift, last = self._folded
        z = torch.addcmul(offset, evidence, slope)
        loud = torch.cat([torch.logsumexp(z, 1, keepdim=True) * gain, z @ experts], 1)
        return torch.logsumexp(loud - shift, 1) * VOICES - last

    @cached_property
    def _folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """The constants of `score`, combined so that scoring a single image takes few operations.

        z/COLUMNS is evidence times a slope plus an offset. `gain` and `experts` contain the factors
        of each voice divided by VOICES, and `shift` its subtracted constant.
        """
        slope = 1 / (COLUMNS * self.scale)
        size = 1 / (self.spread * VOICES)
        mean = COLUMNS * math.log(len(self.center))  # of the generalist, see `_soft_maximum`
        shift = torch.cat([self.level[:1] + mean, self.level[1:]]) * size
        experts = (self.weights * size[1:, None] * COLUMNS).T.contiguous()
        last = VOICES * math.log(len(self.level)) + self.floor
        return -self.center * slope, slope, experts, COLUMNS * size[0], shift, last


def plain_mean(columns: int) -> Combination:
    """Return the combination whose score is the plain mean of the columns.

    A single expert weights all columns equally. The generalist's level is so high that the
    generalist does not affect the score.
    """
    ones = torch.ones(columns, dtype=torch.float64)
    return Combination(
        center=torch.zeros_like(ones),
        scale=ones,
        weights=ones[None] / columns,
        level=ones.new_tensor([NEVER, 0.0]),
        spread=ones.new_ones(2),
        floor=-VOICES * math.log(2),  # corrects the soft maximum's mean over two voices
    )


def fit_combination(evidence: Tensor, outliers: Sequence[Tensor]) -> Combination:
    """Fit the scales to trusted images, and an expert to each set of surrogate outliers.

    Parameters
    ----------
    evidence
        Evidence of trusted images, float64 of shape (n, P), n at least 2.
    outliers
        Evidence of surrogate outliers, float64 of shapes (m, P).
    """
    center = evidence.mean(0)
    # A column of a range method that is constant on all n images changes with a probability of
    # about 1/(n + 2), and then by log 2. This gives the smallest plausible deviation.
    least = math.log(2) / math.sqrt(len(evidence) + 2)
    scale = evidence.std(0).clamp_min(least)
    z = (evidence - center) / scale
    experts = [fit_expert(z, (other - center) / scale) for other in outliers]
    weights = torch.stack(experts) if experts else z.new_zeros(0, z.shape[1])
    level, spread = z.new_zeros(1 + len(weights)), z.new_ones(1 + len(weights))
    if experts:
        voices = _voices(z, weights)
        # An expert whose weights are all 0 has a constant voice, 0.
        level, spread = voices.mean(0), torch.where(voices.std(0) > 0, voices.std(0), 1.0)
    combination = Combination(center, scale, weights, level, spread, 0.0)
    return replace(combination, floor=float(combination.score(evidence).min()))


def fit_expert(trusted: Tensor, outliers: Tensor) -> Tensor:
    """Return weights of at least 0 that separate outliers from trusted images.

    Logistic regression with equal weight of both classes and a small ridge penalty. The intercept
    is dropped, since voices are standardised. Weights are not negative: otherwise large evidence in
    one column could make an outlier of another kind look trusted.

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
    with threadpool_limits(1):  # the rounding of sums depends on the number of threads
        fit = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return torch.from_numpy(fit.x[:-1].copy())


def _voices(z: Tensor, weights: Tensor) -> Tensor:
    return torch.cat([_soft_maximum(z, COLUMNS)[:, None], z @ weights.T], 1)


def _soft_maximum(z: Tensor, temperature: float) -> Tensor:
    return temperature * (torch.logsumexp(z / temperature, 1) - math.log(z.shape[1]))
