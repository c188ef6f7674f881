"""Pooling of a layer's output to neurons, and the meaning of each neuron."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from covcli.methods.state import Granularity

STATISTICS = ("mean", "maximum")  # of a channel over its positions, in the order of `pool`


def pool(output: Tensor, channel_dim: int, granularity: Granularity) -> Tensor:
    """Reduce a layer's output to neurons.

    Parameters
    ----------
    output
        Shape (B, C, ...) or (B, ..., C).
    channel_dim
        The dimension of the channels.
    granularity
        "channel": each channel's mean and maximum over its positions, or its value in a fully
        connected layer. "unit": every value, with the channels of a position side by side, as in
        the networks' memory layout. "contribution": each channel's sum over its positions (of
        activations and of derivatives, see `Recorder`).

    Returns
    -------
    Tensor
        Shape (B, 2C), the means first; (B, C) for a fully connected layer and for contributions;
        (B, positions·C) for units. float32, or float64 for an output in float64. Means are summed
        in that precision, even under autocast.

    Examples
    --------
    >>> output = torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]])  # one image, two channels
    >>> pool(output, 1, "channel").tolist()
    [[2.0, 2.0, 3.0, 4.0]]
    """
    return joined(statistics(output, channel_dim, granularity))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts of `statistics`, of one point or of several, as neurons (B, N).

    Neighbours of one rank are joined before they are flattened: so ONNX Runtime joins them in its
    own layout for convolutions.
    """
    runs: list[list[Tensor]] = []
    for part in parts:  # torch.compile refuses itertools.groupby
        if not runs or runs[-1][0].ndim != part.ndim:
            runs.append([])
        runs[-1].append(part)
    wholes = [run[0] if len(run) == 1 else torch.cat(run, 1) for run in runs]
    flat = [whole.flatten(1) for whole in wholes]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def statistics(output: Tensor, channel_dim: int, granularity: Granularity) -> list[Tensor]:
    """Return the parts that `joined` concatenates: copies, since in-place layers change views.

    The positions of channels that come second stay, as dimensions of 1.
    """
    if output.ndim == 2 or granularity == "unit":
        dtype = torch.promote_types(output.dtype, torch.float32)
        last = output.movedim(channel_dim, -1)
        whole = last.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return [whole.flatten(1)]
    positions = _positions(output.ndim, channel_dim)
    if granularity == "contribution":
        return [output.sum(positions, dtype=torch.promote_types(output.dtype, torch.float32))]
    means = _means(output, positions)
    return [means, _largest(output, channel_dim, positions).to(means.dtype)]


@cache
def _positions(dimensions: int, channel_dim: int) -> tuple[int, ...]:
    """Return all dimensions but the batch and the channels."""
    return tuple(d for d in range(1, dimensions) if d != channel_dim % dimensions)


def _means(output: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Return each channel's mean, summed in at least float32."""
    if (
        output.dtype is torch.float32
        and positions == (2, 3)
        and not output.requires_grad
        and output.is_contiguous(memory_format=torch.channels_last)
    ):  # faster in this case
        return nn.functional.avg_pool2d(output, output.shape[2:])
    kind = torch.promote_types(output.dtype, torch.float32)
    return output.mean(positions, keepdim=_second(positions), dtype=kind)


def _second(positions: tuple[int, ...]) -> bool:
    """Return whether the positions are the last dimensions, after the channels."""
    return positions[0] > 1


def _largest(output: Tensor, channel_dim: int, positions: tuple[int, ...]) -> Tensor:
    """Return each channel's maximum. amax is faster in the forward pass, but slower backward."""
    if output.requires_grad:
        largest = output.movedim(channel_dim, -1).flatten(1, -2).max(1).values
        return (
            largest.unflatten(1, (-1, *(1 for _ in positions))) if _second(positions) else largest
        )
    return output.amax(positions, keepdim=_second(positions))


def locate(
    neuron: int, shape: Sequence[int], channel_dim: int, granularity: Granularity
) -> tuple[int, str]:
    """Return the channel of a neuron of `pool`, and a label for it.

    Parameters
    ----------
    neuron
        Its number within the coverage point, counted from 0.
    shape
        The layer's output shape without the batch, such as (C, H, W).
    channel_dim, granularity
        As for `pool`; the dimension is counted with the batch.

    Returns
    -------
    tuple
        The channel's number, and a label such as "channel 37, maximum", "channel 3 at (4, 7)" (row
        and column), "channel 37" (of a contribution) or, in a fully connected layer, "unit 12".

    Examples
    --------
    >>> locate(3, (2, 8, 8), 1, "channel")
    (1, 'channel 1, maximum')
    """
    if len(shape) == 1:
        return neuron, f"unit {neuron}"
    dim = channel_dim % (len(shape) + 1) - 1
    if granularity == "unit":
        positions = [size for d, size in enumerate(shape) if d != dim]
        *place, channel = map(int, np.unravel_index(neuron, (*positions, shape[dim])))
        return channel, f"channel {channel} at ({', '.join(map(str, place))})"
    return name_channel(neuron, shape[dim], granularity)


def name_channel(neuron: int, channels: int, granularity: Granularity) -> tuple[int, str]:
    """Return the channel of a neuron in a layer with positions, and a label; not for units.

    Examples
    --------
    >>> name_channel(37, 64, "channel"), name_channel(37, 64, "contribution")
    ((37, 'channel 37, mean'), (37, 'channel 37'))
    """
    if granularity == "contribution":
        return neuron, f"channel {neuron}"
    statistic, channel = divmod(neuron, channels)
    return channel, f"channel {channel}, {STATISTICS[statistic]}"
