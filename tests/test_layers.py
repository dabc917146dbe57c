"""The floors of the house: who may import whom, at module level and inside functions, and no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("engines", "runtime", "export", "benchmarks", "cli")
"""From the ground up. A module imports its own floor and those below; `cli` is the command line."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(path): path
    for top in ("engines", "runtime", "export", "benchmarks")
    for path in (ROOT / top).rglob("*.py")
}


def floor_of(module: str) -> str:
    first = module.split(".")[:2]
    return "cli" if first == ["runtime", "cli"] or module == "runtime.__main__" else first[0]


def imports(module: str, *, lazy: bool) -> Iterator[tuple[str, int]]:
    """Yield our modules that a module imports, with the line; `lazy` also those inside functions and type checks."""
    path = FILES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{origin}.{alias.name}"
                yield (target if target in FILES else origin), node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "latentrt" for name in names), f"{path}: import relatively"


@pytest.mark.parametrize("module", sorted(FILES))
def test_modules_import_downwards(module: str) -> None:
    allowed = FLOORS[: FLOORS.index(floor_of(module)) + 1]
    for target, line in imports(module, lazy=True):
        assert floor_of(target) in allowed, f"{FILES[module]}:{line} imports {target}"


def test_no_import_circles() -> None:
    graph = {module: {target for target, _ in imports(module, lazy=True) if target != module} for module in FILES}
    list(TopologicalSorter(graph).static_order())


def test_rooms_are_small() -> None:
    folders: dict[Path, int] = {}
    for path in FILES.values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
        assert len(path.relative_to(ROOT).parts) <= 3, f"{path}: one level of subpackages"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path
    assert max(folders.values()) <= 16, max(folders, key=lambda folder: folders[folder])
