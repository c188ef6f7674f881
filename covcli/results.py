"""What `evaluate` is told, and what it found: the fields of evaluation.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covcli.metrics import Bin, Detection, Estimate, Kept, MeanDetection


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` is told; `None` takes the newest run's, or the signature's own."""

    untrusted: tuple[str, ...]
    checkpoint: Path | None = None
    signature: Path | None = None
    method: str | None = None
    trusted: str | None = None
    alpha: float = 0.05
    baselines: tuple[str, ...] = ()
    model: str | None = None
    runs: Path = Path("runs")
    data_dir: Path | None = None
    output: Path | None = None
    force: bool = False
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class FalseAlarms:
    """Share of trusted test images flagged at α, and where calibration promises it with 95%."""

    alpha: float
    value: float
    low: float
    high: float
    promised_low: float
    promised_high: float


@dataclass(frozen=True)
class TrustedSet:
    """The trusted test images."""

    name: str
    images: int
    fingerprint: str
    accuracy: float
    false_alarm_rate: FalseAlarms
    mean_confidence: dict[str, float]


@dataclass(frozen=True)
class UntrustedSet:
    """One untrusted set: each score's figures, and for an attack how often it deceived.

    `scores` has "coverage", "softmax" and the baselines that were asked for.
    """

    name: str
    images: int
    fingerprint: str
    scores: dict[str, Detection]
    mean_confidence: dict[str, float]
    success_rate: Estimate | None


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
    """

    schema: int
    provenance: dict[str, Any]
    signature: dict[str, Any]
    trusted: TrustedSet
    untrusted: list[UntrustedSet]
    mean_over_sets: list[MeanDetection]
    points: list[PointCoverage]
    confidence_bins: list[Bin]
    confidence_thresholds: list[Kept]
    files: dict[str, str]
    warnings: list[str]
