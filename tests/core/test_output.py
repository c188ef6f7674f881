"""Standard output contains results only, even if others write to it or close it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PLUGIN

NOISY = """
import ctypes, os, subprocess, sys
print("a plugin prints")
os.write(1, b"a library writes\\n")
ctypes.CDLL(None).puts(b"C writes")
ctypes.CDLL(None).fflush(None)
subprocess.run([sys.executable, "-c", "print('a child prints')"], check=True)
subprocess.run("for fd in /proc/self/fd/*; do readlink $fd; done >&2", shell=True)
"""


def run_covcli(
    *arguments: str, redirect: str = "", cwd: Path, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a command by a shell, with a redirection of its stdout."""
    script = f'"$@" {redirect}'
    return subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-m", "covcli", *arguments],
        cwd=cwd, capture_output=True, timeout=300, env={**os.environ, **environment},
    )  # fmt: skip


def evaluate(run: Path, *more: str, redirect: str = "", **environment: str) -> tuple[int, str, str]:
    done = run_covcli(
        "evaluate", "--force", "--untrusted", "noise:uniform?limit=20", "--plugin", str(PLUGIN),
        *more, redirect=redirect, cwd=run.parent.parent, **environment,
    )  # fmt: skip
    return done.returncode, done.stdout.decode("latin1"), done.stderr.decode()


def test_nothing_but_the_result_reaches_stdout(run: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy.py"
    noisy.write_text(NOISY)
    done = run_covcli(
        "build-signature", str(run / "checkpoint.pt"), "--force", "--method", "src",
        "--plugin", str(PLUGIN), "--plugin", str(noisy), redirect="| cat", cwd=tmp_path,
    )  # fmt: skip
    written = run.relative_to(tmp_path) / "signature-src.safetensors"
    assert done.stdout.decode() == f"{written}\n", done.stderr.decode()
    told = done.stderr.decode()
    for text in ("a plugin prints", "a library writes", "C writes", "a child prints"):
        assert text in told
    # The pipe that leads to the reader is not among what a child holds, but for bash's own.
    pipes = re.findall(r"pipe:\[\d+\]", told)
    assert len(set(pipes)) == 1, told


@pytest.mark.parametrize(
    ("options", "encoding", "redirect", "gate", "expected"),
    [
        ([], "ascii", "", "accuracy=1", 1),
        ([], "cp1252", "| true; exit ${PIPESTATUS[0]}", "auroc=0.01", 0),
        (["--json"], "utf-8", "> /dev/full", "auroc=0.01", 2),
    ],
)
def test_gates_are_judged_whatever_becomes_of_stdout(
    run: Path, options: list[str], encoding: str, redirect: str, gate: str, expected: int
) -> None:
    gates = run / "gates.xml"
    code, out, err = evaluate(
        run, "--fail-under", gate, "--junit", str(gates), "--quiet", *options,
        redirect=redirect, PYTHONIOENCODING=encoding,
    )  # fmt: skip
    assert code == expected, err
    assert ("gates passed" in out) == (not redirect)
    assert "<testsuite" in gates.read_text()
    reported = {0: [], 1: ["gate failed: accuracy >= 1, "], 2: ["error: stdout cannot be written"]}
    assert len(err.splitlines()) == len(reported[code]), err
    assert all(err.startswith(line) for line in reported[code]), err


PRINTS = """
import sys
from covcli.core import output
output.keep()
with output.apart():
    for _ in range(3):
        output.results().write("α ┃ \\udcff é " + "x" * 10**5 + "\\n")
    sys.stderr.write("said\\n")
print(output.finish(), file=open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize(
    ("redirect", "lost"),
    [
        ("> /dev/full", "stdout cannot be written (No space left on device)"),
        ("| head -c 9", "None"), (">&-", "None"), ("2>&-", "None"), (">&- 2>&- <&-", "None"),
        ("2> /dev/full", "None"), ("| cat", "None"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "cp950"])
def test_a_stream_takes_any_text_and_says_what_it_lost(
    tmp_path: Path, redirect: str, lost: str, encoding: str
) -> None:
    said = tmp_path / "said"
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable, "-c",
         PRINTS, str(said)],
        capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert said.read_text() == f"{lost}\n"
    if redirect == "| cat":
        expected = ("α ┃ \udcff é " + "x" * 10**5 + "\n").encode(encoding, "replace")
        assert done.stdout == 3 * expected
    assert (b"said" in done.stderr) == ("2>" not in redirect)


def test_a_path_is_printed_as_the_file_system_knows_it(run: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/b\xff \xc3\xa9"
    Path(os.fsdecode(folder)).mkdir()
    done = run_covcli(
        "build-signature", str(run / "checkpoint.pt"), "--method", "src", "--plugin", str(PLUGIN),
        "--output", os.fsdecode(folder) + "/s.safetensors", cwd=tmp_path, PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert done.stdout == folder + b"/s.safetensors\n", done.stderr.decode()


def test_pipelines_in_the_documents_quote_what_they_substitute() -> None:
    root = Path(__file__).parents[2]
    documents = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    lines = [line for document in documents for line in document.read_text().splitlines()]
    substituted = [line for line in lines if re.search(r"\$\(\w+ ", line)]
    assert any("$(covcli train" in line for line in substituted)
    for line in substituted:
        for before in re.findall(r"(.?)\$\(\w+ ", line):
            assert before == '"', line
