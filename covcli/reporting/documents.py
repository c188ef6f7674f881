"""The JSON documents of a run as dataclasses: evaluation.json and the training log.

`evaluate` and `train` create and write these objects. Everything that is shown of a run is computed
from the same objects, read again.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator

from covcli.core import files, settings
from covcli.core.errors import CovcliError, one_line
from covcli.data.images import DataRecord

Document = TypeVar("Document")
EVALUATION_SCHEMA = 1
ALWAYS_SCORED = {"coverage", "softmax"}
TRAINING_SCHEMA = 1


def _none_as(value: float) -> BeforeValidator:
    """Read null as that value, because JSON has no infinity."""
    return BeforeValidator(lambda given: value if given is None else given)


FromBelow = Annotated[float, _none_as(-math.inf)]
UpTo = Annotated[float, _none_as(math.inf)]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; see `covcli.evaluation.intervals`.

    Examples
    --------
    >>> Estimate(value=0.95, low=0.94, high=0.96).low
    0.94
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Detection:
    """How well a score separates untrusted inputs from trusted ones; all values in [0, 1].

    Attributes
    ----------
    auroc
        Area under the ROC curve: the probability that an untrusted input scores higher (ties count
        half).
    aupr_out, aupr_in
        Average precision with the untrusted, and with the trusted inputs, as the positive class.
    fpr95
        Share of trusted inputs flagged at the threshold that catches 95% of the untrusted.
    detection_rate
        Share of untrusted inputs above their calibrated threshold; None without a threshold.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> found = evaluation.untrusted[0].scores["coverage"]
    >>> found.auroc.value > 0.9, found.fpr95.low <= found.fpr95.value <= found.fpr95.high
    (True, True)
    """

    auroc: Estimate
    aupr_out: Estimate
    aupr_in: Estimate
    fpr95: Estimate
    detection_rate: Estimate | None


@dataclass(frozen=True)
class MeanDetection:
    """The mean metrics of a score over the untrusted sets, with equal weight of the sets.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> [mean.score for mean in evaluation.mean_over_sets]
    ['coverage', 'softmax']
    """

    score: str
    auroc: Estimate
    fpr95: Estimate


@dataclass(frozen=True)
class Bin:
    """Accuracy of images with a confidence in [low, high), or [low, 1] in the last bin."""

    confidence: str
    low: float
    high: float
    images: int
    accuracy: float | None


@dataclass(frozen=True)
class Kept:
    """Share and accuracy of the images with a confidence of at least a threshold."""

    confidence: str
    threshold: float
    kept: float
    accuracy: float | None


@dataclass(frozen=True)
class Risk:
    """The share of errors (`risk`) among a share of images (`kept`), the most trusted ones."""

    kept: float
    risk: float


@dataclass(frozen=True)
class OwnErrors:
    """How well a score detects misclassified images.

    Attributes
    ----------
    wrong
        The number of misclassified images.
    auroc
        The probability that a misclassified image scores higher than a correctly classified one.
    aurc
        Area under the risk-coverage curve: the mean selective risk when 1, 2, …, n images are kept.
        It equals the error rate for a random score; lower is better.
    excess_aurc
        E-AURC: the excess of the area over that of a score that ranks every error last; 0 is best.
    curve
        The risk-coverage curve, at most 101 points, by ascending share kept.
    augrc
        Area under the generalised risk: the mean, over the shares of images kept, of the share of
        all images that are kept and misclassified. It is half the error rate for a random score;
        lower is better. None in documents of earlier versions.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> for score, errors in (evaluation.trusted.errors or {}).items():
    ...     assert errors.excess_aurc.value <= errors.aurc.value, score
    """

    wrong: int
    auroc: Estimate
    aurc: Estimate
    excess_aurc: Estimate
    curve: list[Risk]
    augrc: Estimate | None = None


@dataclass(frozen=True)
class FalseAlarms:
    """The share of trusted test images flagged at α, and the interval that calibration guarantees.

    Attributes
    ----------
    alpha
        The guaranteed false-alarm rate.
    value, low, high
        The share, with its exact 95% interval.
    promised_low, promised_high
        The 95% interval of the share among that many images, over the draw of calibration and test
        images. For a certified guarantee, `promised_low` is 0 and `promised_high` a one-sided 95%
        bound.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> rate = evaluation.trusted.false_alarm_rate
    >>> rate.alpha, rate.low <= rate.value <= rate.high
    (0.05, True)
    """

    alpha: float
    value: float
    low: float
    high: float
    promised_low: float
    promised_high: float


@dataclass(frozen=True)
class ClassAlarms:
    """False alarms among the trusted test images predicted as one class.

    Attributes
    ----------
    name
        The class.
    images, alarms
        The number of images predicted as it, and of those that were flagged.
    value, low, high
        The share flagged with its exact 95% interval; None without images.
    calibration_scores
        The number of calibration scores of images predicted as the class.
    threshold
        The score above which such an image is flagged.
    promised_high
        The 95% upper bound of the share among that many images; None if nothing is guaranteed for a
        single class, or without images.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> classes = evaluation.trusted.false_alarms_by_class
    >>> sum(entry.images for entry in classes) == evaluation.trusted.images
    True
    """

    name: str
    images: int
    alarms: int
    value: float | None
    low: float | None
    high: float | None
    calibration_scores: int
    threshold: UpTo
    promised_high: float | None


@dataclass(frozen=True)
class Guaranteed:
    """The guarantee of the false-alarm rate.

    Attributes
    ----------
    mode
        "marginal", "by-class", "certified" or "certified-overall".
    alpha
        The rate.
    confidence
        0.95, over the draw of the calibration images, if the rate is certified; else None.
    statement
        The guarantee in words, with its limits.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> evaluation.guarantee.mode, evaluation.guarantee.statement[:42]
    ('marginal', 'An image like the calibration images raise')
    """

    mode: str
    alpha: float
    confidence: float | None
    statement: str


@dataclass(frozen=True)
class Accepted:
    """The answers on trusted test images that pass, and the wrong ones among them.

    Attributes
    ----------
    max_error
        The guaranteed bound of the share of wrong answers among those that pass, with 95%
        confidence over the draw of the calibration images.
    images, unsure, wrong
        The number of answers that pass; of `unsure` ones; and of wrong ones that pass.
    coverage
        The share of answers that pass, with its exact 95% interval.
    error_rate
        The share of wrong answers among those that pass, with its exact 95% interval; None if none
        passes.
    """

    max_error: float
    images: int
    unsure: int
    wrong: int
    coverage: Estimate
    error_rate: Estimate | None


@dataclass(frozen=True)
class TrustedSet:
    """The results on the trusted test images.

    Attributes
    ----------
    name, images, fingerprint
        The specification, the number of images, and the digest of the data.
    accuracy
        The network's accuracy, in [0, 1].
    false_alarm_rate, false_alarms_by_class
        The false alarms, overall and by predicted class.
    mean_confidence
        The mean confidence, by "coverage" and "softmax".
    errors
        How well each score detects misclassified images; None if no image, or every image, is
        misclassified.
    accepted
        The answers that pass; None without a bound on the error rate.
    unreadable
        The number of files skipped because they cannot be read.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> evaluation.trusted.name, evaluation.trusted.images
    ('digits', 360)
    """

    name: str
    images: int
    fingerprint: str
    accuracy: float
    false_alarm_rate: FalseAlarms
    false_alarms_by_class: list[ClassAlarms]
    mean_confidence: dict[str, float]
    errors: dict[str, OwnErrors] | None
    accepted: Accepted | None = None
    unreadable: int = 0


@dataclass(frozen=True)
class Deceived:
    """The successes of an attack: images classified correctly before it and wrongly after.

    Attributes
    ----------
    images
        The number of successes.
    already_wrong
        The number of attacked images that were misclassified before the attack.
    scores
        The detection of the successes by each score; None if there are fewer than 10.
    """

    images: int
    already_wrong: int
    scores: dict[str, Detection] | None


@dataclass(frozen=True)
class UntrustedSet:
    """The results on one untrusted set.

    Attributes
    ----------
    name, images, fingerprint
        The specification, the number of images, and the digest of the data.
    scores
        The detection by "coverage", "softmax" and the requested baselines.
    mean_confidence
        The mean confidence, by "coverage" and "softmax".
    success_rate
        The share of images classified correctly before an attack that it deceives. None for other
        sets, and if no image was classified correctly.
    deceived
        The successes of an attack; None for other sets.
    unsure
        The number of images that are not untrusted, but whose answers do not pass.
    unreadable
        The number of files skipped because they cannot be read.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> photos = evaluation.untrusted[0]
    >>> photos.name, photos.images, sorted(photos.scores)
    ('photos?limit=100', 100, ['coverage', 'softmax'])
    """

    name: str
    images: int
    fingerprint: str
    scores: dict[str, Detection]
    mean_confidence: dict[str, float]
    success_rate: Estimate | None
    deceived: Deceived | None
    unsure: int = 0
    unreadable: int = 0


@dataclass(frozen=True)
class PointCoverage:
    """Share of a point's neurons inside the range, by set.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> point = evaluation.points[0]
    >>> point.neurons, point.coverage["trusted"] > point.coverage["photos?limit=100"]
    (16, True)
    """

    name: str
    neurons: int
    coverage: dict[str, float]


@dataclass(frozen=True)
class LeftChannel:
    """A neuron that left the trusted range of the predicted class.

    Attributes
    ----------
    neuron
        Its number within the coverage point.
    channel, label
        The channel's number, and a label such as "channel 37, maximum".
    value
        Its activation.
    low, high
        The trusted range; infinite if it has no bound on that side.
    outside_by
        The distance of the value from the range, in widths of the range; infinite if that width is
        0 (all trusted images have the same value) or infinite.
    """

    neuron: int
    channel: int
    label: str
    value: float
    low: FromBelow
    high: UpTo
    outside_by: UpTo


@dataclass(frozen=True)
class PointShare:
    """A coverage point's share of the score of an image.

    Attributes
    ----------
    name
        The coverage point.
    z, share
        From `Combination.shares`: the largest z of the point's columns, and the sum of their
        shares.
    coverage, left
        The share of its neurons inside their range, and the number outside.
    channels
        The worst of those outside: by cost, then by distance in widths of the range, then by
        distance. Listed for the first three points only.
    """

    name: str
    z: float
    share: float
    coverage: float
    left: int
    channels: list[LeftChannel]


@dataclass(frozen=True)
class Explanation:
    """The explanation of an image's score.

    Attributes
    ----------
    set, row
        The set's name, and the image's row in it, as in scores.csv.gz.
    predicted, label
        Class names; the label is None if unknown.
    score, p_value, untrusted
        The verdict.
    points
        All coverage points, the largest share first.
    mapped
        The first point that lists a channel and has a height and a width; `heat_map` shows that
        channel. None if there is none.
    logits
        The logits' share of the score: what the points' shares lack of 1.
    """

    set: str
    row: int
    predicted: str
    label: str | None
    score: float
    p_value: float
    untrusted: bool
    points: list[PointShare]
    mapped: str | None
    logits: float = 0.0


@dataclass(frozen=True)
class EvaluatedSignature:
    """The evaluated signature and its network.

    Attributes
    ----------
    method, parameters, granularity, precision
        The method's name, its specification, the granularity and the precision.
    path, checkpoint
        The files.
    checkpoint_fingerprint, signature_fingerprint
        The fingerprint of the weights, and the digest of the signature's file.
    trusted, calibration
        The records of the trusted images and of the calibration images.
    calibration_scores
        The number of calibration scores.
    threshold
        The threshold on the score that is computed from all calibration scores.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> evaluation.signature.method, evaluation.signature.trusted.spec
    ('ensemble', 'digits')
    """

    method: str
    parameters: str
    granularity: str
    precision: str
    path: str
    checkpoint: str
    checkpoint_fingerprint: str
    signature_fingerprint: str
    trusted: DataRecord
    calibration: DataRecord
    calibration_scores: int
    threshold: UpTo


@dataclass(frozen=True)
class GateOutcome:
    """The outcome of a gate on one set.

    Attributes
    ----------
    metric, statistic
        The metric, and its "value", or the "low" or "high" limit of its 95% interval.
    relation, bound
        The required relation, ">=" or "<=", and the bound.
    set
        The set's name.
    value
        The compared value, in [0, 1].
    low, high
        The metric's interval.
    passed
        Whether the set passes the gate.
    seconds
        The time that scoring the set took; 0 if an earlier evaluation scored it.

    Examples
    --------
    >>> print(GateOutcome("auroc", "low", ">=", 0.95, "mnist", 0.96, 0.96, 0.98, True, 0.2))
    gate passed: auroc.low >= 0.95, mnist has 0.9600
    """

    metric: str
    statistic: str
    relation: str
    bound: float
    set: str
    value: float
    low: float
    high: float
    passed: bool
    seconds: float

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "failed"
        figure = self.metric if self.statistic == "value" else f"{self.metric}.{self.statistic}"
        bound, value = f"{self.bound:g}", f"{self.value:.4f}"
        margin = float(value) - float(bound)
        if (margin <= 0 if self.relation == "<=" else margin >= 0) != self.passed:
            bound, value = f"{self.bound}", f"{self.value}"  # rounded, they would contradict it
        required = f"{figure} {self.relation} {bound}"
        return one_line(f"gate {verdict}: {required}, {self.set} has {value}")


@dataclass(frozen=True)
class EvaluationResult:
    """The result of `evaluate`; the fields are the keys of evaluation.json.

    Attributes
    ----------
    schema
        Version of the document.
    provenance
        Versions, command line, device, seed and time.
    signature
        Method, files, fingerprints and calibration of the evaluated signature.
    guarantee
        The guarantee of the false-alarm rate, with its limits.
    trusted, untrusted, points
        The results on the trusted set, on each untrusted set, and at each coverage point.
    mean_over_sets
        Each score's mean over the untrusted sets: "coverage" first, the others by their AUROC.
    confidence_bins, confidence_thresholds
        Accuracy on the trusted images by "coverage" and by "softmax" confidence.
    files
        The paths of the written files.
    warnings
        Warnings for readers of the results.
    explanations
        Explanations of the most suspicious images of each set, if requested.
    gates
        The outcomes of the gates, if any.
    digests
        The SHA-256 of the files with results of single images, by name. They detect files of
        another evaluation.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> best, *others = evaluation.mean_over_sets
    >>> best.score, best.auroc.value > 0.9, evaluation.warnings
    ('coverage', True, [])
    """

    schema: int
    provenance: dict[str, Any]
    signature: EvaluatedSignature
    guarantee: Guaranteed
    trusted: TrustedSet
    untrusted: list[UntrustedSet]
    mean_over_sets: list[MeanDetection]
    points: list[PointCoverage]
    confidence_bins: list[Bin]
    confidence_thresholds: list[Kept]
    files: dict[str, str]
    warnings: list[str]
    explanations: list[Explanation] = field(default_factory=list)
    gates: list[GateOutcome] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WatchedSet:
    """The coverage on one set during training.

    Attributes
    ----------
    name
        "trusted", or the specification of an untrusted set.
    images
        The number of images read.
    mean_confidence
        Mean softmax confidence, in [0, 1].
    mean_coverage
        Mean of `coverage` over the coverage points, in [0, 1].
    coverage
        Share of each point's neurons inside the range of the predicted class.
    """

    name: str
    images: int
    mean_confidence: float
    mean_coverage: float
    coverage: list[float]


@dataclass(frozen=True)
class Watch:
    """The coverage after one epoch: the coverage points' names, and the results on each set."""

    points: list[str]
    sets: list[WatchedSet]


@dataclass(frozen=True)
class EpochLog:
    """One epoch of the training log.

    Attributes
    ----------
    epoch
        The number of the epoch, counted from 1.
    loss, cross_entropy, penalty
        Means over the training images: the loss and its two parts (the penalty without its weight).
    accuracy
        The accuracy on the augmented training images during the epoch, in [0, 1].
    confident_accuracy
        The accuracy on images with a softmax confidence of at least the threshold; None if none.
    confident
        The share of those images.
    learning_rate
        The learning rate of the last step.
    held_out_accuracy
        The accuracy on the calibration split, in [0, 1].
    seconds
        The duration of the epoch since its start or the last resumption.
    watched
        The coverage of trusted and untrusted images; None without `untrusted`.

    Examples
    --------
    >>> from pathlib import Path
    >>> log = read_training_log(next(Path("runs/latest").glob("training_results_*.json")))
    >>> first, *_, last = log.epochs
    >>> first.loss > last.loss, last.epoch
    (True, 4)
    """

    epoch: int
    loss: float
    cross_entropy: float
    penalty: float
    accuracy: float
    confident_accuracy: float | None
    confident: float
    learning_rate: float
    held_out_accuracy: float
    seconds: float
    watched: Watch | None


@dataclass(frozen=True)
class TrainingLog:
    """The epochs of a training log."""

    epochs: list[EpochLog]


def read_evaluation(path: Path) -> EvaluationResult:
    """Read an evaluation.json; a link that leaves its folder is refused.

    Raises
    ------
    CovcliError
        If the file is missing, is no evaluation, or is of another schema.

    Examples
    --------
    >>> from pathlib import Path
    >>> evaluation = read_evaluation(Path("runs/latest/evaluation.json"))
    >>> [entry.name for entry in evaluation.untrusted]
    ['photos?limit=100']
    """
    result = _read(EvaluationResult, path, "an evaluation", EVALUATION_SCHEMA)
    named = [set(entry.scores) for entry in result.untrusted]
    named.append({mean.score for mean in result.mean_over_sets})
    if any(ALWAYS_SCORED - names for names in named):
        raise CovcliError("is inconsistent (lacks a score of a set)", where=path)
    return result


def read_training_log(path: Path) -> TrainingLog:
    """Read a training_results_<timestamp>.json; a link that leaves its folder is refused.

    Raises
    ------
    CovcliError
        If the file is missing, is no training log, or is of another schema.

    Examples
    --------
    >>> from pathlib import Path
    >>> log = read_training_log(next(Path("runs/latest").glob("training_results_*.json")))
    >>> [entry.epoch for entry in log.epochs]
    [1, 2, 3, 4]
    """
    return _read(TrainingLog, path, "a training log", TRAINING_SCHEMA)


def _read(kind: type[Document], path: Path, called: str, schema: int) -> Document:
    """Return a document as a dataclass; unknown keys are ignored."""
    document = files.read_json(path, inside=path.parent)
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise CovcliError(f"is not {called} of schema {schema}", where=path)
    try:
        return settings.read(kind, document)
    except ValueError as error:
        raise CovcliError(f"is inconsistent ({error})", where=path) from None
