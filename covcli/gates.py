"""Gates: figures of an evaluation that must be reached for a pipeline to go on."""

from dataclasses import dataclass

from covcli.errors import CovcliError
from covcli.evaluation import EvaluationResult
from covcli.registry import suggestion
from covcli.specs import fraction

DETECTION = ["auroc", "aupr_out", "aupr_in", "fpr95", "detection_rate"]
METRICS = [*DETECTION, "accuracy", "false_alarm_rate"]
LOWER_IS_BETTER = {"fpr95", "false_alarm_rate"}


@dataclass(frozen=True)
class Gate:
    """A metric and the value to reach; for fpr95 and false_alarm_rate, the value not to exceed."""

    metric: str
    value: float


@dataclass(frozen=True)
class Failure:
    """A gate that was not reached, by which set, with which figure."""

    gate: Gate
    name: str
    found: float


def parse_gate(text: str) -> Gate:
    """Read `metric=value`; an unknown metric or a value outside (0, 1] is a CovcliError."""
    metric, _, value = text.partition("=")
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
    return Gate(metric, number)


def failures(result: EvaluationResult, gates: list[Gate]) -> list[Failure]:
    """Return every gate that a set falls short of, by the coverage score."""
    found = []
    for gate in gates:
        for name, value in _figures(result, gate.metric):
            short = value > gate.value if gate.metric in LOWER_IS_BETTER else value < gate.value
            if short:
                found.append(Failure(gate, name, value))
    return found


def _figures(result: EvaluationResult, metric: str) -> list[tuple[str, float]]:
    if metric == "accuracy":
        return [(result.trusted.name, result.trusted.accuracy)]
    if metric == "false_alarm_rate":
        return [(result.trusted.name, result.trusted.false_alarm_rate.value)]
    return [(s.name, getattr(s.scores["coverage"], metric).value) for s in result.untrusted]
