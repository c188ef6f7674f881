"""report: one self-contained HTML file and a Markdown file about a run, from its files alone."""

import base64
import html
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from covcli.core import file_checks, files
from covcli.core.errors import CovcliError, one_line
from covcli.core.version import __version__
from covcli.reporting.pictures import Picture, ReportData, Section
from covcli.reporting.sections import SECTIONS
from covcli.reporting.tables import Table

Block: TypeAlias = str | Table | Picture
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.9rem;display:block;overflow-x:auto}
th,td{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:right}
th:first-child,td:first-child{text-align:left}
img{max-width:100%}h1,h2{line-height:1.2}
"""


@dataclass(frozen=True)
class ReportResult:
    """What `report` wrote.

    Attributes
    ----------
    html, markdown
        The two reports.
    figures
        The pictures, which the Markdown file shows; the HTML file holds its own.
    """

    html: Path
    markdown: Path
    figures: list[Path]


def report(run: Path, output: Path | None = None, force: bool = False) -> ReportResult:
    """Write the report of a run folder that holds an evaluation.

    Parameters
    ----------
    run
        The folder.
    output
        Where to write; by default the run folder.
    force
        Whether to overwrite an earlier report.

    Raises
    ------
    CovcliError
        If the folder holds no evaluation, a file of it is broken, or a report exists already.
    """
    found = read(run)
    folder = output or run
    page, markdown = folder / "report.html", folder / "report.md"
    for path in (page, markdown):
        files.refuse_existing(path, force)
    if (folder / "figures").is_symlink():
        raise CovcliError("is a link: pictures would leave the folder", where=folder / "figures")
    try:
        made = [part for name in SECTIONS if (part := SECTIONS.get(name)(found)) is not None]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CovcliError(f"its results do not hold together ({error!r})", where=run) from None
    pictures = [
        (block, _png(block.figure))
        for section in made
        for block in section.blocks
        if isinstance(block, Picture)
    ]
    figures = {picture.name: folder / "figures" / f"{picture.name}.png" for picture, _ in pictures}
    for picture, content in pictures:
        files.write_bytes(figures[picture.name], content)
    encoded = {picture.name: content for picture, content in pictures}
    files.write_bytes(page, _html(made, encoded).encode())
    files.write_bytes(markdown, _markdown(made).encode())
    return ReportResult(page, markdown, list(figures.values()))


def read(run: Path) -> ReportData:
    """Read the files of a run that a report is made of."""
    path = run / "evaluation.json"
    if not path.is_file():
        raise CovcliError("holds no evaluation", where=run, fix="run `covcli evaluate` first")
    evaluation = files.read_json(path)
    if not isinstance(evaluation, dict) or evaluation.get("schema") != files.SCHEMA:
        raise CovcliError(f"is not an evaluation of schema {files.SCHEMA}", where=path)
    logs = sorted(run.glob("training_results_*.json"))
    try:
        table = io.BytesIO(file_checks.read_gzip(run / "scores.csv.gz"))
        scores = pd.read_csv(table, keep_default_na=False, dtype={"set": str})
        file_checks.check_npz(run / "samples.npz")
        with np.load(run / "samples.npz", allow_pickle=False) as archive:
            samples = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CovcliError(f"a result cannot be read ({one_line(str(error))})", where=run) from None
    return ReportData(evaluation, scores, samples, files.read_json(logs[-1]) if logs else None)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _html(sections: list[Section], pictures: dict[str, bytes]) -> str:
    parts = []
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [_html_block(block, pictures) for block in section.blocks]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>covcli report</title><style>{STYLE}</style></head><body>"
        f"<h1>covcli report</h1>{''.join(parts)}"
        f"<footer>covcli {html.escape(__version__)}</footer></body></html>\n"
    )


def _html_block(block: Block, pictures: dict[str, bytes]) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(one_line(block))}</p>"
    if isinstance(block, Picture):
        data = base64.b64encode(pictures[block.name]).decode()
        return f'<p><img alt="{html.escape(block.caption)}" src="data:image/png;base64,{data}"></p>'
    lines = [_html_row("th", block.head), *[_html_row("td", row) for row in block.rows]]
    return f"<table>{''.join(lines)}</table>"


def _html_row(tag: str, cells: list[str]) -> str:
    inner = "".join(f"<{tag}>{html.escape(one_line(cell))}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _markdown(sections: list[Section]) -> str:
    parts = ["# covcli report"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(parts) + f"\n\ncovcli {__version__}\n"


def _markdown_block(block: Block) -> str:
    if isinstance(block, str):
        return html.escape(one_line(block), quote=False)
    if isinstance(block, Picture):
        return f"![{block.caption}](figures/{block.name}.png)"
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    return "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)


def _markdown_cell(cell: Any) -> str:
    return html.escape(one_line(str(cell)), quote=False).replace("|", "\\|")
