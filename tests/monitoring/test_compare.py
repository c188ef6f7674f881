"""compare: what moved from one release to another, held to plain NumPy and other libraries."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from conftest import PLUGIN
from scipy import stats
from sklearn.metrics import roc_auc_score

from covcli.core.errors import CovcliError
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.evaluation.metrics import detection, share
from covcli.monitoring.changed_figures import (
    EvaluatedRelease,
    Weighted,
    both_intervals,
    compare_evaluations,
)
from covcli.monitoring.changed_signatures import (
    LEAST_WIDTH,
    StoredSignature,
    compare_signatures,
    wasserstein,
)
from covcli.monitoring.compare import Bounds, compare
from covcli.monitoring.compare_report import report_comparison
from covcli.reporting.documents import Estimate, EvaluationResult, read_evaluation
from covcli.reporting.per_image import ImageScores, read_scores
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureConfig, build_signature
from covcli.training.train import TrainResult

HALVES = ("digits?limit=700", "digits?offset=700")


@pytest.fixture(scope="module")
def halves(
    trained: TrainResult, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[StoredSignature]]:
    """Signatures of two halves of the training images, by method."""
    folder = tmp_path_factory.mktemp("halves")
    pairs = {}
    for method in ("src", "mrc", "gauss", "ensemble", "nrc", "nac"):
        paths = [
            build_signature(
                SignatureConfig(
                    trained.checkpoint,
                    method,
                    trusted=part,
                    output=folder / f"{method}-{i}",
                    mergeable=True,
                )
            ).path
            for i, part in enumerate(HALVES)
        ]
        pairs[method] = [StoredSignature(str(path), *signatures.load(path)) for path in paths]
    return pairs


def test_ranges_move_by_the_farther_end_in_widths(halves: dict[str, list[StoredSignature]]) -> None:
    before, after = halves["src"]
    change = compare_signatures(before, after)
    low, high, new_low, new_high = (
        stored.signature.state[end].double().numpy()
        for stored in (before, after) for end in ("low", "high")
    )  # fmt: skip
    width = high - low
    typical = width.mean(0)
    width = np.maximum(width, np.where(typical > 0, LEAST_WIDTH * typical, 1.0))
    distance = np.maximum(abs(new_low - low), abs(new_high - high)) / width
    assert change.relation == "data"
    [ranges] = change.changes
    # A range is compared with what is within rounding of it.
    near = partial(pytest.approx, rel=0.01, abs=1e-3)
    edges = np.cumsum([0, *before.signature.sizes])
    for point, begin, end in zip(ranges.points, edges[:-1], edges[1:], strict=True):
        assert point.moved == near(distance[:, begin:end].mean())
        assert point.largest == near(distance[:, begin:end].max())
        assert point.classes == near(distance[:, begin:end].mean(1))
    assert ranges.by_class == near(distance.mean(1))
    first = ranges.channels[0]
    assert first.moved == near(distance.max())
    k, column = np.unravel_index(distance.argmax(), distance.shape)
    assert first.class_name == before.signature.classes[k]
    assert first.before == near((low[k, column], high[k, column]))
    assert first.after == near((new_low[k, column], new_high[k, column]))


@pytest.mark.parametrize("method", ["gauss", "ensemble"])
def test_normal_distributions_move_in_deviations(
    halves: dict[str, list[StoredSignature]], method: str
) -> None:
    before, after = halves[method]
    change = compare_signatures(before, after).changes[-1]
    assert "deviations" in change.distance
    means, deviations = [], []
    for stored in (before, after):
        state = stored.signature.to_merge
        assert state is not None
        count = state["count"].double().numpy()[:, None]
        means.append((state["total"] * state["unit"]).numpy() / count)
        gauss = getattr(stored.signature.scorer, "gauss", stored.signature.scorer)
        deviations.append(gauss.deviation.double().numpy())
    moved = np.hypot(means[1] - means[0], deviations[1] - deviations[0]) / deviations[0]
    assert np.mean(change.by_class) == pytest.approx(moved.mean(), rel=1e-3)
    # Halves of one set are drawn alike: they move by about what chance says.
    assert change.by_chance is not None
    assert 0.5 < change.moved / change.by_chance < 1.6


def test_sections_move_by_the_wasserstein_distance(
    halves: dict[str, list[StoredSignature]],
) -> None:
    before, after = halves["mrc"]
    change = compare_signatures(before, after).changes[-1]
    assert "Wasserstein" in change.distance
    generator = np.random.default_rng(0)
    draws = []
    for stored in (before, after):
        state = stored.signature.state
        counts = state["sections"][3, 5].numpy()
        low, high = float(state["low"][3, 5]), float(state["high"][3, 5])
        bins = generator.choice(len(counts), 200_000, p=counts / counts.sum())
        draws.append(low + (high - low) * (bins + generator.random(len(bins))) / len(counts))
    edges, shares = [], []
    for stored in (before, after):
        state = stored.signature.state
        ends = torch.stack([state["low"][3, 5], state["high"][3, 5]]).double()
        edges.append(ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, 11, dtype=torch.float64))
        counts = state["sections"][3, 5].double()
        shares.append(torch.cat([torch.zeros(1), counts.cumsum(0) / counts.sum()]))
    exact = float(wasserstein(edges[0], shares[0], edges[1], shares[1]))
    assert exact == pytest.approx(stats.wasserstein_distance(*draws), rel=0.02)


def test_the_wasserstein_distance_of_shifted_and_crossing_distributions() -> None:
    edges = torch.tensor([[0.0, 1.0, 4.0]], dtype=torch.float64)
    shares = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    assert float(wasserstein(edges, shares, edges + 3, shares)) == pytest.approx(3)
    assert float(wasserstein(edges, shares, edges, shares)) == 0
    # Uniform on [0, 1] and on [-1, 2]: the quantiles u and 3u - 1 cross at one half.
    one = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    wide = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
    assert float(wasserstein(one, one, wide, one)) == pytest.approx(0.5)


@pytest.mark.parametrize("method", ["nrc", "nac"])
def test_other_methods_are_compared_too(
    halves: dict[str, list[StoredSignature]], method: str
) -> None:
    before, after = halves[method]
    change = compare_signatures(before, after).changes[-1]
    assert 0 < change.moved < 1
    nothing = compare_signatures(before, before)
    assert nothing.relation == "same"
    assert all(each.moved == 0 for each in nothing.changes)
    assert all(each.channels == [] for each in nothing.changes)


def test_points_and_classes_are_matched_by_name(
    halves: dict[str, list[StoredSignature]],
) -> None:
    before, after = halves["src"]
    signature, order = after.signature, torch.tensor([3, 0, 1, 2, *range(4, 10)])
    turned = replace(
        signature,
        classes=tuple(signature.classes[k] for k in order),
        state=signature.state.holding(
            {name: tensor[order] for name, tensor in signature.state.tensors.items()}
        ),
    )
    counts = tuple(after.record.trusted_counts[k] for k in order)
    other = replace(after, signature=turned, record=replace(after.record, trusted_counts=counts))
    expected = compare_signatures(before, after)
    assert compare_signatures(before, other).changes == expected.changes

    renamed = replace(turned, classes=tuple(f"x{name}" for name in turned.classes))
    with pytest.raises(CovcliError, match="shares no class"):
        compare_signatures(before, replace(other, signature=renamed))
    retrained = replace(after, signature=replace(signature, fingerprint="0" * 64))
    change = compare_signatures(before, retrained)
    assert change.relation == "network"
    assert "release" in change.meaning


# Evaluations


def test_figures_of_drawn_images_are_those_of_images_that_stand_several_times() -> None:
    generator = np.random.default_rng(3)
    trusted, untrusted = generator.normal(0, 1, 60).round(1), generator.normal(1, 1, 40).round(1)
    curve = Weighted(trusted, untrusted)
    for _ in range(5):
        counts = generator.integers(0, 4, 60), generator.integers(0, 4, 40)
        one, two = np.repeat(trusted, counts[0]), np.repeat(untrusted, counts[1])
        area, rate = curve.figures(*counts)
        labels = np.repeat([0, 1], [len(one), len(two)])
        assert area == pytest.approx(roc_auc_score(labels, np.concatenate([one, two])))
        caught = np.sort(two)[::-1][int(np.ceil(0.95 * len(two))) - 1]
        assert rate == pytest.approx((one >= caught).mean())


@pytest.fixture(scope="module")
def evaluations(
    trained: TrainResult, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EvaluatedRelease]:
    """Evaluations of two signatures on the same images, and of one on other images."""
    folder = tmp_path_factory.mktemp("evaluations")
    releases = {}
    for name, method, trusted in (("a", "src", "digits"), ("b", "gauss", "digits"),
                                  ("c", "gauss", "digits?limit=250")):  # fmt: skip
        run = folder / name
        signature = build_signature(
            SignatureConfig(trained.checkpoint, method, output=run / "signature.safetensors")
        )
        evaluate(
            EvaluationConfig(
                ("photos?limit=80", "noise:uniform?limit=60"), trained.checkpoint, signature.path,
                trusted=trusted, output=run,
            )
        )  # fmt: skip
        path = run / "evaluation.json"
        releases[name] = EvaluatedRelease(
            str(path), read_evaluation(path), read_scores(run / "scores.csv.gz")
        )
    return releases


def test_the_same_images_are_compared_in_pairs(evaluations: dict[str, EvaluatedRelease]) -> None:
    a, b = evaluations["a"], evaluations["b"]
    figures = {(c.set, c.figure): c for c in compare_evaluations(a, b).figures}
    alarms = figures["digits", "false_alarm_rate"]
    assert a.scores is not None
    assert b.scores is not None
    flags = [e.scores["trusted"].untrusted.astype(float) for e in (a, b) if e.scores is not None]
    apart = flags[1] - flags[0]
    assert alarms.difference == pytest.approx(apart.mean())
    assert alarms.how == "paired bootstrap"
    error = apart.std() / np.sqrt(len(apart))
    assert alarms.high - alarms.low == pytest.approx(2 * 1.96 * error, rel=0.2)
    for change in figures.values():
        assert change.low <= change.difference <= change.high
    # The network is the same: its accuracy and its softmax scores do not differ at all.
    for name in (("digits", "accuracy"), ("photos?limit=80", "softmax_auroc")):
        same = figures[name]
        assert (same.low, same.high, same.how) == (0, 0, "equal scores")
    for same in compare_evaluations(a, a).figures:
        assert (same.low, same.high, same.how) == (0, 0, "equal scores")
    # The same scores under another threshold: flags differ, and so may the next images' flags.
    lower = replace(a.scores["trusted"], untrusted=a.scores["trusted"].p_value < 0.2)
    stricter = replace(a, scores={**a.scores, "trusted": lower})
    assert compare_evaluations(a, stricter).figures[1].how == "paired bootstrap"


def test_other_images_are_not_compared_in_pairs(evaluations: dict[str, EvaluatedRelease]) -> None:
    b, c = evaluations["b"], evaluations["c"]
    figures = {(f.set, f.figure): f for f in compare_evaluations(b, c).figures}
    assert figures["digits → digits?limit=250", "false_alarm_rate"].how == "bootstrap"
    assert figures["photos?limit=80", "auroc"].how in ("bootstrap", "both intervals")
    without = compare_evaluations(replace(b, scores=None), c)
    assert {f.how for f in without.figures} == {"both intervals"}


def test_files_name_the_same_images_in_another_order(
    evaluations: dict[str, EvaluatedRelease],
) -> None:
    a, b = evaluations["a"], evaluations["b"]
    assert a.scores is not None
    assert b.scores is not None
    first, second = a.scores["trusted"], b.scores["trusted"]
    order = np.random.default_rng(0).permutation(len(first.predicted))
    names = np.array([f"{i}.png" for i in range(len(order))], object)
    shuffled = replace(
        second, file=names[order], untrusted=second.untrusted[order],
        predicted=second.predicted[order], label=None if second.label is None
        else second.label[order], scores={k: v[order] for k, v in second.scores.items()},
    )  # fmt: skip
    result = replace(b.result, trusted=replace(b.result.trusted, fingerprint="other"))
    one = replace(a, scores={**a.scores, "trusted": replace(first, file=names)})
    two = replace(b, result=result, scores={**b.scores, "trusted": shuffled})
    expected = compare_evaluations(a, b).figures[1]
    assert compare_evaluations(one, two).figures[1] == expected


def test_the_interval_of_two_intervals_is_the_published_one() -> None:
    # Independent normal means: the squares of the half widths add up.
    low, high = both_intervals(Estimate(0.5, 0.3, 0.7), Estimate(0.6, 0.3, 0.9))
    assert (low, high) == pytest.approx((0.1 - np.hypot(0.2, 0.3), 0.1 + np.hypot(0.2, 0.3)))
    # Correlated ones: the variance of a difference, σ² + τ² − 2ρστ.
    low, high = both_intervals(Estimate(0.5, 0.3, 0.7), Estimate(0.6, 0.3, 0.9), 0.5)
    reach = np.sqrt(0.2**2 + 0.3**2 - 2 * 0.5 * 0.2 * 0.3)
    assert (low, high) == pytest.approx((0.1 - reach, 0.1 + reach))


def _release(trusted: np.ndarray, untrusted: np.ndarray) -> EvaluatedRelease:
    """Return an evaluation of these scores, of images that are the same in each."""
    sets = {
        name: ImageScores(
            predicted=np.zeros(len(scores), int), label=np.zeros(len(scores), int),
            scores={"coverage": scores, "softmax": scores}, p_value=scores, confidence=scores,
            softmax_confidence=scores, untrusted=scores > 2, unsure=scores > 9,
        )
        for name, scores in (("trusted", trusted), ("far", untrusted))
    }  # fmt: skip
    found = detection(trusted, untrusted, untrusted > 2)
    result = SimpleNamespace(
        trusted=SimpleNamespace(
            name="t", images=len(trusted), accuracy=1.0, fingerprint="t",
            false_alarm_rate=share(trusted > 2),
        ),
        untrusted=[
            SimpleNamespace(
                name="far", fingerprint="f", scores={"coverage": found, "softmax": found}
            )
        ],
    )  # fmt: skip
    return EvaluatedRelease("", cast(EvaluationResult, result), sets)


def test_a_difference_near_perfect_figures_is_no_more_certain_than_they_are() -> None:
    """Of 50 and 50 images one pair is in the wrong order before, and none after."""
    trusted, untrusted = np.linspace(0, 1, 50), np.linspace(2, 3, 50)
    worse = trusted.copy()
    worse[0] = 2.01
    before, after = _release(worse, untrusted), _release(trusted, untrusted)
    auroc = next(f for f in compare_evaluations(before, after).figures if f.figure == "auroc")
    assert (auroc.how, auroc.difference) == ("paired bootstrap", pytest.approx(1 / 2500))
    one, two = (
        each.result.untrusted[0].scores["coverage"].auroc for each in (before, after)
    )  # fmt: skip
    # The draws of a perfect score do not vary: nothing is correlated with them.
    assert auroc.low == pytest.approx(
        1 / 2500 - np.hypot(two.value - two.low, one.high - one.value)
    )
    assert auroc.high == pytest.approx(1 / 2500 + one.value - one.low)
    # Two scores that err on the same images: together more certain than one beside the other.
    noisy = np.random.default_rng(0).normal([[0], [2]], 1, (2, 300))
    alike = _release(*noisy), _release(*(noisy + np.random.default_rng(1).normal(0, 0.1, (2, 300))))
    for figure in compare_evaluations(*alike).figures[2:4]:
        one, two = (
            getattr(each.result.untrusted[0].scores["coverage"], figure.figure) for each in alike
        )
        low, high = both_intervals(one, two)
        assert figure.high - figure.low < 0.6 * (high - low)


# The command


def covcli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "covcli", "compare", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_two_runs_are_compared_and_bounds_end_the_pipeline(evaluated: Path) -> None:
    runs = evaluated.parent
    other = runs / "other"
    shutil.copytree(evaluated, other)
    for old in other.glob("signature-*"):
        old.unlink()
    build_signature(
        SignatureConfig(
            other / "checkpoint.pt", "mrc", trusted="digits?limit=500",
            output=other / "signature-mrc.safetensors",
        )
    )  # fmt: skip
    done = covcli("tiny", "other", "--json", "--output", "report", cwd=runs)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["signatures"]["relation"] == "data"
    assert {f["difference"] for f in document["evaluations"]["figures"]} == {0}
    page = (runs / "report" / "comparison.html").read_text()
    assert "<svg" in page
    assert "differences come from the data" in page
    markdown = (runs / "report" / "comparison.md").read_text()
    assert "| coverage point |" in markdown
    for picture in ("moved-0.png", "differences.png"):
        assert (runs / "report" / "figures" / picture).is_file()

    done = covcli("tiny", "other", "--fail-over", "points=1e-6", cwd=runs)
    assert done.returncode == 1
    assert "Moved: ranges, in widths" in done.stdout
    assert done.stderr.startswith("exceeded: ")
    done = covcli("tiny", "none", cwd=runs)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none: no such file")
    assert compare(evaluated, other, Bounds.parse(["figures=0"])).exceeded == []
    document = json.loads((other / "evaluation.json").read_text())
    gone = document["untrusted"].pop()["name"]  # a gate must not pass because a set is missing
    (other / "evaluation.json").write_text(json.dumps(document))
    lines = compare(evaluated, other, Bounds.parse(["figures=1"])).exceeded
    assert lines == [f"{gone} is only in the first evaluation"]
    for one, two, reason in (
        (evaluated, PLUGIN, "not a covcli signature"),
        (evaluated / "signature-mrc.safetensors", other / "evaluation.json", "has nothing that"),
        (evaluated, evaluated / "figures", "no such file"),
        (evaluated, runs, "holds neither a signature nor an evaluation"),
    ):
        with pytest.raises(CovcliError, match=reason):
            compare(one, two)


def test_a_reader_that_leaves_early_is_no_error(run: Path) -> None:
    command = f"{sys.executable} -m covcli compare {run} {run} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_bounds_are_told_by_name() -> None:
    assert Bounds.parse([]) == Bounds(None, None)
    assert Bounds.parse(["points=0.1"]) == Bounds(0.1, None)
    with pytest.raises(CovcliError, match="cannot be read"):
        Bounds.parse(["-1"])


def test_a_bound_of_nothing_is_refused(run: Path) -> None:
    signature = run / "signature-mrc.safetensors"
    for texts in (["0.1"], ["points=0.1"], ["figures=0.1", "points=0.1"]):
        assert compare(signature, signature, Bounds.parse(texts)).exceeded == []
    with pytest.raises(CovcliError, match="bounds nothing: there are no two evaluations"):
        compare(signature, signature, Bounds.parse(["figures=0.1"]))


def test_a_comparison_is_reported_once(run: Path, tmp_path: Path) -> None:
    comparison = compare(run, run)
    assert comparison.signatures is not None
    assert comparison.signatures.largest == 0
    report_comparison(comparison, tmp_path)
    with pytest.raises(CovcliError, match="exists"):
        report_comparison(comparison, tmp_path)
    report_comparison(comparison, tmp_path, force=True)
