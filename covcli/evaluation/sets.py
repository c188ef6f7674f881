"""The sets of an evaluation: checked first, opened one after another, kept when finished."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covcli.attacks import attacks
from covcli.core import distributed, files
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.core.specs import parse
from covcli.data import datasets
from covcli.data.images import ImageSet, MemorySource, in_memory
from covcli.evaluation.baselines.compare import Comparison
from covcli.evaluation.scores import Measured, MeasuredSet, measure
from covcli.signature.judge import Judge

PART = files.Format(
    "covcli evaluation part", schema=1, keys=frozenset({"of", "measured", "images"}), sealed=True
)


@dataclass(frozen=True)
class Opener:
    """A set that was checked, and can be opened later.

    Attributes
    ----------
    name
        The specification.
    identity
        A text that is equal for equal images.
    open
        Returns the images.
    start
        For an attack, the trusted images that it starts from; else None.
    """

    name: str
    identity: str
    open: Callable[[Progress], ImageSet]
    start: ImageSet | None = None

    @classmethod
    def of(cls, images: ImageSet) -> "Opener":
        """Return the opener of a loaded set."""
        return cls(images.name, images.fingerprint, lambda _progress: images)

    def pixels(self, images: ImageSet) -> Tensor | None:
        """Return the pixels of an attack, which are expensive to recompute; None for other sets."""
        if self.start is None or not isinstance(images.source, MemorySource):
            return None
        return images.source.images

    def restored(self, pixels: Tensor) -> ImageSet:
        """Return the image set of an attack's earlier pixels."""
        assert self.start is not None
        return in_memory(self.name, pixels, self.start.labels, self.start.classes, ready=True)


def opener(text: str, judge: Judge, trusted: ImageSet, data_dir: Path | None) -> Opener:
    """Check an untrusted specification before the work starts, and return its opener.

    Parameters
    ----------
    text
        The specification.
    judge
        The judge of the network, for attacks.
    trusted
        The images that an attack starts from.
    data_dir
        The folder of downloaded sets.

    Raises
    ------
    CovcliError
        If the specification or its data is invalid.
    """
    spec = parse(text)
    if not attacks.is_attack(spec):
        return Opener.of(datasets.load(text, "test", data_dir))
    monitored = judge.monitored() if attacks.make_attack(spec).needs_signature else None
    start = trusted.select(attacks.attacked_rows(spec, trusted))
    labels = start.known_labels()
    return Opener(
        text,
        f"{text} {start.fingerprint}",
        lambda progress: attacks.run_attack(spec, judge.model, start, labels, progress, monitored),
        start,
    )


class Parts:
    """The results of finished sets, kept in files until the evaluation is complete.

    The files are sealed: a file that this user's covcli did not write for this set is ignored.

    Parameters
    ----------
    folder
        The folder of the evaluation.
    key
        The digest of everything that the results depend on, except the set: network, signature,
        guarantee and versions.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._used: list[Path] = []

    def find(self, of: str) -> tuple[Measured, Tensor | None] | None:
        """Return the earlier results on a set, and its pixels if they were kept; else None."""
        try:
            content, own = PART.load_own(self._path(of))
            if not own or content["of"] != self._identity(of):
                return None  # another user may have written it
            measured = Measured(**{k: _to_array(v) for k, v in content["measured"].items()})
        except (CovcliError, KeyError, TypeError, AttributeError):
            return None  # unusable: the set is measured again
        return measured, content["images"]

    def keep(self, of: str, measured: Measured, images: Tensor | None) -> None:
        """Store the results on a set, and its pixels if they are expensive to recompute."""
        fields = {k: _to_tensor(v) for k, v in vars(measured).items()}
        content = {"of": self._identity(of), "measured": fields, "images": images}
        PART.save(self._path(of), content)

    def _identity(self, of: str) -> str:
        return files.digest([self._key, of])

    def _path(self, of: str) -> Path:
        path = self._folder / f".part-{self._identity(of)[:24]}.pt"
        self._used.append(path)
        return path

    def clear(self) -> None:
        """Remove the files, after the evaluation was written."""
        for path in self._used:
            path.unlink(missing_ok=True)


def measure_set(
    entry: Opener, judge: Judge, baselines: Comparison, parts: Parts, progress: Progress
) -> MeasuredSet:
    """Open a set and judge it, unless an interrupted evaluation did."""
    done = distributed.agree(parts.find(entry.identity))
    if done is not None:
        measured, pixels = done
        images = entry.open(progress) if pixels is None else entry.restored(pixels)
        return MeasuredSet(images, measured, None)
    begin = time.perf_counter()
    images = entry.open(progress)
    ours, theirs = measure(judge, images, progress), baselines.score(images, progress)
    measured = replace(ours, scores={**ours.scores, **theirs})
    seconds = time.perf_counter() - begin
    if distributed.is_first():
        parts.keep(entry.identity, measured, entry.pixels(images))
    return MeasuredSet(images, measured, seconds)


def _to_tensor(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tensor(item) for key, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _to_array(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_array(item) for key, item in value.items()}
    return value.numpy() if isinstance(value, Tensor) else value
