"""Intervals, against pairs counted one by one, published equations and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from covcli.evaluation.intervals import (
    FEW,
    FEWEST,
    Fpr95,
    Influence,
    Placements,
    combined,
    exponential_curves,
    logit_span,
    mean_area,
    newcombe,
    threshold_ranks,
)
from covcli.evaluation.metrics import Curves, average_precision, detection, mean_detection
from covcli.evaluation.own_errors import own_errors

SCORES = st.lists(
    st.one_of(st.integers(0, 4).map(float), st.floats(-9, 9)), min_size=2, max_size=40
)


def naive_placements(trusted: np.ndarray, untrusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wins = (untrusted > trusted[:, None]) + 0.5 * (untrusted == trusted[:, None])
    return wins.mean(1), wins.mean(0)


@settings(deadline=None)
@given(trusted=SCORES, untrusted=SCORES)
def test_placements_and_delongs_variance_are_those_of_all_pairs(
    trusted: list[float], untrusted: list[float]
) -> None:
    x, y = np.array(trusted), np.array(untrusted)
    of_trusted, of_untrusted = naive_placements(x, y)
    placements = Curves(x, y).placements()
    np.testing.assert_allclose(placements.trusted, of_trusted, atol=1e-12)
    np.testing.assert_allclose(placements.untrusted, of_untrusted, atol=1e-12)
    # DeLong, DeLong and Clarke-Pearson 1988, equations 4 to 6.
    variance = of_trusted.var(ddof=1) / len(x) + of_untrusted.var(ddof=1) / len(y)
    assert placements.influence.variance == pytest.approx(variance, abs=1e-15)
    span = placements.span()
    assert 0 <= span.low <= placements.area <= span.high <= 1
    turned = Curves(-x, -y).placements().span()
    assert (turned.low, turned.high) == pytest.approx((1 - span.high, 1 - span.low), abs=1e-9)


def test_many_images_have_the_interval_of_delong_on_the_logits_scale() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(0, 1, 3000), generator.normal(1.5, 1, 2000)
    area = Curves(x, y).auroc()
    parts = naive_placements(x, y)
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    ends = np.log(area / (1 - area)) + np.array([-1, 1]) * norm.ppf(0.975) * error / area / (
        1 - area
    )
    auroc = detection(x, y, None).auroc
    assert (auroc.low, auroc.high) == pytest.approx(1 / (1 + np.exp(-ends)), abs=2e-5)


@pytest.mark.parametrize(("area", "n", "m"), [(1.0, 50, 50), (0.0, 300, 20), (0.93, 40, 70)])
def test_newcombes_limits_solve_his_equation(area: float, n: int, m: int) -> None:
    span = newcombe(area, n, m)
    for theta in {span.low, span.high} - {0.0, 1.0}:
        inner = ((n + m) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        variance = theta * (1 - theta) * (1 + inner) / (n * m)
        assert abs(area - theta) == pytest.approx(norm.ppf(0.975) * np.sqrt(variance), rel=1e-6)
    assert (span.low == 0, span.high == 1) == (area == 0, area == 1)
    assert span.low <= area <= span.high


def test_perfect_separation_has_newcombes_interval() -> None:
    figures = detection(np.arange(60.0), np.arange(100.0, 130.0), None)
    assert (figures.auroc.low, figures.auroc.high) == (newcombe(1.0, 60, 30).low, 1.0)
    wrong_way = detection(np.arange(100.0, 130.0), np.arange(60.0), None)
    assert wrong_way.auroc.high == newcombe(0.0, 30, 60).high
    for figure in (figures.aupr_out, figures.aupr_in):
        assert 0.5 < figure.low < figure.value == figure.high == 1.0


def test_the_model_behind_newcombes_interval_has_the_area() -> None:
    rates = (np.arange(2000) + 0.5) / 2000
    for area in (0.5, 0.8, 0.99, 1.0):
        for false in exponential_curves(area):
            assert 1 - false.mean() == pytest.approx(area, abs=1e-3)  # true positive rates are even
            assert (false <= rates + 1e-12).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_influences_predict_what_leaving_an_image_out_does(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.normal(0, 1, 400), generator.normal(1, 1, 300)
    curves = Curves(x, y)
    _, influence = average_precision(curves.positives, curves.negatives)
    share = 300 / 700
    without_y = [_precision(x, np.delete(y, i), share) for i in range(300)]
    without_x = [_precision(np.delete(x, i), y, share) for i in range(400)]
    # Without one of m images the figure moves by −influence/(m − 1), so the jackknife's variance is
    # that of the influences, but for what is of second order.
    jackknife = sum(
        (len(values) - 1) / len(values) * np.square(values - np.mean(values)).sum()
        for values in (without_y, without_x)
    )
    assert influence.variance == pytest.approx(jackknife, rel=0.06)


def _precision(trusted: np.ndarray, untrusted: np.ndarray, share: float) -> float:
    """Return the average precision at a share of untrusted images that is not that of these."""
    recall = (untrusted >= untrusted[:, None]).mean(1)
    fallout = (trusted >= untrusted[:, None]).mean(1)
    return float((share * recall / (share * recall + (1 - share) * fallout)).mean())


def test_fewer_images_that_carry_a_figure_make_a_wider_interval() -> None:
    spread, single = np.linspace(-1, 1, 100), np.zeros(100)
    single[0] = np.sqrt(spread.var() * 100 / 0.99)
    assert single.var() == pytest.approx(spread.var())
    wide, narrow = (logit_span(0.5, Influence(values, spread)) for values in (single, spread))
    assert wide is not None
    assert narrow is not None
    assert wide.high > narrow.high + 0.1 * (narrow.high - 0.5)
    assert logit_span(1.0, Influence(spread, spread)) is None
    assert logit_span(0.5, Influence(np.ones(9), np.ones(9))) is None


@pytest.mark.parametrize("images", [10, 50, 71, 72, 100, 300, 2000])
def test_the_ranks_enclose_the_quantile_with_their_confidence(images: int) -> None:
    low, high = threshold_ranks(images)
    # The quantile lies below the j-th smallest score if fewer than j scores lie below it.
    assert binom.cdf(low - 1, images, 0.05) <= 0.025 < binom.cdf(low, images, 0.05)
    assert binom.sf(high - 1, images, 0.05) <= 0.025 < binom.sf(high - 2, images, 0.05)
    assert (low == 0) == (images < 72)


def test_fpr95_says_how_little_few_untrusted_images_bound() -> None:
    trusted, untrusted = np.arange(100.0), 200 + np.arange(400.0)
    assert Fpr95.of(trusted, untrusted).span().high == pytest.approx(0.0362, abs=1e-4)
    assert Fpr95.of(trusted, untrusted[:FEWEST]).span().high == pytest.approx(0.0362, abs=1e-4)
    assert Fpr95.of(trusted, untrusted[: FEWEST - 1]).span().high == 1.0


def test_parts_add_up_by_their_squares_as_far_as_they_are_independent() -> None:
    parts = np.array([0.03, 0.04])
    assert combined(0.5, parts, parts).high == pytest.approx(0.55)
    together = combined(0.5, parts, parts, np.ones((2, 2)))
    assert (together.low, together.high) == pytest.approx((0.43, 0.57))
    assert combined(0.01, parts, parts).low == 0


def test_the_mean_over_equal_sets_is_as_uncertain_as_one_of_them() -> None:
    generator = np.random.default_rng(3)
    trusted, untrusted = generator.normal(0, 1, 200), generator.normal(1, 1, 5000)
    one = Curves(trusted, untrusted).placements()
    others = [Curves(trusted, generator.normal(1, 1, 5000)).placements() for _ in range(4)]
    # With so many untrusted images only the trusted ones count, which all sets share.
    mean, single = mean_area(others), one.span()
    assert mean.high - mean.low == pytest.approx(single.high - single.low, rel=0.1)
    # With so many trusted images only the untrusted ones count, which no sets share.
    many = generator.normal(0, 1, 20_000)
    apart = [Curves(many, generator.normal(1, 1, 200)).placements() for _ in range(4)]
    mean, single = mean_area(apart), apart[0].span()
    assert mean.high - mean.low == pytest.approx((single.high - single.low) / 2, rel=0.15)


def test_single_images_have_wide_intervals_and_no_warnings(
    recwarn: pytest.WarningsRecorder,
) -> None:
    figures = detection(np.array([0.0]), np.array([1.0]), np.array([True]))
    assert figures.auroc.low < 0.5
    assert (figures.fpr95.low, figures.fpr95.high) == (0, 1)
    mean = mean_detection("x", np.array([0.0]), [np.array([1.0]), np.array([0.0])])
    assert mean.auroc.low < 0.5 < mean.auroc.high
    tied = detection(np.zeros(5), np.zeros(4), None)
    assert tied.auroc.low < tied.auroc.value == 0.5 < tied.auroc.high
    errors = own_errors({"x": np.array([1.0, 2.0])}, np.array([True, False]))
    assert errors is not None
    assert not recwarn.list


def covered(truth: float, ends: list[tuple[float, float]]) -> float:
    return float(np.mean([low <= truth <= high for low, high in ends]))


@pytest.mark.parametrize("area", [0.9, 0.99, 0.999])
@pytest.mark.parametrize(("n", "m"), [(50, 50), (300, 300), (300, 50)])
@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_simulated_areas_lie_in_their_intervals(
    area: float, n: int, m: int, deviation: float
) -> None:
    generator = np.random.default_rng(5)
    shift = np.hypot(1, deviation) * norm.ppf(area)
    ends = []
    for _ in range(200):
        x, y = generator.normal(size=n), shift + deviation * generator.normal(size=m)
        span = Curves(x, y).placements().span()
        ends.append((span.low, span.high))
    assert covered(area, ends) >= 0.92


@pytest.mark.parametrize("rate", [0.003, 0.05, 0.5])
@pytest.mark.parametrize("images", [50, 300])
def test_simulated_fpr95_lies_in_its_interval(rate: float, images: int) -> None:
    generator = np.random.default_rng(6)
    shift = norm.isf(rate) + norm.isf(0.05)
    ends = []
    for _ in range(200):
        x, y = generator.normal(size=images), shift + generator.normal(size=images)
        span = Fpr95.of(x, y).span()
        ends.append((span.low, span.high))
    assert covered(rate, ends) >= 0.92


def test_few_out_of_order_means_few_of_either_kind() -> None:
    order = np.arange(200.0)
    one_high = np.append(order, 500.0)  # one trusted image above all untrusted ones
    placements = Curves(one_high, order + 250).placements()
    assert placements.few
    assert isinstance(placements, Placements)
    assert not Curves(order, order + 100).placements().few
    assert FEW <= 100


@pytest.mark.parametrize("shift", [2.3, 3.3])
@pytest.mark.parametrize("images", [80, 300])
def test_fpr95_of_tied_scores_is_covered(shift: float, images: int) -> None:
    """Scores are halves, as those that count neurons: the share jumps between thresholds."""
    halves = np.arange(-20, 30) / 2
    chances = [
        norm.cdf(halves + 0.25 - mean) - norm.cdf(halves - 0.25 - mean) for mean in (0, shift)
    ]
    below = np.cumsum(chances[1]) - chances[1]
    threshold = int(np.flatnonzero(below <= 0.05)[-1])  # 95% reach it, and not the next
    truth = chances[0][threshold:].sum()
    generator = np.random.default_rng(8)
    held = 0
    for _ in range(400):
        trusted, untrusted = (
            generator.choice(halves, images, p=chance / chance.sum()) for chance in chances
        )
        estimate = Fpr95.of(trusted, untrusted).estimate()
        held += estimate.low - 1e-12 <= truth <= estimate.high + 1e-12
    assert held >= 0.92 * 400
