"""p-values, thresholds, confidences and promises, against definitions and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covcli.core.errors import CovcliError
from covcli.signature.calibration import Calibration, Observed, calibrate, fits, softmax_score
from covcli.signature.combination import (
    COLUMNS,
    RIDGE,
    VOICES,
    Arrangement,
    fit_combination,
    fit_expert,
)
from covcli.signature.guarantee import Guarantee, Rule, alarms_bound, alarms_interval, make_rule

ANY = Guarantee(0.9)
SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(-50, 50)), min_size=1, max_size=60
)


def calibration(scores: list[float], predicted: list[int] | None = None) -> Calibration:
    values = torch.tensor(scores, dtype=torch.float64)
    classes = torch.tensor(predicted or [0] * len(scores))
    order = values.argsort()
    combination = fit_combination(torch.eye(2).double(), [])
    fitting = torch.zeros(len(scores), dtype=torch.bool)
    return Calibration(combination, fitting, values[order], values[order], classes[order])


def marginal(scores: list[float], alpha: float) -> Rule:
    return calibration(scores).rule(Guarantee(alpha), ("only",))


@settings(deadline=None)
@given(scores=SCORES, new=SCORES)
def test_p_values_follow_the_definition(scores: list[float], new: list[float]) -> None:
    tested = new + scores
    rule = make_rule(
        torch.tensor(scores, dtype=torch.float64), torch.zeros(len(scores)).long(), 1, ANY
    )
    only = torch.zeros(len(tested), dtype=torch.int64)
    p_values = rule.p_value(torch.tensor(tested, dtype=torch.float64), only)
    expected = [(1 + sum(s >= t for s in scores)) / (len(scores) + 1) for t in tested]
    np.testing.assert_array_equal(p_values.numpy(), expected)


@settings(deadline=None)
@given(scores=SCORES, new=SCORES, alpha=st.sampled_from([0.05, 0.1, 0.29, 0.5, 0.7]))
def test_threshold_p_value_and_confidence_agree(
    scores: list[float], new: list[float], alpha: float
) -> None:
    if math.floor(round(alpha * 100) * (len(scores) + 1) / 100) < 1:
        with pytest.raises(CovcliError, match="too few"):
            marginal(scores, alpha)
        return
    rule = marginal(scores, alpha)
    tested = torch.tensor(new + scores, dtype=torch.float64)
    only = torch.zeros(len(tested), dtype=torch.int64)
    flagged = rule.untrusted(tested, only)
    assert torch.equal(flagged, rule.p_value(tested, only) <= alpha + 1e-12)
    confidence = rule.confidence(tested, only)
    assert torch.equal(flagged, confidence < 0.5)
    assert bool(((confidence >= 0) & (confidence <= 1)).all())
    order = tested.argsort()
    assert bool((confidence[order].diff() <= 1e-12).all())  # equal but for the last bit


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (40, 0.05), (99, 0.29), (9, 0.1), (30, 0.5)])
def test_exactly_floor_alpha_of_exchangeable_scores_are_flagged(n: int, alpha: float) -> None:
    """Of n + 1 distinct scores, each in turn the new one, floor(α(n + 1)) raise the alarm."""
    values = np.random.default_rng(n).permutation(n + 1).astype(float)
    flagged = sum(
        values[i] > marginal(list(np.delete(values, i)), alpha).overall for i in range(n + 1)
    )
    assert flagged == round(alpha * 100) * (n + 1) // 100


def test_the_promise_is_the_exact_law_of_the_alarms() -> None:
    """All orders of n + m distinct scores are equally likely: count alarms in each."""
    n, m, alpha = 4, 3, 0.4
    rank = Guarantee(alpha).rank(n)
    counts = np.zeros(m + 1)
    for calibrating in itertools.combinations(range(n + m), n):
        threshold = marginal([float(v) for v in calibrating], alpha).overall
        new = set(range(n + m)) - set(calibrating)
        counts[sum(v > threshold for v in new)] += 1
    law = counts.cumsum() / counts.sum()
    expected = (np.argmax(law >= 0.025) / m, np.argmax(law >= 0.975) / m)
    assert rank == 2
    assert alarms_interval(rank, n, m) == pytest.approx(expected)
    assert alarms_bound(rank, n, m) == pytest.approx(np.argmax(law >= 0.95) / m)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(CovcliError, match="between 0 and 1"):
        Guarantee(alpha)


def naive_score(evidence: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    def soft_maximum(rows: np.ndarray) -> np.ndarray:
        least = math.log(2) / math.sqrt(len(fitted) + 2)
        z = (rows - fitted.mean(0)) / np.maximum(fitted.std(0, ddof=1), least)
        return COLUMNS * np.log(np.exp(z / COLUMNS).mean(1))

    return soft_maximum(evidence) - soft_maximum(fitted).min()


def test_scores_follow_the_formula_and_the_fit_sees_its_images_alone() -> None:
    generator = np.random.default_rng(0)
    costs = generator.random((41, 3)) * [1, 0.1, 0]  # the last column never says anything
    softmax = torch.from_numpy(generator.random(41))
    predicted = torch.from_numpy(generator.integers(0, 5, 41))
    wrong = torch.from_numpy(generator.random(41) < 0.3)
    fitting = fits(41, seed=5).numpy()
    assert int(fitting.sum()) == 11
    observed = Observed(torch.from_numpy(costs), softmax, predicted, wrong)
    calibration = calibrate(observed, torch.from_numpy(fitting))
    expected = naive_score(costs, costs[fitting])
    np.testing.assert_allclose(
        calibration.score(torch.from_numpy(costs)).numpy(), expected, rtol=1e-9
    )
    np.testing.assert_allclose(calibration.scores.numpy(), np.sort(expected[~fitting]), rtol=1e-9)
    order = np.argsort(expected[~fitting], kind="stable")
    np.testing.assert_array_equal(calibration.softmax.numpy(), softmax.numpy()[~fitting][order])
    np.testing.assert_array_equal(calibration.predicted.numpy(), predicted.numpy()[~fitting][order])
    np.testing.assert_array_equal(calibration.wrong.numpy(), wrong.numpy()[~fitting][order])
    noisy = costs + np.array([0, 0, 1.0])
    assert bool(
        (
            calibration.score(torch.from_numpy(noisy)) > calibration.score(torch.from_numpy(costs))
        ).all()
    )


def test_an_expert_is_the_optimum_of_its_loss() -> None:
    """The conditions of Karush, Kuhn and Tucker hold at the weights that were found."""
    generator = np.random.default_rng(1)
    trusted = generator.normal(size=(200, 4))
    outliers = generator.normal([1.5, 0, -1, 0.3], size=(80, 4))
    w = fit_expert(torch.from_numpy(trusted), torch.from_numpy(outliers)).numpy()

    def slope(weights: np.ndarray) -> np.ndarray:
        from scipy.optimize import brentq

        def chances(intercept: float) -> tuple[np.ndarray, np.ndarray]:
            return tuple(
                1 / (1 + np.exp(-sign * (rows @ weights + intercept)))
                for sign, rows in ((1, trusted), (-1, outliers))
            )

        def balance(intercept: float) -> float:
            wrong, missed = chances(intercept)
            return float(wrong.mean() - missed.mean())

        wrong, missed = chances(brentq(balance, -50, 50))
        pull = (trusted.T @ wrong) / len(trusted) - (outliers.T @ missed) / len(outliers)
        return 0.5 * pull + 2 * RIDGE * weights

    gradient = slope(w)
    assert bool((w >= 0).all())
    assert w[2] == 0  # evidence that falls for outliers is not held against trust
    np.testing.assert_allclose(gradient[w > 0], 0, atol=1e-4)
    assert bool((gradient[w == 0] > -1e-4).all())


def test_voices_are_combined_as_stated() -> None:
    generator = np.random.default_rng(2)
    fitted = generator.normal(size=(60, 3))
    outliers = [generator.normal(size=(40, 3)) + shift for shift in ([3, 0, 0], [0, 0, 2])]
    combination = fit_combination(torch.from_numpy(fitted), [torch.from_numpy(o) for o in outliers])
    rows = np.concatenate([fitted, *outliers])

    def voices(values: np.ndarray) -> np.ndarray:
        z = (values - fitted.mean(0)) / fitted.std(0, ddof=1)
        general = COLUMNS * np.log(np.exp(z / COLUMNS).mean(1))
        return np.column_stack([general, z @ combination.weights.numpy().T])

    heard = voices(fitted)
    v = (voices(rows) - heard.mean(0)) / heard.std(0, ddof=1)
    expected = VOICES * np.log(np.exp(v / VOICES).mean(1))
    expected -= expected[:60].min()
    np.testing.assert_allclose(
        combination.score(torch.from_numpy(rows)).numpy(), expected, atol=1e-9
    )
    assert combination.weights[0].argmax() == 0
    assert combination.weights[1].argmax() == 2


def test_a_generalist_of_some_columns_hears_no_others() -> None:
    generator = np.random.default_rng(5)
    fitted = generator.normal(size=(60, 4))
    arrangement = Arrangement(blocks=((0, 2), (2, 3)))
    combination = fit_combination(torch.from_numpy(fitted), [], arrangement)
    rows = np.concatenate([fitted, generator.normal(0, 4, (40, 4))])

    def voices(values: np.ndarray) -> np.ndarray:
        z = (values - fitted.mean(0)) / fitted.std(0, ddof=1)
        parts = [z[:, :2], z[:, 2:3]]
        return np.column_stack([COLUMNS * np.log(np.exp(p / COLUMNS).mean(1)) for p in parts])

    heard = voices(fitted)
    v = (voices(rows) - heard.mean(0)) / heard.std(0, ddof=1)
    expected = VOICES * np.log(np.exp(v / VOICES).mean(1))
    expected -= expected[:60].min()
    np.testing.assert_allclose(
        combination.score(torch.from_numpy(rows)).numpy(), expected, atol=1e-9
    )
    shares = combination.shares(torch.from_numpy(rows))[1].numpy()
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (shares[:, 3] == 0).all()


def test_too_few_calibration_images_are_refused() -> None:
    costs = torch.ones(7, 2, dtype=torch.float64)
    with pytest.raises(CovcliError, match="7 calibration images are too few"):
        calibrate(Observed(costs, costs[:, 0], torch.zeros(7).long(), None), fits(7, 0))


def test_softmax_scores_of_saturated_logits_stay_apart() -> None:
    logits = torch.tensor([[40.0, 0.0], [60.0, 0.0], [0.0, 0.0]])
    scores = softmax_score(logits).numpy()
    expected = [math.exp(-40) / (1 + math.exp(-40)), math.exp(-60) / (1 + math.exp(-60)), 0.5]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_the_split_is_random_by_seed_and_a_quarter_rounded_up() -> None:
    for n in (8, 9, 10, 11, 26, 1000):
        assert int(fits(n, 0).sum()) == math.ceil(n / 4)
    assert torch.equal(fits(1000, 1), fits(1000, 1))
    assert not torch.equal(fits(1000, 1), fits(1000, 2))
    # Each place fits about as often as any other, in whatever rhythm the file was put together.
    often = torch.stack([fits(64, seed) for seed in range(2000)]).double().mean(0)
    assert bool(((often - 0.25).abs() < 0.05).all())


@settings(deadline=None, max_examples=50)
@given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=200), seed=st.integers(0, 2**31 - 1))
def test_of_each_group_at_most_a_quarter_fits(groups: list[int], seed: int) -> None:
    fitting = fits(len(groups), seed, torch.tensor(groups)).numpy()
    assert fitting.sum() == math.ceil(len(groups) / 4)
    for group in set(groups):
        mine = np.array(groups) == group
        assert fitting[mine].sum() <= math.ceil(mine.sum() / 4)


def test_every_image_of_a_group_fits_equally_often() -> None:
    groups = torch.tensor([0] * 26 + [1] * 13 + [2])[torch.randperm(40)]
    often = torch.stack([fits(40, seed, groups) for seed in range(3000)]).double().mean(0)
    # A binomial share of 3,000 draws has a deviation of 0.008.
    assert bool(((often - 0.25).abs() < 0.04).all())
