"""Specifications, `name:argument?key=value&key=value`, which name data, attacks and methods."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Generic, TypeVar

from covcli.core.errors import CovcliError

YES = "yes"
LARGEST = 2**63 - 1  # the largest signed 64-bit integer
SMALLEST_FRACTION, LARGEST_FRACTION = 1e-9, 1e9  # the useful range in float32
# A number or a fraction. The number of digits is limited, so that long texts cost no time.
NUMBER = re.compile(r"([+-]?[0-9.]{1,40}(e[+-]?[0-9]{1,3})?)(/[0-9]{1,40})?", re.IGNORECASE)
FLAG = re.compile("[a-z][a-z-]*")
ZERO = re.compile(r"0+(\.0*)?")
LONE_BYTE = re.compile("[\udc80-\udcff]")
Value = TypeVar("Value")

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Spec:
    """One parsed specification.

    Attributes
    ----------
    text
        The specification as written.
    name, argument
        The parts before and after the first colon (`npz`, `data/cifar10`).
    parameters
        The keys and values after the question mark, as text; the value of a flag is `YES`.

    Examples
    --------
    >>> spec = parse("attack:pgd?eps=8/255")
    >>> spec.name, spec.argument, spec.take("eps", fraction, 0.0) == 8 / 255
    ('attack', 'pgd', True)
    """

    text: str
    name: str
    argument: str
    parameters: Mapping[str, str]

    def only(self, allowed: list[str]) -> None:
        """Raise a CovcliError for the first parameter that is not in `allowed`."""
        for key in self.parameters:
            if key not in allowed:
                known = suggestion(key, allowed) if allowed else "it takes none"
                if self.argument:
                    known += "; a ? within a path is written %3F"
                raise CovcliError(f"unknown parameter {key!r}", where=self.text, fix=known)

    def take(self, key: str, convert: Callable[[str], Value], default: Value) -> Value:
        """Return `convert` of the parameter `key`, or `default` if it is not given.

        Raises
        ------
        CovcliError
            If `convert` raises a ValueError; its text becomes the advice.
        """
        if key not in self.parameters:
            return default
        try:
            return convert(self.parameters[key])
        except (ValueError, ZeroDivisionError) as error:
            raise CovcliError(
                f"{key}={self.parameters[key]!r} is not valid", where=self.text, fix=str(error)
            ) from None


def parse(text: str) -> Spec:
    """Split a specification into its parts.

    A key without a value is a flag. `of=` takes the rest of the text: a specification with its own
    parameters.

    Raises
    ------
    CovcliError
        If the name is empty, a parameter has no value or occurs twice, or the text holds a NUL or
        an unpaired surrogate.

    Examples
    --------
    >>> spec = parse("corrupt:fog?severity=3&of=folder:photos?limit=90&first")
    >>> spec.name, spec.argument, spec.parameters["of"]
    ('corrupt', 'fog', 'folder:photos?limit=90&first')
    >>> parse("folder:photos?limit=90&first").parameters
    {'limit': '90', 'first': 'yes'}
    """
    if not _can_be_named(text):
        raise CovcliError("holds a character that no name can have", where=repr(text))
    head, question, tail = text.partition("?")
    name, _, argument = head.partition(":")
    if not name:
        raise CovcliError("an empty name", where=repr(text), fix="write NAME or NAME:ARGUMENT")
    parameters: dict[str, str] = {}
    for pair in _pairs(tail) if question else []:
        key, equals, value = pair.partition("=")
        if not equals and FLAG.fullmatch(pair):
            value = YES
        if not key or not value or key in parameters:
            raise CovcliError(
                f"cannot read the parameter {pair!r}",
                where=text,
                fix="write ?key=value&key=value, each key once, and a ? within a path as %3F",
            )
        parameters[key] = value
    return Spec(text, name, argument, parameters)


def _can_be_named(text: str) -> bool:
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def _pairs(tail: str) -> list[str]:
    """Split parameters at each &; the text after `of=` is not split."""
    before, of, nested = f"&{tail}".partition("&of=")
    pairs = before.split("&")[1:]
    return [*pairs, f"of={nested}"] if of else pairs


def extended(text: str, key: str, value: str) -> str:
    """Return a specification with one more parameter, unless it already has it.

    Examples
    --------
    >>> extended("corrupt:fog?of=digits", "severity", "2")
    'corrupt:fog?severity=2&of=digits'
    """
    spec = parse(text)
    if key in spec.parameters:
        return text
    head, _, tail = text.partition("?")
    pairs = [pair for pair in _pairs(tail) if pair]
    place = len(pairs) - ("of" in spec.parameters)  # `of` must stay last
    pairs.insert(place, key if value == YES else f"{key}={value}")
    return f"{head}?{'&'.join(pairs)}"


def without(text: str, keys: Collection[str]) -> str:
    """Return a specification without some parameters.

    Examples
    --------
    >>> without("folder:photos?limit=90&skip-unreadable", ["limit"])
    'folder:photos?skip-unreadable'
    """
    head, _, tail = text.partition("?")
    kept = [pair for pair in _pairs(tail) if pair and pair.partition("=")[0] not in keys]
    return f"{head}?{'&'.join(kept)}" if kept else head


def escaped(text: str) -> str:
    r"""Return a text with bytes that are not UTF-8 percent-encoded, as in `caf%E9`.

    A path with such bytes can then be printed, stored and read again.

    Examples
    --------
    >>> escaped("folder:caf\udce9")
    'folder:caf%E9'
    """
    return LONE_BYTE.sub(lambda match: f"%{ord(match[0]) - 0xDC00:02X}", text)


def flag(text: str) -> bool:
    """Parse `yes` or `no`; a flag without a value is `yes`."""
    if text not in (YES, "no"):
        raise ValueError("expected yes or no")
    return text == YES


def count(text: str) -> int:
    """Parse an integer from 0 to 2⁶³ − 1."""
    return _whole(text, 0, LARGEST)


def positive_count(text: str) -> int:
    """Parse an integer from 1 to 2⁶³ − 1."""
    return _whole(text, 1, LARGEST)


def up_to(most: int) -> Callable[[str], int]:
    """Return a parser of integers from 1 to a bound, for values that determine memory or time."""
    return lambda text: _whole(text, 1, most)


def _whole(text: str, least: int, most: int) -> int:
    known = text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST))
    if not known or not least <= int(text) <= most:
        bound = "on" if most == LARGEST else f"to {most:,}"
        raise ValueError(f"expected a whole number from {least} {bound}")
    return int(text)


def fraction(text: str) -> float:
    """Parse a number from 1e-9 to 1e9; fractions such as 8/255 are allowed."""
    if not NUMBER.fullmatch(text):
        raise ValueError("expected a number such as 0.03 or 8/255")
    try:
        value = float(Fraction(text))
    except (ValueError, ArithmeticError):
        raise ValueError("expected a number such as 0.03 or 8/255") from None
    if not SMALLEST_FRACTION <= value <= LARGEST_FRACTION:
        raise ValueError("expected a positive number, from 1e-9 to 1e9")
    return value


def amount(text: str) -> float:
    """Parse 0, or a number as `fraction` does.

    Examples
    --------
    >>> amount("0.0"), amount("1/2")
    (0.0, 0.5)
    """
    return 0.0 if ZERO.fullmatch(text) else fraction(text)


class Registry(Generic[Entry]):
    """A table that maps names to entries of one kind.

    Parameters
    ----------
    kind
        The kind of entry, for messages: "model", "dataset", …

    Examples
    --------
    >>> SHAPES: Registry[int] = Registry("shape")
    >>> _ = SHAPES.add("square")(4)
    >>> SHAPES.get("square")
    4
    >>> SHAPES.get("sqare")
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: unknown shape 'sqare'; did you mean 'square'? known: square; or
    name the --plugin that registers it
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that registers its object under `name`.

        Raises
        ------
        ValueError
            If the name is registered already.
        """

        def decorate(entry: Entry) -> Entry:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> Entry:
        """Return the entry of a name; raise a CovcliError, with a suggestion, if it is unknown."""
        if name in self._entries:
            return self._entries[name]
        known = suggestion(name, list(self._entries))
        raise CovcliError(
            f"unknown {self.kind} {name!r}", fix=f"{known}; or name the --plugin that registers it"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def suggestion(name: str, known: list[str]) -> str:
    """Return advice on an unknown name: the most similar known name, if any, and all names."""
    near = get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
