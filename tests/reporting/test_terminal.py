"""The terminal: a verdict first, and nothing cut whatever the width."""

from dataclasses import replace

import pytest
from example import STATEMENT, outcome, result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from covcli.core.errors import one_line
from covcli.reporting import tables
from covcli.reporting.documents import Estimate, EvaluationResult, OwnErrors
from covcli.reporting.terminal import show_evaluation

NAMES = ["mnist?limit=1000", "noise:gaussian?limit=500", "attack:pgd?limit=200&eps=8/255"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def show(evaluation: EvaluationResult, columns: int, verbose: bool = False) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        show_evaluation(evaluation, verbose)
        return capsys.readouterr().out.splitlines()

    return show


def test_the_first_line_is_the_verdict(shown) -> None:
    first = shown(result(NAMES), 200)[0]
    assert first == (
        "flags 4.9% of trusted images (promised at most 6.2%), catches 76% of mnist, "
        "76% of noise:gaussian, 76% of attack:pgd"
    )
    gates = [outcome(), outcome(), outcome(passed=False), outcome()]
    assert shown(result(NAMES, gates), 80)[0] == "3 of 4 gates passed: do not release"
    assert shown(result(NAMES, gates[:2]), 80)[0] == "2 of 2 gates passed"


def test_a_row_a_set_fits_80_columns_and_60_stack(shown) -> None:
    wide = shown(result(NAMES), 80)
    for name in NAMES:
        (row,) = [line for line in wide if line.startswith(name)]
        assert row.split()[1:] == ["1000", "96.4", "87.7", "15.6", "76.5"]
    narrow = shown(result(NAMES), 60)
    at = narrow.index(NAMES[0])
    text = " ".join(line.strip() for line in narrow[at + 1 : at + 3])
    assert text == "images 1000 · AUROC 96.4 · softmax AUROC 87.7 · FPR95 15.6 · detected at α 76.5"
    assert "[" not in "".join(wide + narrow)
    assert "96.4 [95.4, 97.4]" in " ".join(shown(result(NAMES), 80, verbose=True))


def test_how_well_wrong_answers_are_found_is_told_beside_the_guarantee_for_them(shown) -> None:
    evaluation = result(NAMES)
    found = {
        name: OwnErrors(
            9, Estimate(value, value - 0.1, value + 0.1), *[Estimate(0.1, 0, 1)] * 2, []
        )
        for name, value in (("coverage", 0.75), ("softmax", 0.86), ("knn", 0.6))
    }
    wrong = replace(evaluation, trusted=replace(evaluation.trusted, errors=found))
    text = " ".join(shown(wrong, 400))
    images = evaluation.trusted.images
    assert f"wrong on 9 of {images} trusted images" in text
    assert "coverage 75.0%, softmax 86.0%. --max-error bounds" in text
    none = replace(evaluation, trusted=replace(evaluation.trusted, errors=None))
    assert "--max-error" not in " ".join(shown(none, 400))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    columns=st.integers(40, 120),
    names=st.lists(st.from_regex(r"[a-z]{1,9}(:[a-zé]{1,9}(/[a-z漢]{1,9}){0,3})?(\?[a-z]{1,8}=[0-9]{1,4})?",
                                 fullmatch=True), min_size=1, max_size=9, unique=True),
    verbose=st.booleans(),
    points=st.integers(1, 3),
)  # fmt: skip
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(
    shown, columns: int, names: list[str], verbose: bool, points: int
) -> None:
    evaluation = result(names, [outcome(name=names[0])], points=points)
    lines = shown(evaluation, columns, verbose)
    assert max(map(cell_len, lines)) <= columns
    text = "".join("".join(lines).split())
    for name in names:
        assert name in text
    assert "…" not in text
    assert STATEMENT.replace(" ", "") in text
    table = tables.overview(evaluation, verbose)
    for cell in {cell for row in table.rows for cell in row[1:]}:
        assert cell.replace(" ", "") in text


def test_many_sets_are_summed_up() -> None:
    names = [f"noise:gaussian?seed={i}" for i in range(12)]
    assert tables.verdict(result(names)).endswith(
        "catches 76% of noise:gaussian?seed=0 to 76% of noise:gaussian?seed=9, of 12 sets"
    )


@pytest.mark.parametrize("columns", [60, 200])
@pytest.mark.parametrize(
    "name",
    ["[bold red]x[/bold red]", "[/]", "[link=http://x]y[/link]", ":smile:", "\x1b[31mx", "\u202ex",
     "\u2066x", "\ud800", "a\nb", "\x00"],
)  # fmt: skip
def test_a_name_takes_no_effect_and_is_spelled_out(shown, name: str, columns: int) -> None:
    lines = shown(result([name, "mnist"]), columns, verbose=True)
    assert any(one_line(name) in line for line in lines)
    assert all(line.isprintable() for line in lines)
