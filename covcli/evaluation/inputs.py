"""What an evaluation needs, found, loaded and checked before any work is done."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from covcli.core import files, run_folders, runtime
from covcli.core.errors import CovcliError
from covcli.core.specs import parse
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.evaluation.baselines import compare
from covcli.evaluation.baselines.compare import Plan
from covcli.evaluation.results import EvaluationConfig
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier
from covcli.signature import signature
from covcli.signature.calibration import Calibration
from covcli.signature.guarantee import Rule
from covcli.signature.signature import Signature

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
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


def load_job(config: EvaluationConfig) -> Job:
    """Load and check all that an evaluation needs; what is bad is a CovcliError."""
    if not config.untrusted:
        raise CovcliError("name at least one --untrusted set")
    if repeated := {t for t in config.untrusted if config.untrusted.count(t) > 1}:
        raise CovcliError("is named twice", where=f"--untrusted {repeated.pop()}")
    if config.explain < 0:
        raise CovcliError("must be at least 0", where=f"--explain {config.explain}")
    device = runtime.choose_device(config.device)
    checkpoint_path, signature_path = find_files(config)
    output = config.output or run_folders.short(signature_path.parent)
    outputs = {name: output / name for name in ("evaluation.json", "scores.csv.gz", "samples.npz")}
    for path in outputs.values():
        files.refuse_existing(path, config.force)
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
    plan = compare.prepare(config.baselines, model, record, config.data_dir)
    return Job(
        config, outputs, checkpoint_path, signature_path, model, made.to(device),
        calibration, rules, record, trusted, plan, warnings,
    )  # fmt: skip


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
    return run_folders.newest_run(config.runs) / "checkpoint.pt"


def _trusted(
    config: EvaluationConfig, record: dict[str, Any], classes: int
) -> tuple[ImageSet, list[str]]:
    """Load the trusted test images, leaving out those that calibrated; return warnings too."""
    warnings = []
    text = config.trusted or str(record["trusted"]["spec"]).partition("?")[0]
    images = datasets.load(text, "test", config.data_dir)
    datasets.check_labels(images, classes)
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
