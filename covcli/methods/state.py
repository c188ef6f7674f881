"""State: named tensors folded over batches, each with the reduction that merges two parts of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Reduction: TypeAlias = Literal["sum", "min", "max", "same"]
# The type and the shape of each tensor of a state.
Expected: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

Granularity: TypeAlias = Literal["channel", "unit", "contribution"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


@dataclass
class State:
    """Named tensors, each with the reduction that merges two parts of it.

    "same" marks what was settled by an earlier pass: parts must agree on it. The other
    reductions are exact and commutative for integers and extremes, so that a state does not depend
    on the size, the order or the grouping of batches. Sums of floating-point numbers would, in
    their last bits: no method here has any.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    reductions: dict[str, Reduction] = field(default_factory=dict)

    @classmethod
    def of_sums(cls, expected: Expected) -> "State":
        """Return tensors of 0 of those types and shapes, to be summed."""
        state = cls()
        for name, (dtype, shape) in expected.items():
            state.declare(name, torch.zeros(shape, dtype=dtype), "sum")
        return state

    def declare(self, name: str, initial: Tensor, reduction: Reduction) -> None:
        """Add a tensor, filled with the neutral element of its reduction."""
        self.tensors[name] = initial
        self.reductions[name] = reduction

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def merge(self, other: "State") -> None:
        """Fold another part into this one.

        Raises
        ------
        ValueError
            If the parts have other tensors, or differ in what must be the same.
        """
        if self.reductions != other.reductions:
            raise ValueError("the parts are states of different methods or passes")
        for name, reduction in self.reductions.items():
            mine, theirs = self.tensors[name], other.tensors[name]
            if mine.shape != theirs.shape:
                raise ValueError(f"the parts differ in the shape of {name!r}")
            if reduction == "same":
                if not torch.equal(mine, theirs):
                    raise ValueError(f"the parts differ in {name!r}")
            elif reduction == "sum":
                mine += theirs
            elif reduction == "min":
                torch.minimum(mine, theirs, out=mine)
            else:
                torch.maximum(mine, theirs, out=mine)

    def include(self, other: "State") -> None:
        """Take up the tensors of another state beside the own ones."""
        self.tensors |= other.tensors
        self.reductions |= other.reductions

    def to(self, device: torch.device) -> "State":
        """Return the state on a device."""
        return State({k: v.to(device) for k, v in self.tensors.items()}, dict(self.reductions))
