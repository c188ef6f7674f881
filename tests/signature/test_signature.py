"""Signature files: whole, checked, and of one network."""

import dataclasses
from pathlib import Path

import pytest
import torch

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.models import checkpoint as checkpoints
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureResult, build_signature
from covcli.signature.config import SignatureConfig
from covcli.signature.monitor import Monitor
from covcli.training.train import TrainResult


def test_a_signature_comes_back_whole(signed: SignatureResult, tmp_path: Path) -> None:
    signature, calibration, record = signatures.load(signed.path)
    signatures.save(tmp_path / "again", signature, calibration, record)
    assert (tmp_path / "again").read_bytes() == signed.path.read_bytes()
    broken = [
        dataclasses.replace(signature, granularity="pixel"),  # type: ignore[arg-type]
        dataclasses.replace(signature, classes=signature.classes[:-1]),
        dataclasses.replace(signature, points=signature.points[:-1]),
        dataclasses.replace(signature, model=dataclasses.replace(signature.model, classes=9)),
    ]
    for wrong in broken:
        signatures.save(tmp_path / "wrong", wrong, calibration, record)
        with pytest.raises(CovcliError, match="is inconsistent"):
            signatures.load(tmp_path / "wrong")
    combination = calibration.combination
    for changes in (
        {"scores": calibration.scores.flip(0)}, {"scores": calibration.scores[:-1]},
        {"combination": dataclasses.replace(combination, scale=-combination.scale)},
        {"combination": dataclasses.replace(combination, center=combination.center * torch.nan)},
        {"combination": dataclasses.replace(combination, spread=-combination.spread)},
        {"combination": dataclasses.replace(combination, level=combination.level[:0])},
        {"predicted": calibration.predicted[:-1]}, {"predicted": calibration.predicted.int()},
        {"predicted": calibration.predicted + 1}, {"predicted": calibration.predicted - 1},
        {"softmax": calibration.softmax[:-1]}, {"softmax": calibration.softmax.float()},
    ):  # fmt: skip
        other = dataclasses.replace(calibration, **changes)
        signatures.save(tmp_path / "wrong", signature, other, record)
        with pytest.raises(CovcliError, match="is inconsistent"):
            signatures.load(tmp_path / "wrong")


def test_an_older_signature_names_the_command_that_replaces_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "signature-mrc.safetensors"
    tensors, metadata = signatures.load_signature(path)
    with monkeypatch.context() as older:
        older.setattr(signatures, "SIGNATURE_SCHEMA", signatures.SIGNATURE_SCHEMA - 1)
        older.setitem(metadata, "schema", signatures.SIGNATURE_SCHEMA)
        signatures.save_signature(path, tensors, metadata)
    with pytest.raises(CovcliError, match=r"another schema.*covcli build-signature") as caught:
        signatures.load(path)
    assert "\n" not in str(caught.value)


def test_a_crafted_state_is_refused(trained: TrainResult, tmp_path: Path) -> None:
    """Of every tensor, another type, another shape, and NaN; of the ranks, more than there are."""
    path = tmp_path / "x.safetensors"
    config = SignatureConfig(trained.checkpoint, "ensemble", output=path, mergeable=True)
    build_signature(config, Silent())
    tensors, metadata = signatures.load_signature(path)
    states = [name for name in tensors if name.startswith(("state.", "sums."))]
    assert len(states) > 12
    changes = {"state.ranks": [tensors["state.ranks"] + 1, -tensors["state.ranks"]]}
    for name in states:
        tensor = tensors[name]
        others = [tensor.to(kind) for kind in (torch.complex64, torch.bool, torch.float16)]
        others += [tensor.flatten()[1:], tensor[None], *changes.get(name, [])]
        if tensor.is_floating_point():
            others.append(tensor * torch.nan)
        for other in others:
            if other.dtype == tensor.dtype and torch.equal(other, tensor):
                continue
            signatures.save_signature(path, {**tensors, name: other.contiguous()}, metadata)
            with pytest.raises(CovcliError, match="is inconsistent"):
                signatures.load(path)
    for sums in ({}, {"count": "sum"}, {**metadata["sums"], "count": "mean"}, 3):
        signatures.save_signature(path, tensors, {**metadata, "sums": sums})
        with pytest.raises(CovcliError, match="is inconsistent"):
            signatures.load(path)


def test_a_crafted_signature_or_checkpoint_is_refused(run: Path) -> None:
    """Files whose digests are right, but whose content no program of ours would write."""
    path = run / "signature-mrc.safetensors"
    signature, calibration, record = signatures.load(path)
    tensors, metadata = signatures.load_signature(path)
    for changes in (
        {"trusted": 3}, {"calibration": {"spec": "digits"}}, {"calibration_rows": "all"},
        {"calibration_rows": [[1]]}, {"calibration_rows": [-1]}, {"calibration_rows": [2**63]},
        {"calibration_rows": record.calibration_rows[1:]}, {"trusted_counts": [1]},
        {"trusted_images": 0}, {"accuracy": 1.5}, {"confidence_threshold": None},
        {"relaxed_classes": [10]}, {"parts": [{"file": "x"}]}, {"provenance": []},
    ):  # fmt: skip
        document = {**metadata, "record": {**record.as_dict(), **changes}}
        signatures.save_signature(path, tensors, document)
        with pytest.raises(CovcliError, match="is inconsistent") as caught:
            signatures.load(path)
        assert "pydantic" not in str(caught.value)
    for key, value in (("floor", 10**400), ("floor", "x"), ("granularity", 3), ("precision", {})):
        signatures.save_signature(path, tensors, {**metadata, key: value})
        with pytest.raises(CovcliError, match=r"is inconsistent|is not a covcli signature"):
            signatures.load(path)
    for name in tensors:
        for kind in (torch.complex64, torch.bool, torch.float16):
            changed = {**tensors, name: tensors[name].to(kind)}
            if changed[name].dtype != tensors[name].dtype:
                signatures.save_signature(path, changed, metadata)
                with pytest.raises(CovcliError, match="is inconsistent"):
                    signatures.load(path)
    for key in record.as_dict():
        document = {k: v for k, v in record.as_dict().items() if k != key}
        signatures.save_signature(path, tensors, {**metadata, "record": document})
        with pytest.raises(CovcliError, match=f"{key}: is missing"):
            signatures.load(path)
    first = dataclasses.replace(signature.points[0], module="os", channel_dim=77)
    crafted = dataclasses.replace(signature, points=(first, *signature.points[1:]))
    signatures.save(path, crafted, calibration, record)
    with pytest.raises(CovcliError, match="does not have"):
        Monitor.load(run / "checkpoint.pt", path)
    saved = checkpoints.load(run / "checkpoint.pt")
    for training in ({"method": 3}, {"method": "mrc", "confidence_threshold": "x"}, {"a": 1}):
        checkpoints.save(run / "checkpoint.pt", dataclasses.replace(saved, training=training))
        with pytest.raises(CovcliError):
            checkpoints.load(run / "checkpoint.pt")


def test_another_checkpoints_signature_is_refused(run: Path) -> None:
    other = checkpoints.load(run / "checkpoint.pt")
    with torch.no_grad():
        other.model.network.last.bias += 1
    checkpoints.save(run / "checkpoint.pt", other)
    with pytest.raises(CovcliError, match="belongs to another checkpoint"):
        Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors")
    with pytest.raises(CovcliError, match="belongs to another checkpoint"):
        evaluate(EvaluationConfig(("photos",), runs=run.parent), Silent())
