"""What pipelines read: a job's summary, JUnit, workflow commands."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from example import outcome, result

from covcli.core.errors import CovcliError
from covcli.reporting import pipelines

HOSTILE = 'npz:a\n::error::x\x1b[31m<b>&"100%'


def test_junit_carries_value_bound_time_and_a_body() -> None:
    outcomes = [outcome(), outcome(passed=False, name=HOSTILE)]
    suite = ET.fromstring(pipelines.junit(outcomes))
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "time")}
    assert counts == {"tests": "2", "failures": "1", "errors": "0", "time": "3.000"}
    for case, gate in zip(suite.findall("testcase"), outcomes, strict=True):
        assert (case.get("name"), case.get("time")) == ("auroc.low", "1.500")
        values = {p.get("name"): float(p.get("value", "")) for p in case.iter("property")}
        assert values == {
            "value": gate.value, "low": gate.low, "high": gate.high, "bound": gate.bound
        }  # fmt: skip
        body = case.findtext("system-out") or ""
        assert {"value: 96.42", f"bound: >= {100 * gate.bound:.1f}"} <= set(body.splitlines())
        assert (case.find("failure") is None) == gate.passed
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert "auroc.low >= 0.99" in failure.get("message", "")
    assert failure.text == suite.findall("testcase/system-out")[1].text


def test_a_gate_failed_by_less_than_is_shown_does_not_contradict_itself() -> None:
    failed = outcome(passed=False, value=0.98998)
    assert str(failed) == "gate failed: auroc.low >= 0.99, mnist has 0.98998"
    assert str(outcome(passed=False, value=math.nan)).endswith("has nan")


def test_a_pipeline_overwrites_only_what_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xml, text = tmp_path / "gates.xml", tmp_path / "summary.md"
    for _ in range(2):  # the second time, over its own files
        pipelines.check_outputs(xml, text)
        xml.write_bytes(pipelines.junit([outcome()]))
        pipelines.write_summary(text, result(["mnist"]))
    assert text.read_text().count("### covcli") == 1
    for given in ((text, None), (None, xml), (xml, xml)):
        with pytest.raises(CovcliError, match=r"exists and is no|is named by --junit and"):
            pipelines.check_outputs(*given)
    step = tmp_path / "step"
    step.write_text("# Mine\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    for _ in range(2):
        pipelines.check_outputs(None, step)
        pipelines.write_summary(step, result(["mnist"]))
    assert step.read_text().startswith("# Mine\n### covcli: ")
    assert step.read_text().count("### covcli") == 2


def test_a_workflow_command_is_one_line_whatever_the_name() -> None:
    text = pipelines.annotations([outcome(), outcome(passed=False, name=HOSTILE)])
    first, second = text.splitlines()
    assert first == (
        "::notice title=covcli::gate passed: auroc.low >= 0.5, mnist has 0.9642"
    )  # fmt: skip
    assert second.startswith("::error title=covcli::gate failed: auroc.low >= 0.99, npz:a ::error")
    assert "100%25 has" in second
    assert "\x1b" not in text


def test_the_summary_begins_with_the_verdict_and_lists_every_gate() -> None:
    outcomes = [outcome(), outcome(passed=False)]
    text = pipelines.summary(result(["mnist", "a|<b>"], outcomes))
    assert text.startswith("### covcli: 1 of 2 gates passed: do not release\n")
    assert "- gate passed: auroc.low >= 0.5, mnist has 0.9642\n" in text
    assert "- gate failed: auroc.low >= 0.99, mnist has 0.9642\n" in text
    assert "| mnist | 1000 | 96.4 | 87.7 | 15.6 | 76.5 |\n" in text
    assert "| a\\|&lt;b> |" in text
