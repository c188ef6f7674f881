"""The baselines, against pytorch-ood called by hand on the bare network."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.evaluation.baselines import compare
from covcli.evaluation.baselines.adapters import FittingImages, Network
from covcli.evaluation.baselines.compare import Comparison, Plan
from covcli.evaluation.baselines.detectors import BASELINES, GRAM_POLES
from covcli.evaluation.evaluate import EvaluationConfig, evaluate
from covcli.models import architectures
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import ModelSpec
from covcli.reporting.report import report
from covcli.signature import judge as judges
from covcli.signature import signature as signatures
from covcli.signature.build import SignatureConfig, SignatureResult, build_signature
from covcli.signature.combination import COLUMNS
from covcli.training.train import TrainResult, split_rows

detectors = pytest.importorskip("pytorch_ood.detector")


# What is held against equations instead of the library's detector called by hand.
OWN = ("multi-mahalanobis", "multi-mahalanobis-calibrated", "nac-official")


@pytest.fixture(scope="module")
def network(trained: TrainResult) -> Network:
    return Network(checkpoints.load(trained.checkpoint).model)


@pytest.fixture(scope="module")
def plan(network: Network, signed: SignatureResult) -> Plan:
    judge, record = judges.load(signed.path.parent / "checkpoint.pt", signed.path)
    return compare.prepare(["all"], replace(judge, model=network.model), record, None)


@pytest.fixture(scope="module")
def fitted(plan: Plan, signed: SignatureResult) -> Comparison:
    _, calibration, _ = signatures.load(signed.path)
    return compare.fit(plan, calibration.guarantee, Silent())


def pixels(images: ImageSet) -> torch.Tensor:
    return images.batch(torch.arange(len(images)), (3, 32, 32)).float() / 255


def by_hand(name: str, network: Network, images: ImageSet) -> nn.Module:
    """Fit a detector as pytorch-ood documents it: on a loader, with parts of the network."""
    model = network.model
    tiny = model.network

    def encoder(x: torch.Tensor) -> torch.Tensor:
        x = tiny.pool(tiny.second(tiny.first((x - model.mean) / model.deviation)))
        return tiny.head(x.flatten(1)).detach()

    def maps(x: torch.Tensor) -> torch.Tensor:
        return encoder(x)[:, :, None, None]

    def last(x: torch.Tensor) -> torch.Tensor:
        return tiny.last(x.flatten(1)).detach()

    first = nn.Sequential(Normalised(model), tiny.first)
    rest = nn.Sequential(tiny.pool, nn.Flatten(), tiny.head)
    built = {
        "max-softmax": lambda: detectors.MaxSoftmax(model),
        "maxlogit": lambda: detectors.MaxLogit(model),
        "energy": lambda: detectors.EnergyBased(model),
        "gen": lambda: detectors.GEN(model),
        "knn": lambda: detectors.KNN(encoder, k=50),
        "mahalanobis": lambda: detectors.Mahalanobis(encoder),
        "rmd": lambda: detectors.RMD(encoder),
        "vim": lambda: detectors.ViM(encoder, 16, tiny.last.weight, tiny.last.bias),
        "react": lambda: detectors.ReAct(maps, last),
        "ash": lambda: detectors.ASH(maps, last, percentile=0.95),
        "odin": lambda: detectors.ODIN(model),
        "nac": lambda: detectors.NACUE(model, [tiny.second, tiny.head]),
        "gram": lambda: detectors.Gram(
            tiny.last, [first, tiny.second, rest], 10, list(GRAM_POLES)
        ).to("cpu"),
    }[name]()
    if built.requires_fit:
        labels = images.known_labels()
        torch.manual_seed(0)  # for the images that Gram holds out
        built.fit(list(zip(pixels(images).split(100), labels.split(100), strict=True)))
    return built


class Normalised(nn.Module):
    def __init__(self, model: architectures.Classifier) -> None:
        super().__init__()
        self.mean, self.deviation = model.mean, model.deviation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.deviation


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_scores_every_image_the_same_in_any_batch(
    name: str, fitted: Comparison, network: Network
) -> None:
    trusted, noise = (
        datasets.load("digits?limit=300", "test"),
        datasets.load("noise:uniform?limit=64", "test"),
    )
    one = Comparison(network, {name: fitted.detectors[name]}, {})
    scores = one.score(trusted, Silent())[name]
    assert scores.shape == (300,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 50
    part = one.score(trusted.select(torch.arange(100, 137)), Silent())[name]
    np.testing.assert_allclose(part, scores[100:137], rtol=1e-3, atol=1e-3 * scores.std())
    assert np.median(one.score(noise, Silent())[name]) > np.median(scores)
    assert np.isfinite(fitted.rules[name].overall)


@pytest.mark.parametrize("name", [n for n in BASELINES if n not in OWN])
def test_a_baseline_is_the_detector_called_by_hand(
    name: str, fitted: Comparison, network: Network, plan: Plan
) -> None:
    assert plan.trusted is not None
    detector = by_hand(name, network, plan.trusted)
    for spec in ("digits?limit=50", "photos?limit=50"):
        images = datasets.load(spec, "test")
        expected = detector.predict(pixels(images)).detach().numpy()
        scores = fitted.score(images, Silent())[name]
        np.testing.assert_allclose(scores, expected, rtol=1e-2, atol=1e-3 * expected.std())


def test_multi_mahalanobis_sums_the_distances_of_the_layers(
    fitted: Comparison, network: Network, plan: Plan
) -> None:
    images = datasets.load("photos?limit=30", "test")
    scores = fitted.score(images, Silent())["multi-mahalanobis"]
    np.testing.assert_allclose(scores, distances(network, plan, images).sum(1) / 2, rtol=1e-2)


def test_calibrated_it_is_the_soft_maximum_of_standardised_logs(
    fitted: Comparison, network: Network, plan: Plan
) -> None:
    assert plan.fitting is not None
    assert plan.ranking is not None
    assert len(plan.fitting) + len(plan.ranking) == 359
    images = datasets.load("photos?limit=30", "test")
    known = np.log(distances(network, plan, plan.fitting))

    def score(logs: np.ndarray) -> np.ndarray:
        z = (logs - known.mean(0)) / known.std(0, ddof=1)
        return COLUMNS * np.log(np.exp(z / COLUMNS).mean(1))

    # A standardisation of the only voice, and the lowest score as 0, change no order.
    own, lowest = score(known), score(known).min()
    expected = (score(np.log(distances(network, plan, images))) - lowest) / own.std(ddof=1)
    scores = fitted.score(images, Silent())["multi-mahalanobis-calibrated"]
    slope = np.polyfit(expected, scores, 1)
    np.testing.assert_allclose(scores, np.polyval(slope, expected), rtol=1e-2, atol=1e-2)
    assert slope[0] > 0


def distances(network: Network, plan: Plan, images: ImageSet) -> np.ndarray:
    """Return each layer's squared distance to the nearest class, shape (images, layers)."""
    assert plan.trusted is not None
    labels = plan.trusted.known_labels().numpy()
    columns = []
    for z, x in zip(of(network, plan.trusted), of(network, images), strict=True):
        centres = np.stack([z[labels == k].mean(0) for k in range(10)])
        scatter = (z - centres[labels]).T @ (z - centres[labels]) + 1e-6 * np.eye(z.shape[1])
        gap = x[:, None] - centres
        squared = np.einsum("bkd,de,bke->bk", gap, np.linalg.inv(scatter), gap)
        columns.append(squared.min(1))
    return np.stack(columns, 1)


def of(network: Network, images: ImageSet) -> list[np.ndarray]:
    """Return the spatial means after each coverage layer, by plain PyTorch."""
    tiny, model = network.model.network, network.model
    with torch.no_grad():
        first = tiny.first((pixels(images) - model.mean) / model.deviation)
        second = tiny.second(first)
        head = tiny.head(tiny.pool(second).flatten(1))
    return [m.double().numpy() for m in (first.mean((2, 3)), second.mean((2, 3)), head)]


def test_a_layer_is_one_call_of_a_module_that_is_called_often() -> None:
    torch.manual_seed(0)
    model = architectures.build(ModelSpec("resnet18", 3, (3, 32, 32), *architectures.CIFAR10))
    network = Network(model)
    images = datasets.load("noise:uniform?limit=5", "test")
    (batch,) = network.read(images, Silent(), "")
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("relu"):
            module.register_forward_hook(lambda _m, _x, y: seen.append(y.mean((2, 3))))
    with torch.no_grad():
        logits = model(pixels(images))
        again = network.last(batch.features) if network.last is not None else None
    assert len(batch.means) == len(seen) == 17
    for mean, expected in zip(batch.means, seen, strict=True):
        torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(again, logits)


def test_balanced_images_are_of_every_class_alike(network: Network) -> None:
    images = datasets.load("digits", "train")
    some = FittingImages(network, images, images.known_labels(), Silent()).balanced(43)
    counts = torch.bincount(some.labels)
    assert sorted(counts.tolist()) == [4] * 7 + [5] * 3
    assert torch.equal(some.images.known_labels(), some.labels)


def test_evaluate_puts_the_baselines_beside_ours(run: Path) -> None:
    sets = ("photos?limit=60", "noise:uniform?limit=40")
    names = ("maxlogit", "knn")
    result = evaluate(EvaluationConfig(sets, runs=run.parent, baselines=names), Silent())
    plain = evaluate(EvaluationConfig(sets, runs=run.parent, force=True), Silent())
    again = evaluate(EvaluationConfig(sets, runs=run.parent, force=True, baselines=names), Silent())
    assert again.untrusted == result.untrusted
    assert list(plain.untrusted[0].scores) == ["coverage", "softmax"]
    for one, other in zip(result.untrusted, plain.untrusted, strict=True):
        assert one.scores["coverage"] == other.scores["coverage"]
    document = json.loads((run / "evaluation.json").read_text())
    table = pd.read_csv(run / "scores.csv.gz")
    model = checkpoints.load(run / "checkpoint.pt").model
    _, held_out = split_rows(1437, 0.25, 0)
    calibration = datasets.load("digits", "train").select(held_out)
    ranking = calibration.select(
        (~signatures.load(run / "signature-mrc.safetensors")[1].fitting).nonzero()[:, 0]
    )
    detector = detectors.MaxLogit(model)
    with torch.no_grad():
        scores = np.sort(detector.predict(pixels(ranking)).numpy())
        photos = detector.predict(pixels(datasets.load(sets[0], "test"))).numpy()
    threshold = scores[len(scores) - int(0.05 * (len(scores) + 1))]
    np.testing.assert_allclose(table[table["set"] == sets[0]]["maxlogit_score"], photos, rtol=1e-4)
    entry = document["untrusted"][0]
    assert list(entry["scores"]) == ["coverage", "softmax", *names]
    rate = entry["scores"]["maxlogit"]["detection_rate"]["value"]
    assert rate == pytest.approx((photos > threshold).mean(), abs=1e-9)
    assert document["provenance"]["pytorch-ood"]
    means = document["mean_over_sets"]
    assert means[0]["score"] == "coverage"
    assert {mean["score"] for mean in means} == {"coverage", "softmax", *names}
    for mean in means:
        values = [e["scores"][mean["score"]]["fpr95"]["value"] for e in document["untrusted"]]
        assert mean["fpr95"]["value"] == pytest.approx(np.mean(values))
    written = report(run)
    assert {"baselines-0", "baselines-1"} <= {path.stem for path in written.figures}
    assert "knn" in written.markdown.read_text()


def test_a_missing_library_is_a_clear_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_ood.detector", None)
    config = EvaluationConfig(("photos?limit=20",), runs=run.parent, baselines=("energy",))
    with pytest.raises(CovcliError, match=r"pip install 'covcli\[baselines\]'"):
        evaluate(config, Silent())
    plain = EvaluationConfig(("photos?limit=20",), runs=run.parent)
    assert evaluate(plain, Silent()).untrusted


def test_bad_baselines_are_refused_before_any_work(signed: SignatureResult) -> None:
    with pytest.raises(CovcliError, match="did you mean 'energy'"):
        compare.expand(["enrgy"])
    assert compare.expand(["knn", "all"]) == tuple(BASELINES)
    judge, record = judges.load(signed.path.parent / "checkpoint.pt", signed.path)
    squeezed = architectures.build(
        ModelSpec("torchvision:squeezenet1_1", 10, (3, 64, 64), *architectures.CIFAR10)
    )
    with pytest.raises(CovcliError, match="do not come from a linear layer"):
        compare.prepare(["knn"], replace(judge, model=squeezed), record, None)
    plan = compare.prepare(["energy"], replace(judge, model=squeezed), record, None)
    assert plan.names == ("energy",)


def test_images_that_changed_since_are_refused(run: Path, tmp_path: Path) -> None:
    digits = datasets.load("digits?limit=400", "train")
    file = tmp_path / "digits.npz"
    images = digits.batch(torch.arange(400), (1, 8, 8)).numpy()[:, 0]
    np.savez(file, images=images, labels=digits.known_labels().numpy())
    signature = tmp_path / "s.safetensors"
    build_signature(
        SignatureConfig(run / "checkpoint.pt", trusted=f"npz:{file}", output=signature), Silent()
    )
    config = EvaluationConfig(
        ("photos?limit=20",), run / "checkpoint.pt", signature, trusted="digits", baselines=("knn",)
    )
    np.savez(file, images=images[::-1], labels=digits.known_labels().numpy()[::-1])
    with pytest.raises(CovcliError, match="leave --baseline out"):
        evaluate(config, Silent())
    file.unlink()
    with pytest.raises(CovcliError, match="leave --baseline out"):
        evaluate(config, Silent())


def test_ash_is_refused_where_it_prunes_every_feature(network: Network) -> None:
    narrow = Network(network.model)
    narrow.last = nn.Linear(9, 10)
    none = torch.empty(0, dtype=torch.int64)
    trusted = FittingImages(narrow, datasets.load("digits?limit=2", "test"), none, Silent())
    with pytest.raises(CovcliError, match="ash: prunes all of 9 features"):
        BASELINES.get("ash").fit(trusted)
