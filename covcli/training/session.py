"""The state of a training run: its epochs, and how it is saved and restored."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covcli.attacks import attacks
from covcli.core import distributed, files, runtime, settings
from covcli.core.choices import Augmentation
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress, Silent
from covcli.core.signals import Interrupts
from covcli.core.specs import parse
from covcli.data import datasets, labels
from covcli.data.images import DataRecord, ImageSet
from covcli.methods import State, make_method
from covcli.models import architectures
from covcli.models.architectures import Classifier, ModelSpec
from covcli.models.sweep import choose_precision, sweep
from covcli.reporting.documents import EpochLog, Watch
from covcli.signature.fit import How, fit_signature
from covcli.signature.signature import layout_of
from covcli.training import position
from covcli.training.config import TrainConfig, save_interval
from covcli.training.epoch import SUMS, Trainer, epoch
from covcli.training.loss import RUNNING, SIGNATURE_IMAGES, ConfidenceLoss
from covcli.training.paused import PAUSED, PAUSED_FILE
from covcli.training.watch import watch

WATCHED_IMAGES = 1000


class Session:
    """The network, the data and the position of a training run.

    Parameters
    ----------
    config
        The settings.
    images
        The trusted images; the calibration split is held out from training.
    ran_in
        The working directory in which the run was started.

    Raises
    ------
    CovcliError
        If the labels, a name or an untrusted set is invalid.
    """

    def __init__(self, config: TrainConfig, images: ImageSet, ran_in: Path | None = None) -> None:
        self.config = config
        self.ran_in = ran_in or Path.cwd()
        self.method = make_method(config.method)
        images = labels.taught(images).said()
        self.images, self.classes = images, images.classes
        training_rows, self.calibration_rows = split_rows(
            len(images), config.calibration_split, config.seed
        )
        device = runtime.choose_device(config.device)
        model = _model(config, images, device)
        self.training = images.select(training_rows)
        self.labels = self.training.known_labels()
        self.held_out = images.select(self.calibration_rows)
        self.untrusted = _untrusted(config, ran_in)
        self.how = _augmentation(config, images)
        self.steps = _steps(len(self.training), config.batch_size)
        _check_ranks(config.batch_size, len(self.training) // self.steps)
        self.trainer = _trainer(config, model, self.steps)
        self.running: State | None = None  # the state of the running signature
        self.history: list[EpochLog] = []
        self.generator = torch.Generator()
        self.step = 0  # within the epoch
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64)

    def run(self, run: Path, progress: Progress, interrupts: Interrupts) -> None:
        """Train from the current position to the end, saving regularly and at the end."""
        saver = _Saver(self.config.save_every, lambda: self.save(run / PAUSED_FILE))
        while len(self.history) < self.config.epochs:
            self._epoch(progress, interrupts, saver)
        self.save(run / PAUSED_FILE)  # so that the training is kept if writing results fails

    def _epoch(self, progress: Progress, interrupts: Interrupts, saver: "_Saver") -> None:
        """Train for the rest of an epoch, then measure the network and log the epoch."""
        began = time.perf_counter()
        number = len(self.history) + 1
        since = number - first_penalised(self.config.epochs)
        due = since >= 0 and since % self.config.signature_every == 0
        if self.step == 0 and due and self.config.confidence_weight > 0:
            self._refresh_penalty()
        self._take_steps(number, progress, interrupts, saver)
        entry = self._log(number, self._watch(), time.perf_counter() - began)
        with interrupts.deferred():  # so that the position is updated completely
            self.history.append(entry)
            self.step = 0
            self.sums = torch.zeros_like(self.sums)
        progress.note(describe(entry, self.config.epochs))
        if number < self.config.epochs:
            saver.after_epoch()

    def _take_steps(
        self, number: int, progress: Progress, interrupts: Interrupts, saver: "_Saver"
    ) -> None:
        """Take the remaining steps of an epoch, whose seed determines the order of the images."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
        order = torch.randperm(len(self.training), generator=generator)
        parts = order.tensor_split(self.steps)  # of nearly equal size, for normalisation layers
        if self.step == 0:
            self.generator = generator
        progress.start(f"epoch {number}/{self.config.epochs}", len(self.training))
        progress.advance(sum(len(part) for part in parts[: self.step]))
        remaining = parts[self.step :]
        with interrupts.deferred():  # a signal takes effect after the step
            steps = epoch(
                self.trainer, self.training, self.labels, remaining, self.how, self.generator
            )
            for part, sums in zip(remaining, steps, strict=True):
                self.sums += sums
                self.step += 1
                progress.advance(len(part))
                interrupts.check()
                if self.step < self.steps:
                    saver.after_step()

    def _log(self, number: int, watched: Watch | None, seconds: float) -> EpochLog:
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        n, confident = len(self.training), sums["confident"]
        return EpochLog(
            epoch=number,
            loss=sums["loss"] / n,
            cross_entropy=sums["cross_entropy"] / n,
            penalty=sums["penalty"] / n,
            accuracy=sums["right"] / n,
            confident_accuracy=sums["confident_right"] / confident if confident else None,
            confident=confident / n,
            learning_rate=float(self.trainer.schedule.get_last_lr()[0]),
            held_out_accuracy=accuracy(self.trainer.model, self._trusted_apart()),
            seconds=seconds,
            watched=watched,
        )

    def _watch(self) -> Watch | None:
        if not self.untrusted:
            return None
        how = How(self.method, threshold=self.config.confidence_threshold)
        training = self.training.spread(2 * WATCHED_IMAGES)
        held_out, model = self._trusted_apart(), self.trainer.model
        return watch(model, how, training, held_out, self.untrusted, WATCHED_IMAGES)

    def _refresh_penalty(self) -> None:
        """Build the running signature, which the penalty of the next epochs uses."""
        images = self.training.spread(SIGNATURE_IMAGES)
        how = How(RUNNING, threshold=self.config.confidence_threshold)
        signature, _, _ = fit_signature(self.trainer.model, images, how, Silent())
        self._train_towards(signature.state)

    def _train_towards(self, state: State) -> None:
        self.running = state
        sizes = [point.neurons for point in self.trainer.points]
        self.trainer = replace(self.trainer, penalty=ConfidenceLoss(state, sizes))

    def _trusted_apart(self) -> ImageSet:
        """Return the calibration split, or training images if there is none."""
        return self.held_out if len(self.held_out) else self.training.spread(WATCHED_IMAGES)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, for the log."""
        return {**files.plain(asdict(self.config)), "precision": self.trainer.model.precision}

    def save(self, path: Path) -> None:
        """Write the state for `restore`, on the first rank."""
        if not distributed.is_first():
            return
        running = self.running
        content = {
            "settings": self.settings(),
            "threads": torch.get_num_threads(),
            "trusted": DataRecord.of(self.images).images,
            "ran_in": str(self.ran_in),
            "model": self.trainer.model.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "schedule": self.trainer.schedule.state_dict(),
            "running": None if running is None else running.tensors,
            "reductions": None if running is None else running.reductions,
            "history": [asdict(entry) for entry in self.history],
            "step": self.step,
            "sums": self.sums,
            "generator": self.generator.get_state(),
        }
        PAUSED.save(path, content)

    def restore(self, content: Mapping[str, Any], path: Path) -> None:
        """Restore the state of a saved session.

        Raises
        ------
        CovcliError
            If the data has changed, or the file is inconsistent.
        """
        if content.get("trusted") != DataRecord.of(self.images).images:
            raise CovcliError(
                "is no longer the data that the run started with", where=self.images.name
            )
        try:
            position.check(content, self.trainer, self.steps, self.config.epochs)
            self.trainer.model.load_state_dict(content["model"])
            self.trainer.optimizer.load_state_dict(content["optimizer"])
            self.trainer.schedule.load_state_dict(content["schedule"])
            self.trainer.model.precision = architectures.precision(content["settings"]["precision"])
            if content["running"] is not None:
                layout = layout_of(self.trainer.points, self.trainer.model.spec.classes)
                state = State(layout, dict(content["running"]), dict(content["reductions"]))
                self._train_towards(state.to(self.trainer.model.mean.device))
            self.history = [settings.read(EpochLog, entry) for entry in content["history"]]
            self.step = int(content["step"])
            self.sums = content["sums"]
            self.generator.set_state(content["generator"])
            torch.set_num_threads(int(content["threads"]))
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError,
                ArithmeticError) as error:  # fmt: skip
            raise CovcliError(f"is inconsistent ({error})", where=path) from None


class _Saver:
    """Saves a run regularly, by epochs or by minutes."""

    def __init__(self, every: str, save: Callable[[], None]) -> None:
        self._save = save
        self._epochs, self._seconds = save_interval(every) or (1, None)
        self._done = 0
        self._last = time.monotonic()

    def after_step(self) -> None:
        """Save if the minutes have passed."""
        if self._seconds is not None and time.monotonic() - self._last >= self._seconds:
            self._save()
            self._last = time.monotonic()

    def after_epoch(self) -> None:
        """Save if the epochs have passed."""
        self._done += 1
        if self._epochs is not None and self._done % self._epochs == 0:
            self._save()
        else:
            self.after_step()


def _steps(images: int, batch_size: int) -> int:
    """Return the number of batches of an epoch, each of at least two images.

    A normalisation layer cannot train on a single image. So three images are one batch, even with a
    batch size of two.
    """
    if images < 2:
        raise CovcliError(
            f"{images} training images are too few: a batch needs two", where="--trusted"
        )
    return min(-(-images // batch_size), images // 2)


def _untrusted(config: TrainConfig, ran_in: Path | None) -> dict[str, ImageSet | None]:
    """Load the untrusted sets to watch; None for an attack, which depends on the network."""
    return {
        text: None
        if attacks.is_attack(parse(text))
        else datasets.load(text, "test", config.data_dir, ran_in)
        for text in config.untrusted
    }


def _augmentation(config: TrainConfig, images: ImageSet) -> Augmentation:
    if config.augment != "auto":
        return config.augment
    return "crop-flip" if images.flips else "crop"


def _check_ranks(batch_size: int, images: int) -> None:
    """Raise a CovcliError if batches of so many images are too few for all ranks."""
    ranks = distributed.size()
    if ranks > 1 and images < 2 * ranks:
        raise CovcliError(
            f"batches of {images} images are too few for {ranks} ranks",
            where=f"--batch-size {batch_size}",
            fix=f"make it at least {2 * ranks}, or start fewer ranks",
        )


def _model(config: TrainConfig, images: ImageSet, device: torch.device) -> Classifier:
    """Build the network for the classes of the training images."""
    shape, statistics = architectures.architecture(config.model).expects(config.pretrained)
    shape = shape.changed(config.preprocess)
    mean, deviation = (
        statistics if config.pretrained else architectures.pixel_statistics(images, shape)
    )
    spec = ModelSpec(
        config.model, len(images.classes), shape, mean, deviation, config.pretrained,
        shape.preprocess, config.logits,
    )  # fmt: skip
    with runtime.seeded(config.seed):
        model = architectures.build(spec)
    model.watched = config.points
    if config.pretrained:
        architectures.load_pretrained(model)
    return model.on(device)


def _trainer(config: TrainConfig, model: Classifier, steps: int) -> Trainer:
    """Create SGD with Nesterov momentum and a one-cycle schedule, without decay of biases."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups, config.learning_rate, momentum=0.9, nesterov=True,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.epochs * steps
    )
    model.precision = choose_precision(config.amp, model, partial(_gradients, model))
    return Trainer(
        model, distributed.train_together(model), optimizer, schedule, None,
        config.confidence_weight, model.points("channel"), "channel", config.confidence_threshold,
    )  # fmt: skip


def _gradients(model: Classifier, images: torch.Tensor) -> None:
    """Compute the gradients of all weights, as a step of training does."""
    output = model.eval()(images)
    torch.autograd.grad(output.sum(), list(model.parameters()), allow_unused=True)


def accuracy(model: Classifier, images: ImageSet) -> float:
    """Return the share of images that a network classifies correctly."""
    swept = sweep(model, images, [], "channel", Silent(), "")
    (predicted,) = distributed.collect([(b.rows, b.logits.argmax(1)) for b in swept])
    return float((predicted == images.known_labels()).double().mean())


def split_rows(images: int, calibration_split: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows that train the network and those held out, each in ascending order.

    Examples
    --------
    >>> training, held_out = split_rows(10, 0.2, seed=0)
    >>> len(training), len(held_out), bool(torch.isin(held_out, training).any())
    (8, 2, False)
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    held_out = round(images * calibration_split)
    return order[held_out:].sort().values, order[:held_out].sort().values


def first_penalised(epochs: int) -> int:
    """Return the first epoch with a penalty, counted from 1: the first of the second half."""
    return max(2, epochs // 2 + 1)


def describe(entry: EpochLog, epochs: int) -> str:
    """Return one line about an epoch."""
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
