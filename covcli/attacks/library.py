"""The library foolbox, an optional package: it is imported only when an attack runs."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from covcli.core.errors import CovcliError


def library(where: str = "attack") -> ModuleType:
    """Import foolbox; `where` names what needs it.

    Raises
    ------
    CovcliError
        If it is not installed, or cannot be imported with the SciPy that is installed.
    """
    try:
        return import_module("foolbox")
    except ImportError as error:
        raise CovcliError(
            f"needs the package foolbox ({error})",
            where=where,
            fix="run `pip install 'covcli[attacks]'`",
        ) from None


def by_foolbox(name: str, **parameters: object) -> Callable[[], Any]:
    """Return a function that creates the attack that has this name in foolbox."""
    return lambda: getattr(library().attacks, name)(**parameters)


def for_foolbox(model: nn.Module, device: torch.device) -> Any:
    """Wrap a network on a device, which takes images with pixels in [0, 1], for foolbox."""
    return library().PyTorchModel(model, bounds=(0, 1), device=device)
