"""BASELINES: detectors of pytorch-ood, for comparison with the coverage scores on the same images.

Each function fits one detector on trusted training images and returns a function that scores a
batch; larger means less trusted. The docstrings give the source of the hyperparameters. None was
chosen here with untrusted images, except the layers of the "nac" detectors, in their favour. If a
paper chose its values with untrusted images, the docstring says so.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.runtime import seeded
from covcli.core.specs import Registry
from covcli.evaluation.baselines.adapters import (
    Batch,
    FittingImages,
    FittingLoader,
    Network,
    channels_first,
    small_batch,
)
from covcli.methods.contributions import ActivationCoverage
from covcli.models.points import Outputs, Point, Recorder
from covcli.models.sweep import forward, sweep
from covcli.signature.combination import fit_combination
from covcli.signature.fit import fold
from covcli.signature.signature import layout_of

# The largest memory, in bytes, for the data that a detector is fitted on.
FIT_BYTES = 1 << 30
# Entries of a batch's Gram matrices.
GRAM_ENTRIES = 1 << 26
GRAM_POLES = tuple(range(1, 11))
# The share of an image's features that ASH prunes.
ASH_PRUNED = 0.95
Detector: TypeAlias = Callable[[Batch], Tensor]
Fit: TypeAlias = Callable[[FittingImages], Detector]


@dataclass(frozen=True)
class Baseline:
    """A baseline: the function that fits it, and whether it needs the last linear layer's input."""

    fit: Fit
    features: bool


BASELINES: Registry[Baseline] = Registry("baseline")


def baseline(name: str, *, features: bool = False) -> Callable[[Fit], Fit]:
    """Return a decorator that registers a function that fits a detector.

    The function takes `FittingImages` and returns a function that takes a `Batch` and returns
    scores of shape (B,), where larger means less trusted.

    Parameters
    ----------
    name
        The name for `--baseline`.
    features
        Whether the detector needs the input of the last linear layer.

    Examples
    --------
    >>> @baseline("least-logit")
    ... def least_logit(trusted):
    ...     return lambda batch: -batch.logits.amin(1)
    >>> detector = BASELINES.get("least-logit").fit(None)
    >>> logits = torch.tensor([[1.0, -3.0]])
    >>> detector(Batch(None, None, logits, None, [])).tolist()
    [3.0]
    """

    def decorate(fit: Fit) -> Fit:
        BASELINES.add(name)(Baseline(fit, features))
        return fit

    return decorate


def library() -> ModuleType:
    """Import pytorch-ood's detectors; raise a CovcliError with advice if it is not installed."""
    try:
        return importlib.import_module("pytorch_ood.detector")
    except ImportError:
        raise CovcliError(
            "needs pytorch-ood, which is not installed",
            where="--baseline",
            fix="run `pip install 'covcli[baselines]'`",
        ) from None


def _features(batch: Batch) -> Tensor:
    assert batch.features is not None
    return batch.features.cpu()


@baseline("max-softmax")
def max_softmax(_trusted: FittingImages) -> Detector:
    """Highest softmax probability, covcli's "softmax" in single precision.

    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples
    in Neural Networks", ICLR 2017.
    """
    detector = library().MaxSoftmax(None)
    return lambda batch: detector.predict_logits(batch.logits)


@baseline("maxlogit")
def maxlogit(_trusted: FittingImages) -> Detector:
    """Highest logit.

    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022.
    """
    detector = library().MaxLogit(None)
    return lambda batch: detector.predict_logits(batch.logits)


@baseline("energy")
def energy(_trusted: FittingImages) -> Detector:
    """Free energy of the logits, at temperature 1.

    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.
    """
    detector = library().EnergyBased(None)
    return lambda batch: detector.predict_logits(batch.logits)


@baseline("gen")
def gen(_trusted: FittingImages) -> Detector:
    """Generalised entropy of the softmax distribution, γ = 0.1 over all classes.

    Liu et al., "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection",
    CVPR 2023: γ and, where there are more, the 100 most probable classes are those of its
    experiments on ImageNet.
    """
    detector = library().GEN(None, M=100)
    return lambda batch: detector.predict_logits(batch.logits)


@baseline("knn", features=True)
def knn(trusted: FittingImages) -> Detector:
    """Distance to the 50th nearest neighbour among all fitted images' normalised features.

    Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022: k = 50 is
    its choice for CIFAR-10.
    """
    detector = library().KNN(None, k=min(50, len(trusted.labels)))
    detector.knn.set_params(n_jobs=torch.get_num_threads())
    detector.fit_features(trusted.features, trusted.labels)
    return lambda batch: detector.predict_features(_features(batch))


@baseline("mahalanobis", features=True)
def mahalanobis(trusted: FittingImages) -> Detector:
    """Mahalanobis distance to the nearest class mean, in the features; one covariance for all.

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks", NeurIPS 2018, without the perturbation of the input.
    """
    detector = library().Mahalanobis(None).fit_features(trusted.features, trusted.labels)
    return lambda batch: detector.predict_features(_features(batch))


@baseline("rmd", features=True)
def rmd(trusted: FittingImages) -> Detector:
    """Mahalanobis distance relative to that of one Gaussian over all classes, in the features.

    Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021,
    arXiv 2106.09022.
    """
    detector = library().RMD(None).fit_features(trusted.features, trusted.labels)
    return lambda batch: detector.predict_features(_features(batch))


@baseline("vim", features=True)
def vim(trusted: FittingImages) -> Detector:
    """Virtual logit of the features' residual with respect to a principal subspace.

    Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022. The subspace
    has the dimension of the authors' code: 1,000 for at least 2,048 features, 512 for at least 768,
    otherwise half of them.
    """
    weight, bias = _weights(trusted)
    width = weight.shape[1]
    dimension = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
    detector = library().ViM(None, dimension, weight, bias)
    detector.fit_features(trusted.features, trusted.labels)
    return lambda batch: detector.predict_features(_features(batch))


def _weights(trusted: FittingImages) -> tuple[Tensor, Tensor]:
    """Return the last linear layer's weights (classes, D) and bias (classes,), on the CPU."""
    last = trusted.network.last
    assert last is not None
    weight = last.weight.detach().cpu()
    return weight, torch.zeros(len(weight)) if last.bias is None else last.bias.detach().cpu()


def _head(trusted: FittingImages) -> Callable[[Tensor], Tensor]:
    """Return the last linear layer as a map of features (B, D, 1, 1), on the CPU."""
    weight, bias = _weights(trusted)
    return lambda maps: nn.functional.linear(maps.flatten(1), weight, bias)


@baseline("react", features=True)
def react(trusted: FittingImages) -> Detector:
    """Energy after the features are clipped at their 90th percentile.

    Sun et al., "ReAct: Out-of-distribution Detection With Rectified Activations", NeurIPS 2021:
    at the penultimate layer, the input of the last linear one.
    """
    detector = library().ReAct(nn.Identity(), _head(trusted))
    detector.fit_feature_maps(trusted.features[:, :, None, None], trusted.labels)
    return lambda batch: detector.predict_feature_maps(_features(batch)[:, :, None, None])


@baseline("ash", features=True)
def ash(trusted: FittingImages) -> Detector:
    """Energy after 95% of an image's features are pruned and the others scaled (ASH-S).

    Djurisic et al., "Extremely Simple Activation Shaping for Out-of-Distribution Detection",
    ICLR 2023: 95% is its share for CIFAR-10, where the library prunes 65%. At the input of the
    last linear layer, in the form (B, D, 1, 1) that the library documents for pooled features.
    It was made for features that are not negative, as after a ReLU.

    Raises
    ------
    CovcliError
        If all features would be pruned.
    """
    width = _weights(trusted)[0].shape[1]
    if round(ASH_PRUNED * width) == width:
        raise CovcliError(f"prunes all of {width} features", where="--baseline ash")
    detector = library().ASH(nn.Identity(), _head(trusted), percentile=ASH_PRUNED)
    return lambda batch: detector.predict_feature_maps(_features(batch)[:, :, None, None])


@baseline("odin")
def odin(trusted: FittingImages) -> Detector:
    """Highest softmax probability at temperature 1,000, after a step that raises it.

    Liang, Li and Srikant, "Enhancing The Reliability of Out-of-distribution Image Detection in
    Neural Networks", ICLR 2018. The step of 0.0014 of the pixels' range is the library's default;
    the paper chooses one for each network and set with untrusted images. It needs a backward pass
    and two forward passes of its own.
    """
    size = small_batch(trusted.network)
    detector = library().ODIN(trusted.network.model)
    return lambda batch: torch.cat([detector.predict(part) for part in batch.inputs.split(size)])


@baseline("multi-mahalanobis")
def multi_mahalanobis(trusted: FittingImages) -> Detector:
    """Sum over all coverage points of the Mahalanobis distance between spatial means.

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks", NeurIPS 2018, section 2.3, with equal weights (the paper fits them on
    untrusted images). It is fitted on at most 1 GB of means, with equal numbers of all classes:
    more than 20,000 images for VGG19.
    """
    means, labels = _layer_means(trusted)
    detector = library().MultiMahalanobis(list(trusted.network.points))
    detector.fit_structured(means, labels)
    return lambda batch: detector.predict_structured(batch.means)


@baseline("multi-mahalanobis-calibrated")
def multi_mahalanobis_calibrated(trusted: FittingImages) -> Detector:
    """Soft maximum of the standardised logs of the distances of "multi-mahalanobis".

    They are standardised on the calibration images that fit the signature's combination, and
    combined by the same soft maximum. So this baseline shows the effect of calibration alone,
    without covcli's methods.
    """
    assert trusted.held_out is not None
    means, labels = _layer_means(trusted)
    layers = [
        library().MultiMahalanobis([point]).fit_structured([mean], labels)
        for point, mean in zip(trusted.network.points, means, strict=True)
    ]

    def evidence(batch: Batch) -> Tensor:
        pairs = zip(layers, batch.means, strict=True)
        distances = [layer.predict_structured([mean]) for layer, mean in pairs]
        smallest = torch.finfo(torch.float32).tiny  # so that the log of a distance of 0 is finite
        return torch.stack(distances, 1).double().clamp_min(smallest).log().cpu()

    title = "calibrating multi-mahalanobis"
    read = trusted.network.read(trusted.held_out, trusted.progress, title)
    combination = fit_combination(torch.cat([evidence(batch) for batch in read]), [])
    return lambda batch: combination.score(evidence(batch))


def _layer_means(trusted: FittingImages) -> tuple[list[Tensor], Tensor]:
    """Return each coverage point's means (n, channels) on some of the images, and their classes."""
    width = sum(p.neurons for p in trusted.network.model.points("channel"))
    fitted = trusted.balanced(FIT_BYTES // (4 * width))
    kept: list[list[Tensor]] = []
    title = "fitting multi-mahalanobis"
    for batch in trusted.network.read(fitted.images, trusted.progress, title):
        kept.append([means.cpu() for means in batch.means])
    return [torch.cat(parts) for parts in zip(*kept, strict=True)], fitted.labels


class Replay:
    """A network as the chain of layers for Gram: the first layer runs it, the others look up."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._seen: dict[str, Tensor] = {}
        self._logits = torch.empty(0)

    def run(self, inputs: Tensor) -> Tensor:
        """Run the network, and return the first coverage point's output."""
        model, points = self._network.model, self._network.points
        with Outputs(model.network, points, self._keep):
            self._logits = model(inputs)
        return self._seen[points[0].name]

    def _keep(self, point: Point, output: Tensor) -> None:
        self._seen[point.name] = channels_first(output, point.channel_dim).clone()

    def recall(self, point: Point) -> Callable[[Tensor], Tensor]:
        """Return a function that returns a coverage point's output in the last run."""
        return lambda _previous: self._seen.pop(point.name)

    def logits(self, _previous: Tensor) -> Tensor:
        """Return the last run's logits."""
        return self._logits


@baseline("gram")
def gram(trusted: FittingImages) -> Detector:
    """Deviation of the Gram matrices of all coverage points from their range in the class.

    Sastry and Oore, "Detecting Out-of-Distribution Examples with Gram Matrices", ICML 2020: orders
    1 to 10, as in the paper. (The library's default grows with the number of layers, and higher
    powers of an activation overflow.) It is fitted on at most 256 MB of statistics, with equal
    numbers of all classes, about 560 images for VGG19: the library used up to 20 MB of memory per
    image there.
    """
    network = trusted.network
    widths = [p.neurons for p in network.model.points("channel")]
    fitted = trusted.balanced(FIT_BYTES // (16 * len(GRAM_POLES) * sum(widths)))
    size = max(1, min(small_batch(network), GRAM_ENTRIES // max(widths) ** 2))
    replay = Replay(network)
    layers = [replay.run, *[replay.recall(point) for point in network.points[1:]]]
    detector = library().Gram(replay.logits, layers, network.model.spec.classes, GRAM_POLES)
    detector.to(network.device)
    with seeded(0):  # the detector holds out a tenth of the images at random
        detector.fit(FittingLoader(fitted, size, "fitting gram"))
    detector.to(network.device)  # what it was fitted to is on the CPU, and inputs would follow it
    if not all(bool(high.isfinite().all()) for orders in detector.feature_max for high in orders):
        raise CovcliError("activations whose tenth power overflows", where="--baseline gram")
    return lambda batch: torch.cat([detector.predict(part) for part in batch.inputs.split(size)])


@baseline("nac")
def nac(trusted: FittingImages) -> Detector:
    """Coverage of neurons' activations times their gradients, at the last two coverage points.

    Liu et al., "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and
    Generalization", ICLR 2024, as the library's class NACUE with its defaults, fitted on all
    images. Its bins are narrow near 0 and 1 and wide around ½, where those of the authors' program
    are narrow around ½: see "nac-official". The library's example reads a ResNet's last two
    stages; on a VGG19 the last two points did better than all 18, since one steepness of the
    sigmoid does not suit early layers.
    """
    network = trusted.network
    layers = network.layers[-2:]
    dim = 1 if any(layer.channel_dim == 1 for layer in layers) else -1
    detector = library().NACUE(
        network.model, layers, feature_reduce=lambda x: channels_first(x, dim).flatten(2).mean(2)
    )
    size = small_batch(network)
    detector.fit(FittingLoader(trusted, size, "fitting nac"))
    return lambda batch: torch.cat([detector.predict(part) for part in batch.inputs.split(size)])


@baseline("nac-official")
def nac_official(trusted: FittingImages) -> Detector:
    """Coverage in the bins of the authors' program, narrow around ½, and with its sums.

    Liu et al., ICLR 2024, and their program's defaults for the last pooling layer of a ResNet-18
    on CIFAR-10, at the last two coverage points. It is covcli's own method `nac` on these points.
    """
    model, labels = trusted.network.model, trusted.labels
    points, method = model.points("contribution")[-2:], ActivationCoverage()
    layout = layout_of(points, model.spec.classes)

    def fitting() -> Iterator[tuple[Tensor, Tensor]]:
        title = "fitting nac-official"
        for swept in sweep(model, trusted.images, points, "contribution", trusted.progress, title):
            yield swept.neurons, labels[swept.rows].to(swept.neurons.device)

    state = fold(method, layout, fitting, trusted.network.device)
    scorer = method.prepare(state)

    def detect(batch: Batch) -> Tensor:
        with Recorder(model.network, points, "contribution") as recorder:
            logits, neurons = forward(model, recorder, batch.inputs)
        return layout.means(scorer.costs(neurons, logits.argmax(1))).sum(1).cpu()

    return detect
