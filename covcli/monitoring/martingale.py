"""Conformal test martingales: bets that what arrives is no longer exchangeable with what came.

While it is, conformal p-values over the growing bag are independent and uniform (Vovk, Gammerman
and Shafer, "Algorithmic learning in a random world", 2nd edition, 2022, chapter 8). So whoever
bets against that wins nothing in the mean: their capital is a martingale, and with probability at
least 1 − δ it never reaches 1/δ times what they began with (Ville's inequality, 1939).
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# A score is rounded down to 16 bits behind the leading one. Whatever is done to each score by
# itself keeps scores exchangeable, and equal ones are told apart by lot: the theory stays exact,
# while 65,536 cells hold all scores from one power of two to the next.
DROPPED_BITS = 52 - 16
RECENT = 4096  # scores that are kept in a list before they join the array
EDGE = 2.0**-53
# How much of the capital is spread over the bets anew before each image; the capital begins in
# equal parts, one for each rate.
RATES = np.array([1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
POWERS = np.array([0.5, 0.75, 0.9])


def cells(scores: ArrayLike) -> Integers:
    """Return the cells that scores lie in, in the order of the scores.

    Parameters
    ----------
    scores
        float64, no NaN among them.

    Examples
    --------
    >>> low, high, same = cells([-1.5, 2.0, 2.0 + 1e-9])
    >>> bool(low < high), bool(high == same)
    (True, True)
    """
    bits = (np.asarray(scores, np.float64) + 0.0).view(np.int64)  # −0 is 0
    # Negative numbers are stored as sign and size: turned over they ascend.
    ordered: Integers = np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)
    return ordered >> DROPPED_BITS


class Bag:
    """Scores, of which new ones are ranked before they join them.

    Memory is 16 bytes for each cell that holds a score: some megabytes, however many scores
    there are. A score takes the time of a binary search, and now and then that of a merge.

    Parameters
    ----------
    held
        Cells that hold scores, ascending, each once.
    counts
        How many scores each of them holds.
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
        """The cells that hold scores, ascending, and how many each of them holds."""
        self._merge()
        return self._held, np.diff(self._ends)

    def rank(self, scores: ArrayLike, lots: ArrayLike) -> Floats:
        """Put scores into the bag one after another, and return the p-value of each.

        Parameters
        ----------
        scores
            float64 of shape (B,).
        lots
            Numbers drawn uniformly from (0, 1), shape (B,): they decide between equal scores.

        Returns
        -------
        ndarray
            Of each score s, (#{greater} + lot · #{equal}) / n among the n that are in the bag with
            it, float64 of shape (B,), in (0, 1).

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
    """Return the numbers in (0, 1) that decide between equal scores, by the images' numbers.

    They depend on the seed and the image's number alone, so that a watch goes on where it stood.

    Examples
    --------
    >>> np.array_equal(lots(3, 0, 9)[5:], lots(3, 5, 4))
    True
    """
    generator = np.random.Generator(np.random.Philox(key=seed).advance(first // 4))
    drawn: Floats = generator.random(first % 4 + count)[first % 4 :]
    return drawn + EDGE / 2


def payoffs(p_values: ArrayLike) -> Floats:
    """Return what each bet pays on a p-value, for a stake of one.

    The first bet keeps its stake. The others are powers, ε·p^(ε − 1) and ε·(1 − p)^(ε − 1): the
    first kind wins where scores grow, the second where they shrink. Each is a density, so that in
    the mean over a uniform p none wins.

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
# Half of what is spread goes to the bet that keeps its stake.
SPREAD = np.array([0.5] + [0.5 / (BETS - 1)] * (BETS - 1))


@dataclass
class Martingale:
    """Capital that is bet against uniform p-values, for one stream or several side by side.

    At each of several rates J some capital follows the bets that have paid: before each image the
    share J of it is spread over all bets anew (the composite jumper; Vovk and others, "Retrain or
    not retrain: conformal test martingales for change-point detection", 2021). What stands in the
    bets at all rates is the martingale; that the rates share what they begin with costs a factor of
    at most their number.

    Attributes
    ----------
    shares
        How the capital at each rate lies in the bets, float64 of shape (*S, rates, bets).
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
        """Return streams of that shape that have seen nothing."""
        return cls(
            np.broadcast_to(SPREAD, (*shape, len(RATES), BETS)).copy(),
            np.zeros((*shape, len(RATES))),
            np.full(shape, -np.inf),
        )

    @property
    def log(self) -> Floats:
        """The natural logarithm of the martingale, float64 of shape S; it begins with 0."""
        value: Floats = np.logaddexp.reduce(self.capital, axis=-1) - math.log(len(RATES))
        return value

    def step(self, p_values: ArrayLike) -> None:
        """Bet on the next p-value of each stream.

        The Shiryaev-Roberts statistic becomes ψ' = (ψ + 1)·r, with r what the capital at the
        highest rate has grown by: the sum over all earlier images of what betting from there on
        would have made of one unit. ψ less the number of images is a martingale, so that with an
        alarm and a new start at ψ ≥ c, the images from one false alarm to the next are at least
        c in the mean (Shiryaev, 1963; Roberts, 1966; for conformal martingales Vovk and others,
        2021). The sum is never below its largest term, the CUSUM statistic, so that it alarms
        first.

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
