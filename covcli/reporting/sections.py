"""SECTIONS: the parts of a report, in their order. Each is a function from files to blocks."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from covcli.core.specs import Registry
from covcli.reporting import tables
from covcli.reporting.pictures import (
    COLOURS,
    Block,
    Picture,
    ReportData,
    Section,
    colours,
    explanation_picture,
    label,
    new_axes,
)

STYLES = ["-", "--", ":"]

SectionMaker: TypeAlias = Callable[[ReportData], Section | None]
SECTIONS: Registry[SectionMaker] = Registry("report section")


@SECTIONS.add("summary")
def summary(data: ReportData) -> Section:
    """Say what was measured and what that does not show."""
    not_shown = (
        "What this does not show: the false-alarm rate of images that are not exchangeable with "
        "the calibration images. Detection was measured on the sets named here; another kind "
        "of untrusted input may be detected better or worse, and an attacker who knows the "
        "signature can attack it too. The intervals speak of the draw of the test images, not of "
        "another training or another calibration. A trusted verdict does not mean that the answer "
        "is right: see the accuracy by confidence."
    )
    e = data.evaluation
    measured = (
        f"The signature {e.signature.parameters} of the checkpoint "
        f"{e.signature.checkpoint_fingerprint[:12]} scored the trusted test images and "
        f"{len(e.untrusted)} untrusted sets."
    )
    blocks: list[Block] = [measured, tables.false_alarms(e), e.guarantee.statement, not_shown]
    return Section("What was measured, and what it does not show", [*blocks, *e.warnings])


@SECTIONS.add("false alarms")
def false_alarms(data: ReportData) -> Section:
    """Tabulate the false alarms by predicted class, beside what is promised of each."""
    note = (
        "Rates in per cent, with exact 95% intervals; promised is what the share among so many "
        "images stays at or below with 95% probability, for each class by itself. Marginal "
        "calibration promises nothing of a single class."
    )
    return Section("False alarms by predicted class", [tables.class_alarms(data.evaluation), note])


@SECTIONS.add("detection")
def detection(data: ReportData) -> Section:
    """Tabulate the figures of each untrusted set, ours beside the baselines'."""
    e = data.evaluation
    note = f"In per cent, with 95% bootstrap intervals. {tables.FPR95_NOTE}"
    blocks: list[Block] = [tables.detection(e), note, tables.means(e), *tables.deceptions(e)]
    return Section("Detection", blocks)


@SECTIONS.add("coverage")
def coverage(data: ReportData) -> Section:
    """Draw the share of neurons inside their range at each coverage point."""
    points = data.evaluation.points
    figure, axes = new_axes(height=4.5)
    for name, colour in zip(data.sets, colours(len(data.sets)), strict=True):
        shares = [100 * point.coverage[name] for point in points]
        axes.plot(range(len(points)), shares, "o-", color=colour, label=label(name), markersize=4)
    axes.set_xticks(range(len(points)), [label(p.name) for p in points], rotation=60, ha="right")
    axes.set_ylabel("neurons inside their range, %")
    axes.legend(fontsize=8)
    return Section(
        "Coverage by layer", [Picture("coverage", "Coverage by coverage point and set", figure)]
    )


@SECTIONS.add("scores")
def scores(data: ReportData) -> Section:
    """Draw the distribution of the scores, with the calibrated threshold."""
    figure, axes = new_axes()
    found = {name: data.scores[name].scores["coverage"] for name in data.sets}
    low, high = np.quantile(np.concatenate(list(found.values())), [0.001, 0.999])
    edges = np.linspace(low, high, 61).tolist()
    for name, colour in zip(data.sets, colours(len(data.sets)), strict=True):
        values = found[name].clip(low, high)
        axes.hist(values, edges, density=True, histtype="step", color=colour, label=label(name),
                  linewidth=1.5)  # fmt: skip
    threshold = data.evaluation.signature.threshold
    axes.axvline(threshold, color="black", linestyle=":", label="overall threshold")
    axes.set_xlabel("score (larger: less trusted)")
    axes.set_ylabel("density")
    axes.legend(fontsize=8)
    return Section("Distribution of the scores", [Picture("scores", "Score densities", figure)])


@SECTIONS.add("roc")
def roc(data: ReportData) -> Section:
    """Draw the ROC curves, ours solid and the softmax baseline dashed."""
    figure, axes = new_axes(5.5, 5.0)
    trusted = data.scores["trusted"].scores
    for name, colour in zip(data.sets[1:], colours(len(data.sets))[1:], strict=True):
        mine = data.scores[name].scores
        for score, style in (("coverage", "-"), ("softmax", "--")):
            false, true = _roc(trusted[score], mine[score])
            axes.plot(false, true, style, color=colour, label=f"{label(name)}, {score}")
    axes.set_xlabel("share of trusted images flagged")
    axes.set_ylabel("share of untrusted images flagged")
    axes.legend(fontsize=7, loc="lower right")
    return Section("ROC curves", [Picture("roc", "ROC curves by set and score", figure)])


@SECTIONS.add("baselines")
def baselines(data: ReportData) -> Section | None:
    """Draw the ROC curves of each set, ours in black and the baselines in colour."""
    ours = {"coverage", "softmax"}
    names = [m.score for m in data.evaluation.mean_over_sets if m.score not in ours]
    if not names:
        return None
    trusted = data.scores["trusted"].scores
    pictures: list[Block] = []
    for i, name in enumerate(data.sets[1:]):
        mine = data.scores[name].scores
        figure, axes = new_axes(6.5, 5.0)
        axes.plot(*_roc(trusted["coverage"], mine["coverage"]), color="black", label="coverage")
        for j, score in enumerate(names):
            colour, style = COLOURS[j % 7], STYLES[j // 7 % len(STYLES)]
            curve = _roc(trusted[score], mine[score])
            axes.plot(*curve, style, color=colour, label=score, linewidth=1)
        axes.set_title(label(name), fontsize=9)
        axes.set_xlabel("share of trusted images flagged")
        axes.set_ylabel("share of untrusted images flagged")
        axes.legend(fontsize=7, loc="lower right")
        pictures.append(Picture(f"baselines-{i}", f"ROC curves of set {i + 1} by score", figure))
    return Section("ROC curves of the baselines", pictures)


def _roc(trusted: np.ndarray, untrusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of trusted and of untrusted images flagged, at descending thresholds."""
    positive = np.repeat([False, True], [len(trusted), len(untrusted)])
    false, true, _ = roc_curve(positive, np.concatenate([trusted, untrusted]))
    return false, true


@SECTIONS.add("confidence")
def confidence(data: ReportData) -> Section:
    """Draw and tabulate accuracy against confidence, on the trusted test images."""
    figure, axes = new_axes(7.5, 3.5)
    names = ["coverage", "softmax"]
    bins = data.evaluation.confidence_bins
    for i, name in enumerate(names):
        mine = [entry for entry in bins if entry.confidence == name]
        heights = [100 * (entry.accuracy or 0) for entry in mine]
        axes.bar(np.arange(len(mine)) + 0.4 * (i - 0.5), heights, 0.4, color=COLOURS[i], label=name)
        axes.set_xticks(range(len(mine)), [f"{b.low:g}–{b.high:g}" for b in mine])
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=8)
    return Section(
        "Accuracy against confidence",
        [
            Picture("confidence", "Accuracy by confidence bin", figure),
            tables.confidence_bins(data.evaluation),
            tables.confidence_thresholds(data.evaluation),
        ],
    )


@SECTIONS.add("errors")
def errors(data: ReportData) -> Section | None:
    """Draw and tabulate how well each score finds wrongly classified trusted images."""
    found, table = data.evaluation.trusted.errors, tables.own_errors(data.evaluation)
    if found is None or table is None:
        return None
    figure, axes = new_axes(7.5, 3.5)
    for (name, entry), colour in zip(found.items(), colours(len(found)), strict=True):
        kept = [100 * point.kept for point in entry.curve]
        risks = [100 * point.risk for point in entry.curve]
        axes.plot(kept, risks, color=colour, label=label(name))
    axes.set_xlabel("trusted test images kept, the least trusted rejected first, %")
    axes.set_ylabel("errors among those kept, %")
    axes.legend(fontsize=8)
    note = f"In per cent, with 95% bootstrap intervals. {tables.ERRORS_NOTE}"
    picture = Picture("errors", "Share of errors against share of images kept", figure)
    accepted = tables.accepted(data.evaluation)
    blocks: list[Block] = [picture, table, note]
    return Section("The network's own errors", blocks if accepted is None else [accepted, *blocks])


@SECTIONS.add("training")
def training(data: ReportData) -> Section | None:
    """Draw the training curves, where the run was trained by covcli."""
    if data.training is None:
        return None
    epochs = data.training.epochs
    numbers = [entry.epoch for entry in epochs]
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, colour in zip(("loss", "cross_entropy", "penalty"), COLOURS, strict=False):
        left.plot(
            numbers,
            [getattr(e, key) for e in epochs],
            "o-",
            color=colour,
            label=key.replace("_", " "),
        )
    for key, colour in zip(("accuracy", "held_out_accuracy"), COLOURS, strict=False):
        values = [100 * getattr(e, key) for e in epochs]
        right.plot(numbers, values, "o-", color=colour, label=key.replace("_", " "))
    right.set_ylabel("%")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    blocks: list[Block] = [Picture("training", "Training curves", figure)]
    watched = tables.watched(data.training)
    if watched is not None:
        blocks.append(watched)
    return Section("Training", blocks)


@SECTIONS.add("samples")
def samples(data: ReportData) -> Section:
    """Show each set's most suspicious flagged images, and the least suspicious that passed."""
    blocks: list[Block] = []
    for i, name in enumerate(data.sets):
        figure = Figure(figsize=(8, 2.4), layout="constrained")
        grid = figure.subplots(2, 8)
        shown = {"flagged": data.samples.flagged[i], "passed": data.samples.passed[i]}
        for row, (kind, thumbnails) in zip(grid, shown.items(), strict=True):
            for axes, image in zip(row, thumbnails.images, strict=False):
                axes.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray")
            for axes in row:
                axes.set_axis_off()
            row[0].set_title(f"{label(name)}: {kind}", fontsize=8, loc="left")
        blocks.append(Picture(f"samples-{i}", f"Samples {i}: flagged above, passed below", figure))
    return Section("Flagged and missed images", blocks)


@SECTIONS.add("explanations")
def explanations(data: ReportData) -> Section | None:
    """Show why the most suspicious images of each set got their scores, where that was asked."""
    entries = data.evaluation.explanations
    if not entries:
        return None
    order = [point.name for point in data.evaluation.points]
    blocks: list[Block] = [
        "The most suspicious images of each set; those of the trusted set that were flagged are "
        "false alarms. A coverage point's share is its part in the score. For the three points "
        "with the largest shares the channels are shown that left the range of the predicted "
        "class farthest: the band is that range, and the mark is the image's value, on a scale "
        "of widths of the range. An arrow stands for a value beyond the scale, or for a range of "
        "no width. The small map shows where a channel fires, not why."
    ]
    for k, entry in enumerate(entries):
        pixels = data.samples.explained[k]
        figure = explanation_picture(entry, order, pixels.image, pixels.fires)
        blocks += [
            tables.explanation(entry),
            Picture(f"explanation-{k}", f"Explanation {k}", figure),
        ]
    return Section("Why images were flagged", blocks)


@SECTIONS.add("provenance")
def provenance(data: ReportData) -> Section:
    """Tabulate what the figures were made of and with."""
    return Section("Provenance", [tables.provenance(data.evaluation)])
