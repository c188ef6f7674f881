"""Progress on a terminal and in a log: names take no effect there."""

import io
import logging
import re
import sys
import warnings

import pytest
from rich.console import Console

from covcli.core.progress import Bar, Lines, reporter

NAMES = ["[bold red]x[/bold red]", "[/]", "[link=http://x]y[/link]", "[/red]", "\\[x]", ":smile:"]


@pytest.mark.parametrize("name", NAMES)
def test_a_bar_shows_a_name_as_it_is(name: str) -> None:
    shown = io.StringIO()
    bar = Bar(Console(file=shown, force_terminal=True, width=200, highlight=False))
    bar.start(f"scoring {name}", 10)
    bar.advance(3)
    bar.note(f"found {name}")
    bar.close()
    assert f"scoring {name}" in shown.getvalue()
    assert f"found {name}" in shown.getvalue()


def test_control_and_direction_characters_are_spelled_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "\x1b[31m\u202egnp.x\x07\ud800\r\n"
    shown = io.StringIO()
    bar = Bar(Console(file=shown, force_terminal=True, width=200, highlight=False))
    lines = Lines()
    for progress in (bar, lines):
        progress.start(name, 10)
        progress.note(name)
        progress.close()
    for text in (shown.getvalue(), capsys.readouterr().err):
        assert "\\x1b[31m\\u202egnp.x\\x07\\ud800" in text
        assert not {"\u202e", "\x07", "\ud800"} & set(text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", NAMES)
def test_a_log_line_on_a_terminal_shows_a_name_as_it_is(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "200")
    with reporter(quiet=False) as bar:
        assert isinstance(bar, Bar)
        logging.getLogger("covcli.data").warning("%s: passed over", name)
        warnings.warn(f"{name} is odd", stacklevel=1)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())  # colours are rich's own
    assert f"{name}: passed over" in plain
    assert f"{name} is odd" in plain
