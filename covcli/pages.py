"""What a report is made of: the files that it reads, sections of blocks, and how figures look."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covcli.drawing import COLOURS


@dataclass(frozen=True)
class ReportData:
    """What a report is made of.

    Attributes
    ----------
    evaluation
        The document evaluation.json.
    scores
        One row an image, as in scores.csv.gz.
    samples
        The arrays of samples.npz.
    training
        The newest training log, or None.
    """

    evaluation: dict[str, Any]
    scores: pd.DataFrame
    samples: dict[str, np.ndarray]
    training: dict[str, Any] | None

    @property
    def sets(self) -> list[str]:
        """The sets' names, "trusted" first."""
        return ["trusted", *[entry["name"] for entry in self.evaluation["untrusted"]]]


@dataclass(frozen=True)
class Table:
    """A table: the head and the rows, as text."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A figure, with a file name and a caption."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """A titled part of a report: paragraphs, tables and pictures."""

    title: str
    blocks: list[str | Table | Picture]


def new_axes(width: float = 7.5, height: float = 4.0) -> tuple[Figure, Axes]:
    """Return an empty figure of that size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def percent(value: float | None, digits: int = 1) -> str:
    """Word a share in per cent; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def interval(estimate: dict[str, float] | None) -> str:
    """Word a figure with its interval in per cent; a dash where there is none."""
    if estimate is None:
        return "–"
    low, high = percent(estimate["low"]), percent(estimate["high"])
    return f"{percent(estimate['value'])} [{low}, {high}]"


def colours(number: int) -> list[str]:
    """Return so many colours, told apart as far as they reach."""
    return [COLOURS[i % len(COLOURS)] for i in range(number)]
