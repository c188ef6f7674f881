"""evaluate: how well a signature tells untrusted images from trusted ones."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import covcli
from covcli import attacks, comparison, data, metrics, runs, runtime, signature, store
from covcli import checkpoint as checkpoints
from covcli.calibration import Calibration
from covcli.comparison import Comparison, Plan
from covcli.errors import CovcliError
from covcli.images import ImageSet, MemorySource, in_memory
from covcli.measuring import Measured, Parts, measure, samples, table
from covcli.metrics import MeanDetection
from covcli.models import Classifier
from covcli.progress import Progress
from covcli.results import (
    EvaluationConfig,
    EvaluationResult,
    FalseAlarms,
    PointCoverage,
    TrustedSet,
    UntrustedSet,
)
from covcli.signature import Signature
from covcli.specs import parse

__all__ = ["EvaluationConfig", "EvaluationResult", "evaluate"]
log = logging.getLogger(__name__)


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
    openers = {"trusted": _Opener.of(job.trusted)}
    openers |= {text: _opener(text, job) for text in config.untrusted}
    output = job.files["evaluation.json"].parent
    with runs.locked(output):
        parts = Parts(output, _key(job))
        baselines = comparison.fit(job.plan, job.calibration, config.alpha, progress)
        images, measured = _measure_all(job, baselines, openers, parts, progress)
        result = _result(job, images, measured, baselines.thresholds)
        store.write_bytes(job.files["scores.csv.gz"], table(measured))
        store.write_bytes(job.files["samples.npz"], samples(images, measured, job.model.spec.shape))
        store.write_json(job.files["evaluation.json"], store.plain(asdict(result)))
        parts.clear()
    return result


def _load(config: EvaluationConfig) -> _Job:
    if not config.untrusted:
        raise CovcliError("name at least one --untrusted set")
    if repeated := {t for t in config.untrusted if config.untrusted.count(t) > 1}:
        raise CovcliError("is named twice", where=f"--untrusted {repeated.pop()}")
    device = runtime.choose_device(config.device)
    checkpoint_path, signature_path = find_files(config)
    output = config.output or runs.short(signature_path.parent)
    files = {name: output / name for name in ("evaluation.json", "scores.csv.gz", "samples.npz")}
    for path in files.values():
        store.refuse_existing(path, config.force)
    made, calibration, record = signature.load(signature_path)
    calibration.rank(config.alpha)
    source = checkpoints.load(checkpoint_path, made.model)
    made.check_model(source.model, signature_path)
    if config.model not in (None, made.model.name):
        raise CovcliError(
            f"the signature is of {made.model.name!r}", where=f"--model {config.model}"
        )
    trusted, warnings = _trusted(config, record, made.model.classes)
    model = source.model.on(device)
    plan = comparison.prepare(config.baselines, model, record, config.data_dir)
    return _Job(
        config, files, checkpoint_path, signature_path, model, made.to(device),
        calibration, record, trusted, plan, warnings,
    )  # fmt: skip


def _key(job: _Job) -> str:
    """Return a digest of what every figure depends on beside the images."""
    versions = [torch.__version__, covcli.__version__, str(job.model.mean.device)]
    baselines = [job.plan.names, job.plan.versions]
    return store.digest([store.digest_file(job.signature), job.config.alpha, versions, baselines])


def _measure_all(
    job: _Job,
    baselines: Comparison,
    openers: dict[str, "_Opener"],
    parts: Parts,
    progress: Progress,
) -> tuple[dict[str, ImageSet], dict[str, Measured]]:
    images: dict[str, ImageSet] = {}
    measured: dict[str, Measured] = {}
    for name, opener in openers.items():
        done = parts.find(opener.identity)
        if done is not None:  # by an evaluation that was cut short
            images[name] = opener.open(progress) if done[1] is None else opener.made_of(done[1])
            measured[name] = done[0]
            continue
        images[name] = opener.open(progress)
        found = measure(
            job.model, job.made, job.calibration, images[name], job.config.alpha, progress
        )
        theirs = baselines.score(images[name], progress)
        measured[name] = replace(found, scores={**found.scores, **theirs})
        parts.keep(opener.identity, measured[name], opener.pixels(images[name]))
    return images, measured


def _result(
    job: _Job,
    images: dict[str, ImageSet],
    measured: dict[str, Measured],
    thresholds: dict[str, float],
) -> EvaluationResult:
    config, made, calibration, record = job.config, job.made, job.calibration, job.record
    trusted = measured["trusted"]
    thresholds = {
        "coverage": calibration.threshold(config.alpha),
        "softmax": calibration.softmax_threshold(config.alpha),
        **thresholds,
    }
    return EvaluationResult(
        schema=store.SCHEMA,
        provenance=runtime.provenance(job.model.mean.device, config.seed) | job.plan.versions,
        signature={
            "method": made.method.name,
            "parameters": made.method.spec(),
            "granularity": made.granularity,
            "path": str(job.signature),
            "checkpoint": str(job.checkpoint),
            "checkpoint_fingerprint": made.fingerprint,
            "signature_fingerprint": store.digest_file(job.signature),
            "trusted": record["trusted"],
            "calibration": record["calibration"],
            "calibration_scores": len(calibration.scores),
            "threshold": calibration.threshold(config.alpha),
        },
        trusted=_trusted_figures(config, job.trusted, trusted, calibration),
        untrusted=[
            _untrusted_figures(config, images[t], trusted, measured[t], thresholds)
            for t in config.untrusted
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


@dataclass(frozen=True)
class _Opener:
    """A set that was checked, and is opened when its turn comes.

    Attributes
    ----------
    name
        The specification.
    identity
        Equal for equal images.
    open
        Returns the images.
    start
        For an attack, the trusted images that it starts from.
    """

    name: str
    identity: str
    open: Callable[[Progress], ImageSet]
    start: ImageSet | None = None

    @classmethod
    def of(cls, images: ImageSet) -> "_Opener":
        """Return the opener of a set that is loaded already."""
        return cls(images.name, images.fingerprint, lambda _progress: images)

    def pixels(self, images: ImageSet) -> Tensor | None:
        """Return an attack's images, which are dear to make again; None for others."""
        if self.start is None or not isinstance(images.source, MemorySource):
            return None
        return images.source.images

    def made_of(self, pixels: Tensor) -> ImageSet:
        """Return the images that an attack made earlier."""
        assert self.start is not None
        return in_memory(self.name, pixels, self.start.labels, self.start.classes)


def _opener(text: str, job: _Job) -> _Opener:
    """Check an untrusted specification now, so that an error does not come after hours."""
    spec = parse(text)
    if not attacks.is_attack(spec):
        return _Opener.of(data.load(text, "test", job.config.data_dir))
    attacks.make_attack(spec)
    start = job.trusted.select(attacks.attacked_rows(spec, job.trusted))
    labels = start.known_labels()
    return _Opener(
        text,
        f"{text} {start.fingerprint}",
        lambda progress: attacks.run_attack(spec, job.model, start, labels, progress),
        start,
    )


def _trusted_figures(
    config: EvaluationConfig, images: ImageSet, measured: Measured, calibration: Calibration
) -> TrustedSet:
    alarms = metrics.share(measured.untrusted, config.seed)
    low, high = calibration.promise(config.alpha, len(images))
    return TrustedSet(
        name=images.name,
        images=len(images),
        fingerprint=images.fingerprint,
        accuracy=float(measured.correct.mean()),
        false_alarm_rate=FalseAlarms(
            config.alpha, **asdict(alarms), promised_low=low, promised_high=high
        ),
        mean_confidence={k: float(v.mean()) for k, v in measured.confidences.items()},
    )


def _untrusted_figures(
    config: EvaluationConfig,
    images: ImageSet,
    trusted: Measured,
    measured: Measured,
    thresholds: dict[str, float],
) -> UntrustedSet:
    attacked = attacks.is_attack(parse(images.name))
    return UntrustedSet(
        name=images.name,
        images=len(images),
        fingerprint=images.fingerprint,
        scores={
            name: metrics.detection(trusted.scores[name], scores, thresholds[name], config.seed)
            for name, scores in measured.scores.items()
        },
        mean_confidence={k: float(v.mean()) for k, v in measured.confidences.items()},
        success_rate=metrics.share(~measured.correct, config.seed) if attacked else None,
    )


def _means(config: EvaluationConfig, measured: dict[str, Measured]) -> list[MeanDetection]:
    """Average each score over the untrusted sets: ours first, the others by their AUROC."""
    made = [
        metrics.mean_detection(
            name, scores, [measured[t].scores[name] for t in config.untrusted], config.seed
        )
        for name, scores in measured["trusted"].scores.items()
    ]
    return sorted(made, key=lambda mean: (mean.score != "coverage", -mean.auroc.value))
