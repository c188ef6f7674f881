"""Figures worded once: the tables over an evaluation that every report shows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from covcli.core.errors import one_line

if TYPE_CHECKING:
    from covcli.evaluation.gates import Check
    from covcli.evaluation.results import EvaluationResult


@dataclass(frozen=True)
class Table:
    """A table: the head and the rows, as text."""

    head: list[str]
    rows: list[list[str]]


def percent(value: float | None, digits: int = 1) -> str:
    """Word a share in per cent; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def interval(estimate: dict[str, float] | None) -> str:
    """Word a figure with its interval in per cent; a dash where there is none."""
    if estimate is None:
        return "–"
    low, high = percent(estimate["low"]), percent(estimate["high"])
    return f"{percent(estimate['value'])} [{low}, {high}]"


def summary(result: "EvaluationResult", checks: "list[Check]") -> str:
    """Return an evaluation and its gates as Markdown, for a job's page."""
    alarms = result.trusted.false_alarm_rate
    lines = [
        f"### covcli: {result.signature['parameters']}",
        "",
        f"Accuracy {result.trusted.accuracy:.1%}, false-alarm rate {alarms.value:.2%} at "
        f"{result.guarantee.mode} α = {alarms.alpha:g} (promised {alarms.promised_low:.2%} to "
        f"{alarms.promised_high:.2%} of so many images).",
        "",
        *_highest(result),
        result.guarantee.statement,
        "",
        "| untrusted | AUROC | FPR95 | detected at α |",
        "| --- | --- | --- | --- |",
    ]
    for entry in result.untrusted:
        d = entry.scores["coverage"]
        rate = d.detection_rate.value if d.detection_rate else None
        cells = [_cell(entry.name), f"{d.auroc.value:.1%}", f"{d.fpr95.value:.1%}", _share(rate)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *[f"- {_cell(str(c))}" for c in checks]]
    return "\n".join(lines).rstrip() + "\n"


def _highest(result: "EvaluationResult") -> list[str]:
    """Return a paragraph on the predicted class with the highest false-alarm rate."""
    found = [c for c in result.trusted.false_alarms_by_class if c.value is not None]
    worst = max(found, key=lambda c: c.value or 0.0)
    promised = worst.promised_high
    bound = "nothing promised" if promised is None else f"promised at most {promised:.2%}"
    return [
        f"Highest by predicted class: {_cell(worst.name)}, {worst.alarms} of {worst.images} "
        f"({worst.value:.2%}; {bound}).",
        "",
    ]


def _cell(text: str) -> str:
    """Keep Markdown and HTML in a name from taking effect."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return escaped.replace("`", "\\`")


def _share(value: Any) -> str:
    return "–" if value is None else f"{value:.1%}"
