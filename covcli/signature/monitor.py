"""Monitor: a network that says, beside its answer, whether the answer can be trusted."""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from covcli.core import runtime
from covcli.core.errors import CovcliError
from covcli.data.images import adapt
from covcli.models import checkpoint as checkpoints
from covcli.models.architectures import Classifier
from covcli.models.points import Recorder
from covcli.models.sweep import forward, to_network
from covcli.signature import signature
from covcli.signature.calibration import Calibration
from covcli.signature.guarantee import Mode
from covcli.signature.signature import Signature


@dataclass(frozen=True)
class Verdicts:
    """What a monitor says of each image of a batch.

    Attributes
    ----------
    logits
        float32 of shape (B, classes).
    predicted
        The most probable class, int64 of shape (B,).
    score
        Distance from the trusted pattern of that class, float64 of shape (B,); larger is less
        trusted.
    p_value
        Share of trusted images that would score as high, float64 of shape (B,), in (0, 1].
    confidence
        float64 of shape (B,), in [0, 1]; below one half where `untrusted`.
    untrusted
        The verdict by the monitor's `rule`, bool of shape (B,).
    """

    logits: Tensor
    predicted: Tensor
    score: Tensor
    p_value: Tensor
    confidence: Tensor
    untrusted: Tensor


class Monitor:
    """A network and its signature.

    Its hooks stay on the network as long as the monitor lives; they do nothing outside its calls.

    Parameters
    ----------
    model
        The network.
    made
        Its signature.
    calibration
        The signature's calibration.
    alpha
        The false-alarm rate to stay below on images like the calibration images; None takes
        what the signature stores.
    guarantee
        In which sense: "marginal" or "certified"; None takes what the signature stores.

    Attributes
    ----------
    rule
        The guarantee, and the thresholds that keep it.

    Raises
    ------
    CovcliError
        If the calibration has too few images for the guarantee.
    """

    def __init__(
        self,
        model: Classifier,
        made: Signature,
        calibration: Calibration,
        alpha: float | None = None,
        guarantee: Mode | None = None,
    ) -> None:
        wanted = calibration.guarantee.changed(alpha, guarantee)
        self.rule = calibration.rule(wanted, made.classes)
        self.model = model.eval()
        self.model.precision = made.precision
        self.signature = made
        self.calibration = calibration
        self._recorder = Recorder(model.network, made.points, made.granularity)
        self._recorder.stay()
        weakref.finalize(self, self._recorder.leave)
        self._spare: Tensor | None = None  # memory that held the neurons of the last batch

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        signature_file: str | Path,
        *,
        alpha: float | None = None,
        guarantee: Mode | None = None,
        device: str = "cpu",
    ) -> Self:
        """Read a checkpoint (or the bare weights a signature was built from) and its signature.

        Raises
        ------
        CovcliError
            If a file is missing, damaged or of another kind, or the two do not belong together.
        """
        made, calibration, _ = signature.load(Path(signature_file))
        model = checkpoints.load(Path(checkpoint), made.model).model
        made.check_model(model, signature_file)
        place = runtime.choose_device(device)
        return cls(model.on(place), made.to(place), calibration, alpha, guarantee)

    def __call__(self, images: Tensor) -> Verdicts:
        """Classify a batch of images and judge each.

        Parameters
        ----------
        images
            uint8 of shape (B, C, H, W), of any size and 1 to 4 channels; or floats in [0, 1] of
            the network's own shape.

        Raises
        ------
        CovcliError
            If the images have another shape or type, or activations are not finite.
        """
        device = self.model.mean.device
        inputs = self._inputs(images, device)
        made = self.signature
        with torch.inference_mode(), self._recorder as recorder:
            recorder.reuse(self._spare)
            logits, neurons = forward(self.model, recorder, inputs)
        predicted = logits.argmax(1)
        scores = self.calibration.score(made.evidence(neurons, predicted).cpu())
        self._spare = neurons
        classes = predicted.cpu()
        return Verdicts(
            logits=logits,
            predicted=predicted,
            score=scores,
            p_value=self.calibration.p_value(scores),
            confidence=self.rule.confidence(scores, classes),
            untrusted=self.rule.untrusted(scores, classes),
        )

    def _inputs(self, images: Tensor, device: torch.device) -> Tensor:
        shape = self.model.spec.shape
        if images.ndim != 4 or len(images) == 0:
            raise CovcliError(
                f"expected images of shape (B, C, H, W), got {tuple(images.shape)}", where="Monitor"
            )
        if images.dtype == torch.uint8:
            return to_network(adapt(images, shape), device)
        if not images.is_floating_point() or tuple(images.shape[1:]) != shape:
            raise CovcliError(
                f"got {images.dtype} of shape {tuple(images.shape)}",
                where="Monitor",
                fix=f"pass uint8 images, or floats in [0, 1] of shape (B, *{shape})",
            )
        return images.to(device, torch.float32, memory_format=torch.channels_last)
