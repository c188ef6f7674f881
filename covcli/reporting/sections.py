"""SECTIONS: the parts of a report, in their order. Each is a function from files to blocks."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from covcli.core.specs import Registry
from covcli.reporting.pictures import (
    COLOURS,
    Picture,
    ReportData,
    Section,
    colours,
    explanation_picture,
    label,
    new_axes,
)
from covcli.reporting.tables import Table, interval, percent

STYLES = ["-", "--", ":"]
SCORES = {"coverage": "score", "softmax": "softmax_confidence"}

SectionMaker: TypeAlias = Callable[[ReportData], Section | None]
SECTIONS: Registry[SectionMaker] = Registry("report section")


@SECTIONS.add("summary")
def summary(data: ReportData) -> Section:
    """Say what was measured and what that does not show."""
    e, trusted = data.evaluation, data.evaluation["trusted"]
    alarms, signature = trusted["false_alarm_rate"], data.evaluation["signature"]
    guarantee = e["guarantee"]
    measured = (
        f"The signature {signature['parameters']} of the checkpoint "
        f"{signature['checkpoint_fingerprint'][:12]} scored {trusted['images']} trusted test "
        f"images ({trusted['name']}, accuracy {percent(trusted['accuracy'])}%) and "
        f"{len(e['untrusted'])} untrusted sets. It was calibrated on "
        f"{signature['calibration_scores']} scores of held-out trusted images. At "
        f"{guarantee['mode']} α = {alarms['alpha']:g} it flagged "
        f"{percent(alarms['value'], 2)}% of the trusted test images (95% interval "
        f"{percent(alarms['low'], 2)} to {percent(alarms['high'], 2)}%); the calibration "
        f"promises {percent(alarms['promised_low'], 2)} to "
        f"{percent(alarms['promised_high'], 2)}% of so many images with 95% probability. "
        f"{guarantee['statement']}"
    )
    not_shown = (
        "What this does not show: the false-alarm rate of images that are not exchangeable with "
        "the calibration images. Detection was measured on the sets named here; another kind "
        "of untrusted input may be detected better or worse, and an attacker who knows the "
        "signature can attack it too. The intervals speak of the draw of the test images, not of "
        "another training or another calibration. A trusted verdict does not mean that the answer "
        "is right: see the accuracy by confidence."
    )
    return Section("What was measured, and what it does not show",
                   [measured, not_shown, *data.evaluation["warnings"]])  # fmt: skip


@SECTIONS.add("false alarms")
def false_alarms(data: ReportData) -> Section:
    """Tabulate the false alarms by predicted class, beside what is promised of each."""
    rows = [
        [c["name"], str(c["images"]), str(c["alarms"]), interval(c), percent(c["promised_high"]),
         str(c["calibration_scores"])]
        for c in data.evaluation["trusted"]["false_alarms_by_class"]
    ]  # fmt: skip
    note = (
        "Rates in per cent, with exact 95% intervals; promised is what the share among so many "
        "images stays at or below with 95% probability, for each class by itself. Marginal "
        "calibration promises nothing of a single class."
    )
    head = ["predicted class", "images", "alarms", "rate", "promised at most", "calibration scores"]
    return Section("False alarms by predicted class", [Table(head, rows), note])


@SECTIONS.add("detection")
def detection(data: ReportData) -> Section:
    """Tabulate the figures of each untrusted set, ours beside the baselines'."""
    means = data.evaluation["mean_over_sets"]
    keys = ["auroc", "aupr_out", "aupr_in", "fpr95", "detection_rate"]
    entries = data.evaluation["untrusted"]
    parts = [(entry["name"], entry) for entry in entries]
    parts += [(f"{entry['name']}, successes", entry["deceived"]) for entry in entries
              if entry["deceived"] and entry["deceived"]["scores"]]  # fmt: skip
    rows = [
        [title, str(part["images"]), mean["score"],
         *[interval(part["scores"][mean["score"]][key]) for key in keys]]
        for title, part in parts
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
            [[m["score"], interval(m["auroc"]), interval(m["fpr95"])] for m in means],
        ),
    ]  # fmt: skip
    blocks += [
        f"{entry['name']} deceives the network on {interval(entry['success_rate'])}% of the "
        f"images that it got right; {entry['deceived']['already_wrong']} of {entry['images']} "
        "were wrong before the attack."
        for entry in entries
        if entry["deceived"]
    ]
    return Section("Detection", blocks)


@SECTIONS.add("coverage")
def coverage(data: ReportData) -> Section:
    """Draw the share of neurons inside their range at each coverage point."""
    points = data.evaluation["points"]
    figure, axes = new_axes(height=4.5)
    for name, colour in zip(data.sets, colours(len(data.sets)), strict=True):
        shares = [100 * point["coverage"][name] for point in points]
        axes.plot(range(len(points)), shares, "o-", color=colour, label=label(name), markersize=4)
    axes.set_xticks(range(len(points)), [label(p["name"]) for p in points], rotation=60, ha="right")
    axes.set_ylabel("neurons inside their range, %")
    axes.legend(fontsize=8)
    return Section(
        "Coverage by layer", [Picture("coverage", "Coverage by coverage point and set", figure)]
    )


@SECTIONS.add("scores")
def scores(data: ReportData) -> Section:
    """Draw the distribution of the scores, with the calibrated threshold."""
    figure, axes = new_axes()
    low, high = data.scores["score"].quantile([0.001, 0.999])
    edges = np.linspace(low, high, 61).tolist()
    for name, colour in zip(data.sets, colours(len(data.sets)), strict=True):
        values = data.scores.loc[data.scores["set"] == name, "score"].clip(low, high)
        axes.hist(values, edges, density=True, histtype="step", color=colour, label=label(name),
                  linewidth=1.5)  # fmt: skip
    threshold = data.evaluation["signature"]["threshold"]
    axes.axvline(threshold, color="black", linestyle=":", label="overall threshold")
    axes.set_xlabel("score (larger: less trusted)")
    axes.set_ylabel("density")
    axes.legend(fontsize=8)
    return Section("Distribution of the scores", [Picture("scores", "Score densities", figure)])


@SECTIONS.add("roc")
def roc(data: ReportData) -> Section:
    """Draw the ROC curves, ours solid and the softmax baseline dashed."""
    figure, axes = new_axes(5.5, 5.0)
    trusted = data.scores[data.scores["set"] == "trusted"]
    for name, colour in zip(data.sets[1:], colours(len(data.sets))[1:], strict=True):
        mine = data.scores[data.scores["set"] == name]
        for score, style in (("coverage", "-"), ("softmax", "--")):
            sign = 1 if score == "coverage" else -1
            false, true = _roc(sign * trusted[SCORES[score]], sign * mine[SCORES[score]])
            axes.plot(false, true, style, color=colour, label=f"{label(name)}, {score}")
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
        figure, axes = new_axes(6.5, 5.0)
        axes.plot(*_roc(trusted["score"], mine["score"]), color="black", label="coverage")
        for j, score in enumerate(names):
            colour, style = COLOURS[j % 7], STYLES[j // 7 % len(STYLES)]
            curve = _roc(trusted[f"{score}_score"], mine[f"{score}_score"])
            axes.plot(*curve, style, color=colour, label=score, linewidth=1)
        axes.set_title(label(name), fontsize=9)
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
    figure, axes = new_axes(7.5, 3.5)
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
         percent(entry["accuracy"])] for entry in bins
    ]  # fmt: skip
    by_threshold = [
        [entry["confidence"], f"{entry['threshold']:g}", percent(entry["kept"]),
         percent(entry["accuracy"])] for entry in data.evaluation["confidence_thresholds"]
    ]  # fmt: skip
    return Section(
        "Accuracy against confidence",
        [
            Picture("confidence", "Accuracy by confidence bin", figure),
            Table(["confidence", "bin", "images", "accuracy, %"], by_bin),
            Table(["confidence", "at least", "kept, %", "accuracy, %"], by_threshold),
        ],
    )


@SECTIONS.add("errors")
def errors(data: ReportData) -> Section | None:
    """Draw and tabulate how well each score finds wrongly classified trusted images."""
    found = data.evaluation["trusted"]["errors"]
    if found is None:
        return None
    figure, axes = new_axes(7.5, 3.5)
    for (name, entry), colour in zip(found.items(), colours(len(found)), strict=True):
        kept = [100 * point["kept"] for point in entry["curve"]]
        risks = [100 * point["risk"] for point in entry["curve"]]
        axes.plot(kept, risks, color=colour, label=label(name))
    axes.set_xlabel("trusted test images kept, the least trusted rejected first, %")
    axes.set_ylabel("errors among those kept, %")
    axes.legend(fontsize=8)
    rows = [
        [name, str(entry["wrong"]),
         *[interval(entry[key]) for key in ("auroc", "aurc", "excess_aurc")]]
        for name, entry in found.items()
    ]  # fmt: skip
    note = (
        "In per cent, with 95% bootstrap intervals. AUROC: the chance that a wrong answer scores "
        "higher than a right one. AURC: the area under the curve above; E-AURC: what of it a "
        "score that ranks every error last would save."
    )
    table = Table(["score", "wrong", "AUROC", "AURC", "E-AURC"], rows)
    picture = Picture("errors", "Share of errors against share of images kept", figure)
    return Section("The network's own errors", [picture, table, note])


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
                [str(e["epoch"]), *[percent(s["mean_coverage"]) for s in e["watched"]["sets"]]]
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
            row[0].set_title(f"{label(name)}: {kind}", fontsize=8, loc="left")
        blocks.append(Picture(f"samples-{i}", f"Samples {i}: flagged above, passed below", figure))
    return Section("Flagged and missed images", blocks)


@SECTIONS.add("explanations")
def explanations(data: ReportData) -> Section | None:
    """Show why the most suspicious images of each set got their scores, where that was asked."""
    entries = data.evaluation.get("explanations", [])
    if not entries:
        return None
    order = [point["name"] for point in data.evaluation["points"]]
    blocks: list[str | Table | Picture] = [
        "The most suspicious images of each set; those of the trusted set that were flagged are "
        "false alarms. A coverage point's share is its part in the score. For the three points "
        "with the largest shares the channels are shown that left the range of the predicted "
        "class farthest: the band is that range, and the mark is the image's value, on a scale "
        "of widths of the range. An arrow stands for a value beyond the scale, or for a range of "
        "no width. The small map shows where a channel fires, not why."
    ]
    for k, entry in enumerate(entries):
        figure = explanation_picture(
            entry, order, data.samples[f"explained_{k}"], data.samples.get(f"explained_{k}_map")
        )
        blocks += [_verdict(entry), Picture(f"explanation-{k}", f"Explanation {k}", figure)]
    return Section("Why images were flagged", blocks)


def _verdict(entry: dict[str, Any]) -> str:
    known = "" if entry["label"] is None else f", labelled {entry['label']}"
    verdict = "flagged" if entry["untrusted"] else "not flagged"
    return (
        f"{entry['set']}, image {entry['row']}: predicted {entry['predicted']}{known}; {verdict}, "
        f"score {entry['score']:.2f}, p-value {entry['p_value']:.2g}."
    )


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
