"""SECTIONS: the parts of a report, in their order. Each is a function from files to blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covcli.errors import one_line
from covcli.registry import Registry

# Okabe and Ito's colours, which the colour-blind tell apart; the first is for trusted images.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#000000"]
STYLES = ["-", "--", ":"]
SCORES = {"coverage": "score", "softmax": "softmax_confidence"}


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


SectionMaker: TypeAlias = Callable[[ReportData], Section | None]
SECTIONS: Registry[SectionMaker] = Registry("report section")


def _axes(width: float = 7.5, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _label(name: str) -> str:
    """Shorten a name for a legend; matplotlib reads dollars as mathematics."""
    return one_line(name).replace("$", r"\$")[:40]


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _interval(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "–"
    low, high = _percent(estimate["low"]), _percent(estimate["high"])
    return f"{_percent(estimate['value'])} [{low}, {high}]"


@SECTIONS.add("summary")
def summary(data: ReportData) -> Section:
    """Say what was measured and what that does not show."""
    e, trusted = data.evaluation, data.evaluation["trusted"]
    alarms, signature = trusted["false_alarm_rate"], data.evaluation["signature"]
    measured = (
        f"The signature {signature['parameters']} of the checkpoint "
        f"{signature['checkpoint_fingerprint'][:12]} scored {trusted['images']} trusted test "
        f"images ({trusted['name']}, accuracy {_percent(trusted['accuracy'])}%) and "
        f"{len(e['untrusted'])} untrusted sets. It was calibrated on "
        f"{signature['calibration_scores']} scores of held-out trusted images. At α = "
        f"{alarms['alpha']:g} it flagged {_percent(alarms['value'], 2)}% of the trusted test "
        f"images (95% interval {_percent(alarms['low'], 2)} to {_percent(alarms['high'], 2)}%); "
        f"the calibration promises {_percent(alarms['promised_low'], 2)} to "
        f"{_percent(alarms['promised_high'], 2)}% with 95% probability."
    )
    not_shown = (
        "What this does not show: the false-alarm rate holds for images exchangeable with the "
        "calibration images, and ends where they are not, for instance under another camera or "
        "another mixture of classes. Detection was measured on the sets named here; another kind "
        "of untrusted input may be detected better or worse, and an attacker who knows the "
        "signature can attack it too. The intervals speak of the draw of the test images, not of "
        "another training or another calibration. A trusted verdict does not mean that the answer "
        "is right: see the accuracy by confidence."
    )
    return Section("What was measured, and what it does not show",
                   [measured, not_shown, *data.evaluation["warnings"]])  # fmt: skip


@SECTIONS.add("detection")
def detection(data: ReportData) -> Section:
    """Tabulate the figures of each untrusted set, ours beside the baselines'."""
    means = data.evaluation["mean_over_sets"]
    keys = ["auroc", "aupr_out", "aupr_in", "fpr95", "detection_rate"]
    rows = [
        [
            entry["name"], str(entry["images"]), mean["score"],
            *[_interval(entry["scores"][mean["score"]][key]) for key in keys],
        ]
        for entry in data.evaluation["untrusted"]
        for mean in means
    ]  # fmt: skip
    blocks: list[str | Table | Picture] = [
        Table(
            ["untrusted", "images", "score", "AUROC", "AUPR-out", "AUPR-in", "FPR95",
             "detected at α"],
            rows,
        ),
        "In per cent, with 95% bootstrap intervals. FPR95 is the share of trusted images flagged "
        "at the threshold that catches 95% of the untrusted. On average over the untrusted sets:",
        Table(
            ["score", "AUROC", "FPR95"],
            [[m["score"], _interval(m["auroc"]), _interval(m["fpr95"])] for m in means],
        ),
    ]  # fmt: skip
    blocks += [
        f"{entry['name']} deceives the network on {_interval(entry['success_rate'])}%."
        for entry in data.evaluation["untrusted"]
        if entry["success_rate"]
    ]
    return Section("Detection", blocks)


@SECTIONS.add("coverage")
def coverage(data: ReportData) -> Section:
    """Draw the share of neurons inside their range at each coverage point."""
    points = data.evaluation["points"]
    figure, axes = _axes(height=4.5)
    for name, colour in zip(data.sets, _colours(len(data.sets)), strict=True):
        shares = [100 * point["coverage"][name] for point in points]
        axes.plot(range(len(points)), shares, "o-", color=colour, label=_label(name), markersize=4)
    axes.set_xticks(
        range(len(points)), [_label(p["name"]) for p in points], rotation=60, ha="right"
    )
    axes.set_ylabel("neurons inside their range, %")
    axes.legend(fontsize=8)
    return Section(
        "Coverage by layer", [Picture("coverage", "Coverage by coverage point and set", figure)]
    )


@SECTIONS.add("scores")
def scores(data: ReportData) -> Section:
    """Draw the distribution of the scores, with the calibrated threshold."""
    figure, axes = _axes()
    low, high = data.scores["score"].quantile([0.001, 0.999])
    edges = np.linspace(low, high, 61).tolist()
    for name, colour in zip(data.sets, _colours(len(data.sets)), strict=True):
        values = data.scores.loc[data.scores["set"] == name, "score"].clip(low, high)
        axes.hist(values, edges, density=True, histtype="step", color=colour, label=_label(name),
                  linewidth=1.5)  # fmt: skip
    threshold = data.evaluation["signature"]["threshold"]
    axes.axvline(threshold, color="black", linestyle=":", label="threshold")
    axes.set_xlabel("score (larger: less trusted)")
    axes.set_ylabel("density")
    axes.legend(fontsize=8)
    return Section("Distribution of the scores", [Picture("scores", "Score densities", figure)])


@SECTIONS.add("roc")
def roc(data: ReportData) -> Section:
    """Draw the ROC curves, ours solid and the softmax baseline dashed."""
    figure, axes = _axes(5.5, 5.0)
    trusted = data.scores[data.scores["set"] == "trusted"]
    for name, colour in zip(data.sets[1:], _colours(len(data.sets))[1:], strict=True):
        mine = data.scores[data.scores["set"] == name]
        for score, style in (("coverage", "-"), ("softmax", "--")):
            sign = 1 if score == "coverage" else -1
            false, true = _roc(sign * trusted[SCORES[score]], sign * mine[SCORES[score]])
            axes.plot(false, true, style, color=colour, label=f"{_label(name)}, {score}")
    axes.set_xlabel("share of trusted images flagged")
    axes.set_ylabel("share of untrusted images flagged")
    axes.legend(fontsize=7, loc="lower right")
    return Section("ROC curves", [Picture("roc", "ROC curves by set and score", figure)])


@SECTIONS.add("baselines")
def baselines(data: ReportData) -> Section | None:
    """Draw the ROC curves of each set, ours in black and the baselines in colour."""
    ours = {"coverage", "softmax"}
    names = [m["score"] for m in data.evaluation["mean_over_sets"] if m["score"] not in ours]
    if not names:
        return None
    trusted = data.scores[data.scores["set"] == "trusted"]
    pictures: list[str | Table | Picture] = []
    for i, name in enumerate(data.sets[1:]):
        mine = data.scores[data.scores["set"] == name]
        figure, axes = _axes(6.5, 5.0)
        axes.plot(*_roc(trusted["score"], mine["score"]), color="black", label="coverage")
        for j, score in enumerate(names):
            colour, style = COLOURS[j % 7], STYLES[j // 7 % len(STYLES)]
            curve = _roc(trusted[f"{score}_score"], mine[f"{score}_score"])
            axes.plot(*curve, style, color=colour, label=score, linewidth=1)
        axes.set_title(_label(name), fontsize=9)
        axes.set_xlabel("share of trusted images flagged")
        axes.set_ylabel("share of untrusted images flagged")
        axes.legend(fontsize=7, loc="lower right")
        pictures.append(Picture(f"baselines-{i}", f"ROC curves of set {i + 1} by score", figure))
    return Section("ROC curves of the baselines", pictures)


def _roc(trusted: pd.Series, untrusted: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    thresholds = np.unique(np.concatenate([trusted, untrusted]))[::-1]
    negatives, positives = np.sort(trusted), np.sort(untrusted)
    false = 1 - np.searchsorted(negatives, thresholds, side="left") / len(negatives)
    true = 1 - np.searchsorted(positives, thresholds, side="left") / len(positives)
    return np.concatenate([[0], false]), np.concatenate([[0], true])


@SECTIONS.add("confidence")
def confidence(data: ReportData) -> Section:
    """Draw and tabulate accuracy against confidence, on the trusted test images."""
    figure, axes = _axes(7.5, 3.5)
    names = ["coverage", "softmax"]
    bins = data.evaluation["confidence_bins"]
    for i, name in enumerate(names):
        mine = [entry for entry in bins if entry["confidence"] == name]
        heights = [100 * (entry["accuracy"] or 0) for entry in mine]
        axes.bar(np.arange(len(mine)) + 0.4 * (i - 0.5), heights, 0.4, color=COLOURS[i], label=name)
        axes.set_xticks(range(len(mine)), [f"{b['low']:g}–{b['high']:g}" for b in mine])
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=8)
    by_bin = [
        [entry["confidence"], f"{entry['low']:g}–{entry['high']:g}", str(entry["images"]),
         _percent(entry["accuracy"])] for entry in bins
    ]  # fmt: skip
    by_threshold = [
        [entry["confidence"], f"{entry['threshold']:g}", _percent(entry["kept"]),
         _percent(entry["accuracy"])] for entry in data.evaluation["confidence_thresholds"]
    ]  # fmt: skip
    return Section(
        "Accuracy against confidence",
        [
            Picture("confidence", "Accuracy by confidence bin", figure),
            Table(["confidence", "bin", "images", "accuracy, %"], by_bin),
            Table(["confidence", "at least", "kept, %", "accuracy, %"], by_threshold),
        ],
    )


@SECTIONS.add("training")
def training(data: ReportData) -> Section | None:
    """Draw the training curves, where the run was trained by covcli."""
    if data.training is None:
        return None
    epochs = data.training["epochs"]
    numbers = [entry["epoch"] for entry in epochs]
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, colour in zip(("loss", "cross_entropy", "penalty"), COLOURS, strict=False):
        left.plot(
            numbers, [e[key] for e in epochs], "o-", color=colour, label=key.replace("_", " ")
        )
    for key, colour in zip(("accuracy", "held_out_accuracy"), COLOURS, strict=False):
        values = [100 * e[key] for e in epochs]
        right.plot(numbers, values, "o-", color=colour, label=key.replace("_", " "))
    right.set_ylabel("%")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    blocks: list[str | Table | Picture] = [Picture("training", "Training curves", figure)]
    watched = [entry for entry in epochs if entry["watched"]]
    if watched:
        head = ["epoch", *[f"coverage of {s['name']}, %" for s in watched[0]["watched"]["sets"]]]
        blocks.append(
            Table(head, [
                [str(e["epoch"]), *[_percent(s["mean_coverage"]) for s in e["watched"]["sets"]]]
                for e in watched
            ])
        )  # fmt: skip
    return Section("Training", blocks)


@SECTIONS.add("samples")
def samples(data: ReportData) -> Section:
    """Show each set's most suspicious flagged images, and the least suspicious that passed."""
    blocks: list[str | Table | Picture] = []
    for i, name in enumerate(data.sets):
        figure = Figure(figsize=(8, 2.4), layout="constrained")
        grid = figure.subplots(2, 8)
        for row, kind in zip(grid, ("flagged", "passed"), strict=True):
            images = data.samples.get(f"{i}_{kind}", np.empty((0, 1, 1, 1)))
            for axes, image in zip(row, images, strict=False):
                axes.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray")
            for axes in row:
                axes.set_axis_off()
            row[0].set_title(f"{_label(name)}: {kind}", fontsize=8, loc="left")
        blocks.append(Picture(f"samples-{i}", f"Samples {i}: flagged above, passed below", figure))
    return Section("Flagged and missed images", blocks)


@SECTIONS.add("provenance")
def provenance(data: ReportData) -> Section:
    """Tabulate what the figures were made of and with."""
    e = data.evaluation
    rows = [[key, str(value)] for key, value in e["provenance"].items()]
    rows += [["checkpoint fingerprint", e["signature"]["checkpoint_fingerprint"]],
             ["signature fingerprint", e["signature"]["signature_fingerprint"]],
             ["signature data", e["signature"]["trusted"]["images"]],
             ["calibration data", e["signature"]["calibration"]["images"]]]  # fmt: skip
    rows += [[f"data of {entry['name']}", entry["fingerprint"]]
             for entry in [e["trusted"], *e["untrusted"]]]  # fmt: skip
    return Section("Provenance", [Table(["what", "value"], rows)])


def _colours(number: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(number)]
