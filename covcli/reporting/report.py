"""report: one self-contained HTML file and a Markdown file about a run, from its files alone."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from covcli.core import files, run_folders
from covcli.core.errors import CovcliError, one_line
from covcli.core.version import __version__
from covcli.reporting import documents, markdown, per_image
from covcli.reporting.pictures import Block, Picture, ReportData, Section
from covcli.reporting.sections import SECTIONS


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


def report(
    run: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    runs: str | Path = "runs",
) -> ReportResult:
    """Write the report of a run folder that holds an evaluation.

    Parameters
    ----------
    run
        The folder; by default the newest in `runs`.
    output
        Where to write; by default the run folder.
    force
        Whether to overwrite an earlier report.
    runs
        The folder of run folders.

    Raises
    ------
    CovcliError
        If the folder holds no evaluation, a file of it is broken, or a report exists already.
    """
    run = run_folders.newest_run(Path(runs)) if run is None else Path(run)
    data = read(run)
    folder = run if output is None else Path(output)
    page, markdown_file = folder / "report.html", folder / "report.md"
    for path in (page, markdown_file):
        files.refuse_existing(path, force)
    if (folder / "figures").is_symlink():
        raise CovcliError("is a link: pictures would leave the folder", where=folder / "figures")
    try:
        parts = [part for name in SECTIONS if (part := SECTIONS.get(name)(data)) is not None]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CovcliError(f"its results do not hold together ({error!r})", where=run) from None
    pictures = {
        block.name: _png(block.figure)
        for part in parts
        for block in part.blocks
        if isinstance(block, Picture)
    }
    figures = {name: folder / "figures" / f"{name}.png" for name in pictures}
    for name, content in pictures.items():
        files.write_bytes(figures[name], content)
    files.write_bytes(page, _html(parts, pictures).encode())
    files.write_bytes(markdown_file, _markdown(parts).encode())
    return ReportResult(page, markdown_file, list(figures.values()))


def read(run: Path) -> ReportData:
    """Read the files of a run that a report is made of."""
    path = run / "evaluation.json"
    if not path.is_file():
        raise CovcliError("holds no evaluation", where=run, fix="run `covcli evaluate` first")
    evaluation = documents.read_evaluation(path)
    logs = sorted(run.glob("training_results_*.json"))
    scores = per_image.read_scores(run / per_image.SCORES)
    sets, explanations = 1 + len(evaluation.untrusted), len(evaluation.explanations)
    samples = per_image.read_samples(run / per_image.SAMPLES, sets, explanations)
    training = documents.read_training_log(logs[-1]) if logs else None
    return ReportData(evaluation, scores, samples, training)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _html(sections: list[Section], pictures: dict[str, bytes]) -> str:
    environment = Environment(
        loader=PackageLoader("covcli.reporting"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["one_line"] = one_line
    encoded = {name: base64.b64encode(content).decode() for name, content in pictures.items()}
    page = environment.get_template("report.html")
    return page.render(sections=sections, pictures=encoded, version=__version__)


def _markdown(sections: list[Section]) -> str:
    blocks = ["# covcli report"]
    for section in sections:
        blocks.append(f"## {markdown.escape(section.title)}")
        blocks += [_markdown_block(block) for block in section.blocks]
    return markdown.document([*blocks, f"covcli {__version__}"])


def _markdown_block(block: Block) -> str:
    if isinstance(block, str):
        return markdown.escape(block)
    if isinstance(block, Picture):
        return f"![{markdown.escape(block.caption)}](figures/{block.name}.png)"
    return f"### {markdown.escape(block.title)}\n\n{markdown.table(block)}"
