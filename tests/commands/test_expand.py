"""Help, short names and usage errors, as Typer makes them of the dataclasses."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from test_cli import call

from covcli.cli import app
from covcli.commands.expand import PANELS

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands


def options() -> Iterator[tuple[str, Any]]:
    for name, command in COMMANDS.items():
        for option in command.params:
            if option.param_type_name == "option":
                yield name, option


def test_every_option_stands_in_a_panel_and_says_what_it_is() -> None:
    wrong = [(n, o.name) for n, o in options() if o.rich_help_panel not in PANELS or not o.help]
    assert wrong == []


def test_a_short_name_means_one_thing_in_every_command() -> None:
    meanings: dict[str, set[str]] = {}
    for _, option in options():
        for name in option.opts:
            if not name.startswith("--"):
                meanings.setdefault(name, set()).add(option.name)
    assert {name: options for name, options in meanings.items() if len(options) > 1} == {}
    assert {"-c", "-q", "-o", "-m", "-f"} <= meanings.keys()


def test_panels_come_in_their_order_and_examples_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name, command in COMMANDS.items():
        code, out, err = call(capsys, name, "-h")
        assert (code, err) == (0, "")
        titles = re.findall("─ ([A-Z][a-z ]+) ─", out)
        titles = [title for title in titles if title != "Arguments"]
        assert titles == [panel for panel in PANELS if panel in titles]
        assert titles[-1] == "Output"
        assert "Options" not in titles
        assert f"$ covcli {name}" in out.partition("Examples:")[2]
        assert "--no-" not in out
        assert max(map(len, out.splitlines())) == 120, name
        assert command.epilog


def test_the_examples_parse() -> None:
    import shlex

    for name, command in COMMANDS.items():
        for line in command.epilog.splitlines()[1:]:
            words = shlex.split(line.removeprefix("$ covcli ").partition(" > ")[0])
            assert words[0] == name
            command.make_context(name, words[1:])


@pytest.mark.parametrize("width", [60, 80])
def test_no_word_of_the_help_is_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in COMMANDS:
        _, out, _ = call(capsys, name, "--help")
        told = {o for n, option in options() if n == name for o in option.opts}
        assert [o for o in told if not re.search(rf"(?<![-\w]){o}(?![-\w])", out)] == []
        assert not re.search(r"\w…", out), (name, width)
        assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize("columns", ["0", "²", "99999999999", "1"])
def test_a_wrong_width_in_the_environment_takes_no_output_away(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for command in (["--help"], ["check", "--help"], ["list", "methods"]):
        code, out, err = call(capsys, *command)
        assert (code, err) == (0, "")
        assert len("".join(out.split())) > 100
        assert max(map(len, out.splitlines())) < 1000


def test_a_bare_call_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys) == call(capsys, "--help")


def test_a_usage_error_points_to_the_help_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, path in (
        (["evaluate"], "covcli evaluate"),
        (["train", "--epoch", "3"], "covcli train"),
        (["build-signature"], "covcli build-signature"),
        (["report", "--runs"], "covcli report"),
        (["trian"], "covcli"),
    ):
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert err.endswith(f"; see {path} --help\n")


def test_a_flag_can_be_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    context = COMMANDS["report"].make_context("report", ["--force", "--json", "--no-force"])
    assert (context.params["force"], context.params["json"]) == (False, True)
