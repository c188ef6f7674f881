"""evaluate: how well a signature tells untrusted images from trusted ones."""

import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch

from covcli.core import distributed, files, run_folders
from covcli.core.progress import Progress, Silent
from covcli.core.version import __version__
from covcli.data import image_files
from covcli.data.images import ImageSet
from covcli.evaluation import gates
from covcli.evaluation.baselines import compare
from covcli.evaluation.baselines.compare import Comparison
from covcli.evaluation.config import EvaluationConfig
from covcli.evaluation.explain import explain_sets
from covcli.evaluation.figures import result_of
from covcli.evaluation.inputs import Job, load_job
from covcli.evaluation.scores import Measured, measure, pick
from covcli.evaluation.sets import Opener, Parts, opener
from covcli.reporting import per_image
from covcli.reporting.documents import EvaluationResult

__all__ = ["EvaluationConfig", "EvaluationResult", "evaluate"]
log = logging.getLogger(__name__)


def evaluate(config: EvaluationConfig, progress: Progress = Silent()) -> EvaluationResult:
    """Score trusted test images and untrusted ones, and write evaluation.json and the scores.

    An evaluation that was cut short does not repeat the sets that it had finished.

    Raises
    ------
    CovcliError
        If a file, a name or the data is bad, results exist already, or another process is
        writing into the same folder.
    """
    job = load_job(config)
    openers = {"trusted": Opener.of(job.trusted)}
    openers |= {
        text: opener(text, job.judge, job.trusted, config.data_dir) for text in config.untrusted
    }
    output = job.files["evaluation.json"].parent
    with run_folders.locked(output) if distributed.is_first() else nullcontext():
        parts = Parts(output, _key(job))
        baselines = compare.fit(job.plan, job.judge.rule.guarantee, progress)
        images, measured, seconds = _measure_all(job, baselines, openers, parts, progress)
        with distributed.alone():  # a few images each
            scores = {name: m.scores["coverage"] for name, m in measured.items()}
            explanations, explained = explain_sets(job.judge, images, scores, config.explain)
        rules = {**job.rules, **baselines.rules}
        result = result_of(replace(job, rules=rules), images, measured, explanations)
        result = replace(result, gates=gates.check(result, config.gates, seconds))
        if distributed.is_first():
            scores_by_set = {name: m.recorded(images[name].files) for name, m in measured.items()}
            per_image.write_scores(job.files[per_image.SCORES], scores_by_set)
            pairs = {name: (images[name], m) for name, m in measured.items()}
            pixels = pick(pairs, job.judge.model.spec.shape, explained)
            per_image.write_samples(job.files[per_image.SAMPLES], pixels)
            image_files.list_unreadable(output / "unreadable-evaluate.txt", images.values())
            files.write_json(job.files["evaluation.json"], files.plain(asdict(result)))
            parts.clear()
    return result


def _key(job: Job) -> str:
    """Return a digest of what every figure depends on beside the images."""
    guarantee = job.judge.rule.guarantee
    versions = [torch.__version__, __version__, str(job.judge.model.mean.device)]
    described = [vars(guarantee), versions, job.plan.names, job.plan.versions]
    return files.digest([files.digest_file(job.signature), described])


def _measure_all(
    job: Job,
    baselines: Comparison,
    openers: dict[str, Opener],
    parts: Parts,
    progress: Progress,
) -> tuple[dict[str, ImageSet], dict[str, Measured], dict[str, float]]:
    """Score every set; return the images, what was measured, and how long that took, by name."""
    seconds: dict[str, float] = {}
    images: dict[str, ImageSet] = {}
    measured: dict[str, Measured] = {}
    for name, entry in openers.items():
        done = distributed.agree(parts.find(entry.identity))
        if done is not None:  # by an evaluation that was cut short
            images[name] = entry.open(progress) if done[1] is None else entry.made_of(done[1])
            measured[name] = done[0]
            continue
        begin = time.perf_counter()
        images[name] = entry.open(progress)
        ours = measure(job.judge, images[name], progress)
        theirs = baselines.score(images[name], progress)
        measured[name] = replace(ours, scores={**ours.scores, **theirs})
        seconds[name] = time.perf_counter() - begin
        if distributed.is_first():
            parts.keep(entry.identity, measured[name], entry.pixels(images[name]))
    return images, measured, seconds
