"""The report: every section, self-contained, escaped."""

import gzip
from pathlib import Path

import pytest

from covcli.core.errors import CovcliError
from covcli.reporting.report import report
from covcli.reporting.sections import SECTIONS


@pytest.mark.parametrize("name", list(SECTIONS))
def test_every_report_section_keeps_the_contract(name: str, evaluated: Path) -> None:
    from covcli.reporting.report import read

    section = SECTIONS.get(name)(read(evaluated))
    assert section is not None
    assert section.title
    assert section.blocks


def test_reports_are_self_contained_and_escape_what_they_show(evaluated: Path) -> None:
    path = evaluated / "evaluation.json"
    text = path.read_text().replace("photos?limit=200", "<script>$x_1</script>")
    path.write_text(text.replace("first.2", "\\u001b[31m<i>first"))
    scores = evaluated / "scores.csv.gz"
    table = gzip.decompress(scores.read_bytes()).decode()
    scores.write_bytes(
        gzip.compress(table.replace("photos?limit=200", "<script>$x_1</script>").encode())
    )
    result = report(evaluated)
    page = result.html.read_text()
    for raw in ("<script", "<i>", "\x1b", "http"):
        assert raw not in page
    assert page.count("data:image/png;base64,") == len(result.figures) >= 7
    markdown = result.markdown.read_text()
    assert "<script" not in markdown
    for figure in result.figures:
        assert f"(figures/{figure.name})" in markdown
        assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CovcliError, match="exists"):
        report(evaluated)
    report(evaluated, force=True)
