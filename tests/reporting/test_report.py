"""The report: the answer first, every section, self-contained, escaped."""

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from example import outcome, result, run_folder

from covcli.core.errors import CovcliError
from covcli.reporting import pipelines
from covcli.reporting.headline import headline
from covcli.reporting.report import read, report
from covcli.reporting.sections import SECTIONS
from covcli.reporting.terminal import show_evaluation

SETS = ["mnist?limit=1000", "noise:gaussian", "noise:uniform", "attack:fgsm", "attack:pgd"]


@pytest.mark.parametrize("name", list(SECTIONS))
def test_every_report_section_keeps_the_contract(name: str, evaluated: Path) -> None:
    section = SECTIONS.get(name)(read(evaluated))
    assert section is not None
    assert section.title
    assert section.blocks


def test_reports_are_self_contained_and_escape_what_they_show(evaluated: Path) -> None:
    path = evaluated / "evaluation.json"
    text = path.read_text().replace("photos?limit=200", "<script>$x_1</script>")
    document = json.loads(text.replace("first.2", "\\u001b[31m<i>first"))
    del document["digests"]  # as of an earlier version: the files beside it are edited here
    path.write_text(json.dumps(document))
    scores = evaluated / "scores.csv.gz"
    table = gzip.decompress(scores.read_bytes()).decode()
    scores.write_bytes(
        gzip.compress(table.replace("photos?limit=200", "<script>$x_1</script>").encode())
    )
    written = report(evaluated)
    page = written.html.read_text()
    for raw in ("<script>$", "<i>", "\x1b", "http:", "https:"):
        assert raw not in page
    assert len(written.figures) >= 7
    markdown = written.markdown.read_text()
    assert markdown.startswith("# covcli report\n\n**flags ")
    assert "<script" not in markdown
    for figure in written.figures:
        assert f"(figures/{figure.name})" in markdown
        assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CovcliError, match="exists"):
        report(evaluated)
    report(evaluated, force=True)


def test_of_a_thousand_classes_the_worst_twenty_are_shown_and_the_file_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = result(["mnist"])
    every = [
        replace(few.trusted.false_alarms_by_class[0], name=f"kind-{k}", alarms=k, value=k / 1000)
        for k in range(1000)
    ]
    many = replace(few, trusted=replace(few.trusted, false_alarms_by_class=every))
    written = report(run_folder(tmp_path / "run", many))
    show_evaluation(many, verbose=True)
    texts = [written.html.read_text(), written.markdown.read_text(), capsys.readouterr().out]
    for text in texts:
        assert "the first 20 of 1000 classes; evaluation.json has all" in re.sub(r"\s+", " ", text)
        named = set(re.findall(r"(?<!predicted )kind-\d+", text))
        assert named == {f"kind-{k}" for k in range(980, 1000)}
    assert set(re.findall(r"kind-\d+", pipelines.summary(many))) == {"kind-999"}
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert len(stored["trusted"]["false_alarms_by_class"]) == 1000


class Page(HTMLParser):
    """Every element of a page, with its attributes, and what the inline ones hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        tag = self.elements[-1][0] if self.elements else ""
        if tag in ("style", "script"):
            self.inline[tag] = self.inline.get(tag, "") + data

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of an evaluation of five sets and 18 layers, with baselines and explanations."""
    theirs = {"softmax": 0.877, **{f"baseline{i}": 0.8 + 0.01 * i for i in range(4)}}
    evaluation = result(SETS, [outcome(), outcome(passed=False)], theirs, points=18)
    folder = run_folder(tmp_path_factory.mktemp("runs") / "large", evaluation, explanations=12)
    return report(folder).html.read_text()


def test_a_report_is_small_and_loads_and_runs_nothing_of_others(large: str) -> None:
    assert len(large.encode()) < 1_000_000
    page = Page(large)
    policy = next(m["content"] or "" for m in page.of("meta") if m.get("http-equiv"))
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert (allowed["default-src"], allowed["img-src"]) == ("'none'", "data:")
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.inline[tag].encode()).digest()).decode()
        assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"
        assert len(page.of(tag)) == 1
    for _, attributes in page.elements:
        assert not attributes.keys() & {"style", "srcset", "action", "xlink:href"}
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href"):
            assert re.match(r"data:|#", attributes.get(key) or "#")


def test_a_report_speaks_to_those_who_do_not_see_it(large: str) -> None:
    page = Page(large)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 == levels.count(1)
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', large)
    assert set(targets) <= set(ids)
    assert {th.get("scope") for th in page.of("th")} == {"col", "row"}
    assert len(page.of("table")) == len(page.of("caption"))
    assert all(len(img["alt"] or "") > 20 for img in page.of("img"))
    charts = page.of("svg")
    assert charts
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 20 for chart in charts)
    assert 'alt="image 3 of mnist?limit=1000: flagged, predicted cat, p = ' in large


def test_the_tiles_say_how_many_answers_pass_and_how_many_of_those_are_wrong(
    tmp_path: Path,
) -> None:
    data = read(run_folder(tmp_path / "run", result(SETS[:1])))
    opening = headline(data)
    assert [tile.value for tile in opening.tiles[:3]] == ["89.7%", "4.9%", "98.7%"]
    trusted = data.scores["trusted"]
    passed = np.array([score <= 3.873 for score in trusted.scores["coverage"]])
    wrong = np.array([a != b for a, b in zip(trusted.predicted, trusted.label, strict=True)])
    tile = opening.tiles[3]
    assert tile.value == f"{100 * passed.sum() / len(passed):.1f}%"
    assert tile.note.startswith(f"{100 * (wrong & passed).sum() / passed.sum():.1f}% of those")
    assert (opening.outcome, opening.gates) == ("none", None)


def test_the_best_baseline_stands_beside_ours_with_the_difference() -> None:
    from covcli.reporting import tables

    table = tables.comparison(result(SETS[:2], theirs={"softmax": 0.877, "energy": 0.991}))
    assert table.rows[0][2:7] == ["96.4", "energy", "99.1", "−2.7", "15.6"]
    assert table.footer is not None
    assert table.footer[2:6] == ["98.7", "energy", "99.1", "−0.4"]
