"""The frame of every method: named tensors folded over batches, and a cost for each neuron."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from covcli.errors import CovcliError
from covcli.registry import Registry
from covcli.specs import parse, positive_count

Reduction: TypeAlias = Literal["sum", "min", "max", "same"]


@dataclass
class State:
    """Named tensors, each with the reduction that merges two parts of it.

    "same" marks what was settled by an earlier pass: parts must agree on it. The other
    reductions are exact and commutative for the integers and extremes that they are used on,
    so a state does not depend on the size, the order or the grouping of batches.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    reductions: dict[str, Reduction] = field(default_factory=dict)

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

    def to(self, device: torch.device) -> "State":
        """Return the state on a device."""
        return State({k: v.to(device) for k, v in self.tensors.items()}, dict(self.reductions))


@dataclass(frozen=True)
class Method(ABC):
    """One way to summarise trusted activations and to score a new input against them.

    A subclass is a frozen dataclass; its fields are the method's parameters, written in a
    specification as `name?field=value`. It states its equations for a batch of neurons; folding,
    merging, saving, averaging over coverage points and calibration are written once, elsewhere.
    Larger costs mean less trusted, always.
    """

    name: ClassVar[str]

    @abstractmethod
    def begin(self, classes: int, neurons: int) -> State:
        """Return the empty state of the first pass over the trusted data."""

    @abstractmethod
    def observe(self, state: State, neurons: Tensor, labels: Tensor) -> None:
        """Fold one batch into the state.

        Parameters
        ----------
        state
            What `begin` or `proceed` returned; changed in place.
        neurons
            float32 of shape (B, N), finite.
        labels
            int64 of shape (B,).
        """

    def proceed(self, state: State) -> State | None:
        """Return the empty state of the next pass after a complete one; None if it was the last."""
        return None

    @abstractmethod
    def costs(self, state: State, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return each neuron's cost, measured against the class of its image.

        Parameters
        ----------
        state
            The complete state.
        neurons
            Shape (B, N).
        classes
            The class that each image is measured against, int64 of shape (B,).

        Returns
        -------
        Tensor
            float32 of shape (B, N), at least 0.
        """

    def soft_costs(self, state: State, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return a stand-in of `costs` with a gradient in the neurons, for attacks that descend it.

        By default the costs themselves. A method whose costs are comparisons or counts overrides
        this. Parameters and shape are those of `costs`.
        """
        return self.costs(state, neurons, classes)

    @abstractmethod
    def inside(self, state: State, neurons: Tensor, classes: Tensor) -> Tensor:
        """Return which neurons lie inside the class's trusted pattern, bool of shape (B, N)."""

    @abstractmethod
    def expected(
        self, classes: int, neurons: int
    ) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return each complete tensor's type and shape, to check files against."""

    def spec(self) -> str:
        """Return the specification that makes this method again."""
        parameters = "&".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}?{parameters}" if parameters else self.name


METHODS: Registry[type[Method]] = Registry("method")


def make_method(text: str) -> Method:
    """Make a method from `name` or `name?field=value&…`.

    Raises
    ------
    CovcliError
        If the name, a field or a value is unknown.
    """
    spec = parse(text)
    kind = METHODS.get(spec.name)
    spec.only([f.name for f in fields(kind)])
    values: dict[str, Any] = {}
    for entry in fields(kind):
        convert = positive_count if isinstance(entry.default, int) else str
        values[entry.name] = spec.take(entry.name, convert, entry.default)
    try:
        return kind(**values)
    except ValueError as error:
        raise CovcliError(str(error), where=text) from None
