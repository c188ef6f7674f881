"""SECTIONS: the registry of a report's sections, in order; each is a function of `ReportData`.

A plugin adds a section. Its function returns a `Section`, or None to add nothing.

Examples
--------
>>> @SECTIONS.add("contact")
... def contact(data):
...     return Section("Contact", ["Questions: the safety team."])
>>> SECTIONS.get("contact")(None).title
'Contact'
"""

from collections.abc import Callable
from pathlib import PurePath
from typing import TypeAlias

import numpy as np
from sklearn.metrics import roc_curve

from covcli.core.specs import Registry
from covcli.reporting import tables
from covcli.reporting.blocks import Block, Gallery, Picture, ReportData, Section, Thumbnail
from covcli.reporting.documents import Explanation
from covcli.reporting.per_image import ExplainedImage
from covcli.reporting.pictures import (
    TEXT,
    Line,
    add_legend,
    colour,
    coverage_picture,
    explanation_picture,
    lines_picture,
    new_axes,
    scores_picture,
    style,
)
from covcli.reporting.tables import percent
from covcli.reporting.thumbnails import heat

FLAGGED = ("share of trusted images flagged", "share of untrusted images flagged")
EXPLAINED = (
    "The most suspicious images of each set. Flagged images of the trusted set are false "
    "alarms. A coverage point's share is its part of the score. For the three points with the "
    "largest shares, the channels farthest outside the range of the predicted class are "
    "shown: the band is that range, and the mark is the image's value, in widths of the "
    "range. An arrow marks a value beyond the scale, or a range of zero width. The small map "
    "shows where a channel is active, not why."
)

SectionMaker: TypeAlias = Callable[[ReportData], Section | None]
SECTIONS: Registry[SectionMaker] = Registry("report section")


@SECTIONS.add("summary")
def summary(data: ReportData) -> Section:
    """Describe what was measured, and its limits."""
    not_shown = (
        "What this does not show: the false-alarm rate of images that are not exchangeable with "
        "the calibration images. Detection was measured on the sets named here; another kind "
        "of untrusted input may be detected better or worse, and an attacker who knows the "
        "signature can attack it too. The intervals refer to the draw of the test images, not to "
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
    shown = [*blocks, *e.warnings, tables.checked(e)]
    return Section("What was measured, and what it does not show", shown)


@SECTIONS.add("false alarms")
def false_alarms(data: ReportData) -> Section:
    """Tabulate the false alarms by predicted class, with the guaranteed bound of each."""
    note = (
        "Rates in per cent, with exact 95% intervals. The promised bound is the 95% upper bound of "
        "the share among that many images, for each class separately. Marginal calibration "
        "guarantees nothing for a single class."
    )
    return Section("False alarms by predicted class", [tables.class_alarms(data.evaluation), note])


@SECTIONS.add("detection")
def detection(data: ReportData) -> Section:
    """Tabulate the detection metrics of each untrusted set and score."""
    e = data.evaluation
    note = f"In per cent, with 95% intervals. {tables.FPR95_NOTE}"
    blocks: list[Block] = [tables.detection(e), note, tables.means(e), *tables.deceptions(e)]
    return Section("Detection", blocks)


@SECTIONS.add("coverage")
def coverage(data: ReportData) -> Section:
    """Draw and tabulate the share of neurons inside their range at each coverage point."""
    points = data.evaluation.points
    shares = {name: [point.coverage[name] for point in points] for name in data.sets}
    seen = ", ".join(
        f"{name} {percent(min(values))} to {percent(max(values))}%"
        for name, values in shares.items()
    )
    picture = Picture(
        "coverage", "Share of neurons inside the range of the predicted class, by coverage point",
        f"Coverage over {len(points)} coverage points: {seen}.",
        coverage_picture([point.name for point in points], shares),
    )  # fmt: skip
    return Section("Coverage by layer", [picture, tables.coverage(data.evaluation)])


@SECTIONS.add("scores")
def scores(data: ReportData) -> Section:
    """Draw the distribution of the scores, with the calibrated threshold."""
    threshold = data.evaluation.signature.threshold
    by_set = {name: data.scores[name].scores["coverage"] for name in data.sets}
    medians = ", ".join(f"{name} {np.median(values):.3g}" for name, values in by_set.items())
    picture = Picture(
        "scores", "Scores of the images, on an axis in the scale of the threshold",
        f"Distribution of the scores. Threshold {threshold:.3g}; medians: {medians}.",
        scores_picture(by_set, threshold),
    )  # fmt: skip
    return Section("Distribution of the scores", [picture])


@SECTIONS.add("roc")
def roc(data: ReportData) -> Section:
    """Draw the ROC curves: coverage solid, the softmax baseline dashed."""
    lines, seen = [], []
    for k, entry in enumerate(data.evaluation.untrusted, 1):
        for score, dashes in (("coverage", "-"), ("softmax", "--")):
            curve = _roc(data, entry.name, score)
            lines.append(Line(f"{entry.name}, {score}", *curve, colour(k), dashes))
            seen.append(f"{entry.name} {score} {percent(entry.scores[score].auroc.value)}%")
    picture = Picture(
        "roc", "ROC curves by set and score", f"ROC curves. AUROC: {', '.join(seen)}.",
        lines_picture(lines, FLAGGED, 4.2),
    )  # fmt: skip
    return Section("ROC curves", [picture])


@SECTIONS.add("baselines")
def baselines(data: ReportData) -> Section | None:
    """Draw the ROC curves of each set: coverage in black, the baselines in colour."""
    ours = {"coverage", "softmax"}
    names = [m.score for m in data.evaluation.mean_over_sets if m.score not in ours]
    if not names:
        return None
    pictures: list[Block] = []
    for i, entry in enumerate(data.evaluation.untrusted):
        lines = [Line("coverage", *_roc(data, entry.name, "coverage"), TEXT, "-")]
        lines += [
            Line(name, *_roc(data, entry.name, name), colour(j), style(j))
            for j, name in enumerate(names)
        ]
        aurocs = (f"{name} {percent(entry.scores[name].auroc.value)}%" for name in names)
        seen = f"AUROC: coverage {percent(entry.scores['coverage'].auroc.value)}%"
        pictures.append(
            Picture(
                f"baselines-{i}", f"ROC curves of {entry.name} by score",
                f"ROC curves of {entry.name}. {seen}, {', '.join(aurocs)}.",
                lines_picture(lines, FLAGGED, 4.2 + 0.09 * len(names)),
            )
        )  # fmt: skip
    return Section("ROC curves of the baselines", pictures)


def _roc(data: ReportData, name: str, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of trusted and of a set's images flagged, at descending thresholds."""
    trusted, untrusted = data.scores["trusted"].scores[score], data.scores[name].scores[score]
    positive = np.repeat([False, True], [len(trusted), len(untrusted)])
    false, true, _ = roc_curve(positive, np.concatenate([trusted, untrusted]))
    return false, true


@SECTIONS.add("confidence")
def confidence(data: ReportData) -> Section:
    """Draw and tabulate the accuracy by confidence, on the trusted test images."""
    bins = data.evaluation.confidence_bins
    figure, axes = new_axes(3.2)
    seen = []
    for i, name in enumerate(["coverage", "softmax"]):
        mine = [entry for entry in bins if entry.confidence == name]
        known = [(k, entry.accuracy) for k, entry in enumerate(mine) if entry.accuracy is not None]
        places = [k + 0.4 * (i - 0.5) for k, _ in known]
        axes.bar(places, [100 * value for _, value in known], 0.4, color=colour(i), label=name)
        axes.set_xticks(range(len(mine)), [f"{b.low:g}–{b.high:g}" for b in mine])
        heights = (f"{percent(v)}% at {mine[k].low:g} to {mine[k].high:g}" for k, v in known)
        seen.append(f"{name} {', '.join(heights)}")
    axes.set_xlim(-0.5, len(bins) / 2 - 0.5)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy, %")
    add_legend(figure)
    blocks: list[Block] = [
        Picture("confidence", "Accuracy by bin of confidence", f"{'; '.join(seen)}.", figure),
        tables.confidence_bins(data.evaluation),
        tables.confidence_thresholds(data.evaluation),
    ]
    return Section("Accuracy against confidence", blocks)


@SECTIONS.add("errors")
def errors(data: ReportData) -> Section | None:
    """Draw and tabulate how well each score detects misclassified trusted images."""
    by_score, table = data.evaluation.trusted.errors, tables.own_errors(data.evaluation)
    if by_score is None or table is None:
        return None
    lines = [
        Line(
            name, 100 * np.array([point.kept for point in entry.curve]),
            100 * np.array([point.risk for point in entry.curve]), colour(k), style(k),
        )
        for k, (name, entry) in enumerate(by_score.items())
    ]  # fmt: skip
    titles = ("trusted images kept, the least trusted rejected first, %", "errors among those, %")
    areas = (f"{name} {percent(entry.aurc.value)}%" for name, entry in by_score.items())
    picture = Picture(
        "errors", "Share of errors against share of images kept",
        f"Risk against coverage. Area under the curve: {', '.join(areas)}.",
        lines_picture(lines, titles, 3.4 + 0.09 * len(lines)),
    )  # fmt: skip
    note = f"In per cent, with 95% intervals. {tables.ERRORS_NOTE}"
    accepted = tables.accepted(data.evaluation)
    blocks: list[Block] = [picture, table, note]
    return Section("The network's own errors", blocks if accepted is None else [accepted, *blocks])


@SECTIONS.add("training")
def training(data: ReportData) -> Section | None:
    """Draw the training curves, if covcli trained the network."""
    if data.training is None:
        return None
    epochs = data.training.epochs
    numbers = np.array([entry.epoch for entry in epochs])
    blocks: list[Block] = []
    for name, keys, factor in (
        ("loss", ("loss", "cross_entropy", "penalty"), 1),
        ("accuracy", ("accuracy", "held_out_accuracy"), 100),
    ):
        values = {key.replace("_", " "): [factor * getattr(e, key) for e in epochs] for key in keys}
        lines = [
            Line(key, numbers, np.array(of_key), colour(k), "-", "o")
            for k, (key, of_key) in enumerate(values.items())
        ]
        ends = (f"{key} {of_key[0]:.3g} to {of_key[-1]:.3g}" for key, of_key in values.items())
        titles = ("epoch", name if factor == 1 else f"{name}, %")
        blocks.append(
            Picture(
                f"training-{name}", f"{name} by epoch".capitalize(),
                f"From the first to the last epoch: {', '.join(ends)}.",
                lines_picture(lines, titles, 3.2),
            )
        )  # fmt: skip
    if (watched := tables.watched(data.training)) is not None:
        blocks.append(watched)
    return Section("Training", blocks)


@SECTIONS.add("samples")
def samples(data: ReportData) -> Section:
    """Show each set's most suspicious flagged images, and the least suspicious that passed."""
    blocks: list[Block] = []
    for i, name in enumerate(data.sets):
        for kind, order, shown in (
            ("flagged", "most", data.samples.flagged[i]),
            ("passed", "least", data.samples.passed[i]),
        ):
            images = [
                _thumbnail(data, name, kind, int(row), pixels)
                for row, pixels in zip(shown.rows, shown.images, strict=True)
            ]
            title = f"{name}: {kind}, the {order} suspicious first"
            blocks.append(Gallery(f"samples-{i}-{kind}", title, images, f"No image {kind}."))
    return Section("Flagged and missed images", blocks)


def _thumbnail(data: ReportData, name: str, kind: str, row: int, pixels: np.ndarray) -> Thumbnail:
    of_set = data.scores[name]
    p_value = f"p = {of_set.p_value[row]:.2g}"
    classes = [c.name for c in data.evaluation.trusted.false_alarms_by_class]
    predicted = classes[of_set.predicted[row]]
    title = f"image {row}" if of_set.file is None else PurePath(of_set.file[row]).name
    seen = f"{title} of {name}: {kind}, predicted {predicted}, {p_value}"
    return Thumbnail(pixels, (title, f"predicted {predicted}", p_value), seen)


@SECTIONS.add("explanations")
def explanations(data: ReportData) -> Section | None:
    """Show the explanations of the most suspicious images of each set, if requested."""
    entries = data.evaluation.explanations
    if not entries:
        return None
    order = [point.name for point in data.evaluation.points]
    blocks: list[Block] = [EXPLAINED]
    for k, (entry, pixels) in enumerate(zip(entries, data.samples.explained, strict=True)):
        points = ", ".join(f"{p.name} {percent(p.share)}%" for p in entry.points[:3])
        picture = Picture(
            f"explanation-{k}", "Shares of the score, and the channels that left their range",
            f"Largest shares of the score: {points}.", explanation_picture(entry, order),
        )  # fmt: skip
        gallery = Gallery(f"explained-{k}", tables.explanation(entry), _explained(entry, pixels))
        blocks += [gallery, picture]
        if (left := tables.left_channels(entry)) is not None:
            blocks.append(left)
    return Section("Why images were flagged", blocks)


def _explained(entry: Explanation, pixels: ExplainedImage) -> list[Thumbnail]:
    """Return the image, and where its worst channel is active if that is known."""
    images = [Thumbnail(pixels.image, (f"image {entry.row}",), tables.explanation(entry))]
    if pixels.fires is not None and entry.mapped is not None:
        worst = next(point.channels[0] for point in entry.points if point.name == entry.mapped)
        place = f"{entry.mapped}, channel {worst.channel}"
        mapped = heat(pixels.image, pixels.fires)
        images.append(Thumbnail(mapped, (f"where {place} is active",), f"Where {place} is active"))
    return images


@SECTIONS.add("provenance")
def provenance(data: ReportData) -> Section:
    """Tabulate the provenance of the results."""
    return Section("Provenance", [tables.provenance(data.evaluation)])
