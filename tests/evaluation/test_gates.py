"""Gates, and the earlier evaluation."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from conftest import UNTRUSTED

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.evaluation.gates import check, check_names, junit, parse_gate, read_baseline
from covcli.reporting.job_summary import summary


def test_gates_name_every_set_that_falls_short(evaluated: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(
        ("noise:uniform?limit=50", "attack:fgsm?limit=40&eps=1/255"), runs=evaluated.parent,
        output=tmp_path,
    )  # fmt: skip
    result = evaluate(config, Silent())
    weak = "attack:fgsm?limit=40&eps=1/255"
    texts = ("auroc=0.9", f"{weak}:fpr95=0.02", "accuracy=0.5", "false_alarm_rate=1")
    checks = check(result, [parse_gate(text) for text in texts])
    assert len(checks) == 5
    assert [(c.gate.metric, c.name) for c in checks if not c.passed] == [
        ("auroc", weak), ("fpr95", weak)
    ]  # fmt: skip
    suite = ET.fromstring(junit(checks))
    assert (suite.get("tests"), suite.get("failures")) == ("5", "2")
    assert len(suite.findall("testcase/failure")) == 2
    text = summary(result, checks)
    assert text.count("- gate passed") == 3
    assert "| noise:uniform?limit=50 | " in text
    for bad in ("auroc", "auroc=x", "auroc=2", "auroc=0", "auc=0.5", "=1"):
        with pytest.raises(CovcliError):
            parse_gate(bad)
    with pytest.raises(CovcliError, match="not evaluated"):
        check_names([parse_gate("mnist:auroc=0.5")], config.untrusted)


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
    failed = [(c.name, c.gate.metric) for c in checks if not c.passed]
    assert failed == [(UNTRUSTED[0], "fpr95")]
    with pytest.raises(CovcliError, match="shares no untrusted set"):
        read_baseline(path, 0.1, ("mnist",))
    path.write_text('{"untrusted": [3]}')
    with pytest.raises(CovcliError, match="is not an evaluation"):
        read_baseline(path, 0.1, UNTRUSTED)
