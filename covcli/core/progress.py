"""Progress of long work, shown by the command line; the library itself prints nothing."""

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from covcli.core.errors import one_line
from covcli.core.wrapping import wrapped

log = logging.getLogger(__name__)
_work = threading.local()
BESIDE = 48  # columns that stand beside a bar's title
LINE_EVERY_SECONDS = 30.0


class Progress(Protocol):
    """Receives progress. Tasks run one after another: a `start` ends the previous task."""

    def start(self, title: str, total: int) -> None:
        """Begin a task of `total` images."""

    def advance(self, images: int) -> None:
        """Report that this many more images are done."""

    def step(self) -> None:
        """Count one run of the network: within a batch of an attack there are many."""

    def note(self, line: str) -> None:
        """Report one line of results."""


class Silent:
    """Shows nothing.

    Examples
    --------
    >>> from covcli.core.progress import Silent
    >>> Silent().note("not shown")
    """

    def start(self, title: str, total: int) -> None:
        """Do nothing."""

    def advance(self, images: int) -> None:
        """Do nothing."""

    def step(self) -> None:
        """Do nothing."""

    def note(self, line: str) -> None:
        """Do nothing."""


class _Throughput(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """Return the speed, or nothing before it is known."""
        return Text(f"{task.speed:.0f} images/s" if task.speed else "")


class Bar:
    """Progress on a terminal: one bar for the current task; a long title takes several lines."""

    def __init__(self, console: Console) -> None:
        self._width = max(16, console.width - BESIDE)
        self._bar = rich_progress.Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(), TextColumn("{task.fields[runs]}"), _Throughput(),
            TimeRemainingColumn(), console=console, transient=True, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, runs="")
        self._runs = 0

    def start(self, title: str, total: int) -> None:
        """Begin a task."""
        self._runs = 0
        self._bar.reset(self._task, description=self._title(title), total=total, runs="")
        self._bar.start()

    def _title(self, title: str) -> str:
        return "\n".join(wrapped(one_line(title), self._width))

    def advance(self, images: int) -> None:
        """Move the bar."""
        self._runs = 0
        self._bar.update(self._task, advance=images, runs="")

    def step(self) -> None:
        """Count the runs of the network since the bar last moved, from the second on."""
        self._runs += 1
        if self._runs > 1:
            self._bar.update(self._task, runs=f"+{self._runs} runs")

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(Text(one_line(line)))

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()


class Lines:
    """Progress in a log: at most one line every 30 seconds, and the notes."""

    def __init__(self) -> None:
        self._title, self._total, self._done, self._runs = "", 0, 0, 0
        self._began = self._last = time.monotonic()

    def start(self, title: str, total: int) -> None:
        """Begin a task."""
        self._title, self._total, self._done, self._runs = one_line(title), total, 0, 0
        self._began = self._last = time.monotonic()

    def advance(self, images: int) -> None:
        """Count images, and log the progress from time to time."""
        self._done += images
        self._runs = 0
        self._say_now_and_then()

    def step(self) -> None:
        """Count the runs of the network since the last image, and say so now and then."""
        self._runs += 1
        self._say_now_and_then()

    def _say_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._last < LINE_EVERY_SECONDS:
            return
        self._last = now
        line = f"{self._title}: {self._done}/{self._total}"
        if speed := self._done / (now - self._began):
            line += f", {speed:.0f} images/s, {(self._total - self._done) / speed:.0f} s left"
        self.note(f"{line}, {self._runs} runs of the network since" if self._runs > 1 else line)

    def note(self, line: str) -> None:
        """Print a line."""
        sys.stderr.write(one_line(line) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Do nothing."""


class Quiet(Lines):
    """Prints nothing but errors."""

    def note(self, line: str) -> None:
        """Do nothing."""


@contextmanager
def reporter(quiet: bool) -> Iterator[Bar | Lines]:
    """Yield an object that shows progress on stderr; the library's log is routed through it."""
    # Without force_terminal, rich treats FORCE_COLOR as a terminal and draws a bar into a log.
    console = Console(stderr=True, highlight=False, force_terminal=sys.stderr.isatty())
    shown = Quiet() if quiet else Bar(console) if console.is_terminal else Lines()
    logger = logging.getLogger("covcli")
    handler: logging.Handler
    if isinstance(shown, Bar):
        handler = RichHandler(
            console=console, show_time=False, show_level=False, show_path=False, markup=False
        )
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    level = logger.level
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.addHandler(handler)
    shows = warnings.showwarning
    warnings.showwarning = _log_warning  # type: ignore[assignment]
    try:
        yield shown
    finally:
        warnings.showwarning = shows
        logger.removeHandler(handler)
        logger.setLevel(level)
        shown.close()


def working_on(subject: object) -> None:
    """Set what this thread is working on, for the warnings of libraries; None resets it."""
    _work.subject = subject


def _log_warning(message: Warning | str, *_: object) -> None:
    """Log a library's warning on one line; `--quiet` hides it."""
    subject = getattr(_work, "subject", None)
    log.warning("%s%s", "" if subject is None else f"{subject}: ", message)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the record on one line, with control characters escaped."""
        text = one_line(record.getMessage())
        return f"{record.levelname.lower()}: {text}" if record.levelno > logging.INFO else text
