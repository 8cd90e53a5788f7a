"""The fixed tree of a step as constants on the device: parents, depths, ancestors, paths, and who guesses which node.

Nodes are those of the heads' tree, root first, and after them a chain for tokens that the host proposes:

        root                the heads' tree: root, 1, 2, 3
       /  |  \\
      1   2   4             the chain: 4, 5, 6 (its first node follows the root too)
      |       |
      3       5
              |
              6

Two nodes may hold the same token: then either path is as good, and the deeper one is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.decoding.tree import Tree
from medusa.engines.topology import Parents, topology

ROOT = Tree((-1,), (-1,), (1.0,))


@dataclass(frozen=True)
class Level:
    """What head k guesses: `ranks[i]` is the rank of node i of this level among the guesses after its parent, which is
    node `places[i]` of the level above. `width` is how many guesses of the head are needed."""

    places: Tensor  # [M]
    ranks: Tensor  # [M]
    width: int


class FixedShape:
    """N nodes: those of `tree` and a chain of `chain` more.

    Attributes (N nodes, D the greatest depth):
        parents: of each node; -1 for the root.
        levels: of the heads' tree, from the first that is guessed.
        order: [len(tree)] where node i stands in the levels one after another.
        depths: [N].
        ancestors: [N, N] bool, ancestors[i, j]: j is i or an ancestor of i.
        above: [N] the parent; the root is its own.
        paths: [N, D + 1] the nodes from the root to each node; past its end, the node itself.
        path_list: the same on the host, without what is past the end.
    """

    def __init__(self, tree: Tree, chain: int, device: torch.device) -> None:
        self.tree, self.chain = tree, chain
        first = len(tree)
        links = (0, *range(first, first + chain - 1))[:chain]
        self.parents: Parents = (*tree.parents, *links)
        shape = topology(self.parents)
        self.depth = int(shape.depths.max())
        self.depths = torch.from_numpy(shape.depths.copy()).to(device)
        self.ancestors = torch.from_numpy(shape.mask.copy()).to(device)
        self.above = torch.tensor(self.parents, device=device).clamp_min(0)
        self.path_list: list[tuple[int, ...]] = [(0,)]
        for node, parent in enumerate(self.parents[1:], start=1):
            self.path_list.append((*self.path_list[parent], node))
        longest = self.depth + 1
        padded = [(*path, *[path[-1]] * (longest - len(path))) for path in self.path_list]
        self.paths = torch.tensor(padded, device=device)
        self.levels = tuple(_level(tree, k, device) for k in range(1, tree.depth + 1))
        placed = [node for level in tree.levels for node in level]
        self.order = torch.tensor([placed.index(node) for node in range(first)], device=device)
        self.by_depth = tuple(
            torch.tensor([node for node, d in enumerate(shape.depths) if d == depth], device=device)
            for depth in range(longest)
        )

    def __len__(self) -> int:
        return len(self.parents)


def _level(tree: Tree, k: int, device: torch.device) -> Level:
    above, nodes = list(tree.levels[k - 1]), tree.levels[k]
    places = [above.index(tree.parents[node]) for node in nodes]
    ranks = [tree.ranks[node] for node in nodes]
    return Level(torch.tensor(places, device=device), torch.tensor(ranks, device=device), max(ranks) + 1)
