"""What long work tells the shell while it runs; the library itself prints nothing."""

from typing import Protocol


class Progress(Protocol):
    """Receives the start, the steps and the end of one long piece of work after another."""

    def start(self, title: str, total: int) -> None:
        """Begin a piece of work of `total` images."""

    def advance(self, images: int) -> None:
        """Count images that are done."""

    def note(self, line: str) -> None:
        """Report one line of results."""


class Silent:
    """Tells nobody."""

    def start(self, title: str, total: int) -> None:
        """Do nothing."""

    def advance(self, images: int) -> None:
        """Do nothing."""

    def note(self, line: str) -> None:
        """Do nothing."""
