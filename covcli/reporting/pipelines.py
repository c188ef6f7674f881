"""Results for CI pipelines: a job summary, a JUnit report and annotations."""

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from covcli.core.errors import CovcliError, one_line
from covcli.core.files import write_bytes
from covcli.core.opening import check_overwritable, open_own, real
from covcli.reporting import markdown, tables
from covcli.reporting.documents import EvaluationResult, GateOutcome

SUITE = "covcli evaluate"
JUNIT_BEGINS = f"<?xml version='1.0' encoding='utf-8'?>\n<testsuite name=\"{SUITE}\"".encode()
SUMMARY_BEGINS = "### covcli: "


def check_outputs(junit: Path | None, summary: Path | None) -> None:
    """Raise a CovcliError if a file for a pipeline would overwrite anything but an earlier one."""
    if junit is not None:
        check_overwritable(junit, (JUNIT_BEGINS,), "JUnit report of covcli")
    if summary is not None and not _is_of_step(summary):
        check_overwritable(summary, (SUMMARY_BEGINS.encode(),), "summary of covcli")
    if junit is not None and summary is not None and real(junit) == real(summary):
        raise CovcliError("is named by --junit and --summary", where=junit)


def write_summary(path: Path, result: EvaluationResult) -> None:
    """Write the job summary; append it to the file of a step of GitHub Actions, as others do."""
    content = summary(result).encode()
    if not _is_of_step(path):
        write_bytes(path, content)
        return
    with open_own(path) as file:
        file.write(content)


def _is_of_step(path: Path) -> bool:
    """Return whether a file collects the summaries of all programs of a step."""
    return str(path) == os.environ.get("GITHUB_STEP_SUMMARY")


def summary(result: EvaluationResult) -> str:
    """Return a job summary in Markdown: the verdict, the gates and the main results.

    Examples
    --------
    >>> from pathlib import Path
    >>> from covcli.reporting.documents import read_evaluation
    >>> summary(read_evaluation(Path("runs/latest/evaluation.json"))).splitlines()[0][:11]
    '### covcli:'
    """
    return markdown.document(
        [
            f"{SUMMARY_BEGINS}{markdown.escape(tables.verdict(result))}",
            markdown.bullets(map(str, result.gates)),
            markdown.table(tables.overview(result)),
            markdown.escape(tables.false_alarms(result)),
            markdown.escape(tables.highest_class(result)),
            markdown.escape(tables.errors_found(result) or ""),
            markdown.escape(tables.accepted(result) or ""),
            markdown.escape(result.guarantee.statement),
            "#### What was checked",
            markdown.table(tables.checked(result)),
        ]
    )


def junit(outcomes: Sequence[GateOutcome]) -> bytes:
    """Return gates and their outcomes as a JUnit report in XML, one test case per gate.

    A case has the value, its interval and the bound as properties and in words. Its time is the
    time in seconds that scoring its set took.
    """
    seconds = {outcome.set: outcome.seconds for outcome in outcomes}
    failed = sum(not outcome.passed for outcome in outcomes)
    suite = ET.Element(
        "testsuite", name=SUITE, tests=str(len(outcomes)), failures=str(failed),
        errors="0", skipped="0", time=f"{sum(seconds.values()):.3f}",
    )  # fmt: skip
    for outcome in outcomes:
        _add_case(suite, outcome)
    ET.indent(suite)
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True)) + b"\n"


def _add_case(suite: ET.Element, outcome: GateOutcome) -> None:
    name = outcome.metric if outcome.statistic == "value" else tables.gated(outcome)
    case = ET.SubElement(
        suite, "testcase", classname=one_line(outcome.set), name=name,
        time=f"{outcome.seconds:.3f}",
    )  # fmt: skip
    properties = ET.SubElement(case, "properties")
    for key in ("value", "low", "high", "bound"):
        ET.SubElement(properties, "property", name=key, value=f"{getattr(outcome, key):.6g}")
    if not outcome.passed:
        ET.SubElement(case, "failure", type="gate", message=str(outcome)).text = _body(outcome)
    ET.SubElement(case, "system-out").text = _body(outcome)


def _body(outcome: GateOutcome) -> str:
    lines = zip(tables.GATE_HEAD, tables.gate_row(outcome), strict=True)
    return "\n".join(one_line(f"{head}: {cell}") for head, cell in lines)


def annotations(outcomes: Sequence[GateOutcome]) -> str:
    """Return gates and their outcomes as GitHub workflow commands, one line each.

    Failed gates are errors, the others notices; see "Workflow commands for GitHub Actions".
    """
    return "".join(
        f"::{'notice' if outcome.passed else 'error'} title=covcli::{_command(str(outcome))}\n"
        for outcome in outcomes
    )


def _command(text: str) -> str:
    """Escape a workflow command's message."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
