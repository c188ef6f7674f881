"""build_signature against a naive signature, and what it refuses."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import neurons_of, tiny_config

from covcli.core import files
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.models import checkpoint as checkpoints
from covcli.signature import build
from covcli.signature import fit as fitting
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureConfig, build_signature
from covcli.signature.calibration import softmax_score
from covcli.signature.fit import SPILL_BYTES, choose_trusted
from covcli.signature.judge import Judge
from covcli.signature.monitor import Monitor
from covcli.training.train import TrainResult, split_rows, train


@pytest.mark.parametrize("method", ["src", "mrc", "mrc?sections=4&cost=share"])
def test_a_built_signature_is_the_naive_one(
    trained: TrainResult, tmp_path: Path, method: str
) -> None:
    path = tmp_path / "s.safetensors"
    result = build_signature(
        SignatureConfig(trained.checkpoint, method, output=path, confidence_threshold=0.3), Silent()
    )
    signature, _, record = signatures.load(path)
    rows, held_out = split_rows(1437, 0.25, 0)
    images = datasets.load("digits", "train").select(rows)
    neurons, logits, sizes = neurons_of(trained.checkpoint, images)
    labels = images.known_labels().numpy()
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = (logits.argmax(1) == labels) & (chance.max(1) >= 0.3)
    for k in range(10):
        mine = neurons[chosen & (labels == k)]
        assert result.trusted[str(k)] == len(mine) >= 10
        np.testing.assert_allclose(signature.state["low"][k], mine.min(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(signature.state["high"][k], mine.max(0), rtol=1e-4, atol=1e-5)
        if method != "src":
            assert int(signature.state["sections"][k].sum()) == len(mine) * sum(sizes)
    assert signature.sizes == sizes
    assert list(record.calibration_rows) == held_out.tolist()
    assert result.accuracy == pytest.approx(np.mean(logits.argmax(1) == labels))


def test_recomputed_passes_and_spilled_ones_give_the_same_signature(
    trained: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "spilled", tmp_path / "again"]
    for path, budget in zip(paths, (SPILL_BYTES, 0), strict=True):
        monkeypatch.setattr(fitting, "SPILL_BYTES", budget)
        build_signature(SignatureConfig(trained.checkpoint, "mrc", output=path), Silent())
    first, second = (signatures.load(path)[0].state.tensors for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_units_are_an_option(trained: TrainResult, tmp_path: Path) -> None:
    path = tmp_path / "unit"
    config = SignatureConfig(trained.checkpoint, "mrc", granularity="unit", output=path)
    build_signature(config, Silent())
    signature, calibration, _ = signatures.load(path)
    assert signature.sizes == [8 * 16 * 16, 16 * 8 * 8, 32]
    monitor = Monitor(Judge.of(checkpoints.load(trained.checkpoint).model, signature, calibration))
    noise = datasets.load("noise:uniform", "test").batch(torch.arange(50), (3, 32, 32))
    assert bool(monitor(noise).untrusted.float().mean() > 0.9)


def test_a_class_with_few_confident_images_takes_all_correct_ones() -> None:
    labels = torch.tensor([0] * 12 + [1] * 12 + [2] * 3)
    predicted = labels.clone()
    predicted[[0, 12]] = 2  # one mistake in each of the first two classes
    confidence = torch.full((27,), 0.95)
    confidence[14:24] = 0.5
    chosen = choose_trusted(labels, predicted, confidence, 0.9, 4)
    assert chosen.counts == [11, 11, 3, 0]
    assert chosen.relaxed == [1]


def test_images_that_calibrate_do_not_build(trained: TrainResult, tmp_path: Path) -> None:
    config = SignatureConfig(
        trained.checkpoint, "src", output=tmp_path / "s", trusted="digits?limit=500",
        calibration="digits?split=train&limit=200&offset=300",
    )  # fmt: skip
    result = build_signature(config, Silent())
    assert (result.images, result.calibration_images) == (300, 200)
    with pytest.raises(CovcliError, match="exists"):
        build_signature(config, Silent())
    again = dataclasses.replace(config, trusted="digits?limit=20&offset=310", force=True)
    with pytest.raises(CovcliError, match="only images that are used for calibration"):
        build_signature(again, Silent())


def test_bare_weights_get_a_run_of_their_own(
    trained: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = checkpoints.load(trained.checkpoint).model
    weights = tmp_path / "weights.pt"
    torch.save(model.network.state_dict(), weights)
    mean, deviation = model.spec.mean, model.spec.deviation
    config = SignatureConfig(
        weights, "src", trusted="digits", model="tiny", statistics=(mean, deviation),
        runs=tmp_path / "runs",
    )  # fmt: skip
    with pytest.raises(CovcliError, match="--calibration"):
        build_signature(config, Silent())
    assert not (tmp_path / "runs").exists()
    full = dataclasses.replace(config, calibration="digits?split=test&limit=200")
    result = build_signature(full, Silent())
    assert result.path.parent == (tmp_path / "runs" / "latest").resolve()
    newest = evaluate(EvaluationConfig(("photos?limit=30",), runs=tmp_path / "runs"), Silent())
    named = evaluate(
        EvaluationConfig(
            ("photos?limit=30",), checkpoint=weights, signature=result.path, output=tmp_path / "o"
        ),
        Silent(),
    )
    assert newest.untrusted == named.untrusted
    assert newest.trusted == named.trusted
    assert newest.trusted.images == 160
    assert "prepared as in training" not in caplog.text
    monkeypatch.setattr(build, "PLAUSIBLE", 1.01)
    build_signature(dataclasses.replace(full, output=tmp_path / "again"), Silent())
    assert "(now resize=cover,crop=32,interpolation=bilinear)" in caplog.text


def test_the_training_set_must_still_be_what_it_was(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "images": generator.integers(0, 256, (80, 8, 8), np.uint8),
        "labels": np.arange(80) % 2,
    }
    np.savez(tmp_path / "d.npz", **arrays)
    config = tiny_config(tmp_path / "runs", trusted=f"npz:{tmp_path}/d.npz", epochs=1)
    result = train(config, Silent())
    arrays["labels"][3] = 1 - arrays["labels"][3]
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(CovcliError, match="no longer the data"):
        build_signature(SignatureConfig(result.checkpoint), Silent())


def test_softmax_calibration_is_of_the_ranked_images(trained: TrainResult, run: Path) -> None:
    _, calibration, _ = signatures.load(run / "signature-mrc.safetensors")
    saved = checkpoints.load(trained.checkpoint)
    held_out = datasets.load("digits", "train").select(saved.calibration_rows)
    _, logits, _ = neurons_of(trained.checkpoint, held_out)
    expected = softmax_score(torch.from_numpy(logits))[~calibration.fitting]
    assert int(calibration.fitting.sum()) == -(-len(held_out) // 4)
    softmax, classes = calibration.softmax.sort().values, calibration.predicted
    np.testing.assert_allclose(softmax, expected.sort().values, rtol=1e-3, atol=1e-7)
    ranked = logits.argmax(1)[~calibration.fitting.numpy()]
    np.testing.assert_array_equal(classes.bincount(), np.bincount(ranked, minlength=10))


class StartsAnother(Silent):
    """Begins the same work once more while the first is under way."""

    def __init__(self, config: SignatureConfig) -> None:
        self.config, self.refused = config, 0

    def start(self, title: str, total: int) -> None:
        with pytest.raises(CovcliError, match="another process is writing this file"):
            build_signature(self.config, Silent())
        self.refused += 1


@pytest.mark.parametrize("force", [False, True])
def test_of_two_builds_of_one_output_one_wins_and_the_other_is_refused(
    force: bool, trained: TrainResult, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "s.safetensors"
    config = SignatureConfig(trained.checkpoint, "src", output=path, force=force)
    progress = StartsAnother(config)
    result = build_signature(config, progress)
    assert progress.refused
    assert result.signature_fingerprint == files.digest_file(path)
    assert list(path.parent.iterdir()) == [path]
    if not force:
        with pytest.raises(CovcliError, match="exists"):
            build_signature(config, Silent())


def test_a_build_that_fails_leaves_neither_a_folder_nor_a_lock(
    trained: TrainResult, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "s.safetensors"
    with pytest.raises(CovcliError, match="too few"):
        build_signature(
            SignatureConfig(trained.checkpoint, "src", alpha=1e-6, output=path), Silent()
        )
    assert list(tmp_path.iterdir()) == []
