"""Standard output is reserved for covcli's results: libraries, plugins and children cannot use it.

A result may be the input of another program (`covcli build-signature "$(covcli train …)"`), so an
unrelated line on stdout could change what that program does. The process keeps stdout as a private
descriptor that children do not inherit, and redirects descriptor 1 to stderr.
"""

import contextlib
import errno
import io
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class _Tolerant(io.RawIOBase):
    """A descriptor that records a write error instead of raising it: work continues."""

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
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, content: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Write all of the content; drop the rest if the descriptor fails."""
        left = memoryview(content)
        while left and self.failure is None:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # non-blocking, and the reader is slow
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(content)


_kept: TextIO | None = None
_raw: _Tolerant | None = None


def keep() -> None:
    """Reserve stdout for results. The command line calls this once, before anything else.

    If `sys.stdout` was replaced by another object, that object is kept.
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


def forget_wrong_sizes() -> None:
    """Remove a size of the terminal from the environment that libraries fail on, or print nothing.

    These are sizes below 20 and above 9999, and what is no number.
    """
    for name in ("COLUMNS", "LINES"):
        given = os.environ.get(name)
        if given is not None and not re.fullmatch(r"[2-9][0-9]|[1-9][0-9]{2,3}", given):
            del os.environ[name]


def _text(raw: _Tolerant, encoding: str, errors: str) -> TextIO:
    """Return a text stream that replaces characters that its encoding lacks."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=encoding, errors=errors, line_buffering=raw.isatty() or raw.fileno() == 2,
    )  # fmt: skip


def _fill_standard_descriptors() -> None:
    """Reopen closed standard descriptors (`>&-`), so that no other file gets their numbers."""
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
    """Redirect everything printed to `sys.stdout` during the block to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def results() -> TextIO:
    """Return the stream for results: the one that `keep` reserved, or `sys.stdout`."""
    return _kept or sys.stdout


def reader_left() -> bool:
    """Return whether nobody reads the results any more, as after `| head`."""
    return _raw is not None and _raw.failure is not None and _raw.failure.errno == errno.EPIPE


def write_path(path: Path) -> None:
    """Write a path on its own line, in the file system's bytes whatever stdout's encoding."""
    stream = results()
    if stream.isatty() or not hasattr(stream, "buffer"):
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
        stream.write(f"{shown}\n")
        return
    stream.flush()
    stream.buffer.write(os.fsencode(path) + b"\n")


def finish() -> str | None:
    """Flush stdout; return the reason if results were lost, unless the reader closed the pipe."""
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
