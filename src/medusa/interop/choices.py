"""`medusa_choices`: how others write a tree, a list of rank paths such as [[0], [0, 0], [1]].

It says which guesses are verified, not how likely they are: probabilities are lost when a tree is written so, and
made up when one is read. `medusa calibrate` measures them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medusa.decoding.tree import RankPath, Tree
from medusa.errors import MedusaError, UsageError, shortened

CHOICES_FILE = "medusa_choices.json"
CalibratedTree = tuple[tuple[RankPath, float], ...]


def read_choices(path: Path, name: str | None = None) -> list[RankPath]:
    """The tree in a file: JSON, a Python list, or Python assignments of lists such as `medusa_choices.py`, of which
    `name` picks one. Nothing of a Python file is executed.

    Raises:
        UsageError: the file holds several trees and no name is given, or none of that name.
        MedusaError: there is no such file, or it is not understood.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MedusaError(f"cannot read the tree {path}: {error}") from None
    try:
        body = ast.parse(text).body
        named: dict[str, ast.expr] = {}
        bare: list[ast.expr] = []
        for statement in body:
            if isinstance(statement, ast.Assign) and all(isinstance(to, ast.Name) for to in statement.targets):
                named |= {to.id: statement.value for to in statement.targets if isinstance(to, ast.Name)}
            elif isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant):
                bare.append(statement.value)
            elif not isinstance(statement, ast.Expr):
                raise MedusaError(f"{path} holds more than lists: line {statement.lineno}")
        if name is not None and name not in named:
            raise UsageError(f"{path} has no tree {name}; it has {', '.join(named) or 'one without a name'}")
        chosen = [named[name]] if name is not None else [*bare, *named.values()]
        if len(chosen) != 1:
            several = f"several trees: choose one, as in {path}:{next(iter(named), 'NAME')}" if chosen else "no tree"
            raise UsageError(f"{path} holds {several}" + (f" ({', '.join(named)})" if named else ""))
        value = ast.literal_eval(chosen[0])
    except MedusaError:  # a UsageError is a ValueError too
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise MedusaError(f"{path} is no list of rank paths such as [[0], [0, 0], [1]], in JSON or in Python") from None
    return parse_choices(value, str(path))


def parse_choices(value: Any, where: str) -> list[RankPath]:
    """Rank paths of what a file or a config holds, in its order. Raises MedusaError: it is no tree."""

    def is_path(path: Any) -> bool:
        whole = isinstance(path, (list, tuple)) and len(path) > 0
        return whole and all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in path)

    if not isinstance(value, (list, tuple)) or not value:
        raise MedusaError(f"{where} holds no list of rank paths, but {shortened(value)}")
    for path in value:
        if not is_path(path):
            raise MedusaError(f"{where} has {shortened(path)} where a rank path such as [0, 2] should stand")
    paths = [tuple(path) for path in value]
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise MedusaError(f"{where} has the path {list(twice)} twice")
    try:
        Tree.from_paths(paths)
    except UsageError as error:
        raise MedusaError(f"{where}: {error}") from None
    return paths


def with_probabilities(paths: Iterable[Sequence[int]]) -> CalibratedTree:
    """The tree as heads keep it. No one measured how likely its nodes are: each rank is taken to be right half as
    often as the one before it, which orders the nodes sensibly."""
    return tuple((tuple(path), 0.5 ** sum(rank + 1 for rank in path)) for path in paths)


def format_choices(tree: CalibratedTree) -> str:
    """The tree as JSON, which is a Python list too, shortest paths first."""
    return json.dumps([list(path) for path in sorted((path for path, _ in tree), key=lambda path: (len(path), path))])
