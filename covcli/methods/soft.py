"""Differentiable approximations of comparisons and counts."""

import torch
from torch import Tensor


def hinge(values: Tensor, low: Tensor, high: Tensor, width: Tensor) -> Tensor:
    """Return the distance outside the range [low, high] in units of `width`, 0 inside.

    The tensors are broadcast; `width` is positive.

    Examples
    --------
    >>> low, high, width = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(2.0)
    >>> hinge(torch.tensor([0.5, 3.0]), low, high, width).tolist()
    [0.0, 1.0]
    """
    return (torch.relu(low - values) + torch.relu(values - high)) / width


def interpolated(table: Tensor, classes: Tensor, place: Tensor) -> Tensor:
    """Interpolate a table of costs linearly at fractional positions.

    Parameters
    ----------
    table
        Cost of each class, neuron and entry, shape (classes, N, Q).
    classes
        The class that each image is compared with, int64 of shape (B,).
    place
        The positions, shape (B, N); 0 is the first entry. Outside the table, the cost is constant.

    Returns
    -------
    Tensor
        Shape (B, N), with a gradient in `place`.
    """
    entries = table.shape[2]
    place = place.clamp(0, entries - 1)
    left = place.detach().floor().clamp_max(max(entries - 2, 0)).long()
    share = place - left
    columns = torch.arange(table.shape[1], device=table.device)
    below = table[classes[:, None], columns, left]
    above = table[classes[:, None], columns, (left + 1).clamp_max(entries - 1)]
    return below * (1 - share) + above * share
