"""What a report is made of: the files that it reads, sections of blocks, and how figures look."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covcli.core.errors import one_line
from covcli.reporting.documents import (
    EvaluationResult,
    Explanation,
    LeftChannel,
    PointShare,
    TrainingLog,
)
from covcli.reporting.per_image import ImageScores, Samples
from covcli.reporting.tables import Table, channel_cells

# Okabe and Ito's colours, which the colour-blind tell apart; the first is for trusted images.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#000000"]
OF_POINTS = COLOURS[1:4]  # of the points that list their channels
QUIET = "#9A9A9A"
BARS = 20  # how many coverage points fit
FARTHEST = 1.5  # how many widths outside the range an axis shows
COLUMNS = (1.14, 1.42, 1.68)  # of the text beside the axis, in widths of it
HEADS = ("value", "trusted range", "outside, widths")


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
    """A figure, with a file name and a caption."""

    name: str
    caption: str
    figure: Figure


Block: TypeAlias = str | Table | Picture


@dataclass(frozen=True)
class Section:
    """A titled part of a report: paragraphs, tables and pictures."""

    title: str
    blocks: list[Block]


def new_axes(width: float = 7.5, height: float = 4.0) -> tuple[Figure, Axes]:
    """Return an empty figure of that size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def colours(number: int) -> list[str]:
    """Return so many colours, told apart as far as they reach."""
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def label(name: str) -> str:
    """Shorten a name for a legend; matplotlib reads dollars as mathematics."""
    return one_line(name).replace("$", r"\$")[:40]


def explanation_picture(
    entry: Explanation, order: list[str], image: np.ndarray, fires: np.ndarray | None
) -> Figure:
    """Draw an image, where its worst channel fires, its points' shares, and who left the range.

    Parameters
    ----------
    entry
        One of the document's explanations.
    order
        The coverage points' names in the network's order.
    image
        uint8 of shape (C, H, W).
    fires
        The map of the worst channel, shape (h, w), or None.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 3])
    shown, mapped = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    bars, strips = figure.add_subplot(grid[:, 1]), figure.add_subplot(grid[:, 2])
    pixels = image.transpose(1, 2, 0).squeeze()
    shown.imshow(pixels, cmap="gray")
    known = "" if entry.label is None else f"\nlabelled {label(entry.label)}"
    shown.set_title(f"predicted {label(entry.predicted)}{known}", fontsize=8)
    for axes in (shown, mapped):
        axes.set_axis_off()
    listed = [point for point in entry.points if point.channels]
    if fires is not None and entry.mapped is not None:
        worst = {point.name: point.channels[0] for point in listed}[entry.mapped]
        _draw_map(mapped, pixels, fires)
        where = f"where {label(entry.mapped)},\nchannel {worst.channel} fires"
        mapped.set_title(where, fontsize=8)
    colours = dict(zip([p.name for p in listed], OF_POINTS, strict=False))
    _draw_shares(bars, entry.points, order, colours)
    _draw_strips(strips, listed, colours)
    return figure


def _draw_map(axes: Axes, pixels: np.ndarray, fires: np.ndarray) -> None:
    """Lay a channel's activation over the greyed image; the higher, the more opaque."""
    height, width = pixels.shape[:2]
    grey = pixels if pixels.ndim == 2 else pixels.mean(2)
    axes.imshow(grey, cmap="gray", vmin=-64, vmax=320)
    spread = float(fires.max() - fires.min())
    strength = (fires - fires.min()) / spread if spread > 0 else np.zeros_like(fires)
    axes.imshow(
        strength, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * strength, interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip


def _draw_shares(
    axes: Axes, points: list[PointShare], order: list[str], colours: dict[str, str]
) -> None:
    """Draw the largest shares as bars, the network's first point at the top."""
    kept = sorted(points[:BARS], key=lambda point: order.index(point.name))
    axes.barh(
        range(len(kept)), [100 * p.share for p in kept], 0.75,
        color=[colours.get(p.name, QUIET) for p in kept],
    )  # fmt: skip
    axes.set_yticks(range(len(kept)), [label(p.name) for p in kept], fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("share of the score, %", fontsize=9)


def _draw_strips(axes: Axes, points: list[PointShare], colours: dict[str, str]) -> None:
    """Draw the trusted range as one band, and each channel that left it as a mark on its row."""
    rows = [(point, channel) for point in points for channel in point.channels]
    axes.spines[["top", "right", "left"]].set_visible(False)
    if not rows:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no neuron of these points left its range", ha="center", fontsize=9)
        return
    axes.axvspan(0, 1, color=COLOURS[0], alpha=0.15, linewidth=0)
    for y, (point, channel) in enumerate(rows):
        place, marker = _mark(channel)
        colour = colours[point.name]
        axes.plot([min(max(place, 0), 1), place], [y, y], color=colour, linewidth=1.5)
        axes.plot(place, y, marker, color=colour, markersize=7, clip_on=False)
    names = [f"{label(p.name)}: {label(c.label)}" for p, c in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    for tick, (point, _) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(colours[point.name])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-FARTHEST - 0.1, 1 + FARTHEST + 0.1)
    axes.set_xticks([0, 1], ["lowest", "highest"], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_title("trusted range (band) and value (mark)", fontsize=9)
    _write_row(axes, -0.75, HEADS)
    for y, (_, channel) in enumerate(rows):
        _write_row(axes, y, channel_cells(channel))


def _write_row(axes: Axes, y: float, cells: tuple[str, str, str]) -> None:
    """Write a channel's figures to the right of the axis."""
    for x, cell in zip(COLUMNS, cells, strict=True):
        axes.text(
            x, y, cell, transform=axes.get_yaxis_transform(), fontsize=7, ha="right", va="center"
        )


def _mark(channel: LeftChannel) -> tuple[float, str]:
    """Return where a value stands if its range is 0 to 1, and its marker: an arrow if cut off."""
    widths, below = channel.outside_by, channel.value < channel.low
    if widths > FARTHEST:
        return (-FARTHEST, "<") if below else (1 + FARTHEST, ">")
    return (-widths if below else 1 + widths), "o"
