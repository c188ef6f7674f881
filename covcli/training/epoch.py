"""The loop over the batches of an epoch, with gradients, and how images are augmented."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from covcli.core import distributed
from covcli.core.choices import Augmentation
from covcli.core.errors import CovcliError
from covcli.data.images import ImageSet, batches
from covcli.data.preprocessing import Shape
from covcli.methods.state import Granularity
from covcli.models.architectures import Classifier
from covcli.models.points import Point, Recorder
from covcli.models.sweep import to_network

SUMS = ("loss", "cross_entropy", "penalty", "right", "confident_right", "confident")


@dataclass(frozen=True)
class Trainer:
    """What one epoch of training needs beside the data.

    Attributes
    ----------
    model, optimizer, schedule
        The network and how it learns; the schedule is stepped once a batch.
    together
        The network as all ranks train it.
    penalty
        Maps neurons (B, N) and labels (B,) to the penalty, a scalar; None to go without.
    weight
        The penalty's weight.
    points, granularity
        Where the penalty looks.
    confidence_threshold
        From which softmax confidence on an image counts as confident.
    """

    model: Classifier
    together: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    penalty: Callable[[Tensor, Tensor], Tensor] | None
    weight: float
    points: Sequence[Point]
    granularity: Granularity
    confidence_threshold: float


def epoch(
    trainer: Trainer,
    images: ImageSet,
    labels: Tensor,
    parts: Sequence[Tensor],
    how: Augmentation,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Train on one batch after another, and yield after each step what it adds to the log.

    Each rank computes its part of every batch; the step is that of the whole batch.

    Parameters
    ----------
    labels
        The images' classes, int64 of shape (N,).
    parts
        The rows of each batch.
    how, generator
        How images are augmented, and where the randomness of a step comes from, that of the
        network's own layers included.

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
    shape = model.spec.shape
    model.train()
    watched = trainer.points if trainer.penalty is not None else []
    with Recorder(model.network, watched, trainer.granularity) as recorder:
        mine = [distributed.part(rows) for rows in parts]
        for whole, (rows, pixels) in zip(parts, batches(images, mine, shape), strict=True):
            moves = draw_moves(how, len(whole), shape, generator)
            torch.manual_seed(draw_seed(generator) + distributed.rank())
            inputs = to_network(augment(pixels, distributed.part(moves)), device)
            targets = labels[rows].to(device)
            logits = trainer.together(inputs)
            cross_entropy = torch.nn.functional.cross_entropy(logits, targets)
            penalty = torch.zeros((), device=device)
            if trainer.penalty is not None:
                penalty = trainer.penalty(recorder.take(logits), targets)
            loss = cross_entropy + trainer.weight * penalty
            if not bool(loss.isfinite()):
                raise CovcliError("the loss is no longer finite", fix="lower --learning-rate")
            trainer.optimizer.zero_grad(set_to_none=True)
            # Ranks average their gradients; their parts of the batch may differ by an image.
            (loss * (distributed.size() * len(rows) / len(whole))).backward()
            trainer.optimizer.step()
            trainer.schedule.step()
            with torch.no_grad():
                sure, predicted = logits.softmax(1).max(1)
                right = predicted == targets
                confident = sure >= trainer.confidence_threshold
                means = torch.stack([loss, cross_entropy, penalty]).double() * len(rows)
                counts = [right.sum(), (right & confident).sum(), confident.sum()]
            yield distributed.total(torch.cat([means, torch.stack(counts).double()]).cpu())
    distributed.take_over_buffers(model)


def draw_seed(generator: torch.Generator) -> int:
    """Return a seed for the draws of one step."""
    return int(torch.randint(2**62, (), generator=generator))


def draw_moves(how: Augmentation, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Draw how to move each of so many images; int64 of shape (count, 3).

    Down and to the right, by up to an eighth of the size either way, and for "crop-flip" whether
    to mirror it, one half of the time. For "none" nothing moves.
    """
    moves = torch.zeros(count, 3, dtype=torch.int64)
    if how != "none":
        for axis, side in enumerate(shape[1:]):
            reach = side // 8
            moves[:, axis] = torch.randint(-reach, reach + 1, (count,), generator=generator)
    if how == "crop-flip":
        moves[:, 2] = torch.randint(0, 2, (count,), generator=generator)
    return moves


def augment(images: Tensor, moves: Tensor) -> Tensor:
    """Shift and mirror each image (B, C, H, W) as `draw_moves` says; uncovered pixels are black.

    The whole batch is cut out of a frame by one gather.
    """
    if not bool(moves.any()):
        return images
    batch, _, height, width = images.shape
    y, x = moves[:, :2].abs().amax(0).tolist()
    framed = torch.nn.functional.pad(images, (x, x, y, y))
    rows = y - moves[:, :1] + torch.arange(height)
    columns = x - moves[:, 1:2] + torch.arange(width)
    columns = torch.where(moves[:, 2:] > 0, columns.flip(1), columns)
    return framed[
        torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None]
    ].permute(0, 3, 1, 2)
