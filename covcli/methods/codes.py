"""Codes: rows of numbers stored as a byte each, in units that each column has of its own.

A column's value is (base + code^power)·2^exponent with a code from 0 to 255. This is exact in
float32, so that a code decodes to the same bits on every machine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from covcli.methods.state import Expected

LAST = 255  # the largest code
PIECE = 1 << 20  # the number of values that are encoded or decoded at once
LARGEST_BASE = 32767
LEAST_EXPONENT, LAST_EXPONENT = -128, 127
UNITS = [math.ldexp(1.0, e) for e in range(LEAST_EXPONENT, LAST_EXPONENT + 1)]
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Coding:
    """The units of some columns.

    Attributes
    ----------
    base
        The multiple of the unit that the code 0 stands for, int16 of shape (V,).
    exponent
        The unit's logarithm to base 2, int8 of shape (V,).
    power
        1: codes are evenly spaced. 2: they are denser near the base, where the ends of most ranges
        of a rectified activation are.

    Examples
    --------
    >>> rows = torch.tensor([[0.0, -3.0], [1.0, 5.0]])
    >>> coding = Coding.over(rows.amin(0), rows.amax(0))
    >>> coding.decode(coding.encode(rows, torch.round)).tolist()
    [[0.0, -3.0], [1.0, 5.0]]
    """

    base: Tensor
    exponent: Tensor
    power: int = 1

    @classmethod
    def over(cls, lowest: Tensor, highest: Tensor, power: int = 1) -> "Coding":
        """Return the finest units in which each column can be encoded.

        Parameters
        ----------
        lowest, highest
            The ends of each column's values, finite float32 of shape (V,).
        power
            See `Coding`.
        """
        low, high = lowest.double().cpu(), highest.double().cpu()
        # One step less than there are: the base is rounded down.
        least = torch.maximum((high - low) / (LAST**power - 1), low.abs() / LARGEST_BASE)
        mantissa, exponent = torch.frexp(least)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        exponent = torch.where(least > 0, exponent, LEAST_EXPONENT).clamp_min(LEAST_EXPONENT)
        unit = _units(exponent)
        return cls((low / unit).floor().to(torch.int16), exponent.to(torch.int8), power)

    def encode(self, rows: Tensor, rounding: Round) -> Tensor:
        """Return the codes of values, uint8 of the same shape.

        Parameters
        ----------
        rows
            Values between the ends of their columns, float32 of shape (K, V).
        rounding
            torch.round; or torch.floor and torch.ceil, which decode to no more and to no less than
            the value.
        """
        return torch.cat([self._encoded(part, rounding) for part in _pieces(rows)])

    def _encoded(self, rows: Tensor, rounding: Round) -> Tensor:
        given = rows.double().cpu()
        steps = (given / _units(self.exponent)).sub_(self.base.double()).clamp_min_(0)
        codes = rounding(steps if self.power == 1 else steps.sqrt_()).clamp_(0, LAST)
        # The subtraction above may have rounded a value that lies very near to a code.
        if rounding is torch.floor:
            codes -= (self._exactly(codes) > given).double()
        elif rounding is torch.ceil:
            codes += (self._exactly(codes) < given).double()
        return codes.clamp_(0, LAST).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes, finite float32 of the same shape."""
        most = torch.finfo(torch.float32).max
        parts = (self._exactly(part.cpu().double()) for part in _pieces(codes))
        return torch.cat([part.clamp_(-most, most).float() for part in parts])

    def _exactly(self, codes: Tensor) -> Tensor:
        grown = codes.square() if self.power == 2 else codes
        return grown.add(self.base.double()).mul_(_units(self.exponent))


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """Return rows (K, V) in pieces, whose float64 copies take little memory."""
    return rows.split(max(1, PIECE // max(1, rows[0].numel()))) if len(rows) else (rows,)


def _units(exponent: Tensor) -> Tensor:
    """Return 2^exponent, exactly, in float64."""
    return torch.tensor(UNITS, dtype=torch.float64)[exponent.long() - LEAST_EXPONENT]


def coding_of(tensors: dict[str, Tensor], name: str, power: int = 1) -> Coding:
    """Return the coding that `coding_tensors` named so."""
    return Coding(tensors[f"{name}_base"].cpu(), tensors[f"{name}_exponent"].cpu(), power)


def coding_tensors(coding: Coding, name: str) -> dict[str, Tensor]:
    """Return a coding's tensors by name."""
    return {f"{name}_base": coding.base, f"{name}_exponent": coding.exponent}


def coding_expected(name: str, width: int) -> Expected:
    """Return the type and shape of a coding's tensors."""
    return {f"{name}_base": (torch.int16, (width,)), f"{name}_exponent": (torch.int8, (width,))}
