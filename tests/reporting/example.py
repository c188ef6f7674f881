"""An evaluation made of plain numbers, for what shows one."""

from collections.abc import Sequence

from covcli.data.images import DataRecord
from covcli.reporting.documents import (
    Bin,
    ClassAlarms,
    Detection,
    Estimate,
    EvaluatedSignature,
    EvaluationResult,
    FalseAlarms,
    GateOutcome,
    Guaranteed,
    Kept,
    MeanDetection,
    PointCoverage,
    TrustedSet,
    UntrustedSet,
)

STATEMENT = "An image like those raises a false alarm with a probability of at most 0.05."


def estimate(value: float) -> Estimate:
    return Estimate(value, max(value - 0.01, 0.0), min(value + 0.01, 1.0))


def detection(auroc: float, detected: float = 0.765) -> Detection:
    return Detection(
        estimate(auroc), estimate(0.91), estimate(0.98), estimate(0.156), estimate(detected)
    )


def outcome(passed: bool = True, name: str = "mnist", value: float = 0.9642) -> GateOutcome:
    bound = 0.5 if passed else 0.99
    return GateOutcome("auroc", "low", ">=", bound, name, value, value, 0.97, passed, 1.5)


def untrusted(name: str, theirs: dict[str, float]) -> UntrustedSet:
    scores = {"coverage": detection(0.964), **{k: detection(v, 0.358) for k, v in theirs.items()}}
    return UntrustedSet(name, 1000, "f" * 8, scores, {}, None, None)


def result(
    names: Sequence[str],
    gates: Sequence[GateOutcome] = (),
    theirs: dict[str, float] | None = None,
    points: int = 2,
) -> EvaluationResult:
    """Return an evaluation of untrusted sets of those names."""
    scores = theirs or {"softmax": 0.877}
    images = DataRecord("digits", "s" * 8, "i" * 8)
    alarms = [ClassAlarms("cat", 200, 24, 0.12, 0.079, 0.174, 382, 3.8, None)]
    sets = ["trusted", *names]
    return EvaluationResult(
        schema=1,
        provenance={"covcli": "0", "seed": 0},
        signature=EvaluatedSignature(
            "mrc", "mrc", "channel", "float32", "s.safetensors", "c.pt", "c" * 64, "s" * 64,
            images, images, 3750, 3.873,
        ),
        guarantee=Guaranteed("marginal", 0.05, None, STATEMENT),
        trusted=TrustedSet(
            "digits", 2000, "t" * 8, 0.897,
            FalseAlarms(0.05, 0.0485, 0.0395, 0.058, 0.0385, 0.062), alarms, {}, None,
        ),
        untrusted=[untrusted(name, scores) for name in names],
        mean_over_sets=[
            MeanDetection("coverage", estimate(0.987), estimate(0.062)),
            *(MeanDetection(name, estimate(v), estimate(0.545)) for name, v in scores.items()),
        ],
        points=[
            PointCoverage(f"features.{i}", 64, dict.fromkeys(sets, 0.97)) for i in range(points)
        ],
        confidence_bins=[Bin("coverage", 0.0, 0.2, 0, None), Bin("coverage", 0.2, 1.0, 9, 0.5)],
        confidence_thresholds=[Kept("coverage", 0.5, 0.95, 0.909)],
        files={},
        warnings=[],
        gates=list(gates),
    )  # fmt: skip
