"""build_signature: compute a method's state over trusted images, and calibrate its scores."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from covcli.core import distributed, files, run_folders, runtime
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress, Silent
from covcli.data import copies, datasets, image_files, labels
from covcli.data.images import DataRecord, ImageSet
from covcli.methods import Method, make_method
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier, architecture
from covcli.models.checkpoint import Checkpoint
from covcli.models.spec import ModelSpec
from covcli.models.sweep import choose_precision
from covcli.models.weights import Foreign
from covcli.reporting.terminal import say
from covcli.signature import signature as signatures
from covcli.signature.calibration import check_images
from covcli.signature.config import SignatureConfig
from covcli.signature.fit import MINIMUM_TRUSTED, How, Trusted, fit_judge, fit_signature
from covcli.signature.guarantee import Guarantee
from covcli.signature.judge import Judge
from covcli.signature.record import Record, less
from covcli.signature.signature import weights_bytes

log = logging.getLogger(__name__)
DEFAULT_METHOD = "ensemble"
# The accuracy on trusted images below which a network is asked to have seen others in training.
PLAUSIBLE = 0.75


@dataclass(frozen=True)
class SignatureResult:
    """The result of `build-signature` or `merge-signatures`.

    Attributes
    ----------
    path
        The signature's file.
    method
        The method's specification.
    images
        The number of images read to build it.
    accuracy
        The network's accuracy on them, in [0, 1].
    trusted
        The number of them that define the signature, by class name.
    relaxed
        Names of classes with too few confident images, where all correct ones were used.
    calibration_images
        The number of held-out calibration images; three in four of them rank scores.
    unreadable_images
        The number of files skipped because they cannot be read.
    guarantee
        The guarantee that the signature stores.
    points, neurons
        The number of coverage points, and of all their neurons.
    precision
        The precision of the network's computation: "float32" or "bfloat16".
    bytes, weights_bytes
        The sizes of the file and of the network's weights, in bytes.
    mergeable
        Whether the file holds what `merge-signatures` needs.
    checkpoint_fingerprint, signature_fingerprint
        The fingerprint of the weights, and the digest of the signature's file.
    data, calibration_data
        The records of the trusted images and of the calibration images.
    provenance
        Versions, command line, device, threads, seed and time.

    Examples
    --------
    >>> from covcli import SignatureConfig
    >>> config = SignatureConfig("runs/latest/checkpoint.pt", "src", trusted="digits?limit=300")
    >>> result = build_signature(config)
    >>> result.method, result.points, result.neurons, len(result.trusted)
    ('src', 3, 80, 10)
    """

    path: Path
    method: str
    images: int
    accuracy: float
    trusted: dict[str, int]
    relaxed: list[str]
    calibration_images: int
    guarantee: Guarantee
    points: int
    neurons: int
    precision: str
    bytes: int
    weights_bytes: int
    mergeable: bool
    checkpoint_fingerprint: str
    signature_fingerprint: str
    data: DataRecord
    calibration_data: DataRecord
    provenance: dict[str, Any]
    unreadable_images: int = 0


def build_signature(config: SignatureConfig, progress: Progress = Silent()) -> SignatureResult:
    """Build, calibrate and write the signature of a checkpoint.

    Parameters
    ----------
    config
        The settings.
    progress
        Receives the progress; by default it is not shown.

    Raises
    ------
    CovcliError
        If a file, a name or the data is invalid, a class has no correctly classified image, the
        calibration images are too few for the guarantee, or the output exists already or is being
        written.

    Examples
    --------
    >>> from covcli import SignatureConfig, build_signature
    >>> result = build_signature(SignatureConfig("runs/latest/checkpoint.pt", method="src"))
    >>> result.path, result.points
    (PosixPath('runs/demo/signature-src.safetensors'), 3)
    """
    _check_names(config)
    foreign = Foreign(config.model, config.statistics, config.preprocess, config.logits)
    source = checkpoints.load(config.checkpoint, foreign)
    method = make_method(config.method or str(source.training.get("method", DEFAULT_METHOD)))
    path = distributed.agree(config.output or _default_path(config, source, method))
    with run_folders.writing(path, config.force) if distributed.is_first() else nullcontext():
        return _build(config, source, method, path, progress)


def _check_names(config: SignatureConfig) -> None:
    """Raise a CovcliError if a name is unknown, before anything is read."""
    if config.method is not None:
        make_method(config.method)
    if config.model is not None:
        architecture(config.model)
    for text in (config.trusted, config.calibration):
        if text is not None:
            datasets.check_name(text)


def _build(
    config: SignatureConfig, source: Checkpoint, method: Method, path: Path, progress: Progress
) -> SignatureResult:
    device = runtime.choose_device(config.device)
    default_threshold = float(source.training.get("confidence_threshold", 0.9))
    threshold = (
        default_threshold if config.confidence_threshold is None else config.confidence_threshold
    )
    guarantee = Guarantee(config.alpha, config.guarantee, config.max_error)
    how = How(method, config.granularity, threshold, guarantee, config.seed, config.mergeable)
    images, held_out = _images(config, source)
    model = source.model.on(device)
    model.watched = config.points or tuple(source.training.get("points", ()))
    model.precision = choose_precision(config.amp, model, torch.inference_mode()(model))
    if source.bare:
        log.info("an image becomes an input by --preprocess %s", _preprocessing(model.spec))
    judge, record = sign(model, images, held_out, how, progress)
    if source.bare and record.accuracy < PLAUSIBLE:
        log.warning(
            "only %.0f%% of the trusted images are classified rightly: were they prepared as in "
            "training? --preprocess (now %s), --mean and --std say how",
            100 * record.accuracy, _preprocessing(model.spec),
        )  # fmt: skip
    imported = config.output is None and source.bare and distributed.is_first()
    if imported:
        _import(path.parent, source, images.classes)
    result = save(path, judge, record.sealed(judge.signature.fingerprint))
    listed = path.with_name("unreadable-build-signature.txt")
    skipped = image_files.list_unreadable(listed, [images, held_out])
    result = replace(result, unreadable_images=skipped)
    if imported:
        run_folders.mark_latest(path.parent)
    return result


def _preprocessing(spec: ModelSpec) -> str:
    return spec.preprocess.describe(spec.shape)


def sign(
    model: Classifier, images: ImageSet, held_out: ImageSet, how: How, progress: Progress
) -> tuple[Judge, Record]:
    """Build a signature from trusted images, and calibrate it on held-out images.

    Parameters
    ----------
    model
        The network.
    images
        The trusted images; their class names become those of the signature.
    held_out
        The calibration images.
    how
        The method and its settings.
    progress
        Receives the progress.

    Raises
    ------
    CovcliError
        If a class has no correctly classified image, or the calibration images are too few for the
        guarantee.
    """
    classes = images.classes
    check_images(len(held_out), how.guarantee, len(classes))
    signature, trusted, accuracy = fit_signature(model, images, how, progress)
    _check_trusted(trusted, images, classes, how.threshold)
    judge = fit_judge(model, signature, held_out, progress, how.guarantee, how.seed)
    provenance = runtime.provenance(model.mean.device, how.seed)
    record = Record(
        trusted=DataRecord.of(images),
        trusted_images=len(images),
        trusted_counts=tuple(trusted.counts),
        relaxed_classes=tuple(trusted.relaxed),
        confidence_threshold=how.threshold,
        accuracy=accuracy,
        calibration=DataRecord.of(held_out),
        calibration_images=len(held_out),
        calibration_rows=tuple(held_out.rows.tolist()),
        provenance=distributed.agree(provenance),
    )
    return judge, record


def save(path: Path, judge: Judge, record: Record) -> SignatureResult:
    """Write a judge's signature on the first rank, and return the result on all ranks."""
    signature, written = judge.signature, None
    if distributed.is_first():
        signatures.save(path, signature, judge.calibration, record)
        written = path.stat().st_size, files.digest_file(path)
    size, digest = distributed.agree(written) or (0, "")
    return SignatureResult(
        path=path,
        method=signature.method.spec(),
        images=record.trusted_images,
        accuracy=record.accuracy,
        trusted=dict(zip(signature.classes, record.trusted_counts, strict=True)),
        relaxed=[signature.classes[k] for k in record.relaxed_classes],
        calibration_images=record.calibration_images,
        guarantee=judge.calibration.guarantee,
        points=len(signature.points),
        neurons=sum(signature.sizes),
        precision=signature.precision,
        bytes=size,
        weights_bytes=weights_bytes(judge.model),
        mergeable=signature.mergeable,
        checkpoint_fingerprint=signature.fingerprint,
        signature_fingerprint=digest,
        data=record.trusted,
        calibration_data=record.calibration,
        provenance=record.provenance,
    )


def _check_trusted(
    trusted: Trusted, images: ImageSet, classes: tuple[str, ...], threshold: float
) -> None:
    """Raise a CovcliError if a class has no trusted image; warn about relaxed classes."""
    for k, n in enumerate(trusted.counts):
        if n == 0:
            raise CovcliError(
                f"class {k} ({classes[k]}) has no correctly classified image among {len(images)}",
                where=images.name,
                fix="train longer, or read more images",
            )
    if trusted.relaxed:
        names = [classes[k] for k in trusted.relaxed]
        log.warning(
            "fewer than %d images have a confidence of %g or more, all correct ones are used: %s",
            MINIMUM_TRUSTED, threshold, labels.listed("class", names),
        )  # fmt: skip


def _images(config: SignatureConfig, source: Checkpoint) -> tuple[ImageSet, ImageSet]:
    """Load the images for building and for calibration; the two sets are disjoint."""
    images, held_out = _trusted_images(config, source), _held_out_images(config, source)
    images = less(images, held_out.source.fingerprint, held_out.rows)
    if len(images) == 0:
        raise CovcliError("holds only images that are used for calibration", where=images.name)
    count = source.model.spec.classes
    classes = labels.adopted(images, count) if source.bare else source.classes
    for doubt in copies.doubts(images, held_out):
        log.warning("%s", doubt)
    if held_out.labels is not None:
        held_out = labels.matched(held_out, classes).said()
    return labels.matched(images, classes).said(), held_out


def _trusted_images(config: SignatureConfig, source: Checkpoint) -> ImageSet:
    """Load the named trusted images, or those of the training."""
    if config.trusted is not None:
        return datasets.load(config.trusted, "train", config.data_dir)
    if source.trusted is None:
        raise CovcliError("name the --trusted images", where=source.path)
    fix = f"name it by --trusted {source.trusted.spec}"
    return datasets.reload(source.trusted, "train", config.data_dir, fix)


def _held_out_images(config: SignatureConfig, source: Checkpoint) -> ImageSet:
    """Load the named calibration images, or those that the training held out."""
    if config.calibration is not None:
        return datasets.load(config.calibration, "test", config.data_dir)
    if source.trusted is None or not len(source.calibration_rows):
        raise CovcliError(
            "records no calibration split",
            where=source.path,
            fix="name trusted images that did not train the network by --calibration SPEC",
        )
    fix = "name held-out images by --calibration"
    trained = datasets.reload(source.trusted, "train", config.data_dir, fix, [config.trusted])
    if trained.fingerprint != source.trusted.images:
        raise CovcliError(
            "is no longer the data that the network was trained on",
            where=source.trusted.spec,
            fix="restore it, or name held-out images by --calibration",
        )
    return trained.select(source.calibration_rows)


def _default_path(config: SignatureConfig, source: Checkpoint, method: Method) -> Path:
    """Return a path beside the checkpoint; for weights trained elsewhere, in a new run folder."""
    name = f"signature-{method.name}.safetensors"
    if not source.bare:
        return run_folders.short(source.path.parent) / name
    return config.runs / f"{source.path.stem}-{run_folders.timestamp()}" / name


def _import(folder: Path, source: Checkpoint, classes: tuple[str, ...]) -> None:
    """Write a checkpoint of weights trained elsewhere, so that their run folder is complete."""
    checkpoint = Checkpoint(
        folder / "checkpoint.pt", source.model, classes, None, source.calibration_rows, {}
    )
    checkpoints.save(checkpoint.path, checkpoint)


def describe_signature(result: "SignatureResult") -> None:
    """Print a summary of build-signature on stderr; stdout receives only the path."""
    say(
        f"{result.method}: {sum(result.trusted.values())} trusted of {result.images} images "
        f"(accuracy {result.accuracy:.1%}), {result.points} coverage points, {result.neurons} "
        f"neurons, {result.calibration_images} calibration images, {result.guarantee.mode} "
        f"α = {result.guarantee.alpha:g}, {result.bytes / 1e6:.2f} MB "
        f"({result.bytes / max(1, result.weights_bytes):.1%} of the weights)"
    )
