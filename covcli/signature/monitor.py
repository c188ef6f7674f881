"""Monitor: a network that says, beside its answer, whether the answer can be trusted."""

import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor, nn

from covcli.core import run_folders
from covcli.core.choices import Mode
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress, Silent
from covcli.data.images import adapt
from covcli.methods import make_method
from covcli.methods.state import Granularity
from covcli.models.architectures import Classifier
from covcli.models.points import Recorder
from covcli.models.sweep import forward, to_network
from covcli.signature import judge as judges
from covcli.signature import signature as signatures
from covcli.signature.build import DEFAULT_METHOD, How
from covcli.signature.guarantee import DEFAULT_GUARANTEE, Guarantee
from covcli.signature.judge import Judge, Verdicts
from covcli.signature.own_network import build_own, load_own
from covcli.signature.record import Record

__all__ = ["Monitor", "Verdicts"]
ROUNDING = 1e-3  # how far beyond [0, 1] a pixel may lie: half precision rounds by as much


class Monitor:
    """A network and its signature.

    Several threads may call one monitor at once, and others its network directly: each call keeps
    what it records to itself. Hooks stay on the network as long as the monitor lives; they do
    nothing outside its calls.

    Parameters
    ----------
    judge
        The network with its signature, its calibration and the rule that gives verdicts.

    Attributes
    ----------
    judge
        The same.
    record
        What the signature was made from; None for a monitor that was put together by hand.

    Examples
    --------
    >>> import torch
    >>> from covcli import Monitor
    >>> monitor = Monitor.load(
    ...     "runs/latest/checkpoint.pt", "runs/latest/signature-ensemble.safetensors"
    ... )
    >>> verdicts = monitor(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    >>> verdicts.untrusted.tolist()  # black images are no digits
    [True, True, True, True]
    """

    def __init__(self, judge: Judge, record: Record | None = None) -> None:
        self.judge = judge
        self.record = record
        self._modules = tuple(judge.model.modules())
        signature = judge.signature
        self._recorder = Recorder(judge.model.network, signature.points, signature.granularity)
        self._recorder.stay()
        weakref.finalize(self, self._recorder.leave)
        judge.warm_up()

    @property
    def model(self) -> Classifier:
        """The network."""
        return self.judge.model

    @classmethod
    def build(
        cls,
        network: nn.Module,
        trusted: Any,
        calibration: Any,
        *,
        method: str = DEFAULT_METHOD,
        granularity: Granularity = "channel",
        classes: Sequence[str] = (),
        confidence_threshold: float = 0.9,
        alpha: float = DEFAULT_GUARANTEE.alpha,
        guarantee: Mode = DEFAULT_GUARANTEE.mode,
        max_error: float | None = None,
        points: Sequence[str] = (),
        logits: str = "",
        seed: int = 0,
        progress: Progress = Silent(),
    ) -> Self:
        """Build the monitor of a network that a program holds; nothing has to be registered.

        Preprocessing is the program's: the network sees what the loader yields, and so does the
        monitor later. The network is not copied; it stays where it is, in evaluation mode.

        Parameters
        ----------
        network
            Maps images (B, C, H, W) to logits (B, classes), or to a nest of tensors that holds
            them.
        trusted
            The images that trained it, with labels: a torch Dataset, a DataLoader, or tensors
            (images, labels).
        calibration
            Images that did not train it, likewise; labels may be missing.
        method, granularity, confidence_threshold, alpha, guarantee, max_error, points, logits, seed
            As of `covcli build-signature`.
        classes
            Class names; by default those of the dataset, or numbers.
        progress
            Is told of every pass.

        Raises
        ------
        CovcliError
            If the data or the network is of another kind, a class has no correctly classified
            image, or the calibration images are too few for the guarantee.

        Examples
        --------
        See docs/python-api.md: `Monitor.build(network, train_loader, held_out_loader)`.
        """
        how = How(
            make_method(method), granularity, confidence_threshold,
            Guarantee(alpha, guarantee, max_error), seed,
        )  # fmt: skip
        made = build_own(
            network, trusted, calibration, how, progress, classes=classes, logits=logits,
            points=points,
        )  # fmt: skip
        return cls(*made)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the signature, and return its path; `Monitor.load(path, network)` reads it.

        The network's weights are the program's to keep.

        Raises
        ------
        CovcliError
            If the file exists already and is not to be overwritten, or cannot be written.
        """
        if self.record is None:
            _refuse("was put together by hand, and has nothing to say of its data")
        with run_folders.writing(Path(path), force):
            judge = self.judge
            signatures.save(Path(path), judge.signature, judge.calibration, self.record)
        return Path(path)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        signature_file: str | Path | nn.Module,
        *,
        alpha: float | None = None,
        guarantee: Mode | None = None,
        max_error: float | None = None,
        device: str | None = None,
    ) -> Self:
        """Read a monitor: `load(checkpoint, signature)`, or `load(signature, network)`.

        Parameters
        ----------
        checkpoint, signature_file
            A checkpoint (or the bare weights that a signature was built from) and its signature;
            or a signature and the network that it was built of.
        alpha
            The false-alarm rate to stay below on images like the calibration images, in (0, 1);
            None takes what the signature stores.
        guarantee
            In which sense: "marginal", "by-class", "certified-overall" or "certified"; None
            takes what the signature stores.
        max_error
            The share of wrong answers among those that pass, in (0, 1), with 95% confidence: the
            others are `unsure`. None takes what the signature stores.
        device
            "cpu", "cuda", "cuda:1" or "auto"; None takes the CPU, or leaves a network of the
            program where it is.

        Raises
        ------
        CovcliError
            If a file is missing, damaged or of another kind, the two do not belong together, or
            the calibration has too few images for the guarantee.
        """
        if isinstance(signature_file, nn.Module):

            def wanted(stored: Guarantee) -> Guarantee:
                return stored.changed(alpha, guarantee, max_error)

            return cls(*load_own(Path(checkpoint), signature_file, wanted, device))
        judge, record = judges.load(
            Path(checkpoint), Path(signature_file), alpha=alpha, guarantee=guarantee,
            max_error=max_error, device=device or "cpu",
        )  # fmt: skip
        return cls(judge, record)

    def __call__(self, images: Tensor | np.ndarray, *, normalised: bool = False) -> Verdicts:
        """Classify a batch of images and judge each.

        Parameters
        ----------
        images
            A tensor on any device, or a NumPy array, of shape (B, C, H, W) with at least one
            image, in any memory layout. Either bytes (uint8, 0 to 255) of any size and 1 to 4
            channels, which are turned to the network's size and channels; or floats of any
            precision in [0, 1], of the network's own size and channels.
        normalised
            Whether the images are floats that were normalised already, by the network's own mean
            and deviation: then its normalisation is skipped.

        Raises
        ------
        CovcliError
            If the images have another shape, type or range, the network was set to training, or
            activations are not finite.
        """
        self._refuse_training()
        inputs = self._inputs(images, normalised)
        network = self.model.classify if normalised else self.model
        with torch.inference_mode(), self._recorder as recorder:
            logits, neurons = forward(network, recorder, inputs)
        self._refuse_training()  # set by another thread, meanwhile
        verdicts = self.judge(logits, neurons)
        self._recorder.reuse(neurons)
        return verdicts

    def _refuse_training(self) -> None:
        if any(module.training for module in self._modules):
            _refuse("the network is set to training", "call monitor.model.eval() before")

    def _inputs(self, given: object, normalised: bool) -> Tensor:
        """Return what the network takes, on its device; what it does not take is a CovcliError."""
        images, shape = _tensor(given), self.model.spec.shape
        if images.ndim != 4 or images.numel() == 0:
            _refuse(
                f"expected images of shape (B, C, H, W), got {tuple(images.shape)}",
                "pass at least one image; a single one goes in as image[None]",
            )
        if self.model.spec.is_own:
            return self._prepared(images)
        if images.dtype == torch.uint8 and not normalised:
            if not 1 <= images.shape[1] <= 4:
                _refuse(
                    f"got bytes of shape {tuple(images.shape)}: {images.shape[1]} channels",
                    "channels come second, as in images.transpose(0, 3, 1, 2)",
                )
            return to_network(adapt(images, shape), self.model.mean.device)
        if not images.is_floating_point() or tuple(images.shape[1:]) != shape:
            kind = "normalised floats" if normalised else "uint8 images, or floats in [0, 1]"
            _refuse(
                f"got {images.dtype} of shape {tuple(images.shape)}",
                f"pass {kind} of shape (B, {', '.join(map(str, shape))})",
            )
        device = self.model.mean.device
        inputs = images.detach().to(device, torch.float32, memory_format=torch.channels_last)
        _check_range(self.model.pixels(inputs) if normalised else inputs, normalised)
        return inputs

    def _prepared(self, images: Tensor) -> Tensor:
        """Return images as the program's loader yields them, on the network's device."""
        if not images.is_floating_point() or tuple(images.shape[1:]) != self.model.spec.shape:
            shape = ", ".join(map(str, self.model.spec.shape))
            _refuse(
                f"got {images.dtype} of shape {tuple(images.shape)}",
                f"pass floats of shape (B, {shape}), as the loader yielded that built it",
            )
        return images.detach().to(self.model.mean.device, torch.float32)


def _tensor(images: object) -> Tensor:
    """Return a tensor or an array as a dense tensor."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "biuf":
        native = images.astype(images.dtype.newbyteorder("="), order="C")
        if native.dtype.itemsize <= 8:
            return torch.from_numpy(native)
    if not isinstance(images, Tensor) or images.layout != torch.strided or images.is_meta:
        kind = getattr(images, "dtype", type(images).__name__)
        _refuse(f"got {kind}", "pass a dense tensor or a NumPy array of numbers")
    return images


def _check_range(pixels: Tensor, normalised: bool) -> None:
    """Refuse pixels beyond [0, 1]: the network would answer, and its signature would judge."""
    low, high = (float(end) for end in torch.aminmax(pixels))
    if not math.isfinite(high - low):
        _refuse("the images hold NaN or infinity")
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return
    seen = f"from {low:.3g} to {high:.3g}"
    if normalised:
        _refuse(
            f"the floats were not normalised as the network does: they stand for pixels {seen}",
            "subtract model.mean and divide by model.deviation, or pass pixels in [0, 1]",
        )
    _refuse(
        f"got floats {seen}, not pixels in [0, 1]",
        "divide bytes by 255, or pass normalised=True if the network's mean and deviation were "
        "taken off already",
    )


def _refuse(reason: str, fix: str | None = None) -> NoReturn:
    raise CovcliError(reason, where="Monitor", fix=fix)
