"""Tables and sentences about an evaluation, shared by terminal, HTML, Markdown and summaries.

Numbers are in per cent, followed by their 95% interval if they have one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from covcli.data.images import DataRecord
from covcli.reporting.documents import (
    ClassAlarms,
    Deceived,
    Detection,
    EvaluationResult,
    Explanation,
    GateOutcome,
    LeftChannel,
    MeanDetection,
    PointShare,
    TrainingLog,
    UntrustedSet,
)

NONE = "–"
FIGURE_BEGINS = "0123456789[<>+−-–"
MOST_NAMED = 8  # the largest number of sets that a verdict lists
MOST_CLASSES = 20  # the largest number of rows of a table with one row a class
FIGURES = {
    "auroc": "AUROC",
    "aupr_out": "AUPR-out",
    "aupr_in": "AUPR-in",
    "fpr95": "FPR95",
    "detection_rate": "detected at α",
}
FPR95_NOTE = (
    "FPR95: share of trusted images flagged at the threshold that catches 95% of the untrusted."
)
ERRORS_NOTE = (
    "AUROC: the chance that a wrong answer scores higher than a right one. AURC: mean share of "
    "errors among the images kept, when the least trusted are rejected first; E-AURC: how much "
    "of it a perfect order would save. AUGRC: the same mean with errors counted among all images."
)


GATE_HEAD = ["gate", "set", "value", "bound", "interval", "outcome"]


class Interval(Protocol):
    """A share with its interval; all are None if there was no image."""

    @property
    def value(self) -> float | None:
        """The share."""

    @property
    def low(self) -> float | None:
        """The interval's lower limit."""

    @property
    def high(self) -> float | None:
        """The interval's upper limit."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes
    ----------
    title
        The title.
    head
        The headings of the columns.
    rows
        The cells of each row.
    footer
        A last row, such as means, or None.

    Examples
    --------
    >>> Table("Sizes", ["point", "neurons"], [["1", "16"], ["2", "32"]]).numeric
    [False, True]
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    footer: list[str] | None = None

    @property
    def lines(self) -> list[list[str]]:
        """The rows, and the footer if there is one."""
        return self.rows if self.footer is None else [*self.rows, self.footer]

    @property
    def numeric(self) -> list[bool]:
        """Which columns are numeric, and aligned to the right; the first column never is."""
        columns = zip(*self.lines, strict=True)
        figures = [all(cell[:1] in FIGURE_BEGINS for cell in column) for column in columns]
        return [False, *figures[1:]] if figures else [False] * len(self.head)


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share in per cent; a dash for None.

    Examples
    --------
    >>> percent(0.98765), percent(0.0485, 2), percent(None)
    ('98.8', '4.85', '–')
    """
    return NONE if value is None else f"{100 * value:.{digits}f}"


def interval(estimate: Interval | None, digits: int = 1) -> str:
    """Format a share with its interval in per cent; a dash for None.

    Examples
    --------
    >>> from covcli.reporting.documents import Estimate
    >>> interval(Estimate(0.964, 0.958, 0.97))
    '96.4 [95.8, 97.0]'
    """
    if estimate is None or estimate.value is None:
        return NONE
    low, high = percent(estimate.low, digits), percent(estimate.high, digits)
    return f"{percent(estimate.value, digits)} [{low}, {high}]"


def verdict(result: EvaluationResult) -> str:
    """Return a one-line summary of an evaluation: its gates, or the shares flagged."""
    if result.gates:
        passed = sum(outcome.passed for outcome in result.gates)
        ending = "" if passed == len(result.gates) else ": do not release"
        return f"{passed} of {len(result.gates)} gates passed{ending}"
    alarms = result.trusted.false_alarm_rate
    caught = [
        (short, entry.scores["coverage"].detection_rate)
        for short, entry in zip(short_names(result), result.untrusted, strict=True)
    ]
    rates = [(rate.value, name) for name, rate in caught if rate is not None]
    return (
        f"flags {percent(alarms.value)}% of trusted images (promised at most "
        f"{percent(alarms.promised_high)}%), catches {_caught(rates)}"
    )


def _caught(rates: list[tuple[float, str]]) -> str:
    if len(rates) <= MOST_NAMED:
        return ", ".join(f"{about(value)} of {name}" for value, name in rates)
    (low, worst), (high, best) = min(rates), max(rates)
    return f"{about(low)} of {worst} to {about(high)} of {best}, of {len(rates)} sets"


def about(share: float) -> str:
    """Format a share in whole per cent; 0% and 100% are exact.

    Examples
    --------
    >>> about(0.765), about(0.999), about(1.0), about(0.001)
    ('76%', 'over 99%', '100%', 'under 1%')
    """
    if 0.995 <= share < 1:
        return "over 99%"
    return "under 1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"


def short_names(result: EvaluationResult) -> list[str]:
    """Return the untrusted sets' names, without parameters if they stay distinct."""
    names = [entry.name for entry in result.untrusted]
    short = [name.partition("?")[0] for name in names]
    return [s if short.count(s) == 1 else name for s, name in zip(short, names, strict=True)]


def gates(result: EvaluationResult) -> Table | None:
    """Return the table of gates and outcomes; None without gates."""
    if not result.gates:
        return None
    return Table("Gates", GATE_HEAD, [gate_row(outcome) for outcome in result.gates])


def gate_row(outcome: GateOutcome) -> list[str]:
    """Return the cells of a gate and its outcome, for the headings `GATE_HEAD`."""
    span = f"[{percent(outcome.low)}, {percent(outcome.high)}]"
    bound = f"{outcome.relation} {percent(outcome.bound)}"
    verdict = "passed" if outcome.passed else "failed"
    return [gated(outcome), outcome.set, percent(outcome.value, 2), bound, span, verdict]


def gated(outcome: GateOutcome) -> str:
    """Return the name of the metric that a gate compares with its bound."""
    if outcome.statistic == "value":
        return outcome.metric
    return f"{outcome.metric}.{outcome.statistic}"


def false_alarms(result: EvaluationResult) -> str:
    """Return a sentence about the false alarms and the interval that calibration guarantees."""
    alarms = result.trusted.false_alarm_rate
    low, high = percent(alarms.promised_low, 2), percent(alarms.promised_high, 2)
    return (
        f"Of {result.trusted.images} trusted images of {result.trusted.name} (accuracy "
        f"{percent(result.trusted.accuracy)}%), {interval(alarms, 2)}% were flagged at "
        f"{result.guarantee.mode} α = {alarms.alpha:g}. Calibration on "
        f"{result.signature.calibration_scores} scores promises {low} to {high}% of that many "
        "images, with 95% probability if no two scores are equal."
    )


def accepted(result: EvaluationResult) -> str | None:
    """Return a sentence about the answers that pass; None without a bound on the error rate."""
    a = result.trusted.accepted
    if a is None:
        return None
    return (
        f"Of the trusted images' answers {interval(a.coverage)}% pass and {a.unsure} are unsure; "
        f"of those that pass {interval(a.error_rate, 2)}% are wrong ({a.wrong} of {a.images}; "
        f"promised at most {percent(a.max_error, 2)}%, with 95% confidence)."
    )


def errors_found(result: EvaluationResult, intervals: bool = False) -> str | None:
    """Return a sentence about how well wrong answers are found; None without any.

    The parameters are those of `overview`.
    """
    word = interval if intervals else _value
    errors = result.trusted.errors
    if errors is None:
        return None
    areas = (f"{name} {word(errors[name].auroc)}%" for name in ("coverage", "softmax"))
    advice = " --max-error bounds how many answers that pass are wrong, by softmax."
    return (
        f"The network is wrong on {errors['coverage'].wrong} of {result.trusted.images} trusted "
        f"images; AUROC of its wrong answers among them: {', '.join(areas)}."
        f"{advice if result.trusted.accepted is None else ''}"
    )


def highest_class(result: EvaluationResult) -> str:
    """Return a sentence about the predicted class with the highest false-alarm rate."""
    worst = _highest(result)[0]
    promised = worst.promised_high
    bound = "nothing promised" if promised is None else f"promised at most {percent(promised, 2)}%"
    return (
        f"Highest by predicted class: {worst.name}, {worst.alarms} of {worst.images} "
        f"({percent(worst.value, 2)}%; {bound})."
    )


def class_alarms(result: EvaluationResult) -> Table:
    """Return the table of the highest rates of false alarms by predicted class, highest first.

    It has at most MOST_CLASSES rows, and says so; evaluation.json has all classes.
    """
    classes = _highest(result)
    rows = [
        [c.name, str(c.images), str(c.alarms), interval(c), percent(c.promised_high),
         str(c.calibration_scores)]
        for c in classes[:MOST_CLASSES]
    ]  # fmt: skip
    shown = of_most(len(classes), "classes")
    title = f"False alarms by predicted class, highest rates first ({shown})"
    head = ["predicted class", "images", "alarms", "rate", "promised at most", "calibration scores"]
    return Table(title, head, rows)


def of_most(count: int, what: str, where: str = "; evaluation.json has all") -> str:
    """Return how many rows a table that lists at most MOST_CLASSES shows.

    Examples
    --------
    >>> of_most(10, "classes"), of_most(1000, "classes", "")
    ('10 classes', 'the first 20 of 1000 classes')
    """
    return (
        f"{count} {what}"
        if count <= MOST_CLASSES
        else f"the first {MOST_CLASSES} of {count} {what}{where}"
    )


def _highest(result: EvaluationResult) -> list[ClassAlarms]:
    classes = result.trusted.false_alarms_by_class
    return sorted(classes, key=lambda c: -1.0 if c.value is None else c.value, reverse=True)


def overview(result: EvaluationResult, intervals: bool = False) -> Table:
    """Return the table of the main metrics, one row per untrusted set, with means.

    Parameters
    ----------
    result
        The evaluation.
    intervals
        Whether to add the 95% intervals.
    """
    word = interval if intervals else _value
    rows = []
    for entry in result.untrusted:
        ours, softmax = entry.scores["coverage"], entry.scores["softmax"]
        figures = (ours.auroc, softmax.auroc, ours.fpr95, ours.detection_rate)
        rows.append([entry.name, str(entry.images), *map(word, figures)])
    mean = {m.score: m for m in result.mean_over_sets}
    over_sets = (mean["coverage"].auroc, mean["softmax"].auroc, mean["coverage"].fpr95)
    footer = ["mean", "", *map(word, over_sets), percent(mean_detected(result, "coverage"))]
    head = ["untrusted", "images", "AUROC", "softmax AUROC", "FPR95", "detected at α"]
    return Table("Detection", head, rows, footer if len(rows) > 1 else None)


def comparison(result: EvaluationResult) -> Table:
    """Return the comparison of coverage with the best other score by AUROC, for each set."""
    rows = []
    for entry in result.untrusted:
        ours = entry.scores["coverage"]
        best = max(_others(entry.scores), key=lambda name: entry.scores[name].auroc.value)
        beside = _beside(ours, best, entry.scores[best])
        rows.append([entry.name, str(entry.images), *beside, _value(ours.detection_rate)])
    means = {mean.score: mean for mean in result.mean_over_sets}
    best = max(_others(means), key=lambda name: means[name].auroc.value)
    beside = _beside(means["coverage"], best, means[best])
    footer = ["mean", "", *beside, percent(mean_detected(result, "coverage"))]
    head = [
        "untrusted", "images", "AUROC", "best baseline", "its AUROC", "AUROC difference", "FPR95",
        "its FPR95", "FPR95 difference", "detected at α",
    ]  # fmt: skip
    return Table("Coverage beside the best baseline", head, rows, footer if len(rows) > 1 else None)


def _others(scores: Iterable[str]) -> list[str]:
    return [name for name in scores if name != "coverage"]


def _beside(
    ours: Detection | MeanDetection, name: str, theirs: Detection | MeanDetection
) -> list[str]:
    cells = []
    for key in ("auroc", "fpr95"):
        mine, other = getattr(ours, key).value, getattr(theirs, key).value
        cells += [percent(mine), percent(other), difference(mine - other)]
    return [cells[0], name, *cells[1:]]


def difference(value: float) -> str:
    """Format a difference of two shares in per cent, with its sign.

    Examples
    --------
    >>> difference(0.0874), difference(-0.268), difference(-0.0001)
    ('+8.7', '−26.8', '0.0')
    """
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _value(estimate: Interval | None) -> str:
    return percent(None if estimate is None else estimate.value)


def mean_detected(result: EvaluationResult, score: str) -> float | None:
    """Return a score's mean detection rate over the untrusted sets; None without thresholds."""
    rates = [entry.scores[score].detection_rate for entry in result.untrusted]
    known = [rate.value for rate in rates if rate is not None]
    return sum(known) / len(known) if known and len(known) == len(rates) else None


def detection(result: EvaluationResult) -> Table:
    """Return the table of all detection metrics, by untrusted set and score."""
    rows = [
        [name, str(part.images), mean.score, *_figures(scores[mean.score])]
        for name, part, scores in _parts(result.untrusted)
        for mean in result.mean_over_sets
    ]
    return Table("Detection", ["untrusted", "images", "score", *FIGURES.values()], rows)


def _parts(
    entries: Sequence[UntrustedSet],
) -> Iterator[tuple[str, UntrustedSet | Deceived, dict[str, Detection]]]:
    """Yield each set, and after an attack also its successes."""
    for entry in entries:
        yield entry.name, entry, entry.scores
        if entry.deceived is not None and entry.deceived.scores is not None:
            yield f"{entry.name}, successes", entry.deceived, entry.deceived.scores


def _figures(figures: Detection) -> list[str]:
    return [interval(getattr(figures, key)) for key in FIGURES]


def means(result: EvaluationResult) -> Table:
    """Return the table of each score's mean over the untrusted sets."""
    rows = [[m.score, interval(m.auroc), interval(m.fpr95)] for m in result.mean_over_sets]
    return Table("Mean over the untrusted sets", ["score", "AUROC", "FPR95"], rows)


def deceptions(result: EvaluationResult) -> list[str]:
    """Return a sentence about the success rate of each attack."""
    return [
        f"{entry.name} deceives the network on {interval(entry.success_rate)}% of the images that "
        f"it got right; {entry.deceived.already_wrong} of {entry.images} were wrong before."
        for entry in result.untrusted
        if entry.deceived is not None
    ]


def coverage(result: EvaluationResult) -> Table:
    """Return the table of the shares of neurons inside their range, by coverage point and set."""
    sets = list(result.points[0].coverage)
    rows = [
        [p.name, str(p.neurons), *(percent(p.coverage[name], 2) for name in sets)]
        for p in result.points
    ]
    title = "Coverage: share of neurons inside their range"
    return Table(title, ["coverage point", "neurons", *sets], rows)


def confidence_bins(result: EvaluationResult) -> Table:
    """Return the table of the accuracy on trusted images by bin of confidence."""
    rows = [
        [b.confidence, f"{b.low:g}–{b.high:g}", str(b.images), percent(b.accuracy)]
        for b in result.confidence_bins
    ]
    return Table("Accuracy by confidence", ["confidence", "bin", "images", "accuracy"], rows)


def confidence_thresholds(result: EvaluationResult) -> Table:
    """Return the table of the share of trusted images above a confidence, and their accuracy."""
    rows = [
        [k.confidence, f"{k.threshold:g}", percent(k.kept), percent(k.accuracy)]
        for k in result.confidence_thresholds
    ]
    return Table("Accuracy kept", ["confidence", "at least", "kept", "accuracy"], rows)


def own_errors(result: EvaluationResult) -> Table | None:
    """Return the table of how well each score detects the network's errors; None if undefined."""
    errors = result.trusted.errors
    if errors is None:
        return None
    rows = [
        [name, f"{e.wrong} of {result.trusted.images}",
         *map(interval, (e.auroc, e.aurc, e.excess_aurc, e.augrc))]
        for name, e in errors.items()
    ]  # fmt: skip
    head = ["score", "wrong", "AUROC", "AURC", "E-AURC", "AUGRC"]
    return Table("The network's own errors", head, rows)


def watched(log: TrainingLog) -> Table | None:
    """Return the table of the coverage during training; None if it was not measured."""
    looks = [(entry.epoch, entry.watched) for entry in log.epochs if entry.watched is not None]
    if not looks:
        return None
    rows = [[str(epoch), *(percent(s.mean_coverage) for s in look.sets)] for epoch, look in looks]
    return Table("Coverage in training", ["epoch", *(s.name for s in looks[0][1].sets)], rows)


def provenance(result: EvaluationResult) -> Table:
    """Return the table of the provenance of the results."""
    signature = result.signature
    rows = [[key, str(value)] for key, value in result.provenance.items()]
    rows += [["checkpoint fingerprint", signature.checkpoint_fingerprint],
             ["signature fingerprint", signature.signature_fingerprint],
             ["signature data", signature.trusted.images],
             ["calibration data", signature.calibration.images]]  # fmt: skip
    rows.append([f"data of {result.trusted.name}", result.trusted.fingerprint])
    rows += [[f"data of {entry.name}", entry.fingerprint] for entry in result.untrusted]
    return Table("Provenance", ["what", "value"], rows)


def checked(result: EvaluationResult) -> Table:
    """Tabulate what was checked: network, signature, data with counts, versions."""
    signature, provenance = result.signature, result.provenance
    versions = [
        f"{name} {provenance[name]}" for name in ("covcli", "torch", "python") if name in provenance
    ]
    sets = ", ".join(f"{entry.name} ({entry.images})" for entry in result.untrusted)
    rows = [
        ["network", f"{signature.checkpoint}, weights {signature.checkpoint_fingerprint[:12]}"],
        ["signature", f"{signature.parameters}, file {signature.signature_fingerprint[:12]}"],
        ["built from", _recorded(signature.trusted)],
        ["calibrated by",
         f"{_recorded(signature.calibration)}, {signature.calibration_scores} scores"],
        ["trusted", f"{result.trusted.name} ({result.trusted.images})"],
        ["untrusted", sets],
        ["guarantee", f"{result.guarantee.mode}, α = {result.guarantee.alpha:g}"],
        ["versions", ", ".join(versions)],
        ["time", str(provenance.get("time", ""))],
    ]  # fmt: skip
    return Table("What was checked", ["what", "value"], [row for row in rows if row[1]])


def _recorded(data: DataRecord) -> str:
    return f"{data.spec}, images {data.images[:12]}"


def explanation(entry: Explanation) -> str:
    """Return a sentence about an explained image and its verdict."""
    known = "" if entry.label is None else f", labelled {entry.label}"
    verdict = "flagged" if entry.untrusted else "not flagged"
    logits = f" The logits are {percent(entry.logits)}% of the score." if entry.logits else ""
    return (
        f"{entry.set}, image {entry.row}: predicted {entry.predicted}{known}; {verdict}, "
        f"score {entry.score:.2f}, p-value {entry.p_value:.2g}.{logits}"
    )


def point_share(point: PointShare) -> str:
    """Return a sentence about a coverage point's share of a score."""
    return (
        f"{point.name}: {percent(point.share)}% of the score (z = {point.z:.1f}), {point.left} "
        f"neurons ({percent(1 - point.coverage)}%) outside their range"
    )


def left_channels(entry: Explanation) -> Table | None:
    """Return the table of the listed neurons outside their range; None if there are none."""
    rows = [
        [point.name, channel.label, *channel_cells(channel)]
        for point in entry.points
        for channel in point.channels
    ]
    head = ["coverage point", "channel", "value", "trusted range", "outside, widths"]
    return Table("What left its range", head, rows) if rows else None


def left_channel(channel: LeftChannel) -> str:
    """Return a sentence about a neuron outside its range."""
    value, span, widths = channel_cells(channel)
    beyond = "" if widths == NONE else f", outside by {widths} widths"
    return f"{channel.label}: {value}, trusted {span}{beyond}"


def channel_cells(channel: LeftChannel) -> tuple[str, str, str]:
    """Format a neuron's value, its range, and the distance from it in widths of the range."""
    low, high = channel.low, channel.high
    span = f"{_end(low)} to {_end(high)}" if low != high else f"always {_end(low)}"
    widths = channel.outside_by
    return f"{channel.value:.3g}", span, f"{widths:.2g}" if isfinite(widths) else NONE


def _end(value: float) -> str:
    return f"{value:.3g}" if isfinite(value) else "no end"
