"""check: a verdict on each image of files, folders, data sets or a list, as the images are read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from covcli.core import distributed, run_folders
from covcli.core.errors import CovcliError
from covcli.core.opening import exists
from covcli.core.signals import Interrupts
from covcli.evaluation.explain import by_point
from covcli.models.points import Recorder
from covcli.models.sweep import batch_size, forward, to_network
from covcli.monitoring.chunks import Chunk, Named, ahead
from covcli.monitoring.config import CheckConfig
from covcli.monitoring.drift import DriftWatch
from covcli.monitoring.results import (
    UNREADABLE,
    CheckedImage,
    CheckSummary,
    PointTold,
    Tally,
)
from covcli.signature import judge as judges
from covcli.signature.calibration import softmax_score
from covcli.signature.guarantee import GuaranteeRequest
from covcli.signature.judge import Judge
from covcli.signature.newest import find_files

__all__ = ["Check", "CheckConfig", "CheckedImage", "check", "checking"]
POINTS = 3  # coverage points that `why` names
REFRESH_SECONDS = 15.0  # the interval at which the drift state and metrics are written


def check(config: CheckConfig) -> Iterator[CheckedImage]:
    """Yield a verdict on each image, in order, as the images are read.

    An image that cannot be read gets the verdict "unreadable". Images are prepared as the signature
    records, and scored as `evaluate` scores them. Memory does not grow with their number.

    Parameters
    ----------
    config
        The images to check, and the signature.

    Raises
    ------
    CovcliError
        If a file or a name is invalid, or if the drift state belongs to another signature, is
        damaged, or is being written by another process.

    Examples
    --------
    >>> from covcli import CheckConfig, check
    >>> images = list(check(CheckConfig(("digits?split=test&limit=3", "noise:uniform?limit=1"))))
    >>> [image.path for image in images][2:]  # with the signature in runs/latest
    ['digits?split=test&limit=3#2', 'noise:uniform?limit=1#0']
    >>> images[3].verdict, images[3].p_value < 0.05
    ('untrusted', True)
    """
    with checking(config) as job:
        for images in job.batches():
            yield from images


@contextmanager
def checking(config: CheckConfig, interrupts: Interrupts | None = None) -> Iterator["Check"]:
    """Load and validate the inputs of a check, and write the drift state, also at its end.

    The state includes the images that were yielded, also if a signal, the caller or an error ends
    the check early. It is written every 15 seconds as well, for the case that the process is
    killed.

    Parameters
    ----------
    config
        The images to check, and the signature.
    interrupts
        Handles signals; by default the caller does.

    Raises
    ------
    CovcliError
        For the same reasons as `check`.
    """
    signals = interrupts or Interrupts()
    checkpoint, signature = find_files(config)
    judge, _ = judges.load(checkpoint, signature, GuaranteeRequest.of(config), config.device)
    named = Named(config.images, config.data_dir)
    path = config.drift_state
    mine = path is not None and distributed.is_first()
    with run_folders.writing(path, force=True) if path and mine else nullcontext():
        job = Check(config, checkpoint, signature, judge, named, _watch(config, judge), signals)
        try:
            yield job
        except BaseException:
            if job.tally.verdicts:
                job.keep()
            raise
        job.keep()


def _watch(config: CheckConfig, judge: Judge) -> DriftWatch | None:
    """Return the drift watch, continued from the state's file if there is one; None without."""
    if config.drift is None:
        return None
    path = config.drift_state
    if path is None or not exists(path):
        return DriftWatch(judge, config.drift, seed=config.seed)
    watch = DriftWatch.load(path, judge)
    if watch.status.delta != config.drift:
        raise CovcliError(
            f"watches with --drift {watch.status.delta:g}",
            where=path,
            fix="pass the same, or name another --drift-state",
        )
    return watch


@dataclass
class Check:
    """A running check.

    Attributes
    ----------
    config
        Its configuration.
    checkpoint, signature, judge
        The files, and the judge that was loaded from them.
    named
        The images.
    watch
        The drift watch; None without one.
    interrupts
        Handles signals.
    tally
        Counts the yielded results.
    """

    config: CheckConfig
    checkpoint: Path
    signature: Path
    judge: Judge
    named: Named
    watch: DriftWatch | None
    interrupts: Interrupts
    tally: Tally = field(default_factory=Tally)

    def batches(self) -> Iterator[list[CheckedImage]]:
        """Yield the results in order, in batches; every rank yields all of them.

        Signals are deferred while the caller processes a batch.
        """
        judge, ranks = self.judge, distributed.size()
        points, shape = judge.signature.points, judge.model.spec.shape
        size = self.config.batch_size or batch_size(shape, points)
        readers = self.named.chunks(size, shape)
        chunks = ahead(islice(readers, distributed.rank(), None, ranks))
        due = time.monotonic() + REFRESH_SECONDS
        with Recorder(judge.model.network, points, judge.signature.granularity) as recorder:
            while True:
                chunk = next(chunks, None)
                mine = None if chunk is None else self._checked(chunk, recorder)
                parts = [images for images in distributed.gather(mine) if images is not None]
                if not parts:
                    return
                with self.interrupts.deferred():
                    for images in parts:
                        yield self._counted(images)
                        if time.monotonic() >= due:
                            self.keep()
                            due = time.monotonic() + REFRESH_SECONDS

    def summary(self) -> CheckSummary:
        """Return a summary of the results that were yielded so far."""
        return self.tally.summary(None if self.watch is None else self.watch.status)

    def keep(self) -> None:
        """Write the drift state, if it has a file; only the first rank writes."""
        path = self.config.drift_state
        if self.watch is not None and path is not None and distributed.is_first():
            with self.interrupts.saving():
                self.watch.save(path)

    def _checked(self, chunk: Chunk, recorder: Recorder) -> list[CheckedImage]:
        if len(chunk.pixels) == 0:
            return [_unreadable(*entry) for entry in zip(chunk.names, chunk.reasons, strict=True)]
        inputs = to_network(chunk.pixels, self.judge.model.mean.device)
        with torch.inference_mode():
            logits, neurons = forward(self.judge.model, recorder, inputs)
        judged = iter(self._judged(logits, neurons))
        return [
            _unreadable(name, reason) if reason is not None else replace(next(judged), path=name)
            for name, reason in zip(chunk.names, chunk.reasons, strict=True)
        ]

    def _judged(self, logits: Tensor, neurons: Tensor) -> list[CheckedImage]:
        """Return the result of each image of a batch, without its name."""
        judge = self.judge
        verdicts = judge(logits, neurons)
        softmax = 1 - softmax_score(logits.cpu())
        whys = self._whys(verdicts.evidence) if self.config.why else [None] * len(logits)
        columns = (
            verdicts.words, verdicts.predicted.tolist(), softmax.tolist(), verdicts.score.tolist(),
            verdicts.p_value.tolist(), verdicts.confidence.tolist(), whys,
        )  # fmt: skip
        return [
            CheckedImage(
                path="", verdict=word, predicted=k, class_name=judge.signature.classes[k],
                softmax_confidence=sure, score=score, p_value=p, confidence=confidence, why=why,
            )
            for word, k, sure, score, p, confidence, why in zip(*columns, strict=True)
        ]  # fmt: skip

    def _whys(self, evidence: Tensor) -> list[tuple[PointTold, ...] | None]:
        _, shares = by_point(self.judge, evidence)
        ranked = shares.argsort(dim=1, descending=True, stable=True)[:, :POINTS].tolist()
        points = self.judge.signature.points
        return [
            tuple(PointTold(points[j].name, float(shares[i, j])) for j in largest)
            for i, largest in enumerate(ranked)
        ]

    def _counted(self, images: list[CheckedImage]) -> list[CheckedImage]:
        """Update the drift watch with the images, and count them."""
        if self.watch is not None:
            seen = [image for image in images if image.score is not None]
            values = self.watch.update(
                [image.score or 0.0 for image in seen], [image.path for image in seen]
            )
            logs = iter(values.tolist())
            images = [
                image if image.score is None else replace(image, log10_martingale=next(logs))
                for image in images
            ]
        self.tally.add(images)
        return images


def _unreadable(name: str, reason: str | None) -> CheckedImage:
    return CheckedImage(name, UNREADABLE, reason=reason)
