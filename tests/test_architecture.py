"""The order of the rooms: imports run one way, and each file can be read by itself.

A room is a package or a file of `medusa`. A room may import those named before it, wherever the import stands: at the
top, in a function, or for types alone.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOMS = (
    "errors",  # what a caller is told
    "settings",  # declared once
    "files",  # whole or not at all
    "remote",  # servers with the OpenAI interface
    "text",  # chat templates, streams, turns
    "heads",  # the heads: configuration, module, files
    "engines",  # what runs a model
    "decoding",  # draft, verify, accept
    "grammar",  # JSON, schemas and calls of tools as constraints
    "completion",  # steps -> chunks of characters
    "plots",
    "device",  # the same as one step on a GPU
    "native_stepper",  # the same with drafts and choices in the engine
    "steppers",  # who drafts, by name
    "models",  # names and files -> models that run
    "api",  # medusa.load
    "interop",  # heads of other projects and engines
    "hf",  # inside transformers' generate
    "terminal",
    "training",
    "evaluation",
    "chat",
    "serve",  # an OpenAI-compatible server
    "cli",
)
MOST_LINES = 450
SOURCES = Path(__file__).parents[1] / "src"


@dataclass(frozen=True)
class Module:
    """One file, and the modules of ours that it names: those it imports, and those it needs for types alone."""

    path: Path
    imports: frozenset[str]
    typing: frozenset[str]

    @property
    def room(self) -> str:
        return self.path.relative_to(SOURCES / "medusa").with_suffix("").parts[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(path: Path) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    for_types = {id(node) for block in blocks for statement in block.body for node in ast.walk(statement)}
    found: dict[bool, set[str]] = {False: set(), True: set()}
    for node in ast.walk(tree):
        found[id(node) in for_types].update(named(node))
    return Module(path, frozenset(found[False]), frozenset(found[True]))


def named(node: ast.AST) -> list[str]:
    """The modules of ours that a piece of code names; what is taken from `medusa` itself comes from its home."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.startswith("medusa.")]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "an import names its module in full"
        module = node.module or ""
        if module != "medusa" and not module.startswith("medusa."):
            return []
        modules = [f"{module}.{alias.name}" for alias in node.names]
        return [name if name in FILES else HOMES.get(name, module) for name in modules]
    if isinstance(node, ast.Attribute) and ast.unparse(node) in HOMES:  # medusa.load(...)
        return [HOMES[ast.unparse(node)]]
    return []


FILES = {name_of(path): path for path in sorted((SOURCES / "medusa").rglob("*.py"))}
HOMES = {  # medusa.load -> medusa.api
    f"medusa.{alias.name}": str(node.module)
    for node in ast.walk(ast.parse(FILES["medusa"].read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if str(node.module).startswith("medusa.")
}
MODULES = {name: read(path) for name, path in FILES.items() if name != "medusa"}


def test_every_room_has_its_place_in_the_order() -> None:
    assert sorted({module.room for module in MODULES.values()}) == sorted(ROOMS)


def test_imports_run_from_later_rooms_to_earlier_ones() -> None:
    wrong = [
        f"{name} may not import {other}"
        for name, module in MODULES.items()
        for other in module.imports | module.typing
        if other == "medusa" or ROOMS.index(MODULES[other].room) > ROOMS.index(module.room)
    ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: module.imports for name, module in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_a_package_imports_nothing_by_itself() -> None:
    """Else who imports one of its files waits for all of them. `medusa.cli` is the command itself."""
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"} - {"medusa", "medusa.cli"}
    for name in packages:
        body = ast.parse(FILES[name].read_text(encoding="utf-8")).body
        assert len(body) == 1, f"{name} holds more than its docstring"
        assert isinstance(body[0], ast.Expr)


def test_every_module_is_imported_by_another_or_is_run() -> None:
    used = {*HOMES.values()}.union(*(module.imports for module in MODULES.values()))
    for name, module in MODULES.items():
        text = module.path.read_text(encoding="utf-8")
        is_run = '__name__ == "__main__"' in text or module.path.name in ("__main__.py", "__init__.py")
        assert name in used or is_run, f"nobody imports {name}"


def test_no_file_is_longer_than_can_be_read_at_once() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
