"""Yes-or-no questions to the user. Without a terminal, the answer is no."""

import sys

from covcli.core.environment import whole_number
from covcli.core.errors import one_line

_may_ask = False
_answers: dict[str, bool] = {}  # so that no question is asked twice


def ask_on_terminals() -> None:
    """Allow `agrees` to ask. Commands call this; a program that uses the library never waits."""
    global _may_ask
    _may_ask = True


def agrees(question: str) -> bool:
    """Return whether the user answers yes; False without a terminal or with several ranks."""
    if question in _answers:
        return _answers[question]
    only_rank = whole_number("WORLD_SIZE", 1) == 1
    if not (_may_ask and only_rank and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{one_line(question)} [y/N] ")
    sys.stderr.flush()
    _answers[question] = sys.stdin.readline().strip().lower() in ("y", "yes")
    return _answers[question]
