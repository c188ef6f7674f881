"""Every command where the process has no home, no temporary folder or no stdout to write to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PLUGIN

# Python reads this module first: of a user whom the system does not know, without a writable
# folder for temporary files.
STRANGER = """
import pwd
def unknown(*_): raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = unknown
"""
BARREN = """
import tempfile
tempfile._candidate_tempdir_list = lambda: ["/nonexistent"]
"""
# Each command in a process that has loaded torch already; the exit codes go to a file.
CHAIN = """
import json, sys
from covcli.__main__ import main
codes = []
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        codes.append(end.code)
    open(sys.argv[2], "w").write(json.dumps(codes))
"""
CHECKPOINT, SIGNATURE = "runs/tiny/checkpoint.pt", "runs/tiny/signature-src.safetensors"
COMMANDS = [
    ["train", "--trusted", "digits?limit=64", "--model", "tiny", "--epochs", "1", "--name", "new",
     "--plugin", str(PLUGIN)],
    ["build-signature", CHECKPOINT, "--method", "src"],
    ["merge-signatures", SIGNATURE, "--output", "m.safetensors"],
    ["evaluate", "--untrusted", "noise:uniform?limit=20", "--checkpoint", CHECKPOINT, "--junit",
     "gates.xml", "--fail-under", "accuracy=1"],
    ["report", "runs/tiny"], ["points", CHECKPOINT], ["evaluate"],
    ["check", "noise:uniform?limit=4", "--checkpoint", CHECKPOINT],
    ["compare", "runs/tiny", "runs/tiny"], ["inspect", CHECKPOINT], ["list", "methods"], ["config"],
]  # fmt: skip
DONE = [0, 0, 2, 1, 0, 0, 2, 0, 0, 0, 0, 0]  # one signature is not merged, and a gate fails
UNWRITTEN = [code or 2 for code in DONE]
MADE = ["runs/new/checkpoint.pt", SIGNATURE, "gates.xml", "runs/tiny/report.html"]


@pytest.mark.parametrize(
    ("site", "redirect", "encoding", "expected"),
    [
        (STRANGER, "", "ascii", DONE),
        (STRANGER, ">&-", "cp1252", DONE),
        (STRANGER, "> /dev/full", "utf-8", UNWRITTEN),
        (STRANGER + BARREN, "| true", "utf-8", None),
    ],
    ids=["unknown user", "closed stdout", "full stdout", "no temporary folder"],
)
def test_every_command_is_done_or_says_in_a_line_why_not(
    run: Path, tmp_path: Path, site: str, redirect: str, encoding: str, expected: list[int] | None
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(site)
    homes = {"HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "COVCLI_DATA_DIR",
             "LOGNAME", "USER", "USERNAME"}  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key not in homes}
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, "-c", CHAIN,
         json.dumps(COMMANDS), "codes"],
        cwd=tmp_path, capture_output=True, timeout=300, env=environment,
    )  # fmt: skip
    told = done.stderr.decode()
    codes = json.loads((tmp_path / "codes").read_text())
    assert "Traceback" not in told, told
    assert "internal error" not in told, told
    assert "Matplotlib created" not in told, told
    assert told.count("\nerror: ") >= codes.count(2), told
    if expected is None:
        assert len(codes) == len(COMMANDS)
        assert set(codes) <= {0, 1, 2}, told
        return
    assert codes == expected, told
    assert [name for name in MADE if not (tmp_path / name).is_file()] == []
