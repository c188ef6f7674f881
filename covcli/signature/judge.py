"""The judge: from a network's logits and neurons to score, p-value, confidence and verdict.

This is the only implementation of that chain. The monitor, `evaluate`, explanations and the
adaptive attack use it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from covcli.attacks.adaptive import Look, Monitored
from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.core.placement import fetched, placed
from covcli.core.progress import Progress
from covcli.data.images import ImageSet
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier
from covcli.models.points import Recorder
from covcli.models.sweep import Swept, forward, sweep
from covcli.signature import signature as signatures
from covcli.signature.calibration import Calibration, softmax_score
from covcli.signature.guarantee import AS_RECORDED, Guarantee, GuaranteeRequest, Rule
from covcli.signature.record import Record
from covcli.signature.signature import Signature

# The parts of verdicts that leave the network's device.
ON_CPU = ("evidence", "score", "p_value", "confidence", "untrusted", "unsure")
TRUSTED, UNSURE, UNTRUSTED = "trusted", "unsure", "untrusted"


@dataclass(frozen=True)
class Verdicts:
    """A judge's results on a batch of images.

    Attributes
    ----------
    logits
        float32 of shape (B, classes), on the network's device.
    predicted
        The most probable class, int64 of shape (B,), on the network's device.

    The others are on the CPU, unless the judge was asked to leave them on the device:

    evidence
        The evidence against trust in that class, by column, float64 of shape (B, P).
    score
        Distance from the trusted pattern of that class, float64 of shape (B,); larger means less
        trusted.
    p_value
        The share of trusted images with a score at least as high, float64 of shape (B,), in (0, 1].
    confidence
        float64 of shape (B,), in [0, 1]; below 0.5 exactly if `untrusted`.
    untrusted
        Whether the image is foreign or attacked, by the judge's `rule`, bool of shape (B,).
    unsure
        Whether the image is familiar but the answer unreliable, bool of shape (B,). Always False
        unless the guarantee bounds the share of wrong answers (`max_error`).

    Examples
    --------
    >>> from covcli import Monitor
    >>> monitor = Monitor.load(
    ...     "runs/latest/checkpoint.pt", "runs/latest/signature-ensemble.safetensors"
    ... )
    >>> verdicts = monitor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))  # black images
    >>> verdicts.words, verdicts.logits.shape, bool((verdicts.p_value < 0.05).all())
    (['untrusted', 'untrusted'], torch.Size([2, 10]), True)
    """

    logits: Tensor
    predicted: Tensor
    evidence: Tensor
    score: Tensor
    p_value: Tensor
    confidence: Tensor
    untrusted: Tensor
    unsure: Tensor

    def fetched(self, *others: Tensor) -> tuple["Verdicts", list[Tensor]]:
        """Return the verdicts on the CPU, except `logits` and `predicted`, by one copy.

        Parameters
        ----------
        *others
            Further tensors on the device that the same copy returns, shape (B,) or (B, n).
        """
        columns = (getattr(self, name) for name in ON_CPU)
        copied = fetched([*columns, *others])
        mine = dict(zip(ON_CPU, copied, strict=False))
        return replace(self, **mine), copied[len(ON_CPU) :]

    @property
    def words(self) -> list[str]:
        """The verdict of each image: "trusted", "unsure" or "untrusted"."""
        flags = zip(self.untrusted.tolist(), self.unsure.tolist(), strict=True)
        return [UNTRUSTED if foreign else UNSURE if doubtful else TRUSTED
                for foreign, doubtful in flags]  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """A network with everything that determines verdicts on its answers.

    Attributes
    ----------
    model
        The network, in evaluation mode and in the precision of its signature.
    signature
        The network's signature.
    calibration
        The combination of evidence to a score, and the scores of calibration images.
    rule
        The guarantee, and the thresholds that keep it.

    Examples
    --------
    >>> from covcli.signature import judge
    >>> run = Path("runs/latest")
    >>> loaded, _ = judge.load(run / "checkpoint.pt", run / "signature-ensemble.safetensors")
    >>> logits = torch.zeros(2, len(loaded.signature.classes))
    >>> neurons = torch.full((2, sum(loaded.signature.sizes)), 1e6)
    >>> loaded(logits, neurons).untrusted.tolist()
    [True, True]
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
        """Create a judge; without a guarantee, the calibration's own is used.

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
            The network's logits, shape (B, classes).
        neurons
            The neurons of its coverage points, shape (B, N).
        """
        return self.on_device(logits, neurons).fetched()[0]

    def on_device(self, logits: Tensor, neurons: Tensor) -> Verdicts:
        """Judge a batch without waiting for the network's device, where the results stay."""
        predicted = logits.argmax(1)
        evidence = self.evidence(logits, neurons, predicted)
        return self.verdicts(logits, predicted, evidence, self.score(evidence))

    @cached_property
    def _there(self) -> tuple[Calibration, Rule]:
        """The calibration and the rule on the network's device."""
        device = self.model.mean.device
        return placed(self.calibration, device), placed(self.rule, device)

    def score(self, evidence: Tensor) -> Tensor:
        """Return the score of evidence on the network's device, float64 of shape (B,)."""
        return self._there[0].score(evidence)

    def evidence(self, logits: Tensor, neurons: Tensor, predicted: Tensor) -> Tensor:
        """Return the evidence against trust in the predicted classes, on the network's device.

        Parameters
        ----------
        logits
            The network's output, shape (B, classes).
        neurons
            The neurons of the coverage points, shape (B, N).
        predicted
            Predicted classes, int64 of shape (B,).

        Returns
        -------
        Tensor
            float64 of shape (B, P + L), with L columns of the logits.
        """
        with torch.autocast(neurons.device.type, enabled=False):  # the caller may have enabled it
            return self.signature.evidence(logits, neurons, predicted)

    def verdicts(
        self, logits: Tensor, predicted: Tensor, evidence: Tensor, score: Tensor
    ) -> Verdicts:
        """Return the verdicts of scores; the parameters are attributes of `Verdicts`."""
        rule = self._there[1]
        return Verdicts(
            logits=logits,
            predicted=predicted,
            evidence=evidence,
            score=score,
            p_value=rule.p_value(score, predicted),
            confidence=rule.confidence(score, predicted),
            untrusted=rule.untrusted(score, predicted),
            unsure=self._unsure(logits, score, predicted),
        )

    def warm_up(self) -> None:
        """Compute cached values now, before several threads or a tracer use the judge."""
        widths = len(self.signature.classes), sum(self.signature.sizes)
        self(*(torch.zeros(1, width, device=self.model.mean.device) for width in widths))

    def _unsure(self, logits: Tensor, score: Tensor, classes: Tensor) -> Tensor:
        if self.rule.guarantee.max_error is None:
            return torch.zeros_like(score, dtype=torch.bool)
        return self._there[1].unsure(score, classes, softmax_score(logits))

    def sweep(self, images: ImageSet, progress: Progress, title: str) -> Iterator[Swept]:
        """Run the network over a set; see `covcli.models.sweep.sweep`."""
        points, granularity = self.signature.points, self.signature.granularity
        return sweep(self.model, images, points, granularity, progress, title)

    def monitored(self) -> Monitored:
        """Return the network with its score, as a differentiable function for attacks.

        The soft score is in units of the threshold.

        Raises
        ------
        CovcliError
            If the score is computed from gradients itself.
        """
        if self.signature.method.contributions:
            raise CovcliError(
                f"the score of {self.signature.method.name} is not differentiable: it is computed "
                "from gradients",
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
        evidence = signature.soft_evidence(logits, neurons, verdicts.predicted)
        soft = self.score(evidence).cpu()
        unit = self.rule.overall if self.rule.overall > 0 else 1.0
        return Look(logits, verdicts.score, soft / unit)


def load(
    checkpoint: Path,
    signature_file: Path,
    request: GuaranteeRequest = AS_RECORDED,
    device: str = "cpu",
) -> tuple[Judge, Record]:
    """Read a checkpoint and its signature; return their judge and the signature's record.

    Parameters
    ----------
    checkpoint
        The checkpoint, or the bare weights that the signature was built from.
    signature_file
        The signature.
    request
        The guarantee; by default the signature's.
    device
        The device: "cpu", "cuda", "cuda:1" or "auto".

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
    >>> request = GuaranteeRequest(alpha=0.1)
    >>> judge, record = load(run / "checkpoint.pt", signature_file, request)
    >>> judge.rule.guarantee.alpha
    0.1
    """
    place = runtime.choose_device(device)
    signature, calibration, record = signatures.load(signature_file)
    guarantee = calibration.guarantee.changed(request)
    model = checkpoints.load(checkpoint, signature.model).model
    signature.check_model(model, signature_file)
    return Judge.of(model.on(place), signature.to(place), calibration, guarantee), record
