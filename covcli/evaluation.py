"""evaluate: how well a signature tells untrusted images from trusted ones."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covcli import attacks, data, metrics, runs, runtime, signature, store
from covcli import checkpoint as checkpoints
from covcli.calibration import Calibration
from covcli.checkpoint import DataRecord
from covcli.errors import CovcliError
from covcli.images import ImageSet, MemorySource, in_memory
from covcli.measuring import Measured, Parts, measure, samples, table
from covcli.metrics import Detection, Estimate
from covcli.models import Classifier
from covcli.progress import Progress
from covcli.specs import parse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` is told; `None` takes the newest run's, or the signature's own."""

    untrusted: tuple[str, ...]
    checkpoint: Path | None = None
    signature: Path | None = None
    method: str | None = None
    trusted: str | None = None
    alpha: float = 0.05
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
    """One untrusted set: each score's figures, and for an attack how often it deceived."""

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
    points: list[PointCoverage]
    confidence_bins: list[metrics.Bin]
    confidence_thresholds: list[metrics.Kept]
    files: dict[str, str]
    warnings: list[str]


def evaluate(config: EvaluationConfig, progress: Progress) -> EvaluationResult:
    """Score trusted test images and untrusted ones, and write evaluation.json and the scores.

    Raises
    ------
    CovcliError
        If a file, a name or the data is bad, or results exist already.
    """
    if not config.untrusted:
        raise CovcliError("name at least one --untrusted set")
    if repeated := {t for t in config.untrusted if config.untrusted.count(t) > 1}:
        raise CovcliError("is named twice", where=f"--untrusted {repeated.pop()}")
    device = runtime.choose_device(config.device)
    checkpoint_path, signature_path = find_files(config)
    output = config.output or signature_path.resolve().parent
    files = {name: output / name for name in ("evaluation.json", "scores.csv.gz", "samples.npz")}
    for path in files.values():
        if path.exists() and not config.force:
            raise CovcliError("exists", where=path, fix="pass --force, or another --output")
    made, calibration, record = signature.load(signature_path)
    calibration.rank(config.alpha)
    source = checkpoints.load(checkpoint_path, made.model)
    made.check_model(source.model, signature_path)
    model = source.model.on(device)
    made = made.to(device)
    trusted, warnings = _trusted(config, record, made.model.classes)
    openers = {"trusted": _Opener(trusted.name, trusted.fingerprint, lambda _progress: trusted)}
    openers |= {text: _opener(text, config, model, trusted) for text in config.untrusted}
    key = [made.fingerprint, store.digest_file(signature_path), config.alpha, torch.__version__]
    parts = Parts(output, store.digest(key))
    images: dict[str, ImageSet] = {}
    measured: dict[str, Measured] = {}
    for name, opener in openers.items():
        done = parts.find(opener.identity)
        if done is not None:  # by an evaluation that was cut short
            images[name] = opener.open(progress) if done[1] is None else opener.made_of(done[1])
            measured[name] = done[0]
            continue
        images[name] = opener.open(progress)
        measured[name] = measure(model, made, calibration, images[name], config.alpha, progress)
        parts.keep(opener.identity, measured[name], opener.pixels(images[name]))
    result = EvaluationResult(
        schema=store.SCHEMA,
        provenance=runtime.provenance(device, config.seed),
        signature={
            "method": made.method.name,
            "parameters": made.method.spec(),
            "granularity": made.granularity,
            "path": str(signature_path),
            "checkpoint": str(checkpoint_path),
            "checkpoint_fingerprint": made.fingerprint,
            "signature_fingerprint": store.digest_file(signature_path),
            "trusted": record["trusted"],
            "calibration": record["calibration"],
            "calibration_scores": len(calibration.scores),
            "threshold": calibration.threshold(config.alpha),
        },
        trusted=_trusted_figures(config, trusted, measured["trusted"], calibration),
        untrusted=[
            _untrusted_figures(config, images[t], measured["trusted"], measured[t], calibration)
            for t in config.untrusted
        ],
        points=[
            PointCoverage(p.name, p.neurons, {t: m.coverage[i] for t, m in measured.items()})
            for i, p in enumerate(made.points)
        ],
        confidence_bins=[
            entry
            for name, values in measured["trusted"].confidences.items()
            for entry in metrics.confidence_bins(name, values, measured["trusted"].correct)
        ],
        confidence_thresholds=[
            entry
            for name, values in measured["trusted"].confidences.items()
            for entry in metrics.confidence_thresholds(name, values, measured["trusted"].correct)
        ],
        files={name: str(path) for name, path in files.items()},
        warnings=warnings,
    )
    store.write_bytes(files["scores.csv.gz"], table(measured))
    store.write_bytes(files["samples.npz"], samples(images, measured, model.spec.shape))
    store.write_json(files["evaluation.json"], store.plain(asdict(result)))
    parts.clear()
    return result


def find_files(config: EvaluationConfig) -> tuple[Path, Path]:
    """Return the checkpoint and the signature: those named, or the newest of the newest run."""
    folder = None
    if config.checkpoint is None:
        beside = config.signature and config.signature.resolve().parent / "checkpoint.pt"
        folder = beside.parent if beside and beside.is_file() else runs.newest_run(config.runs)
    checkpoint_path = config.checkpoint or (folder / "checkpoint.pt" if folder else Path())
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


def _trusted(
    config: EvaluationConfig, record: dict[str, Any], classes: int
) -> tuple[ImageSet, list[str]]:
    """Load the trusted test images, leaving out those that calibrated; return warnings too."""
    warnings = []
    text = config.trusted or str(record["trusted"]["spec"]).partition("?")[0]
    images = data.load(text, "test", config.data_dir)
    data.check_labels(images, classes)
    source = images.source.fingerprint()
    if source == record["calibration"]["source"]:
        calibrated = torch.tensor(record["calibration_rows"])
        fresh = torch.nonzero(~torch.isin(images.rows, calibrated))[:, 0]
        if len(fresh) < len(images):
            warnings.append(
                f"{len(images) - len(fresh)} images of {text} calibrated the signature: left out"
            )
        images = images.select(fresh)
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

    def pixels(self, images: ImageSet) -> Tensor | None:
        """Return an attack's images, which are dear to make again; None for others."""
        if self.start is None or not isinstance(images.source, MemorySource):
            return None
        return images.source.images

    def made_of(self, pixels: Tensor) -> ImageSet:
        """Return the images that an attack made earlier."""
        assert self.start is not None
        return in_memory(
            self.identity.partition(" ")[0], pixels, self.start.labels, self.start.classes
        )


def _opener(text: str, config: EvaluationConfig, model: Classifier, trusted: ImageSet) -> _Opener:
    """Check an untrusted specification now, so that an error does not come after hours."""
    spec = parse(text)
    if not attacks.is_attack(spec):
        images = data.load(text, "test", config.data_dir)
        return _Opener(text, images.fingerprint, lambda _progress: images)
    attacks.make_attack(spec)
    start = trusted.select(attacks.attacked_rows(spec, trusted))
    labels = start.known_labels()
    return _Opener(
        text,
        f"{text} {start.fingerprint}",
        lambda progress: attacks.run_attack(spec, model, start, labels, progress),
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
        fingerprint=DataRecord.of(images).images,
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
    calibration: Calibration,
) -> UntrustedSet:
    thresholds = {
        "coverage": calibration.threshold(config.alpha),
        "softmax": calibration.softmax_threshold(config.alpha),
    }
    attacked = attacks.is_attack(parse(images.name))
    return UntrustedSet(
        name=images.name,
        images=len(images),
        fingerprint=DataRecord.of(images).images,
        scores={
            name: metrics.detection(trusted.scores[name], scores, thresholds[name], config.seed)
            for name, scores in measured.scores.items()
        },
        mean_confidence={k: float(v.mean()) for k, v in measured.confidences.items()},
        success_rate=metrics.share(~measured.correct, config.seed) if attacked else None,
    )
