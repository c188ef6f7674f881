"""A CUDA device without one: its tensors have a device, a shape and a type, but no values.

What reads a value raises an error (`.item()`, `.tolist()`, `if tensor`, `nonzero`, NumPy). Copies
between devices are legal, so they are counted: each one from the device waits for it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
T = TypeVar("T")


class Copies(TorchDispatchMode):
    """Counts the copies to the device and back from it."""

    there = back = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        copies = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}
        if function.overloadpacket in copies:
            source = args[copies[function.overloadpacket]]
            self.there += result.is_cuda and not source.is_cuda
            self.back += source.is_cuda and not result.is_cuda
        return result


@dataclass(frozen=True)
class FakeCuda:
    """A fake device, in use."""

    mode: FakeTensorMode
    copies: Copies

    def moved(self, value: T) -> T:
        """Return a copy of anything, with its tensors on the device."""

        def move(tensor: Tensor, _memo: object) -> Tensor:
            shape, dtype = (tensor.shape, tensor.stride()), tensor.dtype
            return torch.empty_strided(*shape, dtype=dtype, device=CUDA)

        with (
            patch.object(Tensor, "__deepcopy__", move),
            patch.object(nn.Parameter, "__deepcopy__", move),
        ):
            return copy.deepcopy(value)


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Let a block use the device; skip the test where torch wants a driver even for it."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Copies() as copies:
        try:
            torch.empty(1, device=CUDA)[:1]
        except RuntimeError as error:  # an older torch, built for CUDA, where there is none
            pytest.skip(str(error).splitlines()[0])
        yield FakeCuda(mode, copies)


def on_cuda(tree: Any) -> bool:
    """Return whether all tensors of a result are on the device."""
    return all(leaf.is_cuda for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
