"""Monitor: a network that also returns, for each answer, whether it can be trusted."""

import logging
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor, nn

from covcli.core import files, run_folders
from covcli.core.choices import Mode
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress, Silent
from covcli.data.images import adapt
from covcli.data.prepared import prepared_otherwise
from covcli.methods import make_method
from covcli.methods.state import Granularity
from covcli.models.architectures import Classifier
from covcli.models.points import Recorder
from covcli.models.sweep import doubtful, refuse_not_finite, run, to_network
from covcli.models.watchable import is_compiled
from covcli.signature import judge as judges
from covcli.signature import signature as signatures
from covcli.signature.build import DEFAULT_METHOD
from covcli.signature.fit import How
from covcli.signature.guarantee import DEFAULT_GUARANTEE, Guarantee, GuaranteeRequest
from covcli.signature.judge import Judge, Verdicts
from covcli.signature.own_network import OwnNetwork, build_own, load_own
from covcli.signature.record import Record

log = logging.getLogger(__name__)

__all__ = ["Monitor", "Verdicts"]
FIRST_BATCHES = 20  # so many batches of a program's own images are checked for their range
ROUNDING = 1e-3  # a pixel may lie outside [0, 1] by this much, the rounding of half precision


class Monitor:
    """A network with its signature; returns a verdict for each image.

    Several threads may call one monitor at the same time, and its network directly. The monitor
    keeps hooks on the network as long as it exists; they do nothing outside its calls.

    Parameters
    ----------
    judge
        The network, its signature, its calibration and the rule for verdicts.
    record
        The record of the signature's data; None for a monitor that a program composed itself.

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
        self._unchecked = FIRST_BATCHES if record is not None and record.extent is not None else 0
        self._modules = tuple(judge.model.modules())
        self._weights = WeightsWatch(judge.model, judge.signature.fingerprint)
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
        """Build the monitor of a program's own network; nothing has to be registered.

        The program prepares the images: the network and the monitor receive the loader's values
        unchanged. The network is not copied or moved, and is put into evaluation mode.

        Parameters
        ----------
        network
            Maps images (B, C, H, W) to logits (B, classes), or to nested tensors that contain them.
        trusted
            The images that trained it, with labels: a torch Dataset, a DataLoader, or tensors
            (images, labels).
        calibration
            Images that did not train it, in the same form; labels may be missing.
        method, granularity, confidence_threshold, alpha, guarantee, max_error, points, logits, seed
            As for `covcli build-signature`.
        classes
            Class names; by default those of the dataset, or numbers.
        progress
            Receives the progress of every pass.

        Raises
        ------
        CovcliError
            If the data or the network is of another kind, a class has no correctly classified
            image, or the calibration images are too few for the guarantee.

        Examples
        --------
        >>> labels = torch.arange(120) % 2
        >>> images = labels.view(-1, 1, 1, 1) + torch.rand(120, 3, 8, 8)
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> training = torch.optim.Adam(network.parameters(), 0.01)
        >>> for _ in range(20):
        ...     nn.functional.cross_entropy(network(images), labels).backward()
        ...     training.step()
        ...     training.zero_grad()
        >>> monitor = Monitor.build(network, (images[:80], labels[:80]), images[80:], method="src")
        >>> monitor(torch.full((1, 3, 8, 8), -9.0)).words
        ['untrusted']
        """
        how = How(
            make_method(method), granularity, confidence_threshold,
            Guarantee(alpha, guarantee, max_error), seed,
        )  # fmt: skip
        own = OwnNetwork(network, classes, logits, points)
        return cls(*build_own(own, trusted, calibration, how, progress))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the signature, and return its path; `Monitor.load(path, network)` reads it.

        The network's weights are not written; the program must save them.

        Raises
        ------
        CovcliError
            If the file exists and `force` is False, it cannot be written, or the monitor has no
            record of its data.
        """
        if self.record is None:
            _refuse("has no record of its data")
        if not force and Path(path).exists():
            _refuse(f"{path} exists", "pass force=True, or name another")
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
            or a signature and the network that it was built from.
        alpha
            The largest false-alarm rate on images like the calibration images, in (0, 1). None
            uses the signature's.
        guarantee
            The kind of guarantee: "marginal", "by-class", "certified-overall" or "certified". None
            uses the signature's.
        max_error
            The largest share of wrong answers among those that pass, in (0, 1), with 95%
            confidence; other answers are `unsure`. None uses the signature's.
        device
            "cpu", "cuda", "cuda:1" or "auto". None: "auto", or the device of
            the program's network.

        Raises
        ------
        CovcliError
            If a file is missing, damaged or of another kind, the two do not belong together, or
            the calibration has too few images for the guarantee.

        Examples
        --------
        >>> run = "runs/latest"
        >>> signature = f"{run}/signature-ensemble.safetensors"
        >>> monitor = Monitor.load(f"{run}/checkpoint.pt", signature, alpha=0.1)
        >>> monitor.judge.rule.guarantee.alpha
        0.1
        """
        request = GuaranteeRequest(alpha, guarantee, max_error)
        if not isinstance(checkpoint, str | Path):
            _refuse(f"load got {type(checkpoint).__name__}", "pass the signature, then the network")
        if not isinstance(signature_file, str | Path):
            return cls(*load_own(Path(checkpoint), signature_file, request, device))
        files = Path(checkpoint), Path(signature_file)
        return cls(*judges.load(*files, request, device or "auto"))

    def __call__(self, images: Tensor | np.ndarray, *, normalised: bool = False) -> Verdicts:
        """Classify a batch of images and judge each.

        Parameters
        ----------
        images
            A tensor on any device, or a NumPy array, of shape (B, C, H, W) with B ≥ 1, in any
            memory layout. Either uint8 (0 to 255) of any size with 1 to 4 channels, which is
            converted to the network's size and channels; or floats in [0, 1] of any precision, with
            the network's size and channels. For a program's own network: floats as its loader
            yields them; a warning says if the first batches have quite another range.
        normalised
            Whether the floats were normalised already with the network's mean and deviation.

        Returns
        -------
        Verdicts
            Logits, predicted classes, scores and verdicts, one entry per image.

        Raises
        ------
        CovcliError
            If the images have another shape, type or range, the network is in training mode, its
            weights have changed since the signature was built, or activations are not finite.

        Examples
        --------
        >>> monitor = Monitor.load(
        ...     "runs/latest/checkpoint.pt", "runs/latest/signature-ensemble.safetensors"
        ... )
        >>> verdicts = monitor(np.zeros((2, 3, 32, 32), np.float32))
        >>> verdicts.words, bool((verdicts.confidence < 0.5).all())
        (['untrusted', 'untrusted'], True)
        """
        self._refuse_training()
        self._weights.refuse_changes()
        given = _tensor(images)
        inputs = self._inputs(given, normalised)
        network = self.model.classify if normalised else self.model
        with torch.inference_mode(), self._recorder as recorder:
            logits, neurons = run(network, recorder, inputs)
            checks = [doubtful(logits, neurons)]
            if given.is_floating_point() and not self.model.spec.is_own:
                checks += torch.aminmax(self.model.pixels(inputs) if normalised else inputs)
            judged = self.judge.on_device(logits, neurons)
        self._refuse_training()  # another thread may have set it meanwhile
        # The checks leave the device together with the verdicts, so that it is waited for once.
        verdicts, checks = judged.fetched(*(check.expand(len(logits)) for check in checks))
        mark, *ends = (float(check[0]) for check in checks)
        if ends:
            _check_range(ends[0], ends[1], normalised)
        if not math.isfinite(mark):
            refuse_not_finite(self.judge.signature.points, logits, neurons)
        self._recorder.reuse(neurons)
        return verdicts

    def _refuse_training(self) -> None:
        if any(module.training for module in self._modules):
            _refuse("the network is in training mode", "call monitor.model.eval() first")
        if any(map(is_compiled, self._modules)):
            _refuse("the network was compiled in place", "compile a copy of it")

    def _inputs(self, images: Tensor, normalised: bool) -> Tensor:
        """Return the network's input, on its device; raise a CovcliError for unsuitable images."""
        shape = self.model.spec.shape
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
        return images.detach().to(device, torch.float32, memory_format=torch.channels_last)

    def _prepared(self, images: Tensor) -> Tensor:
        """Return images as the program's loader yields them, on the network's device."""
        if not images.is_floating_point() or tuple(images.shape[1:]) != self.model.spec.shape:
            shape = ", ".join(map(str, self.model.spec.shape))
            _refuse(
                f"got {images.dtype} of shape {tuple(images.shape)}",
                f"pass floats of shape (B, {shape}), as the loader yielded them",
            )
        if self._unchecked:
            self._check_extent(images)
        return images.detach().to(self.model.mean.device, torch.float32)

    def _check_extent(self, images: Tensor) -> None:
        """Warn once if a batch seems prepared otherwise than the images of the signature."""
        assert self.record is not None
        assert self.record.extent is not None
        self._unchecked -= 1
        if sign := prepared_otherwise(images.detach().float(), self.record.extent):
            self._unchecked = 0
            log.warning("Monitor: got floats %s: prepare them as those were", sign)


class WeightsWatch:
    """Notices that the weights of a network have changed, at the cost of some counters a call.

    torch counts the changes of each tensor. Changes through `tensor.data` are not counted.

    Parameters
    ----------
    model
        The network.
    fingerprint
        The fingerprint of the weights that the signature was built from.
    """

    def __init__(self, model: Classifier, fingerprint: str) -> None:
        self._model, self._fingerprint = model, fingerprint
        kept = model.state_dict(keep_vars=True).values()
        # Normalisation changes its statistics uncounted, but counts its batches in another buffer.
        self._tensors = [t for t in kept if isinstance(t, Tensor) and not t.is_inference()]
        self._stamps = self._now()

    def _now(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._tensors]

    def refuse_changes(self) -> None:
        """Raise a CovcliError if the weights have changed; to have been moved is no change."""
        stamps = self._now()
        if stamps == self._stamps:
            return
        if files.fingerprint(self._model.state_dict()) != self._fingerprint:
            _refuse("the network's weights have changed", "build the monitor again")
        self._stamps = stamps


def _tensor(images: object) -> Tensor:
    """Return a tensor or an array as a dense tensor."""
    if np.ma.is_masked(images):
        _refuse("got an array of which values are masked", "fill them: images.filled(value)")
    if isinstance(images, np.ndarray) and images.dtype.kind in "biuf":
        native = images.astype(images.dtype.newbyteorder("="), order="C")
        if native.dtype.itemsize <= 8:
            return torch.from_numpy(native)
    dense = isinstance(images, Tensor) and images.layout == torch.strided and not images.is_nested
    if not isinstance(images, Tensor) or not dense or images.is_meta:
        kind = getattr(images, "dtype", type(images).__name__)
        _refuse(f"got {kind}", "pass a dense tensor or a NumPy array of numbers")
    return images


def _check_range(low: float, high: float, normalised: bool) -> None:
    """Raise a CovcliError for pixels outside [0, 1], for which results would be meaningless."""
    if not math.isfinite(high - low):
        _refuse("the images hold NaN or infinity")
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return
    seen = f"from {low:.3g} to {high:.3g}"
    if normalised:
        _refuse(
            f"the floats were not normalised as the network does: they mean pixels {seen}",
            "subtract model.mean and divide by model.deviation, or pass pixels in [0, 1]",
        )
    _refuse(
        f"got floats {seen}, not pixels in [0, 1]",
        "divide bytes by 255, or pass normalised=True if the images were normalised already with "
        "the network's mean and deviation",
    )


def _refuse(reason: str, fix: str | None = None) -> NoReturn:
    raise CovcliError(reason, where="Monitor", fix=fix)
