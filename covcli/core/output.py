"""Standard output belongs to covcli's results: no library, plugin or child process writes there.

A result may be the input of another program (`covcli build-signature "$(covcli train …)"`), so a
line that something else prints could choose what that program does. The process keeps its stdout
as a private copy, which children do not inherit; descriptor 1 leads to stderr.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class _Tolerant(io.RawIOBase):
    """A descriptor whose failure is remembered and not raised: work goes on without its reader."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the descriptor leads to a terminal."""
        return os.isatty(self._descriptor)

    def write(self, content: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Write all of it, or drop what a broken descriptor does not take."""
        left = memoryview(content)
        while left and self.failure is None:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # a caller made it so; the reader is slow
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(content)


_kept: TextIO | None = None
_raw: _Tolerant | None = None


def keep() -> None:
    """Keep stdout for results from here on; the process's boundary calls it once, first of all.

    Where a program has put another object in the place of `sys.stdout`, that object is kept.
    """
    global _kept, _raw
    _fill_standard_descriptors()
    stdout, stderr = sys.stdout, sys.stderr
    if stdout is not sys.__stdout__:
        _kept = stdout
    elif _raw is None and stdout is not None and stderr is not None:
        stdout.flush()
        _raw = _Tolerant(os.dup(1))  # not inheritable
        os.dup2(2, 1)
        sys.stderr = _text(_Tolerant(2), stderr.encoding, "backslashreplace")
        sys.stdout = _kept = _text(_raw, stdout.encoding, "replace")


def _text(raw: _Tolerant, encoding: str, errors: str) -> TextIO:
    """Return a stream whose every character can be written, as another one if need be."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=encoding, errors=errors, line_buffering=raw.isatty() or raw.fileno() == 2,
    )  # fmt: skip


def _fill_standard_descriptors() -> None:
    """Open what the caller closed (`>&-`): the next file to be opened would stand in its place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            stream = open(descriptor, "w" if descriptor else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


@contextmanager
def apart() -> Iterator[None]:
    """Send what anybody prints during the block to stderr; results alone reach stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def results() -> TextIO:
    """Return where results are written: what `keep` kept, or else `sys.stdout`."""
    return _kept or sys.stdout


def write_path(path: Path) -> None:
    """Write a path in a line of its own, as the file system knows it whatever stdout encodes."""
    stream = results()
    if stream.isatty() or not hasattr(stream, "buffer"):
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
        stream.write(f"{shown}\n")
        return
    stream.flush()
    stream.buffer.write(os.fsencode(path) + b"\n")


def finish() -> str | None:
    """Write out what is buffered; return why results are lost, if not by the reader's choice."""
    global _kept
    stream, _kept = results(), None
    failure = None
    try:
        stream.flush()
    except OSError as error:
        failure = error
    if _raw is not None and failure is None:
        failure = _raw.failure
    if failure is None or failure.errno == errno.EPIPE:
        return None
    return f"stdout cannot be written ({failure.strerror})"
