"""Conformal test martingales: bets that new data is not exchangeable with earlier data.

While it is exchangeable, conformal p-values over the growing bag are independent and uniform
(Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2nd edition, 2022,
chapter 8). Betting against this has an expected gain of zero: the capital is a martingale, and with
probability at least 1 − δ it never reaches 1/δ times the initial capital (Ville's inequality,
1939).
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# A score is rounded down to 16 bits after the leading one. A function that is applied to each score
# separately keeps scores exchangeable, and equal scores are ordered at random: the theory stays
# exact. 65,536 cells contain all scores from one power of two to the next.
DROPPED_BITS = 52 - 16
RECENT = 4096  # scores that are kept in a list before they are merged into the array
EDGE = 2.0**-53
# The share of the capital that is redistributed over the bets before each image; initially there
# is an equal capital for each rate.
RATES = np.array([1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
POWERS = np.array([0.5, 0.75, 0.9])


def cells(scores: ArrayLike) -> Integers:
    """Return the cells of scores; cells are ordered as scores are.

    Parameters
    ----------
    scores
        float64, without NaN.

    Examples
    --------
    >>> low, high, same = cells([-1.5, 2.0, 2.0 + 1e-9])
    >>> bool(low < high), bool(high == same)
    (True, True)
    """
    bits = (np.asarray(scores, np.float64) + 0.0).view(np.int64)  # −0 is 0
    # Negative numbers are stored as sign and magnitude: with inverted bits they ascend.
    ordered: Integers = np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)
    return ordered >> DROPPED_BITS


class Bag:
    """A multiset of scores; new scores are ranked and then added.

    It needs 16 bytes for each cell that contains a score: a few megabytes for any number of
    scores. Adding a score takes a binary search, and occasionally a merge.

    Parameters
    ----------
    held
        The cells that contain scores, ascending and distinct.
    counts
        The number of scores in each of them.
    """

    def __init__(self, held: Integers, counts: Integers) -> None:
        self._held = held
        self._ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._recent: list[int] = []

    @classmethod
    def of(cls, scores: ArrayLike) -> "Bag":
        """Return a bag of scores."""
        return cls(*np.unique(cells(scores), return_counts=True))

    def __len__(self) -> int:
        return int(self._ends[-1]) + len(self._recent)

    @property
    def content(self) -> tuple[Integers, Integers]:
        """The cells that contain scores, ascending, and the number of scores in each."""
        self._merge()
        return self._held, np.diff(self._ends)

    def rank(self, scores: ArrayLike, lots: ArrayLike) -> Floats:
        """Add scores to the bag one after another, and return the p-value of each.

        Parameters
        ----------
        scores
            float64 of shape (B,).
        lots
            Numbers drawn uniformly from (0, 1), shape (B,). They order equal scores.

        Returns
        -------
        ndarray
            For each score, (#{greater} + lot · #{equal}) / n among the n scores in the bag, itself
            included, float64 of shape (B,), in (0, 1).

        Examples
        --------
        >>> Bag.of([1.0, 2.0, 3.0]).rank([2.5, 2.5], [0.5, 0.5]).tolist()
        [0.375, 0.4]
        """
        placed = cells(scores)
        below = self._ends[np.searchsorted(self._held, placed, "left")]
        upto = self._ends[np.searchsorted(self._held, placed, "right")]
        ranked = np.empty(len(placed))
        size, recent = len(self), self._recent
        columns = (placed.tolist(), below.tolist(), upto.tolist(), np.asarray(lots).tolist())
        for i, (cell, first, last, lot) in enumerate(zip(*columns, strict=True)):
            left, right = bisect_left(recent, cell), bisect_right(recent, cell)
            recent.insert(right, cell)
            size += 1
            equal = last - first + right - left + 1
            greater = size - first - left - equal
            ranked[i] = (greater + lot * equal) / size
        if len(recent) >= RECENT:
            self._merge()
        return ranked.clip(EDGE, 1 - EDGE)

    def _merge(self) -> None:
        if not self._recent:
            return
        held = np.concatenate([self._held, np.array(self._recent, np.int64)])
        counts = np.concatenate([np.diff(self._ends), np.ones(len(self._recent), np.int64)])
        self._held, places = np.unique(held, return_inverse=True)
        merged = np.zeros(len(self._held), np.int64)
        np.add.at(merged, places, counts)
        self._ends = np.concatenate([[0], np.cumsum(merged)]).astype(np.int64)
        self._recent = []


def lots(seed: int, first: int, count: int) -> Floats:
    """Return the random numbers in (0, 1) that order equal scores, for consecutive images.

    They depend on the seed and the image's number only, so a watch can continue from a file.

    Examples
    --------
    >>> np.array_equal(lots(3, 0, 9)[5:], lots(3, 5, 4))
    True
    """
    generator = np.random.Generator(np.random.Philox(key=seed).advance(first // 4))
    drawn: Floats = generator.random(first % 4 + count)[first % 4 :]
    return drawn + EDGE / 2


def payoffs(p_values: ArrayLike) -> Floats:
    """Return what each bet pays for a p-value, for a stake of one.

    The first bet returns its stake. The others are powers, ε·p^(ε − 1) and ε·(1 − p)^(ε − 1): the
    first kind gains if scores grow, the second if they shrink. Each is a density, so for a
    uniform p the expected payoff is one.

    Parameters
    ----------
    p_values
        In (0, 1), of any shape S.

    Returns
    -------
    ndarray
        float64 of shape (*S, bets).
    """
    p = np.asarray(p_values, np.float64)[..., None]
    falls, rises = POWERS * p ** (POWERS - 1), POWERS * (1 - p) ** (POWERS - 1)
    return np.concatenate([np.ones_like(p), falls, rises], -1)


BETS = 1 + 2 * len(POWERS)
# Half of the redistributed capital goes to the bet that returns its stake.
SPREAD = np.array([0.5] + [0.5 / (BETS - 1)] * (BETS - 1))


@dataclass
class Martingale:
    """Capital that is bet against uniform p-values, for one stream or several in parallel.

    There is one capital for each of several rates J. Before each image, the share J of it is
    redistributed over all bets; the rest stays with the bets that have paid (the composite jumper;
    Vovk and others, "Retrain or not retrain: conformal test martingales for change-point
    detection", 2021). The martingale is the mean of the capitals. Compared with the best rate,
    it loses a factor of at most the number of rates.

    Attributes
    ----------
    shares
        The share of each bet in the capital of each rate, float64 of shape (*S, rates, bets).
    capital
        The logarithm of the capital at each rate, float64 of shape (*S, rates).
    quick
        The logarithm of the Shiryaev-Roberts statistic, float64 of shape S.
    """

    shares: Floats
    capital: Floats
    quick: Floats

    @classmethod
    def begin(cls, shape: tuple[int, ...] = ()) -> "Martingale":
        """Return the initial state of streams, of shape S."""
        return cls(
            np.broadcast_to(SPREAD, (*shape, len(RATES), BETS)).copy(),
            np.zeros((*shape, len(RATES))),
            np.full(shape, -np.inf),
        )

    @property
    def log(self) -> Floats:
        """The natural logarithm of the martingale, float64 of shape S; initially 0."""
        value: Floats = np.logaddexp.reduce(self.capital, axis=-1) - math.log(len(RATES))
        return value

    def step(self, p_values: ArrayLike) -> None:
        """Bet on the next p-value of each stream.

        The Shiryaev-Roberts statistic becomes ψ' = (ψ + 1)·r, where r is the growth factor of the
        capital at the highest rate. ψ is a sum over all earlier images: of the capital that one
        unit would have become if betting had started there. ψ minus the number of images is a
        martingale. With an alarm and a reset at ψ ≥ c, the mean number of images between false
        alarms is therefore at least c (Shiryaev, 1963; Roberts, 1966; for conformal martingales
        Vovk and others, 2021). The sum is never below its largest term, the CUSUM statistic, so
        it raises its alarm no later.

        Parameters
        ----------
        p_values
            In (0, 1), of shape S.
        """
        moved = (1 - RATES[:, None]) * self.shares + RATES[:, None] * SPREAD
        moved *= payoffs(p_values)[..., None, :]
        grown = moved.sum(-1)
        self.shares = moved / grown[..., None]
        growth = np.log(grown)
        self.capital = self.capital + growth
        self.quick = np.logaddexp(self.quick, 0.0) + growth[..., 0]
