"""Validation of settings and documents: types, bounds and choices are declared once, at the field.

The annotations of a dataclass declare the valid values: a type, a `Literal` of choices, or
`Annotated[int, Interval(ge=1)]` for bounds. `settle` validates a configuration; `read` builds a
dataclass from a document that was read from a file.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from annotated_types import Interval

from covcli.core.errors import CovcliError, in_words

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Kind = TypeVar("Kind")
# pydantic's messages, and their wording after the name of an option or a field.
WORDING = {
    "Input should be less than inf": "must be finite",
    "Input should be": "must be",
    f"Input is not a valid path for {Path}": "must be a path",
    "Input is not a valid path": "must be a path",  # an older pydantic's
    "Field required": "is missing",
}


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # imported late: the command line's help does not need it

    return TypeAdapter(kind)


def settle(config: Any) -> None:
    """Validate every field of a configuration against its annotation; called by `__post_init__`.

    Equivalent values are converted: a string to a path, a list to a tuple.

    Parameters
    ----------
    config
        An instance of a frozen dataclass.

    Raises
    ------
    CovcliError
        If a value has the wrong type, is out of bounds or is not among the choices. The message
        names the option.

    Examples
    --------
    >>> from typing import Annotated
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Config:
    ...     batch_size: Annotated[int, Interval(ge=2)] = 64
    ...
    ...     def __post_init__(self) -> None:
    ...         settle(self)
    >>> Config(batch_size=1)
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: --batch-size 1: must be greater than or equal to 2
    """
    from pydantic import ValidationError

    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        try:
            settled = _adapter(hints[field.name]).validate_python(value)
        except ValidationError as error:
            raise CovcliError(
                _worded(error), where=f"--{field.name.replace('_', '-')} {in_words(value)}"
            ) from None
        object.__setattr__(config, field.name, settled)


def conform(hint: Any, value: Any) -> Any:
    """Return a plain value from TOML or JSON, converted to the type of an annotation.

    The conversion is strict: a string is never a number. A string becomes a path, an array becomes
    a tuple, and a single string becomes an array of one.

    Raises
    ------
    ValueError
        If the value does not match the annotation. The message is worded to follow the value.

    Examples
    --------
    >>> conform(tuple[str, ...], "mnist"), conform(float, 1)
    (('mnist',), 1.0)
    >>> from typing import Annotated
    >>> conform(Annotated[int, Interval(ge=1)], "3")
    Traceback (most recent call last):
    ValueError: must be a valid integer
    """
    from pydantic import ValidationError

    if isinstance(value, str) and get_origin(hint) is tuple:
        value = [value]
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        raise ValueError("must be a string, a number, true, false or an array") from None
    try:
        return _adapter(hint).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_worded(error)) from None


def bounds(config: type, name: str) -> str:
    """Return the bounds of a dataclass's field in words; empty if it has none.

    Examples
    --------
    >>> from covcli.training.config import TrainConfig
    >>> bounds(TrainConfig, "calibration_split"), bounds(TrainConfig, "epochs")
    ('at least 0 and below 1', 'at least 1 and at most 1000000')
    """
    words = []
    for interval in _intervals(get_type_hints(config, include_extras=True)[name]):
        ends = [("at least", interval.ge), ("above", interval.gt), ("at most", interval.le),
                ("below", interval.lt)]  # fmt: skip
        words += [f"{word} {end}" for word, end in ends if end not in (None, math.inf)]
    return " and ".join(words)


def _intervals(hint: Any) -> list[Interval]:
    """Return the bounds in an annotation, also inside `X | None`."""
    own = [entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Interval)]
    return own + [entry for part in get_args(hint) for entry in _intervals(part)]


def read(kind: type[Kind], document: Mapping[str, Any]) -> Kind:
    """Build a dataclass, with nested ones, from plain values; unknown keys are ignored.

    Parameters
    ----------
    kind
        The dataclass.
    document
        Its fields, as read from JSON.

    Raises
    ------
    ValueError
        If a field is missing, or its value does not match its annotation. The message has one line.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Entry:
    ...     name: str
    ...     rows: tuple[int, ...]
    >>> read(Entry, {"name": "digits", "rows": [3, 4]})
    Entry(name='digits', rows=(3, 4))
    """
    from pydantic import ValidationError

    try:
        built: Kind = _adapter(cast(Any, kind)).validate_python(document)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the document"
        raise ValueError(f"{place}: {_worded(error)}") from None
    return built


def _worded(error: Any) -> str:
    """Return the first validation error, worded to follow the name of the option or field."""
    message = str(error.errors(include_url=False)[0]["msg"])
    for theirs, ours in WORDING.items():
        message = message.replace(theirs, ours)
    return message
