"""evaluate: how well a signature tells untrusted images from trusted ones."""

import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import covcli
from covcli import (
    adaptive,
    alarms,
    attacks,
    comparison,
    data,
    distributed,
    metrics,
    runs,
    runtime,
    selective,
    signature,
    store,
)
from covcli import checkpoint as checkpoints
from covcli.calibration import Calibration
from covcli.comparison import Comparison, Plan
from covcli.errors import CovcliError
from covcli.explaining import Explanation, explain_sets
from covcli.images import ImageSet
from covcli.measuring import Measured, Parts, measure, samples, table
from covcli.metrics import Detection, Estimate, MeanDetection
from covcli.models import Classifier
from covcli.openers import Opener, opener
from covcli.progress import Progress
from covcli.results import (
    Deceived,
    EvaluationConfig,
    EvaluationResult,
    PointCoverage,
    TrustedSet,
    UntrustedSet,
)
from covcli.rules import Rule
from covcli.signature import Signature
from covcli.specs import Spec, parse

__all__ = ["EvaluationConfig", "EvaluationResult", "evaluate"]
log = logging.getLogger(__name__)
LEAST_DECEIVED = 10  # fewer images say too little to draw a bootstrap from


@dataclass(frozen=True)
class _Job:
    """Everything that an evaluation needs, loaded and checked."""

    config: EvaluationConfig
    files: dict[str, Path]
    checkpoint: Path
    signature: Path
    model: Classifier
    made: Signature
    calibration: Calibration
    rules: dict[str, Rule]
    record: dict[str, Any]
    trusted: ImageSet
    plan: Plan
    warnings: list[str]


def evaluate(config: EvaluationConfig, progress: Progress) -> EvaluationResult:
    """Score trusted test images and untrusted ones, and write evaluation.json and the scores.

    An evaluation that was cut short does not repeat the sets that it had finished.

    Raises
    ------
    CovcliError
        If a file, a name or the data is bad, results exist already, or another process is
        writing into the same folder.
    """
    job = _load(config)
    openers = {"trusted": Opener.of(job.trusted)}
    threshold = job.rules["coverage"].overall
    look = partial(adaptive.monitored, job.model, job.made, job.calibration, threshold)
    openers |= {
        text: opener(text, job.model, job.trusted, look, config.data_dir)
        for text in config.untrusted
    }
    output = job.files["evaluation.json"].parent
    with runs.locked(output) if distributed.is_first() else nullcontext():
        parts = Parts(output, _key(job))
        baselines = comparison.fit(job.plan, job.rules["coverage"].guarantee, progress)
        images, measured = _measure_all(job, baselines, openers, parts, progress)
        with distributed.alone():  # a few images each
            explanations, explained = explain_sets(
                job.model, job.made, job.calibration, images,
                {name: m.scores["coverage"] for name, m in measured.items()}, config.explain,
                job.rules["coverage"],
            )  # fmt: skip
        rules = {**job.rules, **baselines.rules}
        result = _result(replace(job, rules=rules), images, measured, explanations)
        if distributed.is_first():
            store.write_bytes(job.files["scores.csv.gz"], table(measured))
            pixels = samples(images, measured, job.model.spec.shape, explained)
            store.write_bytes(job.files["samples.npz"], pixels)
            store.write_json(job.files["evaluation.json"], store.plain(asdict(result)))
            parts.clear()
    return result


def _load(config: EvaluationConfig) -> _Job:
    if not config.untrusted:
        raise CovcliError("name at least one --untrusted set")
    if repeated := {t for t in config.untrusted if config.untrusted.count(t) > 1}:
        raise CovcliError("is named twice", where=f"--untrusted {repeated.pop()}")
    if config.explain < 0:
        raise CovcliError("must be at least 0", where=f"--explain {config.explain}")
    device = runtime.choose_device(config.device)
    checkpoint_path, signature_path = find_files(config)
    output = config.output or runs.short(signature_path.parent)
    files = {name: output / name for name in ("evaluation.json", "scores.csv.gz", "samples.npz")}
    for path in files.values():
        store.refuse_existing(path, config.force)
    made, calibration, record = signature.load(signature_path)
    guarantee = calibration.guarantee.changed(config.alpha, config.guarantee)
    rules = {
        "coverage": calibration.rule(guarantee, made.classes),
        "softmax": calibration.softmax_rule(guarantee, made.classes),
    }
    source = checkpoints.load(checkpoint_path, made.model)
    made.check_model(source.model, signature_path)
    if config.model not in (None, made.model.name):
        raise CovcliError(
            f"the signature is of {made.model.name!r}", where=f"--model {config.model}"
        )
    trusted, warnings = _trusted(config, record, made.model.classes)
    model = source.model.on(device)
    model.precision = made.precision
    plan = comparison.prepare(config.baselines, model, record, config.data_dir)
    return _Job(
        config, files, checkpoint_path, signature_path, model, made.to(device),
        calibration, rules, record, trusted, plan, warnings,
    )  # fmt: skip


def _key(job: _Job) -> str:
    """Return a digest of what every figure depends on beside the images."""
    guarantee = job.rules["coverage"].guarantee
    versions = [torch.__version__, covcli.__version__, str(job.model.mean.device)]
    described = [vars(guarantee), versions, job.plan.names, job.plan.versions]
    return store.digest([store.digest_file(job.signature), described])


def _measure_all(
    job: _Job,
    baselines: Comparison,
    openers: dict[str, Opener],
    parts: Parts,
    progress: Progress,
) -> tuple[dict[str, ImageSet], dict[str, Measured]]:
    images: dict[str, ImageSet] = {}
    measured: dict[str, Measured] = {}
    for name, entry in openers.items():
        done = distributed.agree(parts.find(entry.identity))
        if done is not None:  # by an evaluation that was cut short
            images[name] = entry.open(progress) if done[1] is None else entry.made_of(done[1])
            measured[name] = done[0]
            continue
        images[name] = entry.open(progress)
        found = measure(
            job.model, job.made, job.calibration, images[name], job.rules["coverage"], progress
        )
        theirs = baselines.score(images[name], progress)
        measured[name] = replace(found, scores={**found.scores, **theirs})
        if distributed.is_first():
            parts.keep(entry.identity, measured[name], entry.pixels(images[name]))
    return images, measured


def _result(
    job: _Job,
    images: dict[str, ImageSet],
    measured: dict[str, Measured],
    explanations: list[Explanation],
) -> EvaluationResult:
    config, made, rule, record = job.config, job.made, job.rules["coverage"], job.record
    trusted = measured["trusted"]
    return EvaluationResult(
        schema=store.SCHEMA,
        provenance=runtime.provenance(job.model.mean.device, config.seed) | job.plan.versions,
        signature={
            "method": made.method.name,
            "parameters": made.method.spec(),
            "granularity": made.granularity,
            "precision": made.precision,
            "path": str(job.signature),
            "checkpoint": str(job.checkpoint),
            "checkpoint_fingerprint": made.fingerprint,
            "signature_fingerprint": store.digest_file(job.signature),
            "trusted": record["trusted"],
            "calibration": record["calibration"],
            "calibration_scores": len(job.calibration.scores),
            "threshold": rule.overall,
        },
        guarantee=alarms.guaranteed(rule.guarantee),
        trusted=_trusted_figures(job, trusted),
        untrusted=[
            _untrusted_figures(job, images[t], trusted, measured[t]) for t in config.untrusted
        ],
        mean_over_sets=_means(config, measured),
        points=[
            PointCoverage(p.name, p.neurons, {t: m.coverage[i] for t, m in measured.items()})
            for i, p in enumerate(made.points)
        ],
        confidence_bins=[
            entry
            for name, values in trusted.confidences.items()
            for entry in metrics.confidence_bins(name, values, trusted.correct)
        ],
        confidence_thresholds=[
            entry
            for name, values in trusted.confidences.items()
            for entry in metrics.confidence_thresholds(name, values, trusted.correct)
        ],
        explanations=explanations,
        files={name: str(path) for name, path in job.files.items()},
        warnings=job.warnings,
    )


def find_files(config: EvaluationConfig) -> tuple[Path, Path]:
    """Return the checkpoint and the signature: those named, or the newest of the newest run."""
    checkpoint_path = config.checkpoint or _default_checkpoint(config)
    if config.signature is not None:
        return checkpoint_path, config.signature
    where = checkpoint_path.resolve().parent
    name = parse(config.method).name if config.method else "*"
    found = sorted(where.glob(f"signature-{name}.safetensors"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise CovcliError(
            "holds no signature", where=where, fix=f"run `covcli build-signature {checkpoint_path}`"
        )
    return checkpoint_path, found[-1]


def _default_checkpoint(config: EvaluationConfig) -> Path:
    """Return the checkpoint beside the named signature, or that of the newest run."""
    if config.signature is not None:
        beside = config.signature.resolve().parent / "checkpoint.pt"
        if beside.is_file():
            return beside
    return runs.newest_run(config.runs) / "checkpoint.pt"


def _trusted(
    config: EvaluationConfig, record: dict[str, Any], classes: int
) -> tuple[ImageSet, list[str]]:
    """Load the trusted test images, leaving out those that calibrated; return warnings too."""
    warnings = []
    text = config.trusted or str(record["trusted"]["spec"]).partition("?")[0]
    images = data.load(text, "test", config.data_dir)
    data.check_labels(images, classes)
    source = images.source.fingerprint
    if source == record["calibration"]["source"]:
        fresh = images.without(torch.tensor(record["calibration_rows"]))
        if len(fresh) < len(images):
            warnings.append(
                f"{len(images) - len(fresh)} images of {text} calibrated the signature: left out"
            )
        images = fresh
    if len(images) == 0:
        raise CovcliError("every image calibrated the signature", where=text)
    if source == record["trusted"]["source"]:
        warnings.append(f"{text} also built the signature: the false-alarm rate is too low there")
    for warning in warnings:
        log.warning("%s", warning)
    return images, warnings


def _trusted_figures(job: _Job, measured: Measured) -> TrustedSet:
    images, rule = job.trusted, job.rules["coverage"]
    flagged = torch.from_numpy(measured.untrusted)
    return TrustedSet(
        name=images.name,
        images=len(images),
        fingerprint=images.fingerprint,
        accuracy=float(measured.correct.mean()),
        false_alarm_rate=alarms.overall(rule, flagged, job.config.seed),
        false_alarms_by_class=alarms.by_class(rule, flagged, measured.predicted, job.made.classes),
        mean_confidence={k: float(v.mean()) for k, v in measured.confidences.items()},
        errors=selective.own_errors(measured.scores, measured.correct, job.config.seed),
    )


def _untrusted_figures(
    job: _Job, images: ImageSet, trusted: Measured, measured: Measured
) -> UntrustedSet:
    spec = parse(images.name)
    attacked = attacks.is_attack(spec)
    success, deceived = _deceived(spec, job, trusted, measured) if attacked else (None, None)
    return UntrustedSet(
        name=images.name,
        images=len(images),
        fingerprint=images.fingerprint,
        scores=_detections(job, trusted, measured, np.ones(len(images), bool)),
        mean_confidence={k: float(v.mean()) for k, v in measured.confidences.items()},
        success_rate=success,
        deceived=deceived,
    )


def _deceived(
    spec: Spec, job: _Job, trusted: Measured, measured: Measured
) -> tuple[Estimate | None, Deceived]:
    """Return an attack's success rate, and the figures of the images that it deceived."""
    before = trusted.correct[attacks.attacked_rows(spec, job.trusted).numpy()]
    hits = before & ~measured.correct
    rate = metrics.share(hits[before], job.config.seed) if before.any() else None
    enough = hits.sum() >= LEAST_DECEIVED
    scores = _detections(job, trusted, measured, hits) if enough else None
    return rate, Deceived(int(hits.sum()), int((~before).sum()), scores)


def _detections(
    job: _Job, trusted: Measured, measured: Measured, chosen: np.ndarray
) -> dict[str, Detection]:
    """Return each score's figures on the chosen images of an untrusted set."""
    found = {}
    for name, scores in measured.scores.items():
        flags = job.rules[name].untrusted(torch.from_numpy(scores), measured.predicted).numpy()
        found[name] = metrics.detection(
            trusted.scores[name], scores[chosen], flags[chosen], job.config.seed
        )
    return found


def _means(config: EvaluationConfig, measured: dict[str, Measured]) -> list[MeanDetection]:
    """Average each score over the untrusted sets: ours first, the others by their AUROC."""
    made = [
        metrics.mean_detection(
            name, scores, [measured[t].scores[name] for t in config.untrusted], config.seed
        )
        for name, scores in measured["trusted"].scores.items()
    ]
    return sorted(made, key=lambda mean: (mean.score != "coverage", -mean.auroc.value))
