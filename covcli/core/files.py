"""Files: whole or not at all, versioned, checked when read, never unpickled."""

import contextlib
import glob
import hashlib
import io
import json
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from covcli.core import file_checks, state
from covcli.core.errors import CovcliError
from covcli.core.opening import check_replaceable, exists, open_own, open_regular, reading
from covcli.core.weights_only import load_weights_only


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its name once it is whole and on disk.

    Raises
    ------
    CovcliError
        If the file cannot be written; what stood at `path` before is untouched.

    Examples
    --------
    >>> from pathlib import Path
    >>> with atomic(Path("x.txt")) as file:
    ...     _ = file.write(b"whole")
    >>> Path("x.txt").read_text()
    'whole'
    """
    try:
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise CovcliError(f"cannot be written ({error.strerror})", where=path) from None
    try:
        with os.fdopen(handle, "wb") as file:
            try_lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            _open_to_others(file)
        Path(name).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CovcliError(f"cannot be written ({error.strerror})", where=path) from None
    finally:
        Path(name).unlink(missing_ok=True)


def _open_to_others(file: IO[bytes]) -> None:
    """Give a file, which mkstemp makes private, the permissions of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), 0o666 & ~umask)


def try_lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; return False if another process holds it."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _clear_leftovers(path: Path) -> None:
    """Remove temporary files for `path` whose writer died: nobody holds their lock."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError, CovcliError), open_own(leftover) as file:
            if try_lock(file):
                leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise a CovcliError if a result stands at `path`, unless it may be overwritten."""
    if not force and exists(path):
        raise CovcliError("exists", where=path, fix="pass --force, or another --output")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically."""
    with atomic(path) as file:
        file.write(content)


def publish(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: once all are on disk they take their names, in order.

    A process that is killed between two names leaves a mixture, which whoever reads the files has
    to notice: name the one that vouches for the others last.
    """
    with contextlib.ExitStack() as stack:  # left in the reverse order
        for path, content in reversed(list(contents.items())):
            file = stack.enter_context(atomic(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically; a NaN or infinity in it is a ValueError.

    Examples
    --------
    >>> from pathlib import Path
    >>> write_json(Path("x.json"), {"n": 3})
    >>> read_json(Path("x.json"))
    {'n': 3}
    """
    write_bytes(path, pack_json(document))


def pack_json(document: Any) -> bytes:
    """Return the bytes of a JSON document; a NaN or infinity in it is a ValueError."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def write_pickle(path: Path, document: Any) -> None:
    """Write plain Python objects (numbers, strings, lists, dictionaries) as a pickle."""
    write_bytes(path, pickle.dumps(document, protocol=4))


def read_json(path: Path, *, inside: Path | None = None) -> Any:
    """Read a JSON document; a missing or broken one is a CovcliError.

    Examples
    --------
    >>> from pathlib import Path
    >>> _ = Path("x.json").write_text('{"n": 3')
    >>> read_json(Path("x.json"))
    Traceback (most recent call last):
    covcli.core.errors.CovcliError: x.json: is not a JSON document
    """
    try:
        return file_checks.parse_json(file_checks.read_text(path, inside=inside))
    except ValueError:
        raise CovcliError("is not a JSON document", where=path) from None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors, in hexadecimal: equal for equal bits, shapes and names.

    Examples
    --------
    >>> import torch
    >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": -torch.zeros(2)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest(content: Any) -> str:
    """Return a digest of nested dictionaries, lists, plain values and tensors, in hexadecimal.

    Examples
    --------
    >>> import torch
    >>> digest({"a": [1, torch.zeros(2)]}) == digest({"a": [1, torch.zeros(2)]})
    True
    """
    tensors: dict[str, Tensor] = {}

    def lay_out(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": len(tensors)}
        if isinstance(value, Mapping):
            return [[repr(key), lay_out(item)] for key, item in value.items()]
        if isinstance(value, list | tuple):
            return [lay_out(item) for item in value]
        return repr(value)

    text = json.dumps(lay_out(content))
    return hashlib.sha256((text + fingerprint(tensors)).encode()).hexdigest()


@dataclass(frozen=True)
class Format:
    """A kind of PyTorch file of our own: plain values and tensors, with a digest of all of it.

    Attributes
    ----------
    name
        What the file says that it is: "covcli" and the kind.
    schema
        The version of what it holds.
    keys
        Of its content; a file that lacks one is refused.
    sealed
        Whether this user's covcli must know again that the file is its own.

    Examples
    --------
    >>> from pathlib import Path
    >>> form = Format("covcli example", schema=1)
    >>> form.save(Path("x.pt"), {"n": 3})
    >>> form.load(Path("x.pt"))
    {'n': 3}
    """

    name: str
    schema: int
    keys: frozenset[str] = frozenset()
    sealed: bool = False

    def save(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write a file of this format, whole or not at all."""
        document = {
            "format": self.name, "schema": self.schema, "digest": digest(content),
            "content": content,
        }  # fmt: skip
        if self.sealed:
            document["seal"] = state.seal(self.name, str(document["digest"]))
        buffer = io.BytesIO()
        torch.save(document, buffer)
        write_bytes(path, buffer.getbuffer())

    def load(self, path: Path) -> dict[str, Any]:
        """Read what `save` wrote.

        Raises
        ------
        CovcliError
            If the file is missing, of another format or schema, damaged, or lacks a key.
        """
        return self.content(path, load_weights_only(path))

    def load_own(self, path: Path) -> tuple[dict[str, Any], bool]:
        """Read a sealed file as `load` does; return also whether this user's covcli wrote it."""
        document = load_weights_only(path)
        content = self.content(path, document)
        return content, state.holds(document.get("seal"), self.name, str(document["digest"]))

    def content(self, path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of what was read of a file already; the errors are those of `load`."""
        if document.get("format") != self.name:
            raise CovcliError(f"is no {self.name.removeprefix('covcli ')}", where=path)
        if document.get("schema") != self.schema:
            raise CovcliError(
                f"has schema {document.get('schema')!r}, this covcli reads {self.schema}",
                where=path,
            )
        content = document.get("content")
        if not isinstance(content, dict) or digest(content) != document.get("digest"):
            raise CovcliError("is damaged: its content does not match its digest", where=path)
        if missing := self.keys - content.keys():
            raise CovcliError(f"lacks {', '.join(sorted(missing))}", where=path)
        return content


def plain(value: Any) -> Any:
    """Turn NumPy numbers and arrays, paths and tuples into what JSON knows; a NaN into None.

    Examples
    --------
    >>> import numpy as np
    >>> plain({"share": np.float32(0.5), "missing": float("nan"), "sizes": (1, 2)})
    {'share': 0.5, 'missing': None, 'sizes': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | Tensor):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def digest_bytes(content: bytes) -> str:
    """Return the digest of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, in hexadecimal."""
    with reading(path, "cannot be read"), open_regular(path) as file:
        return str(hashlib.file_digest(file, hashlib.sha256).hexdigest())
