"""ConfidenceLoss: a penalty, with a gradient, on activations outside their class's pattern.

Rossolini, Biondi and Buttazzo (arXiv 2101.12100) score activations by comparisons and counts,
which have no gradient; the distance from a range has one. The range is narrower than the one that
scores: from the extremes of trusted images hardly a training image would ever learn anything.
"""

import torch
from torch import Tensor, nn

from covcli.methods import MultiRange, State

# The running signature: fine enough to tell where the outermost tenths of a class begin.
RUNNING = MultiRange(sections=32)
# Share of a class's trusted images that its pattern may leave out at each end.
TAIL = 0.1
# A range narrower than this share of its point's mean width counts as that wide, or a neuron that
# hardly ever fires on trusted images would outweigh all others.
LEAST_WIDTH = 0.05
# A distance of more widths counts as so many: a network whose activations were thrown far away by a
# step is not thrown further by the next.
MOST = 1.0
# A range of fewer images says nothing yet: its class is not penalised.
LEAST_IMAGES = 10


def central_range(state: State) -> tuple[Tensor, Tensor]:
    """Return the ends of each class's central range, both of shape (classes, N).

    The narrowest run of whole sections that leaves out at most a tenth of the class's trusted
    images at each end.
    """
    sections = state["sections"].shape[2]
    below = state["sections"].cumsum(2)
    n = state["count"][:, None, None]
    first = (below <= TAIL * n).sum(2)
    last = (below < (1 - TAIL) * n).sum(2)
    width = (state["high"] - state["low"]) / sections
    return state["low"] + width * first, state["low"] + width * (last + 1)


class ConfidenceLoss(nn.Module):
    """Mean distance of neurons from the central range of their class, in its widths, at most 1.

    The mean is over images, over a coverage point's neurons and over the points, which thus count
    alike, as they do in the score. Only the first half of the points is penalised: in a VGG11,
    penalising the later ones too made detection worse.

    Parameters
    ----------
    state
        A complete state of `mrc`; a class with fewer than 10 images is not penalised.
    sizes
        Neurons of each coverage point.

    Examples
    --------
    >>> import torch
    >>> from covcli import ConfidenceLoss
    >>> from covcli.methods import Layout, MultiRange
    >>> from covcli.signature.fit import fold
    >>> neurons, labels = torch.rand(200, 6), torch.arange(200) % 2
    >>> layout = Layout(classes=2, sizes=(4, 2), values=(2, 2))  # two coverage points
    >>> state = fold(MultiRange(), layout, lambda: [(neurons, labels)])
    >>> loss = ConfidenceLoss(state, [4, 2])
    >>> inside = torch.full((1, 6), 0.5)
    >>> float(loss(inside, labels[:1])), float(loss(inside + 9, labels[:1]))
    (0.0, 1.0)
    """

    low: Tensor
    high: Tensor
    inverse: Tensor
    share: Tensor

    def __init__(self, state: State, sizes: list[int]) -> None:
        super().__init__()
        early = sizes[: max(1, len(sizes) // 2)]
        known = (state["count"] >= LEAST_IMAGES)[:, None]
        low, high = (torch.where(known, end[:, : sum(early)], 0.0) for end in central_range(state))
        inverse = []
        for width in (high - low).split(early, 1):
            typical = width[known[:, 0]].mean() if bool((width > 0).any()) else 1.0
            inverse.append(1 / width.clamp_min(LEAST_WIDTH * typical))
        share = torch.cat([low.new_full((n,), 1 / n / len(early)) for n in early])
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("inverse", torch.cat(inverse, 1) * known)
        self.register_buffer("share", share)

    def forward(self, neurons: Tensor, labels: Tensor) -> Tensor:
        """Return the penalty of neurons (B, N) of images of those classes (B,), a scalar."""
        early = neurons[:, : self.low.shape[1]]
        nearest = early.clamp(self.low[labels], self.high[labels])
        distance = (early - nearest).abs() * self.inverse[labels]
        return (distance.clamp_max(MOST) @ self.share).mean()
