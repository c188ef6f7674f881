"""The parts of a report: its input data, and sections that consist of blocks."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from matplotlib.figure import Figure

from covcli.reporting.documents import EvaluationResult, TrainingLog
from covcli.reporting.per_image import ImageScores, Samples
from covcli.reporting.tables import Table


@dataclass(frozen=True)
class ReportData:
    """The input data of a report.

    Attributes
    ----------
    evaluation
        The content of evaluation.json.
    scores
        The content of scores.csv.gz, by set.
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
    """A chart.

    Attributes
    ----------
    name
        Its file name without extension.
    caption
        The caption.
    seen
        The alternative text, a description of the chart.
    figure
        The matplotlib figure.
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
        The alternative text.
    """

    image: np.ndarray
    caption: tuple[str, ...]
    seen: str


@dataclass(frozen=True)
class Gallery:
    """Small images in rows, or the text `otherwise` if there are none."""

    name: str
    title: str
    images: list[Thumbnail]
    otherwise: str = "There is none."


Block: TypeAlias = str | Table | Picture | Gallery


@dataclass(frozen=True)
class Section:
    """A part of a report with a title.

    A plugin adds a section by `@SECTIONS.add(NAME)` (`covcli.reporting.sections`).

    Attributes
    ----------
    title
        The title.
    blocks
        Paragraphs (text), tables, pictures and galleries, in order.
    """

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Tile:
    """A key number at the top of a report, with a note to compare it with."""

    title: str
    value: str
    note: str
