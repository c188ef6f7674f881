"""The inputs of an evaluation, loaded and checked before any work is done."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from covcli.attacks import attacks
from covcli.core import files, run_folders
from covcli.core.errors import CovcliError
from covcli.core.progress import Silent
from covcli.core.specs import parse
from covcli.core.version import __version__
from covcli.data import copies, datasets, labels
from covcli.data.images import ImageSet
from covcli.evaluation import gates
from covcli.evaluation.baselines import compare
from covcli.evaluation.baselines.compare import Plan
from covcli.evaluation.config import EvaluationConfig
from covcli.evaluation.sets import Opener, opener
from covcli.methods import make_method
from covcli.models.architectures import architecture
from covcli.reporting.per_image import SAMPLES, SCORES
from covcli.signature import judge as judges
from covcli.signature.guarantee import GuaranteeRequest, Rule
from covcli.signature.judge import Judge
from covcli.signature.newest import find_files
from covcli.signature.record import Record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The inputs of an evaluation, loaded and checked.

    Attributes
    ----------
    config
        The settings.
    files
        The output files, by name.
    checkpoint, signature
        The input files.
    signature_digest
        The digest of the signature's file.
    judge, record
        The judge and the signature's record.
    rules
        For each score, the thresholds that keep the guarantee.
    trusted
        The trusted test images.
    sets
        The openers of all sets, in order, "trusted" first.
    plan
        The baselines.
    warnings
        Warnings for readers of the results.
    """

    config: EvaluationConfig
    files: dict[str, Path]
    checkpoint: Path
    signature: Path
    signature_digest: str
    judge: Judge
    rules: dict[str, Rule]
    record: Record
    trusted: ImageSet
    sets: dict[str, Opener]
    plan: Plan
    warnings: list[str]

    @property
    def identity(self) -> str:
        """The digest of everything that the results depend on, except the images."""
        guarantee, device = self.judge.rule.guarantee, self.judge.model.mean.device
        versions = [torch.__version__, __version__, str(device)]
        described = [vars(guarantee), versions, self.plan.names, self.plan.versions]
        return files.digest([self.signature_digest, described])


def load_job(config: EvaluationConfig) -> Job:
    """Load and check the inputs of an evaluation; raise a CovcliError if one is invalid."""
    if not config.untrusted:
        raise CovcliError("name at least one --untrusted set")
    if repeated := {t for t in config.untrusted if config.untrusted.count(t) > 1}:
        raise CovcliError("is named twice", where=f"--untrusted {repeated.pop()}")
    _check_names(config)
    config = replace(config, untrusted=datasets.expand(config.untrusted, config.data_dir))
    gates.check_names(config.gates, config.untrusted)
    checkpoint_path, signature_path = find_files(config)
    output = config.output or run_folders.short(signature_path.parent)
    outputs = {name: output / name for name in ("evaluation.json", SCORES, SAMPLES)}
    for path in outputs.values():
        files.refuse_existing(path, config.force)
    judge, record = judges.load(
        checkpoint_path, signature_path, GuaranteeRequest.of(config), config.device
    )
    spec, classes = judge.model.spec, judge.signature.classes
    if config.model not in (None, spec.name):
        raise CovcliError(f"the signature is of {spec.name!r}", where=f"--model {config.model}")
    softmax = judge.calibration.softmax_rule(judge.rule.guarantee, classes)
    trusted, warnings = _trusted(config, record, classes)
    plan = compare.prepare(config.baselines, judge, record, config.data_dir, [config.trusted])
    sets = {t: opener(t, judge, trusted, config.data_dir) for t in config.untrusted}
    warnings += _also_trusted(sets, trusted)
    for warning in warnings:
        log.warning("%s", warning)
    return Job(
        config, outputs, checkpoint_path, signature_path, files.digest_file(signature_path), judge,
        {"coverage": judge.rule, "softmax": softmax}, record, trusted,
        {"trusted": Opener.of(trusted), **sets}, plan, warnings,
    )  # fmt: skip


def _check_names(config: EvaluationConfig) -> None:
    """Raise a CovcliError if a name is unknown or needs a package, before anything is read."""
    for text in config.untrusted:
        spec = parse(text)
        if attacks.is_attack(spec):
            attacks.check_attack(spec)
        else:
            datasets.check_name(text)
    if config.trusted is not None:
        datasets.check_name(config.trusted)
    if config.method is not None:
        make_method(config.method)
    if config.model is not None:
        architecture(config.model)
    compare.expand(config.baselines)


def _trusted(
    config: EvaluationConfig, record: Record, classes: tuple[str, ...]
) -> tuple[ImageSet, list[str]]:
    """Load the trusted test images without the calibration images; also return warnings."""
    usual = replace(record.trusted, spec=datasets.whole(record.trusted.spec))
    images = (
        datasets.reload(usual, "test", config.data_dir, f"name it by --trusted {usual.spec}")
        if config.trusted is None
        else datasets.load(config.trusted, "test", config.data_dir)
    )
    text, matched = images.name, labels.matched(images, classes)
    images, warnings = matched.images, list(matched.notes)
    fresh = record.less_calibration(images)
    if len(fresh) == 0:
        raise CovcliError("every image is a calibration image of the signature", where=text)
    if len(fresh) < len(images):
        warnings.append(
            f"{len(images) - len(fresh)} images of {text} are calibration images of the signature: "
            "left out"
        )
    if images.source.fingerprint == record.trusted.source:
        warnings.append(f"{text} also built the signature: the false-alarm rate is too low there")
    return fresh, warnings


def _also_trusted(sets: dict[str, Opener], trusted: ImageSet) -> list[str]:
    """Return a warning for each untrusted set that has trusted test images."""
    opened = {name: entry.open(Silent()) for name, entry in sets.items() if entry.start is None}
    counts = {name: copies.shared(images, trusted) for name, images in opened.items()}
    return [
        f"{count} of {len(opened[name])} images of {name} are trusted test images too"
        for name, count in counts.items()
        if count
    ]
