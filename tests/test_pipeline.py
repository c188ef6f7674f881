"""Training, signatures, evaluation and the monitor, on a small network and real images."""

import copy
import dataclasses
import gc
import gzip
import json
import pickle
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config

import covcli
from covcli import checkpoint as checkpoints
from covcli import data, engine, fitting, runtime, signature
from covcli.activations import Recorder
from covcli.calibration import softmax_score
from covcli.errors import CovcliError
from covcli.evaluation import EvaluationConfig, evaluate
from covcli.fitting import choose_trusted
from covcli.gates import check, check_names, junit, parse_gate, read_baseline, summary
from covcli.images import in_memory
from covcli.monitor import Monitor
from covcli.progress import Silent
from covcli.reporting import report
from covcli.sections import SECTIONS
from covcli.signing import SignatureConfig, SignatureResult, build_signature
from covcli.training import TrainResult, split_rows, train

UNTRUSTED = ("photos?limit=200", "noise:uniform?limit=100", "attack:fgsm?limit=60&eps=0.3")


def neurons_of(path: Path, images: data.ImageSet) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Run a network by plain PyTorch, hooking its coverage layers by hand."""
    model = checkpoints.load(path).model
    seen: list[torch.Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, covcli.CoverageLayer)]
    for layer in layers:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    pixels = images.batch(torch.arange(len(images)), model.spec.shape).float() / 255
    with torch.no_grad():
        logits = model(pixels)
    parts = [torch.cat([s.mean((2, 3)), s.amax((2, 3))], 1) if s.ndim == 4 else s for s in seen]
    return torch.cat(parts, 1).numpy(), logits.numpy(), [p.shape[1] for p in parts]


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
    held_out = data.load("digits", "train").select(saved.calibration_rows)
    _, logits, _ = neurons_of(trained.checkpoint, held_out)
    accuracy = np.mean(logits.argmax(1) == held_out.known_labels().numpy())
    assert trained.epochs[-1].held_out_accuracy == pytest.approx(accuracy, abs=1e-9)


def test_the_calibration_split_is_apart_whole_and_seeded() -> None:
    training, held_out = split_rows(103, 0.25, 5)
    assert len(held_out) == 26
    assert sorted([*training.tolist(), *held_out.tolist()]) == list(range(103))
    assert torch.equal(split_rows(103, 0.25, 5)[1], held_out)
    assert not torch.equal(split_rows(103, 0.25, 6)[1], held_out)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        runtime.configure(3, 0)
        config = tiny_config(
            tmp_path, name=name, epochs=3, seed=3, augment="crop-flip", untrusted=("attack:pgd",)
        )
        result = train(config, Silent())
        signed = build_signature(SignatureConfig(result.checkpoint), Silent())
        made.append((checkpoints.load(result.checkpoint), signature.load(signed.path)))
    (first, signed_first), (second, signed_second) = made
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


@pytest.mark.parametrize("method", ["src", "mrc", "mrc?sections=4&cost=share"])
def test_a_built_signature_is_the_naive_one(
    trained: TrainResult, tmp_path: Path, method: str
) -> None:
    path = tmp_path / "s.safetensors"
    result = build_signature(
        SignatureConfig(trained.checkpoint, method, output=path, confidence_threshold=0.3), Silent()
    )
    made, _, record = signature.load(path)
    rows, held_out = split_rows(1437, 0.25, 0)
    images = data.load("digits", "train").select(rows)
    neurons, logits, sizes = neurons_of(trained.checkpoint, images)
    labels = images.known_labels().numpy()
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = (logits.argmax(1) == labels) & (chance.max(1) >= 0.3)
    for k in range(10):
        mine = neurons[chosen & (labels == k)]
        assert result.trusted[str(k)] == len(mine) >= 10
        np.testing.assert_allclose(made.state["low"][k], mine.min(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made.state["high"][k], mine.max(0), rtol=1e-4, atol=1e-5)
        if method != "src":
            assert int(made.state["sections"][k].sum()) == len(mine) * sum(sizes)
    assert made.sizes == sizes
    assert record["calibration_rows"] == held_out.tolist()
    assert result.accuracy == pytest.approx(np.mean(logits.argmax(1) == labels))


def test_recomputed_passes_and_spilled_ones_give_the_same_signature(
    trained: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "spilled", tmp_path / "again"]
    for path, budget in zip(paths, (fitting.SPILL_BYTES, 0), strict=True):
        monkeypatch.setattr(fitting, "SPILL_BYTES", budget)
        build_signature(SignatureConfig(trained.checkpoint, "mrc", output=path), Silent())
    first, second = (signature.load(path)[0].state.tensors for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_units_are_an_option(trained: TrainResult, tmp_path: Path) -> None:
    path = tmp_path / "unit"
    config = SignatureConfig(trained.checkpoint, "mrc", granularity="unit", output=path)
    build_signature(config, Silent())
    made, calibration, _ = signature.load(path)
    assert made.sizes == [8 * 16 * 16, 16 * 8 * 8, 32]
    monitor = Monitor(checkpoints.load(trained.checkpoint).model, made, calibration)
    noise = data.load("noise:uniform", "test").batch(torch.arange(50), (3, 32, 32))
    assert bool(monitor(noise).untrusted.float().mean() > 0.9)


def test_a_class_with_few_confident_images_takes_all_correct_ones() -> None:
    labels = torch.tensor([0] * 12 + [1] * 12 + [2] * 3)
    predicted = labels.clone()
    predicted[[0, 12]] = 2  # one mistake in each of the first two classes
    confidence = torch.full((27,), 0.95)
    confidence[14:24] = 0.5
    found = choose_trusted(labels, predicted, confidence, 0.9, 4)
    assert found.counts == [11, 11, 3, 0]
    assert found.relaxed == [1]


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
    with pytest.raises(CovcliError, match="leaves no image"):
        build_signature(again, Silent())


def test_a_signature_comes_back_whole(signed: SignatureResult, tmp_path: Path) -> None:
    made, calibration, record = signature.load(signed.path)
    signature.save(tmp_path / "again", made, calibration, record)
    assert (tmp_path / "again").read_bytes() == signed.path.read_bytes()
    broken = [
        dataclasses.replace(made, granularity="pixel"),  # type: ignore[arg-type]
        dataclasses.replace(made, classes=made.classes[:-1]),
        dataclasses.replace(made, points=made.points[:-1]),
        dataclasses.replace(made, model=dataclasses.replace(made.model, classes=9)),
    ]
    for wrong in broken:
        signature.save(tmp_path / "wrong", wrong, calibration, record)
        with pytest.raises(CovcliError, match="does not hold together"):
            signature.load(tmp_path / "wrong")
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
        signature.save(tmp_path / "wrong", made, other, record)
        with pytest.raises(CovcliError, match="does not hold together"):
            signature.load(tmp_path / "wrong")


@pytest.fixture
def evaluated(run: Path) -> Path:
    evaluate(
        EvaluationConfig(UNTRUSTED, runs=run.parent, baselines=("energy",), explain=1), Silent()
    )
    return run


def test_evaluation_agrees_with_the_monitor_and_with_plain_figures(evaluated: Path) -> None:
    from sklearn.metrics import roc_auc_score

    document = json.loads((evaluated / "evaluation.json").read_text())
    table = pd.read_csv(evaluated / "scores.csv.gz")
    monitor = Monitor.load(
        evaluated / "checkpoint.pt", evaluated / "signature-mrc.safetensors", alpha=0.05
    )
    digits = data.load("digits", "test")
    verdicts = monitor(digits.batch(torch.arange(len(digits)), (3, 32, 32)))
    mine = table[table["set"] == "trusted"]
    np.testing.assert_allclose(mine["score"], verdicts.score, rtol=1e-4)
    np.testing.assert_array_equal(mine["predicted"], verdicts.predicted)
    np.testing.assert_array_equal(mine["untrusted"].astype(bool), verdicts.untrusted)
    np.testing.assert_allclose(mine["confidence"], verdicts.confidence, rtol=1e-4)
    trusted = document["trusted"]
    assert trusted["accuracy"] == pytest.approx((mine["label"] == mine["predicted"]).mean())
    assert trusted["false_alarm_rate"]["value"] == pytest.approx(mine["untrusted"].mean())
    assert [entry["name"] for entry in document["untrusted"]] == list(UNTRUSTED)
    for entry in document["untrusted"]:
        other = table[table["set"] == entry["name"]]
        assert len(other) == entry["images"]
        truth = [0] * len(mine) + [1] * len(other)
        for name, column, sign in (("coverage", "score", 1), ("softmax", "softmax_confidence", -1)):
            scores = sign * pd.concat([mine[column], other[column]])
            found = entry["scores"][name]
            assert found["auroc"]["value"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)
            assert found.keys() == {"auroc", "aupr_out", "aupr_in", "fpr95", "detection_rate"}
        rate = entry["scores"]["coverage"]["detection_rate"]["value"]
        assert rate == pytest.approx(other["untrusted"].mean())
    assert document["untrusted"][0]["scores"]["coverage"]["auroc"]["value"] > 0.95
    attacked = table[table["set"] == UNTRUSTED[2]]
    np.testing.assert_array_equal(attacked["label"], mine["label"][:60])
    assert document["untrusted"][0]["deceived"] is None
    before = (mine["label"] == mine["predicted"]).to_numpy()[:60]
    hits = before & (attacked["label"] != attacked["predicted"]).to_numpy()
    assert document["untrusted"][2]["success_rate"]["value"] == pytest.approx(hits[before].mean())
    deceived = document["untrusted"][2]["deceived"]
    assert (deceived["images"], deceived["already_wrong"]) == (hits.sum(), (~before).sum())
    assert 10 <= hits.sum() < 60
    truth = [0] * len(mine) + [1] * int(hits.sum())
    for name, column, sign in (("coverage", "score", 1), ("softmax", "softmax_confidence", -1)):
        found = deceived["scores"][name]["auroc"]["value"]
        scores = sign * pd.concat([mine[column], attacked[column][hits]])
        assert found == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)
        wrong = mine["label"] != mine["predicted"]
        found = trusted["errors"][name]["auroc"]["value"]
        assert found == pytest.approx(roc_auc_score(wrong, sign * mine[column]), abs=1e-6)
    assert [p["name"] for p in document["points"]] == ["first.2", "second.2", "head.2"]
    assert set(document["points"][0]["coverage"]) == {"trusted", *UNTRUSTED}
    assert {b["confidence"] for b in document["confidence_bins"]} == {"coverage", "softmax"}


def test_coverage_by_point_is_the_share_of_neurons_in_range(evaluated: Path) -> None:
    document = json.loads((evaluated / "evaluation.json").read_text())
    made, _, _ = signature.load(evaluated / "signature-mrc.safetensors")
    photos = data.load("photos?limit=200", "test")
    neurons, logits, sizes = neurons_of(evaluated / "checkpoint.pt", photos)
    k = logits.argmax(1)
    low, high = made.state["low"].numpy()[k], made.state["high"].numpy()[k]
    inside = (neurons >= low) & (neurons <= high)
    starts = np.cumsum([0, *sizes])
    for i, point in enumerate(document["points"]):
        expected = inside[:, starts[i] : starts[i + 1]].mean()
        assert point["coverage"]["photos?limit=200"] == pytest.approx(expected, abs=1e-3)


def test_evaluation_leaves_calibration_images_out_and_warns(run: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(
        ("photos?limit=20",), runs=run.parent, trusted="digits?split=train", output=tmp_path / "x"
    )
    result = evaluate(config, Silent())
    assert result.trusted.images == 1437 - 359
    assert len(result.warnings) == 2
    with pytest.raises(CovcliError, match="exists"):
        evaluate(config, Silent())
    with pytest.raises(CovcliError, match="twice"):
        evaluate(dataclasses.replace(config, untrusted=("photos", "photos")), Silent())


def test_gates_name_every_set_that_falls_short(evaluated: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(
        ("noise:uniform?limit=50", "attack:fgsm?limit=40&eps=1/255"), runs=evaluated.parent,
        output=tmp_path,
    )  # fmt: skip
    result = evaluate(config, Silent())
    weak = "attack:fgsm?limit=40&eps=1/255"
    texts = ("auroc=0.9", f"{weak}:fpr95=0.02", "accuracy=0.5", "false_alarm_rate=1")
    checks = check(result, [parse_gate(text) for text in texts])
    assert len(checks) == 5
    assert [(c.gate.metric, c.name) for c in checks if not c.passed] == [
        ("auroc", weak), ("fpr95", weak)
    ]  # fmt: skip
    suite = ET.fromstring(junit(checks))
    assert (suite.get("tests"), suite.get("failures")) == ("5", "2")
    assert len(suite.findall("testcase/failure")) == 2
    text = summary(result, checks)
    assert text.count("- gate passed") == 3
    assert "| noise:uniform?limit=50 | " in text
    for bad in ("auroc", "auroc=x", "auroc=2", "auroc=0", "auc=0.5", "=1"):
        with pytest.raises(CovcliError):
            parse_gate(bad)
    with pytest.raises(CovcliError, match="not evaluated"):
        check_names([parse_gate("mnist:auroc=0.5")], config.untrusted)


def test_a_regression_against_an_earlier_evaluation_is_a_failed_gate(
    evaluated: Path, tmp_path: Path
) -> None:
    path = evaluated / "evaluation.json"
    result = evaluate(
        EvaluationConfig(UNTRUSTED[:2], runs=evaluated.parent, output=tmp_path / "o"), Silent()
    )
    assert all(c.passed for c in check(result, read_baseline(path, 0.0, UNTRUSTED[:2])))
    document = json.loads(path.read_text())
    document["untrusted"][0]["scores"]["coverage"]["fpr95"]["value"] = -0.5
    path.write_text(json.dumps(document))
    checks = check(result, read_baseline(path, 0.1, UNTRUSTED[:2]))
    failed = [(c.name, c.gate.metric) for c in checks if not c.passed]
    assert failed == [(UNTRUSTED[0], "fpr95")]
    with pytest.raises(CovcliError, match="shares no untrusted set"):
        read_baseline(path, 0.1, ("mnist",))
    path.write_text('{"untrusted": [3]}')
    with pytest.raises(CovcliError, match="is not an evaluation"):
        read_baseline(path, 0.1, UNTRUSTED)


@pytest.mark.parametrize("name", list(SECTIONS))
def test_every_report_section_keeps_the_contract(name: str, evaluated: Path) -> None:
    from covcli.reporting import read

    section = SECTIONS.get(name)(read(evaluated))
    assert section is not None
    assert section.title
    assert section.blocks


def test_reports_are_self_contained_and_escape_what_they_show(evaluated: Path) -> None:
    path = evaluated / "evaluation.json"
    text = path.read_text().replace("photos?limit=200", "<script>$x_1</script>")
    path.write_text(text.replace("first.2", "\\u001b[31m<i>first"))
    scores = evaluated / "scores.csv.gz"
    table = gzip.decompress(scores.read_bytes()).decode()
    scores.write_bytes(
        gzip.compress(table.replace("photos?limit=200", "<script>$x_1</script>").encode())
    )
    result = report(evaluated)
    page = result.html.read_text()
    for raw in ("<script", "<i>", "\x1b", "http"):
        assert raw not in page
    assert page.count("data:image/png;base64,") == len(result.figures) >= 7
    markdown = result.markdown.read_text()
    assert "<script" not in markdown
    for figure in result.figures:
        assert f"(figures/{figure.name})" in markdown
        assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CovcliError, match="exists"):
        report(evaluated)
    report(evaluated, force=True)


def test_the_monitor_takes_bytes_of_any_size_and_floats_of_its_own(run: Path) -> None:
    monitor = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors", alpha=0.1)
    digits = data.load("digits?limit=40", "test")
    small = digits.source.read(digits.rows, (1, 8, 8))
    adapted = digits.batch(torch.arange(40), (3, 32, 32))
    verdicts = [monitor(small), monitor(adapted), monitor(adapted.float() / 255)]
    for other in verdicts[1:]:
        assert torch.equal(verdicts[0].score, other.score)
    found = verdicts[0]
    assert torch.equal(found.untrusted, found.p_value <= 0.1)
    assert torch.equal(found.untrusted, found.confidence < 0.5)
    for wrong in (torch.zeros(3, 32, 32), torch.zeros(0, 3, 32, 32), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(CovcliError, match="Monitor"):
            monitor(wrong)
    with pytest.raises(CovcliError, match="NaN"):
        monitor(torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(CovcliError, match="too few"):
        Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors", alpha=0.001)


def test_a_crafted_signature_or_checkpoint_is_refused(run: Path) -> None:
    """Files whose digests are right, but whose content no program of ours would write."""
    path = run / "signature-mrc.safetensors"
    made, calibration, record = signature.load(path)
    for changes in (
        {"trusted": 3}, {"calibration": {"spec": "digits"}}, {"calibration_rows": "all"},
        {"calibration_rows": [[1]]},
    ):  # fmt: skip
        signature.save(path, made, calibration, {**record, **changes})
        with pytest.raises(CovcliError, match="does not hold together"):
            signature.load(path)
    first = dataclasses.replace(made.points[0], module="os", channel_dim=77)
    crafted = dataclasses.replace(made, points=(first, *made.points[1:]))
    signature.save(path, crafted, calibration, record)
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


def test_activations_that_are_not_finite_are_named(trained: TrainResult) -> None:
    model = checkpoints.load(trained.checkpoint).model
    points = model.points("channel")
    with torch.no_grad():
        model.network.second[0].weight.fill_(3e38)
    images = in_memory("x", torch.full((2, 3, 32, 32), 255, dtype=torch.uint8), None)
    with pytest.raises(CovcliError, match=r"'second\.2' are NaN or infinite"):
        list(engine.sweep(model, images, points, "channel", Silent(), ""))


def test_large_activations_whose_sum_overflows_are_finite(trained: TrainResult) -> None:
    model = checkpoints.load(trained.checkpoint).model.eval()
    images = torch.zeros(2, *model.spec.shape)
    point, *_ = model.points("channel")
    large = torch.full((2, point.neurons), 3e38)
    recorder = Recorder(model.network, [point], "channel")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), recorder:
        patch.setattr(recorder, "take", lambda _logits: large)
        assert engine.forward(model, recorder, images)[1] is large


def test_a_monitors_hooks_are_silent_between_calls_and_leave_with_it(run: Path) -> None:
    monitor = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors")
    model, images = monitor.model, torch.zeros(2, *monitor.model.spec.shape)
    verdicts = monitor(images)
    with torch.inference_mode():
        logits = model(images)
    assert torch.equal(logits, verdicts.logits)
    assert torch.equal(monitor(images).score, verdicts.score)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(images), logits)
    hooks = [module._forward_hooks for module in model.modules()]
    assert any(hooks)
    del monitor
    gc.collect()
    assert not any(hooks)


def test_bare_weights_get_a_run_of_their_own(trained: TrainResult, tmp_path: Path) -> None:
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
    _, calibration, _ = signature.load(run / "signature-mrc.safetensors")
    saved = checkpoints.load(trained.checkpoint)
    held_out = data.load("digits", "train").select(saved.calibration_rows)
    _, logits, _ = neurons_of(trained.checkpoint, held_out)
    expected = softmax_score(torch.from_numpy(logits))[torch.arange(len(held_out)) % 4 != 0]
    found, classes = calibration.softmax.sort().values, calibration.predicted
    np.testing.assert_allclose(found, expected.sort().values, rtol=1e-3, atol=1e-7)
    ranked = logits.argmax(1)[np.arange(len(held_out)) % 4 != 0]
    np.testing.assert_array_equal(classes.bincount(), np.bincount(ranked, minlength=10))


def test_results_name_what_they_were_made_of(evaluated: Path, signed: SignatureResult) -> None:
    document = json.loads((evaluated / "evaluation.json").read_text())
    log = json.loads(next(evaluated.glob("training_results_*.json")).read_text())
    digits = data.load("digits", "train").fingerprint
    assert log["data"]["images"] == digits
    assert log["checkpoint_fingerprint"] == signed.checkpoint_fingerprint
    assert document["signature"]["checkpoint_fingerprint"] == signed.checkpoint_fingerprint
    assert document["signature"]["signature_fingerprint"] == signed.signature_fingerprint
    assert document["signature"]["trusted"]["images"] == signed.data.images
    assert document["signature"]["calibration"]["images"] == signed.calibration_data.images
    assert document["trusted"]["fingerprint"] == data.load("digits", "test").fingerprint
    for entry in document["untrusted"][:2]:
        assert entry["fingerprint"] == data.load(entry["name"], "test").fingerprint


def test_another_number_of_threads_changes_the_last_bits_only(run: Path) -> None:
    monitor = Monitor.load(run / "checkpoint.pt", run / "signature-mrc.safetensors")
    digits = data.load("digits", "test")
    images = digits.batch(torch.arange(len(digits)), (3, 32, 32))
    before = torch.get_num_threads()
    try:
        scores = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scores.append(monitor(images).score.numpy())
    finally:
        torch.set_num_threads(before)
    for other in scores[1:]:
        np.testing.assert_allclose(scores[0], other, rtol=0, atol=0.05)
        assert np.median(np.abs(scores[0] - other)) < 1e-5


def test_hooks_do_not_change_the_answer(trained: TrainResult) -> None:
    model = checkpoints.load(trained.checkpoint).model
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        bare = model(images)
        with Recorder(model.network, model.points("channel"), "channel") as recorder:
            watched = model(images)
            recorder.take(torch.empty(0))
    assert torch.equal(bare, watched)
