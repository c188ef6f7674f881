"""The threshold on the doubt of an answer that bounds the error rate of the answers that pass.

Selective classification with guaranteed risk (Geifman and El-Yaniv, "Selective Classification for
Deep Neural Networks", NeurIPS 2017), with fixed-sequence testing in place of their binary search
(Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test", 2021, section 4).
"""

import math

import torch
from scipy.stats import binom
from torch import Tensor

from covcli.signature.guarantee import CONFIDENCE, minimum_certified


def doubt_threshold(
    doubt: Tensor, wrong: Tensor, max_error: float, failure: float = 1 - CONFIDENCE
) -> float:
    """Return the doubt below which answers pass, so that at most `max_error` of them are wrong.

    Let t be the (j + 1)-th smallest doubt. Given t, the j answers below it are independent draws
    from the answers with a doubt below t. So the number of wrong ones among them is binomial with
    n = j and p = R(t), the error rate of the answers that pass. The hypothesis R(t) > `max_error`
    is rejected if the probability of so few wrong answers is at most `failure`. Starting from each
    of a few fixed j, ranks are tested in ascending order until one is not rejected; the starts
    divide `failure` among them. So the probability that any R(t) > `max_error` is accepted is at
    most `failure`, over the draw of the answers.

    Parameters
    ----------
    doubt
        The doubt of each answer, float64 of shape (n,); independent, and drawn from the same
        distribution as later answers.
    wrong
        Which answers are wrong, bool of shape (n,).
    max_error
        The largest share of wrong answers among those that pass, in (0, 1).
    failure
        The probability that the share is exceeded, in (0, 1).

    Returns
    -------
    float
        Answers with a smaller doubt pass. Infinity: all pass; minus infinity: none.

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
    tested = ordered < following  # answers of equal doubt pass together
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
    """Return the smallest number of answers, all correct, that shows the error rate.

    Examples
    --------
    >>> least_answers(0.02), least_answers(0.05)
    (149, 59)
    """
    return minimum_certified(max_error, failure)


def _starts(count: int, max_error: float, failure: float) -> list[int]:
    """Return the ranks at which testing starts; they do not depend on the doubts or the answers.

    The first is the smallest that can be rejected without a wrong answer; each next is twice as
    large.
    """
    for number in range(8, 0, -1):
        first = least_answers(max_error, failure / number)
        starts = [first << i for i in range(number)]
        if starts[-1] <= count:
            return starts
    return []
