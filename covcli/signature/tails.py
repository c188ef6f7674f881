"""The rarity of a value among trusted images: a common scale for different scores."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# The shares of trusted images at or above the knots.
SHARES = (1.0, 7 / 8, 1 / 2, 1 / 4, 1 / 8)
# The smallest distance between knots and the smallest mean excess over the last knot, in standard
# deviations. They keep slopes finite for few images and for equal values.
LEAST_WIDTH = 1e-3
LEAST_EXCESS = 0.2
# Values that are this close differ by rounding, as the energies of a network that returns the
# logarithms of probabilities, all of which are 0.
ROUNDED = 1e-4


@dataclass(frozen=True)
class Tails:
    """−log of the share of trusted images with a value at least as large, by column.

    Up to the last knot it is interpolated linearly between quantiles. Beyond, the tail is
    exponential with the mean excess of the images there. It increases everywhere and has a
    gradient.

    Attributes
    ----------
    knots
        The quantiles at which the slope changes, ascending, float64 of shape (V, 5). Below the
        first one the first slope continues.
    slopes
        The slope from each knot to the next, at least 0, float64 of shape (V, 5).
    """

    knots: Tensor
    slopes: Tensor

    @classmethod
    def fit(cls, values: Tensor) -> "Tails":
        """Fit the tails to trusted images' values, float64 of shape (n, V), n at least 2.

        Examples
        --------
        >>> steps = torch.arange(800, dtype=torch.float64)[:, None] / 100
        >>> tails = Tails.fit(steps)
        >>> tails.rarity(torch.tensor([[0.0], [4.0], [7.0]]).double()).exp().squeeze(1).round()
        tensor([1., 2., 8.], dtype=torch.float64)
        """
        ordered = values.sort(0).values
        n = len(ordered)
        places = [min(n - 1, math.floor((1 - share) * n)) for share in SHARES]
        knots = ordered[places].T
        deviation = values.std(0)
        widths = torch.maximum(
            knots.diff(dim=1), (LEAST_WIDTH * deviation[:, None]).clamp_min(ROUNDED)
        )
        steps = -torch.tensor(SHARES, dtype=values.dtype).log().diff()
        excess = (ordered[places[-1] :] - knots[:, -1]).mean(0)
        last = 1 / torch.maximum(excess, (LEAST_EXCESS * deviation).clamp_min(ROUNDED))
        return cls(knots, torch.cat([steps / widths, last[:, None]], 1))

    def rarity(self, values: Tensor) -> Tensor:
        """Return the rarity of values (B, V), same shape; 0 for the lowest trusted value."""
        gains, least = self._folded
        return (torch.maximum(values[:, :, None] - self.knots, least) * gains).sum(2)

    @cached_property
    def _folded(self) -> tuple[Tensor, Tensor]:
        """The change of slope at each knot, and the lower bounds of the distances to the knots."""
        gains = torch.cat([self.slopes[:, :1], self.slopes.diff(dim=1)], 1)
        least = torch.zeros_like(self.knots[0])
        least[0] = -math.inf
        return gains, least
