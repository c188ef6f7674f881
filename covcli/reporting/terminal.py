"""Results as tables or JSON on stdout, progress as a bar or sparse lines on stderr."""

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from covcli.core import output
from covcli.core.errors import one_line
from covcli.core.wrapping import wrapped
from covcli.reporting import tables

if TYPE_CHECKING:
    from covcli.reporting.documents import EvaluationResult, Explanation

PIPE = 160  # columns, where nothing says how many there are
HARD = "\N{NO-BREAK SPACE}"


def print_json(result: Any) -> None:
    """Print a result object as one JSON document to stdout."""
    from covcli.core.files import plain

    output.results().write(json.dumps(plain(asdict(result)), indent=2, allow_nan=False) + "\n")


def say(text: str) -> None:
    """Print one line to stderr, on a terminal wrapped between words."""
    line = one_line(text)
    if sys.stderr.isatty():
        line = "\n".join(wrapped(line, Console(stderr=True).width))
    sys.stderr.write(line + "\n")


def _console() -> Console:
    """Return a console for stdout; a pipe has a fixed width unless `COLUMNS` is set."""
    stream = output.results()
    terminal = stream.isatty()
    known = terminal or "COLUMNS" in os.environ
    return Console(
        file=stream, highlight=False, width=None if known else PIPE, force_terminal=terminal
    )


def columns() -> int:
    """Return the width of stdout, in characters."""
    return _console().width


def show_evaluation(result: "EvaluationResult", verbose: bool = False) -> None:
    """Print an evaluation to stdout: the verdict, one table, and the guarantee.

    Parameters
    ----------
    result
        The evaluation.
    verbose
        Whether to print all other tables too, and intervals.
    """
    console = _console()
    _show(console, tables.verdict(result), style="bold")
    if verbose and (gates := tables.gates(result)) is not None:
        _show(console, gates)
    _show(console, tables.overview(result, verbose))
    _show(console, f"In per cent. {tables.FPR95_NOTE}")
    for line in (tables.errors_found(result, verbose), tables.accepted(result)):
        if line is not None:
            _show(console, line)
    if verbose:
        _show_all(console, result)
    _show(console, result.guarantee.statement)
    for entry in result.explanations:
        _show_explanation(console, entry)


def show_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print rows to stdout in aligned columns, the last one folded where the width is known."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    indent = sum(widths[:-1]) + 2 * len(widths[:-1])
    known = output.results().isatty() or "COLUMNS" in os.environ
    for *names, text in cells:
        padded = (set_cell_size(name, n) for name, n in zip(names, widths, strict=False))
        lines = wrapped(text, columns() - indent) if known else [text]
        shown = "  ".join([*padded, f"\n{' ' * indent}".join(lines)])
        output.results().write(shown.rstrip() + "\n")


def show_table(table: "tables.Table") -> None:
    """Print one table to stdout."""
    _show(_console(), table)


def show_blocks(blocks: Iterable["str | tables.Table"]) -> None:
    """Print paragraphs and tables to stdout."""
    console = _console()
    for block in blocks:
        _show(console, block)


def _show_all(console: Console, result: "EvaluationResult") -> None:
    """Print the tables that the overview does not contain."""
    _show(console, f"Signature {result.signature.parameters}. {tables.false_alarms(result)}")
    _show(console, tables.class_alarms(result))
    _show(console, tables.detection(result))
    if len(result.untrusted) > 1:
        _show(console, tables.means(result))
    for line in tables.deceptions(result):
        _show(console, line)
    for table in (tables.coverage, tables.confidence_bins, tables.confidence_thresholds):
        _show(console, table(result))
    if (errors := tables.own_errors(result)) is not None:
        _show(console, errors)
        _show(console, tables.ERRORS_NOTE)
    _show(console, "Figures in per cent, with 95% intervals in brackets.")


def _show(console: Console, block: "str | tables.Table", style: str = "") -> None:
    """Print a paragraph or a table; if a table is too wide, each row as a block of lines."""
    if isinstance(block, str):
        _write(console, one_line(block), style)
        return
    shown = _grid(block)
    unbounded = console.options.update(max_width=10_000)
    console.print()
    if Measurement.get(console, unbounded, shown).maximum <= console.width:
        console.print(shown)
    else:
        _stack(console, block)
    console.print()


def _grid(block: "tables.Table") -> Table:
    shown = Table(title=block.title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, (head, *cells) in enumerate(zip(block.head, *block.lines, strict=True)):
        widest = max(map(cell_len, [*cells, *head.split()]), default=1)
        lines = textwrap.wrap(one_line(head), widest, break_long_words=False)
        justify: JustifyMethod = "right" if block.numeric[number] else "left"
        shown.add_column(Text("\n".join(lines)), no_wrap=True, justify=justify)
    for row in block.lines:
        shown.add_row(*(Text(one_line(cell)) for cell in row))
    return shown


def _stack(console: Console, block: "tables.Table") -> None:
    """Print each row as its first cell, followed by the other cells with their headings."""
    _write(console, one_line(block.title), "italic")
    for first, *rest in block.lines:
        _write(console, one_line(first), "bold")
        pairs = zip(block.head[1:], rest, strict=True)
        words = [one_line(f"{head} {cell}").replace(" ", HARD) for head, cell in pairs if cell]
        _write(console, f"{HARD}· ".join(words), indent="  ")


def _write(console: Console, text: str, style: str = "", indent: str = "") -> None:
    """Print text wrapped between words; a word wider than the line is broken at punctuation."""
    for line in wrapped(text, console.width - len(indent)):
        console.print(Text(indent + line.replace(HARD, " "), style=style), soft_wrap=True)


def _show_explanation(console: Console, entry: "Explanation") -> None:
    console.print(Text(one_line(tables.explanation(entry)), style="bold"))
    listed = [point for point in entry.points if point.channels]
    if not listed:
        console.print("  no neuron of its main coverage points left its range")
    for point in listed:
        console.print(Text(f"  {one_line(tables.point_share(point))}"))
        for channel in point.channels:
            console.print(Text(f"    {one_line(tables.left_channel(channel))}"))
