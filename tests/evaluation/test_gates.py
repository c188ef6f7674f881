"""Gates, and the earlier evaluation."""

import json
from pathlib import Path

import pytest
from conftest import UNTRUSTED
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.evaluation.gates import (
    METRICS,
    Gate,
    Option,
    check,
    check_names,
    held,
    parse_gate,
    read_baseline,
)
from covcli.reporting.documents import Estimate, read_evaluation

WEAK = "attack:fgsm?limit=40&eps=1/255"


def test_gates_are_judged_and_recorded_with_the_evaluation(evaluated: Path, tmp_path: Path) -> None:
    under = ("auroc=0.9", f"{WEAK}:fpr95=0.02", "accuracy=0.5", "accuracy.low=0.5")
    over = ("false_alarm_rate=1", "noise:uniform?limit=50:fpr95.high=1")
    gates = [
        *map(parse_gate, under), *(parse_gate(text, "--fail-over") for text in over)
    ]  # fmt: skip
    config = EvaluationConfig(
        ("noise:uniform?limit=50", WEAK), runs=evaluated.parent, output=tmp_path,
        gates=tuple(gates),
    )  # fmt: skip
    result = evaluate(config, Silent())
    failed = [(o.metric, o.set) for o in result.gates if not o.passed]
    assert (len(result.gates), failed) == (7, [("auroc", WEAK), ("fpr95", WEAK)])
    assert read_evaluation(tmp_path / "evaluation.json").gates == result.gates
    document = json.loads((tmp_path / "evaluation.json").read_text())
    figure = document["untrusted"][1]["scores"]["coverage"]["auroc"]
    (entry,) = [g for g in document["gates"] if (g["metric"], g["set"]) == ("auroc", WEAK)]
    assert entry.pop("seconds") > 0
    assert entry == {
        "metric": "auroc", "statistic": "value", "relation": ">=", "bound": 0.9, "set": WEAK,
        "passed": False, **figure,
    }  # fmt: skip
    accuracy = next(g for g in result.gates if g.statistic == "low")
    right = round(result.trusted.accuracy * result.trusted.images)
    interval = binomtest(right, result.trusted.images).proportion_ci(0.95, "exact")
    assert accuracy.value == accuracy.low == pytest.approx(interval.low)


@given(
    figure=st.floats(0, 1), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    bound=st.floats(0, 1), metric=st.sampled_from(METRICS),
    statistic=st.sampled_from(["value", "low", "high"]),
)  # fmt: skip
def test_a_gate_compares_the_end_of_the_interval_that_it_names(
    figure: float, ends: tuple[float, float], bound: float, metric: str, statistic: str
) -> None:
    estimate = Estimate(figure, *ends)
    judged = {"value": figure, "low": ends[0], "high": ends[1]}[statistic]
    outcome = held(Gate(metric, bound, None, statistic), "mnist", estimate, 0.0)
    better = judged <= bound if metric in ("fpr95", "false_alarm_rate") else judged >= bound
    assert (outcome.passed, outcome.value) == (better, judged)


def test_a_figure_that_is_no_number_passes_no_gate() -> None:
    nowhere = Estimate(float("nan"), 0.0, 1.0)
    for metric in METRICS:
        assert not held(Gate(metric, 0.5), "mnist", nowhere, 0.0).passed


@pytest.mark.parametrize(
    ("text", "option", "message"),
    [
        *((text, "--fail-under", "bound from 0 to 1") for text in ("auroc", "auroc=x", "auroc=2")),
        ("auroc=-1", "--fail-under", "bound from 0 to 1"),
        ("auroc=0", "--fail-under", "every figure reaches 0"),
        ("auc=0.5", "--fail-under", "unknown metric"),
        ("=1", "--fail-under", "unknown metric"),
        ("auroc.mean=0.5", "--fail-under", "none of value, low and high"),
        ("mnist:accuracy=0.5", "--fail-under", "name no set"),
        ("mnist:false_alarm_rate=0.5", "--fail-over", "name no set"),
        ("auroc=0.5", "--fail-over", "use --fail-under"),
        ("fpr95=1.5", "--fail-over", "bound from 0 to 1"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(text: str, option: Option, message: str) -> None:
    with pytest.raises(CovcliError, match=message):
        parse_gate(text, option)
    assert parse_gate("fpr95=0", "--fail-over").value == 0


def test_a_gate_of_a_set_that_is_not_evaluated_is_refused() -> None:
    with pytest.raises(CovcliError, match="not evaluated"):
        check_names([parse_gate("mnist:auroc=0.5")], ("noise:uniform?limit=50",))


def test_a_regression_against_an_earlier_evaluation_is_a_failed_gate(
    evaluated: Path, tmp_path: Path
) -> None:
    path = evaluated / "evaluation.json"
    result = evaluate(
        EvaluationConfig(UNTRUSTED[:2], runs=evaluated.parent, output=tmp_path / "o"), Silent()
    )
    assert all(c.passed for c in check(result, read_baseline(path, 0.0, UNTRUSTED[:2])))
    document = json.loads(path.read_text())
    document["untrusted"][0]["scores"]["coverage"]["fpr95"]["value"] = -0.5
    path.write_text(json.dumps(document))
    checks = check(result, read_baseline(path, 0.1, UNTRUSTED[:2]))
    failed = [(c.set, c.metric) for c in checks if not c.passed]
    assert failed == [(UNTRUSTED[0], "fpr95")]
    with pytest.raises(CovcliError, match="has no untrusted set in common"):
        read_baseline(path, 0.1, ("mnist",))
    for score in ("coverage", "softmax"):
        lacking = json.loads(path.read_text())
        del lacking["untrusted"][0]["scores"][score]
        (tmp_path / "lacking.json").write_text(json.dumps(lacking))
        with pytest.raises(CovcliError, match="lacks a score of a set"):
            read_baseline(tmp_path / "lacking.json", 0.1, UNTRUSTED)
    path.write_text('{"untrusted": [3]}')
    with pytest.raises(CovcliError, match="is not an evaluation"):
        read_baseline(path, 0.1, UNTRUSTED)
