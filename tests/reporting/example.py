"""An evaluation made of plain numbers, for what shows one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from covcli.core.files import digest_bytes, plain
from covcli.data.images import DataRecord
from covcli.reporting.documents import (
    Bin,
    ClassAlarms,
    Detection,
    Estimate,
    EvaluatedSignature,
    EvaluationResult,
    Explanation,
    FalseAlarms,
    GateOutcome,
    Guaranteed,
    Kept,
    LeftChannel,
    MeanDetection,
    PointCoverage,
    PointShare,
    TrustedSet,
    UntrustedSet,
)
from covcli.reporting.per_image import (
    SAMPLES,
    SCORES,
    ExplainedImage,
    ImageScores,
    Samples,
    Thumbnails,
    pack_samples,
    pack_scores,
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


def scores(shift: float, images: int, baselines: Sequence[str], seed: int = 0) -> ImageScores:
    generator = np.random.default_rng(seed)
    coverage = generator.gamma(4.0, 0.5, images) + shift
    doubt = generator.random(images)
    return ImageScores(
        predicted=np.zeros(images, np.int64), label=(generator.random(images) < 0.1).astype(int),
        scores={"coverage": coverage, "softmax": doubt}
        | {name: generator.normal(shift, 1, images) for name in baselines if name != "softmax"},
        p_value=generator.random(images), confidence=generator.random(images),
        softmax_confidence=1 - doubt, untrusted=coverage > 3.873,
        unsure=np.zeros(images, bool),
    )  # fmt: skip


def explained(result: EvaluationResult, name: str) -> Explanation:
    channels = [LeftChannel(i, i, f"channel {i}, mean", 1.25, 0.011, 0.504, 0.4) for i in range(3)]
    points = [
        PointShare(p.name, 3.0, 1 / len(result.points), 0.9, 3, channels[: 3 * (k < 3)])
        for k, p in enumerate(result.points)
    ]
    return Explanation(name, 3, "cat", "dog", 6.1, 0.0021, True, points, points[0].name)


def run_folder(folder: Path, evaluation: EvaluationResult, explanations: int = 0) -> Path:
    """Write the files that a report of an evaluation is made of."""
    folder.mkdir(parents=True)
    sets = ["trusted", *[entry.name for entry in evaluation.untrusted]]
    names = list(evaluation.untrusted[0].scores)[1:]
    reasons = [explained(evaluation, sets[k % len(sets)]) for k in range(explanations)]
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    some, none = Thumbnails(np.arange(8), pixels), Thumbnails(np.arange(0), pixels[:0])
    shown = ExplainedImage(pixels[0], generator.random((8, 8), np.float32))
    samples = Samples(
        [some] * len(sets), [none, *[some] * (len(sets) - 1)], [shown] * explanations
    )  # fmt: skip
    packed = {
        SCORES: pack_scores({name: scores(2.0 * i, 200, names, i) for i, name in enumerate(sets)}),
        SAMPLES: pack_samples(samples),
    }
    digests = {name: digest_bytes(content) for name, content in packed.items()}
    document = plain(asdict(replace(evaluation, explanations=reasons, digests=digests)))
    (folder / "evaluation.json").write_text(json.dumps(document))
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    return folder
