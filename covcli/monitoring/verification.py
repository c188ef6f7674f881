"""Verification of an exported file: it must give the results of the monitor that it was made from.

The file computes in another order, so its activations differ in their last bits. In logits and
distances the effect is small. But coverage counts neurons, and a neuron within rounding of an end
of its range may be counted on the other side. Scores must therefore agree within a tolerance on
all but one image in a hundred. The results that follow from a score (p-value, confidence, verdict)
have no tolerance: they must be those of the rule for the file's own score.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from covcli.core.choices import InputForm
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.data import datasets
from covcli.data.images import ImageSet
from covcli.monitoring.exported import OUTPUTS, Verification
from covcli.signature.calibration import softmax_score
from covcli.signature.judge import Judge, Verdicts
from covcli.signature.monitor import Monitor

LEAST_IMAGES = 256
# Tolerance of a logit, in units of the image's largest logit, or of 1 if that is less.
LOGITS = 1e-3
# Tolerance of a score, in units of the distance from the median to the threshold. In a network of
# thousands of neurons rounding moves one or another to the next section.
SCORES = 1e-2
# The share of the images whose scores may exceed the tolerance.
BEYOND = 0.01
# Tolerance of results that are derived in double precision, by another library.
DERIVED = 1e-9
COMPARED = (*OUTPUTS, "unsure")
SINGLES = 3
BATCH = 32

FileOutputs: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Said:
    """The results of file and monitor for a batch."""

    file: dict[str, Tensor]
    monitor: Verdicts


def verification_images(chosen: ImageSet, least: int = LEAST_IMAGES) -> tuple[ImageSet, int]:
    """Return images spread evenly over a set, and how many are missing to `least`."""
    rows = torch.linspace(0, len(chosen) - 1, min(least, len(chosen))).round().long()
    return chosen.select(rows.unique()), max(0, least - len(chosen))


def verify(
    judge: Judge,
    program: Callable[[Tensor], FileOutputs],
    form: InputForm,
    images: ImageSet,
    progress: Progress,
) -> Verification:
    """Run images through an exported file and through the monitor, and compare.

    Parameters
    ----------
    judge
        The judge that the file was made from.
    program
        Runs the file on a batch; returns its outputs by name.
    form
        The file's form of input.
    images
        The images. If there are fewer than 256, images of uniform noise are added.
    progress
        Advanced after each batch.

    Raises
    ------
    CovcliError
        If the file's results differ from the monitor's.
    """
    chosen, missing = verification_images(images)
    parts = [chosen]
    if missing:
        parts.append(datasets.load(f"noise:uniform?limit={missing}", "test"))
    progress.start("verifying the exported file", sum(map(len, parts)))
    monitor = Monitor(judge)
    said = [
        _said(monitor, program, form, pixels, progress)
        for part in parts
        for pixels in _batches(part, judge)
    ]
    return _compared(judge, said, missing)


def _batches(images: ImageSet, judge: Judge) -> Iterator[Tensor]:
    """Yield a few images one by one, then the others in batches; the last one may be smaller."""
    rows = torch.arange(len(images))
    for part in (*rows[:SINGLES].split(1), *rows[SINGLES:].split(BATCH)):
        yield images.batch(part, judge.model.spec.shape)


def _said(
    monitor: Monitor,
    program: Callable[[Tensor], FileOutputs],
    form: InputForm,
    pixels: Tensor,
    progress: Progress,
) -> _Said:
    floats = pixels.float() / 255
    if form == "normalised":
        floats = (floats - monitor.model.mean) / monitor.model.deviation
    given = pixels if form == "uint8" else floats
    file = {name: torch.as_tensor(values) for name, values in program(given).items()}
    verdicts = monitor(floats, normalised=form == "normalised")
    progress.advance(len(pixels))
    return _Said(file, verdicts)


def _compared(judge: Judge, said: list[_Said], noise: int) -> Verification:
    file = {name: torch.cat([s.file[name] for s in said]) for name in said[0].file}
    ours = {name: torch.cat([getattr(s.monitor, name) for s in said]) for name in COMPARED}
    _check_logits(judge, file, ours["logits"])
    _check_derived(judge, file)
    tolerance = SCORES * score_unit(judge)
    alike = file["predicted"] == ours["predicted"]
    # Where two classes are as probable as each other, each score is that of its own class.
    apart = (file["score"] - ours["score"]).abs().where(alike, 0.0)
    beyond = int((apart > tolerance).sum())
    if beyond > BEYOND * len(apart):
        raise _differs(
            judge,
            f"on {beyond} of {len(apart)} images its score differs by more than {tolerance:.2g}, "
            f"by {float(apart.max()):.2g} at most ({int((~alike).sum())} classes differ beside)",
        )
    differ = file["untrusted"] != ours["untrusted"]
    if "verdict" in file:
        differ |= (file["verdict"] == 1) != ours["unsure"]
    return Verification(
        images=len(apart),
        noise=noise,
        logits=_largest(file["logits"] - ours["logits"]),
        score=_largest(apart),
        p_value=_largest((file["p_value"] - ours["p_value"])[alike]),
        confidence=_largest((file["confidence"] - ours["confidence"])[alike]),
        predicted=int((~alike).sum()),
        verdicts=int(differ.sum()),
        score_tolerance=tolerance,
        beyond=beyond,
    )


def score_unit(judge: Judge) -> float:
    """Return the distance from the median of the calibration scores to the threshold.

    If it is 0 or infinite, return their deviation; if that is too, return 1.
    """
    scores = judge.calibration.scores
    for unit in (abs(judge.rule.overall - float(scores.median())), float(scores.std())):
        if math.isfinite(unit) and unit > 0:
            return unit
    return 1.0


def _check_logits(judge: Judge, file: Mapping[str, Tensor], ours: Tensor) -> None:
    """Refuse logits beyond the tolerance, or a class without the largest logit."""
    theirs = file["logits"]
    allowed = LOGITS * ours.abs().amax(1).clamp_min(1)
    apart = (theirs - ours).abs().amax(1)
    if not bool((apart <= allowed).all()):
        raise _differs(judge, f"its logits differ by {float(apart.max()):.2g}")
    if not bool((file["predicted"] == theirs.argmax(1)).all()):
        raise _differs(judge, "its classes are not those of its largest logits")


def _check_derived(judge: Judge, file: Mapping[str, Tensor]) -> None:
    """Refuse results that do not follow from the file's own scores, classes and logits."""
    rule, score, predicted = judge.rule, file["score"], file["predicted"]
    for name, expected in {
        "p_value": rule.p_value(score, predicted),
        "confidence": rule.confidence(score, predicted),
    }.items():
        if not bool(((file[name] - expected).abs() <= DERIVED).all()):
            raise _differs(judge, f"its {name.replace('_', '-')} is not that of its score")
    untrusted = rule.untrusted(score, predicted)
    verdict = 2 * untrusted.long()
    if "verdict" in file:
        doubt = softmax_score(file["logits"])
        near = (doubt - rule.doubts[predicted]).abs() <= DERIVED
        verdict += rule.unsure(score, predicted, doubt).long()
        wrong = (file["verdict"] != verdict) & ~near
    else:
        wrong = torch.zeros_like(untrusted)
    if not torch.equal(file["untrusted"], untrusted) or bool(wrong.any()):
        raise _differs(judge, "its verdict is not that of its score")


def _largest(differences: Tensor) -> float:
    return float(differences.abs().max()) if len(differences) else 0.0


def _differs(judge: Judge, how: str) -> CovcliError:
    return CovcliError(
        f"the exported file does not say what the monitor says: {how}",
        where=f"model {judge.model.spec.name!r}",
        fix="nothing was written",
    )
