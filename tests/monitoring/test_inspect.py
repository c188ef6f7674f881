"""inspect: every file of a run for what it is, and any other in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from covcli.core import files
from covcli.core.errors import CovcliError
from covcli.models import architectures
from covcli.models import checkpoint as checkpoints
from covcli.monitoring.inspect import inspect_file
from covcli.monitoring.inspection import as_table
from covcli.signature import signature as signatures

PLUGIN = Path(__file__).parents[1] / "tiny_model.py"


@pytest.fixture(autouse=True)
def _no_network_is_built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What inspects must not build; what the fixtures build they have built by now."""
    for name in ("evaluated", "run"):
        if name in request.fixturenames:
            request.getfixturevalue(name)

    def refuse(*_: object) -> None:
        raise AssertionError("a network is built")

    monkeypatch.setattr(architectures.Classifier, "__init__", refuse)


def test_a_checkpoint_and_a_signature_say_what_they_hold(run: Path) -> None:
    path = run / "checkpoint.pt"
    inspection, content = inspect_file(path), checkpoints.load_checkpoint(path)
    state = content["state"]
    assert (inspection.kind, inspection.bytes) == ("checkpoint", path.stat().st_size)
    assert inspection.digest == files.digest_file(path)
    assert inspection.network is not None
    assert inspection.network.name == "tiny"
    assert inspection.network.fingerprint == files.fingerprint(state)
    assert inspection.network.parameters == sum(tensor.numel() for tensor in state.values())
    assert inspection.classes == tuple("0123456789")
    assert {entry.role: entry.images for entry in inspection.data} == {
        "trusted": None, "calibration": 359,
    }  # fmt: skip
    assert inspection.settings is not None
    assert inspection.settings["epochs"] == 4

    signed = inspect_file(run / "signature-mrc.safetensors")
    signature, calibration, record = signatures.load(run / "signature-mrc.safetensors")
    assert (signed.kind, signed.method) == ("signature", "mrc?sections=10&cost=surprisal")
    assert signed.network is not None
    assert signed.network.fingerprint == inspection.network.fingerprint
    assert [(p.name, p.neurons) for p in signed.points] == [
        (p.name, p.neurons) for p in signature.points
    ]
    assert {entry.role: entry.images for entry in signed.data} == {
        "trusted": record.trusted_images, "calibration": record.calibration_images,
    }  # fmt: skip
    assert signed.guarantee is not None
    assert signed.guarantee.statement == calibration.guarantee.statement()
    assert signed.provenance is not None
    assert signed.provenance["torch"] == torch.__version__


def test_a_run_says_what_it_holds_and_what_does_not_belong(evaluated: Path) -> None:
    inspection = inspect_file(evaluated)
    kinds = {entry.path.name: entry.kind for entry in inspection.files}
    assert kinds["checkpoint.pt"] == "checkpoint"
    assert kinds["evaluation.json"] == "evaluation"
    assert kinds["scores.csv.gz"] == "scores"
    assert "training log" in kinds.values()
    of_run = {entry.kind: entry for entry in inspection.files}
    sets = {entry.name: entry.images for entry in of_run["evaluation"].data}
    assert sets["photos?limit=200"] == 200
    assert {s.name: s.images for s in of_run["scores"].data}["photos?limit=200"] == 200
    assert "NOT" not in str(as_table(inspection).rows)

    path = evaluated / "signature-mrc.safetensors"
    tensors, metadata = signatures.load_signature(path)
    signatures.save_signature(path, tensors, {**metadata, "fingerprint": "0" * 64})
    (evaluated / "evaluation.json").write_text("{")
    again = inspect_file(evaluated)
    rows = dict(as_table(again).rows)
    assert rows["signature-mrc.safetensors"].endswith("NOT of this checkpoint")
    assert rows["evaluation.json"].startswith("damaged")
    assert "not a JSON document" in rows["evaluation.json"]


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".anything"])
def test_a_state_dict_says_what_it_looks_like(tmp_path: Path, ending: str) -> None:
    import torchvision

    state = torchvision.models.resnet18(num_classes=7).state_dict()
    path = tmp_path / f"weights{ending}"
    if ending == ".pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        safetensors.torch.save_file(state, path)
    inspection = inspect_file(path)
    assert inspection.kind == "state dict"
    assert {t.name: t.shape for t in inspection.tensors} == {
        k: tuple(v.shape) for k, v in state.items()
    }
    assert inspection.nearest.startswith("resnet18, with ")
    assert f"{len(state) - 12} more" in str(as_table(inspection).rows)


def test_other_files_are_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    whole = (run / "signature-mrc.safetensors").read_bytes()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "a.json").write_text('{"a": 3}')
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "changed").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "gz").write_bytes(b"\x1f\x8bhello")
    os.mkfifo(tmp_path / "pipe")
    names = [path.name for path in tmp_path.iterdir() if path.name != "runs"]
    for name in [*names, "missing"]:
        with pytest.raises(CovcliError) as caught:
            inspect_file(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command_prints_a_table_or_one_document(run: Path) -> None:
    def covcli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "covcli", "inspect", *arguments]
        return subprocess.run(command, cwd=run.parent.parent, capture_output=True, text=True)

    done = covcli("runs/latest", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["kind"] == "run"
    assert {"checkpoint", "signature"} <= {entry["kind"] for entry in document["files"]}
    done = covcli("runs/latest/checkpoint.pt")
    assert done.returncode == 0, done.stderr
    assert "tiny, 10 classes" in done.stdout
    shutil.copy(PLUGIN, run / "foreign.pt")
    done = covcli("runs/latest/foreign.pt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
