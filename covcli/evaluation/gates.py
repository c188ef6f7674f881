"""Gates: figures of an evaluation that must be reached for a pipeline to go on."""

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from covcli.core.errors import CovcliError, one_line
from covcli.core.specs import fraction, suggestion
from covcli.reporting.documents import EvaluationResult, read_evaluation

DETECTION = ["auroc", "aupr_out", "aupr_in", "fpr95", "detection_rate"]
METRICS = [*DETECTION, "accuracy", "false_alarm_rate"]
LOWER_IS_BETTER = {"fpr95", "false_alarm_rate"}
# What an earlier evaluation is compared by.
REGRESSION = ["auroc", "fpr95"]


@dataclass(frozen=True)
class Gate:
    """A metric and the value to reach; for fpr95 and false_alarm_rate, the value not to exceed.

    Attributes
    ----------
    metric, value
        What to reach.
    name
        The set it is asked of; None for every set.
    """

    metric: str
    value: float
    name: str | None = None


@dataclass(frozen=True)
class Check:
    """A gate held against one set."""

    gate: Gate
    name: str
    value: float

    @property
    def passed(self) -> bool:
        """Whether the set reaches the gate."""
        if self.gate.metric in LOWER_IS_BETTER:
            return self.value <= self.gate.value
        return self.value >= self.gate.value

    def __str__(self) -> str:
        sign = "<=" if self.gate.metric in LOWER_IS_BETTER else ">="
        verdict = "passed" if self.passed else "failed"
        text = f"{self.gate.metric} {sign} {self.gate.value:g}, {self.name} has {self.value:.4f}"
        return one_line(f"gate {verdict}: {text}")


def parse_gate(text: str) -> Gate:
    """Read `metric=value` or `set:metric=value`.

    Raises
    ------
    CovcliError
        If the metric is unknown or the value outside (0, 1].
    """
    name, colon, rest = text.rpartition(":")
    metric, _, value = rest.partition("=")
    where = f"--fail-under {text}"
    if metric not in METRICS:
        raise CovcliError(
            f"unknown metric {metric!r}", where=where, fix=suggestion(metric, METRICS)
        )
    try:
        number = fraction(value)
    except ValueError:
        number = 2.0
    if number > 1:
        raise CovcliError("expected metric=value with a value in (0, 1]", where=where)
    return Gate(metric, number, name if colon else None)


def check_names(gates: list[Gate], untrusted: tuple[str, ...]) -> None:
    """Raise a CovcliError if a gate names a set that is not evaluated."""
    for gate in gates:
        if gate.name is not None and gate.name not in untrusted:
            known = suggestion(gate.name, list(untrusted))
            raise CovcliError("is not evaluated", where=f"--fail-under {gate.name}", fix=known)


def read_baseline(path: Path, tolerance: float, untrusted: tuple[str, ...]) -> list[Gate]:
    """Make gates of an earlier evaluation: no set may be worse by more than the tolerance.

    Parameters
    ----------
    path
        An evaluation.json.
    tolerance
        How much lower an AUROC, or higher an FPR95, may be.
    untrusted
        The sets now evaluated; those that the earlier evaluation lacks are not compared.

    Raises
    ------
    CovcliError
        If the file is no evaluation, or shares no set with this one.
    """
    gates = []
    for entry in read_evaluation(path).untrusted:
        for metric in REGRESSION if entry.name in untrusted else []:
            value = getattr(entry.scores["coverage"], metric).value
            change = tolerance if metric in LOWER_IS_BETTER else -tolerance
            gates.append(Gate(metric, value + change, entry.name))
    if not gates:
        raise CovcliError("shares no untrusted set with this evaluation", where=path)
    return gates


def check(result: EvaluationResult, gates: list[Gate]) -> list[Check]:
    """Hold gates against an evaluation's coverage scores."""
    return [
        Check(gate, name, value)
        for gate in gates
        for name, value in _figures(result, gate.metric)
        if gate.name in (None, name)
    ]


def _figures(result: EvaluationResult, metric: str) -> list[tuple[str, float]]:
    if metric == "accuracy":
        return [(result.trusted.name, result.trusted.accuracy)]
    if metric == "false_alarm_rate":
        return [(result.trusted.name, result.trusted.false_alarm_rate.value)]
    return [(s.name, getattr(s.scores["coverage"], metric).value) for s in result.untrusted]


def junit(checks: list[Check]) -> bytes:
    """Return the checks as a JUnit report, one test case each."""
    failed = [c for c in checks if not c.passed]
    suite = ET.Element(
        "testsuite", name="covcli evaluate", tests=str(len(checks)), failures=str(len(failed)),
        errors="0", skipped="0",
    )  # fmt: skip
    for c in checks:
        case = ET.SubElement(suite, "testcase", classname=one_line(c.name), name=c.gate.metric)
        if not c.passed:
            ET.SubElement(case, "failure", message=str(c))
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True)) + b"\n"
