"""Gates: figures of an evaluation that must be reached for a pipeline to go on."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from covcli.core.errors import CovcliError
from covcli.core.specs import amount, suggestion
from covcli.evaluation.config import LOWER_IS_BETTER, Gate, Statistic
from covcli.reporting.documents import Estimate, EvaluationResult, GateOutcome, read_evaluation
from covcli.signature.guarantee import binomial_interval

DETECTION = ["auroc", "aupr_out", "aupr_in", "fpr95", "detection_rate"]
OF_TRUSTED = ["accuracy", "false_alarm_rate"]
METRICS = [*DETECTION, *OF_TRUSTED]
# What an earlier evaluation is compared by.
REGRESSION = ["auroc", "fpr95"]

Option: TypeAlias = Literal["--fail-under", "--fail-over"]
STATISTICS: dict[str, Statistic] = {name: name for name in get_args(Statistic)}
log = logging.getLogger(__name__)


def parse_gate(text: str, option: Option = "--fail-under") -> Gate:
    """Read `metric=bound` or `set:metric=bound`; `metric.low` is the lower end of its interval.

    Parameters
    ----------
    text
        The gate.
    option
        Where it was given. `--fail-over` is for the metrics of which less is better; with
        `--fail-under` those must not exceed their bound either.

    Raises
    ------
    CovcliError
        If the metric is unknown, is asked of a set that it is not of, or does not go with the
        option, or if the bound is no number in (0, 1], with `--fail-over` in [0, 1].

    Examples
    --------
    >>> parse_gate("mnist:auroc.low=0.95")
    Gate(metric='auroc', value=0.95, name='mnist', statistic='low')
    """
    where = f"{option} {text}"
    name, colon, rest = text.rpartition(":")
    figure, _, bound = rest.partition("=")
    metric, dot, statistic = figure.partition(".")
    if metric not in METRICS:
        raise CovcliError(
            f"unknown metric {metric!r}", where=where, fix=suggestion(metric, METRICS)
        )
    if dot and statistic not in STATISTICS:
        raise CovcliError(f"{statistic!r} is none of value, low and high", where=where)
    if colon and metric in OF_TRUSTED:
        raise CovcliError(f"{metric} is of the trusted images: name no set", where=where)
    if option == "--fail-over" and metric not in LOWER_IS_BETTER:
        raise CovcliError(f"more {metric} is better", where=where, fix="use --fail-under")
    value = _bound(bound, where)
    if option == "--fail-under" and value == 0:
        raise CovcliError("every figure reaches 0", where=where)
    return Gate(metric, value, name if colon else None, STATISTICS[statistic or "value"])


def held(gate: Gate, name: str, estimate: Estimate, seconds: float) -> GateOutcome:
    """Hold a gate against a set's figure; one that is not a number fails."""
    figure = float(getattr(estimate, gate.statistic))
    passed = figure <= gate.value if gate.relation == "<=" else figure >= gate.value
    return GateOutcome(
        metric=gate.metric, statistic=gate.statistic, relation=gate.relation, bound=gate.value,
        set=name, value=figure, low=estimate.low, high=estimate.high, passed=passed,
        seconds=seconds,
    )  # fmt: skip


def _bound(text: str, where: str) -> float:
    try:
        value = amount(text)
    except ValueError:
        value = 2.0
    if value > 1:
        raise CovcliError("expected metric=bound with a bound from 0 to 1", where=where)
    return value


def check_names(gates: Sequence[Gate], untrusted: tuple[str, ...]) -> None:
    """Raise a CovcliError if a gate names a set that is not evaluated."""
    for gate in gates:
        if gate.name is not None and gate.name not in untrusted:
            known = suggestion(gate.name, list(untrusted))
            raise CovcliError("is not evaluated", where=f"gate of {gate.name}", fix=known)


def read_baseline(path: Path, tolerance: float, untrusted: tuple[str, ...]) -> list[Gate]:
    """Make gates of an earlier evaluation: no set may be worse by more than the tolerance.

    Parameters
    ----------
    path
        An evaluation.json.
    tolerance
        How much lower an AUROC, or higher an FPR95, may be; in [0, 1].
    untrusted
        The sets now evaluated; those that the earlier evaluation lacks are not compared.

    Raises
    ------
    CovcliError
        If the file is no evaluation, or shares no set with this one, or the tolerance is out of
        range.
    """
    if not 0 <= tolerance <= 1:
        raise CovcliError("must lie between 0 and 1", where=f"--tolerance {tolerance}")
    gates = []
    earlier = {entry.name: entry for entry in read_evaluation(path).untrusted}
    for name in untrusted:
        if name not in earlier:
            log.warning("%s holds no %s: that set is not compared", path, name)
            continue
        for metric in REGRESSION:
            value = getattr(earlier[name].scores["coverage"], metric).value
            change = tolerance if metric in LOWER_IS_BETTER else -tolerance
            gates.append(Gate(metric, value + change, name))
    if not gates:
        raise CovcliError("shares no untrusted set with this evaluation", where=path)
    return gates


def check(
    result: EvaluationResult, gates: Sequence[Gate], seconds: Mapping[str, float] | None = None
) -> list[GateOutcome]:
    """Hold gates against an evaluation's coverage scores.

    Parameters
    ----------
    result
        The evaluation.
    gates
        What is asked of it.
    seconds
        How long each set took to score, by name; "trusted" stands for the trusted set.

    Raises
    ------
    CovcliError
        If a gate asks for a figure that a set does not have.
    """
    times = seconds or {}
    return [
        held(gate, name, estimate, times.get(key, 0.0))
        for gate in gates
        for key, name, estimate in _figures(result, gate.metric)
        if gate.name in (None, name)
    ]


def _figures(result: EvaluationResult, metric: str) -> Iterator[tuple[str, str, Estimate]]:
    """Yield the key, the name and the figure of each set that has the metric."""
    trusted = result.trusted
    if metric == "accuracy":
        low, high = binomial_interval(round(trusted.accuracy * trusted.images), trusted.images)
        yield "trusted", trusted.name, Estimate(trusted.accuracy, low, high)
    elif metric == "false_alarm_rate":
        alarms = trusted.false_alarm_rate
        yield "trusted", trusted.name, Estimate(alarms.value, alarms.low, alarms.high)
    else:
        for entry in result.untrusted:
            estimate = getattr(entry.scores["coverage"], metric)
            if estimate is None:
                raise CovcliError(f"has no {metric}", where=entry.name)
            yield entry.name, entry.name, estimate
