"""report: write a self-contained HTML file and a Markdown file about a run, from its files."""

import base64
import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from covcli.core import files, run_folders
from covcli.core.errors import CovcliError, one_line
from covcli.core.opening import check_within, is_file
from covcli.core.version import __version__
from covcli.reporting import documents, markdown, per_image, tables
from covcli.reporting.blocks import Block, Gallery, Picture, ReportData, Section
from covcli.reporting.headline import Headline, Outcome, headline
from covcli.reporting.sections import SECTIONS
from covcli.reporting.svg import inline
from covcli.reporting.tables import Table
from covcli.reporting.thumbnails import data_uri, sheet

FILES = (per_image.SCORES, per_image.SAMPLES)


@dataclass(frozen=True)
class ReportResult:
    """The files that `report` wrote.

    Attributes
    ----------
    html, markdown
        The two reports.
    figures
        The pictures of the Markdown file; those of the HTML file are embedded.

    Examples
    --------
    >>> page = Page("title", "subject", "verdict", "none", [Section("Section", ["Some text."])])
    >>> result = write_page(page, Path("."), "page", force=False)
    >>> result.html, result.markdown, result.figures
    (PosixPath('page.html'), PosixPath('page.md'), [])
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
        The run folder; None: the newest in `runs`.
    output
        The output folder; None: the run folder.
    force
        Whether to overwrite an existing report.
    runs
        The folder of run folders.

    Raises
    ------
    CovcliError
        If the folder has no evaluation, one of its files is damaged, or a report exists already.

    Examples
    --------
    >>> from covcli import report
    >>> report("runs/latest").html
    PosixPath('runs/latest/report.html')
    """
    run = run_folders.newest_run(Path(runs)) if run is None else Path(run)
    data = read(run)
    folder = run if output is None else Path(output)
    signature = data.evaluation.signature
    subject = f"Signature {signature.parameters} of {signature.checkpoint}"
    with holding_together(run):
        opening = headline(data)
        sections = [part for name in SECTIONS if (part := SECTIONS.get(name)(data)) is not None]
        page = Page("covcli report", subject, opening.verdict, opening.outcome, sections, opening)
        return write_page(page, folder, "report", force)


@dataclass(frozen=True)
class Page:
    """What a report shows.

    Attributes
    ----------
    title, subject
        What it is, and of what.
    verdict, outcome
        The answer, and whether the gates pass; "none" without gates.
    sections
        The parts.
    headline
        What an evaluation's report opens with.
    """

    title: str
    subject: str
    verdict: str
    outcome: Outcome
    sections: list[Section]
    headline: Headline | None = None


def write_page(page: Page, folder: Path, stem: str, force: bool) -> ReportResult:
    """Write a page as HTML and as Markdown with its pictures beside it, all or nothing.

    Parameters
    ----------
    page
        What to show.
    folder, stem
        Where: `<stem>.html`, `<stem>.md` and `figures/`.
    force
        Whether to overwrite an earlier page.

    Raises
    ------
    CovcliError
        If the page exists already, or cannot be written.
    """
    html, markdown_file = folder / f"{stem}.html", folder / f"{stem}.md"
    for path in (html, markdown_file):
        files.refuse_existing(path, force)
    check_within(folder, folder / "figures" / "of any name")
    pictures = dict(
        content for section in page.sections for block in section.blocks
        for content in _picture(block)
    )  # fmt: skip
    figures = {name: folder / "figures" / f"{name}.png" for name in pictures}
    contents = {figures[name]: content for name, content in pictures.items()}
    contents[markdown_file] = _markdown(page).encode(errors="backslashreplace")
    contents[html] = _html(page).encode(errors="backslashreplace")
    with run_folders.writing(html, force):
        files.publish(contents)
    return ReportResult(html, markdown_file, list(figures.values()))


@contextmanager
def holding_together(run: Path) -> Iterator[None]:
    """Convert errors caused by inconsistent results to a CovcliError.

    matplotlib's warning about characters missing in its font is hidden: it is visible in the
    picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ ", UserWarning)
            yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CovcliError(f"its results are inconsistent ({error!r})", where=run) from None


def read(run: Path) -> ReportData:
    """Read the files of a run for a report.

    Raises
    ------
    CovcliError
        If a file is missing, damaged, or does not belong to the evaluation.

    Examples
    --------
    >>> read(Path("runs/latest")).sets
    ['trusted', 'photos?limit=100']
    """
    path = run / "evaluation.json"
    if not is_file(path):
        fix = "name its folder" if is_file(run) else "run `covcli evaluate` first"
        raise CovcliError("holds no evaluation", where=run, fix=fix)
    evaluation = documents.read_evaluation(path)
    logs = sorted(run.glob("training_results_*.json"))
    for name, recorded in evaluation.digests.items():  # earlier versions recorded none
        if name in FILES and files.digest_file(run / name) != recorded:
            raise CovcliError(
                "does not belong to the evaluation beside it",
                where=run / name,
                fix="run `covcli evaluate --force` again",
            )
    scores = per_image.read_scores(run / per_image.SCORES)
    sets, explanations = 1 + len(evaluation.untrusted), len(evaluation.explanations)
    samples = per_image.read_samples(run / per_image.SAMPLES, sets, explanations)
    training = documents.read_training_log(logs[-1]) if logs else None
    return ReportData(evaluation, scores, samples, training)


def _picture(block: Block) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of the PNG file of a block, for the Markdown file."""
    if isinstance(block, Picture):
        buffer = io.BytesIO()
        block.figure.savefig(
            buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None}
        )
        yield block.name, buffer.getvalue()
    elif isinstance(block, Gallery) and block.images:
        yield block.name, sheet(block.images)


def _html(page: Page) -> str:
    """Return a self-contained page that loads nothing from elsewhere."""
    environment = Environment(
        loader=PackageLoader("covcli.reporting"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "one_line": one_line, "breakable": _breakable, "data_uri": data_uri
    }  # fmt: skip
    style, script = (_resource(environment, name) for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    charts = {
        block.name: inline(block.figure, block.name, one_line(block.seen))
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Picture)
    }
    return environment.get_template("report.html").render(
        **vars(page), charts=charts, style=style, script=script, policy=policy,
        note=tables.FPR95_NOTE, version=__version__,
    )  # fmt: skip


def _breakable(text: str) -> Markup:
    """Escape a name, and allow line breaks after punctuation."""
    return Markup("<wbr>").join(re.findall(r"[^/?&:,=]*[/?&:,=]?", one_line(text)))


def _resource(environment: Environment, name: str) -> Markup:
    """Return the content of a template file, without escaping."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _hash(content: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows an inline element."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _markdown(page: Page) -> str:
    blocks = [f"# {page.title}", f"**{markdown.escape(page.verdict)}**"]
    if page.headline is None:
        blocks.append(markdown.escape(page.subject))
    else:
        tiles = Table(
            "Figures", ["figure", "value", "beside"],
            [[tile.title, tile.value, tile.note] for tile in page.headline.tiles],
        )  # fmt: skip
        first = [tiles, page.headline.gates, page.headline.comparison]
        blocks += [_markdown_block(table) for table in first if table is not None]
    for section in page.sections:
        blocks.append(f"## {markdown.escape(section.title)}")
        blocks += [_markdown_block(block) for block in section.blocks]
    return markdown.document([*blocks, f"covcli {__version__}"])


def _markdown_block(block: Block) -> str:
    if isinstance(block, str):
        return markdown.escape(block)
    if isinstance(block, Picture):
        caption = f"{markdown.escape(block.caption)}."
        return f"![{markdown.escape(block.seen)}](figures/{block.name}.png)\n\n{caption}"
    title = f"### {markdown.escape(block.title)}"
    if isinstance(block, Table):
        return f"{title}\n\n{markdown.table(block)}"
    if not block.images:
        return f"{title}\n\n{markdown.escape(block.otherwise)}"
    seen = "; ".join(thumbnail.seen for thumbnail in block.images)
    return f"{title}\n\n![{markdown.escape(seen)}](figures/{block.name}.png)"
