"""train: teach a network with the ConfidenceLoss, and log what its neurons do on the way."""

import logging
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from covcli import attacks, data, engine, models, runtime, store
from covcli import checkpoint as checkpoints
from covcli.checkpoint import Checkpoint, DataRecord
from covcli.engine import Trainer
from covcli.errors import CovcliError
from covcli.fitting import fit_signature
from covcli.images import Augmentation, ImageSet
from covcli.losses import ConfidenceLoss
from covcli.methods import Method, make_method
from covcli.models import Classifier, ModelSpec
from covcli.progress import Progress, Silent
from covcli.specs import parse
from covcli.watching import Watch, watch

log = logging.getLogger(__name__)
Amp: TypeAlias = Literal["off", "bf16", "auto"]
# A running signature is built from at most so many training images, to stay cheap.
SIGNATURE_IMAGES = 10_000
WATCHED_IMAGES = 1000


@dataclass(frozen=True)
class TrainConfig:
    """What `train` is told."""

    method: str = "mrc"
    trusted: str = "cifar10"
    untrusted: tuple[str, ...] = ()
    model: str = "vgg19"
    pretrained: bool = False
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    confidence_threshold: float = 0.9
    confidence_weight: float = 0.1
    signature_every: int = 5
    calibration_split: float = 0.1
    augment: Augmentation | Literal["auto"] = "auto"
    seed: int = 0
    device: str = "cpu"
    amp: Amp = "off"
    name: str | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None


@dataclass(frozen=True)
class EpochLog:
    """One epoch of the training log; see `engine.EpochSums` for the figures of the training images.

    Attributes
    ----------
    held_out_accuracy
        Accuracy on the calibration split.
    seconds
        How long the epoch took.
    watched
        What the running signature says of trusted and untrusted images; None without `untrusted`.
    """

    epoch: int
    loss: float
    cross_entropy: float
    penalty: float
    accuracy: float
    confident_accuracy: float | None
    confident: float
    learning_rate: float
    held_out_accuracy: float
    seconds: float
    watched: Watch | None


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes
    ----------
    run, checkpoint, log
        The run folder, and in it the checkpoint and the JSON log (its pickle lies beside it).
    epochs
        One entry an epoch.
    training_images, calibration_images
        How many images trained the network, and how many were held out.
    provenance
        Versions, command line, device, seed, time.
    """

    run: Path
    checkpoint: Path
    log: Path
    epochs: list[EpochLog]
    training_images: int
    calibration_images: int
    provenance: dict[str, Any]


def train(config: TrainConfig, progress: Progress) -> TrainResult:
    """Train a network and write its run folder.

    Raises
    ------
    CovcliError
        If a setting, a name or the data is bad, the run folder exists, or training diverges.
        No run folder is left behind then.
    """
    _check(config)
    device = runtime.choose_device(config.device)
    method = make_method(config.method)
    for text in config.untrusted:
        _check_untrusted(text)
    images = data.load(config.trusted, "train", config.data_dir)
    model, classes = _model(config, images, device)
    labels = data.check_labels(images, len(classes))
    training_rows, calibration_rows = split_rows(len(images), config.calibration_split, config.seed)
    run = store.new_run(config.runs, config.name, f"{config.model.replace(':', '-')}-{method.name}")
    try:
        session = _Session(config, method, model, images, labels, training_rows, calibration_rows)
        epochs = [session.epoch(number, progress) for number in range(1, config.epochs + 1)]
        return _write(config, run, session, epochs, classes)
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        raise


def split_rows(images: int, calibration_split: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return which images train the network and which are held out, each in ascending order."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    held_out = round(images * calibration_split)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _check(config: TrainConfig) -> None:
    bounds = [
        ("--epochs", config.epochs >= 1, "at least 1"),
        ("--batch-size", config.batch_size >= 2, "at least 2"),
        ("--learning-rate", 0 < config.learning_rate < float("inf"), "above 0"),
        ("--weight-decay", 0 <= config.weight_decay < float("inf"), "at least 0"),
        ("--confidence-threshold", 0 <= config.confidence_threshold < 1, "in [0, 1)"),
        ("--confidence-weight", 0 <= config.confidence_weight < float("inf"), "at least 0"),
        ("--signature-every", config.signature_every >= 1, "at least 1"),
        ("--calibration-split", 0 <= config.calibration_split < 1, "in [0, 1)"),
    ]
    for option, holds, expected in bounds:
        if not holds:
            raise CovcliError(f"must be {expected}", where=option)


def _check_untrusted(text: str) -> None:
    spec = parse(text)
    if attacks.is_attack(spec):
        attacks.make_attack(spec)
    else:
        data.DATASETS.get(spec.name)


def _model(
    config: TrainConfig, images: ImageSet, device: torch.device
) -> tuple[Classifier, tuple[str, ...]]:
    """Build the network for the classes of the training images."""
    found = int(images.known_labels().max()) + 1
    classes = images.classes or tuple(str(k) for k in range(found))
    shape = models.input_shape(config.model, config.pretrained)
    mean, deviation = (
        models.IMAGENET if config.pretrained else models.pixel_statistics(images, shape)
    )
    spec = ModelSpec(config.model, len(classes), shape, mean, deviation, config.pretrained)
    model = models.build(spec)
    if config.pretrained:
        models.load_pretrained(model)
    return model.on(device), classes


class _Session:
    """The state of one training run between its epochs."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        model: Classifier,
        images: ImageSet,
        labels: Tensor,
        training_rows: Tensor,
        calibration_rows: Tensor,
    ) -> None:
        self.config = config
        self.method = method
        self.images = images
        self.training = images.select(training_rows)
        self.labels = labels[training_rows]
        self.calibration_rows = calibration_rows
        self.held_out = images.select(calibration_rows)
        self.how: Augmentation = (
            ("crop-flip" if images.flips else "crop")
            if config.augment == "auto"
            else config.augment
        )
        self.steps = -(-len(self.training) // config.batch_size)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(
            groups, config.learning_rate, momentum=0.9, nesterov=True,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=config.epochs * self.steps
        )
        self.trainer = Trainer(
            model, optimizer, schedule, None, config.confidence_weight, model.points("channel"),
            "channel", config.confidence_threshold, _autocast(config.amp, model),
        )  # fmt: skip

    def epoch(self, number: int, progress: Progress) -> EpochLog:
        """Train for one epoch, then look at the network from outside."""
        began = time.perf_counter()
        if number > 1 and (number - 2) % self.config.signature_every == 0:
            self._refresh_penalty(progress)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
        order = torch.randperm(len(self.training), generator=generator)
        parts = order.tensor_split(self.steps)  # of nearly equal size: none too small for a norm
        title = f"epoch {number}/{self.config.epochs}"
        sums = engine.epoch(
            self.trainer, self.training, self.labels, parts, self.how, generator, progress, title
        )
        watched = None
        if self.config.untrusted:
            watched = watch(
                self.trainer.model, self.method, self._sample(2 * WATCHED_IMAGES),
                self._untrusted_from(), self.config.untrusted, WATCHED_IMAGES,
                self.config.confidence_threshold, self.config.data_dir,
            )  # fmt: skip
        entry = EpochLog(
            epoch=number,
            held_out_accuracy=accuracy(self.trainer.model, self._untrusted_from()),
            seconds=time.perf_counter() - began,
            watched=watched,
            **asdict(sums),
        )
        progress.note(describe(entry, self.config.epochs))
        return entry

    def _refresh_penalty(self, progress: Progress) -> None:
        """Build the running signature that the next epochs are trained towards."""
        if self.config.confidence_weight == 0:
            return
        made, _, _ = fit_signature(
            self.trainer.model, self._sample(SIGNATURE_IMAGES), self._classes(), self.method,
            "channel", self.config.confidence_threshold, Silent(),
        )  # fmt: skip
        penalty = ConfidenceLoss(made.state, made.sizes)
        self.trainer = replace(self.trainer, penalty=penalty)

    def _classes(self) -> tuple[str, ...]:
        return tuple(str(k) for k in range(self.trainer.model.spec.classes))

    def _sample(self, most: int) -> ImageSet:
        """Return training images, evenly spread, at most so many."""
        step = -(-len(self.training) // most)
        return self.training.select(torch.arange(0, len(self.training), step))

    def _untrusted_from(self) -> ImageSet:
        """Return the calibration split, or training images where there is none."""
        return self.held_out if len(self.held_out) else self._sample(WATCHED_IMAGES)


def accuracy(model: Classifier, images: ImageSet) -> float:
    """Return the share of images that a network classifies correctly."""
    right = 0
    labels = images.known_labels()
    for batch in engine.sweep(model, images, [], "channel", Silent(), ""):
        right += int((batch.logits.argmax(1).cpu() == labels[batch.rows]).sum())
    return right / len(images)


def _autocast(amp: Amp, model: Classifier) -> bool:
    return amp == "bf16" or (amp == "auto" and runtime.bfloat16_pays(model, model.spec.shape))


def describe(entry: EpochLog, epochs: int) -> str:
    """Word one epoch in a line."""
    text = (
        f"epoch {entry.epoch}/{epochs}: loss {entry.loss:.4f} (cross-entropy "
        f"{entry.cross_entropy:.4f}, penalty {entry.penalty:.4f}), accuracy {entry.accuracy:.1%}, "
        f"held out {entry.held_out_accuracy:.1%}"
    )
    if entry.confident_accuracy is not None:
        text += f", confident {entry.confident:.1%} of which right {entry.confident_accuracy:.1%}"
    if entry.watched:
        shares = [f"{s.name} {s.mean_coverage:.1%}" for s in entry.watched.sets]
        text += f"; coverage {', '.join(shares)}"
    return text


def _write(
    config: TrainConfig,
    run: Path,
    session: _Session,
    epochs: list[EpochLog],
    classes: tuple[str, ...],
) -> TrainResult:
    """Write the checkpoint and the logs into the run folder, and point `latest` at it."""
    settings = store.plain(asdict(config))
    settings["bfloat16"] = session.trainer.autocast
    provenance = runtime.provenance(session.trainer.model.mean.device, config.seed)
    result = TrainResult(
        run=run,
        checkpoint=run / "checkpoint.pt",
        log=run / f"training_results_{store.timestamp()}.json",
        epochs=epochs,
        training_images=len(session.training),
        calibration_images=len(session.held_out),
        provenance=provenance,
    )
    trusted = DataRecord.of(session.images)
    checkpoints.save(
        result.checkpoint,
        Checkpoint(
            result.checkpoint, session.trainer.model, classes, trusted,
            session.calibration_rows, settings,
        ),
    )  # fmt: skip
    document = {
        "schema": store.SCHEMA,
        "provenance": provenance,
        "settings": settings,
        "data": vars(trusted),
        "training_images": result.training_images,
        "calibration_images": result.calibration_images,
        "epochs": [asdict(entry) for entry in epochs],
    }
    store.write_json(result.log, store.plain(document))
    store.write_pickle(result.log.with_suffix(".pkl"), store.plain(document))
    store.mark_latest(run)
    return result
