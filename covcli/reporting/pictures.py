"""The style of charts, and the larger charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from covcli.core.errors import one_line
from covcli.reporting.documents import Explanation, LeftChannel, PointShare

# After Okabe and Ito: distinguishable for colour-blind readers, and dark enough for a white page.
# The first colour is for trusted images.
COLOURS = ["#0072b2", "#c25400", "#00805e", "#b0578a", "#b27b00", "#5f6670", "#7a5c00"]
TEXT, QUIET, GRID = "#000000", "#808080", "#b0b0b0"
STYLES = ["-", "--", ":", "-."]
OF_POINTS = COLOURS[1:4]  # for the points that list their channels
WIDTH = 5.4  # inches; legible on a phone
MOST_LABELS = 20  # the largest number of labelled coverage points on an axis
MOST_MARKS = 40  # the largest number of points with markers on a line
BARS = 20  # the largest number of bars
FARTHEST = 1.5  # the axis shows this many widths outside the range
BINS = 60
TICKS = 7  # of the axis of the scores


def new_axes(height: float = 3.6) -> tuple[Figure, Axes]:
    """Return an empty figure of that height in inches, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.4)
    axes.set_axisbelow(True)
    return figure, axes


def add_legend(figure: Figure, columns: int = 2) -> None:
    """Add a legend below the axes."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def colour(number: int) -> str:
    """Return a line's colour."""
    return COLOURS[number % len(COLOURS)]


def style(number: int) -> str:
    """Return a line's style, which changes when the colours repeat."""
    return STYLES[number // len(COLOURS) % len(STYLES)]


def label(name: str) -> str:
    """Shorten and escape a name for a legend.

    matplotlib interprets dollar signs as mathematics, and omits empty names and names that start
    with an underscore.
    """
    whole = one_line(name)
    shown = (whole if len(whole) <= 40 else f"{whole[:39]}…").replace("$", r"\$")
    return f" {shown}" if shown[:1] in ("", "_") else shown


def thinned(number: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced numbers from 0 to `number` − 1."""
    return list(range(0, number, -(-number // most)))


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, its points and its style."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    dashes: str
    marker: str = ""


def lines_picture(lines: Sequence[Line], titles: tuple[str, str], height: float) -> Figure:
    """Draw lines over common axes.

    Parameters
    ----------
    lines
        The lines.
    titles
        The titles of the horizontal and the vertical axis.
    height
        The height of the figure, in inches.
    """
    figure, axes = new_axes(height)
    for line in lines:
        axes.plot(
            line.x, line.y, line.dashes, marker=line.marker, color=line.colour,
            label=label(line.name), linewidth=1.4, markersize=3.5,
        )  # fmt: skip
    axes.set_xlabel(titles[0])
    axes.set_ylabel(titles[1])
    add_legend(figure)
    return figure


def coverage_picture(points: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the share of neurons inside their range at each coverage point.

    Parameters
    ----------
    points
        The coverage points' names; if there are many, only some are labelled.
    shares
        The share at each point, in [0, 1], by set.
    """
    figure, axes = new_axes(4.2)
    marked = "o" if len(points) <= MOST_MARKS else ""
    for k, (name, values) in enumerate(shares.items()):
        axes.plot(
            range(len(points)), [100 * value for value in values], style(k), marker=marked,
            color=colour(k), label=label(name), markersize=3.5,
        )  # fmt: skip
    places = thinned(len(points), MOST_LABELS)
    axes.set_xticks(places, [label(points[k]) for k in places], rotation=60, ha="right")
    axes.set_ylabel("neurons inside their range, %")
    add_legend(figure)
    return figure


@dataclass(frozen=True)
class Axis:
    """A scale that is linear near its centre and logarithmic far from it."""

    centre: float
    width: float

    @classmethod
    def of(cls, trusted: np.ndarray, threshold: float) -> "Axis":
        """Return the scale centred at the median trusted score, with the threshold's distance."""
        centre = float(np.median(trusted))
        width = abs(threshold - centre)
        if not (np.isfinite(width) and width > 0):
            width = float(np.std(trusted))
        return cls(centre, width if width > 0 else 1.0)

    def place(self, values: np.ndarray) -> np.ndarray:
        """Return the positions of values on the axis."""
        places: np.ndarray = np.arcsinh((np.asarray(values) - self.centre) / self.width)
        return places

    def value(self, places: np.ndarray) -> np.ndarray:
        """Return the values at positions on the axis."""
        values: np.ndarray = self.centre + self.width * np.sinh(places)
        return values

    def ticks(self, low: float, high: float) -> list[float]:
        """Return round numbers from low to high, about evenly spaced on the axis."""
        first, last = self.place(np.array([low, high])).tolist()
        values = self.value(np.linspace(first, last, TICKS + 1))
        steps = 10 ** np.floor(np.log10(np.diff(values)))
        rounded = np.round(values[1:] / steps) * steps
        return sorted({float(tick) for tick in rounded if low <= tick <= high})


def scores_picture(scores: Mapping[str, np.ndarray], threshold: float) -> Figure:
    """Draw the distribution of scores on an `Axis`, so that a distant set does not compress others.

    Parameters
    ----------
    scores
        The images' scores, finite, by set; the trusted set first.
    threshold
        The score above which an image is flagged; infinite if none is.
    """
    figure, axes = new_axes()
    axis = Axis.of(next(iter(scores.values())), threshold)
    every = np.concatenate(list(scores.values()))
    low, high = axis.place(np.array([every.min(), every.max()])).tolist()
    edges = axis.value(np.linspace(low - 0.05, high + 0.05, BINS + 1))
    axes.set_xscale("function", functions=(axis.place, axis.value))
    for k, (name, values) in enumerate(scores.items()):
        counts = np.histogram(values, edges)[0]
        axes.stairs(
            100 * counts / len(values), edges, color=colour(k), label=label(name),
            linestyle=style(k), linewidth=1.5,
        )  # fmt: skip
    if np.isfinite(threshold):
        axes.axvline(threshold, color=TEXT, linestyle=":", label="threshold")
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(FixedLocator(axis.ticks(edges[0], edges[-1])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("score (larger: less trusted)")
    axes.set_ylabel("images, %")
    add_legend(figure)
    return figure


def explanation_picture(entry: Explanation, order: Sequence[str]) -> Figure:
    """Draw the coverage points' shares of a score, and the channels outside their range.

    Parameters
    ----------
    entry
        The explanation.
    order
        The coverage points' names in the network's order.
    """
    listed = [point for point in entry.points if point.channels]
    rows = sum(len(point.channels) for point in listed)
    bars = min(len(entry.points), BARS)
    heights = [0.5 + 0.17 * bars, 0.6 + 0.2 * max(rows, 1)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    colours = dict(zip([p.name for p in listed], OF_POINTS, strict=False))
    _draw_shares(above, entry.points, order, colours)
    _draw_strips(below, listed, colours)
    return figure


def _draw_shares(
    axes: Axes, points: list[PointShare], order: Sequence[str], colours: dict[str, str]
) -> None:
    """Draw the largest shares as bars, the network's first point at the top."""
    kept = sorted(points[:BARS], key=lambda point: order.index(point.name))
    axes.barh(
        range(len(kept)), [100 * p.share for p in kept], 0.75,
        color=[colours.get(p.name, QUIET) for p in kept],
    )  # fmt: skip
    axes.set_yticks(range(len(kept)), [label(p.name) for p in kept], fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("share of the score, %", fontsize=10)


def _draw_strips(axes: Axes, points: list[PointShare], colours: dict[str, str]) -> None:
    """Draw the trusted range as a band, and each channel outside it as a mark on its row."""
    rows = [(point, channel) for point in points for channel in point.channels]
    axes.spines[["top", "right", "left"]].set_visible(False)
    if not rows:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no neuron of these points left its range", ha="center", fontsize=9)
        return
    axes.axvspan(0, 1, color=COLOURS[0], alpha=0.15, linewidth=0)
    for y, (point, channel) in enumerate(rows):
        place, marker = _mark(channel)
        of_point = colours[point.name]
        axes.plot([min(max(place, 0), 1), place], [y, y], color=of_point, linewidth=1.5)
        axes.plot(place, y, marker, color=of_point, markersize=7, clip_on=False)
    names = [f"{label(p.name)}: {label(c.label)}" for p, c in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-FARTHEST - 0.1, 1 + FARTHEST + 0.1)
    axes.set_xticks([0, 1], ["lowest", "highest"], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_title("trusted range (band) and value (mark)", fontsize=10)


def _mark(channel: LeftChannel) -> tuple[float, str]:
    """Return a value's position, with its range as 0 to 1, and its marker: an arrow if clipped."""
    widths, below = channel.outside_by, channel.value < channel.low
    if widths > FARTHEST:
        return (-FARTHEST, "<") if below else (1 + FARTHEST, ">")
    return (-widths if below else 1 + widths), "o"
