"""The ONNX form of an exported monitor: written by torch and onnxscript, run by ONNX Runtime."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import groupby
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from covcli.core.errors import CovcliError
from covcli.monitoring.exported import KEY, quiet, refusal

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2**31 - 2**20  # the limit of a Protocol Buffers file, minus some space for the graph
OPSET = 18
BLOCK = 16  # ONNX Runtime keeps activations of a multiple of so many channels in its own layout
FLOAT, INT64 = 1, 7  # of onnx.TensorProto.DataType


def library(name: str) -> Any:
    """Import a package of the extra `onnx`; a CovcliError says how to install it."""
    try:
        return import_module(name)
    except ImportError:
        raise CovcliError(
            f"needs the package {name}", where="ONNX", fix="run `pip install 'covcli[onnx]'`"
        ) from None


def check_packages() -> None:
    """Raise a CovcliError unless all packages for an export to ONNX are installed."""
    for name in PACKAGES:
        library(name)


@contextmanager
def plain_layout(model: nn.Module) -> Iterator[None]:
    """Keep a network's weights in the usual layout of memory in the block, then in channels-last.

    torch writes the layout of activations into a program. ONNX knows none, and gets operations that
    copy them instead.
    """
    model.to(memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        model.to(memory_format=torch.channels_last)


def convert(program: torch.export.ExportedProgram, outputs: Sequence[str], model: str) -> Any:
    """Convert an exported program to an ONNX model, `onnx.ModelProto`.

    Parameters
    ----------
    program
        A program that takes one tensor of images.
    outputs
        Names of its outputs.
    model
        The network's name, for error messages.

    Raises
    ------
    CovcliError
        If it is too large for one file, or onnxscript does not support one of its operations.
    """
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > LARGEST:
        raise CovcliError(
            f"{size / 1e9:.1f} GB of weights are more than one ONNX file holds",
            where=f"model {model!r}",
            fix="use --format torch",
        )
    try:
        with quiet():
            converted = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, output_names=list(outputs),
                custom_translation_table=_translations(), verbose=False,
            )  # fmt: skip
            assert converted is not None
            proto = converted.model_proto
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the innermost names the operation
            cause = cause.__cause__
        inner = cause if isinstance(cause, Exception) else error
        raise refusal(inner, "torch.onnx", model) from None
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del proto.graph.value_info[:]  # they name the batch otherwise
    return proto


def _translations() -> dict[Any, Any]:
    """Return translations of operations that onnxscript lacks or translates differently.

    Numbers keep their double precision, which onnxscript would round to single. With these forms,
    ONNX Runtime pools whole channels in its own layout and squares by a product; with the usual
    forms it copies each activation first, or computes powers.
    """
    op, helper = library("onnxscript").opset18, library("onnx").numpy_helper
    aten = torch.ops.aten

    def axes(*dims: int) -> Any:
        return op.Constant(value_ints=list(dims))

    def constant(values: np.ndarray) -> Any:
        return op.Constant(value=helper.from_array(values))

    def number(value: float, kind: Any) -> Any:
        return constant(np.asarray(value, kind.numpy()))

    def split(values: Any, widths: Sequence[int]) -> list[Any]:
        parts = op.SplitToSequence(values, axes(*widths), axis=1)
        return [op.SequenceAt(parts, op.Constant(value_int=i)) for i in range(len(widths))]

    def scalar(value: Any, dtype: int = FLOAT, **_placement: Any) -> Any:
        if isinstance(value, bool | int | float):
            return number(value, library("onnx_ir").DataType(FLOAT if dtype == -1 else dtype))
        return op.Cast(value, to=FLOAT if dtype == -1 else dtype)

    def clamp(values: Any, min: float | None = None, max: float | None = None) -> Any:
        ends = (None if end is None else number(end, values.dtype) for end in (min, max))
        return op.Clip(values, *ends)

    def below(ranked: Any, scores: Any, **options: Any) -> Any:
        """Count the smaller values: the position of a value in a sorted row."""
        if options.get("right") or options.get("side") not in (None, "left"):
            raise NotImplementedError("searchsorted from the right")
        flat = len(ranked.shape) == 1
        if flat:
            ranked, scores = op.Unsqueeze(ranked, axes(0)), op.Unsqueeze(scores, axes(1))
        less = op.Cast(op.Less(ranked, scores), to=INT64)
        return op.ReduceSum(less, axes(1), keepdims=0 if flat else 1)

    def pooled(values: Any, pool: Any, keepdim: bool) -> Any:
        whole = pool(values)
        return whole if keepdim else op.Squeeze(whole, axes(2, 3))

    def largest(values: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        if _whole_channels(values, dim):
            return pooled(values, op.GlobalMaxPool, keepdim)
        return op.ReduceMax(values, axes(*dim), keepdims=int(keepdim))

    def token_mean(values: Any, keepdim: bool) -> Any:
        """Return the means over all dimensions but the first and the last, by a product."""
        *positions, width = values.shape[1:]
        count = math.prod(positions)
        row = np.full((1, count), 1 / count, np.float32)
        tokens = values if len(positions) == 1 else op.Reshape(values, axes(0, count, width))
        shape = [0, *([1] * len(positions) if keepdim else []), width]
        return op.Reshape(op.MatMul(constant(row), tokens), axes(*shape))

    def mean(values: Any, dim: Any = None, keepdim: bool = False, dtype: int | None = None) -> Any:
        if dtype not in (None, values.dtype):
            values = op.Cast(values, to=dtype)
        if _whole_channels(values, dim or ()):
            return pooled(values, op.GlobalAveragePool, keepdim)
        if _tokens(values, dim or ()):
            return token_mean(values, keepdim)
        every = axes(*(dim or range(len(values.shape))))
        return op.ReduceMean(values, every, keepdims=int(keepdim))

    def average(values: Any, kernel: Any, stride: Any = (), padding: Any = 0, *more: Any) -> Any:
        """Average; over whole channels without asking for ONNX Runtime's own layout."""
        if tuple(kernel) == tuple(values.shape[2:]) and not np.any(padding):
            return op.GlobalAveragePool(values)
        usual = library("onnxscript.function_libs.torch_lib.ops.nn").aten_avg_pool2d
        return usual(values, kernel, stride, padding, *more)

    def squared(values: Any) -> Any:
        """Return x if the values are x·x, or these in double precision; else None."""
        node = values.producer()
        if node is not None and node.op_type == "Cast":
            node = node.inputs[0].producer()
        is_square = node is not None and node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        return node.inputs[0] if is_square else None

    def total(values: Any, dim: Any = None, keepdim: bool = False, dtype: int | None = None) -> Any:
        """Sum floats in their own precision, and convert the sums to another one."""
        whole = len(values.shape)
        every, keep = axes(*(dim or range(whole))), int(keepdim)
        if values.dtype.name not in ("FLOAT", "DOUBLE"):
            values = op.Cast(values, to=INT64 if dtype is None else dtype)
        root = squared(values)
        if root is not None:
            dtype = values.dtype if dtype is None else dtype
            summed = op.ReduceSumSquare(root, every, keepdims=keep)
        else:
            summed = op.ReduceSum(values, every, keepdims=keep)
        return summed if dtype in (None, summed.dtype) else op.Cast(summed, to=dtype)

    def joined(parts: Sequence[Any], dim: int = 0) -> Any:
        """Concatenate; of pooled channels first those that ONNX Runtime has in its own layout."""
        parts = [part for part in parts if part.shape != (0,)]  # which torch ignores
        if dim != 1 or any(len(part.shape) != 4 or part.shape[2:] != (1, 1) for part in parts):
            return op.Concat(*parts, axis=dim)
        runs = [(own, list(run)) for own, run in groupby(parts, lambda p: p.shape[1] % BLOCK == 0)]
        if len(runs) == 1:
            return op.Concat(*parts, axis=1)
        widths = [sum(part.shape[1] for part in run) for own, run in runs if own]
        first = op.Concat(*(part for own, run in runs if own for part in run), axis=1)
        again = iter(split(first, widths))
        return op.Concat(*(p for own, run in runs for p in ([next(again)] if own else run)), axis=1)

    def order(values: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
        """Sort; TopK always puts the lower index first among equal values."""
        every = axes(values.shape[dim])
        return op.TopK(values, every, axis=dim, largest=int(descending), sorted=1)

    def power(values: Any, exponent: float) -> Any:
        if exponent == 2:
            return op.Mul(values, values)
        return op.Pow(values, number(exponent, values.dtype))

    return {
        aten.scalar_tensor.default: scalar, aten.clamp.default: clamp,
        aten.clamp_min.default: lambda values, end: clamp(values, min=end),
        aten.clamp_max.default: lambda values, end: clamp(values, max=end),
        aten.searchsorted.Tensor: below, aten.amax.default: largest,
        aten.pow.Tensor_Scalar: power, aten.sort.stable: order, aten.mean.dim: mean,
        aten.sum.dim_IntList: total, aten.cat.default: joined, aten.avg_pool2d.default: average,
    }  # fmt: skip


def _whole_channels(values: Any, dim: Sequence[int]) -> bool:
    """Return whether float32 activations (B, C, H, W) are reduced over height and width."""
    rank = len(values.shape)
    return rank == 4 and sorted(d % rank for d in dim) == [2, 3] and values.dtype.name == "FLOAT"


def _tokens(values: Any, dim: Sequence[int]) -> bool:
    """Return whether float32 tokens (B, ..., C), of a fixed number, are reduced to one."""
    rank, sizes = len(values.shape), values.shape[1:]
    inner = sorted(d % rank for d in dim) == list(range(1, rank - 1))
    return (
        inner
        and rank > 2
        and values.dtype.name == "FLOAT"
        and all(isinstance(n, int) for n in sizes)
    )


def packed(proto: Any, document: str | None = None) -> bytes:
    """Return the bytes of a model, with its description if there is one."""
    del proto.metadata_props[:]
    if document is not None:
        proto.metadata_props.add(key=KEY, value=document)
    content: bytes = proto.SerializeToString()
    return content


def described(file: IO[bytes]) -> str | None:
    """Return covcli's description in an ONNX file; None without one."""
    file.seek(0)
    model = library("onnx").load_model_from_string(file.read())
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return properties.get(KEY)


class OnnxProgram:
    """An ONNX model that ONNX Runtime runs on the CPU.

    Parameters
    ----------
    content
        The file's bytes.
    threads
        How many threads one operation may use; 0 for the library's default.
    """

    def __init__(self, content: bytes, threads: int = 0) -> None:
        runtime = library("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: torch.Tensor) -> Mapping[str, np.ndarray]:
        """Run images; return the outputs by name."""
        arrays = self._session.run(None, {self._input: images.numpy()})
        return dict(zip(self._names, arrays, strict=True))
