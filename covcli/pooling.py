"""From a layer's output to neurons, and back to what a neuron stands for."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

Granularity: TypeAlias = Literal["channel", "unit", "contribution"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
STATISTICS = ("mean", "maximum")  # of a channel over its positions, in `pool`'s order


def pool(output: Tensor, channel_dim: int, granularity: Granularity) -> Tensor:
    """Turn a layer's output into neurons.

    Parameters
    ----------
    output
        Shape (B, C, ...) or (B, ..., C).
    channel_dim
        The dimension that counts the channels.
    granularity
        "channel": each channel's mean and maximum over its positions, or its value in a fully
        connected layer. "unit": every value. "contribution": each channel's mean alone (of
        activations times gradients, see `contributions`).

    Returns
    -------
    Tensor
        Shape (B, 2C), the means first; (B, C) for a fully connected layer and for contributions;
        (B, C·positions) for units. float32 (float64 of an output in float64), and means are
        summed in that precision, whatever a network under autocast computes in.
    """
    return torch.cat(statistics(output, channel_dim, granularity), 1)


def statistics(output: Tensor, channel_dim: int, granularity: Granularity) -> list[Tensor]:
    """Return what `pool` puts side by side; no views: a later in-place layer would change them."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    if output.ndim == 2 or granularity == "unit":
        whole = output.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return [whole.flatten(1)]
    rest = [d for d in range(1, output.ndim) if d != channel_dim % output.ndim]
    means = _means(output, rest)
    if granularity == "contribution":
        return [means]
    return [means, _largest(output, channel_dim, rest).to(dtype)]


def _means(output: Tensor, rest: list[int]) -> Tensor:
    """Return each channel's mean, summed in float32 at least."""
    last = output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last)
    if last and output.dtype == torch.float32 and rest == [2, 3] and not output.requires_grad:
        return nn.functional.avg_pool2d(output, output.shape[2:]).flatten(1)  # twice as fast there
    return output.mean(rest, dtype=torch.promote_types(output.dtype, torch.float32))


def _largest(output: Tensor, channel_dim: int, rest: list[int]) -> Tensor:
    """Return each channel's maximum; amax is the faster way forward, and the slower one back."""
    if output.requires_grad:
        return output.movedim(channel_dim, -1).flatten(1, -2).max(1).values
    return output.amax(rest)


def locate(
    neuron: int, shape: Sequence[int], channel_dim: int, granularity: Granularity
) -> tuple[int, str]:
    """Say what a neuron of `pool` stands for.

    Parameters
    ----------
    neuron
        Its number within the coverage point, from 0 on.
    shape
        The layer's output shape without the batch, as (C, H, W).
    channel_dim, granularity
        As in `pool`; the dimension is counted with the batch.

    Returns
    -------
    tuple
        The channel's number, and a label such as "channel 37, maximum", "channel 3 at (4, 7)" (row
        and column) or, in a fully connected layer, "unit 12".
    """
    if len(shape) == 1:
        return neuron, f"unit {neuron}"
    dim = channel_dim % (len(shape) + 1) - 1
    if granularity == "unit":
        place = [int(i) for i in np.unravel_index(neuron, tuple(shape))]
        channel = place.pop(dim)
        return channel, f"channel {channel} at ({', '.join(map(str, place))})"
    statistic, channel = divmod(neuron, shape[dim])
    return channel, f"channel {channel}, {STATISTICS[statistic]}"
