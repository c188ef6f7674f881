"""The judge: from what a network shows of an image to its score, p-value, confidence and verdict.

The chain is written here once; the monitor, `evaluate`, explanations and the attack that knows the
monitor all ask the judge.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from covcli.attacks.adaptive import Look, Monitored
from covcli.core import runtime
from covcli.core.choices import Mode
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.data.images import ImageSet
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier
from covcli.models.points import Recorder
from covcli.models.sweep import Swept, forward, sweep
from covcli.signature import signature as signatures
from covcli.signature.calibration import Calibration, softmax_score
from covcli.signature.guarantee import Guarantee, Rule
from covcli.signature.record import Record
from covcli.signature.signature import Signature

TRUSTED, UNSURE, UNTRUSTED = "trusted", "unsure", "untrusted"


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of each image of a batch.

    Attributes
    ----------
    logits
        float32 of shape (B, classes).
    predicted
        The most probable class, int64 of shape (B,), on the network's device like the logits.
    evidence
        What speaks against trust in that class, by column, float64 of shape (B, P).
    score
        Distance from the trusted pattern of that class, float64 of shape (B,); larger is less
        trusted.
    p_value
        Share of trusted images that would score as high, float64 of shape (B,), in (0, 1].
    confidence
        float64 of shape (B,), in [0, 1]; below one half where `untrusted`.
    untrusted
        The verdict by the judge's `rule`, bool of shape (B,): a foreign or attacked image.
    unsure
        Where the image is familiar and yet the answer does not pass, bool of shape (B,): nowhere
        unless the guarantee bounds the share of wrong answers.
    """

    logits: Tensor
    predicted: Tensor
    evidence: Tensor
    score: Tensor
    p_value: Tensor
    confidence: Tensor
    untrusted: Tensor
    unsure: Tensor

    @property
    def words(self) -> list[str]:
        """Each verdict in a word: "trusted", "unsure" or "untrusted"."""
        flags = zip(self.untrusted.tolist(), self.unsure.tolist(), strict=True)
        return [UNTRUSTED if foreign else UNSURE if doubtful else TRUSTED
                for foreign, doubtful in flags]  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """A network, and all that decides whether its answers are trusted.

    Attributes
    ----------
    model
        The network, in evaluation mode and in the precision of its signature.
    signature
        The network's signature.
    calibration
        How evidence becomes a score, and the scores of trusted images.
    rule
        The guarantee, and the thresholds that keep it.
    """

    model: Classifier
    signature: Signature
    calibration: Calibration
    rule: Rule

    @classmethod
    def of(
        cls,
        model: Classifier,
        signature: Signature,
        calibration: Calibration,
        guarantee: Guarantee | None = None,
    ) -> Self:
        """Put a judge together; without a guarantee it keeps the calibration's own.

        Raises
        ------
        CovcliError
            If the calibration has too few images for the guarantee.
        """
        rule = calibration.rule(guarantee or calibration.guarantee, signature.classes)
        model.eval().precision = signature.precision
        return cls(model, signature, calibration, rule)

    def __call__(self, logits: Tensor, neurons: Tensor) -> Verdicts:
        """Judge a batch.

        Parameters
        ----------
        logits
            What the network returned, shape (B, classes).
        neurons
            What its coverage points showed, shape (B, N).
        """
        predicted = logits.argmax(1)
        evidence = self.evidence(predicted, neurons)
        return self.verdicts(logits, predicted, evidence, self.calibration.score(evidence))

    def evidence(self, predicted: Tensor, neurons: Tensor) -> Tensor:
        """Return what speaks against trust in those classes, float64 of shape (B, P), on the CPU.

        Parameters
        ----------
        predicted
            Predicted classes, int64 of shape (B,).
        neurons
            As for a call.
        """
        with torch.autocast(neurons.device.type, enabled=False):  # of whoever calls
            return self.signature.evidence(neurons, predicted).cpu()

    def verdicts(
        self, logits: Tensor, predicted: Tensor, evidence: Tensor, score: Tensor
    ) -> Verdicts:
        """Return what follows from scores; the parameters are attributes of `Verdicts`."""
        classes = predicted.cpu()
        return Verdicts(
            logits=logits,
            predicted=predicted,
            evidence=evidence,
            score=score,
            p_value=self.rule.p_value(score, classes),
            confidence=self.rule.confidence(score, classes),
            untrusted=self.rule.untrusted(score, classes),
            unsure=self._unsure(logits, score, classes),
        )

    def warm_up(self) -> None:
        """Prepare now what the first batch would, as before threads meet there, or a tracer."""
        widths = len(self.signature.classes), sum(self.signature.sizes)
        self(*(torch.zeros(1, width, device=self.model.mean.device) for width in widths))

    def _unsure(self, logits: Tensor, score: Tensor, classes: Tensor) -> Tensor:
        if self.rule.guarantee.max_error is None:
            return torch.zeros_like(score, dtype=torch.bool)
        return self.rule.unsure(score, classes, softmax_score(logits.cpu()))

    def sweep(self, images: ImageSet, progress: Progress, title: str) -> Iterator[Swept]:
        """Run the network over a set, see `covcli.models.sweep.sweep`."""
        points, granularity = self.signature.points, self.signature.granularity
        return sweep(self.model, images, points, granularity, progress, title)

    def monitored(self) -> Monitored:
        """Return the network with its score, as a function that gradients flow through.

        The unit of the soft score is the threshold.

        Raises
        ------
        CovcliError
            If the score takes gradients itself.
        """
        if self.signature.method.contributions:
            raise CovcliError(
                f"the score of {self.signature.method.name} takes gradients itself and has none",
                where="attack:adaptive-pgd",
                fix="evaluate another method",
            )
        return self._look

    def _look(self, images: Tensor) -> Look:
        signature = self.signature
        with Recorder(self.model.network, signature.points, signature.granularity) as recorder:
            logits, neurons = forward(self.model, recorder, images)
        with torch.no_grad():
            verdicts = self(logits, neurons)
        soft = self.calibration.score(signature.soft_evidence(neurons, verdicts.predicted).cpu())
        unit = self.rule.overall if self.rule.overall > 0 else 1.0
        return Look(logits, verdicts.score, soft / unit)


def load(
    checkpoint: Path,
    signature_file: Path,
    *,
    alpha: float | None = None,
    guarantee: Mode | None = None,
    max_error: float | None = None,
    device: str = "cpu",
) -> tuple[Judge, Record]:
    """Read a checkpoint and its signature; return their judge and the signature's record.

    Parameters
    ----------
    checkpoint
        The checkpoint, or the bare weights that the signature was built from.
    signature_file
        The signature.
    alpha, guarantee
        The false-alarm rate to stay below, and in which sense, see `Guarantee`; None takes what
        the signature stores.
    max_error
        The share of wrong answers among those that pass; None takes what the signature stores.
    device
        Where to compute.

    Raises
    ------
    CovcliError
        If a file is missing, damaged or of another kind, the two do not belong together, or the
        calibration has too few images for the guarantee.

    Examples
    --------
    >>> from pathlib import Path
    >>> run = Path("runs/latest")
    >>> signature_file = run / "signature-ensemble.safetensors"
    >>> judge, record = load(run / "checkpoint.pt", signature_file, alpha=0.1)
    >>> judge.rule.guarantee.alpha
    0.1
    """
    place = runtime.choose_device(device)
    signature, calibration, record = signatures.load(signature_file)
    wanted = calibration.guarantee.changed(alpha, guarantee, max_error)
    model = checkpoints.load(checkpoint, signature.model).model
    signature.check_model(model, signature_file)
    return Judge.of(model.on(place), signature.to(place), calibration, wanted), record
