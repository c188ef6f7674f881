"""The chain from images to verdicts, in one module that can be exported."""

import math
import weakref
from dataclasses import fields

import torch
from torch import Tensor, nn

from covcli.core.errors import CovcliError
from covcli.models.points import Recorder
from covcli.signature.judge import Judge, Verdicts

OUTPUTS = tuple(field.name for field in fields(Verdicts))


class Chain(nn.Module):
    """A network and its judge in one module, which `torch.export` and `torch.compile` accept.

    Nothing in it waits for the network's device, where all results stay. Hooks stay on the network
    as long as the module exists; they do nothing outside its calls.

    Parameters
    ----------
    judge
        The network, its signature, its calibration and the rule for verdicts.
    normalised
        Whether the images are normalised already, by the network's own mean and deviation.

    Raises
    ------
    CovcliError
        If the method needs gradients, which an exported graph does not have.

    Examples
    --------
    >>> import torch
    >>> from pathlib import Path
    >>> from covcli.signature import judge
    >>> from covcli.signature.chain import Chain
    >>> run = Path("runs/latest")
    >>> judged, _ = judge.load(run / "checkpoint.pt", run / "signature-ensemble.safetensors")
    >>> chain, example = Chain(judged), torch.zeros(2, *judged.model.spec.shape)
    >>> batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    >>> with torch.no_grad():
    ...     program = torch.export.export(chain, (example,), dynamic_shapes=(batch,))
    >>> sorted(program.module()(torch.zeros(5, *judged.model.spec.shape)))[:2]
    ['confidence', 'evidence']
    """

    def __init__(self, judge: Judge, normalised: bool = False) -> None:
        super().__init__()
        self.normalised = normalised
        self.layout = torch.channels_last
        signature = judge.signature
        if signature.method.contributions:
            raise CovcliError(
                f"the score of {signature.method.name} needs gradients: a graph has none",
                fix="use a signature of another method",
            )
        self.judge = judge
        # Registered as submodules, so that their tensors belong to this module.
        self.model = judge.model
        self.scorer = signature.scorer
        self._recorder = Recorder(judge.model.network, signature.points, signature.granularity)
        # Hooks cannot be registered in a graph.
        self._recorder.stay()
        weakref.finalize(self, self._recorder.leave)
        judge.warm_up()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify images and judge each.

        If the network computes NaN or infinity for an image, its score and evidence are infinite,
        and it is untrusted. (A monitor raises an error instead.)

        Parameters
        ----------
        images
            Pixels in [0, 1], or what they are normalised to, float32 of the network's input shape,
            (B, C, H, W), on its device.

        Returns
        -------
        dict of Tensor
            The attributes of `Verdicts`, by name.
        """
        self._recorder.begin()  # no `with` block, which torch.compile refused up to torch 2.11
        try:
            network = self.model.classify if self.normalised else self.model
            logits = network(images.to(memory_format=self.layout))
            neurons = self._recorder.take(logits)
        finally:
            self._recorder.end()
        known = _finite(neurons) & _finite(logits)
        predicted = logits.argmax(1)
        seen, shown = (part.where(known[:, None], 0.0) for part in (logits, neurons))
        evidence = self.judge.evidence(seen, shown, predicted)
        score = self.judge.score(evidence).where(known, math.inf)
        evidence = evidence.where(known[:, None], math.inf)
        verdicts = self.judge.verdicts(logits, predicted, evidence, score)
        return {name: getattr(verdicts, name) for name in OUTPUTS}


def _finite(values: Tensor) -> Tensor:
    """Return which rows are finite, in two operations: others times 0 are NaN."""
    return (values * 0).sum(1) == 0
