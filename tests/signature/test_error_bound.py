"""The bound on wrong answers, against a naive search and over a thousand draws."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from covcli.signature.error_bound import doubt_threshold, least_answers

DRAWS = 1000


def naive(doubt: np.ndarray, wrong: np.ndarray, share: float, starts: list[int]) -> float:
    """Walk from each start as long as so few errors would be rare, one rank after another."""
    order = np.argsort(doubt, kind="stable")
    sorted_doubt, best = [*doubt[order], math.inf], -math.inf
    for start in starts:
        for j in range(start, len(doubt) + 1):
            if sorted_doubt[j - 1] == sorted_doubt[j]:
                continue
            errors = sum(wrong[order[i]] for i in range(j))
            if sum(binom.pmf(e, j, share) for e in range(errors + 1)) > 0.05 / len(starts):
                break
            best = max(best, sorted_doubt[j])
    return best


@pytest.mark.parametrize("grain", [0, 20], ids=["continuous", "ties"])
def test_the_threshold_is_that_of_a_naive_walk(grain: int) -> None:
    generator = np.random.default_rng(3)
    share = 0.1
    first = math.ceil(math.log(0.05 / 3) / math.log(0.9))
    starts = [first, 2 * first, 4 * first]  # four of them would reach beyond the 200
    for _ in range(20):
        doubt = generator.random(200)
        doubt = np.floor(doubt * grain) / grain if grain else doubt
        wrong = generator.random(200) < 0.3 * doubt
        threshold = doubt_threshold(torch.from_numpy(doubt), torch.from_numpy(wrong), share)
        assert threshold == naive(doubt, wrong, share, starts)


def test_at_most_five_of_a_hundred_draws_let_too_many_errors_pass() -> None:
    """P(wrong | doubt u) = u²·0.3: R(t) = 0.1·t² in closed form, above 0.04 from t = 0.632."""
    generator = np.random.default_rng(4)
    exceeded, kept = 0, []
    for _ in range(DRAWS):
        doubt = generator.random(1500)
        wrong = generator.random(1500) < 0.3 * doubt**2
        threshold = doubt_threshold(torch.from_numpy(doubt), torch.from_numpy(wrong), 0.04)
        share = min(max(threshold, 0.0), 1.0)
        exceeded += 0.1 * share**2 > 0.04
        kept.append(share)
    assert exceeded <= binom.ppf(0.999, DRAWS, 0.05)
    assert np.mean(kept) > 0.4  # and yet most of what could pass does


def test_nothing_passes_where_too_little_is_known() -> None:
    n = least_answers(0.05)
    assert 0.95**n <= 0.05 < 0.95 ** (n - 1)
    doubt = torch.arange(n, dtype=torch.float64)
    right = torch.zeros(n, dtype=torch.bool)
    assert doubt_threshold(doubt[: n - 1], right[: n - 1], 0.05) == -math.inf
    assert doubt_threshold(doubt, right, 0.05) == math.inf
    assert doubt_threshold(doubt, ~right, 0.05) == -math.inf
