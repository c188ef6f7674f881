"""What a report is made of: the files that it reads, and sections of blocks."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from matplotlib.figure import Figure

from covcli.reporting.documents import EvaluationResult, TrainingLog
from covcli.reporting.per_image import ImageScores, Samples
from covcli.reporting.tables import Table


@dataclass(frozen=True)
class ReportData:
    """What a report is made of.

    Attributes
    ----------
    evaluation
        What evaluation.json holds.
    scores
        By set, what scores.csv.gz holds of each image.
    samples
        The pixels of samples.npz.
    training
        The newest training log, or None.
    """

    evaluation: EvaluationResult
    scores: dict[str, ImageScores]
    samples: Samples
    training: TrainingLog | None

    @property
    def sets(self) -> list[str]:
        """The sets' names, "trusted" first."""
        return ["trusted", *[entry.name for entry in self.evaluation.untrusted]]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes
    ----------
    name
        Its file name, without an ending.
    caption
        What it is, for everybody.
    seen
        What is seen in it, for those who do not see it.
    figure
        The figure.
    """

    name: str
    caption: str
    seen: str
    figure: Figure


@dataclass(frozen=True)
class Thumbnail:
    """A small image.

    Attributes
    ----------
    image
        uint8 of shape (C, H, W).
    caption
        The lines below it.
    seen
        What is seen in it.
    """

    image: np.ndarray
    caption: tuple[str, ...]
    seen: str


@dataclass(frozen=True)
class Gallery:
    """Small images in rows; where there is none, `otherwise` stands in their place."""

    name: str
    title: str
    images: list[Thumbnail]
    otherwise: str = "There is none."


Block: TypeAlias = str | Table | Picture | Gallery


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Tile:
    """A figure that a reader wants first, with what it has to be held against."""

    title: str
    value: str
    note: str
