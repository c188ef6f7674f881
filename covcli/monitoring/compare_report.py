"""Tables and figures of a comparison."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from covcli.core.errors import first_few
from covcli.monitoring.changed_figures import EvaluationChange, FigureChange
from covcli.monitoring.changed_signatures import Change, ChannelChange, SignatureChange
from covcli.monitoring.compare import ReleaseComparison
from covcli.reporting.blocks import Block, Picture, Section
from covcli.reporting.headline import Outcome
from covcli.reporting.pictures import MOST_LABELS, TEXT, colour, label, new_axes, thinned
from covcli.reporting.report import Page, ReportResult, holding_together, write_page
from covcli.reporting.tables import FIGURES, MOST_CLASSES, Table, difference, of_most, percent

STEM = "comparison"
NAMES = {
    **FIGURES, "accuracy": "accuracy", "false_alarm_rate": "false alarms",
    "softmax_auroc": "softmax AUROC",
}  # fmt: skip


def verdict(comparison: ReleaseComparison) -> str:
    """Summarise a comparison in one line."""
    if comparison.exceeded:
        return f"{len(comparison.exceeded)} bounds exceeded"
    parts = []
    if comparison.signatures is not None:
        change = comparison.signatures.changes[0]
        farthest = max(change.points, key=lambda point: point.moved)
        parts.append(
            f"coverage points moved by {change.moved:.3g} on average ({change.distance}), "
            f"{farthest.name} by {farthest.moved:.3g}"
        )
    if comparison.evaluations is not None:
        worst = max(comparison.evaluations.figures, key=lambda change: change.worse_by)
        word = "worse" if worst.worse_by > 0 else "better"
        parts.append(
            f"{NAMES[worst.figure]} of {worst.set} is {100 * abs(worst.worse_by):.1f} points {word}"
        )
    return "; ".join(parts)


def blocks(comparison: ReleaseComparison) -> list[str | Table]:
    """Return a comparison as paragraphs and tables, for a terminal."""
    shown: list[str | Table] = [f"{comparison.before} → {comparison.after}"]
    if (signed := comparison.signatures) is not None:
        shown += [signed.meaning, *_missing(signed.only_before, signed.only_after)]
        for change in signed.changes:
            shown += [points_table(change), classes_table(change), channels_table(change)]
    if (measured := comparison.evaluations) is not None:
        shown += [figures_table(measured), *_missing(measured.only_before, measured.only_after)]
    return shown


def points_table(change: Change) -> Table:
    """Tabulate how far each coverage point moved."""
    rows = [
        [p.name, str(p.neurons), f"{p.moved:.3g}", f"{p.largest:.3g}", *_widest(change, p.classes)]
        for p in change.points
    ]
    chance = "" if change.by_chance is None else f"{change.by_chance:.3g} by chance"
    footer = ["all", chance, f"{change.moved:.3g}", "", "", ""]
    head = ["coverage point", "neurons", "moved", "farthest neuron", "farthest class", "its mean"]
    return Table(f"Moved: {change.distance}", head, rows, footer)


def _widest(change: Change, by_class: Sequence[float]) -> list[str]:
    k = int(np.nanargmax(by_class))
    return [change.classes[k], f"{by_class[k]:.3g}"]


def classes_table(change: Change) -> Table:
    """Tabulate how far the neurons of each class moved, in descending order."""
    order = np.argsort(change.by_class)[::-1][:MOST_CLASSES]
    rows = [[change.classes[k], f"{change.by_class[k]:.3g}"] for k in order]
    shown = of_most(len(change.classes), "classes", "")
    return Table(f"By class ({shown}): {change.distance}", ["class", "moved"], rows)


def channels_table(change: Change) -> Table:
    """Tabulate the neurons that moved farthest."""
    rows = [[c.point, c.label, c.class_name, f"{c.moved:.3g}", *_ends(c)] for c in change.channels]
    head = ["coverage point", "channel", "class", "moved", "range before", "range after"]
    return Table(f"Farthest: {change.distance}", head, rows)


def _ends(channel: ChannelChange) -> list[str]:
    return [f"{low:.3g} to {high:.3g}" for low, high in (channel.before, channel.after)]


def figures_table(evaluations: EvaluationChange) -> Table:
    """Tabulate figures before and after, with the intervals of their differences."""
    rows = [
        [c.set, NAMES[c.figure], percent(c.before, 2), percent(c.after, 2),
         f"{difference(c.difference)} [{_end(c.low)}, {_end(c.high)}]", c.how]
        for c in evaluations.figures
    ]  # fmt: skip
    head = ["set", "figure, %", "before", "after", "difference [95%]", "interval by"]
    return Table("Figures side by side", head, rows)


def _end(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _missing(before: Sequence[str], after: Sequence[str]) -> list[str]:
    pairs = (("the first", before), ("the second", after))
    return [
        f"Only in {which}: {first_few(names, MOST_CLASSES)}." for which, names in pairs if names
    ]


# The report


def report_comparison(
    comparison: ReleaseComparison, folder: Path, force: bool = False
) -> ReportResult:
    """Write a comparison as comparison.html and comparison.md with figures.

    Raises
    ------
    CovcliError
        If the files exist and `force` is False, or if they cannot be written.
    """
    outcome: Outcome = "failed" if comparison.exceeded else "none"
    with holding_together(comparison.after):
        page = Page(
            "covcli comparison", f"{comparison.before} and {comparison.after}",
            verdict(comparison), outcome,
            sections(comparison),
        )  # fmt: skip
        return write_page(page, folder, STEM, force)


def sections(comparison: ReleaseComparison) -> list[Section]:
    """Return a comparison as the sections of a report."""
    parts = []
    if comparison.exceeded:
        parts.append(Section("Bounds exceeded", [*comparison.exceeded]))
    if comparison.signatures is not None:
        parts += _of_signatures(comparison.signatures)
    if comparison.evaluations is not None:
        parts.append(_of_evaluations(comparison.evaluations))
    return parts


def _of_signatures(signed: SignatureChange) -> list[Section]:
    parts = []
    for k, change in enumerate(signed.changes):
        names = [point.name for point in change.points]
        picture = Picture(
            f"moved-{k}", f"How far each coverage point moved: {change.distance}",
            f"On average {change.moved:.3g}; farthest "
            f"{max(change.points, key=lambda p: p.moved).name}.",
            moved_picture(names, [p.moved for p in change.points], change.by_chance),
        )  # fmt: skip
        heat = Picture(
            f"moved-classes-{k}", f"The same by class: {change.distance}",
            f"A row a coverage point, a column a class; up to {change.moved:.3g} on average.",
            classes_picture(change),
        )  # fmt: skip
        about: list[Block] = [signed.meaning, *_missing(signed.only_before, signed.only_after)]
        tables: list[Block] = [points_table(change), classes_table(change), channels_table(change)]
        parts.append(Section(f"Moved: {change.distance}", [*about, picture, heat, *tables]))
    return parts


def _of_evaluations(measured: EvaluationChange) -> Section:
    worst = max(measured.figures, key=lambda change: change.worse_by)
    picture = Picture(
        "differences", "Differences of figures in points, with 95% intervals",
        f"{NAMES[worst.figure]} of {worst.set} got worst: by {100 * worst.worse_by:.1f} points.",
        differences_picture(measured.figures),
    )  # fmt: skip
    note = (
        "After less before, in points. Paired: both evaluations scored the same images, which each "
        "draw of the bootstrap takes in both. The intervals speak of the draw of the images, not "
        "of another training."
    )
    missing = _missing(measured.only_before, measured.only_after)
    return Section("Figures side by side", [picture, figures_table(measured), note, *missing])


def moved_picture(names: Sequence[str], moved: Sequence[float], by_chance: float | None) -> Figure:
    """Draw how far each coverage point moved, the network's first point on the left."""
    figure, axes = new_axes(3.2)
    axes.bar(range(len(names)), moved, 0.75, color=colour(0))
    if by_chance is not None:
        axes.axhline(by_chance, color=TEXT, linestyle=":")
    places = thinned(len(names), MOST_LABELS)
    axes.set_xticks(places, [label(names[k]) for k in places], rotation=60, ha="right")
    axes.set_ylabel("moved" if by_chance is None else "moved (dotted: by chance)")
    return figure


def classes_picture(change: Change) -> Figure:
    """Draw how far each class moved at each coverage point: a mark whose size is the distance."""
    chosen = np.sort(np.argsort(change.by_class)[::-1][:MOST_CLASSES])
    points = [change.points[k] for k in thinned(len(change.points), MOST_LABELS)]
    values = np.array([[point.classes[k] for k in chosen] for point in points])
    figure, axes = new_axes(1.2 + 0.22 * len(points))
    rows, columns = np.indices(values.shape)
    largest = np.nanmax(values)
    sizes = 90 * np.nan_to_num(values) / (largest if largest > 0 else 1)
    axes.scatter(columns.ravel(), rows.ravel(), s=sizes.ravel(), color=colour(0))
    axes.set_yticks(range(len(points)), [label(p.name) for p in points], fontsize=8)
    axes.set_xticks(
        range(len(chosen)), [label(change.classes[k]) for k in chosen], rotation=60, ha="right"
    )
    axes.invert_yaxis()
    return figure


def differences_picture(figures: Sequence[FigureChange]) -> Figure:
    """Draw differences with their intervals, one row for each figure."""
    figure, axes = new_axes(0.9 + 0.22 * len(figures))
    axes.axvline(0, color=TEXT, linewidth=0.8)
    for y, change in enumerate(figures):
        axes.plot([100 * change.low, 100 * change.high], [y, y], color=colour(0), linewidth=1.5)
        axes.plot(100 * change.difference, y, "o", color=colour(0), markersize=4)
    names = [label(f"{c.set}: {NAMES[c.figure]}") for c in figures]
    axes.set_yticks(range(len(figures)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("after less before, points")
    return figure
