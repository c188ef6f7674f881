"""Our nac and gauss beside pytorch-ood's, on the same networks, images and bins."""

import numpy as np
import torch
from pytorch_ood.detector import NACUE, Mahalanobis

from covcli.data import datasets
from covcli.methods import Layout, make_method
from covcli.models import checkpoint as checkpoints
from covcli.models.points import Recorder
from covcli.models.sweep import forward
from covcli.signature import signature as signatures
from covcli.signature.fit import fold
from covcli.training.train import TrainResult


def test_nac_agrees_with_nacue(trained: TrainResult) -> None:
    model = checkpoints.load(trained.checkpoint).model.eval()
    points = model.points("contribution")
    layout = signatures.layout_of(points, 10)
    method = make_method("nac?full=20")
    digits = {split: datasets.load("digits?limit=200", split) for split in ("train", "test")}
    images = {
        split: s.batch(torch.arange(len(s)), model.spec.shape).float() / 255
        for split, s in digits.items()
    }
    images["noise"] = torch.rand(50, *model.spec.shape)

    def neurons(pixels: torch.Tensor) -> torch.Tensor:
        with Recorder(model.network, points, "contribution") as recorder:
            return forward(model, recorder, pixels)[1]

    labels = digits["train"].known_labels()
    state = fold(method, layout, lambda: [(neurons(images["train"]), labels)])
    modules = dict(model.network.named_modules())
    peer = NACUE(model, [modules[p.module] for p in points], m_bins=50, alpha=100.0, o_star=20)
    peer.fit([(images["train"], labels)])
    scorer = method.prepare(state, layout)
    for name in ("test", "noise"):
        found = neurons(images[name])
        costs = scorer.costs(found, torch.zeros(len(found), dtype=torch.int64))
        coverage = (1 - layout.means(costs)).sum(1)
        np.testing.assert_allclose(-coverage.numpy(), peer.predict(images[name]).numpy(), atol=1e-5)
    assert float(peer.predict(images["noise"]).mean()) != float(peer.predict(images["test"]).mean())


def test_gauss_agrees_with_mahalanobis() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    labels = torch.arange(300) % 3
    means = 2 * torch.randn(3, 6, generator=generator)
    trusted = torch.randn(300, 6, generator=generator) @ mixing + means[labels]
    tested = 3 * torch.randn(80, 6, generator=generator)
    layout = Layout(3, (6,), (6,))
    method = make_method("gauss?shrinkage=1e-9")
    scorer = method.prepare(fold(method, layout, lambda: [(trusted, labels)]), layout)
    logs = [scorer(tested, torch.full((80,), k)) for k in range(3)]
    nearest = torch.cat(logs, 1).exp().amin(1) * 6  # squared distance
    peer = Mahalanobis(None).fit_features(trusted, labels).predict_features(tested)
    # theirs is half the distance in a scatter that is not divided by the number of images
    np.testing.assert_allclose(nearest.numpy(), 2 * 300 * peer.numpy(), rtol=1e-3)
