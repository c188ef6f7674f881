"""Computation of a signature and its calibration from a network and trusted images, in memory."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from covcli.core import distributed, files
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.core.specs import suggestion
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.data.labels import numbered
from covcli.methods import Layout, Method, State
from covcli.methods.state import GRANULARITIES, Granularity
from covcli.models.architectures import Classifier
from covcli.models.points import Point
from covcli.models.sweep import Swept, sweep
from covcli.signature.calibration import FIT_EVERY, Observed, calibrate, fits, softmax_score
from covcli.signature.guarantee import DEFAULT_GUARANTEE, Guarantee
from covcli.signature.judge import Judge
from covcli.signature.signature import Signature, condensed, layout_of
from covcli.signature.surrogates import DISTORTIONS, EXPERTS, OTHER_CLASS, Drawn, distorted, draw

log = logging.getLogger(__name__)
MINIMUM_TRUSTED = 10
SPILL_BYTES = 8 << 30
# The amount of stored neurons read at once. It is more than a batch of the network, so that a
# method's cost per group matters little.
GROUP_BYTES = 16 << 20
MOST_ROWS = 1024
# The number of trusted images copied with noise, and of surrogates of each kind.
NOISY_IMAGES = 128
SURROGATE_IMAGES = 64
# The smallest number of fitting images for experts. On a VGG19 for CIFAR-10 (seven far and attacked
# sets, 20 draws) they add nothing to the mean AUROC with 14 images, 0.5 points with 20 and 0.7
# with 100.
LEAST_EXPERT_IMAGES = 20


@dataclass(frozen=True)
class How:
    """The method of a signature, and the settings of its computation.

    Attributes
    ----------
    method, granularity
        The method, and how activations become neurons.
    threshold
        A correctly classified image is trusted if its softmax confidence is at least this.
    guarantee
        The guarantee of the calibration.
    seed
        The seed of the calibration's random choices.
    mergeable
        Whether the signature keeps what `merge-signatures` needs.

    Examples
    --------
    >>> from covcli.methods import make_method
    >>> How(make_method("src")).threshold
    0.9
    """

    method: Method
    granularity: Granularity = "channel"
    threshold: float = 0.9
    guarantee: Guarantee = DEFAULT_GUARANTEE
    seed: int = 0
    mergeable: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise CovcliError(
                f"unknown granularity {self.granularity!r}",
                fix=suggestion(self.granularity, list(GRANULARITIES)),
            )
        if not 0 <= self.threshold <= 1:
            raise CovcliError(
                "must be between 0 and 1", where=f"confidence threshold {self.threshold}"
            )


class Recording(AbstractContextManager["Recording"]):
    """A set's predictions and neurons, for as many passes as a method needs.

    The network runs once, and the neurons are stored in an anonymous temporary file, so that memory
    does not grow. If they need more than 8 GiB or half of the free disk (units of large images),
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
        self._group = max(1, min(MOST_ROWS, GROUP_BYTES // (4 * self._width)))
        wanted = 4 * self._width * len(images)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        fits = wanted <= min(SPILL_BYTES, free // 2)
        self._file = tempfile.TemporaryFile() if fits else None  # noqa: SIM115
        self._rows: list[Tensor] = []
        # Allocated once: small tensors allocated between large temporary ones would fragment the
        # memory.
        predicted = torch.empty(len(images), dtype=torch.int64, device=self._device)
        confidence = torch.empty(len(images), device=self._device)
        for batch in self._sweep("reading trusted images"):
            mine = slice(int(batch.rows[0]), int(batch.rows[-1]) + 1)
            confidence[mine], predicted[mine] = batch.logits.softmax(1).max(1)
            self._rows.append(batch.rows)
            self._spill(batch)
        predicted, confidence = predicted.cpu(), confidence.cpu()
        parts = [(rows, predicted[rows], confidence[rows]) for rows in self._rows]
        self.predicted, self.confidence = distributed.collect(parts)

    def _spill(self, batch: Swept) -> None:
        if self._file is None:
            return
        try:
            self._file.write(batch.neurons.float().cpu().contiguous().numpy().data)
            self._file.flush()
        except OSError:  # the disk is full: run the network again instead
            self._file.close()
            self._file = None

    def passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of the set with their neurons, group by group, of this rank's share.

        The neurons of a group are overwritten by the next group.
        """
        if self._file is None:
            for batch in self._sweep("reading trusted images again"):
                yield batch.rows, batch.neurons
            return
        self._file.seek(0)
        buffer = np.empty((self._group, self._width), np.float32)
        for group in torch.cat([*self._rows, torch.empty(0, dtype=torch.int64)]).split(self._group):
            neurons = buffer[: len(group)]
            self._file.readinto(neurons.data)
            yield group, torch.from_numpy(neurons).to(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def fold(
    method: Method,
    layout: Layout,
    passes: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    device: torch.device | None = None,
) -> State:
    """Run all passes of a method over the trusted images, and return its complete state.

    Each rank processes its share; the state is reduced over all ranks.

    Parameters
    ----------
    method
        The method.
    layout
        The assignment of neurons to coverage points.
    passes
        Starts a pass, which yields neurons (B, N) and labels (B,).
    device
        The device of the state; None: the CPU.

    Examples
    --------
    >>> from covcli.methods import SingleRange
    >>> layout = Layout(classes=1, sizes=(2,), values=(2,))
    >>> trusted = torch.tensor([[0.0, 5.0], [1.0, 6.0]]), torch.tensor([0, 0])
    >>> state = fold(SingleRange(), layout, lambda: [trusted])
    >>> state["low"].tolist(), state["high"].tolist()
    ([[0.0, 5.0]], [[1.0, 6.0]])
    """
    state: State | None = method.begin(layout).to(device or torch.device("cpu"))
    while state is not None:
        complete = state
        for values, labels in passes():
            method.observe(complete, values, labels)
        distributed.reduce(complete.tensors, complete.reductions)
        state = method.proceed(complete)
    return complete


@dataclass(frozen=True)
class Trusted:
    """The images that define the signature.

    Attributes
    ----------
    chosen
        Which images, bool of shape (N,).
    counts
        The number of images of each class.
    relaxed
        Classes with fewer than 10 confident images, where all correct ones were used.
    """

    chosen: Tensor
    counts: list[int]
    relaxed: list[int]


def choose_trusted(
    labels: Tensor, predicted: Tensor, confidence: Tensor, threshold: float, classes: int
) -> Trusted:
    """Choose the images that are classified correctly with at least the threshold's confidence.

    For a class with fewer than 10 such images, all correctly classified images are chosen.

    Parameters
    ----------
    labels, predicted
        True and predicted classes, int64 of shape (N,).
    confidence
        The highest softmax probability, shape (N,).
    threshold
        The smallest confidence, in [0, 1].
    classes
        The number of classes.

    Examples
    --------
    >>> labels, predicted = torch.tensor([0] * 12 + [1]), torch.tensor([0] * 11 + [1, 1])
    >>> choose_trusted(labels, predicted, torch.full((13,), 0.95), 0.9, classes=2).counts
    [11, 1]
    """
    correct = predicted == labels
    chosen = correct & (confidence >= threshold)
    confident, known = (
        torch.bincount(labels[some], minlength=classes) for some in (chosen, correct)
    )
    relaxed = (confident < MINIMUM_TRUSTED) & (known > confident)
    chosen = chosen | (correct & relaxed[labels])
    counts = torch.where(relaxed, known, confident)
    return Trusted(chosen, counts.tolist(), relaxed.nonzero()[:, 0].tolist())


def fit_signature(
    model: Classifier, images: ImageSet, how: How, progress: Progress
) -> tuple[Signature, Trusted, float]:
    """Build a signature in memory.

    Parameters
    ----------
    model
        The network.
    images
        Labelled images. Their class names become those of the signature if there are as many as the
        network has classes; otherwise classes are named by numbers.
    how
        The method and its settings; guarantee and seed are not used.
    progress
        Receives the progress.

    Returns
    -------
    tuple
        The signature, the images that define it, and the accuracy on all images.

    Raises
    ------
    CovcliError
        If labels are missing or out of range, or an activation is not finite.

    Examples
    --------
    >>> from pathlib import Path
    >>> from covcli.core.progress import Silent
    >>> from covcli.methods import make_method
    >>> from covcli.models import checkpoint
    >>> model = checkpoint.load(Path("runs/latest/checkpoint.pt")).model
    >>> digits = datasets.load("digits?limit=200", "train")
    >>> signature, trusted, _ = fit_signature(model, digits, How(make_method("src")), Silent())
    >>> sum(trusted.counts) <= len(digits), signature.scorer.columns
    (True, 3)
    """
    labels = datasets.check_labels(images, model.spec.classes)
    named = len(images.classes) == model.spec.classes
    classes = images.classes if named else numbered(model.spec.classes)
    method, granularity = how.method, how.method.reads(how.granularity)
    points = model.points(granularity)
    device = model.mean.device
    with Recording(model, images, points, granularity, progress) as recording:
        trusted = choose_trusted(
            labels, recording.predicted, recording.confidence, how.threshold, len(classes)
        )

        def passes() -> Iterator[tuple[Tensor, Tensor]]:
            for rows, neurons in recording.passes():
                kept = trusted.chosen[rows].nonzero()[:, 0]
                mine = neurons.index_select(0, kept.to(device))
                yield mine, labels[rows[kept]].to(device)

        layout = layout_of(points, len(classes))
        sums = fold(method, layout, passes, device)
        accuracy = float((recording.predicted == labels).double().mean())
    signature = Signature(
        method, granularity, tuple(points), sums, model.spec,
        files.fingerprint(model.state_dict()), classes, model.precision,
    )  # fmt: skip
    _observe_noisy(model, signature, images.select(trusted.chosen.nonzero()[:, 0]), progress)
    return condensed(signature, sums, model, how.mergeable), trusted, accuracy


def _observe_noisy(
    model: Classifier, signature: Signature, images: ImageSet, progress: Progress
) -> None:
    """Add the tensors of a pass over noisy copies to a signature's state, if its method has one."""
    method, state = signature.method, signature.state
    noisy = method.begin_noisy(state)
    if noisy is None:
        return
    if len(images):
        copies = distorted(images.spread(NOISY_IMAGES), "noise")
        labels = copies.known_labels()
        points, granularity = signature.points, signature.granularity
        title = "reading noisy copies"
        for batch in sweep(model, copies, points, granularity, progress, title):
            mine = labels[batch.rows].to(batch.neurons.device)
            method.observe_noisy(noisy, batch.neurons, mine)
    distributed.reduce(noisy.tensors, noisy.reductions)
    state.include(noisy)


def fit_judge(
    model: Classifier,
    signature: Signature,
    images: ImageSet,
    progress: Progress,
    guarantee: Guarantee = DEFAULT_GUARANTEE,
    seed: int = 0,
) -> Judge:
    """Calibrate a signature on images that did not build it.

    Parameters
    ----------
    model
        The network.
    signature
        The network's signature.
    images
        Trusted images that trained neither the network nor the signature; labels may be missing.
    progress
        Receives the progress.
    guarantee
        The guarantee of the judge.
    seed
        The seed of random choices: which images fit the combination, which of those become
        surrogate outliers, and the class that each of those is compared with.

    Raises
    ------
    CovcliError
        If the images are too few for the guarantee, or an activation is not finite.
    """
    groups = _predicted(model, images, progress) if guarantee.each_class else None
    fitting, classes = fits(len(images), seed, groups), len(signature.classes)
    drawn = draw(fitting, _surrogates(signature.method, fitting), classes, seed)
    observed, elsewhere = _observe(model, signature, images, drawn, progress)
    outliers = []
    if len(drawn.rows):
        surrogates = {OTHER_CLASS: elsewhere}
        for kind in DISTORTIONS:
            copies = distorted(images.select(drawn.rows), kind)
            surrogates[kind] = _evidence(model, signature, copies, progress)
        outliers = [torch.cat([surrogates[kind] for kind in kinds]) for kinds in EXPERTS.values()]
    calibration = calibrate(
        observed, fitting, outliers, arrangement=signature.arrangement, plain=signature.method.plain
    )
    return Judge.of(model, signature, replace(calibration, guarantee=guarantee))


def _predicted(model: Classifier, images: ImageSet, progress: Progress) -> Tensor:
    """Return the predicted classes, int64 of shape (N,)."""
    title = "classifying calibration images"
    parts = [
        (batch.rows, batch.logits.argmax(1))
        for batch in sweep(model, images, [], "channel", progress, title)
    ]
    return distributed.collect(parts)[0]


def _surrogates(method: Method, fitting: Tensor) -> int:
    """Return the number of surrogates of each kind; 0 for a method without experts."""
    if not method.experts:
        return 0
    if (number := int(fitting.sum())) < LEAST_EXPERT_IMAGES:
        log.warning(
            "%d calibration images fit the combination, too few to train experts: with %d "
            "calibration images or more, detection is better and varies less",
            number, FIT_EVERY * LEAST_EXPERT_IMAGES,
        )  # fmt: skip
        return 0
    return SURROGATE_IMAGES


def _observe(
    model: Classifier, signature: Signature, images: ImageSet, drawn: Drawn, progress: Progress
) -> tuple[Observed, Tensor]:
    """Return the results on calibration images, and the evidence of some for another class."""
    every, elsewhere = [], []
    title, points = "reading calibration images", signature.points
    for batch in sweep(model, images, points, signature.granularity, progress, title):
        best = batch.logits.argmax(1)
        evidence = signature.evidence(batch.logits, batch.neurons, best)
        every.append((batch.rows, evidence, softmax_score(batch.logits), best))
        mine = torch.isin(batch.rows, drawn.rows)
        if bool(mine.any()):
            rows, places = batch.rows[mine], mine.nonzero()[:, 0].to(best.device)
            others = drawn.other_classes(rows, best[places], len(signature.classes))
            against = signature.evidence(batch.logits[places], batch.neurons[places], others)
            elsewhere.append((rows, against))
    evidence, softmax, predicted = distributed.collect(every)
    wrong = None if images.labels is None else predicted != images.labels
    against = distributed.collect(elsewhere)[0] if len(drawn.rows) else evidence[:0]
    return Observed(evidence, softmax, predicted, wrong), against


def _evidence(
    model: Classifier, signature: Signature, images: ImageSet, progress: Progress
) -> Tensor:
    """Return the evidence of a set for the predicted classes."""
    title, points = "reading surrogate outliers", signature.points
    swept = sweep(model, images, points, signature.granularity, progress, title)
    parts = [(b.rows, signature.evidence(b.logits, b.neurons, b.logits.argmax(1))) for b in swept]
    return distributed.collect(parts)[0]
