"""Files of other people: refused in one line, or unchanged in meaning; no code, no bombs."""

import gzip
import io
import json
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from covcli.core import file_checks, files, run_folders
from covcli.core.errors import CovcliError
from covcli.data import datasets
from covcli.data.decoding import decode
from covcli.models import checkpoint as checkpoints
from covcli.models.checkpoint import load_checkpoint, save_checkpoint
from covcli.monitoring.inspect import inspect_file
from covcli.reporting.report import report
from covcli.signature import signature as signatures
from covcli.training.paused import PAUSED

MEANING = {
    "signature": lambda path: (
        files.digest(signatures.load(path)[2].as_dict())
        + files.fingerprint(signatures.load(path)[0].state.tensors)
        + repr(signatures.load(path)[0].points)
        + files.fingerprint({"s": signatures.load(path)[1].scores})
    ),
    "checkpoint": lambda path: (
        files.fingerprint(checkpoints.load(path).model.state_dict())
        + repr([checkpoints.load(path).classes, checkpoints.load(path).training])
    ),
}


def files_of(run: Path) -> dict[str, Path]:
    return {
        "signature": run / "signature-mrc.safetensors",
        "checkpoint": run / "checkpoint.pt",
    }


def refused_or_unchanged(
    path: Path, content: bytes, meaning: Callable[[Path], str], was: str
) -> bool:
    """Return whether a changed file was refused; accepted, it must mean what it meant."""
    path.write_bytes(content)
    try:
        assert meaning(path) == was
    except CovcliError as error:
        assert "\n" not in str(error)
        return True
    return False


@pytest.mark.parametrize("kind", ["signature", "checkpoint"])
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_are_refused_or_mean_the_same(
    run: Path, kind: str, data: st.DataObject
) -> None:
    original = files_of(run)[kind]
    content = original.read_bytes()
    path = run / f"mutated{original.suffix}"
    meaning = MEANING[kind]
    where = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "noise"]))
    noise = data.draw(st.binary(min_size=8, max_size=8))
    changed = {
        "flip": lambda: content[:where] + bytes([content[where] ^ 0x41]) + content[where + 1 :],
        "cut": lambda: content[:where],
        "insert": lambda: content[:where] + b"\xff" + content[where:],
        "remove": lambda: content[:where] + content[where + 1 :],
        "noise": lambda: content[:where] + noise + content[where + 8 :],
    }[how]()
    was = meaning(original)
    if refused_or_unchanged(path, changed, meaning, was) is False:
        assert how != "cut"


@pytest.mark.parametrize("kind", ["signature", "checkpoint"])
def test_files_cut_within_their_header_or_tail_are_refused(run: Path, kind: str) -> None:
    original = files_of(run)[kind]
    content = original.read_bytes()
    path = run / f"cut{original.suffix}"
    for length in [*range(0, 600, 7), *range(len(content) - 200, len(content), 7)]:
        path.write_bytes(content[:length])
        with pytest.raises(CovcliError):
            MEANING[kind](path)


def header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(path: Path, *entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, content in entries:
            zipped.writestr(name, content)
    return path


def test_hostile_archives_are_refused_before_they_unpack(tmp_path: Path) -> None:
    images = header((2, 4, 4, 3)) + bytes(96)
    bomb = header((200 << 20,)) + bytes(200 << 20)
    files = {
        "lying": archive(tmp_path / "a.npz", ("images.npy", header((10**12, 4, 4)) + bytes(96))),
        "negative": archive(tmp_path / "b.npz", ("images.npy", header((-2, 4, 4, 3)) + bytes(96))),
        "bomb": archive(tmp_path / "c.npz", ("images.npy", bomb), compression=zipfile.ZIP_DEFLATED),
        "object": archive(tmp_path / "d.npz", ("images.npy", header((12,), "|O") + bytes(96))),
        "code": archive(tmp_path / "e.npz", ("images.npy", b"\x93NUMPY\x01\x00\x08\x00__import")),
        "record": archive(tmp_path / "f.npz", ("images.npy", header((3,), "u1,u1") + bytes(6))),
    }
    with pytest.warns(UserWarning, match="Duplicate"):
        files["twice"] = archive(tmp_path / "g.npz", ("images.npy", images), ("images.npy", images))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, path in files.items():
        with pytest.raises(CovcliError) as caught:
            datasets.load(f"npz:{path}", "train")
        assert "\n" not in str(caught.value), name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    good = archive(tmp_path / "h.npz", ("images.npy", images))
    assert len(datasets.load(f"npz:{good}", "train")) == 2


@settings(max_examples=100, deadline=None)
@given(where=st.integers(0, 700), value=st.integers(0, 255))
def test_mutated_archives_are_refused_or_load(where: int, value: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        np.savez(path, images=np.zeros((4, 4, 4), np.uint8), labels=np.arange(4))
        content = bytearray(path.read_bytes())
        content[where % len(content)] = value
        path.write_bytes(content)
        try:
            datasets.load(f"npz:{path}", "train")
        except CovcliError as error:
            assert "\n" not in str(error)


CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_every_reader_refuses_the_corpus(path: Path) -> None:
    """Hostile pickles, lying and overlapping headers, bombs, ambiguous and deep documents."""
    canary = Path("/tmp/covcli-canary")  # what the pickles of the corpus would make
    readers: list[Callable[[Path], object]] = [
        checkpoints.load, signatures.load, files.read_json,
        PAUSED.load, lambda p: datasets.load(f"npz:{p}", "train"),
        decode, file_checks.read_gzip,
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(CovcliError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_and_broken_images_are_refused(tmp_path: Path) -> None:
    Image.new("L", (12_000, 12_000)).save(tmp_path / "bomb.png", compress_level=9)
    Image.new("RGB", (64, 64), (9, 200, 30)).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    whole = decode(tmp_path / "good.png")
    assert whole.shape == (1, 3, 64, 64)
    refused = 0
    for length in range(0, len(good), 5):
        (tmp_path / "cut.png").write_bytes(good[:length])
        try:
            assert torch.equal(decode(tmp_path / "cut.png"), whole)
        except CovcliError as error:
            assert "cannot be read as an image" in str(error)
            refused += 1
    assert refused > 0.8 * len(good) / 5
    with pytest.raises(CovcliError, match=r"12000×12000 are more than 89478485 pixels"):
        decode(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"a": NaN}',
        "[1e999",
        "[1e999]",
        "[-1e400]",
        "[" + "9" * 400 + "]",
        "\udcff".encode("utf-8", "replace"),
    ],
)
def test_ambiguous_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        file_checks.parse_json(text)


def evaluated_run(run: Path) -> Path:
    from covcli.core.progress import Silent
    from covcli.evaluation.evaluate import EvaluationConfig, evaluate

    evaluate(EvaluationConfig(("noise:uniform?limit=30",), runs=run.parent), Silent())
    return run


def test_a_run_folder_from_outside_is_refused_part_by_part(run: Path, tmp_path: Path) -> None:
    whole = evaluated_run(run)
    document = json.loads((whole / "evaluation.json").read_text())
    bomb = gzip.compress(bytes(300 << 20))
    broken: dict[str, tuple[str, bytes]] = {
        "no json": ("evaluation.json", b"{"),
        "deep json": ("evaluation.json", b"[" * 100_000),
        "other json": ("evaluation.json", b'{"schema": 1}'),
        "wrong types": ("evaluation.json", json.dumps({**document, "points": 3}).encode()),
        "wrong explanations": (
            "evaluation.json",
            json.dumps({**document, "explanations": [{"points": []}]}).encode(),
        ),
        "no gzip": ("scores.csv.gz", b"hello"),
        "bomb": ("scores.csv.gz", bomb),
        "cut gzip": ("scores.csv.gz", (whole / "scores.csv.gz").read_bytes()[:-9]),
        "other table": ("scores.csv.gz", gzip.compress(b"a,b\n1,2\n")),
        "no samples": ("samples.npz", b""),
    }
    for name, (file, content) in broken.items():
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        (folder / file).write_bytes(content)
        with pytest.raises(CovcliError) as caught:
            report(folder)
        assert "\n" not in str(caught.value), name
        assert not (folder / "report.html").exists()
    (whole / "figures").symlink_to(tmp_path)
    with pytest.raises(CovcliError, match="leaves its folder"):
        report(whole)


def test_names_with_control_characters_stay_off_the_terminal(tmp_path: Path) -> None:
    name = "\x1b[31mred\x07"
    (tmp_path / name).mkdir()
    with pytest.raises(CovcliError) as caught:
        datasets.load(f"folder:{tmp_path}/{name}", "train")
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[31mred" in str(caught.value)


def test_a_size_limit_leaves_the_old_file_and_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    code = (
        "import resource, sys; from pathlib import Path; from covcli.core import files\n"
        "from covcli.core.errors import CovcliError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try: files.write_bytes(Path({str(path)!r}), bytes(100000))\n"
        "except CovcliError as error: sys.stderr.write(f'{error}\\n'); sys.exit(2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be written (File too large)" in done.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_the_dead_are_cleared_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    dead = tmp_path / ".x.json.dead.tmp"
    dead.write_bytes(b"half")
    with files.atomic(path) as file:
        assert not dead.exists()
        files._clear_leftovers(path)
        file.write(b"{}")
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    with (
        run_folders.locked(tmp_path),
        pytest.raises(CovcliError, match="another process"),
        run_folders.locked(tmp_path),
    ):
        pass
    with run_folders.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_claims_more_than_it_stores_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1).expand(10**10)}, path)
    with pytest.raises(CovcliError, match="is not a PyTorch checkpoint"):
        load_checkpoint(path)


def test_a_torch_archive_must_be_plain(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 20)}, buffer)
    path = tmp_path / "x.pt"
    with (
        zipfile.ZipFile(buffer) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(CovcliError, match="not sound"):
        load_checkpoint(path)


@pytest.mark.parametrize("field", ["spec", "source", "images", "ran_in", "seal", "another"])
@pytest.mark.parametrize("value", [5, None, ["digits"], {}])
def test_a_record_of_data_is_of_texts(run: Path, field: str, value: object) -> None:
    content = load_checkpoint(run / "checkpoint.pt")
    if field == "another":
        content["trusted"] = value or 7
    else:
        content["trusted"] = {**content["trusted"], field: value}
    path = run / "other.pt"
    save_checkpoint(path, content)
    for read in (checkpoints.load, inspect_file):
        with pytest.raises(CovcliError, match="is inconsistent") as caught:
            read(path)
        assert str(caught.value).isprintable()


@pytest.mark.filterwarnings("error")  # of torch, that drops what is imaginary
@pytest.mark.parametrize("kind", [torch.complex64, torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_no_real_numbers_are_refused(run: Path, kind: torch.dtype) -> None:
    content = load_checkpoint(run / "checkpoint.pt")
    name = "network.last.weight"
    state = {**content["state"], name: content["state"][name].to(kind)}
    save_checkpoint(run / "other.pt", {**content, "state": state})
    torch.save(state, run / "bare.pt")
    for path in (run / "other.pt", run / "bare.pt"):
        with pytest.raises(CovcliError, match=r"last\.weight' are of torch"):
            checkpoints.load(path, "tiny" if path.name == "bare.pt" else None)


@pytest.mark.parametrize("name", ["torchvision:vgg19", "torchvision:regnet_y_128gf"])
def test_a_small_file_asks_for_no_large_network(run: Path, name: str) -> None:
    content = load_checkpoint(run / "checkpoint.pt")
    model = {**content["model"], "name": name, "classes": 100_000, "shape": [3, 224, 224]}
    classes = [str(k) for k in range(100_000)]
    save_checkpoint(run / "other.pt", {**content, "model": model, "classes": classes})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CovcliError, match="do not fit model"):
        checkpoints.load(run / "other.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # of 2 GB
