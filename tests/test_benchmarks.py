"""The benchmarks of time and memory: what they compare is the same, and each prints its figures."""

import importlib
import json
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats

from covcli.models import architectures
from covcli.models.architectures import Classifier, ModelSpec
from covcli.models.points import Recorder

FOLDER = Path(__file__).parents[1] / "benchmarks"
PLUGIN = Path(__file__).parent / "tiny_vgg.py"


@pytest.fixture(scope="module", autouse=True)
def _tiny_vgg() -> None:
    runpy.run_path(str(PLUGIN))


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *options: str
) -> dict[str, float]:
    """Run a benchmark as a script, and return the ratios of the one document that it prints."""
    script = str(FOLDER / f"{name}.py")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delenv("COVCLI_DATA_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", [script, "--quick", "--json", "--model", "tiny-vgg",
                                       "--plugin", str(PLUGIN), *options])  # fmt: skip
    runpy.run_path(script, run_name="__main__")
    document = json.loads(capsys.readouterr().out)
    ratios = document["ratios"]
    assert ratios.keys() == document["spread"].keys()
    assert all(math.isfinite(value) and value > 0 for value in ratios.values())
    return dict(ratios)


def test_overhead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = printed(monkeypatch, capsys, "overhead")
    batches = ("batch_64", "batch_1")
    watched = ("", "_src", "_mrc", "_src_unit", "_mrc_unit")
    peers = ("gram", "nacue", "multimahalanobis", "multimahalanobis_one_pass", "knn")
    expected = {f"monitor_{b}{name}" for b in batches for name in watched}
    expected |= {f"predict_{b}_{peer}" for b in batches for peer in peers}
    expected |= {f"peers_over_ours_{b}_{peer}" for b in batches for peer in peers}
    expected |= {f"bare_again_{b}" for b in batches}
    assert output.keys() == expected | {"confidence_loss_step", "build", "build_trusted_only"}


def test_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    script = str(FOLDER / "export.py")
    monkeypatch.syspath_prepend(FOLDER)
    options = ["--quick", "--json", "--networks", "tiny-vgg", "--plugin", str(PLUGIN)]
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(script, run_name="__main__")
    out, err = capsys.readouterr()
    assert json.loads(out)["found"], err
    [found] = json.loads(out)["found"]
    expected = {f"{kind}batch_{n}" for kind in ("", "eager_", "again_") for n in (1, 4)}
    assert found["ratios"].keys() == expected
    assert found["verification"]["images"] == 256
    assert found["megabytes"] > found["bare_megabytes"] > 0


def test_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = printed(monkeypatch, capsys, "build", "--no-memory")
    peers = ("gram", "nacue", "multimahalanobis", "knn")
    expected = {f"build_{method}_{n}" for method in ("src", "ensemble") for n in (20, 40)}
    expected |= {f"fit_{peer}{what}" for peer in peers for what in ("", "_over_ours")}
    assert output.keys() == expected


def test_memory_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--no-peers --methods ensemble --images 20 --peer-images 20 "
               "--memory-images 20")  # fmt: skip
    output = printed(monkeypatch, capsys, "build", *options.split())
    assert output.keys() >= {"memory_ensemble_20", "memory_20_over_20"}


def test_pipeline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = printed(monkeypatch, capsys, "pipeline")
    epochs = {f"epoch_{s}{how}" for s in ("memory", "npz") for how in ("", "_augmented")}
    folder = {"throughput", "throughput_as_covcli", "listing", "fingerprint_first",
              "fingerprint_again"}  # fmt: skip
    folder = {f"folder_{name}" for name in folder}
    assert output.keys() == epochs | folder | {"engine_alone", "plain_again", "npz_load"}


def test_scale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--images 20 --networks tiny-vgg tiny-vgg/unit --sections 5 20"
    output = printed(monkeypatch, capsys, "scale", *options.split())
    tables = ("images", "neurons", "classes", "sections")
    expected = {f"{table}_growth_{what}" for table in tables for what in ("build", "memory")}
    expected |= {f"{table}_growth_scoring" for table in tables[1:]}
    assert output.keys() >= expected
    # Two ends a neuron: of every unit, or of each channel's mean and maximum.
    units, channels = 8 * 64 + 512 * 4 + 1024, 2 * 8 + 2 * 512 + 1024
    assert output["neurons_growth_memory"] == pytest.approx(units / channels, rel=1e-3)
    # Beside the ends, a count for each of 20 or of 5 sections.
    assert output["sections_growth_memory"] == pytest.approx((2 + 20) / (2 + 5), rel=1e-2)


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


def network() -> Classifier:
    mean, deviation = architectures.architecture("tiny-vgg").statistics
    return architectures.build(ModelSpec("tiny-vgg", 3, (3, 32, 32), mean, deviation))


def test_the_peers_see_what_the_coverage_points_show(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load(monkeypatch, "peers")
    model, images = network(), torch.rand(4, 3, 32, 32)
    points = model.points("unit")
    parts, head = peers.chain(model)
    with torch.no_grad(), Recorder(model.network, points, "unit") as recorder:
        logits = model(images)
        neurons = recorder.take(logits).split([point.neurons for point in points], 1)
        outputs = [images]
        for part in parts:
            outputs.append(part(outputs[-1]).clone())
        torch.testing.assert_close(head(outputs[-1]), logits)
    assert len(parts) == len(points)
    for output, seen in zip(outputs[1:], neurons, strict=True):
        torch.testing.assert_close(output.movedim(1, -1).flatten(1), seen)


def test_one_pass_scores_as_the_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    common, peers = load(monkeypatch, "common"), load(monkeypatch, "peers")
    model = network()
    peer = peers.peers(model)["multimahalanobis"]
    images = common.random_images(0)
    peer.fit(model, common.cycled(images, 600))
    tested = images.batch(torch.arange(600, 620), (3, 32, 32)) / 255
    scores = peers.one_pass(model, peer)(tested)
    torch.testing.assert_close(scores, peer.predict(tested), rtol=1e-3, atol=1e-3)
    assert float(scores.std()) > 0


def test_variants_take_turns_and_ratios_are_taken_within_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = load(monkeypatch, "common")
    order: list[str] = []
    work = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = common.interleaved(work, 2)
    assert "".join(order) == "abc" * 3
    assert [len(seconds[name]) for name in "abc"] == [2, 2, 2]
    interval = common.ratio([2.0, 30.0, 6.0, 8.0, 10.0], [1.0, 10.0, 1.0, 1.0, 1.0])
    assert (interval.value, interval.low, interval.high, interval.repetitions) == (6.0, 3.0, 8.0, 5)


def test_a_split_pass_reads_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    common = load(monkeypatch, "common")
    read: list[int] = []
    monkeypatch.setattr(
        common, "bare_pass", lambda _model, images: read.extend(images.rows.tolist())
    )
    images = common.cycled(common.random_images(0), 10)
    common.interleaved(
        common.split_pass(network(), images, {"x": lambda: read.append(-1)}), 1, warm_up=False
    )
    assert read == [0, 1, 2, 3, 4, -1, 5, 6, 7, 8, 9]


def test_networks_are_held_against_one_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = load(monkeypatch, "models")
    assert {"vgg19", "torchvision:swin_t", "timm:resnet18"} <= set(models.networks())
    names = ["tiny-vgg", "torchvision:mobilenet_v3_small"]
    monkeypatch.setattr(sys, "argv", ["models.py", "--quick", "--json", "--networks", *names])
    models.main()
    rows = json.loads(capsys.readouterr().out)["networks"]
    assert [(row["network"], row["side"]) for row in rows] == list(
        zip(names, (32, 224), strict=True)
    )
    for row in rows:
        assert row["explained"][0] == row["points"] > 0
        assert min(row["signature"], row["weights"], row["monitored"]) > 0


def test_signatures_take_at_most_a_tenth_of_their_networks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the smallest networks: the larger ones have more room for the same ranges."""
    sizes = load(monkeypatch, "sizes")
    names = ["torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1"]
    options = ["--quick", "--json", "--classes", "3", "10", "--networks", *names]
    monkeypatch.setattr(sys, "argv", ["sizes.py", *options])
    sizes.main()
    rows = json.loads(capsys.readouterr().out)["networks"]
    assert [(row["network"], row["classes"]) for row in rows] == [(n, k) for n in names
                                                                  for k in (3, 10)]  # fmt: skip
    for row in rows:
        assert 0 < row["signature"] < 0.1 * row["weights"]
        assert row["rank"] >= 8
        assert not row["exact"]


def test_the_repeated_test_is_scipys_and_delays_count_from_the_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drift = load(monkeypatch, "drift")
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 40, (3, 400)) / 10  # with equal ones
    calibration = np.sort(generator.integers(0, 50, (3, 170)) / 10, 1)
    statistics = drift.tested(drift.Streams(scores, calibration))
    for i in range(3):
        for block in range(4):
            part = scores[i, 100 * block : 100 * (block + 1)]
            expected = stats.ks_2samp(part, calibration[i]).statistic
            assert statistics[block, i] == pytest.approx(expected)
    alarms = np.zeros((6, 3), bool)
    alarms[1, 0] = alarms[4, 0] = alarms[5, 1] = True
    assert drift.first(alarms).tolist() == [2, 6, drift.NEVER]
    assert drift.first(alarms, 3).tolist() == [5, 6, drift.NEVER]
    assert drift.first(alarms, 300, every=100).tolist() == [500, 600, drift.NEVER]


def test_a_spread_network_predicts_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = load(monkeypatch, "stages")
    model = stages.spread_network("tiny-vgg", 40)
    images = stages.NoiseSource("uniform", stages.TRAINING).read(torch.arange(40), (3, 32, 32))
    with torch.no_grad():
        assert model(images.float() / 255).argmax(1).tolist() == list(range(40))


def test_costs_are_extrapolated_along_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = load(monkeypatch, "stages")

    def costs(images: int, neurons: int) -> object:
        taken = {"bare": stages.Stage(2.0 * images, 0.0),
                 "build": stages.Stage(500 + 2.2 * images, 0.0)}  # fmt: skip
        return stages.Costs(f"x/9/{images}", 9, images, neurons, 1, 0.0, 0.0, taken)

    [ratio] = stages.extrapolated([costs(1000, 10), costs(3000, 10)]).values()
    assert ratio == pytest.approx(1.1 + 500 / (2 * stages.IMAGENET))
    [again] = stages.extrapolated([costs(1000, 10_000), costs(3000, 10_000)]).values()
    assert again == pytest.approx(ratio + 1)  # more than is stored
    assert stages.extrapolated([costs(1000, 10)]) == {}
