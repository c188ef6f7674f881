"""Monitor: a network that says, beside its answer, whether the answer can be trusted."""

import weakref
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from covcli.core.errors import CovcliError
from covcli.data.images import adapt
from covcli.models.architectures import Classifier
from covcli.models.points import Recorder
from covcli.models.sweep import forward, to_network
from covcli.signature import judge as judges
from covcli.signature.guarantee import Mode
from covcli.signature.judge import Judge, Verdicts

__all__ = ["Monitor", "Verdicts"]


class Monitor:
    """A network and its signature.

    Its hooks stay on the network as long as the monitor lives; they do nothing outside its calls.

    Parameters
    ----------
    judge
        The network with its signature, its calibration and the rule that gives verdicts.

    Attributes
    ----------
    judge
        The same.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        signature = judge.signature
        self._recorder = Recorder(judge.model.network, signature.points, signature.granularity)
        self._recorder.stay()
        weakref.finalize(self, self._recorder.leave)
        self._spare: Tensor | None = None  # memory that held the neurons of the last batch

    @property
    def model(self) -> Classifier:
        """The network."""
        return self.judge.model

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
        paths = Path(checkpoint), Path(signature_file)
        judge, _ = judges.load(*paths, alpha=alpha, guarantee=guarantee, device=device)
        return cls(judge)

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
        with torch.inference_mode(), self._recorder as recorder:
            recorder.reuse(self._spare)
            logits, neurons = forward(self.model, recorder, inputs)
        verdicts = self.judge(logits, neurons)
        self._spare = neurons
        return verdicts

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
