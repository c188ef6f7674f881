"""What a run's JSON documents hold, as dataclasses: evaluation.json and the training log.

`evaluate` and `train` make these objects and write them; whatever is shown of a run is made from
the same objects, read again.
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
    """Read a null as that value: JSON knows no infinity."""
    return BeforeValidator(lambda given: value if given is None else given)


FromBelow = Annotated[float, _none_as(-math.inf)]
UpTo = Annotated[float, _none_as(math.inf)]


@dataclass(frozen=True)
class Estimate:
    """A value with a 95% interval; `covcli.evaluation.intervals` says how each is made."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Detection:
    """How well a score tells untrusted inputs from trusted ones.

    Attributes
    ----------
    auroc
        Area under the ROC curve: the chance that an untrusted input scores higher (ties half).
    aupr_out, aupr_in
        Average precision with the untrusted, and with the trusted, as the positive class.
    fpr95
        Share of trusted inputs flagged at the threshold that catches 95% of the untrusted.
    detection_rate
        Share of untrusted inputs above their calibrated threshold; None where there is none.
    """

    auroc: Estimate
    aupr_out: Estimate
    aupr_in: Estimate
    fpr95: Estimate
    detection_rate: Estimate | None


@dataclass(frozen=True)
class MeanDetection:
    """How well a score does on average over the untrusted sets, each of them counting once."""

    score: str
    auroc: Estimate
    fpr95: Estimate


@dataclass(frozen=True)
class Bin:
    """Accuracy among images whose confidence lies in [low, high), or [low, 1] in the last bin."""

    confidence: str
    low: float
    high: float
    images: int
    accuracy: float | None


@dataclass(frozen=True)
class Kept:
    """Share and accuracy of the images whose confidence reaches a threshold."""

    confidence: str
    threshold: float
    kept: float
    accuracy: float | None


@dataclass(frozen=True)
class Risk:
    """The share of errors among the share of images that is kept, the most trusted ones."""

    kept: float
    risk: float


@dataclass(frozen=True)
class OwnErrors:
    """How well a score finds the images that the network classifies wrongly.

    Attributes
    ----------
    wrong
        How many images the network classifies wrongly.
    auroc
        The chance that a wrongly classified image scores higher than a rightly classified one.
    aurc
        Area under the risk-coverage curve: the mean selective risk when 1, 2, …, n images are
        kept. As much as the error rate for a score that knows nothing; lower is better.
    excess_aurc
        E-AURC: what the area has above that of a score that ranks every error last; 0 is best.
    curve
        The risk-coverage curve, at most 101 points, by ascending share kept.
    augrc
        Area under the generalised risk: the mean, over the shares of images that are kept, of the
        share of all images that are kept and wrong. Half the error rate for a score that knows
        nothing; lower is better. None in a document of covcli before it had this.
    """

    wrong: int
    auroc: Estimate
    aurc: Estimate
    excess_aurc: Estimate
    curve: list[Risk]
    augrc: Estimate | None = None


@dataclass(frozen=True)
class FalseAlarms:
    """Share of trusted test images flagged at α, and where calibration promises it with 95%.

    In certified mode `promised_high` is a one-sided bound on the share among so many images,
    with 95% probability, and `promised_low` is 0.
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
        How many were predicted as it, and how many of those were flagged.
    value, low, high
        The share flagged with its exact 95% interval; None without images.
    calibration_scores
        How many calibration scores are of images predicted as the class.
    threshold
        The score above which such an image is flagged.
    promised_high
        What the share among so many images stays at or below with 95% probability; None where
        nothing is promised: in marginal mode, or without images.
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
    """What is guaranteed of the false-alarm rate.

    Attributes
    ----------
    mode
        "marginal", "by-class", "certified" or "certified-overall".
    alpha
        The rate.
    confidence
        Over the draw of the calibration images, 0.95 where the rate is certified; None else.
    statement
        The guarantee in words, with where it ends.
    """

    mode: str
    alpha: float
    confidence: float | None
    statement: str


@dataclass(frozen=True)
class Accepted:
    """How many answers on trusted test images pass, and how many of those are wrong.

    Attributes
    ----------
    max_error
        What the share of wrong answers among those that pass stays at or below, with 95%
        confidence over the draw of the calibration images.
    images, unsure, wrong
        How many pass; how many do not though their images are familiar; how many pass wrongly.
    coverage
        The share of the answers that pass, with its exact 95% interval.
    error_rate
        The share of wrong answers among those that pass, likewise; None if none passes.
    """

    max_error: float
    images: int
    unsure: int
    wrong: int
    coverage: Estimate
    error_rate: Estimate | None


@dataclass(frozen=True)
class TrustedSet:
    """The trusted test images.

    `errors` says how well each score finds those that the network classifies wrongly; None where
    it makes no error, or nothing but errors. `accepted` is None unless wrong answers are bounded.
    `unreadable` counts files that were left out.
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
    """An attack's successes: images classified rightly before it and wrongly after.

    Attributes
    ----------
    images
        How many there are.
    already_wrong
        How many of the attacked images the network got wrong before the attack.
    scores
        Each score's figures on the successes alone; None if there are fewer than 10.
    """

    images: int
    already_wrong: int
    scores: dict[str, Detection] | None


@dataclass(frozen=True)
class UntrustedSet:
    """One untrusted set: each score's figures, and for an attack what it deceived.

    `scores` has "coverage", "softmax" and the baselines that were asked for. `success_rate` is the
    share deceived of the images that were classified rightly before the attack; None for a set
    that is no attack, or where no image was. `unsure` counts the images that are not untrusted
    and whose answers do not pass all the same.
    `unreadable` counts files that were left out.
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
    """Share of a point's neurons inside the range, by set."""

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
        The channel's number, and what is taken of it, as "channel 37, maximum".
    value
        Its activation.
    low, high
        The trusted range; infinite where it has no end on that side.
    outside_by
        How far outside the range the value lies, in widths of the range; infinite where that width
        is none (trusted images gave it one value only) or has no end.
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
    """A coverage point's part in the score of an image.

    Attributes
    ----------
    name
        The coverage point.
    z, share
        As of `Combination.shares`: the largest of the point's columns, and their sum.
    coverage, left
        Share of its neurons inside their range, and how many are outside.
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
    """Why an image got its score.

    Attributes
    ----------
    set, row
        The set's name, and the image's row in it, as in scores.csv.gz.
    predicted, label
        Class names; the label is None where unknown.
    score, p_value, untrusted
        The verdict.
    points
        All coverage points, the largest share first.
    mapped
        The first of them that lists a channel and has a height and a width: `heat_map` draws that
        channel. None where there is none.
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


@dataclass(frozen=True)
class EvaluatedSignature:
    """The signature that was evaluated, and its network.

    Attributes
    ----------
    method, parameters, granularity, precision
        How it was built: the method's name and its whole specification.
    path, checkpoint
        The files.
    checkpoint_fingerprint, signature_fingerprint
        Digest of the network's weights, and of the signature's file.
    trusted, calibration
        The images that built it, and those that calibrated it.
    calibration_scores
        How many scores calibrate it.
    threshold
        The score above which an image is flagged whatever its class.
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
    """A gate held against one set.

    Attributes
    ----------
    metric, statistic
        What was judged: a metric's "value", or the "low" or "high" end of its 95% interval.
    relation, bound
        How it has to stand to which bound: ">=" or "<=".
    set
        The set's name.
    value
        What was judged, in [0, 1].
    low, high
        The metric's interval.
    passed
        Whether the gate lets the set pass.
    seconds
        How long the set took to score; 0 if an earlier evaluation had scored it.
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
        asked = f"{figure} {self.relation} {self.bound:g}"
        return one_line(f"gate {verdict}: {asked}, {self.set} has {self.value:.4f}")


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` found; the fields are the keys of evaluation.json.

    Attributes
    ----------
    schema
        Version of the document.
    provenance
        Versions, command line, device, seed, time.
    signature
        Method, files, fingerprints and calibration of what was evaluated.
    guarantee
        What is guaranteed of the false-alarm rate, and where that ends.
    trusted, untrusted, points
        The figures.
    mean_over_sets
        Each score's mean over the untrusted sets: "coverage" first, the others by their AUROC.
    confidence_bins, confidence_thresholds
        Accuracy on the trusted images by "coverage" and by "softmax" confidence.
    files
        Paths of what was written.
    warnings
        What a reader of the figures must know.
    explanations
        Why the most suspicious images of each set got their scores, where asked for.
    gates
        The gates and their outcomes, where any were set.
    digests
        The SHA-256 of the files that hold single images, by name: what is not of this evaluation
        is told by them.
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
    """What the network does on one set.

    Attributes
    ----------
    name
        "trusted", or the specification of an untrusted set.
    images
        How many images were read.
    mean_confidence
        Mean softmax confidence.
    mean_coverage
        Mean over the coverage points of `coverage`.
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
    """One look at a network in training: the coverage points' names, and each set's figures."""

    points: list[str]
    sets: list[WatchedSet]


@dataclass(frozen=True)
class EpochLog:
    """One epoch of the training log.

    Attributes
    ----------
    epoch
        From 1 on.
    loss, cross_entropy, penalty
        Means over the training images: the loss, and its two parts; the penalty before its weight.
    accuracy
        Share of training images classified correctly, as they were seen in training.
    confident_accuracy
        The same among those of a softmax confidence of at least the threshold; None without any.
    confident
        The share of those.
    learning_rate
        Of the last step.
    held_out_accuracy
        Accuracy on the calibration split.
    seconds
        How long the epoch took, since it was begun or last resumed.
    watched
        What the running signature says of trusted and untrusted images; None without `untrusted`.
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
    """Read an evaluation.json, which no link may lead out of its folder.

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
        raise CovcliError("does not hold together (lacks a score of a set)", where=path)
    return result


def read_training_log(path: Path) -> TrainingLog:
    """Read a training_results_<timestamp>.json, which no link may lead out of its folder.

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
    """Return a document as a dataclass; keys that it does not know are left out."""
    document = files.read_json(path, inside=path.parent)
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise CovcliError(f"is not {called} of schema {schema}", where=path)
    try:
        return settings.read(kind, document)
    except ValueError as error:
        raise CovcliError(f"is inconsistent ({error})", where=path) from None
