"""Permission to read data that a file names: a path is read only with the user's consent.

A checkpoint or a signature records its data, and the next stage reads that data again. The record
in an untrusted file could name a private folder, whose pictures would then appear in results that
the user passes on.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

from covcli.core import consent, state
from covcli.core.errors import CovcliError
from covcli.core.specs import parse
from covcli.data.images import DataRecord

# Datasets whose argument is a name, not a path.
NAMES_ONLY = {"noise", "attack"}


def reads_path(text: str) -> bool:
    """Return whether a specification, or a nested one, can name a path.

    Examples
    --------
    >>> [reads_path(t) for t in ("cifar10?limit=9", "noise:uniform", "folder:/home/me/photos")]
    [False, False, True]
    """
    spec = parse(text)
    return (bool(spec.argument) and spec.name not in NAMES_ONLY) or _names_another(text)


def _names_another(text: str) -> bool:
    """Return whether a parameter is a specification that can name a path."""
    values = parse(text).parameters.values()
    return any(":" in value and reads_path(value) for value in values)


def _place(text: str) -> str:
    return text.partition("?")[0]


def sealed(record: DataRecord, network: str) -> DataRecord:
    """Return a record with a seal that this user's covcli recognises for the same network.

    Parameters
    ----------
    record
        A record of data that the user named, or that a sealed record named.
    network
        The fingerprint of the network's weights.
    """
    return replace(record, seal=state.seal(*_words(record, network)))


def verified(record: DataRecord, network: Callable[[], str]) -> DataRecord:
    """Return a record from a file; its seal is removed unless this user's covcli computed it.

    Parameters
    ----------
    record
        The record.
    network
        Returns the fingerprint of the weights of the network that the file belongs to.
    """
    holds = bool(record.seal) and state.holds(record.seal, *_words(record, network()))
    return record if holds else replace(record, seal="")


def _words(record: DataRecord, network: str) -> tuple[str, ...]:
    return ("data", record.spec, record.source, record.images, record.ran_in, network)


def allow(record: DataRecord, fix: str, named: Collection[str | None] = ()) -> None:
    """Raise a CovcliError if a record names a path without a valid seal or the user's consent.

    Parameters
    ----------
    record
        The record of a file, as `verified` returns it.
    fix
        Advice for the error: how the user can allow it.
    named
        Specifications that the user named; the part before the question mark is compared.
    """
    allow_spec(record.spec, bool(record.seal), fix, named)


def allow_spec(text: str, own: bool, fix: str, named: Collection[str | None] = ()) -> None:
    """Raise a CovcliError as `allow` does, for a specification by itself.

    Parameters
    ----------
    text
        The specification.
    own
        Whether this user's covcli wrote the file.
    fix, named
        As for `allow`.
    """
    if own or not reads_path(text):
        return
    requested = [spec for spec in named if spec]
    if text in requested or (not _names_another(text) and _place(text) in map(_place, requested)):
        return
    if not consent.agrees(f"A file that is not your own asks to read {text}. Read it?"):
        raise CovcliError(
            "is named by a file that this user's covcli has not written", where=text, fix=fix
        )
