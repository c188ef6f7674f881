"""Marginal and certified guarantees: ranks, least numbers, coverage by simulation, files."""

import dataclasses
import json
import math
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import beta, binom, binomtest

from covcli import __main__ as boundary
from covcli.core import files
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.reporting.report import report
from covcli.reporting.terminal import show_evaluation
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.calibration import Calibration, check_images, images_for
from covcli.signature.combination import fit_combination
from covcli.signature.guarantee import (
    MODES,
    Guarantee,
    GuaranteeRequest,
    binomial_interval,
    make_rule,
    minimum_certified,
    minimum_marginal,
    rank_certified,
    rank_marginal,
    total_alarms_interval,
)
from covcli.signature.monitor import Monitor
from covcli.signature.signature import load_signature, save_signature
from covcli.training.train import TrainResult

ALPHAS = ["0.001", "0.01", "0.05", "0.1", "0.29", "0.5", "0.9"]
DRAWS = 1000


def brute_certified(n: int, alpha: Fraction) -> int:
    """Return the largest k with P(Binomial(n, α) ≥ k) ≥ 95/100, in exact fractions."""
    below, k = Fraction(0), 0
    while True:
        below += math.comb(n, k) * alpha**k * (1 - alpha) ** (n - k)  # P(Binomial ≤ k)
        if 1 - below < Fraction(95, 100):
            return k
        k += 1


@pytest.mark.parametrize("text", ALPHAS)
def test_ranks_are_the_largest_that_keep_the_guarantee(text: str) -> None:
    alpha, exact = float(text), Fraction(text)
    for n in [*range(0, 70), 99, 100, 298, 299, 300]:
        k = rank_certified(n, alpha)
        assert k == brute_certified(n, exact)
        assert (k >= 1) == (n >= minimum_certified(alpha))
        if k:  # the same said by the Beta law of the rate above the k-th largest
            assert beta(k, n + 1 - k).cdf(alpha) >= 0.95
            assert k == n or beta(k + 1, n - k).cdf(alpha) < 0.95
        k = rank_marginal(n, alpha)
        assert Fraction(k, n + 1) <= exact < Fraction(k + 1, n + 1)
        assert (k >= 1) == (n >= minimum_marginal(alpha))


@pytest.mark.parametrize(
    ("mode", "alpha", "scores", "images"),
    [("certified", 0.05, 59, 79), ("certified", 0.01, 299, 399),
     ("marginal", 0.05, 19, 26), ("marginal", 0.01, 99, 132)],
)  # fmt: skip
def test_the_least_numbers(mode: str, alpha: float, scores: int, images: int) -> None:
    guarantee = Guarantee(alpha, mode)  # type: ignore[arg-type]
    assert guarantee.minimum() == scores
    assert (guarantee.rank(scores - 1), guarantee.rank(scores)) == (0, 1)
    # A quarter of the images, rounded up, fits the scale: so many of N rank.
    assert [n - math.ceil(n / 4) >= scores for n in (images - 1, images)] == [0, 1]
    assert images_for(scores) == images
    check_images(images, guarantee, 1)
    with pytest.raises(CovcliError, match=f"at least {images} calibration images"):
        check_images(images - 1, guarantee, 1)
    known(scores).rule(guarantee, ("only",))
    with pytest.raises(CovcliError, match=rf"{scores - 1} calibration .* at least {images} cal"):
        known(scores - 1).rule(guarantee, ("only",))


def known(*per_class: int) -> Calibration:
    """Make a calibration with so many scores of each predicted class."""
    scores = torch.arange(sum(per_class), dtype=torch.float64)
    predicted = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    combination = fit_combination(torch.eye(2).double(), [])
    fitting = torch.zeros(len(scores), dtype=torch.bool)
    return Calibration(combination, fitting, scores, scores, predicted)


def test_every_class_needs_its_own_scores_and_the_poorest_is_named() -> None:
    guarantee, names = Guarantee(0.05, "certified"), ("cat", "dog", "fox")
    known(59, 59, 59).rule(guarantee, names)
    for counts, name, short in (((59, 58, 300), "dog", 1), ((58, 300), "fox", 2)):
        with pytest.raises(CovcliError) as caught:
            known(*counts).rule(guarantee, names)
        assert f"predicted as {name!r} (short: {short} of 3 classes)" in str(caught.value)
        assert "at least 79 calibration images of each predicted class" in str(caught.value)
        known(*counts).rule(Guarantee(0.05), names)
    # Whatever is predicted, 3·59 scores are needed, that is 236 images.
    check_images(236, guarantee, 3)
    with pytest.raises(CovcliError, match="235 calibration images are too few"):
        check_images(235, guarantee, 3)


SHARES = np.array([0.6, 0.3, 0.1])  # of the predicted classes, whose scores are exponential
SCALES = np.array([1.0, 2.0, 0.5])
N = 1000


def draw(generator: np.random.Generator, grain: float) -> tuple[torch.Tensor, torch.Tensor]:
    predicted = generator.choice(3, N, p=SHARES)
    scores = generator.exponential(SCALES[predicted])
    scores = np.floor(scores / grain) * grain if grain else scores
    return torch.from_numpy(scores), torch.from_numpy(predicted)


def rates(thresholds: np.ndarray, grain: float) -> np.ndarray:
    """Return P(score > threshold) by class, and overall as the last, in closed form."""
    # With values on a grid, above τ means from the next grid point on.
    above = np.floor(thresholds / grain + 1 + 1e-9) * grain if grain else thresholds
    by_class = np.exp(-np.maximum(above, 0) / SCALES)
    return np.append(by_class, (SHARES * by_class).sum())


@pytest.mark.parametrize("alpha", [0.05, 0.1])
@pytest.mark.parametrize("grain", [0.0, 0.25], ids=["continuous", "ties"])
def test_certified_rates_exceed_alpha_in_five_of_a_hundred_calibrations_at_most(
    alpha: float, grain: float
) -> None:
    generator = np.random.default_rng(7)
    exceeded = np.zeros(4)
    alone = 0
    for _ in range(DRAWS):
        scores, predicted = draw(generator, grain)
        rule = make_rule(scores, predicted, 3, Guarantee(alpha, "certified"))
        exceeded += rates(rule.thresholds.numpy(), grain) > alpha
        few = make_rule(scores[:100], predicted[:100], 3, Guarantee(alpha, "certified"))
        alone += rates(np.full(3, few.overall), grain)[-1] > alpha
    assert (exceeded <= binom.ppf(0.999, DRAWS, 0.05)).all(), exceeded
    # The overall threshold of a hundred scores has exactly the Beta law where no two are equal:
    # a rank one higher or lower would show.
    k = brute_certified(100, Fraction(str(alpha)))
    chance = beta(k, 101 - k).sf(alpha)
    assert alone <= binom.ppf(0.9995, DRAWS, chance)
    if not grain:
        assert alone >= binom.ppf(0.0005, DRAWS, chance)
        assert exceeded[1] >= binom.ppf(0.0005, DRAWS, 0.03)  # the class that needs its own


def test_a_marginal_rate_is_alpha_in_the_mean_and_no_class_is_promised_it() -> None:
    generator = np.random.default_rng(8)
    drawn = []
    for _ in range(DRAWS):
        rule = make_rule(*draw(generator, 0.0), 3, Guarantee(0.05))
        drawn.append(rates(rule.thresholds.numpy(), 0.0))
    mean = np.mean(drawn, 0)
    k = rank_marginal(N, 0.05)
    deviation = beta(k, N + 1 - k).std() / math.sqrt(DRAWS)
    assert mean[3] == pytest.approx(k / (N + 1), abs=4 * deviation)
    assert mean[1] > 0.1  # twice what was asked for, in the class of large scores


def test_by_class_the_rate_of_each_class_is_alpha_in_the_mean() -> None:
    generator = np.random.default_rng(10)
    drawn, values, expected = [], np.zeros(3), []
    for _ in range(DRAWS):
        rule = make_rule(*draw(generator, 0.0), 3, Guarantee(0.05, "by-class"))
        drawn.append(rates(rule.thresholds.numpy(), 0.0)[:3])
        expected.append([rank_marginal(int(n), 0.05) / (int(n) + 1) for n in rule.counts])
        new = torch.from_numpy(generator.exponential(SCALES))
        values += rule.p_value(new, torch.arange(3)).numpy() <= 0.05
    mean = np.mean(drawn, 0)
    deviation = np.std(np.subtract(drawn, expected), 0) / math.sqrt(DRAWS)
    assert (np.abs(mean - np.mean(expected, 0)) < 4 * deviation).all()
    assert (values <= binom.ppf(0.999, DRAWS, 0.05)).all()
    assert (values >= binom.ppf(0.001, DRAWS, 0.04)).all()


def test_p_values_by_class_follow_the_definition_within_the_class() -> None:
    generator = np.random.default_rng(11)
    scores, predicted = draw(generator, 0.25)
    rule = make_rule(scores, predicted, 3, Guarantee(0.05, "by-class"))
    new, kinds = draw(generator, 0.25)
    expected = [
        (1 + int((scores[predicted == k] >= s).sum())) / (1 + int((predicted == k).sum()))
        for s, k in zip(new, kinds, strict=True)
    ]
    np.testing.assert_array_equal(rule.p_value(new, kinds).numpy(), expected)
    assert torch.equal(rule.untrusted(new, kinds), rule.p_value(new, kinds) <= 0.05)


def test_the_total_of_the_classes_alarms_has_the_law_of_their_sum() -> None:
    generator = np.random.default_rng(12)
    groups = [(5, 99, 40), (2, 50, 7), (11, 220, 130)]
    rates = [generator.beta(k, n + 1 - k, 200_000) for k, n, _ in groups]
    drawn = sum(generator.binomial(g[2], rate) for g, rate in zip(groups, rates, strict=True))
    low, high = (end * 177 for end in total_alarms_interval(groups))
    assert abs(np.mean(drawn < low) - 0.02) < 0.02
    assert np.mean(drawn <= low) >= 0.025 - 0.002
    assert np.mean(drawn <= high) >= 0.975 - 0.002
    assert np.mean(drawn <= high - 1) < 0.975 + 0.002


def answers(generator: np.random.Generator, n: int) -> tuple[Calibration, torch.Tensor]:
    """Draw n answers whose doubt u is uniform, wrong with a probability of 0.3·u², in 3 classes.

    The score is independent of the doubt; of class 2 answers are wrong twice as often.
    """
    doubt, predicted = generator.random(n), generator.choice(3, n, p=SHARES)
    wrong = generator.random(n) < 0.3 * doubt**2 * np.where(predicted == 2, 2, 1)
    scores = np.sort(generator.exponential(size=n))
    parts = [torch.from_numpy(a) for a in (scores, doubt, predicted, wrong)]
    combination = fit_combination(torch.eye(2).double(), [])
    return Calibration(combination, torch.zeros(n, dtype=torch.bool), *parts), parts[2]


@pytest.mark.parametrize("mode", MODES)
def test_answers_that_pass_are_wrong_at_most_as_often_as_promised(mode: str) -> None:
    """R(t) = 0.1·t²·(1 + share of class 2) in closed form, whatever the score's threshold."""
    generator = np.random.default_rng(13)
    guarantee = Guarantee(0.1, mode, 0.04)  # type: ignore[arg-type]
    exceeded, kept, names = 0, [], ("a", "b", "c")
    for _ in range(300):
        rule = answers(generator, 3000)[0].rule(guarantee, names)
        t = rule.doubts.clamp(0, 1).numpy()
        factor = np.array([1, 1, 2])
        wrong, passing = SHARES * 0.1 * t**3 * factor, SHARES * t
        each = 0.1 * t**2 * factor > 0.04
        exceeded += each.any() if mode == "by-class" else wrong.sum() > 0.04 * passing.sum()
        kept.append(passing.sum())
    assert exceeded <= binom.ppf(0.999, 300, 0.05)
    assert np.mean(kept) > 0.3


def test_unsure_is_familiar_and_doubtful_or_just_below_the_alarm() -> None:
    calibration, predicted = answers(np.random.default_rng(14), 3000)
    rule = calibration.rule(Guarantee(0.1, "certified", 0.04), ("a", "b", "c"))
    scores, doubt = calibration.scores, calibration.softmax
    untrusted = rule.untrusted(scores, predicted)
    unsure = rule.unsure(scores, predicted, doubt)
    assert not bool((untrusted & unsure).any())
    passing = ~(untrusted | unsure)
    expected = (scores < rule.overall) & (doubt < rule.doubts[predicted])
    assert torch.equal(passing, expected & ~untrusted)
    assert bool(unsure.any())


def test_an_error_bound_that_cannot_be_shown_is_refused_with_the_number_needed() -> None:
    generator, names = np.random.default_rng(15), ("a", "b", "c")
    with pytest.raises(
        CovcliError, match=r"calibration answers are too few .* 0.02; at least 2\d\d"
    ):
        answers(generator, 150)[0].rule(Guarantee(0.1, "marginal", 0.02), names)
    calibration = answers(generator, 3000)[0]
    hopeless = dataclasses.replace(calibration, wrong=calibration.softmax < 0.9)
    with pytest.raises(CovcliError, match=r"no share of the answers .* raise --max-error"):
        hopeless.rule(Guarantee(0.1, "marginal", 0.02), names)
    unlabelled = dataclasses.replace(calibration, wrong=None)
    with pytest.raises(CovcliError, match=r"max-error 0.02: needs calibration images with labels"):
        unlabelled.rule(Guarantee(0.1, "marginal", 0.02), names)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_the_number_needed_for_an_error_bound_is_that_of_the_alpha_asked_for(alpha: float) -> None:
    """Not of the stored one: a share 1 − α of three in four images passes the alarm."""
    calibration = answers(np.random.default_rng(15), 150)[0]
    assert calibration.guarantee.alpha not in (0.1, 0.5)
    answered = math.ceil(math.log(0.05) / math.log(0.98))  # without a wrong one among them
    needed = math.ceil(math.ceil(answered / (1 - alpha)) * 4 / 3)
    with pytest.raises(CovcliError, match=f"at least {needed} calibration images"):
        calibration.rule(Guarantee(alpha, "marginal", 0.02), ("a", "b", "c"))


@pytest.mark.parametrize("mode", MODES)
def test_verdicts_and_confidences_agree_class_by_class(mode: str) -> None:
    generator = np.random.default_rng(9)
    scores, predicted = draw(generator, 0.25)
    shifted = scores - 2.0  # thresholds above and below 0
    for values in (scores, shifted):
        rule = make_rule(values, predicted, 3, Guarantee(0.05, mode))  # type: ignore[arg-type]
        flagged = rule.untrusted(values, predicted)
        for k in range(3):
            mine = values[predicted == k]
            assert int(flagged[predicted == k].sum()) == int((mine > rule.thresholds[k]).sum())
            if mode == "by-class":
                assert int(flagged[predicted == k].sum()) < rank_marginal(len(mine), 0.05)
            if mode == "certified":  # with ties too, fewer lie above than the rank allows
                assert int(flagged[predicted == k].sum()) < rank_certified(len(mine), 0.05)
        confidence = rule.confidence(values, predicted)
        assert torch.equal(flagged, confidence < 0.5)
        assert bool(((confidence >= 0) & (confidence <= 1)).all())
    tau = make_rule(scores, predicted, 3, Guarantee(0.05, mode)).thresholds  # type: ignore[arg-type]
    rule = make_rule(scores, predicted, 3, Guarantee(0.05, mode))  # type: ignore[arg-type]
    confidences = rule.confidence(0.5 * tau, torch.arange(3))
    np.testing.assert_allclose(confidences, 2**-0.5)


@pytest.mark.parametrize(("alarms", "images"), [(0, 20), (3, 50), (50, 50)])
def test_the_exact_interval_is_that_of_clopper_and_pearson(alarms: int, images: int) -> None:
    low, high = binomial_interval(alarms, images)
    truth = binomtest(alarms, images).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((truth.low, truth.high), abs=1e-12)


def test_a_guarantee_changes_only_where_told() -> None:
    stored = Guarantee(0.2, "certified")
    assert stored.changed(GuaranteeRequest()) == stored
    assert stored.changed(GuaranteeRequest(0.1)) == Guarantee(0.1, "certified")
    assert stored.changed(GuaranteeRequest(guarantee="marginal")) == Guarantee(0.2, "marginal")
    assert stored.changed(GuaranteeRequest(max_error=0.02)) == Guarantee(0.2, "certified", 0.02)
    assert Guarantee(max_error=0.1).changed(GuaranteeRequest(0.1)).max_error == 0.1
    with pytest.raises(CovcliError, match="did you mean 'certified'"):
        stored.changed(GuaranteeRequest(guarantee="certifed"))  # type: ignore[arg-type]


@pytest.fixture
def certified(run: Path) -> Path:
    """The run with a signature that stores a certified α of 0.25."""
    config = SignatureConfig(
        run / "checkpoint.pt", "mrc", alpha=0.25, guarantee="certified", force=True
    )
    assert build_signature(config, Silent()).guarantee == Guarantee(0.25, "certified")
    return run


def test_the_stored_guarantee_is_used_by_evaluation_and_monitor_alike(
    certified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, calibration, _ = signatures.load(certified / "signature-mrc.safetensors")
    assert calibration.guarantee == Guarantee(0.25, "certified")
    config = EvaluationConfig(
        ("noise:uniform?limit=30",), runs=certified.parent, output=tmp_path / "a"
    )
    result = evaluate(config, Silent())
    digits = datasets.load("digits", "test")
    images = digits.batch(torch.arange(len(digits)), (3, 32, 32))
    names = (certified / "checkpoint.pt", certified / "signature-mrc.safetensors")
    verdicts = Monitor.load(*names)(images)
    mine = pd.read_csv(tmp_path / "a" / "scores.csv.gz").query("set == 'trusted'")
    np.testing.assert_array_equal(mine["untrusted"].astype(bool), verdicts.untrusted)
    np.testing.assert_allclose(mine["confidence"], verdicts.confidence, rtol=1e-4)
    assert torch.equal(verdicts.untrusted, verdicts.confidence < 0.5)
    # By hand: the larger of two order statistics, each with its own exact rank.
    scores = calibration.scores.numpy()
    overall = np.sort(scores)[-brute_certified(len(scores), Fraction(1, 4))]
    for k, entry in enumerate(result.trusted.false_alarms_by_class):
        own = np.sort(scores[calibration.predicted.numpy() == k])
        threshold = max(overall, own[-brute_certified(len(own), Fraction(1, 4))])
        here = mine[mine["predicted"] == k]
        assert entry.threshold == threshold
        assert (entry.images, entry.calibration_scores) == (len(here), len(own))
        assert entry.alarms == (here["score"] > threshold).sum()
        assert entry.promised_high is not None
    assert sum(c.alarms for c in result.trusted.false_alarms_by_class) == mine["untrusted"].sum()
    assert (result.guarantee.mode, result.guarantee.confidence) == ("certified", 0.95)

    other = evaluate(
        dataclasses.replace(config, guarantee="marginal", alpha=0.1, output=tmp_path / "b"),
        Silent(),
    )
    assert (other.guarantee.mode, other.trusted.false_alarm_rate.alpha) == ("marginal", 0.1)
    assert {c.promised_high for c in other.trusted.false_alarms_by_class} == {None}
    marginal = Monitor.load(*names, alpha=0.1, guarantee="marginal")(images)
    assert torch.equal(marginal.untrusted, marginal.p_value <= 0.1)
    assert int(marginal.untrusted.sum()) == sum(
        c.alarms for c in other.trusted.false_alarms_by_class
    )
    for evaluation in (result, other):
        show_evaluation(evaluation)
        shown = " ".join(capsys.readouterr().out.split())
        assert evaluation.guarantee.statement in shown
        assert "no longer exchangeable with the calibration images" in shown
    page = report(tmp_path / "a").markdown.read_text()
    assert result.guarantee.statement in page
    assert "## False alarms by predicted class" in page
    document = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert document["guarantee"] == files.plain(dataclasses.asdict(result.guarantee))


def test_the_baseline_gets_its_thresholds_by_the_same_guarantee(certified: Path) -> None:
    signature, calibration, _ = signatures.load(certified / "signature-mrc.safetensors")
    for guarantee in (Guarantee(0.25, "certified"), Guarantee(0.1)):
        rule = calibration.softmax_rule(guarantee, signature.classes)
        flagged = rule.untrusted(calibration.softmax, calibration.predicted)
        assert 0 < int(flagged.sum()) < guarantee.rank(len(flagged))


@pytest.mark.parametrize(
    "entry",
    [{"mode": "sure"}, {"alpha": "0.05"}, {"alpha": 1}, {"alpha": 1.5}, {"mode": []}, {"more": 1},
     {"alpha": True}, {"alpha": 0.0}, {"alpha": None}, {"max_error": 0.0}, {"max_error": "0.1"},
     {"max_error": True}, None, [], 3],
)  # fmt: skip
def test_a_crafted_guarantee_is_refused(run: Path, entry: object) -> None:
    path = run / "signature-mrc.safetensors"
    tensors, metadata = load_signature(path)
    del metadata["checksum"]
    whole = {"alpha": 0.05, "mode": "marginal", "max_error": None}
    crafted = whole | entry if isinstance(entry, dict) else entry
    save_signature(path, tensors, {**metadata, "guarantee": crafted})
    with pytest.raises(CovcliError, match="is inconsistent"):
        signatures.load(path)


def test_too_few_images_are_refused_with_the_number_needed(
    trained: TrainResult, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", str(tmp_path / "s")]
    sign = ["build-signature", str(trained.checkpoint), "--method", "src", *out]
    few = ["--calibration", "digits?split=train&limit=100"]
    evaluation = ["evaluate", "--runs", str(run.parent), "--untrusted", "photos", "--force"]
    certify = ["--guarantee", "certified"]
    commands = {
        "seen before any work": ([*sign, *certify], r"359 calibration images .* at least 79 "),
        "one class short": ([*sign, *certify, "--alpha", "0.11"],
                            r"predicted as '\d' \(short: \d.* at least \d+ calibration images of"),
        "marginal": ([*sign, *few, "--alpha", "0.01"], r"100 calibration .* at least 132 "),
        "evaluation": ([*evaluation, *certify], r"predicted as '\d' .* at least 79 calibration"),
        "no such mode": ([*evaluation, "--guarantee", "sure"], "--guarantee"),
        "no such alpha": ([*sign, "--alpha", "1"], "--alpha 1.0: must be less than 1"),
    }  # fmt: skip
    for name, (arguments, message) in commands.items():
        with pytest.raises(SystemExit) as caught:
            boundary.main(arguments)
        out_text, err = capsys.readouterr()
        assert (name, caught.value.code, out_text) == (name, 2, "")
        assert re.search(message, err.splitlines()[-1]), (name, err)
    assert not (tmp_path / "s").exists()


def _coloured(per_class: int, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images whose channel of their class is the brightest, class after class."""
    labels = torch.arange(classes).repeat_interleave(per_class)
    images = 0.3 * torch.rand(len(labels), classes, 4, 4)
    images[torch.arange(len(labels)), labels] += 0.5
    return images, labels


@pytest.mark.parametrize(("mode", "enough"), [("by-class", 26), ("certified", 79)])
def test_so_many_images_of_each_predicted_class_are_enough(mode: str, enough: int) -> None:
    """What the page and the error promise, through the code path of the command."""
    network = torch.nn.Sequential(
        torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(10, 10, bias=False),
    )  # fmt: skip
    network[3].weight.data = 20 * torch.eye(10)
    build = partial(Monitor.build, network, _coloured(20), method="src", guarantee=mode)
    for seed in range(3):
        rule = build(_coloured(enough), seed=seed).judge.rule
        assert int(rule.counts.min()) >= Guarantee(0.05, mode).minimum()  # type: ignore[arg-type]
    with pytest.raises(CovcliError, match=f"at least {enough} calibration images of each"):
        build(_coloured(enough - 1))
    # A quarter of all images leaves some classes with too few scores, and the error says why.
    marginal = Monitor.build(network, _coloured(20), _coloured(enough), method="src").judge
    with pytest.raises(CovcliError, match=f"of each class if the signature is built with {mode}"):
        marginal.calibration.rule(Guarantee(0.05, mode), marginal.signature.classes)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-9, 1 / 3, 2 / 3, 0.1 + 0.2, 1 - 2**-53])
@pytest.mark.parametrize("mode", MODES)
def test_rates_at_the_ends_are_refused_or_kept(mode: str, alpha: float) -> None:
    """No rate overflows, and p ≤ α in floating point means "untrusted", and nothing else does."""
    guarantee = Guarantee(alpha, mode, max_error=alpha)  # type: ignore[arg-type]
    for n in (1, 2, 8, 29, 300):
        calibration = known(n)
        try:
            rule = make_rule(calibration.scores, calibration.predicted, 1, guarantee)
            calibration.rule(dataclasses.replace(guarantee, max_error=None), ("only",))
        except CovcliError as error:
            assert "too few" in str(error)
            assert guarantee.rank(n) == 0
            continue
        new = torch.arange(n + 1) - 0.5
        only = torch.zeros(n + 1, dtype=torch.int64)
        flagged, p_value = rule.untrusted(new, only), rule.p_value(new, only)
        if guarantee.certain:
            assert bool((p_value[flagged] <= alpha).all())
        else:
            assert torch.equal(flagged, p_value <= alpha)
    labelled = dataclasses.replace(known(4), wrong=torch.ones(4, dtype=torch.bool))
    with pytest.raises(CovcliError, match="needed"):
        labelled.rule(Guarantee(0.4, "marginal", 1e-300), ("only",))
