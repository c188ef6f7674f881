"""Files of tensors and plain values by torch and safetensors, read without running their code.

A pickle can name functions to call. torch's `weights_only` reader calls only the functions on its
list. The list here adds types that only hold values: NumPy arrays, paths and parsed arguments.
"""

import argparse
import os
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from covcli.core import file_checks
from covcli.core.errors import CovcliError, first_few, is_memory_error
from covcli.core.opening import is_file, is_folder, misread, open_regular, reading

# The first bytes of files written by torch before 1.6, which are not ZIP archives.
BEFORE_ARCHIVES = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
NUMBERS = "?bhilqBHILQefdgFD"
_scalar, _array = np._core.multiarray.scalar, np._core.multiarray._reconstruct  # type: ignore[attr-defined]
HARMLESS: list[Any] = [
    np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in NUMBERS}, np.dtypes.StrDType,
    _scalar, (_scalar, "numpy.core.multiarray.scalar"),
    _array, (_array, "numpy.core.multiarray._reconstruct"),
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
    (pathlib.PureWindowsPath, "pathlib._local.WindowsPath"),
]  # fmt: skip
# The errors that torch and safetensors raise on damaged or malicious files; signals are excluded.
BROKEN = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    AssertionError, EOFError, ImportError, pickle.UnpicklingError, struct.error,
    zipfile.BadZipFile, SafetensorError,
)  # fmt: skip
COMPLAINT = "is not a PyTorch checkpoint"
CURE = "save the network's state_dict() by torch.save"
INDEX = ".index.json"
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", INDEX)


def load_weights_only(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values, whatever its name, without running code.

    Reads archives of torch.save, files of torch.save before torch 1.6, safetensors, and the index
    (`….index.json`) of weights in several such files.

    Raises
    ------
    CovcliError
        If the file is missing, damaged, of another kind, or holds objects that only code can
        rebuild. The message names the first such object, or says what the file is.
    """
    if is_folder(path):
        names = sorted(file.name for file in path.iterdir() if file.name.endswith(SUFFIXES))
        advice = f"name a file in it: {first_few(names, 3)}" if names else None
        raise CovcliError("is no regular file but a folder", where=path, fix=advice)
    if path.name.endswith(INDEX):
        return _read_parts(path)
    with reading(path, COMPLAINT, says=True):
        try:
            content = _read(path)
            flaws = list(filter(None, map(_flaw, _tensors(content))))
        except BROKEN as error:
            if is_memory_error(error):
                raise
            raise _refusal(path, str(error)) from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CovcliError(
            f"{COMPLAINT}: it holds a {kind}, not a dictionary of tensors", where=path, fix=CURE
        )
    if flaws:
        raise CovcliError(f"{COMPLAINT}: it holds a tensor {flaws[0]}", where=path, fix=CURE)
    return content


def _read_parts(index: Path) -> dict[str, Any]:
    """Read weights in several files of one folder, from the index that Hugging Face writes."""
    with reading(index, "is no index of weights", says=True):
        parts = file_checks.parse_json(file_checks.read_text(index))["weight_map"]
        names = sorted(set(map(str, parts.values())))
    beside = all(Path(name).name == name != ".." and not name.endswith(INDEX) for name in names)
    if not names or not beside:
        raise CovcliError("is no index of files beside it", where=index)
    content = {name: load_weights_only(index.parent / name) for name in names}
    for tensor, name in parts.items():
        if tensor not in content[name]:
            raise CovcliError(f"lacks {tensor!r}, which the index names", where=index.parent / name)
    return {tensor: content[name][tensor] for tensor, name in parts.items()}


def index_of(path: Path) -> Path | None:
    """Return the index beside one of several files of weights; None if there is none.

    Examples
    --------
    >>> for name in ("net-00001-of-00002.safetensors", "net.safetensors.index.json"):
    ...     Path(name).touch()
    >>> index_of(Path("net-00001-of-00002.safetensors")).name
    'net.safetensors.index.json'
    """
    stem = re.sub(r"-\d{5}-of-\d{5}(?=\.\w+$)", "", path.name)
    index = path.with_name(stem + INDEX)
    return index if stem != path.name and is_file(index) else None


def _read(path: Path) -> Any:
    with open_regular(path) as file:
        start = file.read(len(BEFORE_ARCHIVES))
        file.seek(0)
        if _begins_as_safetensors(start, file):
            return _safetensors(file.read(), path)
        if start != BEFORE_ARCHIVES:
            _refuse_programs(file, path)
            file_checks.check_torch_archive(file, path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # the reader itself checks the pickle protocol
            return torch.load(file, map_location="cpu", weights_only=True)


def _safetensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    A tensor that a network has under two names is stored once; the metadata lists the other name,
    as `safetensors.torch.save_model` writes it.
    """
    try:
        tensors = dict(safetensors.torch.load(content))
    except SafetensorError as error:
        raise CovcliError(
            f"is a damaged file of safetensors ({error})",
            where=path,
            fix="download or copy it again",
        ) from None
    for name, stored in file_checks.safetensors_metadata(content).items():
        if name not in tensors and stored in tensors:
            tensors[name] = tensors[stored]
    return tensors


def _begins_as_safetensors(start: bytes, file: IO[bytes]) -> bool:
    """Return whether a file begins with the length of a JSON header and a brace."""
    length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and length < os.fstat(file.fileno()).st_size


def _refuse_programs(file: IO[bytes], path: Path) -> None:
    """Raise a CovcliError if an archive holds a network's program, as TorchScript does."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        names = {Path(name).name for name in archive.namelist()}
    if "constants.pkl" in names or "archive_format" in names:
        kind = "TorchScript" if "constants.pkl" in names else "torch.export"
        raise CovcliError(f"{COMPLAINT}: it is a program of {kind}", where=path, fix=CURE)


def _refusal(path: Path, reason: str) -> CovcliError:
    """Return the error for an unreadable file; torch's reason names the first refused object."""
    named = re.search(r"(?:GLOBAL|class) ([\w.]+)", reason)
    if named is None:
        return misread(
            path,
            f"{COMPLAINT} that loads without running code",
            "expected a file from `covcli train` or a state dict saved by torch.save",
        )
    return CovcliError(
        f"{COMPLAINT} that loads without running code: it holds a {named[1]}",
        where=path,
        fix=CURE,
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _flaw(tensor: Tensor) -> str:
    """Return why a tensor cannot be used as weights; "" if it can."""
    if tensor.is_meta:
        return "without values (on the device meta)"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "that is sparse or quantized"
    # With strides of 0 the storage may be smaller than the shape.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "that claims more than it stores"
    return ""
