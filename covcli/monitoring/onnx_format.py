"""The ONNX form of an exported monitor: written by torch and onnxscript, run by ONNX Runtime."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from covcli.core.errors import CovcliError
from covcli.monitoring.exported import KEY, quiet, refusal

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2**31 - 2**20  # the limit of a Protocol Buffers file, minus some space for the graph
OPSET = 18
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

    def number(value: float, kind: Any) -> Any:
        return op.Constant(value=helper.from_array(np.asarray(value, kind.numpy())))

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

    def mean(values: Any, dim: Any = None, keepdim: bool = False, dtype: int | None = None) -> Any:
        if dtype not in (None, values.dtype):
            values = op.Cast(values, to=dtype)
        if _whole_channels(values, dim or ()):
            return pooled(values, op.GlobalAveragePool, keepdim)
        every = axes(*(dim or range(len(values.shape))))
        return op.ReduceMean(values, every, keepdims=int(keepdim))

    def total(values: Any, dim: Any = None, keepdim: bool = False, dtype: int | None = None) -> Any:
        """Sum floats in their own precision, and convert the sums to another one."""
        whole = len(values.shape)
        every, keep = axes(*(dim or range(whole))), int(keepdim)
        if values.dtype.name not in ("FLOAT", "DOUBLE"):
            values = op.Cast(values, to=INT64 if dtype is None else dtype)
        node = values.producer()
        if node is not None and node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
            summed = op.ReduceSumSquare(node.inputs[0], every, keepdims=keep)
        else:
            summed = op.ReduceSum(values, every, keepdims=keep)
        return summed if dtype in (None, values.dtype) else op.Cast(summed, to=dtype)

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
        aten.sum.dim_IntList: total,
    }  # fmt: skip


def _whole_channels(values: Any, dim: Sequence[int]) -> bool:
    """Return whether float32 activations (B, C, H, W) are reduced over height and width."""
    rank = len(values.shape)
    return rank == 4 and sorted(d % rank for d in dim) == [2, 3] and values.dtype.name == "FLOAT"


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
