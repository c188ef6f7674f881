"""SIGINT, SIGTERM, SIGHUP: the current step is finished, work is saved, the process ends soon.

The first signal ends the work: immediately, or at the end of a step. A second signal has no effect,
so that saving is not disturbed. A third signal ends the process immediately. Even if a decoder,
another rank or a library blocks, a process under `watched` ends within ten seconds of the first
signal; only a running training step or a file being written may take longer.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from covcli.core.errors import ExitCode

_HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal was closed; unknown to Windows
# The signals that end a command. A process under `nohup` ignores SIGHUP, and goes on doing so.
SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
if _HANG_UP is not None and signal.getsignal(_HANG_UP) != signal.SIG_IGN:
    SIGNALS += (_HANG_UP,)
PATIENCE = 8.0  # seconds after the first signal until the process is ended by force
SAVING = 60.0  # the same while a file is being written
ENOUGH = 3  # this many signals end the process immediately


class Interrupted(BaseException):
    """One of the `SIGNALS` arrived. A BaseException, so that error handlers do not catch it.

    Attributes
    ----------
    signal
        The signal's number.
    resume
        The command that resumes the interrupted work, or None.
    """

    resume: str | None = None

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number

    @property
    def code(self) -> ExitCode:
        """The exit code."""
        return ExitCode(128 + self.signal)

    def __str__(self) -> str:
        word = _word(self.signal)
        return f"{word}; go on with `covcli {self.resume}`" if self.resume else word


def _word(number: int) -> str:
    return {signal.SIGTERM: "terminated", _HANG_UP: "hung up"}.get(number, "interrupted")


class Interrupts:
    """Raises `Interrupted` for the first signal: immediately, or at the end of a step."""

    def __init__(self) -> None:
        self._received = 0
        self._held = False
        self._saving = False
        self._longest = 0.0  # the most seconds from one `check` to the next
        self._checked = 0.0

    def install(self) -> None:
        """Install the handlers of the signals; only the main thread may do so."""
        global _current
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        _current = self

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        first = not self._received
        self._received = self._received or number
        if first and not self._held:
            raise Interrupted(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer a signal that arrives during the block until `check` or the block's end."""
        self._checked = time.monotonic()
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Defer a signal during a block that writes files."""
        held, self._held, self._saving = self._held, True, True
        try:
            yield
        finally:
            self._held, self._saving = held, False

    def check(self) -> None:
        """Raise `Interrupted` on all ranks if a signal arrived on any; every rank must call it."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._checked)
        self._checked = now
        ranks = sys.modules.get("covcli.core.distributed")  # not imported here: it loads torch
        received = ranks.highest(self._received) if ranks else self._received
        if received:
            raise Interrupted(received)

    @property
    def patience(self) -> float:
        """Seconds that the process may continue after a signal."""
        if self._saving:
            return SAVING
        return max(PATIENCE, 2 * self._longest) if self._held else PATIENCE


_current: Interrupts | None = None  # the last one installed
_unfinished: set[Path] = set()  # files that must not outlive the process


@contextmanager
def unfinished(file: Path) -> Iterator[None]:
    """Remove a file at the block's end, or when the process is ended by force during the block."""
    _unfinished.add(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        _unfinished.discard(file)


def leave_at_once() -> None:
    """Let either signal end the process immediately: there is no work to save."""
    global _current
    _current = None
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, lambda number, _frame: os._exit(128 + number))


@contextmanager
def watched() -> Iterator[None]:
    """During the block, end the process if it runs too long after a signal, or on the third one.

    A thread reads the interpreter's wakeup descriptor. It learns of a signal even while the main
    thread is inside a library call and runs no Python code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    with contextlib.suppress(RuntimeError):  # no thread can be started: nobody watches
        threading.Thread(target=_watch, args=(receiver,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()


def _watch(receiver: socket.socket) -> None:
    arrived: list[int] = []
    first = 0.0
    with receiver:
        while True:
            if select.select([receiver], [], [], 0.1 if arrived else None)[0]:
                numbers = receiver.recv(64)
                if not numbers:
                    return
                # A program may handle more signals. A terminal that closes sends SIGHUP twice.
                arrived += [n for n in numbers if n in SIGNALS and not (arrived and n == _HANG_UP)]
                if arrived and not first:
                    first = time.monotonic()
            patience = PATIENCE if _current is None else _current.patience
            if len(arrived) >= ENOUGH or (arrived and time.monotonic() - first > patience):
                _end(arrived[0])


def _end(number: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{_word(number)}; what was not saved by then is lost\n".encode())
    for file in tuple(_unfinished):
        with contextlib.suppress(OSError):
            file.unlink()
    os._exit(128 + number)


def _forget() -> None:
    """Restore default signal handling in a forked child, and detach it from its parent's watch."""
    if _current is not None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget)
