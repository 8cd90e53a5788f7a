"""The shape of a tree of tokens: parent pointers, and what a forward pass needs of them.

A tree of N nodes is a tuple of N parents. Node 0 is the root (parent -1): the token that is already decided but not
yet in the KV cache. Every other node comes after its parent.

       root            parents = (-1, 0, 0, 1, 1)
       /  \\            depths  = ( 0, 1, 1, 2, 2)
      1    2           mask[3] = nodes 0, 1 and 3: a node sees its ancestors and itself
     / \\
    3   4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from medusa.errors import UsageError

Parents = tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """What a forward pass needs to know of a tree of N nodes."""

    parents: Parents
    depths: npt.NDArray[np.int64]  # [N], the root has depth 0
    mask: npt.NDArray[np.bool_]  # [N, N], mask[i, j]: node i may attend to node j (an ancestor, or itself)


@lru_cache(maxsize=1024)
def topology(parents: Parents) -> Topology:
    """Depths and ancestor mask of a tree; a fixed tree is thus computed once and looked up ever after."""
    check_parents(parents)
    size = len(parents)
    depths = np.zeros(size, dtype=np.int64)
    mask = np.eye(size, dtype=np.bool_)
    for node in range(1, size):
        depths[node] = depths[parents[node]] + 1
        mask[node] |= mask[parents[node]]
    depths.setflags(write=False)
    mask.setflags(write=False)
    return Topology(parents, depths, mask)


def check_parents(parents: Sequence[int]) -> None:
    """Raises UsageError unless node 0 is the only root and every parent comes before its child."""
    if not parents or parents[0] != -1:
        raise UsageError("a tree starts with its root: parents[0] must be -1")
    for node, parent in enumerate(parents[1:], start=1):
        if not 0 <= parent < node:
            raise UsageError(f"node {node} of a tree has parent {parent}: it must be an earlier node")
