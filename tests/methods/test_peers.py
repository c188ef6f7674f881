"""Our nac beside the authors' formulas, our gauss beside pytorch-ood's, on the same images."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.special
import torch
from pytorch_ood.detector import Mahalanobis

from covcli.core.progress import Silent
from covcli.data import datasets
from covcli.evaluation.baselines.adapters import Batch, FittingImages, Network
from covcli.evaluation.baselines.detectors import BASELINES
from covcli.methods import Layout, make_method
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier
from covcli.models.points import Point, Recorder
from covcli.models.sweep import forward
from covcli.signature import signature as signatures
from covcli.signature.fit import fold
from covcli.training.train import TrainResult

Doubles = npt.NDArray[np.float64]


def official_coverage(
    model: Classifier, points: Sequence[Point], images: Sequence[torch.Tensor], full: int
) -> list[Doubles]:
    """Return each image's coverage, summed over the points, as the authors' program has it.

    Thresholds, half-open bins, sums over positions and counts are written out; the first images
    are those that count.
    """
    modules = dict(model.network.named_modules())

    def states(pixels: torch.Tensor) -> list[Doubles]:
        outputs: list[torch.Tensor] = []
        hooks = [
            modules[p.module].register_forward_hook(lambda _m, _x, y: outputs.append(y))
            for p in points
        ]
        logits = model(pixels.clone().requires_grad_())
        for hook in hooks:
            hook.remove()
        loss = -(torch.full_like(logits, 0.1) * torch.log_softmax(logits, 1)).sum()
        every = []
        for output, slope in zip(outputs, torch.autograd.grad(loss, outputs), strict=True):
            spatial = tuple(range(2, output.ndim))
            a, g = (x.detach().double().numpy().sum(spatial) for x in (output, slope))
            every.append(scipy.special.expit(100 * a * g))
        return every

    half = np.log(np.linspace(1, np.sqrt(1000), 25)) / np.log(1000)
    edges = np.concatenate([half[:-1], 1 - half[::-1]])
    edges[-1] += 0.01

    def bins(values: Doubles) -> Doubles:
        pairs = itertools.pairwise(edges)
        return np.stack([(values >= low) & (values < high) for low, high in pairs]) * 1.0

    counted = [np.minimum(bins(s).sum(1) / full, 1) for s in states(images[0])]
    return [
        np.stack(
            [
                (bins(s) * share[:, None]).sum(0).mean(1)
                for s, share in zip(states(pixels), counted, strict=True)
            ]
        ).sum(0)
        for pixels in images[1:]
    ]


def agree(coverage: Doubles, expected: Doubles) -> None:
    """A state close to an edge may fall to the other side in single precision."""
    assert np.abs(coverage - expected).max() < 0.05
    assert np.median(np.abs(coverage - expected)) < 1e-6
    assert np.ptp(expected) > 0.1


def test_nac_agrees_with_the_authors_program(trained: TrainResult) -> None:
    model = checkpoints.load(trained.checkpoint).model.eval()
    sets = [datasets.load("digits?limit=200", split) for split in ("train", "test")]
    labels = sets[0].known_labels()
    pixels = [s.batch(torch.arange(len(s)), model.spec.shape).float() / 255 for s in sets]
    pixels.append(torch.rand(50, *model.spec.shape))
    points = model.points("contribution")
    layout = signatures.layout_of(points, 10)
    method = make_method("nac?full=20")

    def neurons(images: torch.Tensor) -> torch.Tensor:
        with Recorder(model.network, points, "contribution") as recorder:
            return forward(model, recorder, images)[1]

    state = fold(method, layout, lambda: [(neurons(pixels[0]), labels)])
    scorer = method.prepare(state)
    expected = official_coverage(model, points, pixels, 20)
    for images, each in zip(pixels[1:], expected, strict=True):
        costs = scorer.costs(neurons(images), torch.zeros(len(images), dtype=torch.int64))
        agree((1 - layout.means(costs)).sum(1).numpy(), each)

    fitting = FittingImages(Network(model), sets[0], labels, Silent())
    detect = BASELINES.get("nac-official").fit(fitting)
    expected = official_coverage(model, points[-2:], pixels, 50)
    for images, each in zip(pixels[1:], expected, strict=True):
        nothing = torch.empty(0)
        scores = detect(Batch(nothing, images, nothing, None, []))
        agree(2 - scores.numpy(), each)


def test_gauss_agrees_with_mahalanobis() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    labels = torch.arange(300) % 3
    means = 2 * torch.randn(3, 6, generator=generator)
    trusted = torch.randn(300, 6, generator=generator) @ mixing + means[labels]
    tested = 3 * torch.randn(80, 6, generator=generator)
    layout = Layout(3, (6,), (6,))
    method = make_method("gauss?shrinkage=1e-9")
    scorer = method.prepare(fold(method, layout, lambda: [(trusted, labels)]))
    logs = [scorer(tested, torch.full((80,), k)) for k in range(3)]
    nearest = torch.cat(logs, 1).exp().amin(1) * 6  # squared distance
    peer = Mahalanobis(None).fit_features(trusted, labels).predict_features(tested)
    # theirs is half the distance in a scatter that is not divided by the number of images
    np.testing.assert_allclose(nearest.numpy(), 2 * 300 * peer.numpy(), rtol=1e-3)
