"""Shell completion of registered names; they are read from the source, to avoid importing torch."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

from covcli.core.choices import RegistryKind

# The folder and the decorator of each registry: `@METHODS.add("mrc")`, `@model("vgg19")`.
DECORATORS: dict[RegistryKind, tuple[str, str]] = {
    "models": ("models", "model"),
    "datasets": ("data", "DATASETS.add"),
    "methods": ("methods", "METHODS.add"),
    "attacks": ("attacks", "ATTACKS.add"),
    "corruptions": ("data", "corruption"),
    "baselines": ("evaluation/baselines", "baseline"),
}


def registered(kind: RegistryKind) -> list[str]:
    """Return the names that covcli itself registers, in alphabetical order.

    Examples
    --------
    >>> registered("models")
    ['resnet18', 'vgg11', 'vgg19']
    """
    folder, decorator = DECORATORS[kind]
    files = (Path(__file__).parents[1] / folder).glob("*.py")
    return sorted(name for file in files for name in _decorated(file.read_text(), decorator))


def _decorated(source: str, decorator: str) -> Iterator[str]:
    """Yield the first argument of each use of a decorator in a file."""
    if f"@{decorator}(" not in source:
        return
    for node in ast.parse(source).body:
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == decorator:
                yield ast.literal_eval(call.args[0])


def completes(*kinds: RegistryKind) -> Callable[[str], list[str]]:
    """Return a function that completes names of some kinds; attacks are written attack:NAME."""

    def complete(incomplete: str) -> list[str]:
        names = [
            f"attack:{name}" if kind == "attacks" else name
            for kind in kinds
            for name in registered(kind)
        ]
        return [name for name in names if name.startswith(incomplete)]

    return complete
