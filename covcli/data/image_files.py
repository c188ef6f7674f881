"""Images in files: decoded when they are read, in threads that live as long as the process."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from covcli.data.decoding import decode
from covcli.data.digests import content_digests
from covcli.data.images import adapt, compute_alone
from covcli.data.preprocessing import Shape

MOST_THREADS = 16


@cache
def decoders() -> ThreadPoolExecutor:
    """Return the threads that decode: one a processor (PIL releases the interpreter)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = min(MOST_THREADS, max(2, count or 1))
    return ThreadPoolExecutor(threads, "decode", initializer=compute_alone)


@dataclass(frozen=True)
class FileSource:
    """Image files, decoded when they are read; their sizes may differ.

    Attributes
    ----------
    folder
        What the files' names are relative to.
    files
        Their names.
    key
        Tells lists of files of one folder apart, in the cache of digests.
    """

    folder: Path
    files: Sequence[str]
    key: str = ""

    def path(self, row: int) -> Path:
        """Return the path of one file."""
        return self.folder / self.files[row]

    def read(self, rows: Tensor, shape: Shape) -> Tensor:
        """Decode the rows in a few threads, and stack them."""
        if len(rows) == 0:
            return torch.empty((0, *shape), dtype=torch.uint8)
        images = decoders().map(lambda row: adapt(decode(self.path(row)), shape), rows.tolist())
        return torch.cat(list(images))

    @cached_property
    def fingerprint(self) -> str:
        """Digest the files' relative names and contents."""
        digest = hashlib.sha256("\0".join(self.files).encode("utf-8", "surrogateescape"))
        digest.update(content_digests(self.folder, self.files, self.key, decoders()).tobytes())
        return digest.hexdigest()
