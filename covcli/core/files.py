"""Files: written atomically, versioned, checked when read, never unpickled."""

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
from covcli.core.signals import unfinished
from covcli.core.weights_only import load_weights_only


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that is renamed to `path` once it is complete and on disk.

    Raises
    ------
    CovcliError
        If the file cannot be written; a previous file at `path` is unchanged.

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
        with unfinished(Path(name)):
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


def _open_to_others(file: IO[bytes]) -> None:
    """Give the private file of mkstemp the permissions that a new file usually has."""
    umask = os.umask(0)
    os.umask(umask)
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), 0o666 & ~umask)


def try_lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; return False if another process has locked it."""
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
    """Remove temporary files for `path` whose writer died: they are no longer locked."""
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
    """Raise a CovcliError if `path` exists, unless it may be overwritten."""
    if not force and exists(path):
        raise CovcliError("exists", where=path, fix="pass --force, or name another --output")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically."""
    with atomic(path) as file:
        file.write(content)


def publish(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: once all are on disk, they are renamed in order.

    A process that is killed between two renames leaves a mixture of old and new files. The reader
    must detect it, so put the file that holds the digests of the others last.
    """
    with contextlib.ExitStack() as stack:  # left in the reverse order
        for path, content in reversed(list(contents.items())):
            file = stack.enter_context(atomic(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically; raise a ValueError for NaN or infinity.

    Examples
    --------
    >>> from pathlib import Path
    >>> write_json(Path("x.json"), {"n": 3})
    >>> read_json(Path("x.json"))
    {'n': 3}
    """
    write_bytes(path, pack_json(document))


def pack_json(document: Any) -> bytes:
    """Return the bytes of a JSON document; raise a ValueError for NaN or infinity."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def write_pickle(path: Path, document: Any) -> None:
    """Write plain Python objects (numbers, strings, lists, dictionaries) as a pickle."""
    write_bytes(path, pickle.dumps(document, protocol=4))


def read_json(path: Path, *, inside: Path | None = None) -> Any:
    """Read a JSON document; raise a CovcliError if it is missing or malformed.

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
    """A PyTorch file format of covcli: plain values and tensors, with a digest of the content.

    Attributes
    ----------
    name
        The format's name in the file: "covcli" and the kind.
    schema
        The version of the content.
    keys
        Required keys of the content; a file that lacks one is refused.
    sealed
        Whether the file carries a seal by which this user's covcli recognises its own files.

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
        """Write a file of this format atomically."""
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
        """Read a file that `save` wrote.

        Raises
        ------
        CovcliError
            If the file is missing, of another format or schema, damaged, or lacks a key.
        """
        return self.content(path, load_weights_only(path))

    def load_own(self, path: Path) -> tuple[dict[str, Any], bool]:
        """Read a sealed file; return its content and whether this user's covcli wrote it."""
        document = load_weights_only(path)
        content = self.content(path, document)
        return content, state.holds(document.get("seal"), self.name, str(document["digest"]))

    def content(self, path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of a document already read from a file; raises as `load` does."""
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
    """Convert NumPy values, tensors, paths and tuples to JSON types; NaN and infinity to None.

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
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with reading(path, "cannot be read"), open_regular(path) as file:
        return str(hashlib.file_digest(file, hashlib.sha256).hexdigest())
