"""Combination of evidence columns to one score: standardisation, experts and a soft maximum.

The evidence from the logits joins last, on a common scale: the rarity among trusted images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from covcli.methods import Method
from covcli.methods.logits import LOGIT_EVIDENCE
from covcli.signature.tails import Tails

# Temperatures of the soft maximum, over the columns and over the voices.
COLUMNS = 1.5
VOICES = 0.4
# The factor of an expert's squared weights, added to its mean logistic loss.
RIDGE = 0.003
# Standardised columns are clipped to ± this many deviations for the training of experts.
LOUDEST = 8.0
# No standardised voice reaches this level.
NEVER = 1e6
# What the logits add to the score, as logs. The energy counts together with the distances: the sum
# of both rarities, of which that of the energy is limited, times a factor, plus a gain.
PAIR = 0.6
PAIR_GAIN = -0.5
ENERGY_CAP = 4.0
# The upper limit of the rarity of the doubt: doubtful trusted images must not exceed foreign ones.
DOUBT_CAP = 1.25
CAPS = {"energy": ENERGY_CAP, "doubt": DOUBT_CAP}


@dataclass(frozen=True)
class Arrangement:
    """The meaning of the columns of evidence.

    Attributes
    ----------
    blocks
        The begin and end of the columns of each generalist; empty for one generalist of all.
    logits
        The names of the columns of the logits, "doubt" or "energy"; they are the last ones.
    """

    blocks: tuple[tuple[int, int], ...] = ()
    logits: tuple[str, ...] = ()

    @classmethod
    def of(cls, method: Method, points: int) -> "Arrangement":
        """Return the arrangement of a method's evidence at so many coverage points."""
        blocks = tuple((kind * points, (kind + 1) * points) for kind in method.generalist_kinds)
        return cls(blocks, LOGIT_EVIDENCE[method.logit_evidence])

    def generalists(self, columns: int) -> Tensor:
        """Return the columns of each generalist, 1 or 0, float64 of shape (G, columns)."""
        masks = torch.zeros(max(1, len(self.blocks)), columns, dtype=torch.float64)
        for row, (begin, end) in zip(masks, self.blocks or ((0, columns),), strict=True):
            row[begin:end] = 1
        return masks


@dataclass(frozen=True)
class Combination:
    """Combines the evidence columns to one score.

    Each column is standardised with trusted images. A generalist is the soft maximum
    T·log(mean(exp(z/T))) of all columns, or of one block of them, with T = 1.5. It is between the
    mean, on which a single large column has little effect, and the maximum. Each expert is a
    weighted sum with weights of at least 0, fitted to separate trusted images from one kind of
    surrogate outliers. The outputs of the generalists and the experts are called voices. They are
    standardised too, and their soft maximum with T = 0.4 is close to their maximum.

    Without columns of the logits, this is the score. With them, the soft maximum, the last
    generalist (of the distances, in `ensemble`) and each column of the logits are transformed to
    their rarity among trusted images, see `Tails`. With a, d, e and u the rarities of the soft
    maximum, the last generalist, the energy and the doubt, the score is
    log(exp(a) + exp(PAIR·(d + min(e, ENERGY_CAP)) + PAIR_GAIN) + exp(min(u, DOUBT_CAP))). A term
    whose column is missing is left out.

    Attributes
    ----------
    center, scale
        Mean and deviation of each column, float64 of shape (P,).
    generalists
        The columns of each generalist, 1 or 0, float64 of shape (G, P), G at least 1.
    weights
        The experts' weights, float64 of shape (E, P); E is 0 for a method without experts.
    level, spread
        Mean and deviation of each voice, the generalists' first, float64 of shape (G + E,).
    floor
        The lowest score of the fitting images; it is subtracted.
    logits
        The names of the columns of the logits.
    tails
        The rarity of the soft maximum, the last generalist and each column of the logits; None
        without columns of the logits.
    """

    center: Tensor
    scale: Tensor
    generalists: Tensor
    weights: Tensor
    level: Tensor
    spread: Tensor
    floor: float
    logits: tuple[str, ...] = ()
    tails: Tails | None = None

    def shares(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contribution of each column to `score`.

        Parameters
        ----------
        evidence
            float64 of shape (B, P), or (B, P + L) with the logits' columns behind.

        Returns
        -------
        tuple of Tensor
            The standardised columns z, and each column's share of the score, both float64 of
            shape (B, P). The share of a voice is the derivative of the soft maximum with respect
            to it. A generalist's share is divided among the columns in the same way, an expert's
            in proportion to the terms of its sum. An image's shares sum to 1, or with columns of
            the logits to 1 minus the share of the logits.
        """
        columns = evidence[:, : len(self.center)]
        z = (columns - self.center) / self.scale
        voices = (_voices(z, self.generalists, self.weights) - self.level) / self.spread
        of_voice = torch.softmax(voices / VOICES, 1)
        general = torch.softmax(z[:, None] / COLUMNS + self.generalists.log(), 2)
        count = len(self.generalists)
        shares = (of_voice[:, :count, None] * general).sum(1)
        if len(self.weights):
            terms = (self.weights * z[:, None]).clamp_min(0) + torch.finfo(z.dtype).tiny
            of_expert = of_voice[:, count:, None] * terms / terms.sum(2, keepdim=True)
            shares = shares + of_expert.sum(1)
        if self.tails is None:
            return z, shares
        a, distance, logits = self._rarities(evidence)
        of_term = torch.softmax(_terms(a, distance, logits), 1)
        shares = of_term[:, :1] * shares
        if "energy" in logits:
            heard = distance.clamp_min(0)
            both = (heard + logits["energy"].clamp_min(0)).clamp_min(torch.finfo(a.dtype).tiny)
            part = of_term[:, 1 + self.logits.index("energy")] * (heard / both)
            shares = shares + part[:, None] * general[:, -1]
        return z, shares

    def score(self, evidence: Tensor) -> Tensor:
        """Return the score of evidence, float64 of shape (B,); larger is less trusted.

        The lowest score of the fitting images is 0.

        Parameters
        ----------
        evidence
            float64 of shape (B, P), or (B, P + L) with L columns of the logits at the end.
        """
        if self.tails is None:
            return self._loudest(evidence)[0] - self.floor
        return torch.logsumexp(_terms(*self._rarities(evidence)), 1) - self.floor

    def _rarities(self, evidence: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the rarities of the soft maximum, the last generalist and, limited, the logits.

        Each float64 of shape (B,).
        """
        assert self.tails is not None
        columns, logits = evidence.split([len(self.center), len(self.logits)], 1)
        values = torch.cat([torch.stack(self._loudest(columns), 1), logits], 1)
        a, distance, *others = self.tails.rarity(values).unbind(1)
        named = zip(self.logits, others, strict=True)
        return a, distance, {name: each.clamp_max(CAPS[name]) for name, each in named}

    def _loudest(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Return the soft maximum of the voices of evidence (B, P), and the last generalist.

        The latter times a factor and plus a constant. Both float64 of shape (B,).
        """
        offset, slope, excluded, experts, gain, shift, last = self._folded
        z = torch.addcmul(offset, evidence, slope)
        general = torch.logsumexp(z[:, None] + excluded, 2)
        voices = torch.cat([general * gain, z @ experts], 1)
        return torch.logsumexp(voices - shift, 1) * VOICES - last, general[:, -1]

    @cached_property
    def _folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """The constants of `_loudest`, combined so that a single image takes few operations.

        z/COLUMNS is evidence times a slope plus an offset. `excluded` is minus infinity for the
        columns that are not of a generalist. `gain` and `experts` contain the factors of each
        voice divided by VOICES, and `shift` its subtracted constant.
        """
        slope = 1 / (COLUMNS * self.scale)
        size = 1 / (self.spread * VOICES)
        count = len(self.generalists)
        means = COLUMNS * self.generalists.sum(1).log()  # see `_voices`
        shift = torch.cat([self.level[:count] + means, self.level[count:]]) * size
        experts = (self.weights * size[count:, None] * COLUMNS).T.contiguous()
        last = VOICES * math.log(len(self.level))
        excluded = self.generalists.log()
        return -self.center * slope, slope, excluded, experts, COLUMNS * size[:count], shift, last


def plain_mean(columns: int) -> Combination:
    """Return the combination whose score is the plain mean of the columns.

    A single expert weights all columns equally. The generalist's level is so high that the
    generalist does not affect the score.
    """
    ones = torch.ones(columns, dtype=torch.float64)
    return Combination(
        center=torch.zeros_like(ones),
        scale=ones,
        generalists=torch.ones_like(ones)[None],
        weights=ones[None] / columns,
        level=ones.new_tensor([NEVER, 0.0]),
        spread=ones.new_ones(2),
        floor=-VOICES * math.log(2),  # corrects the soft maximum's mean over two voices
    )


def fit_combination(
    evidence: Tensor, outliers: Sequence[Tensor], arrangement: Arrangement = Arrangement()
) -> Combination:
    """Fit the scales to trusted images, and an expert to each set of surrogate outliers.

    Parameters
    ----------
    evidence
        Evidence of trusted images, float64 of shape (n, P + L), n at least 2.
    outliers
        Evidence of surrogate outliers, float64 of shapes (m, P + L).
    arrangement
        The meaning of the columns; the last L are of the logits.
    """
    every, columns = evidence, evidence.shape[1] - len(arrangement.logits)
    evidence, generalists = every[:, :columns], arrangement.generalists(columns)
    center = evidence.mean(0)
    # A column of a range method that is constant on all n images changes with a probability of
    # about 1/(n + 2), and then by log 2. This gives the smallest plausible deviation.
    least = math.log(2) / math.sqrt(len(evidence) + 2)
    scale = evidence.std(0).clamp_min(least)
    z = (evidence - center) / scale
    experts = [fit_expert(z, (other[:, :columns] - center) / scale) for other in outliers]
    weights = torch.stack(experts) if experts else z.new_zeros(0, z.shape[1])
    number = len(generalists) + len(weights)
    level, spread = z.new_zeros(number), z.new_ones(number)
    if number > 1:
        voices = _voices(z, generalists, weights)
        # An expert whose weights are all 0 has a constant voice, 0.
        level, spread = voices.mean(0), torch.where(voices.std(0) > 0, voices.std(0), 1.0)
    combination = Combination(center, scale, generalists, weights, level, spread, 0.0)
    if arrangement.logits:
        heard = torch.stack(combination._loudest(evidence), 1)
        tails = Tails.fit(torch.cat([heard, every[:, columns:]], 1))
        combination = replace(combination, logits=arrangement.logits, tails=tails)
    return replace(combination, floor=float(combination.score(every).min()))


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


def _terms(a: Tensor, distance: Tensor, logits: Mapping[str, Tensor]) -> Tensor:
    """Return the terms of the score from the rarities, logs of shape (B, 1 + L)."""
    others = [
        PAIR * (distance + each) + PAIR_GAIN if name == "energy" else each
        for name, each in logits.items()
    ]
    return torch.stack([a, *others], 1)


def _voices(z: Tensor, generalists: Tensor, weights: Tensor) -> Tensor:
    """Return the voices of standardised columns (B, P), float64 of shape (B, G + E)."""
    general = torch.logsumexp(z[:, None] / COLUMNS + generalists.log(), 2)
    return torch.cat([COLUMNS * (general - generalists.sum(1).log()), z @ weights.T], 1)
