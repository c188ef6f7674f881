"""Training: what it logs, seeds and leaves behind."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import neurons_of, tiny_config

from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.models import checkpoint as checkpoints
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureConfig, build_signature
from covcli.training.train import TrainResult, split_rows, train


def test_training_logs_what_it_promises(trained: TrainResult) -> None:
    log = json.loads(trained.log.read_text())
    assert pickle.loads(trained.log.with_suffix(".pkl").read_bytes()) == log
    assert len(log["epochs"]) == 4
    last = log["epochs"][-1]
    assert last["held_out_accuracy"] > 0.7
    assert log["epochs"][0]["penalty"] == 0
    assert last["penalty"] > 0
    weight = log["settings"]["confidence_weight"]
    for entry in log["epochs"]:
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + weight * entry["penalty"])
        names = [s["name"] for s in entry["watched"]["sets"]]
        assert names == ["trusted", "photos?limit=64"]
        assert all(len(s["coverage"]) == 3 for s in entry["watched"]["sets"])
    trusted, photos = last["watched"]["sets"]
    assert trusted["mean_coverage"] > photos["mean_coverage"] + 0.1
    assert {"covcli", "torch", "seed", "device", "threads", "command"} <= log["provenance"].keys()
    assert (trained.run.parent / "latest").resolve() == trained.run.resolve()


def test_the_held_out_accuracy_is_that_of_the_saved_checkpoint(trained: TrainResult) -> None:
    saved = checkpoints.load(trained.checkpoint)
    held_out = datasets.load("digits", "train").select(saved.calibration_rows)
    _, logits, _ = neurons_of(trained.checkpoint, held_out)
    accuracy = np.mean(logits.argmax(1) == held_out.known_labels().numpy())
    assert trained.epochs[-1].held_out_accuracy == pytest.approx(accuracy, abs=1e-9)


def test_the_calibration_split_is_apart_whole_and_seeded() -> None:
    training, held_out = split_rows(103, 0.25, 5)
    assert len(held_out) == 26
    assert sorted([*training.tolist(), *held_out.tolist()]) == list(range(103))
    assert torch.equal(split_rows(103, 0.25, 5)[1], held_out)
    assert not torch.equal(split_rows(103, 0.25, 6)[1], held_out)


@pytest.mark.usefixtures("foolbox")
def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        runtime.configure(3, 0)
        config = tiny_config(
            tmp_path, name=name, epochs=3, seed=3, augment="crop-flip", untrusted=("attack:pgd",)
        )
        result = train(config, Silent())
        signed = build_signature(SignatureConfig(result.checkpoint), Silent())
        weights.append((checkpoints.load(result.checkpoint), signatures.load(signed.path)))
    (first, signed_first), (second, signed_second) = weights
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    for name, tensor in signed_first[0].state.tensors.items():
        assert torch.equal(tensor, signed_second[0].state[name]), name
    assert torch.equal(signed_first[1].scores, signed_second[1].scores)


def test_the_confidence_loss_moves_training(tmp_path: Path, trained: TrainResult) -> None:
    runtime.configure(0, 0)
    without = train(tiny_config(tmp_path, confidence_weight=0.0), Silent())
    assert without.epochs[-1].penalty == 0
    first, other = (checkpoints.load(r.checkpoint).model.state_dict() for r in (trained, without))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_diverging_training_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(CovcliError, match="lower --learning-rate"):
        train(tiny_config(tmp_path, learning_rate=1e6), Silent())
    assert list(tmp_path.iterdir()) == []
