"""The floors of the house: imports go downward only."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import shardwise
from shardwise import checkpoint

ROOT = Path(shardwise.__file__).parent
# Lower floors first. A module may import its own floor and those below.
FLOORS = [
    ["errors", "events", "trees", "lazy", "naming", "sizes", "host", "datasheets"],
    ["strategy", "environment", "deepspeed_config"],
    ["layout", "placement", "device", "quantization"],
    ["comm"],
    ["tiers"],
    ["engine"],
    ["operations", "observe"],
    ["plan"],
    ["rng"],
    ["data_loader", "checkpoint", "logging"],
    ["stepping", "gradient_state", "optimizer", "scheduler"],
    ["fsdp"],
    ["inference"],
    ["report"],
    ["compat"],  # from here on: the door that looks like Accelerate's
    ["utils", "state", "tracking", "hooks", "big_modeling"],
    ["accelerator", "joining", "local_sgd", "deepspeed", "lightning", "ray"],
    ["transformers", "aliases"],
    ["__init__"],
    ["cli", "launchers", "__main__"],
]
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names}


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers read."""
    left = [tree]
    while left:
        node = left.pop()
        if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            yield node
            left += ast.iter_child_nodes(node)


def imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "shardwise":
            parts = node.module.split(".")
            found |= (
                {parts[1]} if len(parts) > 1 else {a.name if a.name in FLOOR_OF else "__init__" for a in node.names}
            )
        elif isinstance(node, ast.Import):
            for a in node.names:
                parts = a.name.split(".")
                if parts[0] == "shardwise":
                    found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


@cache
def imports(path: Path) -> tuple[set[str], set[str]]:
    """Of a file, what it imports as it runs; and that with what type checkers read."""
    tree = ast.parse(path.read_text())
    return imports_of(running(tree)), imports_of(ast.walk(tree))


def test_every_module_has_a_floor():
    top = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert top <= set(FLOOR_OF), f"give a floor to {sorted(top - set(FLOOR_OF))}"


def test_imports_go_downward():
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in imports(path)[0]:
            assert FLOOR_OF[other] <= FLOOR_OF[name], f"{path.relative_to(ROOT)} imports {other}, a floor above it"


def siblings(path: Path) -> set[Path]:
    """The files of its own package that a file imports, wherever in it and for whoever: types and functions, too."""
    package = ".".join(("shardwise", *path.parent.relative_to(ROOT).parts))
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module if not node.level else f"{package}.{node.module}"
            found |= {module, *(f"{module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{package}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    names = {name.removeprefix(f"{package}.").split(".")[0] for name in found if name.startswith(f"{package}.")}
    files = {file for name in names if (file := path.with_name(f"{name}.py")).is_file()}
    public = any(not path.with_name(f"{name}.py").is_file() and not path.with_name(name).is_dir() for name in names)
    return (files | ({path.with_name("__init__.py")} if public else set())) - {path}


def circle(edges: dict[Path, set[Path]]) -> list[Path]:
    """Files that import each other in a ring; empty if there are none."""
    above: list[Path] = []
    done: set[Path] = set()

    def visit(file: Path) -> list[Path]:
        if file in above:
            return above[above.index(file) :]
        if file in done:
            return []
        above.append(file)
        for other in sorted(edges[file]):
            if found := visit(other):
                return found
        above.pop()
        done.add(file)
        return []

    return next((found for file in sorted(edges) if (found := visit(file))), [])


@pytest.mark.parametrize(
    "package", ["comm", "tiers", "engine", "checkpoint", "inference", "quantization", "plan", "cli"]
)
def test_no_circle_of_files_inside_a_package(package):
    files = list((ROOT / package).glob("*.py"))
    edges = {path: siblings(path) for path in files}
    assert sum(map(len, edges.values())) > len(files) // 2, "imports between files are no longer found"
    assert not (found := circle(edges)), " -> ".join(path.name for path in found)


def test_a_circle_is_found():
    a, b, c = (Path(name) for name in "abc")
    assert circle({a: {b}, b: {c}, c: {b}}) == [b, c]
    assert circle({a: {b, c}, b: {c}, c: set()}) == []


def test_the_core_does_not_know_the_door():
    """Not inside functions, not for type checkers either."""
    door = {name for name, floor in FLOOR_OF.items() if floor >= FLOOR_OF["compat"]}
    core = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") not in door]
    assert len(core) > 80
    for path in core:
        known = imports(path)[1] & {"compat", "utils"}
        assert not known, f"{path.relative_to(ROOT)} imports {known}"


def test_layout_and_strategy_know_no_torch():
    for name in ("layout.py", "placement.py", "strategy.py", "errors.py"):
        assert "import torch" not in (ROOT / name).read_text()


@pytest.mark.parametrize("package", [shardwise, checkpoint])
def test_the_lists_of_public_names_agree(package):
    """The lazy table of a package, the imports that type checkers and editors read, and ``__all__``."""
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    imported = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    modules = dict.fromkeys(getattr(package, "_MODULES", ()), package.__name__)
    assert imported == {name: f"{package.__name__}.{home}" for name, home in package._HOME.items()} | modules
    spelled = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    assert sorted(ast.literal_eval(spelled)) == sorted(imported)  # mypy --strict takes nothing but a literal
    for name in package.__all__:
        assert getattr(package, name) is not None
    modules = {path.stem for path in Path(package.__file__).parent.iterdir()}
    assert not modules & set(package._HOME), "importing that module would put it in the place of the name"


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").exists()
    stubs = {path.stem for path in (ROOT / "utils").glob("*.pyi")}
    assert stubs == {path.stem for path in (ROOT / "compat").glob("*.py")} - {"__init__"}
