"""CovcliError, the error that is shown to users, and the exit codes of commands."""

import re
from collections.abc import Collection, Sequence
from enum import IntEnum

# Options in an advice, and commands that it names whole, whose options are their own.
OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]*")
QUOTED = re.compile(r"`covcli [^`]*`")


class ExitCode(IntEnum):
    """The exit codes of commands."""

    DONE = 0
    GATE_FAILED = 1
    BAD_INPUT = 2  # bad usage, bad input or a bad file
    INTERNAL_ERROR = 3
    HUNG_UP = 129  # by SIGHUP: the terminal was closed
    INTERRUPTED = 130  # by SIGINT
    TERMINATED = 143  # by SIGTERM


class CovcliError(Exception):
    """Bad usage, bad input or a bad file: one line, and `ExitCode.BAD_INPUT`.

    Parameters
    ----------
    what
        What is wrong.
    where
        The file, option or value that is wrong.
    fix
        How the user can correct it.

    Examples
    --------
    >>> raise CovcliError("no such file", where="weights.pt", fix="name another")
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: weights.pt: no such file; name another
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        parts = [str(where)] if where is not None else []
        self._said = ": ".join([*parts, what])
        self.fix = fix
        super().__init__(self._worded())

    def advise(self, options: Collection[str]) -> None:
        """Leave out advice that names options which a command does not have."""
        self.fix = possible(self.fix or "", options)
        self.args = (self._worded(),)

    def _worded(self) -> str:
        return one_line(f"{self._said}; {self.fix}" if self.fix else self._said)


def possible(advice: str, options: Collection[str]) -> str:
    """Return an advice less the alternatives, between "or"s, whose options a command lacks.

    Examples
    --------
    >>> possible("pass --force, or name another --output", ["--force", "--runs"])
    'pass --force'
    >>> possible("run `covcli train --resume`, or name a --checkpoint", [])
    'run `covcli train --resume`'
    """
    alternatives = re.split(r",? or (?=[a-z]+ )", advice)
    kept = [
        each for each in alternatives if set(OPTION.findall(QUOTED.sub("", each))) <= set(options)
    ]
    return advice if len(kept) == len(alternatives) else ", or ".join(kept)


def in_words(value: object) -> str:
    """Return a value as text, whatever its size: Python prints no number of 5,000 digits.

    Examples
    --------
    >>> in_words(3), in_words(1 << 20_000)
    ('3', 'a number of 20001 bits')
    """
    try:
        return str(value)
    except ValueError:
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value"


def one_line(text: str) -> str:
    r"""Collapse white space and escape control characters, so that a terminal cannot be confused.

    Examples
    --------
    >>> one_line("two\nlines \x1b[31m")
    'two lines \\x1b[31m'
    """
    folded = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in folded)


def first_few(names: Sequence[str], most: int) -> str:
    """Return the first names with commas between, and how many more there are.

    Examples
    --------
    >>> first_few(["ant", "bee", "cat"], 2)
    'ant, bee and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


# How libraries other than Python say that memory, or threads, are exhausted; the last is oneDNN's.
EXHAUSTED = (
    "out of memory", "allocate memory", "bad_alloc", "can't start new thread",
    "could not create a primitive",
)  # fmt: skip


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error means that memory is exhausted; libraries report it differently."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in EXHAUSTED)
