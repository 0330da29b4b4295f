"""Imports between rooms go down: the floors of docs/architecture.md, read off every import.

Imports inside functions and those for type checkers count like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpt2fast"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def _block(heading: str) -> list[str]:
    """The lines of the fenced block that follows a heading of docs/architecture.md."""
    match = re.search(rf"^## {heading}$.*?^```$\n(.*?)^```$", ARCHITECTURE, re.M | re.S)
    assert match, f"docs/architecture.md has no block under {heading!r}"
    return match[1].splitlines()


FLOORS = [line.split() for line in _block("Floors")]
"""From the top down; rooms of one floor do not import each other."""

DOORS = {tuple(line.split()[:1] + line.split()[2:3]) for line in _block("Doors")}
"""(file, room) that may import upwards, inside functions alone."""

HEIGHTS = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without "gpt2fast."; the package is ""."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The first part of a module's name, whether that is a folder or a file."""
    return module.partition(".")[0] or "__init__"


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """The modules that one imports, and whether from within a function."""
    path = MODULES[module]
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    package = [part for part in package if part]
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            targets = [f"gpt2fast.{source}.{alias.name}".replace("..", ".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            first, _, rest = target.partition(".")
            if first != "gpt2fast":
                continue
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            yield rest, id(node) in inside


def test_every_room_has_a_floor() -> None:
    named = [name for floor in FLOORS for name in floor]
    assert len(set(named)) == len(named)
    assert {room(module) for module in MODULES} == set(named)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    here = room(module)
    for target, in_function in imports(module):
        there = room(target)
        if there == here or HEIGHTS[there] < HEIGHTS[here]:
            continue
        if there == "__init__":  # the package's public names and version
            continue
        assert in_function and (module, there) in DOORS, (
            f"{module} imports {target}, which is above"
        )


def test_every_door_is_used() -> None:
    used = {
        (module, room(target))
        for module in MODULES
        for target, in_function in imports(module)
        if in_function
    }
    assert used >= DOORS


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {
        module: {target for target, _ in imports(module) if target != module} for module in MODULES
    }
    for module, targets in graph.items():  # doors are the exception
        graph[module] = {target for target in targets if (module, room(target)) not in DOORS}
        if MODULES[module].stem == "__init__":  # a package hands on names of its files
            graph[module] = {target for target in graph[module] if room(target) != room(module)}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in finished:
            return
        for target in sorted(graph[module]):
            visit(target, (*trail, module))
        finished.add(module)

    for module in graph:
        visit(module, ())
