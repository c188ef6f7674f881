"""How doubtful an answer may be, so that few of those that pass are wrong.

Selective classification with guaranteed risk (Geifman and El-Yaniv, "Selective Classification for
Deep Neural Networks", NeurIPS 2017), with fixed-sequence testing in place of their binary search
(Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test", 2021, section 4).
"""

import math

import torch
from scipy.stats import binom
from torch import Tensor

CONFIDENCE = 0.95


def doubt_threshold(
    doubt: Tensor, wrong: Tensor, max_error: float, failure: float = 1 - CONFIDENCE
) -> float:
    """Return below which doubt answers pass, so that at most a share of those is wrong.

    Let t be the (j + 1)-th smallest doubt. Given t, the j answers below it are independent draws
    from those with a doubt below t, so that the number of wrong ones among them is binomial with
    n = j and p = R(t), the error rate of what passes. "R(t) exceeds the share" is rejected where
    so few wrong ones have a probability of at most `failure`. From each of a few fixed j upwards
    ranks are tested one after another, until one is not rejected; the starts share `failure`
    between them. So some R(t) above the share is ever accepted with a probability of at most
    `failure`, over the draw of the answers.

    Parameters
    ----------
    doubt
        How doubtful each answer is, float64 of shape (n,): independent of each other, and drawn
        as later ones are.
    wrong
        Whether it is wrong, bool of shape (n,).
    max_error
        The share of wrong answers among those that pass, in (0, 1).
    failure
        With which probability it may be exceeded after all.

    Returns
    -------
    float
        Answers with a smaller doubt pass: infinity if all may, minus infinity if none.

    Examples
    --------
    >>> doubt = torch.linspace(0, 1, 1000, dtype=torch.float64)
    >>> threshold = doubt_threshold(doubt, doubt > 0.7, max_error=0.02)
    >>> bool((doubt[doubt < threshold] > 0.7).double().mean() <= 0.02)
    True
    """
    count = len(doubt)
    starts = _starts(count, max_error, failure)
    if not starts:
        return -math.inf
    ordered, order = doubt.sort(stable=True)
    ranks = torch.arange(1, count + 1)
    errors = wrong[order].long().cumsum(0)
    chance = torch.from_numpy(binom.cdf(errors.numpy(), ranks.numpy(), max_error))
    following = torch.cat([ordered[1:], ordered.new_full((1,), math.inf)])
    tested = ordered < following  # answers of equal doubt pass together or not at all
    refused = tested & (chance > failure / len(starts))
    threshold = -math.inf
    for start in starts:
        walk = refused[start - 1 :].nonzero()
        end = start - 1 + int(walk[0]) if len(walk) else count
        passed = tested[start - 1 : end].nonzero()
        if len(passed):
            threshold = max(threshold, float(following[start - 1 + int(passed[-1])]))
    return threshold


def least_answers(max_error: float, failure: float = 1 - CONFIDENCE) -> int:
    """Return the fewest answers, all of them right, that show an error rate to be small enough.

    >>> least_answers(0.02), least_answers(0.05)
    (149, 59)
    """
    return math.ceil(math.log(failure) / math.log1p(-max_error))


def _starts(count: int, max_error: float, failure: float) -> list[int]:
    """Return the ranks at which testing starts: they depend on no doubt and on no answer.

    The first could just be rejected with no wrong answer, each further one is twice as large.
    """
    for number in range(8, 0, -1):
        first = least_answers(max_error, failure / number)
        starts = [first << i for i in range(number)]
        if starts[-1] <= count:
            return starts
    return []
