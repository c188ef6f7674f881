"""Observation of activations and attention that a network calls as functions, not as modules.

A forward hook receives only the output of a module; `F.relu(x)` in a `forward` is not a module.
torch passes every call of its functions to a `TorchFunctionMode`, which is local to a thread.
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
    "sigmoid": [torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_,
                torch.special.expit],
    "hardsigmoid": [F.hardsigmoid],
    "logsigmoid": [F.logsigmoid],
    "softsign": [F.softsign],
    "tanhshrink": [F.tanhshrink],
    "softshrink": [F.softshrink],
    "hardshrink": [F.hardshrink, torch.hardshrink, Tensor.hardshrink],
    "glu": [F.glu],
}  # fmt: skip
ACTIVATION_FUNCTIONS: Mapping[Function, str] = {
    function: name for name, functions in NAMES.items() for function in functions
}
CLAMPS = {
    torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, torch.clamp_min, torch.clamp_min_,
    Tensor.clamp_min, Tensor.clamp_min_, torch.clip, Tensor.clip,
}  # fmt: skip
# Activations that also weigh: a product with another tensor makes a gate of them, which is none.
MAY_GATE = {"sigmoid", "hardsigmoid"}
TIMES = {torch.mul, torch.multiply, Tensor.mul, Tensor.mul_, Tensor.multiply, Tensor.multiply_}
# What changes the shape of a gate on its way to what it weighs.
RESHAPING = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand, Tensor.expand_as, Tensor.repeat,
    Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze, Tensor.flatten, torch.flatten,
    Tensor.unflatten, Tensor.permute, torch.permute, Tensor.transpose, torch.transpose,
    Tensor.__getitem__, Tensor.contiguous, Tensor.to, Tensor.type_as, Tensor.clone, F.interpolate,
}  # fmt: skip
# Attention is one function, or a softmax whose result is multiplied with a matrix.
ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
DROPOUT = {F.dropout, torch.dropout}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
# Functions whose output has its channels last, and functions whose output has them second.
CHANNELS_LAST = {F.linear, F.layer_norm}
CHANNELS_SECOND = {torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d,
                   F.batch_norm, F.group_norm}  # fmt: skip


def activation_of(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return the name of the activation that a call computes; None for other calls.

    A clamp with only a lower bound of 0 is a ReLU, and one from 0 to 6 a ReLU6.
    """
    if function in CLAMPS:
        low = args[1] if len(args) > 1 else kwargs.get("min")
        high = args[2] if len(args) > 2 else kwargs.get("max")
        if not isinstance(low, int | float) or low != 0:
            return None
        if high is None:
            return "relu"
        return "relu6" if isinstance(high, int | float) and high == 6 else None
    return ACTIVATION_FUNCTIONS.get(function)


class Calls(TorchFunctionMode):
    """Reports each call of a torch function within a `with` block.

    Parameters
    ----------
    see
        Called with the function, its arguments and its result.
    """

    def __init__(
        self, see: Callable[[Function, Sequence[Any], Mapping[str, Any], Any], None]
    ) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and report it."""
        output = func(*args, **(kwargs or {}))
        self._see(func, args, kwargs or {}, output)
        return output
