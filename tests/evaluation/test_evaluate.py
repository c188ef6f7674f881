"""evaluate against the monitor and against plain figures."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import UNTRUSTED, neurons_of

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.evaluation.inputs import find_files
from covcli.reporting.report import report
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureResult
from covcli.signature.monitor import Monitor
from covcli.training.train import TrainResult


def test_evaluation_agrees_with_the_monitor_and_with_plain_figures(evaluated: Path) -> None:
    from sklearn.metrics import roc_auc_score

    document = json.loads((evaluated / "evaluation.json").read_text())
    table = pd.read_csv(evaluated / "scores.csv.gz")
    monitor = Monitor.load(
        evaluated / "checkpoint.pt", evaluated / "signature-mrc.safetensors", alpha=0.05
    )
    digits = datasets.load("digits", "test")
    verdicts = monitor(digits.batch(torch.arange(len(digits)), (3, 32, 32)))
    mine = table[table["set"] == "trusted"]
    np.testing.assert_allclose(mine["score"], verdicts.score, rtol=1e-4)
    np.testing.assert_array_equal(mine["predicted"], verdicts.predicted)
    np.testing.assert_array_equal(mine["untrusted"].astype(bool), verdicts.untrusted)
    np.testing.assert_allclose(mine["confidence"], verdicts.confidence, rtol=1e-4)
    trusted = document["trusted"]
    assert trusted["accuracy"] == pytest.approx((mine["label"] == mine["predicted"]).mean())
    assert trusted["false_alarm_rate"]["value"] == pytest.approx(mine["untrusted"].mean())
    assert [entry["name"] for entry in document["untrusted"]] == list(UNTRUSTED)
    for entry in document["untrusted"]:
        other = table[table["set"] == entry["name"]]
        assert len(other) == entry["images"]
        truth = [0] * len(mine) + [1] * len(other)
        for name, column, sign in (("coverage", "score", 1), ("softmax", "softmax_confidence", -1)):
            scores = sign * pd.concat([mine[column], other[column]])
            figures = entry["scores"][name]
            assert figures["auroc"]["value"] == pytest.approx(
                roc_auc_score(truth, scores), abs=1e-6
            )
            assert figures.keys() == {"auroc", "aupr_out", "aupr_in", "fpr95", "detection_rate"}
        rate = entry["scores"]["coverage"]["detection_rate"]["value"]
        assert rate == pytest.approx(other["untrusted"].mean())
    assert document["untrusted"][0]["scores"]["coverage"]["auroc"]["value"] > 0.95
    attacked = table[table["set"] == UNTRUSTED[2]]
    np.testing.assert_array_equal(attacked["label"], mine["label"][:60])
    assert document["untrusted"][0]["deceived"] is None
    before = (mine["label"] == mine["predicted"]).to_numpy()[:60]
    hits = before & (attacked["label"] != attacked["predicted"]).to_numpy()
    assert document["untrusted"][2]["success_rate"]["value"] == pytest.approx(hits[before].mean())
    deceived = document["untrusted"][2]["deceived"]
    assert (deceived["images"], deceived["already_wrong"]) == (hits.sum(), (~before).sum())
    assert 10 <= hits.sum() < 60
    truth = [0] * len(mine) + [1] * int(hits.sum())
    for name, column, sign in (("coverage", "score", 1), ("softmax", "softmax_confidence", -1)):
        figures = deceived["scores"][name]["auroc"]["value"]
        scores = sign * pd.concat([mine[column], attacked[column][hits]])
        assert figures == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)
        wrong = mine["label"] != mine["predicted"]
        figures = trusted["errors"][name]["auroc"]["value"]
        assert figures == pytest.approx(roc_auc_score(wrong, sign * mine[column]), abs=1e-6)
    assert [p["name"] for p in document["points"]] == ["first.2", "second.2", "head.2"]
    assert set(document["points"][0]["coverage"]) == {"trusted", *UNTRUSTED}
    assert {b["confidence"] for b in document["confidence_bins"]} == {"coverage", "softmax"}


def test_coverage_by_point_is_the_share_of_neurons_in_range(evaluated: Path) -> None:
    document = json.loads((evaluated / "evaluation.json").read_text())
    signature, _, _ = signatures.load(evaluated / "signature-mrc.safetensors")
    photos = datasets.load("photos?limit=200", "test")
    neurons, logits, sizes = neurons_of(evaluated / "checkpoint.pt", photos)
    k = logits.argmax(1)
    low, high = signature.state["low"].numpy(), signature.state["high"].numpy()
    starts = np.cumsum([0, *sizes])
    for i, point in enumerate(document["points"]):
        own = slice(starts[i], starts[i + 1])
        ends = np.abs([low[:, own], high[:, own]])
        reach = 1e-5 * ends[np.isfinite(ends)].max()  # of rounding
        inside = (neurons[:, own] >= low[k, own] - reach) & (
            neurons[:, own] <= high[k, own] + reach
        )
        expected = inside.mean()
        assert point["coverage"]["photos?limit=200"] == pytest.approx(expected, abs=1e-3)


def test_evaluation_leaves_calibration_images_out_and_warns(run: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(
        ("photos?limit=20", "digits?limit=9", "digits?split=train&first&limit=9"), runs=run.parent,
        trusted="digits?split=train", output=tmp_path / "x",
    )  # fmt: skip
    result = evaluate(config, Silent())
    assert result.trusted.images == 1437 - 359
    assert len(result.warnings) == 3
    assert (
        "of 9 images of digits?split=train&first&limit=9 are trusted test images too"
        in (result.warnings[2])
    )
    with pytest.raises(CovcliError, match="exists"):
        evaluate(config, Silent())
    with pytest.raises(CovcliError, match="twice"):
        evaluate(dataclasses.replace(config, untrusted=("photos", "photos")), Silent())


def test_results_name_what_they_were_made_of(evaluated: Path, signed: SignatureResult) -> None:
    document = json.loads((evaluated / "evaluation.json").read_text())
    log = json.loads(next(evaluated.glob("training_results_*.json")).read_text())
    digits = datasets.load("digits", "train").fingerprint
    assert log["data"]["images"] == digits
    assert log["checkpoint_fingerprint"] == signed.checkpoint_fingerprint
    assert document["signature"]["checkpoint_fingerprint"] == signed.checkpoint_fingerprint
    assert document["signature"]["signature_fingerprint"] == signed.signature_fingerprint
    assert document["signature"]["trusted"]["images"] == signed.data.images
    assert document["signature"]["calibration"]["images"] == signed.calibration_data.images
    assert document["trusted"]["fingerprint"] == datasets.load("digits", "test").fingerprint
    for entry in document["untrusted"][:2]:
        assert entry["fingerprint"] == datasets.load(entry["name"], "test").fingerprint


def test_answers_that_pass_are_counted_as_the_monitor_gives_them(run: Path) -> None:
    names = (run / "checkpoint.pt", run / "signature-mrc.safetensors")
    config = EvaluationConfig(("photos?limit=50",), runs=run.parent, max_error=0.1)
    result = evaluate(config, Silent())
    digits = datasets.load("digits", "test")
    verdicts = Monitor.load(*names, max_error=0.1)(
        digits.batch(torch.arange(len(digits)), (3, 32, 32))
    )
    words = np.array(verdicts.words)
    right = (verdicts.predicted == digits.labels).numpy()
    accepted = result.trusted.accepted
    assert accepted is not None
    assert (accepted.images, accepted.unsure) == (
        (words == "trusted").sum(),
        (words == "unsure").sum(),
    )
    assert accepted.unsure > 0
    assert accepted.wrong == (~right[words == "trusted"]).sum()
    assert accepted.coverage.value == (words == "trusted").mean()
    assert accepted.error_rate is not None
    assert accepted.error_rate.low <= accepted.wrong / accepted.images <= accepted.error_rate.high
    table = pd.read_csv(run / "scores.csv.gz", keep_default_na=False)
    mine = table[table["set"] == "trusted"]
    np.testing.assert_array_equal(mine["unsure"].astype(bool), words == "unsure")
    assert "with 95% confidence" in report(run).markdown.read_text()
    # Nothing is unsure where nothing bounds the wrong answers.
    plain = Monitor.load(*names)(digits.batch(torch.arange(9), (3, 32, 32)))
    assert set(plain.words) <= {"trusted", "untrusted"}


@pytest.mark.parametrize("name", ["**", "../../*", "[", "src/**"])
def test_a_method_is_a_name_and_no_pattern_of_files(trained: TrainResult, name: str) -> None:
    with pytest.raises(CovcliError, match="unknown method"):
        find_files(EvaluationConfig(("digits",), trained.checkpoint, method=name))
