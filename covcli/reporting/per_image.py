"""Results of single images: scores.csv.gz, one row per image, and samples.npz.

This module writes and reads both files. samples.npz holds the pixels of a few images of each set
and of the explained images.
"""

import csv
import gzip
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from covcli.core import file_checks
from covcli.core.opening import reading

SCORES, SAMPLES = "scores.csv.gz", "samples.npz"
UNLABELLED = -1
ENCODING = ("utf-8", "surrogatepass")  # file names may contain any bytes
# The columns of scores.csv.gz; each baseline adds `<name>_score`, images from files `file`.
COLUMNS = {
    "set": np.object_, "index": np.int64, "label": np.int64, "predicted": np.int64,
    "score": np.float64, "p_value": np.float64, "confidence": np.float64, "untrusted": np.int64,
    "unsure": np.int64, "softmax_confidence": np.float64,
}  # fmt: skip
SUFFIX, FILE = "_score", "file"


@dataclass(frozen=True)
class ImageScores:
    """The results on each image of a set, in the set's order; arrays of shape (N,).

    Attributes
    ----------
    predicted, label
        Class numbers, int64; `label` is None if unknown.
    scores
        "coverage", "softmax" and the baselines, by name, float64; larger means less trusted. The
        file stores the softmax confidence, so that softmax scores read from it are accurate to
        about 1e-16.
    p_value, confidence, softmax_confidence
        float64, in [0, 1].
    untrusted, unsure
        The verdict, bool; both are False if the answer passes.
    file
        The names of the images' files, relative to their folder; None if they are not in files.
    """

    predicted: np.ndarray
    label: np.ndarray | None
    scores: dict[str, np.ndarray]
    p_value: np.ndarray
    confidence: np.ndarray
    softmax_confidence: np.ndarray
    untrusted: np.ndarray
    unsure: np.ndarray
    file: np.ndarray | None = None

    @property
    def baselines(self) -> dict[str, np.ndarray]:
        """The scores other than "coverage" and "softmax", by name."""
        return {name: s for name, s in self.scores.items() if name not in ("coverage", "softmax")}


def pack_scores(sets: Mapping[str, ImageScores]) -> bytes:
    """Return the bytes of scores.csv.gz; equal results give equal bytes.

    Parameters
    ----------
    sets
        The results by name: "trusted" and the specifications of the untrusted sets.
    """
    parts = [
        pd.DataFrame(
            {
                "set": name,
                "index": np.arange(len(of.predicted)),
                "label": UNLABELLED if of.label is None else of.label,
                "predicted": of.predicted,
                "score": of.scores["coverage"],
                "p_value": of.p_value,
                "confidence": of.confidence,
                "untrusted": of.untrusted.astype(int),
                "unsure": of.unsure.astype(int),
                "softmax_confidence": of.softmax_confidence,
                **{f"{baseline}{SUFFIX}": values for baseline, values in of.baselines.items()},
            }
        )
        for name, of in sets.items()
    ]
    whole = pd.concat(parts, ignore_index=True)
    if any(of.file is not None for of in sets.values()):
        none = {name: np.full(len(of.predicted), "") for name, of in sets.items()}
        names = [none[name] if of.file is None else of.file for name, of in sets.items()]
        whole[FILE] = np.concatenate([np.asarray(part, np.object_) for part in names])
    text = whole.to_csv(index=False)
    if "\r" in text:  # of a name, which is not quoted for its sake, but would end the line
        text = whole.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    return gzip.compress(text.encode(*ENCODING), mtime=0)


def read_scores(path: Path) -> dict[str, ImageScores]:
    """Read a scores.csv.gz; return the results by set, in the order of the file.

    Raises
    ------
    CovcliError
        If the file is missing, cannot be unpacked, or is another table.

    Examples
    --------
    >>> from pathlib import Path
    >>> scores = read_scores(Path("runs/latest/scores.csv.gz"))
    >>> list(scores), scores["trusted"].scores["coverage"].shape
    (['trusted', 'photos?limit=100'], (360,))
    """
    with reading(path, "cannot be read as a table of scores"):
        text = io.BytesIO(file_checks.read_gzip(path, inside=path.parent))
        # As words at first: NumPy reads every bit of a number, older parsers of pandas do not.
        table = pd.read_csv(
            text, keep_default_na=False, dtype=str, encoding=ENCODING[0],
            encoding_errors=ENCODING[1],
        )  # fmt: skip
        if "unsure" not in table:  # a file of an earlier version
            table["unsure"] = 0
        table = table.astype(COLUMNS)
        others = [name for name in table.columns if name not in (*COLUMNS, FILE)]
        table = table.astype(dict.fromkeys(others, np.float64))
    return {str(name): _scores(rows) for name, rows in table.groupby("set", sort=False)}


def _scores(rows: pd.DataFrame) -> ImageScores:
    columns = {str(name): rows[name].to_numpy() for name in rows.columns}
    scores = {"coverage": columns["score"], "softmax": 1 - columns["softmax_confidence"]}
    others = columns.keys() - COLUMNS.keys() - {FILE}
    named = FILE in columns and (columns[FILE] != "").any()
    return ImageScores(
        predicted=columns["predicted"],
        label=None if (columns["label"] == UNLABELLED).all() else columns["label"],
        scores=scores | {n.removesuffix(SUFFIX): columns[n] for n in columns if n in others},
        p_value=columns["p_value"],
        confidence=columns["confidence"],
        softmax_confidence=columns["softmax_confidence"],
        untrusted=columns["untrusted"].astype(bool),
        unsure=columns["unsure"].astype(bool),
        file=columns[FILE] if named else None,
    )


@dataclass(frozen=True)
class Thumbnails:
    """The pixels of some images of a set.

    Attributes
    ----------
    rows
        The images' rows in the set, int64 of shape (n,).
    images
        uint8 of shape (n, C, H, W).
    """

    rows: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class ExplainedImage:
    """The data of an explanation's picture.

    Attributes
    ----------
    image
        uint8 of shape (C, H, W).
    fires
        The worst channel's activation, float32 of shape (h, w), or None.
    """

    image: np.ndarray
    fires: np.ndarray | None


@dataclass(frozen=True)
class Samples:
    """The pixels of the images in a report.

    Attributes
    ----------
    flagged, passed
        For each set, in the order of the evaluation: the most suspicious flagged images, and the
        least suspicious images that passed.
    explained
        The images of the explanations, in the order of the evaluation.
    """

    flagged: list[Thumbnails]
    passed: list[Thumbnails]
    explained: list[ExplainedImage]


def pack_samples(samples: Samples) -> bytes:
    """Return the bytes of samples.npz."""
    arrays: dict[str, np.ndarray] = {}
    for k, entry in enumerate(samples.explained):
        arrays[f"explained_{k}"] = entry.image
        if entry.fires is not None:
            arrays[f"explained_{k}_map"] = entry.fires
    for kind, of_kind in (("flagged", samples.flagged), ("passed", samples.passed)):
        for i, shown in enumerate(of_kind):
            if len(shown.rows):
                arrays[f"{i}_{kind}"] = shown.images
                arrays[f"{i}_{kind}_rows"] = shown.rows
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_samples(path: Path, sets: int, explanations: int) -> Samples:
    """Read a samples.npz.

    Parameters
    ----------
    path
        The file.
    sets, explanations
        The number of sets and of explanations of the evaluation.

    Raises
    ------
    CovcliError
        If the file is missing or damaged, or an image is missing or has a wrong shape.

    Examples
    --------
    >>> from pathlib import Path
    >>> samples = read_samples(Path("runs/latest/samples.npz"), sets=2, explanations=0)
    >>> samples.passed[0].images.shape[1:]
    (3, 32, 32)
    """
    arrays = file_checks.read_npz(path, inside=path.parent)
    with reading(path, "cannot be read as samples: an image is missing or malformed"):
        return Samples(
            flagged=[_thumbnails(arrays, f"{i}_flagged") for i in range(sets)],
            passed=[_thumbnails(arrays, f"{i}_passed") for i in range(sets)],
            explained=[_explained(arrays, f"explained_{k}") for k in range(explanations)],
        )


def _thumbnails(arrays: Mapping[str, np.ndarray], name: str) -> Thumbnails:
    if name not in arrays:  # the set has no such image
        return Thumbnails(np.empty(0, np.int64), np.empty((0, 1, 1, 1), np.uint8))
    shown = Thumbnails(arrays[f"{name}_rows"], arrays[name])
    if shown.images.dtype != np.uint8 or shown.images.ndim != 4 or 0 in shown.images.shape:
        raise ValueError(f"{name} are no images")
    if shown.rows.shape != shown.images.shape[:1] or shown.rows.dtype.kind != "i":
        raise ValueError(f"{name} are images without rows")
    return shown


def _explained(arrays: Mapping[str, np.ndarray], name: str) -> ExplainedImage:
    entry = ExplainedImage(arrays[name], arrays.get(f"{name}_map"))
    fires = entry.fires
    if entry.image.dtype != np.uint8 or entry.image.ndim != 3 or 0 in entry.image.shape:
        raise ValueError(f"{name} is no image")
    if fires is not None and (fires.ndim != 2 or fires.dtype.kind != "f" or 0 in fires.shape):
        raise ValueError(f"{name}_map is no map")
    return entry
