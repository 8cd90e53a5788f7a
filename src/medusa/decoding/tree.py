"""Fixed trees of ranks: which guesses of which head are worth verifying, decided before any text is seen.

A rank path (0, 2) means: the best guess of head 1, then the third best of head 2. This file knows nothing of tokens;
`draft.py` hangs tokens on a tree, `engines/topology.py` derives its mask.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from medusa.engines.topology import Parents, check_parents
from medusa.errors import UsageError

RankPath = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A fixed tree of ranks: node i is the `ranks[i]`-th best guess of the head at its depth (0 is the best).

    The root has rank -1. `probabilities[i]`, where known, is how often every rank on the path to node i was right on
    calibration text; it falls along children and siblings, so the N best paths are always a tree.
    """

    parents: Parents
    ranks: tuple[int, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        check_parents(self.parents)
        if not len(self.parents) == len(self.ranks) == len(self.probabilities):
            raise UsageError("a tree needs one rank and one probability for each of its nodes")
        if any(rank < 0 for rank in self.ranks[1:]):
            raise UsageError("ranks in a tree count from 0")

    def __len__(self) -> int:
        return len(self.parents)

    @classmethod
    def from_paths(cls, paths: Mapping[RankPath, float] | Iterable[Sequence[int]]) -> Tree:
        """A tree from rank paths such as [[0], [0, 0], [1]], with probabilities where `paths` maps to them.

        Missing prefixes are an error, because a path without its prefix cannot be verified.
        """
        table = (
            {tuple(path): float(f) for path, f in paths.items()}
            if isinstance(paths, Mapping)
            else {tuple(path): 0.0 for path in paths}
        )
        table.pop((), None)
        index: dict[RankPath, int] = {(): 0}
        parents, ranks, probabilities = [-1], [-1], [1.0]
        for path in sorted(table, key=lambda p: (len(p), p)):
            if path[:-1] not in index:
                raise UsageError(f"the tree has the path {list(path)} but not its prefix {list(path[:-1])}")
            index[path] = len(parents)
            parents.append(index[path[:-1]])
            ranks.append(path[-1])
            probabilities.append(table[path])
        return cls(tuple(parents), tuple(ranks), tuple(probabilities))

    @classmethod
    def cartesian(cls, *top: int) -> Tree:
        """Every combination of the best `top[k]` guesses of head k: `Tree.cartesian(2, 3)` has 1 + 2 + 6 nodes."""
        if any(count < 1 for count in top):
            raise UsageError("every head of a Cartesian tree needs at least one guess")
        levels = (itertools.product(*map(range, top[:depth])) for depth in range(1, len(top) + 1))
        return cls.from_paths(itertools.chain.from_iterable(levels))

    @cached_property
    def paths(self) -> tuple[RankPath, ...]:
        """The rank path of each node; the root's is empty."""
        found: list[RankPath] = [()]
        for node in range(1, len(self)):
            found.append((*found[self.parents[node]], self.ranks[node]))
        return tuple(found)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes by depth, the root's level first."""
        found: list[list[int]] = [[] for _ in range(max(map(len, self.paths)) + 1)]
        for node, path in enumerate(self.paths):
            found[len(path)].append(node)
        return tuple(map(tuple, found))

    @property
    def depth(self) -> int:
        """Depth of the deepest node: how many heads the tree uses."""
        return len(self.levels) - 1

    @property
    def widest_rank(self) -> int:
        """How many guesses the tree needs of a head at most."""
        return max(self.ranks) + 1

    def expected_tokens(self) -> float:
        """E(N) = 1 + the sum of f over the tree: tokens per step where the calibration holds."""
        return 1.0 + sum(self.probabilities[1:])

    def best(self, nodes: int) -> Tree:
        """The `nodes` most probable nodes (the root counts), as a tree. Ties go to the earlier node."""
        kept = best_nodes(self.parents, self.probabilities, nodes)
        return Tree.from_paths({self.paths[i]: self.probabilities[i] for i in kept})


def best_nodes(parents: Sequence[int], probabilities: Sequence[float], nodes: int) -> list[int]:
    """The `nodes` most probable nodes that form a tree with the root, parents first.

    Best-first from the root: optimal when probabilities fall along every path, prefix-closed even when they do not.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    kept: list[int] = []
    frontier = [(-1.0, 0)]
    while frontier and len(kept) < nodes:
        _, node = heapq.heappop(frontier)
        kept.append(node)
        for child in children[node]:
            heapq.heappush(frontier, (-probabilities[child], child))
    return sorted(kept)
