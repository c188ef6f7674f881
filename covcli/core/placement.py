"""Tensors on a device and back: whole records are moved there, results return in one copy."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


def placed(record: Record, device: torch.device) -> Record:
    """Return a frozen dataclass with its tensors, and those of dataclasses in it, on a device.

    Parameters
    ----------
    record
        The dataclass.
    device
        The device.

    Returns
    -------
    Record
        The same object if all of its tensors are there already.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Range:
    ...     low: Tensor
    >>> placed(Range(torch.zeros(2)), torch.device("meta")).low.device.type
    'meta'
    """
    moved = {}
    for field in fields(record):  # type: ignore[arg-type]
        value: Any = getattr(record, field.name)
        if isinstance(value, Tensor):
            other: Any = value.to(device)
        else:
            other = placed(value, device) if is_dataclass(value) else value
        if other is not value:
            moved[field.name] = other
    return replace(record, **moved) if moved else record  # type: ignore[type-var]


def fetched(columns: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of results on the CPU. They leave a device together, waited for once.

    The copies can be changed also where the results are of inference mode.

    Parameters
    ----------
    columns
        Tensors of shape (B,) or (B, n), of any type whose values float64 holds exactly (integers
        below 2^53).

    Returns
    -------
    list of Tensor
        The same values, in the same types and shapes.

    Examples
    --------
    >>> fetched([torch.tensor([True, False]), torch.tensor([[3], [4]])])
    [tensor([ True, False]), tensor([[3],
            [4]])]
    """
    if all(column.is_cpu for column in columns):
        return [column.clone() for column in columns]
    flat = [column.double().view(len(column), -1) for column in columns]
    packed = torch.cat(flat, 1).cpu()
    parts = packed.split([part.shape[1] for part in flat], 1)
    return [
        part.to(column.dtype).view(column.shape)
        for part, column in zip(parts, columns, strict=True)
    ]
