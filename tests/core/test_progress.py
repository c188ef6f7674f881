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


@pytest.mark.parametrize("width", [60, 80])
def test_a_bar_moves_with_the_runs_of_the_network_and_cuts_no_title(width: int) -> None:
    title = "making attack:adaptive-pgd?eps=8/255&steps=20&limit=128"
    shown = io.StringIO()
    bar = Bar(Console(file=shown, force_terminal=True, width=width, highlight=False))
    bar.start(title, 128)
    for _ in range(7):
        bar.step()
    bar._bar.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "+7 runs" in text
    assert "…" not in text
    assert [word for word in re.findall(r"[\w.-]+", title) if word not in text] == []
    bar.advance(64)
    bar._bar.refresh()
    assert "64/128" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    bar.close()


def test_a_log_tells_of_runs_before_the_first_image_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("covcli.core.progress.time.monotonic", lambda: clock[0])
    lines = Lines()
    lines.start("making attack:cw", 100)
    for _ in range(500):
        clock[0] += 0.1
        lines.step()
    lines.advance(50)
    clock[0] += 30
    lines.advance(20)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "making attack:cw: 0/100, 300 runs of the network since",
        "making attack:cw: 70/100, 1 images/s, 34 s left",
    ]


def test_a_quiet_command_leaves_the_log_of_its_program_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("covcli")
    with reporter(quiet=True):
        log.warning("unheard")
    log.warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]
