"""One epoch of training, and the augmentation of images."""

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
    """The network and the optimisation of a training.

    Attributes
    ----------
    model, optimizer, schedule
        The network, its optimiser and the learning-rate schedule, which is stepped once per batch.
    together
        The network wrapped so that gradients are averaged over the ranks.
    penalty
        Maps neurons (B, N) and labels (B,) to the penalty, a scalar; None: no penalty.
    weight
        The penalty's weight.
    points, granularity
        The coverage points of the penalty, and what their neurons are.
    confidence_threshold
        The smallest softmax confidence of a confident image.
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
    """Train on one batch after another, and yield the sums for the log after each step.

    Each rank computes its part of every batch; the step is that of the whole batch.

    Parameters
    ----------
    trainer
        The network and its optimisation.
    images
        The training images.
    labels
        The images' classes, int64 of shape (N,).
    parts
        The rows of each batch.
    how, generator
        The augmentation, and the generator of all randomness of a step, including that of the
        network's layers.

    Yields
    ------
    Tensor
        float64 of shape (6,), sums over the batch's images named by SUMS: the loss, its two parts
        (the penalty without its weight), and the numbers of correct, of correct and confident, and
        of confident images.

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
            sums = _step(trainer, recorder, inputs, labels[rows].to(device), len(whole))
            yield distributed.total(sums.cpu())
    distributed.take_over_buffers(model)


def _step(
    trainer: Trainer, recorder: Recorder, inputs: Tensor, targets: Tensor, whole: int
) -> Tensor:
    """Take one optimisation step on this rank's part of a batch of `whole` images; return sums."""
    logits = trainer.together(inputs)
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets)
    penalty = torch.zeros((), device=inputs.device)
    if trainer.penalty is not None:
        penalty = trainer.penalty(recorder.take(logits), targets)
    loss = cross_entropy + trainer.weight * penalty
    if not bool(loss.isfinite()):
        raise CovcliError("the loss is no longer finite", fix="lower --learning-rate")
    trainer.optimizer.zero_grad(set_to_none=True)
    # Ranks average their gradients; their parts of the batch may differ by an image.
    (loss * (distributed.size() * len(inputs) / whole)).backward()
    trainer.optimizer.step()
    trainer.schedule.step()
    with torch.no_grad():
        confidence, predicted = logits.softmax(1).max(1)
        correct = predicted == targets
        confident = confidence >= trainer.confidence_threshold
        means = torch.stack([loss, cross_entropy, penalty]).double() * len(inputs)
        counts = [correct.sum(), (correct & confident).sum(), confident.sum()]
        return torch.cat([means, torch.stack(counts).double()])


def draw_seed(generator: torch.Generator) -> int:
    """Return a random seed for one step."""
    return int(torch.randint(2**62, (), generator=generator))


def draw_moves(how: Augmentation, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Draw the shift and mirroring of `count` images; int64 of shape (count, 3).

    The columns are the shift down and to the right, in pixels, up to an eighth of the size either
    way, and whether to mirror, with probability 0.5 for "crop-flip". For "none", all are 0.
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
    """Shift and mirror each image (B, C, H, W) by `moves` of `draw_moves`; new pixels are black.

    The whole batch is cropped from padded images by one gather.
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
