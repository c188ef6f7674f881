"""Files: whole or not at all, and never code."""

import json
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from covcli.core import files, run_folders
from covcli.core.errors import CovcliError
from covcli.models.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from covcli.signature.signature import load_signature, save_signature
from covcli.training.paused import PAUSED


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(path, {"new": float("nan")})
    with pytest.raises(KeyboardInterrupt):
        half_written(path)
    assert files.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def half_written(path: Path) -> None:
    with files.atomic(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CovcliError, match="cannot be written"):
        files.write_bytes(tmp_path / "file" / "below", b"x")


class Canary:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, wrapped: bool) -> None:
    canary = Canary(tmp_path / "ran")
    path = tmp_path / "x.pt"
    if wrapped:
        torch.save({"state": {"w": torch.ones(1)}, "extra": canary}, path)
    else:
        path.write_bytes(pickle.dumps(canary))
    with pytest.raises(CovcliError, match="is not a PyTorch checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def content(**changes: object) -> dict[str, object]:
    document = {"model": {}, "state": {"w": torch.arange(4.0)}, "classes": ["a"], "trusted": None,
            "calibration_rows": torch.arange(2), "training": {}}  # fmt: skip
    return document | changes


def test_checkpoints_come_back_and_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, content())
    assert torch.equal(load_checkpoint(path)["state"]["w"], torch.arange(4.0))
    damaged = torch.load(path, weights_only=True)
    damaged["content"]["state"]["w"][2] = 7
    torch.save(damaged, path)
    with pytest.raises(CovcliError, match="damaged"):
        load_checkpoint(path)
    for changes, message in (
        ({"state": {}}, "neither a checkpoint nor"),
        ({"state": {"w": 3}}, "neither a checkpoint nor"),
        ({"state": {"w": torch.tensor([float("nan")])}}, "'w' hold NaN"),
    ):
        save_checkpoint(path, content(**changes))
        with pytest.raises(CovcliError, match=message):
            load_checkpoint(path)
    CHECKPOINT.save(path, {"state": {}})
    with pytest.raises(CovcliError, match="lacks"):
        load_checkpoint(path)
    PAUSED.save(path, content())
    with pytest.raises(CovcliError, match="is no checkpoint"):
        load_checkpoint(path)
    torch.save({"format": CHECKPOINT.name, "schema": 99}, path)
    with pytest.raises(CovcliError, match="schema 99"):
        load_checkpoint(path)


def test_a_digest_sees_every_value() -> None:
    base = {"a": [1, 2.5, "x", None], "t": torch.arange(3), "u": torch.arange(3)}
    others = [
        {**base, "a": [1, 2.5, "x"]}, {**base, "a": [1, 2.5, "y", None]}, {**base, "b": 1},
        {**base, "t": torch.arange(4)}, {**base, "a": ["1", 2.5, "x", None]},
        {**base, "t": torch.ones(3), "u": torch.arange(3)},
    ]  # fmt: skip
    assert len({files.digest(content) for content in [base, *others]}) == 7
    assert files.digest(dict(base)) == files.digest(base)


def test_a_fingerprint_sees_bits_names_shapes_and_types() -> None:
    base = {"a": torch.zeros(4), "b": torch.arange(3)}
    others = [
        {"a": torch.zeros(2, 2), "b": torch.arange(3)},
        {"a": -torch.zeros(4), "b": torch.arange(3)},
        {"a": torch.zeros(4, dtype=torch.float16), "b": torch.arange(3)},
        {"c": torch.zeros(4), "b": torch.arange(3)},
        {"a": torch.zeros(4)},
    ]
    digests = {files.fingerprint(tensors) for tensors in [base, *others]}
    assert len(digests) == 6
    assert files.fingerprint(dict(reversed(base.items()))) == files.fingerprint(base)


@pytest.mark.parametrize("damage", ["text", "empty", "no metadata", "flip", "schema"])
def test_a_file_that_is_no_signature_is_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save

    path = tmp_path / "x.safetensors"
    save_signature(path, {"t": torch.arange(4.0)}, {"method": "src"})
    tensors, metadata = load_signature(path)
    assert torch.equal(tensors["t"], torch.arange(4.0))
    assert metadata["method"] == "src"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes({
        "text": b"hello there", "empty": b"", "no metadata": save({"t": torch.ones(1)}),
        "flip": bytes(raw), "schema": save({}, {"covcli": json.dumps({"schema": 1})}),
    }[damage])  # fmt: skip
    with pytest.raises(CovcliError):
        load_signature(path)


def test_runs_have_fresh_names_and_latest_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (run_folders.new_run(tmp_path, name, "x") for name in ("a", None))
    for folder in (first, second):
        with run_folders.locked(folder, new=True):
            (folder / "checkpoint.pt").touch()
            run_folders.mark_latest(folder)
    assert run_folders.newest_run(tmp_path) == second.resolve()
    monkeypatch.chdir(tmp_path.parent)
    assert run_folders.newest_run(tmp_path) == Path(tmp_path.name) / second.name
    with pytest.raises(CovcliError, match="exists"):
        run_folders.new_run(tmp_path, "a", "x")
    for name in ("latest", "..", "a/b", "/tmp/x"):
        with pytest.raises(CovcliError, match="not a name"):
            run_folders.new_run(tmp_path, name, "x")
    with pytest.raises(CovcliError, match="no run yet"):
        run_folders.newest_run(tmp_path / "none")


def test_plain_values_are_json() -> None:
    mixed = {"a": np.float32(0.5), "b": (np.int64(1), float("nan")), "c": Path("x"),
             "d": torch.arange(2), 3: np.bool_(True)}  # fmt: skip
    expected = {"a": 0.5, "b": [1, None], "c": "x", "d": [0, 1], "3": True}
    assert files.plain(mixed) == expected
    json.dumps(files.plain(mixed), allow_nan=False)
