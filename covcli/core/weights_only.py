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
from covcli.core.errors import CovcliError, is_memory_error
from covcli.core.opening import open_regular, reading

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


def load_weights_only(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values, whatever its name, without running code.

    Reads archives of torch.save, files of torch.save before torch 1.6, and safetensors.

    Raises
    ------
    CovcliError
        If the file is missing, damaged, of another kind, or holds objects that only code can
        rebuild. The message names the first such object.
    """
    with reading(path, COMPLAINT):
        try:
            content = _read(path)
            whole = all(map(_is_whole, _tensors(content)))
        except BROKEN as error:
            if is_memory_error(error):
                raise
            raise _refusal(path, str(error)) from None
    if not isinstance(content, dict) or not whole:
        raise _refusal(path, "")
    return content


def _read(path: Path) -> Any:
    with open_regular(path) as file:
        start = file.read(len(BEFORE_ARCHIVES))
        file.seek(0)
        if path.suffix == ".safetensors" or _begins_as_safetensors(start, file):
            return dict(safetensors.torch.load(file.read()))
        if start != BEFORE_ARCHIVES:
            _refuse_programs(file, path)
            file_checks.check_torch_archive(file, path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # the reader itself checks the pickle protocol
            return torch.load(file, map_location="cpu", weights_only=True)


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
        return CovcliError(
            f"{COMPLAINT} that loads without running code",
            where=path,
            fix="expected a file from `covcli train` or a state dict saved by torch.save",
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


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor's storage covers its shape (with strides of 0 it may not)."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )
