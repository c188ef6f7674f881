"""evaluate: measure how well a signature separates untrusted images from trusted ones."""

import logging
from contextlib import nullcontext
from dataclasses import asdict, replace

from covcli.core import distributed, files, run_folders
from covcli.core.progress import Progress, Silent
from covcli.data import image_files
from covcli.data.preprocessing import Shape
from covcli.evaluation import gates
from covcli.evaluation.baselines import compare
from covcli.evaluation.config import EvaluationConfig
from covcli.evaluation.explain import explain_sets
from covcli.evaluation.figures import result_of
from covcli.evaluation.inputs import load_job
from covcli.evaluation.scores import MeasuredSet, pick
from covcli.evaluation.sets import Parts, measure_set
from covcli.models.sweep import counted
from covcli.reporting import per_image
from covcli.reporting.documents import EvaluationResult
from covcli.reporting.per_image import ExplainedImage

__all__ = ["EvaluationConfig", "EvaluationResult", "evaluate"]
log = logging.getLogger(__name__)


def evaluate(config: EvaluationConfig, progress: Progress = Silent()) -> EvaluationResult:
    """Score trusted test images and untrusted images, and write evaluation.json and the scores.

    After an interruption, sets that were finished are not measured again.

    Parameters
    ----------
    config
        The settings.
    progress
        Receives the progress; by default it is not shown.

    Raises
    ------
    CovcliError
        If a file, a name or the data is invalid, results exist already, or another process is
        writing into the same folder.

    Examples
    --------
    >>> from covcli import EvaluationConfig, evaluate
    >>> config = EvaluationConfig(("noise:uniform?limit=50",), output="results")
    >>> result = evaluate(config)  # of the signature in runs/latest
    >>> result.untrusted[0].images, result.untrusted[0].scores["coverage"].auroc.value > 0.9
    (50, True)
    """
    job = load_job(config)
    output = job.files["evaluation.json"].parent
    with run_folders.locked(output) if distributed.is_first() else nullcontext():
        parts = Parts(output, job.identity)
        with counted(job.judge.model, progress):
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
        packed = _packed(sets, job.judge.model.spec.shape, explained)
        digests = {name: files.digest_bytes(content) for name, content in packed.items()}
        result = replace(result, digests=distributed.agree(digests))
        if distributed.is_first():
            packed["evaluation.json"] = files.pack_json(files.plain(asdict(result)))
            for path in job.files.values():  # another evaluation may have finished meanwhile
                files.refuse_existing(path, config.force)
            image_files.list_unreadable(
                output / "unreadable-evaluate.txt", [entry.images for entry in sets.values()]
            )
            files.publish({job.files[name]: content for name, content in packed.items()})
            parts.clear()
    return result


def _packed(
    sets: dict[str, MeasuredSet], shape: Shape, explained: list[ExplainedImage]
) -> dict[str, bytes]:
    """Return the files with results of single images, by name; empty except on the first rank."""
    if not distributed.is_first():
        return {}
    return {
        per_image.SCORES: per_image.pack_scores({n: entry.named() for n, entry in sets.items()}),
        per_image.SAMPLES: per_image.pack_samples(pick(sets, shape, explained)),
    }
