"""Signatures of a network that a Python program holds, of images that the program prepares."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.data.images import ImageSet
from covcli.data.prepared import PreparedSource, prepared
from covcli.models.architectures import Classifier
from covcli.models.logits import named_tensors
from covcli.models.spec import ModelSpec
from covcli.signature import signature as signatures
from covcli.signature.build import How, sign
from covcli.signature.judge import Judge
from covcli.signature.record import Record

log = logging.getLogger(__name__)


def own_classifier(
    network: nn.Module,
    images: ImageSet,
    classes: Sequence[str] = (),
    logits: str = "",
    points: Sequence[str] = (),
) -> tuple[Classifier, tuple[str, ...]]:
    """Return a program's network as a classifier of images that are prepared already.

    Parameters
    ----------
    network
        The network; it is not copied, and stays where it is.
    images
        Prepared images.
    classes
        Class names; by default those of the dataset, or numbers.
    logits, points
        See `covcli.training.config.TrainConfig`.

    Returns
    -------
    tuple
        The classifier, and the class names.
    """
    source = images.source
    assert isinstance(source, PreparedSource)
    shape = tuple(source.sample.shape[1:])
    count = len(classes) or _count(network, source.sample[:2], images.labels, logits)
    spec = ModelSpec.own(network, count, (shape[0], shape[1], shape[2]), logits)
    model = Classifier(spec, network).to(place_of(network))
    model.watched = tuple(points)
    names = tuple(classes) or images.classes
    return model, names if len(names) == count else tuple(str(k) for k in range(count))


def place_of(network: nn.Module) -> torch.device:
    """Return where a network lies."""
    weights = [*network.parameters(), *network.buffers()]
    return weights[0].device if weights else torch.device("cpu")


def _count(network: nn.Module, images: Tensor, labels: Tensor | None, logits: str) -> int:
    """Return how many classes a network tells apart, by what it returns of two images."""
    training = [module for module in network.modules() if module.training]
    try:
        with torch.no_grad():
            output = network.eval()(images.to(place_of(network)))
    finally:
        for module in training:
            module.training = True
    tensors = dict(named_tensors(output))
    rows = {name: t for name, t in tensors.items() if t.ndim >= 2 and len(t) == len(images)}
    if logits in rows:
        return rows[logits].shape[1]
    named = [t for name, t in rows.items() if name.split(".")[-1] == "logits"]
    least = 1 if labels is None else int(labels.max()) + 1
    sizes = {t.shape[1] for t in named or rows.values() if t.shape[1] >= least}
    if len(sizes) != 1:
        raise CovcliError(
            "it cannot be told how many classes the network has", fix="name them by classes="
        )
    return sizes.pop()


def build_own(
    network: nn.Module,
    trusted: Any,
    calibration: Any,
    how: How,
    progress: Progress,
    *,
    classes: Sequence[str] = (),
    logits: str = "",
    points: Sequence[str] = (),
) -> tuple[Judge, Record]:
    """Build and calibrate the signature of a network that a program holds.

    Parameters
    ----------
    network
        Maps prepared images to logits.
    trusted, calibration
        Prepared images, see `covcli.data.prepared.prepared`: those that trained the network, and
        others, which calibrate.
    how
        How the signature is made.
    classes, logits, points
        See `own_classifier`.

    Raises
    ------
    CovcliError
        If the data or the network is of another kind, or as `covcli.build_signature` says.
    """
    images, held_out = prepared(trusted, "trusted"), prepared(calibration, "calibration")
    images.known_labels()
    images = _without_shared(images, held_out)
    model, names = own_classifier(network, images, classes, logits, points)
    with runtime.seeded(how.seed):
        return sign(model, images.named(names), held_out, how, progress)


def load_own(
    signature_file: Path,
    network: nn.Module,
    wanted: Any,
    device: str | None,
) -> tuple[Judge, Record]:
    """Read the signature of a network that a program holds.

    Parameters
    ----------
    wanted
        Maps the signature's guarantee to the one to keep.
    device
        Where to compute; None leaves the network where it is.

    Raises
    ------
    CovcliError
        If the file is no signature of exactly this network.
    """
    signature, calibration, record = signatures.load(signature_file)
    place = place_of(network) if device is None else runtime.choose_device(device)
    model = Classifier(signature.model, network)
    signature.check_model(model.eval(), signature_file)
    guarantee = wanted(calibration.guarantee)
    return Judge.of(model.to(place), signature.to(place), calibration, guarantee), record


def _without_shared(images: ImageSet, held_out: ImageSet) -> ImageSet:
    """Leave out trusted images that calibrate too, where both come from one dataset."""
    calibrating = set(_places(held_out))
    fresh = [row for row, place in enumerate(_places(images)) if place not in calibrating]
    if len(fresh) == len(images):
        return images
    if not fresh:
        raise CovcliError("every trusted image calibrates too", fix="hold some of them out")
    log.warning("%d trusted images calibrate too: left out", len(images) - len(fresh))
    return images.select(torch.tensor(fresh))


def _places(images: ImageSet) -> list[tuple[int, int]]:
    """Return for each image which dataset it comes from, and its number there."""
    assert isinstance(images.source, PreparedSource)
    dataset: Any = images.source.dataset
    rows = images.rows.tolist()
    while isinstance(dataset, Subset):
        rows = [int(dataset.indices[row]) for row in rows]
        dataset = dataset.dataset
    tensors = isinstance(dataset, TensorDataset)
    identity = dataset.tensors[0].data_ptr() if tensors else id(dataset)
    return [(identity, row) for row in rows]
