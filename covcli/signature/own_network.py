"""Signatures of a program's own network, with images that the program prepares."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.data import copies
from covcli.data.datasets import check_labels
from covcli.data.images import ImageSet
from covcli.data.labels import numbered
from covcli.data.prepared import PreparedSource, far_apart, prepared, prepared_otherwise
from covcli.models.architectures import FAILURES, Classifier, refused_images
from covcli.models.logits import named_tensors
from covcli.models.spec import ModelSpec
from covcli.models.watchable import COMPILED, check_watchable
from covcli.signature import signature as signatures
from covcli.signature.build import sign
from covcli.signature.fit import How
from covcli.signature.guarantee import GuaranteeRequest
from covcli.signature.judge import Judge
from covcli.signature.record import Record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnNetwork:
    """A program's own network.

    Attributes
    ----------
    network
        Maps prepared images to logits; it is not copied or moved. Of a network that torch.compile
        or DataParallel wrapped, the network within is used.
    classes
        Class names; by default those of the dataset, or numbers.
    logits, points
        See `covcli.training.config.TrainConfig`.
    """

    network: nn.Module
    classes: Sequence[str] = ()
    logits: str = ""
    points: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("classes", "points"):
            if isinstance(getattr(self, name), str):
                raise CovcliError("must be a list of texts, not a single one", where=f"{name}=")
        if len(set(self.classes)) < len(self.classes):
            raise CovcliError("names a class twice", where="classes=")
        object.__setattr__(self, "network", unwrapped(self.network))
        check_watchable(self.network)

    def classifier(self, images: ImageSet) -> tuple[Classifier, tuple[str, ...]]:
        """Return a classifier of prepared images, and its class names."""
        source, network = images.source, self.network
        assert isinstance(source, PreparedSource)
        _, channels, height, width = source.sample.shape
        known = len(self.classes)
        count = known or _count(network, source.sample[:2], images.labels, self.logits)
        spec = ModelSpec.own(network, count, (channels, height, width), self.logits)
        model = Classifier(spec, network).to(place_of(network))
        model.watched = tuple(self.points)
        names = tuple(self.classes) or images.classes
        return model, names if len(names) == count else numbered(count)


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network that torch.compile or DataParallel wrapped; another one unchanged.

    Hooks are not called within compiled code, and a wrapper changes the names of the weights.

    Raises
    ------
    CovcliError
        If it is no network.

    Examples
    --------
    >>> network = nn.Linear(2, 2)
    >>> unwrapped(torch.compile(nn.DataParallel(network))) is network
    True
    """
    if not isinstance(network, nn.Module):
        kind = network.__name__ if isinstance(network, type) else type(network).__name__
        raise CovcliError(f"got {kind}", where="the network", fix="pass an instance of nn.Module")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(network, parallel):
            network = network.module
        elif isinstance(inner := getattr(network, COMPILED, None), nn.Module):
            network = inner
        else:
            return network


def place_of(network: nn.Module) -> torch.device:
    """Return the device of a network's weights."""
    weights = [*network.parameters(), *network.buffers()]
    return weights[0].device if weights else torch.device("cpu")


def _count(network: nn.Module, images: Tensor, labels: Tensor | None, logits: str) -> int:
    """Return a network's number of classes, from its output on two images."""
    kinds = {str(p.dtype) for p in network.parameters() if p.is_floating_point()}
    if kinds - {"torch.float32"}:
        raise CovcliError(
            f"its weights are {', '.join(sorted(kinds))}",
            where="the network",
            fix="convert it by network.float()",
        )
    training = [module for module in network.modules() if module.training]
    try:
        with torch.no_grad():
            output = network.eval()(images.to(place_of(network)))
    except FAILURES as error:
        channels_last = images.shape[1] > 4 >= images.shape[3]
        fix = "channels come second: let the dataset's transform permute them"
        raise refused_images(
            images.shape[1:], error, "the network", fix if channels_last else None
        ) from error
    finally:
        for module in training:
            module.training = True
    tensors = dict(named_tensors(output))
    rows = {name: t for name, t in tensors.items() if t.ndim >= 2 and len(t) == len(images)}
    if logits in rows and rows[logits].shape[1] > 1:
        return rows[logits].shape[1]
    named = [t for name, t in rows.items() if name.split(".")[-1] == "logits"]
    least = 2 if labels is None else max(2, int(labels.max()) + 1)
    sizes = {t.shape[1] for t in named or rows.values() if t.shape[1] >= least}
    if not sizes and any(t.numel() == len(images) for t in tensors.values()):
        raise CovcliError(
            "returns one number an image", where="the network",
            fix="let it return a logit a class, such as torch.cat([torch.zeros_like(x), x], 1)",
        )  # fmt: skip
    if len(sizes) != 1:
        raise CovcliError(
            "the number of the network's classes is not clear", fix="name them by classes="
        )
    return sizes.pop()


def build_own(
    own: OwnNetwork, trusted: Any, calibration: Any, how: How, progress: Progress
) -> tuple[Judge, Record]:
    """Build and calibrate the signature of a program's own network.

    Parameters
    ----------
    own
        The network.
    trusted, calibration
        Prepared images, see `covcli.data.prepared.prepared`: those that trained the network, and
        others for calibration.
    how
        The method and its settings.
    progress
        Receives the progress.

    Raises
    ------
    CovcliError
        If the data or the network is of another kind, or as in `covcli.build_signature`.
    """
    runtime.check_defaults()
    images, held_out = labelled(trusted, "trusted"), prepared(calibration, "calibration")
    images = _without_shared(images, held_out)
    model, names = own.classifier(images)
    for each in (images, held_out):
        if each.labels is not None:
            check_labels(each, len(names))
    extent = _extent(images, held_out)
    with runtime.seeded(how.seed):
        judge, record = sign(model, images.named(names), held_out, how, progress)
    for doubt in _doubts(images, held_out):
        log.warning("%s", doubt)
    return judge, replace(record, extent=extent)


def labelled(data: Any, name: str) -> ImageSet:
    """Return prepared images, see `covcli.data.prepared.prepared`; without labels, refuse them."""
    images = prepared(data, name)
    if images.labels is None:
        raise CovcliError(
            "has no labels", where=name, fix="yield images and class numbers of shape (N,)"
        )
    return images


def _doubts(images: ImageSet, held_out: ImageSet) -> list[str]:
    """Return what the values that were read tell against the data, one sentence each."""
    doubts = [
        f"the {each.name} images differ each time they are read: leave out random augmentation, "
        "since the images to judge have none"
        for each in (images, held_out)
        if each.source.seen.differ  # type: ignore[attr-defined]
    ]
    return doubts + copies.doubts(images, held_out)


def _extent(images: ImageSet, held_out: ImageSet) -> tuple[float, float]:
    """Return the extent of the trusted images; warn if the others seem prepared otherwise."""
    assert isinstance(images.source, PreparedSource)
    assert isinstance(held_out.source, PreparedSource)
    here, there = images.source.sample, held_out.source.sample
    if sign := prepared_otherwise(there, images.source.extent):
        log.warning("the calibration images' values are %s: prepare both alike", sign)
    elif far_apart(here, there):
        log.warning(
            "the calibration images have other mean values than the trusted ones: prepare alike"
        )
    return images.source.extent


def load_own(
    signature_file: Path,
    network: nn.Module,
    request: GuaranteeRequest,
    device: str | None,
) -> tuple[Judge, Record]:
    """Read the signature of a program's own network.

    Parameters
    ----------
    signature_file
        The signature.
    network
        The network that it was built from.
    request
        The guarantee.
    device
        The device for the computation; None does not move the network.

    Raises
    ------
    CovcliError
        If the file is not a signature of exactly this network.
    """
    runtime.check_defaults()
    network = unwrapped(network)
    check_watchable(network)
    signature, calibration, record = signatures.load(signature_file)
    here = place_of(network)
    place = here if device is None else runtime.choose_device(device)
    model = Classifier(signature.model, network).to(here)
    signature.check_model(model.eval(), signature_file)
    guarantee = calibration.guarantee.changed(request)
    return Judge.of(model.to(place), signature.to(place), calibration, guarantee), record


def _without_shared(images: ImageSet, held_out: ImageSet) -> ImageSet:
    """Return the trusted images without those used for calibration, if both share a dataset."""
    calibrating = set(_places(held_out))
    fresh = [row for row, place in enumerate(_places(images)) if place not in calibrating]
    if len(fresh) == len(images):
        return images
    if not fresh:
        raise CovcliError("every trusted image is a calibration image too", fix="hold some out")
    log.warning("%d trusted images are calibration images too: ignored", len(images) - len(fresh))
    return images.select(torch.tensor(fresh))


def _places(images: ImageSet) -> list[tuple[int, int]]:
    """Return the identity of each image's dataset, and its index there."""
    assert isinstance(images.source, PreparedSource)
    dataset: Any = images.source.dataset
    rows = images.rows.tolist()
    while isinstance(dataset, Subset):
        rows = [int(dataset.indices[row]) for row in rows]
        dataset = dataset.dataset
    tensors = isinstance(dataset, TensorDataset)
    identity = dataset.tensors[0].data_ptr() if tensors else id(dataset)
    return [(identity, row) for row in rows]
