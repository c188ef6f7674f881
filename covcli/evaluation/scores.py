"""What a network and its signature say of each image of a set, and the images worth showing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from covcli.core import distributed
from covcli.core.progress import Progress
from covcli.data.images import ImageSet
from covcli.data.preprocessing import Shape
from covcli.reporting.per_image import ExplainedImage, ImageScores, Samples, Thumbnails
from covcli.signature.calibration import softmax_score
from covcli.signature.judge import Judge

SAMPLES = 8


@dataclass(frozen=True)
class Measured:
    """What the network and the signature say of each image of a set, in the set's order.

    Attributes
    ----------
    predicted, label
        Class numbers, shape (N,); label is None where unknown.
    scores
        "coverage", "softmax" and the baselines, by name: larger is less trusted, float64 of shape
        (N,).
    p_value, confidence, softmax_confidence
        float64 of shape (N,).
    untrusted, unsure
        The verdict, bool of shape (N,); both are False where the answer passes.
    coverage
        Share of each point's neurons inside the range, mean over the images, shape (L,).
    """

    predicted: Tensor
    label: Tensor | None
    scores: dict[str, np.ndarray]
    p_value: np.ndarray
    confidence: np.ndarray
    softmax_confidence: np.ndarray
    untrusted: np.ndarray
    unsure: np.ndarray
    coverage: list[float]

    @property
    def confidences(self) -> dict[str, np.ndarray]:
        """Both confidences, by the name of their score."""
        return {"coverage": self.confidence, "softmax": self.softmax_confidence}

    @property
    def correct(self) -> np.ndarray:
        """Which images are classified correctly; the labels must be known."""
        assert self.label is not None
        return (self.predicted == self.label).numpy()

    def recorded(self, files: list[str] | None) -> ImageScores:
        """Return what scores.csv.gz holds of it; `files` names the images' files, if any."""
        label = None if self.label is None else self.label.numpy()
        return ImageScores(
            self.predicted.numpy(), label, self.scores, self.p_value, self.confidence,
            self.softmax_confidence, self.untrusted, self.unsure,
            None if files is None else np.array(files, np.object_),
        )  # fmt: skip


@dataclass(frozen=True)
class MeasuredSet:
    """A set's images, and what was measured of them.

    Attributes
    ----------
    images, measured
        In the same order.
    seconds
        How long that took; None where an evaluation that was cut short did it.
    """

    images: ImageSet
    measured: Measured
    seconds: float | None


def measure(judge: Judge, images: ImageSet, progress: Progress) -> Measured:
    """Have a set judged; each rank runs its share of it."""
    parts = []
    for batch in judge.sweep(images, progress, f"reading {images.name}"):
        v = judge(batch.logits, batch.neurons)
        inside = judge.signature.scorer.coverage(batch.neurons, v.predicted)
        softmax = softmax_score(batch.logits.cpu())
        verdicts = (v.predicted, v.score, v.p_value, v.confidence, v.untrusted, v.unsure)
        parts.append((batch.rows, *verdicts, inside, softmax))
    predicted, *columns = distributed.collect(parts)
    score, p_value, confidence, untrusted, unsure, coverage, doubt = (
        column.numpy() for column in columns
    )
    return Measured(
        predicted=predicted,
        label=images.labels,
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
        By name.
    shape
        Channels, height and width to read them in.
    explained
        The images of the explanations, which go with them.
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
