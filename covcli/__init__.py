"""covcli: coverage analysis that tells which answers of an image classifier can be trusted.

The names below load on first use, because torch takes seconds to import and the
command line's help needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covcli.activations import CoverageLayer
    from covcli.monitor import Monitor, Verdicts

__version__ = "0.1.0"
__all__ = ["CoverageLayer", "Monitor", "Verdicts", "__version__"]

_HOMES = {"CoverageLayer": "activations", "Monitor": "monitor", "Verdicts": "monitor"}


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'covcli' has no attribute {name!r}")
    return getattr(import_module(f"covcli.{_HOMES[name]}"), name)
