"""Completion reads from the source what the registries hold."""

import os
import subprocess
import sys

import pytest

from covcli.commands.completion import DECORATORS, registered
from covcli.monitoring.registries import list_registered


@pytest.mark.usefixtures("_shipped")
@pytest.mark.parametrize("kind", DECORATORS)
def test_the_names_in_the_source_are_those_of_the_registry(kind: str) -> None:
    listed = list_registered([kind]).entries  # type: ignore[list-item]
    names = {entry.name for entry in listed} - {"tiny", "torchvision:NAME", "timm:NAME"}
    assert {name.replace("_", "-") for name in registered(kind)} == names  # type: ignore[arg-type]


def complete(words: str) -> list[str]:
    """Ask as bash does, and check that torch is not loaded."""
    code = (
        "import sys; from covcli.__main__ import main\n"
        "try: main([])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "_COVCLI_COMPLETE": "complete_bash", "COMP_WORDS": words,
             "COMP_CWORD": str(len(words.split(" ")) - 1)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_names() -> None:
    assert complete("covcli eval") == ["evaluate"]
    assert complete("covcli evaluate --baseline-r") == ["--baseline-results"]
    assert complete("covcli train --method m") == ["mrc", "mrc-paper"]
    assert complete("covcli evaluate -u attack:p") == ["attack:pgd", "attack:pgd-l2"]
