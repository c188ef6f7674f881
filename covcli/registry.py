"""Named entries that a newcomer extends with one decorator."""

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

from covcli.errors import CovcliError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """A table from names to entries of one kind.

    Parameters
    ----------
    kind
        What an entry is, for messages: "model", "dataset", …
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that files its object under `name`; a taken name is a ValueError."""

        def decorate(entry: Entry) -> Entry:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> Entry:
        """Return the entry of that name; an unknown one is a CovcliError with the nearest named."""
        if name in self._entries:
            return self._entries[name]
        raise CovcliError(
            f"unknown {self.kind} {name!r}", fix=suggestion(name, list(self._entries))
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def suggestion(name: str, known: list[str]) -> str:
    """Word the nearest known name, if one is near, and the list of all."""
    near = get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
