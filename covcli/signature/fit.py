"""From a network and trusted images to a signature and its calibration, in memory."""

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
from covcli.core.progress import Progress
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.methods import Layout, Method, State
from covcli.methods.state import Granularity
from covcli.models.architectures import Classifier
from covcli.models.points import Point
from covcli.models.sweep import Swept, sweep
from covcli.signature.calibration import FIT_EVERY, Observed, calibrate, fits, softmax_score
from covcli.signature.guarantee import DEFAULT_GUARANTEE, Guarantee
from covcli.signature.judge import Judge
from covcli.signature.signature import Signature, layout_of
from covcli.signature.surrogates import DISTORTIONS, EXPERTS, OTHER_CLASS, Drawn, distorted, draw

log = logging.getLogger(__name__)
MINIMUM_TRUSTED = 10
SPILL_BYTES = 8 << 30
# How much of the spilled neurons is read at once: more than a batch of the network, so that what a
# method does once a group weighs little.
GROUP_BYTES = 16 << 20
MOST_ROWS = 1024
# How many trusted images are copied with noise, and how many surrogates of each kind are made.
NOISY_IMAGES = 128
SURROGATE_IMAGES = 48
# From so many fitting images on experts pay: with fewer they scatter more than they find.
LEAST_EXPERT_IMAGES = 20


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
        self._group = max(1, min(MOST_ROWS, GROUP_BYTES // (4 * self._width)))
        wanted = 4 * self._width * len(images)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        fits = wanted <= min(SPILL_BYTES, free // 2)
        self._file = tempfile.TemporaryFile() if fits else None  # noqa: SIM115
        self._rows: list[Tensor] = []
        # Written to their place: small tensors kept between large ones that come and go would
        # keep the memory of those from being used again.
        predicted = torch.empty(len(images), dtype=torch.int64)
        confidence = torch.empty(len(images))
        for batch in self._sweep("reading trusted images"):
            sure, best = batch.logits.softmax(1).max(1)
            predicted[batch.rows], confidence[batch.rows] = best.cpu(), sure.cpu()
            self._rows.append(batch.rows)
            self._spill(batch)
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

        The neurons of a group are gone once the next one is asked for.
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
    """Go over the trusted data as often as the method asks, and return its complete state.

    Each rank goes over its own share; the state is that of all of them.

    Parameters
    ----------
    passes
        Starts one pass, which yields neurons (B, N) and labels (B,).
    """
    state: State | None = method.begin(layout).to(device or torch.device("cpu"))
    while state is not None:
        complete = state
        for values, labels in passes():
            method.observe(complete, layout, values, labels)
        distributed.reduce(complete.tensors, complete.reductions)
        state = method.proceed(complete, layout)
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
    labels = datasets.check_labels(images, model.spec.classes)
    granularity = method.reads(granularity)
    points = model.points(granularity)
    device = model.mean.device
    with Recording(model, images, points, granularity, progress) as recording:
        trusted = choose_trusted(
            labels, recording.predicted, recording.confidence, threshold, len(classes)
        )

        def passes() -> Iterator[tuple[Tensor, Tensor]]:
            for rows, neurons in recording.passes():
                kept = trusted.chosen[rows].nonzero()[:, 0]
                mine = neurons.index_select(0, kept.to(device))
                yield mine, labels[rows[kept]].to(device)

        layout = layout_of(points, len(classes))
        state = fold(method, layout, passes, device)
        accuracy = float((recording.predicted == labels).double().mean())
    noisy = method.begin_noisy(state, layout)
    if noisy is not None:
        copied = images.select(trusted.chosen.nonzero()[:, 0])
        if len(copied):
            copies = distorted(copied.spread(NOISY_IMAGES), "noise")
            known = copies.known_labels()
            for batch in sweep(
                model, copies, points, granularity, progress, "reading noisy copies"
            ):
                mine = known[batch.rows].to(device)
                method.observe_noisy(noisy, layout, batch.neurons, mine)
        distributed.reduce(noisy.tensors, noisy.reductions)
        state.include(noisy)
    signature = Signature(
        method, granularity, tuple(points), state, model.spec,
        files.fingerprint(model.state_dict()), classes, model.precision,
    )  # fmt: skip
    return signature, trusted, accuracy


def fit_judge(
    model: Classifier,
    signature: Signature,
    images: ImageSet,
    progress: Progress,
    guarantee: Guarantee = DEFAULT_GUARANTEE,
    seed: int = 0,
) -> Judge:
    """Calibrate a signature on images, measured against their predicted classes.

    Parameters
    ----------
    seed
        Draws which images fit the combination, which of those become surrogate outliers, and the
        class that each of those is measured against.

    Raises
    ------
    CovcliError
        If the images are too few for the guarantee, or an activation is not finite.
    """
    fitting, classes = fits(len(images), seed), len(signature.classes)
    drawn = draw(fitting, _surrogates(signature.method, fitting), classes, seed)
    observed, elsewhere = _observe(model, signature, images, drawn, progress)
    outliers = []
    if len(drawn.rows):
        surrogates = {OTHER_CLASS: elsewhere}
        for kind in DISTORTIONS:
            copies = distorted(images.select(drawn.rows), kind)
            surrogates[kind] = _evidence(model, signature, copies, progress)
        outliers = [torch.cat([surrogates[kind] for kind in kinds]) for kinds in EXPERTS.values()]
    plain = signature.method.plain
    calibration = replace(calibrate(observed, fitting, outliers, plain), guarantee=guarantee)
    return Judge.of(model, signature, calibration)


def _surrogates(method: Method, fitting: Tensor) -> int:
    """Return how many surrogates of each kind to make: none without experts to teach."""
    if not method.experts:
        return 0
    if (number := int(fitting.sum())) < LEAST_EXPERT_IMAGES:
        log.warning(
            "%d calibration images fit the combination, too few to teach experts: from %d "
            "calibration images on detection is better and varies less",
            number, FIT_EVERY * LEAST_EXPERT_IMAGES,
        )  # fmt: skip
        return 0
    return SURROGATE_IMAGES


def _observe(
    model: Classifier, signature: Signature, images: ImageSet, drawn: Drawn, progress: Progress
) -> tuple[Observed, Tensor]:
    """Return what calibration images show, and the evidence of some against another class."""
    every, elsewhere = [], []
    title, points = "reading calibration images", signature.points
    for batch in sweep(model, images, points, signature.granularity, progress, title):
        best = batch.logits.argmax(1)
        evidence = signature.evidence(batch.neurons, best)
        every.append((batch.rows, evidence, softmax_score(batch.logits.cpu()), best))
        mine = torch.isin(batch.rows, drawn.rows)
        if bool(mine.any()):
            rows, places = batch.rows[mine], mine.to(best.device)
            others = drawn.other_classes(rows, best[places], len(signature.classes))
            elsewhere.append((rows, signature.evidence(batch.neurons[places], others)))
    evidence, softmax, predicted = distributed.collect(every)
    wrong = None if images.labels is None else predicted != images.labels
    against = distributed.collect(elsewhere)[0] if len(drawn.rows) else evidence[:0]
    return Observed(evidence, softmax, predicted, wrong), against


def _evidence(
    model: Classifier, signature: Signature, images: ImageSet, progress: Progress
) -> Tensor:
    """Return the evidence of a set, measured against the predicted classes."""
    title, points = "reading surrogate outliers", signature.points
    swept = sweep(model, images, points, signature.granularity, progress, title)
    parts = [(b.rows, signature.evidence(b.neurons, b.logits.argmax(1))) for b in swept]
    return distributed.collect(parts)[0]
