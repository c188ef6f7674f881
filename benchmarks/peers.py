"""pytorch-ood's detectors as its documentation uses them, on all coverage points of a VGG."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.data.images import ImageSet
from covcli.evaluation.baselines.adapters import FittingImages, FittingLoader, Network, small_batch
from covcli.evaluation.baselines.detectors import GRAM_POLES, library
from covcli.models.architectures import Classifier, Vgg
from covcli.models.sweep import sweep_batch

PEERS = ("gram", "nacue", "multimahalanobis", "knn")
NEIGHBOURS = 50  # the library's default


class Normalised(nn.Module):
    """A classifier's normalisation."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.mean, self.deviation = model.mean, model.deviation

    def forward(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) less their mean, in deviations."""
        return (images - self.mean) / self.deviation


class OnMaps(nn.Module):
    """A linear layer from and to maps of one position, the only shape that all the peers take."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, D, 1, 1) of (B, C, 1, 1)."""
        output: Tensor = self.linear(maps.flatten(1))
        return output[:, :, None, None]


def chain(model: Classifier) -> tuple[list[nn.Module], nn.Module]:
    """Cut a VGG after each of its activations; return the parts and what follows the last."""
    whole = model.network
    if not isinstance(whole, Vgg):
        raise CovcliError(
            "is no chain of layers, which the peers need",
            where=f"model {model.spec.name!r}",
            fix="take a VGG, or --no-peers",
        )
    layers = [Normalised(model), *whole.features.children(), nn.AdaptiveAvgPool2d(1)]
    layers += [OnMaps(m) if isinstance(m, nn.Linear) else m for m in whole.classifier.children()]
    parts: list[list[nn.Module]] = [[]]
    for layer in layers:
        parts[-1].append(layer)
        if isinstance(layer, nn.ReLU):
            parts.append([])
    *watched, last = parts
    return [nn.Sequential(*part) for part in watched], nn.Sequential(*last, nn.Flatten())


@dataclass(frozen=True)
class Peer:
    """A detector, the batch that it is fitted by, and whether it needs gradients."""

    detector: Any
    batch: int
    gradients: bool = False

    def fit(self, model: Classifier, images: ImageSet) -> None:
        """Fit it by the library's own `fit`; every class is given to equally many images."""
        labels = torch.arange(len(images)) % model.spec.classes
        trusted = FittingImages(Network(model), images, labels, Silent())
        self.detector.fit(FittingLoader(trusted, self.batch, ""))

    def predict(self, inputs: Tensor) -> Tensor:
        """Score a batch by the library's own `predict`."""
        with torch.inference_mode(not self.gradients):
            scores: Tensor = self.detector.predict(inputs)
        return scores


def peers(model: Classifier) -> dict[str, Peer]:
    """Return the detectors that PEERS names, not yet fitted; the network must be a VGG."""
    network, detectors = Network(model), library()
    parts, head = chain(model)
    large, small = sweep_batch(model.spec.shape), small_batch(network)
    knn = detectors.KNN(nn.Sequential(*parts, nn.Flatten()), k=NEIGHBOURS)
    threads = torch.get_num_threads()  # the library would take every core there is
    knn.knn.set_params(n_jobs=threads)
    importlib.import_module("threadpoolctl").threadpool_limits(threads)
    built = {
        "gram": Peer(detectors.Gram(head, parts, model.spec.classes, GRAM_POLES), small),
        "nacue": Peer(detectors.NACUE(model, network.layers), small, gradients=True),
        "multimahalanobis": Peer(detectors.MultiMahalanobis(parts), large),
        "knn": Peer(knn, large),
    }
    for peer in built.values():
        peer.detector.to("cpu")  # or it warns
    return built


def one_pass(model: Classifier, fitted: Peer) -> Callable[[Tensor], Tensor]:
    """Return a fitted MultiMahalanobis by one pass, where its `predict` begins anew each layer."""
    parts, _ = chain(model)

    def predict(inputs: Tensor) -> Tensor:
        means = []
        with torch.inference_mode():
            for part in parts:
                inputs = part(inputs)
                means.append(inputs.mean((2, 3)))
            scores: Tensor = fitted.detector.predict_structured(means)
        return scores

    return predict
