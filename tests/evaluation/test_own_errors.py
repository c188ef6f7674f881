"""Selective risk, against averages over real orders of ties and against closed forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from covcli.evaluation.own_errors import own_errors
from covcli.reporting.documents import OwnErrors

FIGURES = ("auroc", "aurc", "excess_aurc", "augrc")


def naive_risks(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Average the selective risks over every order of the images that respects the scores."""
    risks = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] <= scores[b] for a, b in itertools.pairwise(order)):
            errors = np.cumsum(~correct[list(order)])
            risks.append(errors / np.arange(1, len(scores) + 1))
    return np.mean(risks, 0)


def measured(scores: np.ndarray, correct: np.ndarray) -> OwnErrors:
    figures = own_errors({"x": scores}, correct)
    assert figures is not None
    return figures["x"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=6).filter(
        lambda images: len({correct for _, correct in images}) == 2
    )
)
def test_every_figure_is_the_mean_over_the_orders_of_ties(images: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in images], float)
    correct = np.array([right for _, right in images])
    figures = measured(scores, correct)
    risks = naive_risks(scores, correct)
    assert figures.aurc.value == pytest.approx(risks.mean())
    best = naive_risks((~correct).astype(float), correct).mean()
    assert figures.excess_aurc.value == pytest.approx(risks.mean() - best, abs=1e-12)
    assert figures.auroc.value == pytest.approx(roc_auc_score(~correct, scores))
    assert [r.risk for r in figures.curve] == pytest.approx(list(risks))
    assert [r.kept for r in figures.curve] == pytest.approx(
        list(np.arange(1, len(risks) + 1) / len(risks))
    )
    turned = measured(scores[::-1].copy(), correct[::-1].copy())
    assert turned.curve == figures.curve
    assert turned.aurc.value == figures.aurc.value


def test_perfect_ignorant_and_random_scores_have_their_closed_forms() -> None:
    generator = np.random.default_rng(0)
    correct = generator.random(20_000) > 0.1
    rate = 1 - correct.mean()
    perfect = measured((~correct).astype(float) + generator.random(len(correct)) / 2, correct)
    assert perfect.excess_aurc.value == pytest.approx(0, abs=1e-12)
    assert perfect.auroc.value == 1
    # Geifman et al. 2019, section 3: in the limit the best area is r + (1 - r) log(1 - r).
    assert perfect.aurc.value == pytest.approx(rate + (1 - rate) * np.log(1 - rate), abs=1e-4)
    ignorant = measured(np.zeros(len(correct)), correct)
    assert ignorant.aurc.value == pytest.approx(rate)
    assert ignorant.auroc.value == 0.5
    assert {round(r.risk, 12) for r in ignorant.curve} == {round(rate, 12)}
    random = measured(generator.random(len(correct)), correct)
    assert random.aurc.value == pytest.approx(rate, abs=0.01)
    assert len(random.curve) == 101
    assert (random.curve[0].kept, random.curve[-1].kept) == (1 / 20_000, 1)
    assert random.curve[-1].risk == pytest.approx(rate)


def test_augrc_is_the_mean_share_kept_and_wrong() -> None:
    generator = np.random.default_rng(2)
    correct = generator.random(300) > 0.2
    scores = np.round(generator.normal(0, 1, 300) + ~correct, 1)
    augrc = measured(scores, correct).augrc
    assert augrc is not None
    # Its curve runs straight between distinct scores: Traub et al. 2024, section 3.
    order = np.sort(np.unique(scores))
    kept = np.array([0.0, *((scores <= score).mean() for score in order)])
    wrong = np.array([0.0, *(((scores <= score) & ~correct).mean() for score in order)])
    assert augrc.value == pytest.approx(np.trapezoid(wrong, kept))
    assert augrc.low < augrc.value < augrc.high


def test_the_interval_is_that_of_resampled_images() -> None:
    generator = np.random.default_rng(1)
    correct = generator.random(600) > 0.3
    scores = generator.normal(0, 1, 600) + ~correct
    drawn = []
    for _ in range(400):
        rows = generator.integers(0, 600, 600)
        order = np.argsort(scores[rows])
        wrong = np.cumsum(~correct[rows][order])
        best = np.cumsum(np.sort(~correct[rows]))
        kept = np.arange(1, 601)
        drawn.append(((wrong / kept).mean(), ((wrong - best) / kept).mean(), wrong.mean() / 600))
    figures = measured(scores, correct)
    assert figures.augrc is not None
    ends = np.percentile(drawn, [2.5, 97.5], axis=0).T
    for estimate, truth in zip(
        (figures.aurc, figures.excess_aurc, figures.augrc), ends, strict=True
    ):
        assert (estimate.low, estimate.high) == pytest.approx(truth, abs=0.012)
    assert measured(scores, correct) == figures


@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_simulated_figures_lie_in_their_intervals(deviation: float) -> None:
    wrong, area, images = 0.1, 0.95, 300
    shift = np.hypot(1, deviation) * norm.ppf(area)
    generator = np.random.default_rng(4)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        correct = generator.random(count) > wrong
        normal = generator.normal(size=count)
        return np.where(correct, normal, shift + deviation * normal), correct

    truth = measured(*drawn(1_000_000))
    held = []
    for _ in range(150):
        figures = measured(*drawn(images))
        pairs = [(getattr(figures, key), getattr(truth, key).value) for key in FIGURES]
        held.append([figure.low <= value <= figure.high for figure, value in pairs])
    assert (np.mean(held, 0) >= 0.92).all()


def test_a_network_without_errors_or_with_nothing_else_has_no_figures() -> None:
    for correct in (np.ones(5, bool), np.zeros(5, bool)):
        assert own_errors({"x": np.arange(5.0)}, correct) is None
