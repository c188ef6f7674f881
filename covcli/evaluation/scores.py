"""What a network and its signature say of each image of a set, and the files that hold it."""

import gzip
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from covcli.core import distributed
from covcli.core.progress import Progress
from covcli.data.images import ImageSet
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
    untrusted
        The verdict, bool of shape (N,).
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


def measure(judge: Judge, images: ImageSet, progress: Progress) -> Measured:
    """Have a set judged; each rank runs its share of it."""
    parts = []
    for batch in judge.sweep(images, progress, f"reading {images.name}"):
        v = judge(batch.logits, batch.neurons)
        inside = judge.signature.coverage(batch.neurons, v.predicted)
        softmax = softmax_score(batch.logits.cpu())
        verdicts = (v.predicted, v.score, v.p_value, v.confidence, v.untrusted)
        parts.append((batch.rows, *verdicts, inside, softmax))
    predicted, *columns = distributed.collect(parts)
    score, p_value, confidence, untrusted, coverage, doubt = (c.numpy() for c in columns)
    return Measured(
        predicted=predicted,
        label=images.labels,
        scores={"coverage": score, "softmax": doubt},
        p_value=p_value,
        confidence=confidence,
        softmax_confidence=1 - doubt,
        untrusted=untrusted,
        coverage=coverage.mean(0).tolist(),
    )


def baseline_names(measured: Measured) -> list[str]:
    """Return the names of the scores that are neither ours nor the softmax score."""
    return [name for name in measured.scores if name not in measured.confidences]


def table(measured: dict[str, Measured]) -> bytes:
    """Return one row an image, as gzipped CSV; the same figures give the same bytes."""
    parts = []
    for name, m in measured.items():
        parts.append(
            pd.DataFrame(
                {
                    "set": name,
                    "index": np.arange(len(m.predicted)),
                    "label": -1 if m.label is None else m.label.numpy(),
                    "predicted": m.predicted.numpy(),
                    "score": m.scores["coverage"],
                    "p_value": m.p_value,
                    "confidence": m.confidence,
                    "untrusted": m.untrusted.astype(int),
                    "softmax_confidence": m.softmax_confidence,
                    **{f"{name}_score": m.scores[name] for name in baseline_names(m)},
                }
            )
        )
    text = pd.concat(parts).to_csv(index=False)
    return gzip.compress(text.encode(), mtime=0)


def samples(
    images: dict[str, ImageSet],
    measured: dict[str, Measured],
    shape: tuple[int, int, int],
    explained: dict[str, np.ndarray],
) -> bytes:
    """Return, as an NPZ, each set's most suspicious flagged images and least suspicious others.

    The arrays of explained images go with them.
    """
    arrays = dict(explained)
    for i, (name, m) in enumerate(measured.items()):
        order = torch.from_numpy(np.argsort(m.scores["coverage"], kind="stable"))
        flags = torch.from_numpy(m.untrusted)[order]
        chosen = {"flagged": order[flags].flip(0)[:SAMPLES], "passed": order[~flags][:SAMPLES]}
        for kind, rows in chosen.items():
            if len(rows):
                arrays[f"{i}_{kind}"] = images[name].batch(rows, shape).numpy()
                arrays[f"{i}_{kind}_rows"] = rows.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
