"""Where and how a run computes: device, threads, seed, and the record of all that."""

import os
import platform
import random
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import torchvision

from covcli.core.errors import CovcliError
from covcli.core.version import __version__

MOST_THREADS = 1024  # a library ends the process where it cannot start them


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" takes CUDA, then MPS, then the CPU.

    Under torchrun "cuda" is the GPU of this rank's number on its machine.

    Raises
    ------
    CovcliError
        If torch does not know the name, or the device is not there.

    Examples
    --------
    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # what only plans computations ("meta") has no values
    except (RuntimeError, AssertionError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or ["is none"])[0]
        raise CovcliError(reason, where=f"--device {name}", fix="try --device cpu") from None
    return device


def configure(seed: int, threads: int) -> None:
    """Seed every generator, set the number of threads (0 leaves it), ask for repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # That would also fill all new memory, for whoever reads what he never wrote. Nothing does here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block in one thread: a matrix is factored in other roundings by several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block that draws from torch's global generator, from a seed, and restore it after.

    Examples
    --------
    >>> with seeded(3):
    ...     first = torch.rand(2)
    >>> with seeded(3):
    ...     print(torch.equal(first, torch.rand(2)))
    True
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def provenance(device: torch.device, seed: int) -> dict[str, Any]:
    """Return what a result must say of its making: versions, command line, machine, seed, time.

    Examples
    --------
    >>> provenance(torch.device("cpu"), seed=0)["device"]
    'cpu'
    """
    return {
        "covcli": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": shlex.join(sys.argv),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "seed": seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
