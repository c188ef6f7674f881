"""State: named tensors accumulated over batches, each with the reduction that merges two parts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from covcli.methods.layout import Layout

Reduction: TypeAlias = Literal["sum", "min", "max", "same"]
# The type and the shape of each tensor of a state.
Expected: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

Granularity: TypeAlias = Literal["channel", "unit", "contribution"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


@dataclass
class State:
    """Named tensors for a layout, each with the reduction that merges two parts.

    "same" marks a tensor that an earlier pass determined; it must be equal in all parts. The other
    reductions are exact and commutative for integers and extremes, so that a state does not depend
    on the size, the order or the grouping of batches. Sums of floating-point numbers would depend
    on it, in the last bits; no method here uses them.

    Attributes
    ----------
    layout
        The assignment of neurons to coverage points.
    tensors
        The tensors, by name.
    reductions
        The reduction of each tensor: "sum", "min", "max" or "same".

    Examples
    --------
    >>> layout = Layout(classes=1, sizes=(2,), values=(2,))
    >>> part, other = State(layout), State(layout)
    >>> part.declare("count", torch.tensor([3]), "sum")
    >>> other.declare("count", torch.tensor([4]), "sum")
    >>> part.merge(other)
    >>> part["count"].item()
    7
    """

    layout: Layout
    tensors: dict[str, Tensor] = field(default_factory=dict)
    reductions: dict[str, Reduction] = field(default_factory=dict)

    @classmethod
    def of_sums(cls, layout: Layout, expected: Expected, **same: Tensor) -> "State":
        """Return a state of zeros with those types and shapes, and the reduction "sum".

        Further tensors are those that an earlier pass determined, with the reduction "same"; the
        zeros are on their device.
        """
        device = next((tensor.device for tensor in same.values()), None)
        sums = {n: torch.zeros(shape, dtype=kind, device=device)
                for n, (kind, shape) in expected.items()}  # fmt: skip
        reductions: dict[str, Reduction] = dict.fromkeys(sums, "sum")
        return cls(layout, {**sums, **same}, {**reductions, **dict.fromkeys(same, "same")})

    def declare(self, name: str, initial: Tensor, reduction: Reduction) -> None:
        """Add a tensor; `initial` is filled with the neutral element of its reduction."""
        self.tensors[name] = initial
        self.reductions[name] = reduction

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def merge(self, other: "State") -> None:
        """Merge another part into this one, in place.

        Raises
        ------
        ValueError
            If the parts have different layouts or tensors, or a "same" tensor differs.
        """
        if self.layout != other.layout:
            raise ValueError("the parts are states of different layouts")
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
        """Add the tensors of another state to this one."""
        self.tensors |= other.tensors
        self.reductions |= other.reductions

    def to(self, device: torch.device) -> "State":
        """Return a copy of the state on a device."""
        return self.holding({k: v.to(device) for k, v in self.tensors.items()})

    def only(self, names: Iterable[str]) -> "State":
        """Return a state of some of the tensors."""
        tensors = {name: self.tensors[name] for name in names}
        return State(self.layout, tensors, {name: self.reductions[name] for name in tensors})

    def holding(self, tensors: Mapping[str, Tensor]) -> "State":
        """Return a state of the same layout and reductions that holds other tensors."""
        return State(self.layout, dict(tensors), dict(self.reductions))


def check_tensors(state: State, expected: Expected) -> None:
    """Raise a ValueError unless a state has the tensors expected, without NaN."""
    tensors = {name: (t.dtype, tuple(t.shape)) for name, t in state.tensors.items()}
    if tensors != dict(expected):
        raise ValueError("tensors of other shapes than the points and classes require")
    known = set(state.reductions.values()) <= set(REDUCTIONS)
    if state.reductions.keys() != state.tensors.keys() or not known:
        raise ValueError("other reductions than a state can have")
    if any(bool(t.isnan().any()) for t in state.tensors.values() if t.is_floating_point()):
        raise ValueError("a state that holds NaN")
