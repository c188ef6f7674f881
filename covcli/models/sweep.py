"""Inference over an image set, in batches: logits, neurons and inputs of each image."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from covcli.core import distributed
from covcli.core.choices import AmpMode
from covcli.core.errors import CovcliError
from covcli.core.progress import Progress
from covcli.data.images import ImageSet, batches
from covcli.data.preprocessing import Shape
from covcli.methods.state import Granularity
from covcli.models.architectures import Classifier, Precision
from covcli.models.points import Point, Recorder

# Limits of a batch: images, spatial positions, and neurons. The division into batches depends only
# on the set, so that several ranks compute the same bits as one process.
SWEEP_IMAGES = 64
SWEEP_POSITIONS = 1 << 21
SWEEP_NEURONS = 1 << 26
CHECKED_TOGETHER = 16
MEASURED: tuple[Precision, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Swept:
    """One batch of a sweep.

    Attributes
    ----------
    rows
        Positions of the images in the set, int64 of shape (B,).
    logits
        float32 of shape (B, classes), on the network's device.
    neurons
        float32 of shape (B, N), on the network's device.
    inputs
        The network's inputs: pixels in [0, 1] of shape (B, C, H, W), on its device.
    """

    rows: Tensor
    logits: Tensor
    neurons: Tensor
    inputs: Tensor


def to_network(images: Tensor, device: torch.device) -> Tensor:
    """Convert uint8 images (B, C, H, W) to floats in [0, 1] on a device, in channels-last layout.

    Floating-point images are only moved.

    Examples
    --------
    >>> to_network(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.device("cpu")).item()
    1.0
    """
    if device.type == "cuda" and images.is_cpu:
        images = images.pin_memory()  # from other memory, a copy waits for the device
    moved = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return moved if images.is_floating_point() else moved.float().div_(255)


@contextmanager
def counted(model: Classifier, progress: Progress) -> Iterator[None]:
    """Tell of every run of a network during the block: an attack makes many with one batch."""
    handle = model.register_forward_hook(lambda *_: progress.step())
    try:
        yield
    finally:
        handle.remove()


def sweep_batch(shape: Shape) -> int:
    """Return the number of images of a shape in a batch without gradients."""
    return max(1, min(SWEEP_IMAGES, SWEEP_POSITIONS // (shape[1] * shape[2])))


def batch_size(shape: Shape, points: Sequence[Point]) -> int:
    """Return how many images of a shape a sweep runs at once where those points are watched."""
    most = SWEEP_NEURONS // max(1, sum(point.neurons for point in points))
    return max(1, min(sweep_batch(shape), most))


def forward(
    network: Callable[[Tensor], Tensor], recorder: Recorder, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a network on a batch, and return its logits and neurons, which are finite.

    Parameters and shapes are those of `run`.

    Raises
    ------
    CovcliError
        If a logit or a neuron is NaN or infinite.
    """
    logits, neurons = run(network, recorder, images)
    refuse_not_finite(recorder.points, logits, neurons)
    return logits, neurons


def run(
    network: Callable[[Tensor], Tensor], recorder: Recorder, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a network on a batch, and return its logits and neurons; no device is waited for.

    Contributions need a backward pass, also in the caller's inference mode; no graph is kept.

    Parameters
    ----------
    network
        Maps images to logits.
    recorder
        Records the network's coverage points; its `with` block is entered.
    images
        Shape (B, C, H, W).

    Returns
    -------
    tuple of Tensor
        Logits (B, classes) and neurons (B, N).
    """
    if recorder.granularity == "contribution":
        with torch.inference_mode(False), torch.enable_grad():
            logits = network(images.clone().requires_grad_())
            neurons = recorder.take(logits)
        logits = logits.detach()
    else:
        logits = network(images)
        neurons = recorder.take(logits)
    if neurons.shape[0] > logits.shape[0]:  # an image was run twice
        neurons = neurons[: logits.shape[0]]
    return logits, neurons


def doubtful(logits: Tensor, neurons: Tensor) -> Tensor:
    """Return a number that is finite if all of them are; it may overflow if some are large."""
    return (neurons.sum() + logits.sum()).detach()


def refuse_not_finite(points: Sequence[Point], logits: Tensor, neurons: Tensor) -> None:
    """Raise a CovcliError if a logit or a neuron is NaN or infinite."""
    if math.isfinite(float(doubtful(logits, neurons))):
        return
    parts = neurons.split([point.neurons for point in points], 1)
    names = [f"activations at coverage point {point.name!r}" for point in points]
    for name, part in zip([*names, "logits"], [*parts, logits], strict=True):
        if not bool(part.isfinite().all()):
            raise CovcliError(f"{name} are NaN or infinite", where="the network")


def checked_together(device: torch.device) -> int:
    """Return the number of a sweep's batches that are checked together for finite values.

    Each check waits for the device. A batch is rarely not finite, and then it is found some batches
    later, but before the sweep ends.
    """
    return 1 if device.type == "cpu" else CHECKED_TOGETHER


@dataclass
class _Checks:
    """Refuses batches of a sweep that are not finite.

    Attributes
    ----------
    points
        The coverage points.
    again
        Runs the batch of some rows again, to name what is not finite.
    every
        The number of batches that are checked together.
    """

    points: Sequence[Point]
    again: Callable[[Tensor], tuple[Tensor, Tensor]]
    every: int
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, rows: Tensor, logits: Tensor, neurons: Tensor) -> None:
        """Note a batch; raise a CovcliError if one that is checked now is not finite."""
        self.waiting.append((rows, doubtful(logits, neurons)))
        if len(self.waiting) == self.every:
            self.finish()

    def finish(self) -> None:
        """Raise a CovcliError if a batch that was noted is not finite."""
        if not self.waiting:
            return
        marks = torch.stack([mark for _, mark in self.waiting]).isfinite().tolist()
        doubted = [rows for (rows, _), known in zip(self.waiting, marks, strict=True) if not known]
        self.waiting.clear()
        for rows in doubted:
            with torch.inference_mode():
                refuse_not_finite(self.points, *self.again(rows))


def sweep(
    model: Classifier,
    images: ImageSet,
    points: Sequence[Point],
    granularity: Granularity,
    progress: Progress,
    title: str,
) -> Iterator[Swept]:
    """Run a network over a set in order, and yield logits and neurons batch by batch.

    Under torchrun, each rank processes its share of the batches.

    Parameters
    ----------
    model
        The network; it is put into evaluation mode.
    images
        The set.
    points, granularity
        The coverage points, and what their neurons are.
    progress, title
        Receives the progress under that title.

    Yields
    ------
    Swept
        One batch.

    Examples
    --------
    >>> from pathlib import Path
    >>> from covcli.core.progress import Silent
    >>> from covcli.data import datasets
    >>> from covcli.models import checkpoint
    >>> model = checkpoint.load(Path("runs/latest/checkpoint.pt")).model
    >>> points, digits = model.points("channel"), datasets.load("digits?limit=70", "test")
    >>> [tuple(b.neurons.shape) for b in sweep(model, digits, points, "channel", Silent(), "")]
    [(64, 80), (6, 80)]

    Raises
    ------
    CovcliError
        If an activation or a logit is NaN or infinite.
    """
    device = model.mean.device
    model.eval()
    batch = batch_size(model.spec.shape, points)
    parts = distributed.share(torch.arange(len(images)).split(batch))
    progress.start(title, sum(map(len, parts)))
    with Recorder(model.network, points, granularity) as recorder:

        def again(rows: Tensor) -> tuple[Tensor, Tensor]:
            return run(model, recorder, to_network(images.batch(rows, model.spec.shape), device))

        checks = _Checks(points, again, checked_together(device))
        for rows, pixels in batches(images, parts, model.spec.shape):
            inputs = to_network(pixels, device)
            with torch.inference_mode():
                logits, neurons = run(model, recorder, inputs)
            checks.add(rows, logits, neurons)
            yield Swept(rows, logits, neurons, inputs)
            progress.advance(len(rows))
        checks.finish()


def choose_precision(
    amp: AmpMode, model: Classifier, work: Callable[[Tensor], object]
) -> Precision:
    """Return the requested precision; for "auto", the one that measures faster.

    Parameters
    ----------
    amp
        "off", "bf16" or "auto".
    model
        The network.
    work
        Runs the work on images (B, C, H, W), in the network's current precision.
    """
    if amp != "auto":
        return "bfloat16" if amp == "bf16" else "float32"
    return distributed.agree(_faster(model, work))


def _faster(model: Classifier, work: Callable[[Tensor], object]) -> Precision:
    images = torch.zeros(16, *model.spec.shape, device=model.mean.device)
    images = images.to(memory_format=torch.channels_last)
    chosen, times = model.precision, dict[Precision, float]()
    for precision in [*MEASURED, *MEASURED]:  # the first round is a warm-up
        model.precision = precision
        began = time.perf_counter()
        work(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)  # not the current device
        times[precision] = time.perf_counter() - began
    model.precision = chosen
    return min(MEASURED, key=lambda precision: times[precision])
