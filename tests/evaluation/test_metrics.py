"""The metrics, against scikit-learn and word-by-word NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from covcli.evaluation.metrics import (
    Curves,
    confidence_bins,
    confidence_thresholds,
    detection,
    mean_detection,
    share,
)

SCORES = st.lists(
    st.one_of(st.integers(0, 4).map(float), st.floats(-9, 9)), min_size=1, max_size=50
)


@settings(deadline=None)
@given(trusted=SCORES, untrusted=SCORES)
def test_curves_agree_with_scikit_learn(trusted: list[float], untrusted: list[float]) -> None:
    scores = np.array(trusted + untrusted)
    truth = np.array([0] * len(trusted) + [1] * len(untrusted))
    curves = Curves(np.array(trusted), np.array(untrusted))
    assert curves.auroc() == pytest.approx(roc_auc_score(truth, scores))
    assert curves.aupr_out() == pytest.approx(average_precision_score(truth, scores))
    assert curves.aupr_in() == pytest.approx(average_precision_score(1 - truth, -scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert curves.fpr95() == pytest.approx(false[np.argmax(true >= 0.95)])


def test_fpr95_is_the_share_of_trusted_flagged_when_95_percent_are_caught() -> None:
    untrusted = np.arange(100.0)
    trusted = np.array([4.0, 5.0, 5.5, 200.0])
    # Catching 95 of 100 means flagging scores from 5 on: three of the four trusted.
    assert Curves(trusted, untrusted).fpr95() == 0.75


def test_detection_holds_every_figure_inside_its_interval() -> None:
    generator = np.random.default_rng(0)
    trusted, untrusted = generator.normal(0, 1, 300), generator.normal(1, 1, 200)
    figures = detection(trusted, untrusted, untrusted > 1.0)
    assert figures.detection_rate is not None
    for estimate in (
        figures.auroc,
        figures.aupr_in,
        figures.aupr_out,
        figures.fpr95,
        figures.detection_rate,
    ):
        assert estimate.low < estimate.value < estimate.high
    assert figures.detection_rate.value == np.mean(untrusted > 1.0)
    assert detection(trusted, untrusted, untrusted > 1.0) == figures
    assert detection(trusted, untrusted, None).detection_rate is None
    # Of many images that are well mixed, a bootstrap's interval is the same.
    drawn = []
    for _ in range(400):
        curves = Curves(generator.choice(trusted, 300), generator.choice(untrusted, 200))
        drawn.append((curves.auroc(), curves.aupr_out(), curves.aupr_in()))
    ends = np.percentile(drawn, [2.5, 97.5], axis=0).T
    for estimate, bootstrap in zip(
        (figures.auroc, figures.aupr_out, figures.aupr_in), ends, strict=True
    ):
        assert (estimate.low, estimate.high) == pytest.approx(bootstrap, abs=0.015)


def test_the_interval_of_a_share_is_exact() -> None:
    for count, images in ((0, 360), (1, 50), (100, 1000), (20, 20)):
        interval = share(np.arange(images) < count)
        truth = binomtest(count, images).proportion_ci(method="exact")
        assert interval.value == count / images
        assert (interval.low, interval.high) == pytest.approx((truth.low, truth.high), abs=1e-12)


@settings(deadline=None)
@given(
    confidence=st.lists(
        st.one_of(st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.9, 1.0]), st.floats(0, 1)), min_size=1
    ),
    seed=st.integers(0, 99),
)
def test_bins_and_thresholds_follow_their_words(confidence: list[float], seed: int) -> None:
    values = np.array(confidence)
    correct = np.random.default_rng(seed).random(len(values)) < 0.5
    bins = confidence_bins("x", values, correct)
    assert sum(b.images for b in bins) == len(values)
    for b in bins:
        inside = (values >= b.low) & ((values < b.high) | ((b.high == 1) & (values <= 1)))
        assert b.images == inside.sum()
        assert b.accuracy == (correct[inside].mean() if inside.any() else None)
    for k in confidence_thresholds("x", values, correct):
        kept = values >= k.threshold
        assert k.kept == kept.mean()
        assert k.accuracy == (correct[kept].mean() if kept.any() else None)


def test_the_mean_over_sets_shares_the_trusted_images() -> None:
    generator = np.random.default_rng(1)
    trusted = generator.normal(0, 1, 200)
    near, far = generator.normal(1, 1, 150), generator.normal(2, 1, 100)
    one, other = (detection(trusted, scores, None) for scores in (near, far))
    mean = mean_detection("x", trusted, [near, far])
    assert mean.auroc.value == pytest.approx((one.auroc.value + other.auroc.value) / 2)
    assert mean.fpr95.value == pytest.approx((one.fpr95.value + other.fpr95.value) / 2)
    drawn = []
    for _ in range(400):
        t, n, f = (generator.choice(scores, len(scores)) for scores in (trusted, near, far))
        drawn.append((Curves(t, n).auroc() + Curves(t, f).auroc()) / 2)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (mean.auroc.low, mean.auroc.high) == pytest.approx((low, high), abs=0.008)
    alone = mean_detection("x", trusted, [near])
    assert (alone.auroc.low, alone.auroc.high) == pytest.approx((one.auroc.low, one.auroc.high))
    assert (alone.fpr95.low, alone.fpr95.high) == pytest.approx((one.fpr95.low, one.fpr95.high))
