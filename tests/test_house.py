"""The rooms of the house: imports point downwards only, and files stay short."""

import ast
from pathlib import Path

import pytest

import covcli

ROOT = Path(covcli.__file__).parent
# From top to bottom: a room may import the rooms below it, and no other.
ROOMS = [
    "__main__", "cli", "options", "render", "reporting", "sections", "pages", "drawing", "gates",
    "training", "session", "settings", "watching", "evaluation", "openers", "alarms", "results",
    "selective", "explaining", "measuring", "monitor", "merging", "signing", "fitting", "attacks",
    "adaptive", "losses", "surrogates", "comparison", "recorded", "baselines", "layers", "engine",
    "checkpoint", "signature", "calibration", "combination", "rules", "guarantees", "metrics",
    "methods", "methods.ensemble", "methods.gaussian", "methods.ranges", "methods.soft",
    "methods.ranks", "methods.contributions", "methods.base", "methods.layout", "methods.state",
    "models", "activations", "pooling", "data", "images", "progress", "runtime", "distributed",
    "runs", "store", "guard", "specs", "registry", "errors", "__init__",
]  # fmt: skip


def rooms() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts)
        found["methods" if name == "methods.__init__" else name] = path
    return found


def imports(path: Path) -> set[str]:
    """Return the rooms that a file imports, inside functions too, but not for type checking."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "covcli":
            module = (node.module or "").removeprefix("covcli").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                found.add(inner if inner in ROOMS else module or "__init__")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {"__init__" for name in names if name == "covcli"}
    return found


def test_every_room_has_its_place() -> None:
    assert sorted(rooms()) == sorted(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_imports_point_downwards(name: str) -> None:
    below = ROOMS[ROOMS.index(name) + 1 :]
    if name == "methods":  # the package gathers its own parts
        below = [*below, *(room for room in ROOMS if room.startswith("methods."))]
    assert imports(rooms()[name]) <= set(below)


def test_no_file_is_long() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in rooms().items()}
    assert {name: n for name, n in lengths.items() if n > 360} == {}


def test_the_reporting_rooms_need_no_torch() -> None:
    for name in ("reporting", "sections", "pages", "drawing", "render", "cli"):
        tree = ast.parse(rooms()[name].read_text())
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert "torch" not in names
