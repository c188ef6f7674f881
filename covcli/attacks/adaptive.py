"""An adaptive attack: it deceives the network and lowers the coverage score at the same time.

Carlini and Wagner, "Adversarial Examples Are Not Easily Detected", 2017; Tramèr et al., "On
Adaptive Attacks to Adversarial Example Defenses", NeurIPS 2020.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# A lead of the wrong class by this many logits is safe; beyond it, only the score is optimised.
SAFE_MARGIN = 5.0


@dataclass(frozen=True)
class Look:
    """The output of a monitored network on a batch of images.

    Attributes
    ----------
    logits
        Shape (B, classes).
    score
        The coverage score, float64 of shape (B,).
    soft_score
        Its differentiable approximation, float64 of shape (B,), in units of the threshold.
    """

    logits: Tensor
    score: Tensor
    soft_score: Tensor


# Takes images, floats in [0, 1] of shape (B, C, H, W).
Monitored: TypeAlias = Callable[[Tensor], Look]


@dataclass(frozen=True)
class Search:
    """The settings of an adaptive attack.

    Attributes
    ----------
    epsilon, step
        Largest change of a pixel, and change in one step, for pixels in [0, 1].
    steps
        The number of steps.
    weight
        The score's weight in the gradient; with 0, it only selects among the iterates.
    """

    epsilon: float
    step: float
    steps: int
    weight: float


def rounded(images: Tensor) -> Tensor:
    """Round images, floats in [0, 1], to multiples of 1/255, as 8-bit files store them."""
    return (images * 255).round() / 255


def adaptive_pgd(look: Monitored, images: Tensor, labels: Tensor, search: Search) -> Tensor:
    """Search within ±epsilon for images that deceive the network and have a low score.

    The attack starts at a random point and takes signed gradient steps. It ascends the margin
    m = max_i z_i − z_y, i ≠ y. Once the image deceives (m > 0), it ascends
    min(m, 5) − weight·(soft score/threshold). The margin is clipped because a larger one is not
    needed (Carlini and Wagner, 2017). The score of the predicted class counts only for images that
    deceive already, so that it does not prevent deception (Bryniarski et al., "Evading Adversarial
    Example Detection Defenses with Orthogonal Projected Gradient Descent", 2021). Cross-entropy
    minus the score is a weaker objective, because cross-entropy is not bounded.

    For each image, the result is the iterate that deceives with the lowest score, or else the last
    one. Iterates are evaluated after rounding to 8 bits, with the exact score.

    Parameters
    ----------
    look
        The network with its coverage score.
    images, labels
        Shape (B, C, H, W), in [0, 1], and their true classes, int64 of shape (B,).
    search
        The settings.

    Returns
    -------
    Tensor
        Shape (B, C, H, W), rounded to 8 bits.

    Examples
    --------
    A linear network whose score is the brightness:

    >>> def look(images):
    ...     flat = images.flatten(1)
    ...     brightness = flat.mean(1).double()
    ...     return Look(flat @ torch.eye(4)[:, :2], brightness.detach(), brightness)
    >>> images = torch.tensor([0.5, 0.4, 0.5, 0.5]).view(1, 1, 2, 2)
    >>> search = Search(epsilon=0.1, step=0.05, steps=10, weight=1.0)
    >>> attacked = adaptive_pgd(look, images, torch.tensor([0]), search)
    >>> look(attacked).logits.argmax(1).item(), bool(look(attacked).score < look(images).score)
    (1, True)
    """
    epsilon = search.epsilon
    moving = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    best = images
    lowest = torch.full((len(images),), torch.inf, dtype=torch.float64)
    for _ in range(search.steps):
        stored = rounded(moving).requires_grad_()
        seen = look(stored)
        best, lowest = _better(seen, stored.detach(), labels, best, lowest)
        (gradient,) = torch.autograd.grad(_goal(seen, labels, search.weight), stored)
        moved = moving + search.step * gradient.sign()
        moving = (images + (moved - images).clamp(-epsilon, epsilon)).clamp(0, 1)
    last = rounded(moving)
    with torch.no_grad():
        best, lowest = _better(look(last), last, labels, best, lowest)
    return torch.where(lowest.isfinite().to(images.device)[:, None, None, None], best, last)


def _goal(seen: Look, labels: Tensor, weight: float) -> Tensor:
    """Return the sum over the images of what the attack ascends."""
    margin = _margin(seen.logits, labels).cpu().double()
    cost = torch.where(margin > 0, weight * seen.soft_score, 0.0)
    return (margin.clamp_max(SAFE_MARGIN) - cost).sum()


def _better(
    seen: Look, images: Tensor, labels: Tensor, best: Tensor, lowest: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the better of two iterates of each image and its score, infinite if none deceives."""
    wrong = (seen.logits.argmax(1) != labels).cpu()
    score = torch.where(wrong, seen.score, torch.inf)
    better = score < lowest
    mask = better.to(images.device)[:, None, None, None]
    return torch.where(mask, images, best), torch.where(better, score, lowest)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the lead of the best wrong class in logits; positive if the image deceives."""
    true = labels[:, None]
    others = logits.scatter(1, true, -torch.inf).amax(1)
    return others - logits.gather(1, true)[:, 0]
