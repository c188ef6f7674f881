"""An attack that knows the monitor: it lowers the coverage score while it deceives the network.

Carlini and Wagner, "Adversarial Examples Are Not Easily Detected", 2017; Tramèr et al., "On
Adaptive Attacks to Adversarial Example Defenses", NeurIPS 2020.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# From this lead in logits on a wrong class is safe, and only the score is worked on.
SAFE_MARGIN = 5.0


@dataclass(frozen=True)
class Look:
    """What a monitored network says of a batch of images.

    Attributes
    ----------
    logits
        Shape (B, classes).
    score
        The coverage score, float64 of shape (B,).
    soft_score
        Its stand-in with a gradient, float64 of shape (B,), in units of the threshold.
    """

    logits: Tensor
    score: Tensor
    soft_score: Tensor


# From images, floats in [0, 1] of shape (B, C, H, W).
Monitored: TypeAlias = Callable[[Tensor], Look]


def rounded(images: Tensor) -> Tensor:
    """Return images as 8 bits store them, still floats in [0, 1]."""
    return (images * 255).round() / 255


def adaptive_pgd(
    look: Monitored,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int,
    step: float,
    weight: float,
) -> Tensor:
    """Look within ±epsilon for images that deceive the network and score low, by signed gradients.

    Ascends the margin m = max_i z_i − z_y, i ≠ y, from a random start, and once the image deceives
    (m > 0) min(m, 5) − weight·(soft score/threshold): the margin counts no further where it is safe
    (Carlini and Wagner, 2017), and the score, of the class that the network then predicts, does not
    hold back an image that does not deceive yet (Bryniarski et al., "Evading Adversarial Example
    Detection Defenses with Orthogonal Projected Gradient Descent", 2021). Cross-entropy less the
    score is weaker: it grows without bound, and where it does not the score keeps images from
    deceiving.

    Of each image the iterate is kept that deceives with the lowest score, else the last. Iterates
    are judged as they would be stored, in 8 bits, and by the score itself, not by its stand-in.

    Parameters
    ----------
    look
        The network with its coverage score.
    images, labels
        Shape (B, C, H, W), in [0, 1], and their true classes (B,).
    epsilon, step
        Largest change of a pixel, and change in one step, of pixels in [0, 1].
    steps
        How many.
    weight
        The score's weight in the gradient; with 0 it only chooses among the iterates.

    Returns
    -------
    Tensor
        Shape (B, C, H, W), rounded to 8 bits.
    """
    moving = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    best = images
    lowest = torch.full((len(images),), torch.inf, dtype=torch.float64)
    for _ in range(steps):
        stored = rounded(moving).requires_grad_()
        seen = look(stored)
        best, lowest = _better(seen, stored.detach(), labels, best, lowest)
        margin = _margin(seen.logits, labels).cpu().double()
        cost = torch.where(margin > 0, weight * seen.soft_score, 0.0)
        goal = (margin.clamp_max(SAFE_MARGIN) - cost).sum()
        (gradient,) = torch.autograd.grad(goal, stored)
        moved = moving + step * gradient.sign()
        moving = (images + (moved - images).clamp(-epsilon, epsilon)).clamp(0, 1)
    last = rounded(moving)
    with torch.no_grad():
        best, lowest = _better(look(last), last, labels, best, lowest)
    return torch.where(lowest.isfinite().to(images.device)[:, None, None, None], best, last)


def _better(
    seen: Look, images: Tensor, labels: Tensor, best: Tensor, lowest: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the better of two iterates of each image, with its score; infinity: none deceives."""
    wrong = (seen.logits.argmax(1) != labels).cpu()
    score = torch.where(wrong, seen.score, torch.inf)
    better = score < lowest
    mask = better.to(images.device)[:, None, None, None]
    return torch.where(mask, images, best), torch.where(better, score, lowest)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the best wrong class leads, above 0 where the image deceives."""
    true = labels[:, None]
    others = logits.scatter(1, true, -torch.inf).amax(1)
    return others - logits.gather(1, true)[:, 0]
