"""p-values, thresholds, confidences and promises, against definitions and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covcli.calibration import Calibration, calibrate, softmax_score
from covcli.errors import CovcliError
from covcli.guarantees import Guarantee, alarms_bound, alarms_interval
from covcli.rules import Rule

SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(-50, 50)), min_size=1, max_size=60
)


def calibration(scores: list[float], predicted: list[int] | None = None) -> Calibration:
    ones = torch.ones(1, dtype=torch.float64)
    values = torch.tensor(scores, dtype=torch.float64)
    classes = torch.tensor(predicted or [0] * len(scores))
    order = values.argsort()
    return Calibration(ones, ones, ones, 0.0, values[order], values[order], classes[order])


def marginal(scores: list[float], alpha: float) -> Rule:
    return calibration(scores).rule(Guarantee(alpha), ("only",))


@settings(deadline=None)
@given(scores=SCORES, new=SCORES)
def test_p_values_follow_the_definition(scores: list[float], new: list[float]) -> None:
    tested = new + scores
    found = calibration(scores).p_value(torch.tensor(tested, dtype=torch.float64))
    expected = [(1 + sum(s >= t for s in scores)) / (len(scores) + 1) for t in tested]
    np.testing.assert_array_equal(found.numpy(), expected)


@settings(deadline=None)
@given(scores=SCORES, new=SCORES, alpha=st.sampled_from([0.05, 0.1, 0.29, 0.5, 0.7]))
def test_threshold_p_value_and_confidence_agree(
    scores: list[float], new: list[float], alpha: float
) -> None:
    if math.floor(round(alpha * 100) * (len(scores) + 1) / 100) < 1:
        with pytest.raises(CovcliError, match="too few"):
            marginal(scores, alpha)
        return
    made = marginal(scores, alpha)
    tested = torch.tensor(new + scores, dtype=torch.float64)
    only = torch.zeros(len(tested), dtype=torch.int64)
    flagged = made.untrusted(tested, only)
    assert torch.equal(flagged, calibration(scores).p_value(tested) <= alpha + 1e-12)
    confidence = made.confidence(tested, only)
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


def naive_score(costs: np.ndarray, sizes: list[int], fitted: np.ndarray) -> np.ndarray:
    def soft_maximum(rows: np.ndarray) -> np.ndarray:
        logs = np.log(fitted + 1 / np.array(sizes))
        least = math.log(2) / math.sqrt(len(fitted) + 2)
        scale = np.maximum(logs.std(0, ddof=1), least)
        z = (np.log(rows + 1 / np.array(sizes)) - logs.mean(0)) / scale
        return 2 * np.log(np.exp(z / 2).mean(1))

    return soft_maximum(costs) - soft_maximum(fitted).min()


def test_scores_follow_the_formula_and_the_fit_sees_one_image_in_four() -> None:
    generator = np.random.default_rng(0)
    sizes = [4, 7, 9]
    costs = generator.random((41, 3)) * [1, 0.1, 0]  # the last point never costs anything
    softmax = torch.from_numpy(generator.random(41))
    predicted = torch.from_numpy(generator.integers(0, 5, 41))
    made = calibrate(torch.from_numpy(costs), sizes, softmax, predicted)
    fitting = np.arange(41) % 4 == 0
    expected = naive_score(costs, sizes, costs[fitting])
    np.testing.assert_allclose(made.score(torch.from_numpy(costs)).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(made.scores.numpy(), np.sort(expected[~fitting]), rtol=1e-9)
    order = np.argsort(expected[~fitting], kind="stable")
    np.testing.assert_array_equal(made.softmax.numpy(), softmax.numpy()[~fitting][order])
    np.testing.assert_array_equal(made.predicted.numpy(), predicted.numpy()[~fitting][order])
    noisy = costs + np.array([0, 0, 1.0])
    assert bool((made.score(torch.from_numpy(noisy)) > made.score(torch.from_numpy(costs))).all())


def test_too_few_calibration_images_are_refused() -> None:
    costs = torch.ones(7, 2, dtype=torch.float64)
    with pytest.raises(CovcliError, match="7 calibration images are too few"):
        calibrate(costs, [1, 1], torch.ones(7, dtype=torch.float64), torch.zeros(7).long())


def test_softmax_scores_of_saturated_logits_stay_apart() -> None:
    logits = torch.tensor([[40.0, 0.0], [60.0, 0.0], [0.0, 0.0]])
    found = softmax_score(logits).numpy()
    expected = [math.exp(-40) / (1 + math.exp(-40)), math.exp(-60) / (1 + math.exp(-60)), 0.5]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
