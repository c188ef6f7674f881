"""Conformal martingales against plain arithmetic, and their guarantees by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from covcli.monitoring.martingale import (
    BETS,
    RATES,
    SPREAD,
    Bag,
    Martingale,
    cells,
    lots,
    payoffs,
)

# Subnormal numbers have fewer bits, and share cells.
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False) | st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-300, math.inf, -math.inf]
)


def rounded(score: float) -> float:
    """Keep 16 bits after the leading one, by arithmetic."""
    if score == 0 or math.isinf(score):
        return score + 0.0
    mantissa, exponent = math.frexp(abs(score))
    return math.copysign(math.ldexp(math.floor(mantissa * 2**17), exponent - 17), score)


def naive_p_values(calibration: list[float], stream: list[float], drawn: np.ndarray) -> list[float]:
    bag, p_values = [rounded(s) for s in calibration], []
    for score, lot in zip(map(rounded, stream), drawn, strict=True):
        bag.append(score)
        greater, equal = sum(s > score for s in bag), sum(s == score for s in bag)
        p_values.append((greater + lot * equal) / len(bag))
    return p_values


@given(st.lists(FINITE, min_size=1, max_size=30), st.lists(FINITE, min_size=1, max_size=30))
def test_p_values_are_ranks_in_the_bag_so_far(
    calibration: list[float], stream: list[float]
) -> None:
    bag, drawn = Bag.of(calibration), lots(5, 0, len(stream))
    expected = naive_p_values(calibration, stream, drawn)
    np.testing.assert_allclose(bag.rank(stream, drawn), expected, rtol=1e-12)
    assert len(bag) == len(calibration) + len(stream)


def test_a_bag_that_has_merged_ranks_as_one_that_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    first, stream, drawn = generator.normal(size=50), generator.normal(size=400), lots(1, 0, 400)
    whole = Bag.of(first).rank(stream, drawn)
    monkeypatch.setattr("covcli.monitoring.martingale.RECENT", 7)
    bag = Bag.of(first)
    parts = [bag.rank(stream[i : i + 9], drawn[i : i + 9]) for i in range(0, 400, 9)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    held, counts = bag.content
    expected = np.unique(cells(np.concatenate([first, stream])), return_counts=True)
    np.testing.assert_array_equal([held, counts], expected)


@given(st.lists(FINITE, min_size=2, max_size=20))
def test_cells_keep_the_order_of_scores(scores: list[float]) -> None:
    indices = cells(scores)
    for a, b, low, high in zip(scores, scores[1:], indices, indices[1:], strict=False):
        assert (low < high) == (rounded(a) < rounded(b))
        assert (low == high) == (rounded(a) == rounded(b))


def test_every_bet_is_fair() -> None:
    for k in range(BETS):
        paid, _ = integrate.quad(lambda p, k=k: payoffs(p)[k], 0, 1)
        assert paid == pytest.approx(1, abs=1e-6)
    assert SPREAD.sum() == pytest.approx(1)


def test_capital_and_quick_statistic_follow_their_definitions() -> None:
    p_values = np.random.default_rng(1).beta(0.5, 1, 60)
    martingale = Martingale.begin()
    stakes = [[share / len(RATES) for share in SPREAD] for _ in RATES]
    totals = [[1 / len(RATES)] for _ in RATES]
    for p in p_values:
        martingale.step(p)
        for r, rate in enumerate(RATES):
            whole = sum(stakes[r])
            moved = [
                (1 - rate) * s + rate * whole * d for s, d in zip(stakes[r], SPREAD, strict=True)
            ]
            stakes[r] = [s * pays for s, pays in zip(moved, payoffs(p), strict=True)]
            totals[r].append(sum(stakes[r]))
        assert float(martingale.log) == pytest.approx(
            math.log(sum(t[-1] for t in totals)), rel=1e-9
        )
        fast = totals[int(RATES.argmax())]
        terms = [fast[-1] / before for before in fast[:-1]]
        assert float(martingale.quick) == pytest.approx(math.log(sum(terms)), rel=1e-9)


def test_capital_stays_finite_however_long_and_extreme() -> None:
    martingale = Martingale.begin()
    for _ in range(3000):
        martingale.step(1e-12)
    assert 3000 < float(martingale.log) < math.inf  # far beyond what a double holds
    for p in np.random.default_rng(2).random(3000):
        martingale.step(p)
    assert math.isfinite(float(martingale.log))
    assert math.isfinite(float(martingale.quick))


@pytest.mark.parametrize("levels", [None, 5])
def test_p_values_of_exchangeable_scores_are_uniform_and_independent(levels: int | None) -> None:
    generator = np.random.default_rng(3)
    runs = []
    for seed in range(400):
        scores = generator.normal(size=60)
        scores = scores if levels is None else np.floor(levels * stats.norm.cdf(scores))
        runs.append(Bag.of(scores[:20]).rank(scores[20:], lots(seed, 0, 40)))
    p_values = np.stack(runs)
    assert stats.kstest(p_values.ravel(), "uniform").pvalue > 1e-3
    pairs = np.corrcoef(p_values[:, :-1].ravel(), p_values[:, 1:].ravel())[0, 1]
    assert abs(pairs) < 4 / math.sqrt(p_values[:, 1:].size)


def test_false_alarms_ever_and_the_run_to_a_quick_one_are_as_promised() -> None:
    streams, length, delta, run_length = 3000, 600, 0.1, 100
    p_values = np.random.default_rng(4).random((length, streams))
    martingale = Martingale.begin((streams,))
    highest, first = np.full(streams, -np.inf), np.full(streams, length)
    for t, p in enumerate(p_values, 1):
        martingale.step(p)
        highest = np.maximum(highest, martingale.log)
        sounds = (martingale.quick >= math.log(run_length)) & (first == length)
        first[sounds] = t
    share = (highest >= -math.log(delta)).mean()
    assert 0 < share <= delta + 3 * math.sqrt(delta * (1 - delta) / streams)
    # Cut off at the end, the mean run is shorter than it would be.
    assert first.mean() >= run_length
    assert (first < length).mean() > 0.1


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_scores_that_rise_or_fall_are_noticed(shift: float) -> None:
    generator = np.random.default_rng(5)
    before, after = generator.normal(size=500), generator.normal(shift, size=300)
    bag, martingale = Bag.of(generator.normal(size=200)), Martingale.begin()
    p_values = bag.rank(np.concatenate([before, after]), lots(0, 0, 800))
    values = []
    for p in p_values:
        martingale.step(p)
        values.append(float(martingale.log))
    assert max(values[:500]) < math.log(100)
    assert max(values[500:600]) > math.log(100)


def test_streams_side_by_side_are_as_each_alone() -> None:
    p_values = np.random.default_rng(6).beta(0.8, 1, (80, 3))
    together, alone = Martingale.begin((3,)), [Martingale.begin() for _ in range(3)]
    for row in p_values:
        together.step(row)
        for martingale, p in zip(alone, row, strict=True):
            martingale.step(p)
    np.testing.assert_allclose(together.log, [float(m.log) for m in alone], rtol=1e-12)
    np.testing.assert_allclose(together.quick, [float(m.quick) for m in alone], rtol=1e-12)
