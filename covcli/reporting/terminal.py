"""Results as tables or JSON on stdout, progress as a bar or sparse lines on stderr."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from covcli.core import output
from covcli.core.errors import one_line
from covcli.reporting import tables

if TYPE_CHECKING:
    from covcli.reporting.documents import EvaluationResult, Explanation

CLASSES_SHOWN = 20


def print_json(result: Any) -> None:
    """Print a result object as one JSON document to stdout."""
    from covcli.core.files import plain

    output.results().write(json.dumps(plain(asdict(result)), indent=2, allow_nan=False) + "\n")


def say(text: str) -> None:
    """Print one line to stderr."""
    sys.stderr.write(one_line(text) + "\n")


def _console() -> Console:
    """Return a console for stdout; a pipe has no width, so its tables are not squeezed."""
    stream = output.results()
    terminal = stream.isatty()
    return Console(
        file=stream, highlight=False, width=None if terminal else 160, force_terminal=terminal
    )


def show_evaluation(result: "EvaluationResult") -> None:
    """Print an evaluation as tables to stdout."""
    console = _console()
    _show(console, f"Signature {result.signature.parameters}. {tables.false_alarms(result)}")
    _show(console, tables.class_alarms(result, CLASSES_SHOWN))
    _show(console, tables.detection(result))
    if len(result.untrusted) > 1:
        _show(console, tables.means(result))
    _show(console, tables.FPR95_NOTE)
    for line in tables.deceptions(result):
        _show(console, line)
    _show(console, tables.coverage(result))
    _show(console, tables.confidence_bins(result))
    _show(console, tables.confidence_thresholds(result))
    if (errors := tables.own_errors(result)) is not None:
        _show(console, errors)
        _show(console, tables.ERRORS_NOTE)
    _show(console, "Figures in per cent, with 95% intervals in brackets.")
    _show(console, result.guarantee.statement)
    for entry in result.explanations:
        _show_explanation(console, entry)


def _show(console: Console, block: "str | tables.Table") -> None:
    if isinstance(block, str):
        console.print(Text(one_line(block)))
        return
    shown = Table(title=Text(one_line(block.title)))
    for name in block.head:
        shown.add_column(Text(one_line(name)))
    for row in block.rows:
        shown.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(shown)


def _show_explanation(console: Console, entry: "Explanation") -> None:
    console.print(Text(one_line(tables.explanation(entry)), style="bold"))
    listed = [point for point in entry.points if point.channels]
    if not listed:
        console.print("  no neuron of its main coverage points left its range")
    for point in listed:
        console.print(Text(f"  {one_line(tables.point_share(point))}"))
        for channel in point.channels:
            console.print(Text(f"    {one_line(tables.left_channel(channel))}"))
