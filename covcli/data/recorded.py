"""Data that a file names: sets by their names; a path only if it is the user's own wish to read it.

A checkpoint or a signature records what it was made from, and the next stage reads that again. In a
file from a stranger the record is a stranger's wish: it could name a private folder, whose
pictures would end up in results that are passed on.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

from covcli.core import consent, state
from covcli.core.errors import CovcliError
from covcli.core.specs import parse
from covcli.data.images import DataRecord

# Datasets whose argument is one of a few names, and no path.
NAMES_ONLY = {"noise", "attack"}


def reads_path(text: str) -> bool:
    """Return whether a specification, or one inside it, can name a path.

    Examples
    --------
    >>> [reads_path(t) for t in ("cifar10?limit=9", "noise:uniform", "folder:/home/me/photos")]
    [False, False, True]
    """
    spec = parse(text)
    return (bool(spec.argument) and spec.name not in NAMES_ONLY) or _names_another(text)


def _names_another(text: str) -> bool:
    """Return whether a parameter is itself a specification that can name a path."""
    values = parse(text).parameters.values()
    return any(":" in value and reads_path(value) for value in values)


def _place(text: str) -> str:
    return text.partition("?")[0]


def sealed(record: DataRecord, network: str) -> DataRecord:
    """Return a record that this user's covcli knows again in a file about the same network.

    Parameters
    ----------
    record
        Data that the user named, or whose own record named it.
    network
        The fingerprint of the network's weights.
    """
    return replace(record, seal=state.seal(*_words(record, network)))


def verified(record: DataRecord, network: Callable[[], str]) -> DataRecord:
    """Return a record from a file, with its seal only if this user's covcli has made it.

    Parameters
    ----------
    network
        Returns the fingerprint of the weights of the network that the file is about.
    """
    holds = bool(record.seal) and state.holds(record.seal, *_words(record, network()))
    return record if holds else replace(record, seal="")


def _words(record: DataRecord, network: str) -> tuple[str, ...]:
    return ("data", record.spec, record.source, record.images, record.ran_in, network)


def allow(record: DataRecord, fix: str, named: Collection[str | None] = ()) -> None:
    """Raise a CovcliError if a file names a path, and neither its seal nor the user allows it.

    Parameters
    ----------
    record
        Which data a file names, as `verified` returns it.
    fix
        How the user can allow it, for the error.
    named
        Specifications that the user has named; the part before a question mark counts.
    """
    allow_spec(record.spec, bool(record.seal), fix, named)


def allow_spec(text: str, own: bool, fix: str, named: Collection[str | None] = ()) -> None:
    """Raise a CovcliError as `allow` does, for a specification by itself.

    Parameters
    ----------
    own
        Whether this user's covcli has written the file.
    """
    if own or not reads_path(text):
        return
    wishes = [wish for wish in named if wish]
    if text in wishes or (not _names_another(text) and _place(text) in map(_place, wishes)):
        return
    if not consent.agrees(f"A file that is not your own asks to read {text}. Read it?"):
        raise CovcliError(
            "is named by a file that this user's covcli has not written", where=text, fix=fix
        )
