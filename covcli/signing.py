"""build_signature: fold a method's state over trusted images and calibrate its scores."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np
import torch
from torch import Tensor

from covcli import checkpoint as checkpoints
from covcli import data, runtime, signature, store
from covcli.activations import Granularity, Point
from covcli.calibration import Calibration, calibrate, softmax_score
from covcli.checkpoint import Checkpoint, DataRecord
from covcli.engine import Swept, sweep
from covcli.errors import CovcliError
from covcli.images import ImageSet
from covcli.methods import Method, State, make_method
from covcli.models import Classifier, Statistics
from covcli.progress import Progress
from covcli.signature import Signature

log = logging.getLogger(__name__)
MINIMUM_TRUSTED = 10
SPILL_BYTES = 8 << 30
DEFAULT_METHOD = "mrc"


class Recording(AbstractContextManager["Recording"]):
    """A set's predictions, and its neurons to go over as often as a method asks.

    The network runs once; the neurons spill into a nameless temporary file, so that memory stays
    flat. Where they would take more than 8 GiB or half of the free disk (units of large images),
    every pass runs the network again.
    """

    def __init__(
        self,
        model: Classifier,
        images: ImageSet,
        points: list[Point],
        granularity: Granularity,
        progress: Progress,
    ) -> None:
        self._sweep = lambda title: sweep(model, images, points, granularity, progress, title)
        self._width = sum(point.neurons for point in points)
        self._device = model.mean.device
        wanted = 4 * self._width * len(images)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        fits = wanted <= min(SPILL_BYTES, free // 2)
        self._file = cast(BinaryIO, tempfile.TemporaryFile()) if fits else None  # noqa: SIM115
        self._sizes: list[int] = []
        predicted, confidence = [], []
        for batch in self._sweep("reading trusted images"):
            sure, best = batch.logits.softmax(1).max(1)
            predicted.append(best.cpu())
            confidence.append(sure.cpu())
            self._spill(batch)
        self.predicted = torch.cat(predicted)
        self.confidence = torch.cat(confidence)

    def _spill(self, batch: Swept) -> None:
        self._sizes.append(len(batch.rows))
        if self._file is not None:
            self._file.write(batch.neurons.float().cpu().contiguous().numpy().data)

    def passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows and neurons of each batch, in the set's order."""
        if self._file is None:
            for batch in self._sweep("reading trusted images again"):
                yield batch.rows, batch.neurons
            return
        self._file.seek(0)
        start = 0
        for size in self._sizes:
            buffer = np.fromfile(self._file, np.float32, size * self._width)
            neurons = torch.from_numpy(buffer).view(size, self._width).to(self._device)
            yield torch.arange(start, start + size), neurons
            start += size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def fold(
    method: Method,
    classes: int,
    neurons: int,
    passes: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    device: torch.device | None = None,
) -> State:
    """Go over the trusted data as often as the method asks, and return its complete state.

    Parameters
    ----------
    passes
        Starts one pass, which yields neurons (B, N) and labels (B,).
    """
    state: State | None = method.begin(classes, neurons).to(device or torch.device("cpu"))
    while state is not None:
        complete = state
        for values, labels in passes():
            method.observe(complete, values, labels)
        state = method.proceed(complete)
    return complete


@dataclass(frozen=True)
class Trusted:
    """Which images define the signature.

    Attributes
    ----------
    chosen
        bool of shape (N,).
    counts
        How many of each class.
    relaxed
        Classes with fewer than 10 confident images, for which all correct ones were taken.
    """

    chosen: Tensor
    counts: list[int]
    relaxed: list[int]


def choose_trusted(
    labels: Tensor, predicted: Tensor, confidence: Tensor, threshold: float, classes: int
) -> Trusted:
    """Choose the images that are classified correctly with a confidence of at least a threshold."""
    correct = predicted == labels
    chosen = correct & (confidence >= threshold)
    relaxed = []
    for k in range(classes):
        mine = labels == k
        if int((chosen & mine).sum()) < MINIMUM_TRUSTED and bool((correct & mine & ~chosen).any()):
            chosen = chosen | (correct & mine)
            relaxed.append(k)
    counts = torch.bincount(labels[chosen], minlength=classes)
    return Trusted(chosen, counts.tolist(), relaxed)


def fit_signature(
    model: Classifier,
    images: ImageSet,
    classes: tuple[str, ...],
    method: Method,
    granularity: Granularity,
    threshold: float,
    progress: Progress,
) -> tuple[Signature, Trusted, float]:
    """Build a signature in memory; return it, what it was built from, and the accuracy there.

    Raises
    ------
    CovcliError
        If labels are missing or out of range, or an activation is not finite.
    """
    labels = data.check_labels(images, model.spec.classes)
    points = model.points(granularity)
    device = model.mean.device
    with Recording(model, images, points, granularity, progress) as recording:
        trusted = choose_trusted(
            labels, recording.predicted, recording.confidence, threshold, len(classes)
        )

        def passes() -> Iterator[tuple[Tensor, Tensor]]:
            for rows, neurons in recording.passes():
                kept = trusted.chosen[rows]
                yield neurons[kept.to(device)], labels[rows[kept]].to(device)

        width = sum(point.neurons for point in points)
        state = fold(method, len(classes), width, passes, device)
        accuracy = float((recording.predicted == labels).double().mean())
    made = Signature(
        method, granularity, tuple(points), state, model.spec,
        store.fingerprint(model.state_dict()), classes,
    )  # fmt: skip
    return made, trusted, accuracy


def fit_calibration(
    model: Classifier, made: Signature, images: ImageSet, progress: Progress
) -> Calibration:
    """Score calibration images against their predicted classes, and calibrate on them."""
    costs, softmax = [], []
    for batch in sweep(
        model, images, made.points, made.granularity, progress, "reading calibration images"
    ):
        costs.append(made.point_costs(batch.neurons, batch.logits.argmax(1)).cpu())
        softmax.append(softmax_score(batch.logits.cpu()))
    return calibrate(torch.cat(costs), made.sizes, torch.cat(softmax))


@dataclass(frozen=True)
class SignatureConfig:
    """What `build-signature` is told; `None` takes the checkpoint's own."""

    checkpoint: Path
    method: str | None = None
    granularity: Granularity = "channel"
    trusted: str | None = None
    calibration: str | None = None
    confidence_threshold: float | None = None
    model: str | None = None
    statistics: tuple[Statistics, Statistics] | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None
    output: Path | None = None
    force: bool = False
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class SignatureResult:
    """What `build-signature` did.

    Attributes
    ----------
    path
        The signature's file.
    method
        The method's specification.
    images
        How many images were read to build it.
    accuracy
        The network's accuracy on them.
    trusted
        How many of them, by class name, define the signature.
    relaxed
        Names of classes where confident images were too few, so that all correct ones count.
    calibration_images
        How many images were held out to calibrate; three in four of them rank scores.
    points, neurons
        Coverage points, and neurons in all of them.
    bytes
        The file's size.
    provenance
        Versions, command line, device, seed, time.
    """

    path: Path
    method: str
    images: int
    accuracy: float
    trusted: dict[str, int]
    relaxed: list[str]
    calibration_images: int
    points: int
    neurons: int
    bytes: int
    provenance: dict[str, Any]


def build_signature(config: SignatureConfig, progress: Progress) -> SignatureResult:
    """Build, calibrate and write the signature of a checkpoint.

    Raises
    ------
    CovcliError
        If a file, a name or the data is bad, a class has no correctly classified image, or the
        output exists already.
    """
    device = runtime.choose_device(config.device)
    source = checkpoints.load(config.checkpoint, config.model, config.statistics)
    training = source.training
    method = make_method(config.method or str(training.get("method", DEFAULT_METHOD)))
    default_threshold = float(training.get("confidence_threshold", 0.9))
    threshold = (
        default_threshold if config.confidence_threshold is None else config.confidence_threshold
    )
    images, held_out = _images(config, source)
    classes = _class_names(source, images)
    path = config.output or _default_path(config, source, method)
    if path.exists() and not config.force:
        raise CovcliError("exists", where=path, fix="pass --force, or another --output")
    model = source.model.to(device, memory_format=torch.channels_last)
    made, trusted, accuracy = fit_signature(
        model, images, classes, method, config.granularity, threshold, progress
    )
    for k, n in enumerate(trusted.counts):
        if n == 0:
            raise CovcliError(
                f"class {k} ({classes[k]}) has no correctly classified image among {len(images)}",
                where=images.name,
                fix="train longer, or read more images",
            )
    for k in trusted.relaxed:
        log.warning(
            "class %s has fewer than %d images of confidence %g: all correct ones are trusted",
            classes[k], MINIMUM_TRUSTED, threshold,
        )  # fmt: skip
    calibration = fit_calibration(model, made, held_out, progress)
    provenance = runtime.provenance(device, config.seed)
    record = {
        "trusted": vars(DataRecord.of(images)),
        "trusted_images": len(images),
        "trusted_counts": trusted.counts,
        "relaxed_classes": trusted.relaxed,
        "confidence_threshold": threshold,
        "accuracy": accuracy,
        "calibration": vars(DataRecord.of(held_out)),
        "calibration_images": len(held_out),
        "calibration_rows": held_out.rows.tolist(),
        "provenance": provenance,
    }
    if config.output is None and source.bare:
        _import(path.parent, source, classes)
    signature.save(path, made, calibration, record)
    if config.output is None and source.bare:
        store.mark_latest(path.parent)
    return SignatureResult(
        path=path,
        method=method.spec(),
        images=len(images),
        accuracy=accuracy,
        trusted=dict(zip(classes, trusted.counts, strict=True)),
        relaxed=[classes[k] for k in trusted.relaxed],
        calibration_images=len(held_out),
        points=len(made.points),
        neurons=sum(made.sizes),
        bytes=path.stat().st_size,
        provenance=provenance,
    )


def _images(config: SignatureConfig, source: Checkpoint) -> tuple[ImageSet, ImageSet]:
    """Load the images that build the signature and those that calibrate it, with none in both."""
    text = config.trusted or (source.trusted.spec if source.trusted else None)
    if text is None:
        raise CovcliError("name the --trusted images", where=source.path)
    images = data.load(text, "train", config.data_dir)
    if config.calibration is not None:
        held_out = data.load(config.calibration, "test", config.data_dir)
    elif source.trusted is not None and len(source.calibration_rows):
        trained = data.load(source.trusted.spec, "train", config.data_dir)
        if trained.fingerprint != source.trusted.images:
            raise CovcliError(
                "is no longer the data that the network was trained on",
                where=source.trusted.spec,
                fix="restore it, or name held-out images by --calibration",
            )
        held_out = trained.select(source.calibration_rows)
    else:
        raise CovcliError(
            "records no calibration split",
            where=source.path,
            fix="name trusted images that did not train the network by --calibration SPEC",
        )
    if images.source.fingerprint() == held_out.source.fingerprint():
        images = images.select(torch.nonzero(~torch.isin(images.rows, held_out.rows))[:, 0])
    if len(images) == 0:
        raise CovcliError("leaves no image that does not calibrate", where=text)
    return images, held_out


def _class_names(source: Checkpoint, images: ImageSet) -> tuple[str, ...]:
    if source.bare and len(images.classes) == source.model.spec.classes:
        return images.classes
    return source.classes


def _default_path(config: SignatureConfig, source: Checkpoint, method: Method) -> Path:
    """Beside the checkpoint; for weights trained elsewhere, in a run folder of their own."""
    name = f"signature-{method.name}.safetensors"
    if not source.bare:
        return source.path.resolve().parent / name
    return config.runs / f"{source.path.stem}-{store.timestamp()}" / name


def _import(folder: Path, source: Checkpoint, classes: tuple[str, ...]) -> None:
    """Write a checkpoint of weights trained elsewhere, so that their run folder is whole."""
    made = Checkpoint(
        folder / "checkpoint.pt", source.model, classes, None, source.calibration_rows, {}
    )
    checkpoints.save(made.path, made)
