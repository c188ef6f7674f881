"""Results as tables or JSON on stdout, progress as a bar or sparse lines on stderr."""

import json
import sys
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from covcli.core import output
from covcli.core.errors import one_line

if TYPE_CHECKING:
    from covcli.evaluation.evaluate import EvaluationResult
    from covcli.evaluation.metrics import Detection, Estimate

CLASSES_SHOWN = 20
SCORE_COLUMNS = ["AUROC", "AUPR-out", "AUPR-in", "FPR95", "detected at α"]


def print_json(result: Any) -> None:
    """Print a result object as one JSON document to stdout."""
    from covcli.core.files import plain

    output.results().write(json.dumps(plain(asdict(result)), indent=2, allow_nan=False) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(one_line(text) + "\n")


def _console() -> Console:
    """Return a console for stdout; a pipe has no width, so its tables are not squeezed."""
    stream = output.results()
    terminal = stream.isatty()
    return Console(
        file=stream, highlight=False, width=None if terminal else 160, force_terminal=terminal
    )


def _cell(estimate: "Estimate | None") -> str:
    if estimate is None:
        return "–"
    value, low, high = (100 * v for v in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def show_evaluation(result: "EvaluationResult") -> None:
    """Print an evaluation as tables to stdout."""
    console = _console()
    trusted, alarms = result.trusted, result.trusted.false_alarm_rate
    console.print(
        Text(
            f"Signature {result.signature['parameters']}, trusted {one_line(trusted.name)}: "
            f"{trusted.images} images, accuracy {trusted.accuracy:.1%}"
        )
    )
    console.print(
        Text(
            f"False-alarm rate at {result.guarantee.mode} α = {alarms.alpha:g}: "
            f"{alarms.value:.2%} [{alarms.low:.2%}, {alarms.high:.2%}]; calibration on "
            f"{result.signature['calibration_scores']} scores promises "
            f"{alarms.promised_low:.2%} to {alarms.promised_high:.2%} of so many images"
        )
    )
    _show_alarms(console, result)
    table = Table(
        "untrusted",
        "images",
        "score",
        *SCORE_COLUMNS,
        title="Detection in per cent, with 95% intervals",
    )
    names = [mean.score for mean in result.mean_over_sets]
    for entry in result.untrusted:
        _add_scores(table, entry.name, entry.images, entry.scores, names)
        if entry.deceived is not None and entry.deceived.scores is not None:
            name = f"{entry.name}, successes"
            _add_scores(table, name, entry.deceived.images, entry.deceived.scores, names)
    console.print(table)
    if len(result.untrusted) > 1:
        means = Table("score", "AUROC", "FPR95", title="Mean over the untrusted sets")
        for mean in result.mean_over_sets:
            means.add_row(mean.score, _cell(mean.auroc), _cell(mean.fpr95))
        console.print(means)
    console.print(
        "FPR95: share of trusted images flagged at the threshold that catches 95% of the untrusted."
    )
    for entry in result.untrusted:
        if entry.deceived is not None:
            rate, wrong = _cell(entry.success_rate), entry.deceived.already_wrong
            console.print(
                Text(
                    f"{one_line(entry.name)} deceives the network on {rate} per cent of the images "
                    f"that it got right; {wrong} of {entry.images} were wrong before"
                )
            )
    sets = list(result.points[0].coverage)
    coverage = Table("point", "neurons", title="Coverage: share of neurons inside their range")
    for name in sets:
        coverage.add_column(Text(one_line(name)))
    for point in result.points:
        shares = [f"{point.coverage[name]:.2%}" for name in sets]
        coverage.add_row(Text(one_line(point.name)), str(point.neurons), *shares)
    console.print(coverage)
    _show_confidence(console, result)
    _show_errors(console, result)
    console.print(Text(result.guarantee.statement))
    _show_explanations(console, result)


def _show_alarms(console: Console, result: "EvaluationResult") -> None:
    found = result.trusted.false_alarms_by_class
    highest = sorted(found, key=lambda c: -1.0 if c.value is None else c.value, reverse=True)
    table = Table(
        "predicted class",
        "images",
        "alarms",
        "rate, %",
        "promised, %",
        "calibration scores",
        title=f"False alarms by predicted class, highest rates first ({len(found)} classes)",
    )
    for c in highest[:CLASSES_SHOWN]:
        rate = "–" if c.value is None else f"{100 * c.value:.1f}"
        interval = "" if c.low is None or c.high is None else f" [{_span(c.low, c.high)}]"
        promised = "–" if c.promised_high is None else f"at most {100 * c.promised_high:.1f}"
        cells = [str(c.images), str(c.alarms), rate + interval, promised, str(c.calibration_scores)]
        table.add_row(Text(one_line(c.name)), *cells)
    console.print(table)


def _span(low: float, high: float) -> str:
    return f"{100 * low:.1f}, {100 * high:.1f}"


def _show_confidence(console: Console, result: "EvaluationResult") -> None:
    bins = Table("confidence", "bin", "images", "accuracy", title="Accuracy by confidence")
    for b in result.confidence_bins:
        bins.add_row(b.confidence, f"{b.low:g}–{b.high:g}", str(b.images), _rate(b.accuracy))
    thresholds = Table("confidence", "at least", "share kept", "accuracy", title="Accuracy kept")
    for k in result.confidence_thresholds:
        thresholds.add_row(k.confidence, f"{k.threshold:g}", f"{k.kept:.1%}", _rate(k.accuracy))
    console.print(bins)
    console.print(thresholds)


def _show_explanations(console: Console, result: "EvaluationResult") -> None:
    for e in result.explanations:
        known = "" if e.label is None else f", labelled {e.label}"
        verdict = "untrusted" if e.untrusted else "trusted"
        title = f"{e.set}, image {e.row}: predicted {e.predicted}{known}"
        numbers = f"{verdict}, score {e.score:.2f}, p-value {e.p_value:.2g}"
        console.print(Text(f"{one_line(title)}: {numbers}", style="bold"))
        listed = [point for point in e.points if point.channels]
        if not listed:
            console.print("  no neuron of its main coverage points left its range")
        for p in listed:
            outside = f"{p.left} neurons ({1 - p.coverage:.1%}) outside their range"
            share = f"{p.share:.1%} of the score (z = {p.z:.1f})"
            console.print(Text(f"  {one_line(p.name)}: {share}, {outside}"))
            for c in p.channels:
                by = f", outside by {c.outside_by:.2f} widths" if isfinite(c.outside_by) else ""
                span = f"trusted {c.low:.3g} to {c.high:.3g}"
                console.print(Text(f"    {c.label}: {c.value:.3g}, {span}{by}"))


def _add_scores(
    table: Table, name: str, images: int, scores: "dict[str, Detection]", order: list[str]
) -> None:
    for score in order:
        d = scores[score]
        cells = [_cell(e) for e in (d.auroc, d.aupr_out, d.aupr_in, d.fpr95, d.detection_rate)]
        table.add_row(Text(one_line(name)), str(images), score, *cells)


def _show_errors(console: Console, result: "EvaluationResult") -> None:
    if result.trusted.errors is None:
        return
    table = Table("score", "wrong", "AUROC", "AURC", "E-AURC", title="The network's own errors")
    for name, e in result.trusted.errors.items():
        cells = [_cell(value) for value in (e.auroc, e.aurc, e.excess_aurc)]
        table.add_row(name, f"{e.wrong} of {result.trusted.images}", *cells)
    console.print(table)
    console.print(
        "AURC: mean share of errors among the images kept, when the least trusted are rejected "
        "first; E-AURC: how much of it a perfect order would save. In per cent."
    )


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
