"""What errors advise: every option and command that a message names is there to be used."""

import ast
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import covcli
from covcli import __main__ as boundary
from covcli.cli import app
from covcli.core.errors import OPTION, CovcliError, possible

PACKAGE = Path(covcli.__file__).parent
SPEAKS_OF_OPTIONS = {"cli.py", "options.py"}
COMMANDS = {
    name: {opt for parameter in command.params for opt in parameter.opts} | {"--help"}
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}
OPTIONS = set().union(*COMMANDS.values())
# The reason why a file cannot be read names this option, wherever it is read.
READING = {"--max-pixels"}


def text(node: ast.AST) -> str:
    """Return a literal, with a word for what an f-string inserts."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "WORD"


def trees() -> Iterator[tuple[str, ast.AST]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.name, ast.parse(file.read_text())


def literals() -> Iterator[str]:
    """Yield every text of the package that is no docstring."""
    for name, tree in trees():
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in docstrings
            if is_text and name not in SPEAKS_OF_OPTIONS:
                yield text(node)


def advices() -> list[str]:
    return [
        text(keyword.value)
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "fix"
    ]


def test_every_option_and_command_that_a_text_names_exists() -> None:
    named = [(option, t) for t in literals() for option in OPTION.findall(t)]
    assert len({option for option, _ in named}) > 15
    assert [(option, t) for option, t in named if option not in OPTIONS] == []
    quoted = [match for t in literals() for match in re.findall(r"`covcli ([a-z-]+)([^`]*)`", t)]
    assert quoted
    for command, rest in quoted:
        assert set(OPTION.findall(rest)) <= COMMANDS[command], (command, rest)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_error_of_a_command_advises_what_it_cannot_do(command: str) -> None:
    all_advice = advices()
    assert len(all_advice) > 50
    for advice in all_advice:
        error = CovcliError("wrong", where="file", fix=advice)
        error.advise(COMMANDS[command])
        outside = re.sub(r"`covcli [^`]*`", "", str(error))
        assert set(OPTION.findall(outside)) <= COMMANDS[command], advice
        assert str(error).startswith("file: wrong")


@pytest.mark.parametrize("command", [name for name, has in COMMANDS.items() if "--data-dir" in has])
def test_commands_that_read_images_can_raise_the_limit_of_pixels(command: str) -> None:
    assert COMMANDS[command] >= READING


def test_alternatives_are_left_out_one_by_one() -> None:
    advice = "raise --alpha, or name another --method, or calibrate on more images"
    assert possible(advice, {"--alpha", "--method"}) == advice
    assert possible(advice, {"--method"}) == "name another --method, or calibrate on more images"
    assert possible(advice, set()) == "calibrate on more images"
    assert possible("lower --epochs", set()) == ""
    assert possible("read folder--old or go on", set()) == "read folder--old or go on"


@pytest.mark.parametrize(
    ("arguments", "said", "unsaid"),
    [
        (["report"], "run `covcli train`", "--checkpoint"),
        (["evaluate", "--untrusted", "noise:uniform"], "name a --checkpoint", "--untrusted"),
        (["points"], "name a checkpoint", "--checkpoint"),
    ],
)
def test_a_command_speaks_of_its_own_options(
    arguments: list[str], said: str, unsaid: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert failed(arguments, capsys).count(said) == 1
    assert unsaid not in failed(arguments, capsys)


def test_exhausted_memory_advises_what_the_command_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("covcli.evaluation.evaluate.evaluate", fail)
    said = failed(["evaluate", "--untrusted", "noise:uniform"], capsys)
    assert said == "error: memory exhausted; try another --device\n"


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that ends with exit code 2, and return what it says."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as caught:
            boundary.main(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert caught.value.code == 2
    return capsys.readouterr().err
