"""What is no file is refused before a byte is read, and planted links lead nowhere."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from covcli.__main__ import main
from covcli.core import file_checks, files, opening, run_folders
from covcli.core.errors import CovcliError
from covcli.data import datasets
from covcli.data.decoding import decode
from covcli.evaluation import gates
from covcli.models import checkpoint as checkpoints
from covcli.reporting import documents
from covcli.reporting.report import report
from covcli.signature import signature
from covcli.training.paused import PAUSED

READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint.pt": checkpoints.load,
    "weights.safetensors": checkpoints.load,
    "signature.safetensors": signature.load,
    "last.pt": PAUSED.load,
    "images.npz": lambda path: datasets.load(f"npz:{path}", "test"),
    "image.png": decode,
    "evaluation.json": documents.read_evaluation,
    "training_results_1.json": documents.read_training_log,
    "scores.csv.gz": file_checks.read_gzip,
    "earlier.json": lambda path: gates.read_baseline(path, 0.1, ("a",)),
    "digested": files.digest_file,
}


def make(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.mkdir()


def in_time(work: Callable[[], object]) -> BaseException | None:
    """Return what the work raises, if it ends at all."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert raised, "it still waits"
    return raised[0]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path(name)
    make(kind, path)
    error = in_time(lambda: READERS[name](path))
    assert isinstance(error, CovcliError)
    assert name in str(error)


@pytest.mark.parametrize("start", [b"x" * 4096, b""])
def test_a_file_full_of_holes_is_refused_before_memory_is_taken(
    tmp_path: Path, start: bytes
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(start)
    os.truncate(path, 1 << 40)
    for read in (checkpoints.load, signature.load, files.read_json):
        with pytest.raises(CovcliError, match="far larger than it is"):
            read(path)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text("dear")
    path.chmod(0o640)
    return path


def untouched(victim: Path) -> bool:
    return victim.read_text() == "dear" and victim.stat().st_mode & 0o777 == 0o640


def test_a_planted_lock_truncates_nothing(tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for target in (victim, tmp_path / "elsewhere" / "new"):
        (run / ".lock").symlink_to(target)
        with pytest.raises(CovcliError, match="cannot be written"), run_folders.locked(run):
            pass
        (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    error = in_time(lambda: run_folders.locked(run).__enter__())
    assert isinstance(error, CovcliError)
    assert untouched(victim)
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]


def test_planted_leftovers_are_neither_followed_nor_waited_for(
    tmp_path: Path, victim: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".x.json.1.tmp").symlink_to(victim)
    os.mkfifo(folder / ".x.json.2.tmp")
    assert in_time(lambda: files.write_json(folder / "x.json", {})) is None
    assert untouched(victim)


def test_what_is_written_replaces_a_link_and_not_what_it_leads_to(
    tmp_path: Path, victim: Path
) -> None:
    path = tmp_path / "report.html"
    path.symlink_to(victim)
    files.write_bytes(path, b"new")
    assert untouched(victim)
    assert (path.is_symlink(), path.read_bytes()) == (False, b"new")


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_what_is_no_file_is_not_replaced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("out")
    make(kind, path)
    before = path.lstat()
    with pytest.raises(CovcliError, match="no regular file and is not replaced"):
        files.write_bytes(path, b"new")
    assert path.lstat() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_no_device_nor_a_link_to_a_stream_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "out").symlink_to("/proc/self/fd/1")  # as /dev/stdout, in a container of root's
    for path in (Path("/dev/null"), *tmp_path.iterdir()):
        with pytest.raises(CovcliError, match="not replaced"):
            opening.check_replaceable(path)
    with pytest.raises(CovcliError, match="stands for no file"):
        opening.check_replaceable(Path("-"))


def test_only_an_earlier_file_of_its_kind_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "gates.xml"
    for content, is_refused in ((None, False), (b"", False), (b"<a>1", False), (b"PK<a>", True)):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CovcliError) if is_refused else contextlib.nullcontext():
            opening.check_overwritable(path, (b"<a>",), "report")


def test_the_newest_run_is_one_of_the_runs(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to("../elsewhere")
    with pytest.raises(CovcliError, match="leaves its folder"):
        run_folders.newest_run(tmp_path / "runs")


@pytest.mark.parametrize(
    "name",
    ["evaluation.json", "scores.csv.gz", "samples.npz", "figures", "training_results_9.json"],
)
def test_a_report_follows_no_link_out_of_its_folder(
    name: str, evaluated: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    planted = evaluated / name
    if planted.exists():
        planted.rename(outside / name)
    else:
        (outside / name).write_text("{}")
    planted.symlink_to(outside if name == "figures" else outside / name)
    before = sorted(outside.iterdir())
    with pytest.raises(CovcliError, match="leaves its folder"):
        report(evaluated)
    assert sorted(outside.iterdir()) == before


def test_a_lock_that_was_removed_holds_nobody_off_and_nobody_in(tmp_path: Path) -> None:
    """Two processes never hold one lock, whenever its file is removed."""
    code = """
import sys
from pathlib import Path
from covcli.core import run_folders
from covcli.core.errors import CovcliError
folder, held = Path(sys.argv[1]), Path(sys.argv[1]) / "held"
entered = 0
for _ in range(300):
    try:
        with run_folders.locked(folder):
            held.touch(exist_ok=False)
            held.unlink()
            entered += 1
    except CovcliError as error:
        assert "another process" in str(error), error
print(entered)
"""
    (tmp_path / "kept").touch()
    runs = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=-1, stderr=-1, text=True)
        for _ in range(3)
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        assert int(out) > 0


def test_paths_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"")
    bad = [tmp_path / "loop", tmp_path / ("x" * 300), tmp_path / "a\0b", tmp_path / "\ud800"]
    for path in bad:
        for look in (opening.kind, opening.exists, opening.is_file, opening.is_folder):
            with pytest.raises(CovcliError, match="cannot be looked at") as caught:
                look(path)
            assert str(caught.value).isprintable()
    with pytest.raises(CovcliError, match="cannot be looked at"):
        opening.real(tmp_path / "loop" / "x")
    kinds = [opening.kind(tmp_path / name) for name in ("", "file", "none", "file/none")]
    assert kinds == ["folder", "file", "nothing", "nothing"]


@pytest.mark.parametrize(
    "command", ["report", "train --resume", "points", "build-signature", "inspect"]
)
def test_a_path_that_cannot_be_followed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "loop/x", "x" * 300, "x" * 5000):
        with pytest.raises(SystemExit) as end:
            main([*command.split(), str(tmp_path / name)])
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
