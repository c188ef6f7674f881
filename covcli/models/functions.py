"""Activations and attention that a network calls as functions, and which module calls them.

A hook sees what a module returns; `F.relu(x)` in a module's `forward` is no module. torch shows
every call of its functions to a `TorchFunctionMode`, which belongs to a thread.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Function: TypeAlias = Callable[..., Any]

# By the names of torch.nn.functional; in-place forms are the same activation.
NAMES: Mapping[str, Sequence[Function]] = {
    "relu": [F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_],
    "relu6": [F.relu6],
    "leaky_relu": [F.leaky_relu, F.leaky_relu_],
    "rrelu": [F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_],
    "prelu": [F.prelu, torch.prelu, Tensor.prelu],
    "elu": [F.elu, F.elu_],
    "celu": [F.celu, F.celu_, torch.celu, torch.celu_],
    "selu": [F.selu, F.selu_, torch.selu, torch.selu_],
    "gelu": [F.gelu],
    "silu": [F.silu],
    "mish": [F.mish],
    "hardswish": [F.hardswish],
    "hardtanh": [F.hardtanh, F.hardtanh_],
    "softplus": [F.softplus],
    "threshold": [F.threshold, torch.threshold, torch.threshold_],
    "tanh": [F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_],
}
ACTIVATION_FUNCTIONS: Mapping[Function, str] = {
    function: name for name, functions in NAMES.items() for function in functions
}
CLAMPS = {
    torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, torch.clamp_min, torch.clamp_min_,
    Tensor.clamp_min, Tensor.clamp_min_, torch.clip, Tensor.clip,
}  # fmt: skip
# Attention as one function, or as a softmax that weighs a matrix product.
ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
DROPOUT = {F.dropout, torch.dropout}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
# Functions after which the channels come last, and first after the batch.
CHANNELS_LAST = {F.linear, F.layer_norm}
CHANNELS_SECOND = {torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d,
                   F.batch_norm, F.group_norm}  # fmt: skip


def activation_of(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return the name of the activation that a call computes; None for other calls.

    A clamp at 0 from below alone is a ReLU.
    """
    if function in CLAMPS:
        low = args[1] if len(args) > 1 else kwargs.get("min")
        high = args[2] if len(args) > 2 else kwargs.get("max")
        return "relu" if isinstance(low, int | float) and low == 0 and high is None else None
    return ACTIVATION_FUNCTIONS.get(function)


class Calls(TorchFunctionMode):
    """Shows each call of a torch function that it is entered for.

    Parameters
    ----------
    see
        Called with the function, its arguments, and what it returned.
    """

    def __init__(
        self, see: Callable[[Function, Sequence[Any], Mapping[str, Any], Any], None]
    ) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and show it."""
        output = func(*args, **(kwargs or {}))
        self._see(func, args, kwargs or {}, output)
        return output
