"""The device, threads and seed of a run, and their record in results."""

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

from covcli.core.environment import whole_number
from covcli.core.errors import CovcliError
from covcli.core.version import __version__

MOST_THREADS = 1024  # a library ends the process where it cannot start them


def check_defaults() -> None:
    """Raise a CovcliError if the program changed the type or device that torch's tensors get."""
    if (kind := torch.get_default_dtype()) != torch.float32:
        raise CovcliError(
            f"torch's default type is {kind}", fix="call torch.set_default_dtype(torch.float32)"
        )
    if (device := torch.get_default_device()).type != "cpu":
        raise CovcliError(
            f"torch's default device is {device}",
            fix="call covcli in a block `with torch.device('cpu'):`; the network may stay there",
        )


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" chooses CUDA, or else the CPU.

    Apple's MPS has no float64, in which scores are computed.

    Under torchrun, "cuda" is the GPU with this process's local rank as its number.

    Raises
    ------
    CovcliError
        If torch does not know the name, the device is not available, or as in `check_defaults`.

    Examples
    --------
    >>> choose_device("cpu")
    device(type='cpu')
    """
    check_defaults()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
    """Seed all generators, set the number of threads (0: unchanged), use deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # This mode would also fill all new memory, which costs time. No code here reads memory that it
    # has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block in one thread: the rounding of a matrix factorisation depends on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a block, and restore its state afterwards.

    Examples
    --------
    >>> with seeded(3):
    ...     first = torch.rand(2)
    >>> with seeded(3):
    ...     print(torch.equal(first, torch.rand(2)))
    True
    """
    # Told the devices, torch does not warn that there are several.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def provenance(device: torch.device, seed: int) -> dict[str, Any]:
    """Return the provenance of a result: versions, command line, machine, seed and time.

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
        "ranks": whole_number("WORLD_SIZE", 1),
        "seed": seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
