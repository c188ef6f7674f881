"""Explanations, against figures that are recomputed by hand from hooked layers."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PLUGIN
from pydantic import TypeAdapter
from test_cli import call

import covcli
from covcli.core.errors import CovcliError
from covcli.core.files import plain
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.evaluation.explain import CHANNELS, POINTS, explain, heat_map
from covcli.methods import SingleRange, State
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier
from covcli.models.pooling import locate, pool
from covcli.reporting import tables
from covcli.reporting.documents import Explanation
from covcli.reporting.pictures import explanation_picture
from covcli.reporting.report import read, report
from covcli.reporting.sections import SECTIONS
from covcli.reporting.terminal import show_evaluation
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureConfig, SignatureResult, build_signature
from covcli.signature.combination import COLUMNS
from covcli.signature.judge import Judge
from covcli.signature.signature import Signature
from covcli.training.train import TrainResult


def outputs_of(model: Classifier, images: ImageSet) -> tuple[list[np.ndarray], np.ndarray]:
    """Return each coverage layer's whole output, hooked by hand, and the logits."""
    seen: list[np.ndarray] = []
    layers = [m for m in model.modules() if isinstance(m, covcli.CoverageLayer)]
    handles = [
        m.register_forward_hook(lambda _m, _i, out: seen.append(out.numpy().copy())) for m in layers
    ]
    pixels = images.batch(torch.arange(len(images)), model.spec.shape).float() / 255
    with torch.no_grad():
        logits = model(pixels).numpy()
    for handle in handles:
        handle.remove()
    return seen, logits


def named_value(label: str, output: np.ndarray) -> float:
    """Compute what a label says, from one image's output of the layer."""
    numbers = [int(n) for n in re.findall(r"\d+", label)]
    if label.startswith("unit"):
        return float(output[numbers[0]])
    if " at (" in label:
        return float(output[tuple(numbers)])
    whole = {"mean": np.mean, "maximum": np.max, "": np.sum}[label.partition(", ")[2]]
    return float(whole(output[numbers[0]]))


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5,), 1), ((3, 4, 2), 1), ((4, 2, 3), -1), ((4, 2, 3), 3), ((6, 5), -1), ((6, 5), 1)],
)
@pytest.mark.parametrize("granularity", ["channel", "unit", "contribution"])
def test_labels_say_what_a_neuron_is(shape: tuple[int, ...], dim: int, granularity: str) -> None:
    output = torch.randn(2, *shape, generator=torch.Generator().manual_seed(len(shape)))
    neurons = pool(output, dim, granularity)[1].numpy()
    channels_first = output[1].movedim(dim % (len(shape) + 1) - 1, 0).numpy()
    labels = set()
    for j, value in enumerate(neurons):
        channel, label = locate(j, shape, dim, granularity)
        assert named_value(label, channels_first) == pytest.approx(value, rel=1e-6)
        assert int(re.findall(r"\d+", label)[0]) == channel
        labels.add(label)
    assert len(labels) == len(neurons)


def check_naively(
    explanations: list[Explanation], judge: Judge, outputs: list[np.ndarray], logits: np.ndarray
) -> None:
    signature, calibration = judge.signature, judge.calibration
    parts = [
        torch.from_numpy(o).movedim(1, -1) if o.ndim == 2 or signature.granularity == "unit"
        else torch.cat([torch.from_numpy(o.mean((2, 3))), torch.from_numpy(o.max((2, 3)))], 1)
        for o in outputs
    ]  # fmt: skip
    parts = [part.flatten(1) for part in parts]
    classes = torch.from_numpy(logits.argmax(1))
    costs = signature.scorer.costs(torch.cat(parts, 1), classes)
    sizes = np.array([part.shape[1] for part in parts])
    begins = np.concatenate([[0], sizes.cumsum()])
    for e in explanations:
        k = int(classes[e.row])
        assert e.predicted == signature.classes[k]
        cost = [c.double().mean().item() for c in costs[e.row].split(sizes.tolist())]
        scales = calibration.combination
        z = (np.log(cost + 1 / sizes) - scales.center.numpy()) / scales.scale.numpy()
        share = np.exp(z / COLUMNS) / np.exp(z / COLUMNS).sum()
        ranking = np.argsort(-share, kind="stable")
        names = [signature.points[j].name for j in ranking]
        assert [p.name for p in e.points] == names
        np.testing.assert_allclose([p.z for p in e.points], z[ranking], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose([p.share for p in e.points], share[ranking], rtol=1e-3)
        assert sum(p.share for p in e.points) == pytest.approx(1)
        score = COLUMNS * np.log(np.exp(z / COLUMNS).mean()) - scales.floor
        assert e.score == pytest.approx(score, abs=1e-3)
        ranked = calibration.scores.numpy()
        assert e.p_value == (1 + (ranked >= e.score).sum()) / (len(ranked) + 1)
        assert e.untrusted == (e.p_value <= 0.05)
        for rank, (j, point) in enumerate(zip(ranking, e.points, strict=True)):
            own = slice(begins[j], begins[j + 1])
            low, high = (signature.state[end][k, own].double().numpy() for end in ("low", "high"))
            values = parts[j][e.row].double().numpy()
            excess = np.maximum(low - values, values - high)
            ends = torch.cat([signature.state[end][:, own] for end in ("low", "high")]).abs()
            reach = 1e-5 * float(ends[ends.isfinite()].max())  # of rounding
            assert point.left == pytest.approx((excess > reach).sum(), abs=1)  # last bits differ
            assert point.coverage == 1 - point.left / sizes[j]
            if rank >= POINTS:
                assert point.channels == []
                continue
            assert len(point.channels) == min(CHANNELS, point.left)
            width = np.where(high > low, high - low, 0)
            widths = np.divide(excess, width, out=np.full_like(width, np.inf), where=width > 0)
            widths[excess <= reach] = 0
            worst = np.sort(widths)[::-1][: len(point.channels)]  # a range method's costs are equal
            np.testing.assert_allclose([c.outside_by for c in point.channels], worst, rtol=1e-3)
            for c in point.channels:
                assert c.value == pytest.approx(values[c.neuron], rel=1e-4)
                assert c.value == pytest.approx(named_value(c.label, outputs[j][e.row]), rel=1e-4)
                assert c.label.startswith((f"channel {c.channel}", f"unit {c.channel}"))
                assert (c.low, c.high) == (low[c.neuron], high[c.neuron])
                assert not c.low <= c.value <= c.high


@pytest.mark.parametrize(("method", "granularity"), [("mrc", "channel"), ("src", "unit")])
def test_explanations_are_the_naive_ones(
    trained: TrainResult, tmp_path: Path, method: str, granularity: str
) -> None:
    path = tmp_path / "s"
    build_signature(
        SignatureConfig(trained.checkpoint, method, granularity=granularity, output=path), Silent()
    )
    signature, calibration, _ = signatures.load(path)
    model = checkpoints.load(trained.checkpoint).model
    images = datasets.load("photos?limit=40", "test")
    rows = [39, *range(0, 35, 5)]
    judge = Judge.of(model, signature, calibration)
    explanations = explain(judge, images, rows)
    assert [e.row for e in explanations] == rows
    outputs, logits = outputs_of(model, images)
    check_naively(explanations, judge, outputs, logits)
    assert {p.name for e in explanations for p in e.points if p.channels} == {
        p.name for p in signature.points
    }
    for e in explanations:
        heat = heat_map(judge, images, e)
        listed = {p.name: p.channels for p in e.points if p.channels and p.name != "head.2"}
        assert e.mapped == next(iter(listed), None)
        assert heat is not None
        output = outputs[[p.name for p in signature.points].index(e.mapped or "")]
        np.testing.assert_allclose(heat, output[e.row, listed[e.mapped][0].channel], atol=1e-4)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


def with_ranges(signature: Signature, low: float, high: float) -> Signature:
    """Return a single-range signature whose every range is the same."""
    shape = signature.state["low"].shape
    state = State(signature.layout)
    state.declare("low", torch.full(shape, low), "min")
    state.declare("high", torch.full(shape, high), "max")
    return replace(signature, method=SingleRange(), state=state)


def test_where_nothing_left_its_range_nothing_is_listed_and_it_says_so(
    run: Path, signed: SignatureResult, capsys: pytest.CaptureFixture[str]
) -> None:
    signature, calibration, _ = signatures.load(signed.path)
    model = checkpoints.load(run / "checkpoint.pt").model
    images = datasets.load("digits?limit=20", "test")
    wide = with_ranges(signature, -1e9, 1e9)
    judge = Judge.of(model, wide, calibration)
    (e,) = explain(judge, images, [7])
    assert e.label == str(int(images.known_labels()[7]))
    assert [(p.coverage, p.left, p.channels) for p in e.points] == [(1.0, 0, [])] * 3
    assert sum(p.share for p in e.points) == pytest.approx(1)
    assert heat_map(judge, images, e) is None
    result = evaluate(EvaluationConfig(("noise:uniform?limit=9",), runs=run.parent), Silent())
    show_evaluation(replace(result, explanations=[e]))
    out = capsys.readouterr().out
    assert "digits?limit=20, image 7: predicted" in out
    assert "no neuron of its main coverage points left its range" in out
    drawn = explanation_picture(e, [p.name for p in signature.points])
    texts = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert texts == ["no neuron of these points left its range"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-np.inf, 0.0)])
def test_a_range_without_a_width_to_measure_by_orders_by_distance(
    signed: SignatureResult, low: float, high: float
) -> None:
    signature, calibration, _ = signatures.load(signed.path)
    model = checkpoints.load(signed.path.parent / "checkpoint.pt").model
    images = datasets.load("photos?limit=10", "test")
    (e,) = explain(Judge.of(model, with_ranges(signature, low, high), calibration), images, [3])
    outputs, _ = outputs_of(model, images)
    for point in e.points:
        output = outputs[[p.name for p in signature.points].index(point.name)][3]
        values = output if output.ndim == 1 else np.stack([output.mean((1, 2)), output.max((1, 2))])
        largest = np.sort(values.ravel())[::-1][:CHANNELS]
        np.testing.assert_allclose([c.value for c in point.channels], largest, rtol=1e-4)
        assert all(c.outside_by == np.inf for c in point.channels)
    document = json.loads(json.dumps(plain(asdict(e)), allow_nan=False))
    assert document["points"][0]["channels"][0]["outside_by"] is None
    assert TypeAdapter(Explanation).validate_python(document) == e
    listed = tables.left_channels(e)
    assert listed is not None
    assert {row[3] for row in listed.rows} == {"always 0" if low == high else "no end to 0"}
    assert {row[4] for row in listed.rows} == {"–"}
    explanation_picture(e, [p.name for p in signature.points])  # arrows, not marks at infinity


@pytest.mark.usefixtures("foolbox")
def test_evaluate_explains_the_most_suspicious_of_each_set(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["photos?limit=60", "noise:uniform?limit=1", "attack:fgsm?limit=20&eps=0.3"]
    arguments = [word for name in sets for word in ("--untrusted", name)]
    common = ["evaluate", "--runs", str(run.parent), "--plugin", str(PLUGIN), *arguments]
    code, out, _ = call(capsys, *common, "--explain", "2")
    assert code == 0
    document = json.loads((run / "evaluation.json").read_text())
    table = pd.read_csv(run / "scores.csv.gz")
    explained = document["explanations"]
    assert [e["set"] for e in explained] == [
        *["trusted"] * 2, *[sets[0]] * 2, sets[1], *[sets[2]] * 2
    ]  # fmt: skip
    for name in ("trusted", *sets):
        rows = [e["row"] for e in explained if e["set"] == name]
        own = table[table["set"] == name].sort_values("score", ascending=False, kind="stable")
        assert rows == own["index"].tolist()[: len(rows)]
    assert out.count(" of the score (z = ") == sum(
        bool(p["channels"]) for e in explained for p in e["points"]
    )
    results = read(run)
    photos = datasets.load(sets[0], "test")
    for k, e in enumerate(explained):
        row = table[(table["set"] == e["set"]) & (table["index"] == e["row"])].iloc[0]
        assert e["score"] == pytest.approx(row["score"], abs=1e-3)
        assert (e["predicted"], e["untrusted"]) == (str(row["predicted"]), bool(row["untrusted"]))
        names = photos.classes if e["set"] == sets[0] else [str(n) for n in range(10)]
        assert e["label"] == (None if row["label"] < 0 else names[row["label"]])
        assert results.samples.explained[k].image.shape == (3, 32, 32)
        assert results.samples.explained[k].fires.shape in ((16, 16), (8, 8))
        if e["set"] == sets[0]:
            pixels = photos.batch(torch.tensor([e["row"]]), (3, 32, 32))[0].numpy()
            np.testing.assert_array_equal(results.samples.explained[k].image, pixels)
    written = report(run)
    assert {f"explanation-{k}.png" for k in range(7)} <= {f.name for f in written.figures}
    assert "Why images were flagged" in written.html.read_text()

    code, out, _ = call(capsys, *common, "--output", str(tmp_path / "none"))
    assert (code, "of the score (z" in out) == (0, False)
    assert json.loads((tmp_path / "none" / "evaluation.json").read_text())["explanations"] == []
    none = read(tmp_path / "none")
    assert none.samples.explained == []
    assert SECTIONS.get("explanations")(none) is None
    path = tmp_path / "none" / "evaluation.json"
    older = {k: v for k, v in json.loads(path.read_text()).items() if k != "explanations"}
    path.write_text(json.dumps(older))
    assert SECTIONS.get("explanations")(read(path.parent)) is None


def test_a_negative_number_of_explanations_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CovcliError, match="--explain -1"):
        evaluate(EvaluationConfig(("photos",), runs=run.parent, explain=-1), Silent())
    code, _, err = call(capsys, "evaluate", "--untrusted", "photos", "--explain", "-1")
    assert (code, "--explain" in err) == (2, True)
