"""`covcli points` from outside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PLUGIN


def points(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "covcli", "points", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip


def test_points_are_printed_as_a_table_and_as_one_document(run: Path) -> None:
    plugin = ("--plugin", str(PLUGIN))
    table = points("checkpoint.pt", *plugin, cwd=run)
    assert table.returncode == 0, table.stderr
    assert "tiny: 3 coverage points, 80 neurons" in table.stdout
    assert "first.2" in table.stdout
    assert "8×16×16" in table.stdout
    done = points("--model", "tiny", "--classes", "4", "--all", "--json", *plugin, cwd=run)
    document = json.loads(done.stdout)
    assert (document["classes"], document["watched"]) == (4, 3)
    watched = [point for point in document["points"] if point["watched"]]
    assert [(p["name"], p["shape"], p["neurons"]) for p in watched] == [
        ("first.2", [8, 16, 16], 16), ("second.2", [16, 8, 8], 32), ("head.2", [32], 32),
    ]  # fmt: skip
    assert {"first.0", "last"} <= {point["name"] for point in document["points"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a checkpoint, or a --model"),
        (("--model", "tine"), "did you mean 'tiny'"),
        (("--model", "tiny", "--points", "third*"), "matches no coverage point 'third*'"),
        (("--model", "tiny", "--preprocess", "crop=none"), "--preprocess crop=none"),
    ],
)
def test_what_cannot_be_listed_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = points("--plugin", str(PLUGIN), *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
