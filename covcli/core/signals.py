"""SIGINT and SIGTERM: a step is finished, work is saved once, and the process ends soon.

The first signal ends the work: at once, or when a step is whole. A second changes nothing, so that
what is being saved is saved. A third ends the process. Whatever blocks (a decoder, another rank, a
library), a process under `watched` ends within ten seconds of its first signal, but for a step or
a file that is nearly done.
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
from types import FrameType

from covcli.core.errors import ExitCode

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 8.0  # seconds from the first signal until a process that does not end is ended
SAVING = 60.0  # the same while a file is being written
ENOUGH = 3  # so many signals end the process at once


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked the work to end; no handler of errors is meant to catch it.

    Attributes
    ----------
    signal
        The signal's number.
    resume
        The command that goes on with what was interrupted, if one does.
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
    return "terminated" if number == signal.SIGTERM else "interrupted"


class Interrupts:
    """Turns the first signal into `Interrupted`, at once or when a step is whole."""

    def __init__(self) -> None:
        self._received = 0
        self._held = False
        self._saving = False
        self._longest = 0.0  # seconds from one `check` to the next
        self._checked = 0.0

    def install(self) -> None:
        """Take over both signals; only the main thread may."""
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
        """Hold a signal back during the block, until `check` or the block's end."""
        self._checked = time.monotonic()
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Hold a signal back during a block that writes what must not be lost."""
        held, self._held, self._saving = self._held, True, True
        try:
            yield
        finally:
            self._held, self._saving = held, False

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived, on every rank if at any; all meet here."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._checked)
        self._checked = now
        ranks = sys.modules.get("covcli.core.distributed")  # which takes torch: slow to load
        received = ranks.highest(self._received) if ranks else self._received
        if received:
            raise Interrupted(received)

    @property
    def patience(self) -> float:
        """How many seconds after a signal the process may go on with what it does now."""
        if self._saving:
            return SAVING
        return max(PATIENCE, 2 * self._longest) if self._held else PATIENCE


_current: Interrupts | None = None  # what was installed last


def leave_at_once() -> None:
    """Let either signal end the process by itself: nothing is at work that could be lost."""
    global _current
    _current = None
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, lambda number, _frame: os._exit(128 + number))


@contextmanager
def watched() -> Iterator[None]:
    """End the process if it outlives a signal's patience in the block, or gets a third signal.

    A thread hears of signals by a descriptor that the interpreter's handler writes to, also while
    the main thread is in a library's call and runs no Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
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
                heard = receiver.recv(64)
                if not heard:
                    return
                first = first or time.monotonic()
                arrived += [number for number in heard if number in SIGNALS]
            patience = PATIENCE if _current is None else _current.patience
            if len(arrived) >= ENOUGH or (arrived and time.monotonic() - first > patience):
                _end(arrived[0])


def _end(number: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{_word(number)}; what was not saved by then is lost\n".encode())
    os._exit(128 + number)


def _forget() -> None:
    """Let a forked child die of signals, and not tell its parent's watch of them."""
    if _current is not None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget)
