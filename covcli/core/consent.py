"""Questions that only the user may answer: asked on a terminal, and taken for a no elsewhere."""

import os
import sys

from covcli.core.errors import one_line

_may_ask = False
_answers: dict[str, bool] = {}  # nobody is asked twice


def ask_on_terminals() -> None:
    """Let `agrees` ask, as a command may; a program that uses the library is never stopped."""
    global _may_ask
    _may_ask = True


def agrees(question: str) -> bool:
    """Return whether the user says yes; without a terminal, or among ranks, it is a no."""
    if question in _answers:
        return _answers[question]
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not (_may_ask and alone and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{one_line(question)} [y/N] ")
    sys.stderr.flush()
    _answers[question] = sys.stdin.readline().strip().lower() in ("y", "yes")
    return _answers[question]
