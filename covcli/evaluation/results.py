"""What `evaluate` is told, and what it found: the fields of evaluation.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covcli.evaluation.explain import Explanation
from covcli.evaluation.metrics import Bin, Detection, Estimate, Kept, MeanDetection
from covcli.evaluation.own_errors import OwnErrors
from covcli.signature.guarantee import Mode


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` is told; `None` takes the newest run's, or the signature's own.

    `explain` says how many images of each set to explain, the most suspicious first.
    """

    untrusted: tuple[str, ...]
    checkpoint: Path | None = None
    signature: Path | None = None
    method: str | None = None
    trusted: str | None = None
    alpha: float | None = None
    guarantee: Mode | None = None
    baselines: tuple[str, ...] = ()
    explain: int = 0
    model: str | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None
    output: Path | None = None
    force: bool = False
    device: str = "cpu"
    seed: int = 0


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
    threshold: float
    promised_high: float | None


@dataclass(frozen=True)
class Guaranteed:
    """What is guaranteed of the false-alarm rate.

    Attributes
    ----------
    mode
        "marginal" or "certified".
    alpha
        The rate.
    confidence
        Over the draw of the calibration images, 0.95 where the rate is certified; None elsewhere.
    statement
        The guarantee in words, with where it ends.
    """

    mode: str
    alpha: float
    confidence: float | None
    statement: str


@dataclass(frozen=True)
class TrustedSet:
    """The trusted test images.

    `errors` says how well each score finds those that the network classifies wrongly; None where
    it makes no error, or nothing but errors.
    """

    name: str
    images: int
    fingerprint: str
    accuracy: float
    false_alarm_rate: FalseAlarms
    false_alarms_by_class: list[ClassAlarms]
    mean_confidence: dict[str, float]
    errors: dict[str, OwnErrors] | None


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
    that is no attack, or where no image was.
    """

    name: str
    images: int
    fingerprint: str
    scores: dict[str, Detection]
    mean_confidence: dict[str, float]
    success_rate: Estimate | None
    deceived: Deceived | None


@dataclass(frozen=True)
class PointCoverage:
    """Share of a point's neurons inside the range, by set."""

    name: str
    neurons: int
    coverage: dict[str, float]


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
    explanations
        Why the most suspicious images of each set got their scores, where asked for.
    files
        Paths of what was written.
    warnings
        What a reader of the figures must know.
    """

    schema: int
    provenance: dict[str, Any]
    signature: dict[str, Any]
    guarantee: Guaranteed
    trusted: TrustedSet
    untrusted: list[UntrustedSet]
    mean_over_sets: list[MeanDetection]
    points: list[PointCoverage]
    confidence_bins: list[Bin]
    confidence_thresholds: list[Kept]
    explanations: list[Explanation]
    files: dict[str, str]
    warnings: list[str]
