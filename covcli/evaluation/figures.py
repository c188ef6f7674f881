"""From scores to metrics: detection, false alarms with their guarantee, and own errors."""

import numpy as np
import torch
from torch import Tensor

from covcli.attacks import attacks
from covcli.core import runtime
from covcli.core.specs import Spec, parse
from covcli.data.images import ImageSet
from covcli.evaluation import metrics
from covcli.evaluation.config import EvaluationConfig
from covcli.evaluation.inputs import Job
from covcli.evaluation.own_errors import own_errors
from covcli.evaluation.scores import Measured, MeasuredSet
from covcli.reporting.documents import (
    EVALUATION_SCHEMA,
    Accepted,
    ClassAlarms,
    Deceived,
    Detection,
    Estimate,
    EvaluatedSignature,
    EvaluationResult,
    Explanation,
    FalseAlarms,
    MeanDetection,
    PointCoverage,
    TrustedSet,
    UntrustedSet,
)
from covcli.signature.guarantee import (
    Rule,
    binomial_interval,
)

LEAST_DECEIVED = 10  # with fewer images, detection is not computed


def overall(rule: Rule, flagged: Tensor, predicted: Tensor) -> FalseAlarms:
    """Compare the share of alarms among trusted images with the guarantee.

    Parameters
    ----------
    rule
        The rule of the verdicts.
    flagged
        The verdicts, bool of shape (N,).
    predicted
        The predicted classes of the same images, int64 of shape (N,).
    """
    low, high = rule.alarm_interval(predicted)
    share = metrics.share(flagged.numpy())
    return FalseAlarms(rule.guarantee.alpha, share.value, share.low, share.high, low, high)


def by_class(
    rule: Rule, flagged: Tensor, predicted: Tensor, classes: tuple[str, ...]
) -> list[ClassAlarms]:
    """Compare the share of alarms with the guarantee, for each predicted class.

    Parameters
    ----------
    rule, flagged
        As for `overall`.
    predicted
        The predicted classes of the same images, int64 of shape (N,).
    classes
        Class names.
    """
    counts = (
        torch.bincount(some, minlength=len(classes)).tolist()
        for some in (predicted, predicted[flagged])
    )
    every = zip(classes, *counts, strict=True)
    return [_of_class(rule, k, *each) for k, each in enumerate(every)]


def _of_class(rule: Rule, k: int, name: str, images: int, alarms: int) -> ClassAlarms:
    scores = int(rule.counts[k])
    low, high = binomial_interval(alarms, images) if images else (None, None)
    guaranteed = images and rule.guarantee.each_class
    return ClassAlarms(
        name=name,
        images=images,
        alarms=alarms,
        value=alarms / images if images else None,
        low=low,
        high=high,
        calibration_scores=scores,
        threshold=float(rule.thresholds[k]),
        promised_high=rule.guarantee.alarm_interval(scores, images)[1] if guaranteed else None,
    )


def result_of(
    job: Job, sets: dict[str, MeasuredSet], explanations: list[Explanation]
) -> EvaluationResult:
    """Compute the result of an evaluation from its measured sets."""
    config, judge = job.config, job.judge
    measured = {name: entry.measured for name, entry in sets.items()}
    trusted = measured["trusted"]
    return EvaluationResult(
        schema=EVALUATION_SCHEMA,
        provenance=runtime.provenance(judge.model.mean.device, config.seed) | job.plan.versions,
        signature=_signature_figures(job),
        guarantee=judge.rule.guarantee.described(),
        trusted=_trusted_figures(job, trusted),
        untrusted=[
            _untrusted_figures(job, sets[t].images, trusted, measured[t]) for t in config.untrusted
        ],
        mean_over_sets=_means(config, measured),
        points=[
            PointCoverage(p.name, p.neurons, {t: m.coverage[i] for t, m in measured.items()})
            for i, p in enumerate(judge.signature.points)
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


def _signature_figures(job: Job) -> EvaluatedSignature:
    signature, record = job.judge.signature, job.record
    return EvaluatedSignature(
        method=signature.method.name,
        parameters=signature.method.spec(),
        granularity=signature.granularity,
        precision=signature.precision,
        path=str(job.signature),
        checkpoint=str(job.checkpoint),
        checkpoint_fingerprint=signature.fingerprint,
        signature_fingerprint=job.signature_digest,
        trusted=record.trusted,
        calibration=record.calibration,
        calibration_scores=len(job.judge.calibration.scores),
        threshold=job.judge.rule.overall,
    )


def _trusted_figures(job: Job, measured: Measured) -> TrustedSet:
    images, rule = job.trusted, job.judge.rule
    verdicts = rule, torch.from_numpy(measured.untrusted), torch.from_numpy(measured.predicted)
    return TrustedSet(
        name=images.name,
        images=len(images),
        fingerprint=images.fingerprint,
        accuracy=float(measured.correct.mean()),
        false_alarm_rate=overall(*verdicts),
        false_alarms_by_class=by_class(*verdicts, job.judge.signature.classes),
        mean_confidence={k: float(v.mean()) for k, v in measured.confidences.items()},
        accepted=_accepted(job, measured),
        errors=own_errors(measured.scores, measured.correct),
        unreadable=len(images.origin.unreadable),
    )


def _accepted(job: Job, measured: Measured) -> Accepted | None:
    """Return the numbers of answers that pass and of wrong ones among them; None if unbounded."""
    max_error = job.judge.rule.guarantee.max_error
    if max_error is None:
        return None
    passing = ~(measured.untrusted | measured.unsure)
    wrong = int((passing & ~measured.correct).sum())
    share = binomial_interval(int(passing.sum()), len(passing))
    error = binomial_interval(wrong, int(passing.sum())) if passing.any() else None
    return Accepted(
        max_error=max_error,
        images=int(passing.sum()),
        unsure=int(measured.unsure.sum()),
        wrong=wrong,
        coverage=Estimate(float(passing.mean()), *share),
        error_rate=None if error is None else Estimate(wrong / int(passing.sum()), *error),
    )


def _untrusted_figures(
    job: Job, images: ImageSet, trusted: Measured, measured: Measured
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
        unsure=int(measured.unsure.sum()),
        success_rate=success,
        deceived=deceived,
        unreadable=len(images.origin.unreadable),
    )


def _deceived(
    spec: Spec, job: Job, trusted: Measured, measured: Measured
) -> tuple[Estimate | None, Deceived]:
    """Return an attack's success rate, and the detection of the images that deceived."""
    before = trusted.correct[attacks.attacked_rows(spec, job.trusted).numpy()]
    hits = before & ~measured.correct
    rate = metrics.share(hits[before]) if before.any() else None
    enough = hits.sum() >= LEAST_DECEIVED
    scores = _detections(job, trusted, measured, hits) if enough else None
    return rate, Deceived(int(hits.sum()), int((~before).sum()), scores)


def _detections(
    job: Job, trusted: Measured, measured: Measured, chosen: np.ndarray
) -> dict[str, Detection]:
    """Return the detection by each score on the chosen images of an untrusted set."""
    detections, predicted = {}, torch.from_numpy(measured.predicted)
    for name, scores in measured.scores.items():
        flags = job.rules[name].untrusted(torch.from_numpy(scores), predicted).numpy()
        detections[name] = metrics.detection(trusted.scores[name], scores[chosen], flags[chosen])
    return detections


def _means(config: EvaluationConfig, measured: dict[str, Measured]) -> list[MeanDetection]:
    """Average each score over the untrusted sets: coverage first, the others by their AUROC."""
    means = [
        metrics.mean_detection(name, scores, [measured[t].scores[name] for t in config.untrusted])
        for name, scores in measured["trusted"].scores.items()
    ]
    return sorted(means, key=lambda mean: (mean.score != "coverage", -mean.auroc.value))
