"""The only two loops over batches: an epoch, with gradients, and a sweep, without."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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

# A sweep's batch: at most so many images, positions of an image, and neurons in all. Which images
# make a batch depends on the set alone, so that ranks compute the same bits as one process.
SWEEP_IMAGES = 64
SWEEP_POSITIONS = 1 << 21
SWEEP_NEURONS = 1 << 26
MEASURED: tuple[Precision, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Swept:
    """One batch of a sweep.

    Attributes
    ----------
    rows
        Which images of the set, shape (B,).
    logits
        Shape (B, classes).
    neurons
        Shape (B, N), on the network's device like the logits.
    inputs
        What the network was given: pixels in [0, 1] of shape (B, C, H, W), on its device.
    """

    rows: Tensor
    logits: Tensor
    neurons: Tensor
    inputs: Tensor


def to_network(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images (B, C, H, W) to floats in [0, 1] on a device, in the fast memory layout.

    Floats are what a network takes already.
    """
    moved = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return moved if images.is_floating_point() else moved.float().div_(255)


def sweep_batch(shape: Shape) -> int:
    """Return how many images of a shape to run at once without gradients."""
    return max(1, min(SWEEP_IMAGES, SWEEP_POSITIONS // (shape[1] * shape[2])))


def forward(
    network: Callable[[Tensor], Tensor], recorder: Recorder, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a network; return logits and neurons, or a CovcliError where they are not finite.

    Contributions take a backward pass, whatever the caller's mode, and keep no graph.
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
    # Sums pass NaN and infinity on; those of large numbers can overflow, so then each is looked at.
    if not math.isfinite(float((neurons.sum() + logits.sum()).detach())):
        _refuse_not_finite(recorder.points, neurons, logits)
    return logits, neurons


def _refuse_not_finite(points: Sequence[Point], neurons: Tensor, logits: Tensor) -> None:
    parts = neurons.split([point.neurons for point in points], 1)
    names = [f"activations at coverage point {point.name!r}" for point in points]
    for name, part in zip([*names, "logits"], [*parts, logits], strict=True):
        if not bool(part.isfinite().all()):
            raise CovcliError(f"{name} are NaN or infinite", where="the network")


def sweep(
    model: Classifier,
    images: ImageSet,
    points: Sequence[Point],
    granularity: Granularity,
    progress: Progress,
    title: str,
) -> Iterator[Swept]:
    """Run a network over a set in its order, and yield logits and neurons batch by batch.

    Under torchrun each rank gets the batches of its share.

    Raises
    ------
    CovcliError
        If an activation or a logit is NaN or infinite.
    """
    device = model.mean.device
    model.eval()
    most = SWEEP_NEURONS // max(1, sum(point.neurons for point in points))
    batch = max(1, min(sweep_batch(model.spec.shape), most))
    parts = distributed.share(torch.arange(len(images)).split(batch))
    progress.start(title, sum(map(len, parts)))
    with Recorder(model.network, points, granularity) as recorder:
        for rows, pixels in batches(images, parts, model.spec.shape):
            inputs = to_network(pixels, device)
            with torch.inference_mode():
                logits, neurons = forward(model, recorder, inputs)
            yield Swept(rows, logits, neurons, inputs)
            progress.advance(len(rows))


def choose_precision(
    amp: AmpMode, model: Classifier, work: Callable[[Tensor], object]
) -> Precision:
    """Return the precision asked for; for "auto" the one in which the network works faster.

    Parameters
    ----------
    work
        Does the work on images (B, C, H, W), with the network in the precision that it is in.
    """
    if amp != "auto":
        return "bfloat16" if amp == "bf16" else "float32"
    return distributed.agree(_faster(model, work))


def _faster(model: Classifier, work: Callable[[Tensor], object]) -> Precision:
    images = torch.zeros(16, *model.spec.shape, device=model.mean.device)
    images = images.to(memory_format=torch.channels_last)
    chosen, times = model.precision, dict[Precision, float]()
    for precision in [*MEASURED, *MEASURED]:  # the second time counts: warm
        model.precision = precision
        began = time.perf_counter()
        work(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        times[precision] = time.perf_counter() - began
    model.precision = chosen
    return min(MEASURED, key=lambda precision: times[precision])
