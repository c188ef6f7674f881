"""Gates: bounds on an evaluation's metrics; a pipeline stops if one is not reached."""

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
# The metrics that are compared with an earlier evaluation.
REGRESSION = ["auroc", "fpr95"]

Option: TypeAlias = Literal["--fail-under", "--fail-over"]
STATISTICS: dict[str, Statistic] = {name: name for name in get_args(Statistic)}
log = logging.getLogger(__name__)


def parse_gate(text: str, option: Option = "--fail-under") -> Gate:
    """Parse `metric=bound` or `set:metric=bound`; `metric.low` is the interval's lower limit.

    Parameters
    ----------
    text
        The gate.
    option
        The option that it was given to. `--fail-over` is for metrics where lower is better; with
        `--fail-under`, such metrics must not exceed their bound either.

    Raises
    ------
    CovcliError
        If the metric is unknown, does not exist for the set, or does not match the option, or the
        bound is not a number in (0, 1] (in [0, 1] for `--fail-over`).

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
        raise CovcliError(f"{metric} is a metric of the trusted images: name no set", where=where)
    if option == "--fail-over" and metric not in LOWER_IS_BETTER:
        raise CovcliError(f"more {metric} is better", where=where, fix="use --fail-under")
    value = _bound(bound, where)
    if option == "--fail-under" and value == 0:
        raise CovcliError("every figure reaches 0", where=where)
    return Gate(metric, value, name if colon else None, STATISTICS[statistic or "value"])


def parse_gates(
    under: Sequence[str], over: Sequence[str], source: Path | None = None
) -> list[Gate]:
    """Parse the gates of `--fail-under` and `--fail-over`, or those of a settings file.

    Raises
    ------
    CovcliError
        As `parse_gate` does; it starts with the name of the file, if they come from one.
    """
    try:
        gates = [parse_gate(text) for text in under]
        return [*gates, *(parse_gate(text, "--fail-over") for text in over)]
    except CovcliError as error:
        if source is None:
            raise
        raise CovcliError(str(error), where=source) from None


def held(gate: Gate, name: str, estimate: Estimate, seconds: float) -> GateOutcome:
    """Compare a gate with a set's metric; NaN fails.

    Parameters
    ----------
    gate
        The gate.
    name
        The set.
    estimate
        The metric with its 95% interval.
    seconds
        The time that scoring the set took.

    Examples
    --------
    >>> outcome = held(parse_gate("auroc.low=0.9"), "mnist", Estimate(0.95, 0.89, 0.98), 0.0)
    >>> outcome.value, outcome.passed
    (0.89, False)
    """
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
    """Return gates from an earlier evaluation: no set may be worse by more than the tolerance.

    Parameters
    ----------
    path
        An evaluation.json.
    tolerance
        How much lower an AUROC, or higher an FPR95, may be; in [0, 1].
    untrusted
        The sets evaluated now; sets that the earlier evaluation lacks are not compared.

    Raises
    ------
    CovcliError
        If the file is not an evaluation, or the two evaluations have no set in common.

    Examples
    --------
    >>> read_baseline(Path("runs/latest/evaluation.json"), 0.01, ("photos?limit=100",))[0].metric
    'auroc'
    """
    gates = []
    earlier = {entry.name: entry for entry in read_evaluation(path).untrusted}
    for name in untrusted:
        if name not in earlier:
            log.warning("%s has no set %s: it is not compared", path, name)
            continue
        for metric in REGRESSION:
            value = getattr(earlier[name].scores["coverage"], metric).value
            change = tolerance if metric in LOWER_IS_BETTER else -tolerance
            gates.append(Gate(metric, value + change, name))
    if not gates:
        raise CovcliError("has no untrusted set in common with this evaluation", where=path)
    return gates


def check(
    result: EvaluationResult, gates: Sequence[Gate], seconds: Mapping[str, float] | None = None
) -> list[GateOutcome]:
    """Compare gates with an evaluation's metrics of the coverage score.

    Parameters
    ----------
    result
        The evaluation.
    gates
        The gates.
    seconds
        The time that scoring each set took, by name; the trusted set is "trusted".

    Raises
    ------
    CovcliError
        If a set does not have a gate's metric.

    Examples
    --------
    >>> result = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> [outcome.passed for outcome in check(result, [parse_gate("auroc=0.5")])]
    [True]
    """
    times = seconds or {}
    return [
        held(gate, name, estimate, times.get(key, 0.0))
        for gate in gates
        for key, name, estimate in _figures(result, gate.metric)
        if gate.name in (None, name)
    ]


def _figures(result: EvaluationResult, metric: str) -> Iterator[tuple[str, str, Estimate]]:
    """Yield the key, the name and the estimate of each set that has the metric."""
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
