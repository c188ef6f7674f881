"""The wings of the house: imports point downwards between wings, and go round in no circle."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import covcli

ROOT = Path(covcli.__file__).parent
# From top to bottom: a wing may import the wings below it, and no other.
WINGS = [
    "commands", "monitoring", "training", "evaluation", "signature", "attacks", "models",
    "reporting", "methods", "data", "core",
]  # fmt: skip
COMMANDS = {"__main__", "cli"}


def rooms() -> dict[str, Path]:
    """Return every module by its dotted name below covcli; a package stands for its __init__."""
    modules = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(part for part in parts if part != "__init__")] = path
    return modules


def wing(room: str) -> str:
    return "commands" if room in COMMANDS else room.split(".")[0]


def imports(path: Path) -> set[str]:
    """Return the modules of covcli that a file imports, but not for type checking."""
    tree = ast.parse(path.read_text())
    known, pairs = rooms(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "covcli":
            module = (node.module or "").removeprefix("covcli").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                pairs.add(inner if inner in known else module)
        elif isinstance(node, ast.Import):
            pairs |= {
                alias.name.removeprefix("covcli").removeprefix(".")
                for alias in node.names
                if alias.name.split(".")[0] == "covcli"
            }
    return pairs


def test_every_room_belongs_to_a_wing() -> None:
    assert {wing(room) for room in rooms() if room} == set(WINGS)


def test_imports_point_downwards_between_wings() -> None:
    upwards = [
        f"{room} -> {target}"
        for room, path in rooms().items()
        if room  # the face of the package loads its names on demand
        for target in imports(path)
        if not target or WINGS.index(wing(target)) < WINGS.index(wing(room))
    ]
    assert upwards == []


def test_no_imports_go_round_in_a_circle() -> None:
    waiting = {room: imports(path) - {room} for room, path in rooms().items() if room}
    while free := {room for room, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {room: needs for room, needs in waiting.items() if room not in free}
    assert waiting == {}


def test_no_two_classes_or_aliases_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for room, path in rooms().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(room)
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
                homes.setdefault(ast.unparse(node.target), []).append(room)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_the_reporting_rooms_need_no_torch() -> None:
    for name, path in rooms().items():
        if wing(name) in ("commands", "reporting"):
            tree = ast.parse(path.read_text())
            imported = [
                a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
            ]
            assert "torch" not in imported


def loaded(nodes: list[ast.stmt]) -> Iterator[str]:
    """Yield what statements import when their module is imported, not when a function runs."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from loaded(node.orelse)
        elif not isinstance(node, ast.FunctionDef):
            yield from loaded([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])


def test_what_a_plain_installation_has_not_is_imported_late() -> None:
    page = Path(__file__).parents[1] / "pyproject.toml"
    texts = tomllib.loads(page.read_text())["project"]["dependencies"]
    packages = {re.split(r"[^\w-]", text)[0].replace("-", "_") for text in texts}
    modules = {"pillow": "PIL", "scikit_learn": "sklearn"}
    known = {modules.get(name, name) for name in packages} | sys.stdlib_module_names | {"covcli"}
    unknown = {
        f"{room} -> {target}"
        for room, path in rooms().items()
        for target in loaded(ast.parse(path.read_text()).body)
        if target not in known
    }
    assert unknown == set()
