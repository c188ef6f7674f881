"""The only two loops over batches: an epoch, with gradients, and a sweep, without."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from covcli.activations import Granularity, Point, Recorder, capture
from covcli.errors import CovcliError
from covcli.images import Augmentation, ImageSet, Shape, augment, batches
from covcli.models import Classifier
from covcli.progress import Progress

# A sweep's batch: at most so many images, and so many positions of an image in all.
SWEEP_IMAGES = 250
SWEEP_POSITIONS = 1 << 21


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
    """Turn uint8 images (B, C, H, W) to floats in [0, 1] on a device, in the fast memory layout."""
    moved = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return moved.float().div_(255)


def sweep_batch(shape: Shape) -> int:
    """Return how many images of a shape to run at once without gradients."""
    return max(1, min(SWEEP_IMAGES, SWEEP_POSITIONS // (shape[1] * shape[2])))


def forward(model: Classifier, recorder: Recorder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Run the network; return logits and neurons, or a CovcliError where they are not finite.

    Contributions take a backward pass, whatever the caller's mode, and keep no graph.
    """
    if recorder.granularity == "contribution":
        with torch.inference_mode(False), torch.enable_grad():
            logits = model(images.clone().requires_grad_())
            neurons = recorder.take(logits)
        logits = logits.detach()
    else:
        logits = model(images)
        neurons = recorder.take(logits)
    # The extremes tell: NaN is passed on, and it takes one pass.
    extremes = [end for seen in (neurons, logits) if seen.numel() for end in seen.aminmax()]
    if not bool(torch.stack(extremes).isfinite().all()):
        raise CovcliError(_where_not_finite(recorder.points, neurons), where="the network")
    return logits, neurons


def _where_not_finite(points: Sequence[Point], neurons: Tensor) -> str:
    parts = neurons.split([point.neurons for point in points], 1)
    for point, part in zip(points, parts, strict=True):
        if not bool(part.isfinite().all()):
            return f"activations at coverage point {point.name!r} are NaN or infinite"
    return "logits are NaN or infinite"


def sweep(
    model: Classifier,
    images: ImageSet,
    points: Sequence[Point],
    granularity: Granularity,
    progress: Progress,
    title: str,
) -> Iterator[Swept]:
    """Run a network over a set in its order, and yield logits and neurons batch by batch.

    Raises
    ------
    CovcliError
        If an activation or a logit is NaN or infinite.
    """
    device = model.mean.device
    model.eval()
    parts = torch.arange(len(images)).split(sweep_batch(model.spec.shape))
    progress.start(title, len(images))
    with capture(model.network, points, granularity) as recorder:
        for rows, pixels in batches(images, parts, model.spec.shape):
            inputs = to_network(pixels, device)
            with torch.inference_mode():
                logits, neurons = forward(model, recorder, inputs)
            yield Swept(rows, logits, neurons, inputs)
            progress.advance(len(rows))


SUMS = ("loss", "cross_entropy", "penalty", "right", "confident_right", "confident")


@dataclass(frozen=True)
class Trainer:
    """What one epoch of training needs beside the data.

    Attributes
    ----------
    model, optimizer, schedule
        The network and how it learns; the schedule is stepped once a batch.
    penalty
        Maps neurons (B, N) and labels (B,) to the penalty, a scalar; None to go without.
    weight
        The penalty's weight.
    points, granularity
        Where the penalty looks.
    confidence_threshold
        From which softmax confidence on an image counts as confident.
    autocast
        Whether to compute in bfloat16 where that is safe.
    """

    model: Classifier
    optimizer: Optimizer
    schedule: LRScheduler
    penalty: Callable[[Tensor, Tensor], Tensor] | None
    weight: float
    points: Sequence[Point]
    granularity: Granularity
    confidence_threshold: float
    autocast: bool


def epoch(
    trainer: Trainer,
    images: ImageSet,
    labels: Tensor,
    parts: Sequence[Tensor],
    how: Augmentation,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Train on one batch after another, and yield after each step what it adds to the log.

    Parameters
    ----------
    labels
        The images' classes, int64 of shape (N,).
    parts
        The rows of each batch.
    how, generator
        How images are augmented, and where its randomness comes from.

    Yields
    ------
    Tensor
        float64 of shape (6,): over the batch's images, the sums that SUMS names: the loss, its two
        parts (the penalty before its weight), and how many images are classified correctly, are
        correct and confident, and are confident.

    Raises
    ------
    CovcliError
        If the loss is no longer finite.
    """
    model, device = trainer.model, trainer.model.mean.device
    model.train()
    watched = trainer.points if trainer.penalty is not None else []
    with capture(model.network, watched, trainer.granularity) as recorder:
        for rows, pixels in batches(images, parts, model.spec.shape):
            inputs = to_network(augment(pixels, how, generator), device)
            targets = labels[rows].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=trainer.autocast):
                logits = model(inputs)
            logits = logits.float()
            cross_entropy = torch.nn.functional.cross_entropy(logits, targets)
            penalty = torch.zeros((), device=device)
            if trainer.penalty is not None:
                penalty = trainer.penalty(recorder.take(logits).float(), targets)
            loss = cross_entropy + trainer.weight * penalty
            if not bool(loss.isfinite()):
                raise CovcliError("the loss is no longer finite", fix="lower --learning-rate")
            trainer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            trainer.optimizer.step()
            trainer.schedule.step()
            with torch.no_grad():
                sure, predicted = logits.softmax(1).max(1)
                right = predicted == targets
                confident = sure >= trainer.confidence_threshold
                means = torch.stack([loss, cross_entropy, penalty]).double() * len(rows)
                counts = [right.sum(), (right & confident).sum(), confident.sum()]
            yield torch.cat([means, torch.stack(counts).double()]).cpu()
