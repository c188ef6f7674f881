"""Ties: values that several calibration images share, but for rounding.

A camera sends the same test card again and again, or the same black frame. Such images have one
score, which is rounded differently in a batch of another size or on another device. If it is the
threshold, all of them would be false alarms.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# Values this close count as equal, as a share of the values' scale. Rounding moves a score by up to
# 3e-4, where many equal images steepen the scale of rarities; a doubt by 5e-6 of itself.
REACH = 5e-4
LEAST_REACH = 1e-4
# A value is shared if more images have it than this number and this share of them together. Within
# the reach, a continuous distribution has about a twentieth of that share.
LEAST_IMAGES = 3
LEAST_SHARE = 0.015


@dataclass(frozen=True)
class Ties:
    """Shared values, and how far from them rounding may take a value.

    Attributes
    ----------
    values
        The shared values, ascending, float64 of shape (T,).
    middles
        The middle between each and the next, float64 of shape (T − 1,).
    reach
        The largest distance of equal values.

    Examples
    --------
    >>> scores = torch.tensor([0.5, 2.0, 2.0, 2.0, 2.000001, 3.0], dtype=torch.float64)
    >>> Ties.among(scores).joined(torch.tensor([1.9999, 2.00001, 2.1])).tolist()
    [2.000001, 2.000001, 2.0999999046325684]
    """

    values: Tensor
    middles: Tensor
    reach: float

    @classmethod
    def among(cls, values: Tensor) -> Self:
        """Return the values that several images share.

        Parameters
        ----------
        values
            float64 of shape (n,), finite.
        """
        ordered = values.double().cpu().sort().values
        n = len(ordered)
        scale = max(float(ordered.abs().quantile(0.9)), float(ordered.std())) if n > 1 else 0.0
        reach = REACH * scale + LEAST_REACH
        ends = torch.searchsorted(ordered, ordered + reach, side="right")
        shared: list[float] = []
        begin = 0
        many = ends - torch.arange(n) > LEAST_IMAGES + LEAST_SHARE * n
        for first in many.nonzero()[:, 0].tolist():
            if first >= begin:
                begin = int(ends[first])
                shared.append(float(ordered[begin - 1]))
        kept = torch.tensor(shared, dtype=torch.float64)
        return cls(kept, (kept[1:] + kept[:-1]) / 2, reach)

    def joined(self, values: Tensor) -> Tensor:
        """Return values (B,), float64, those that are equal to a shared one but for rounding as it.

        A shared value is the largest of those that it stands for: further below it they may lie.
        """
        values = values.double()
        if len(self.values) == 0:
            return values
        near = self.values[torch.searchsorted(self.middles, values)]
        apart = values - near
        return near.where((apart >= -2 * self.reach) & (apart <= self.reach), values)
