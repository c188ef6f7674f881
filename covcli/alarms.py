"""False alarms on trusted test images, over all and by predicted class, beside their guarantee."""

from torch import Tensor

from covcli import guarantees, metrics
from covcli.guarantees import Guarantee
from covcli.results import ClassAlarms, FalseAlarms, Guaranteed
from covcli.rules import Rule


def overall(rule: Rule, flagged: Tensor, seed: int) -> FalseAlarms:
    """Compare the share of alarms among trusted images with what calibration promises.

    Parameters
    ----------
    rule
        What gave the verdicts.
    flagged
        The verdicts, bool of shape (N,).
    seed
        Of the bootstrap interval.
    """
    scores, images = int(rule.counts.sum()), len(flagged)
    low, high = _promise(rule.guarantee, scores, images)
    found = metrics.share(flagged.numpy(), seed)
    return FalseAlarms(rule.guarantee.alpha, found.value, found.low, found.high, low, high)


def by_class(
    rule: Rule, flagged: Tensor, predicted: Tensor, classes: tuple[str, ...]
) -> list[ClassAlarms]:
    """Compare the same by predicted class, for which only certified calibration promises.

    Parameters
    ----------
    rule, flagged
        As for `overall`.
    predicted
        The same images' predicted classes, int64 of shape (N,).
    classes
        Class names.
    """
    return [_of_class(rule, k, flagged[predicted == k], name) for k, name in enumerate(classes)]


def _of_class(rule: Rule, k: int, flagged: Tensor, name: str) -> ClassAlarms:
    images, alarms, scores = len(flagged), int(flagged.sum()), int(rule.counts[k])
    low, high = guarantees.binomial_interval(alarms, images) if images else (None, None)
    certified = images and rule.guarantee.mode == "certified"
    return ClassAlarms(
        name=name,
        images=images,
        alarms=alarms,
        value=alarms / images if images else None,
        low=low,
        high=high,
        calibration_scores=scores,
        threshold=float(rule.thresholds[k]),
        promised_high=_promise(rule.guarantee, scores, images)[1] if certified else None,
    )


def _promise(guarantee: Guarantee, scores: int, images: int) -> tuple[float, float]:
    """Return where the share of alarms among so many new images lies with 95% probability.

    In certified mode the other thresholds can only lower it: there is an upper bound alone.
    """
    rank = guarantee.rank(scores)
    if guarantee.mode == "certified":
        return 0.0, guarantees.alarms_bound(rank, scores, images)
    return guarantees.alarms_interval(rank, scores, images)


def guaranteed(guarantee: Guarantee) -> Guaranteed:
    """Return a guarantee as the results state it."""
    confidence = guarantees.CONFIDENCE if guarantee.mode == "certified" else None
    return Guaranteed(guarantee.mode, guarantee.alpha, confidence, guarantee.statement())
