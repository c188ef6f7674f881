"""What a network and its signature say of each image of a set, and the files that hold it."""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from covcli import distributed, store
from covcli.calibration import Calibration, softmax_score
from covcli.engine import sweep
from covcli.errors import CovcliError
from covcli.images import ImageSet
from covcli.models import Classifier
from covcli.progress import Progress
from covcli.rules import Rule
from covcli.signature import Signature

SAMPLES = 8
PART = "covcli evaluation part"


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


def measure(
    model: Classifier,
    made: Signature,
    calibration: Calibration,
    images: ImageSet,
    rule: Rule,
    progress: Progress,
) -> Measured:
    """Run a set through the network and the signature; each rank its share of it."""
    found = []
    title = f"reading {images.name}"
    for batch in sweep(model, images, made.points, made.granularity, progress, title):
        best = batch.logits.argmax(1)
        evidence = made.evidence(batch.neurons, best)
        coverage = made.coverage(batch.neurons, best)
        found.append((batch.rows, best, evidence, coverage, softmax_score(batch.logits.cpu())))
    classes, evidence, coverage, softmax = distributed.collect(found)
    scores, doubt = calibration.score(evidence), softmax.numpy()
    return Measured(
        predicted=classes,
        label=images.labels,
        scores={"coverage": scores.numpy(), "softmax": doubt},
        p_value=calibration.p_value(scores).numpy(),
        confidence=rule.confidence(scores, classes).numpy(),
        softmax_confidence=1 - doubt,
        untrusted=rule.untrusted(scores, classes).numpy(),
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


class Parts:
    """Finished sets of an evaluation, kept in files until the whole of it is written.

    Parameters
    ----------
    folder
        Where the evaluation writes.
    key
        What every figure depends on beside the set: network, signature, guarantee and versions.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._used: list[Path] = []

    def find(self, of: str) -> tuple[Measured, Tensor | None] | None:
        """Return what was measured of a set earlier, and its images where they were kept."""
        path = self._path(of)
        if not path.is_file():
            return None
        try:
            content = store.load_content(path, PART)
            fields = content["measured"]
            measured = Measured(**{k: _to_array(k, v) for k, v in fields.items()})
        except (CovcliError, KeyError, TypeError, AttributeError):
            return None  # of no use: measure again
        return measured, content["images"]

    def keep(self, of: str, measured: Measured, images: Tensor | None) -> None:
        """Keep what was measured of a set; `images` where making them again would be dear."""
        fields = {k: _to_tensor(v) for k, v in vars(measured).items()}
        store.save_content(self._path(of), PART, {"measured": fields, "images": images})

    def _path(self, of: str) -> Path:
        path = self._folder / f".part-{store.digest([self._key, of])[:24]}.pt"
        self._used.append(path)
        return path

    def clear(self) -> None:
        """Remove the files, once the evaluation is written."""
        for path in self._used:
            path.unlink(missing_ok=True)


def _to_tensor(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tensor(item) for key, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _to_array(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_array(name, item) for key, item in value.items()}
    kept = name in ("predicted", "label") or not isinstance(value, Tensor)
    return value if kept else value.numpy()
