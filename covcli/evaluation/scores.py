"""Scores and verdicts of each image of a set, and the selection of images for the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from covcli.core import distributed
from covcli.core.progress import Progress
from covcli.data.images import ImageSet
from covcli.data.preprocessing import Shape
from covcli.reporting.per_image import ExplainedImage, ImageScores, Samples, Thumbnails
from covcli.signature.calibration import softmax_score
from covcli.signature.judge import Judge

SAMPLES = 8


@dataclass(frozen=True)
class Measured(ImageScores):
    """The results on each image of a set, in the set's order; see `ImageScores`.

    Attributes
    ----------
    coverage
        Share of each point's neurons inside the range, mean over the images, shape (L,).
    """

    coverage: list[float] = field(default_factory=list)

    @property
    def confidences(self) -> dict[str, np.ndarray]:
        """Both confidences, by the name of their score."""
        return {"coverage": self.confidence, "softmax": self.softmax_confidence}

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Which images are classified correctly, bool of shape (N,); the labels must be known."""
        assert self.label is not None
        return np.asarray(self.predicted == self.label)


@dataclass(frozen=True)
class MeasuredSet:
    """A set's images and the results on them.

    Attributes
    ----------
    images, measured
        The images, and the results in the same order.
    seconds
        The time of the measurement; None if an interrupted evaluation measured the set.
    """

    images: ImageSet
    measured: Measured
    seconds: float | None

    def named(self) -> ImageScores:
        """Return the results with the names of the images' files, if they are in files."""
        files = self.images.files
        return (
            self.measured
            if files is None
            else replace(self.measured, file=np.array(files, np.object_))
        )


def measure(judge: Judge, images: ImageSet, progress: Progress) -> Measured:
    """Judge all images of a set; each rank runs its share.

    Parameters
    ----------
    judge
        The judge.
    images
        The set.
    progress
        Receives the progress.

    Raises
    ------
    CovcliError
        If an image cannot be read, or an activation is not finite.

    Examples
    --------
    >>> from pathlib import Path
    >>> from covcli.core.progress import Silent
    >>> from covcli.data import datasets
    >>> from covcli.signature import judge as judges
    >>> run = Path("runs/latest")
    >>> judge, _ = judges.load(run / "checkpoint.pt", run / "signature-ensemble.safetensors")
    >>> measured = measure(judge, datasets.load("digits?limit=9", "test"), Silent())
    >>> measured.scores["coverage"].shape, len(measured.coverage)
    ((9,), 3)
    """
    parts = []
    for batch in judge.sweep(images, progress, f"reading {images.name}"):
        v = judge.on_device(batch.logits, batch.neurons)
        inside = judge.signature.scorer.coverage(batch.neurons, v.predicted)
        softmax = softmax_score(batch.logits)
        verdicts = (v.predicted, v.score, v.p_value, v.confidence, v.untrusted, v.unsure)
        parts.append((batch.rows, *verdicts, inside, softmax))
    predicted, *columns = distributed.collect(parts)
    score, p_value, confidence, untrusted, unsure, coverage, doubt = (
        column.numpy() for column in columns
    )
    return Measured(
        predicted=predicted.numpy(),
        label=None if images.labels is None else images.labels.numpy(),
        scores={"coverage": score, "softmax": doubt},
        p_value=p_value,
        confidence=confidence,
        softmax_confidence=1 - doubt,
        untrusted=untrusted,
        unsure=unsure,
        coverage=coverage.mean(0).tolist(),
    )


def pick(sets: Mapping[str, MeasuredSet], shape: Shape, explained: list[ExplainedImage]) -> Samples:
    """Read each set's most suspicious flagged images and least suspicious others, for a report.

    Parameters
    ----------
    sets
        The sets, by name.
    shape
        Channels, height and width of the images to read.
    explained
        The images of the explanations, which are stored with them.
    """
    flagged, passed = [], []
    for entry in sets.values():
        order = np.argsort(entry.measured.scores["coverage"], kind="stable")
        flags = entry.measured.untrusted[order]
        flagged.append(_thumbnails(entry.images, order[flags][::-1][:SAMPLES], shape))
        passed.append(_thumbnails(entry.images, order[~flags][:SAMPLES], shape))
    return Samples(flagged, passed, explained)


def _thumbnails(images: ImageSet, rows: np.ndarray, shape: Shape) -> Thumbnails:
    if len(rows) == 0:
        return Thumbnails(rows, np.empty((0, *shape), np.uint8))
    return Thumbnails(rows, images.batch(torch.from_numpy(rows.copy()), shape).numpy())
