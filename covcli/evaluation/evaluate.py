"""evaluate: how well a signature tells untrusted images from trusted ones."""

import logging
from contextlib import nullcontext
from dataclasses import asdict, replace

from covcli.core import distributed, files, run_folders
from covcli.core.progress import Progress, Silent
from covcli.data import image_files
from covcli.evaluation import gates
from covcli.evaluation.baselines import compare
from covcli.evaluation.config import EvaluationConfig
from covcli.evaluation.explain import explain_sets
from covcli.evaluation.figures import result_of
from covcli.evaluation.inputs import load_job
from covcli.evaluation.scores import pick
from covcli.evaluation.sets import Parts, measure_set
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
    output = job.files["evaluation.json"].parent
    with run_folders.locked(output) if distributed.is_first() else nullcontext():
        parts = Parts(output, job.identity)
        baselines = compare.fit(job.plan, job.judge.rule.guarantee, progress)
        sets = {
            name: measure_set(entry, job.judge, baselines, parts, progress)
            for name, entry in job.sets.items()
        }
        with distributed.alone():  # a few images each
            explanations, explained = explain_sets(job.judge, sets, config.explain)
        rules = {**job.rules, **baselines.rules}
        result = result_of(replace(job, rules=rules), sets, explanations)
        seconds = {name: entry.seconds or 0.0 for name, entry in sets.items()}
        result = replace(result, gates=gates.check(result, config.gates, seconds))
        if distributed.is_first():
            recorded = {
                name: entry.measured.recorded(entry.images.files) for name, entry in sets.items()
            }
            per_image.write_scores(job.files[per_image.SCORES], recorded)
            pixels = pick(sets, job.judge.model.spec.shape, explained)
            per_image.write_samples(job.files[per_image.SAMPLES], pixels)
            image_files.list_unreadable(
                output / "unreadable-evaluate.txt", [entry.images for entry in sets.values()]
            )
            files.write_json(job.files["evaluation.json"], files.plain(asdict(result)))
            parts.clear()
    return result
