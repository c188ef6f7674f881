"""The top of a report: the verdict, four key numbers, and the comparison with the best baseline."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from covcli.reporting import tables
from covcli.reporting.blocks import ReportData, Tile
from covcli.reporting.documents import EvaluationResult
from covcli.reporting.tables import Table, percent

Outcome: TypeAlias = Literal["passed", "failed", "none"]


@dataclass(frozen=True)
class Headline:
    """The top of a report.

    Attributes
    ----------
    verdict, outcome
        The verdict in a line, and whether the gates pass; "none" without gates.
    tiles
        The key numbers.
    gates, comparison
        The table of the gates, or None, and the comparison with the best baseline.
    """

    verdict: str
    outcome: Outcome
    tiles: list[Tile]
    gates: Table | None
    comparison: Table


def headline(data: ReportData) -> Headline:
    """Return the top of a report."""
    result = data.evaluation
    outcome: Outcome = "none"
    if result.gates:
        outcome = "passed" if all(gate.passed for gate in result.gates) else "failed"
    tiles = [_accuracy(result), _false_alarms(result), _detection(result), _passing(data)]
    return Headline(
        tables.verdict(result), outcome, tiles, tables.gates(result), tables.comparison(result)
    )


def _accuracy(result: EvaluationResult) -> Tile:
    trusted = result.trusted
    note = f"of {trusted.images} trusted test images"
    return Tile("Accuracy", f"{percent(trusted.accuracy)}%", note)


def _false_alarms(result: EvaluationResult) -> Tile:
    alarms = result.trusted.false_alarm_rate
    kept = "promised" if alarms.value <= alarms.promised_high else "more than promised:"
    note = f"{kept} at most {percent(alarms.promised_high)}% at α = {alarms.alpha:g}"
    return Tile("False alarms", f"{percent(alarms.value)}%", note)


def _detection(result: EvaluationResult) -> Tile:
    means = {mean.score: mean.auroc.value for mean in result.mean_over_sets}
    sets = len(result.untrusted)
    over = f"mean over {sets} untrusted sets" if sets > 1 else f"on {result.untrusted[0].name}"
    note = f"AUROC, {over}; softmax {percent(means['softmax'])}%"
    return Tile("Detection", f"{percent(means['coverage'])}%", note)


def _passing(data: ReportData) -> Tile:
    """Return the share of trusted answers that pass, and the share of wrong ones among them."""
    accepted = data.evaluation.trusted.accepted
    if accepted is not None and accepted.error_rate is not None:
        note = (
            f"{percent(accepted.error_rate.value)}% of those are wrong, promised at most "
            f"{percent(accepted.max_error)}%"
        )
        return Tile("Answers that pass", f"{percent(accepted.coverage.value)}%", note)
    trusted = data.scores["trusted"]
    passed = ~(trusted.untrusted | trusted.unsure)
    share = percent(float(passed.mean()))
    if trusted.label is None or not passed.any():
        return Tile("Answers that pass", f"{share}%", "no label says how many are wrong")
    wrong = trusted.predicted != trusted.label
    note = (
        f"{percent(float(wrong[passed].mean()))}% of those are wrong; of all answers "
        f"{percent(float(wrong.mean()))}%"
    )
    return Tile("Answers that pass", f"{share}%", note)
