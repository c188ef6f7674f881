"""A device without hardware whose tensors have values: they are kept on the CPU.

As on a GPU, an operation on tensors of two devices raises an error, except that a number (a tensor
without dimensions) may come from the CPU, and CPU tensors may index. A generator may not. The
operations compute what they compute on the CPU, so results can be compared.

To import this module registers the device in torch for the rest of the process. `with on_device():`
lets operations on its tensors run. Tensors of inference mode cannot be simulated: it turns into
`no_grad`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "simulated"
CPU = torch.device("cpu")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
            aten._index_put_impl_.default}  # fmt: skip


class _Module(backend_registration._DummyBackendModule):
    """What torch asks `torch.simulated`."""

    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda _seed: None)
    get_rng_state = staticmethod(lambda _device: torch.empty(0))
    set_rng_state = staticmethod(lambda _state, _device: None)


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)


class There(Tensor):
    """A tensor on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})

    # What torch computes for its own class only.

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return There(torch.tensor(data, dtype=dtype or self.dtype))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, _memo: object) -> Tensor:
        copied = There(self.held.detach().clone())
        return nn.Parameter(copied) if isinstance(self, nn.Parameter) else copied


There.__module__ = "torch"  # libraries ask for it


def _held(tree: Any) -> Any:
    return tree_map_only(There, lambda tensor: tensor.held, tree)


def _there(tree: Any) -> Any:
    def wrap(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, There) else There(tensor)

    return tree_map_only(Tensor, wrap, tree)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if function is aten.copy_.default:
        function(_held(args[0]), _held(args[1]))
        return args[0]
    given = kwargs.get("device")
    target = None if given is None else torch.device(given)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    moves = function is aten._to_copy.default
    if not moves:
        _check_places(function, args, tensors)
    there = any(isinstance(tensor, There) for tensor in tensors)
    arrives = there if target is None else target.type == NAME
    generator = kwargs.get("generator")
    if arrives and generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"expected a generator of the device for {function}")
    if target is not None:
        kwargs = {**kwargs, "device": CPU}
    result = function(*_held(args), **_held({k: v for k, v in kwargs.items() if k != "pin_memory"}))
    if not arrives:
        return result
    result = _there(result)
    if there and not moves:  # an operation in place, or a view
        return return_and_correct_aliasing(function, args, kwargs, result)
    return result


def _check_places(function: Any, args: Any, tensors: list[Tensor]) -> None:
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    if not there or len(there) == len(tensors):
        return
    if function in INDEXING and isinstance(args[0], There):
        tensors = [args[0], *(leaf for leaf in args[2:] if isinstance(leaf, Tensor))]
    if any(tensor.ndim and not isinstance(tensor, There) for tensor in tensors):
        raise RuntimeError(f"expected all tensors on the same device for {function}")


class _Mode(TorchDispatchMode):
    """Sees the functions that create tensors, and those that copy them to the device."""

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


@contextmanager
def on_device() -> Iterator[torch.device]:
    """Let a block use the device."""
    gradients = (torch.enable_grad, torch.no_grad)
    with patch.object(torch, "inference_mode", lambda on=True: gradients[on]()), _Mode():
        yield DEVICE


def _strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return There(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    layout = memory_format or torch.contiguous_format
    return There(torch.empty(size, dtype=dtype, memory_format=layout))


def _copy(source: Tensor, result: Tensor, _non_blocking: bool = False) -> Tensor:
    _held(result).copy_(_held(source))
    return result


# torch's own code reaches these without the mode.
_kernels = torch.library.Library("aten", "IMPL")
for _name, _kernel in (("empty_strided", _strided), ("empty.memory_format", _empty),
                       ("_copy_from", _copy)):  # fmt: skip
    _kernels.impl(_name, _kernel, "PrivateUse1")
