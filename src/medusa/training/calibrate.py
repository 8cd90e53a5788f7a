"""From held-out text to the best tree, and from the machine's speed to its best size.

f(path) is how often all ranks on a path are right, counted jointly: the root and the N - 1 likeliest paths are the
optimal fixed tree of N nodes, which gives E(N) = 1 + the sum of their f tokens per step. A pass over N nodes takes t(N)
here, so N* = argmax E(N) / t(N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medusa.decoding.budget import PassTimes
from medusa.decoding.tree import Tree
from medusa.errors import MedusaError
from medusa.evaluation.plots import draw_accuracy, draw_tree
from medusa.models.backend import Backend
from medusa.models.heads import Heads, write_config
from medusa.training.accuracy import TREE_NODES, Accuracy, ranks
from medusa.training.data import Example
from medusa.training.features import joined, read_rows

DRAWN_NODES = 32  # a picture of more is hard to read
BATCH = 1024


@dataclass(frozen=True, slots=True)
class Size:
    """A tree of `nodes` nodes: tokens per step E(N), time of a step t(N), and how much faster than plain decoding."""

    nodes: int
    expected_tokens: float
    seconds: float
    speed_up: float


def measure(heads: Heads, backend: Backend, examples: Sequence[Example]) -> Accuracy:
    """The heads' accuracy on texts that they have not learned from. Raises MedusaError where there is no such text."""
    parts = [part for part in (read_rows(backend, example) for example in examples) if len(part[1])]
    if not parts:
        raise MedusaError("there is nothing to calibrate on: no answer in the text")
    table = joined(parts)
    levels, size = heads.config.num_heads, heads.config.hidden_size
    import torch

    batches = (table.take(rows, levels, size, finals=False) for rows in torch.arange(len(table)).split(BATCH))
    found = ranks(heads, batches)
    if not len(found):
        raise MedusaError(f"every answer is shorter than the {levels + 1} tokens that {levels} heads look at")
    return Accuracy.of(found)


def sizes(accuracy: Accuracy, times: PassTimes) -> list[Size]:
    """What the best tree of each size up to 64 nodes would give; drafting counts."""
    found = []
    for nodes in range(1, TREE_NODES + 1):
        expected = accuracy.expected_tokens(nodes)
        seconds = times(nodes) + (times.draft_seconds if nodes > 1 else 0.0)
        found.append(Size(nodes, expected, seconds, expected / seconds * times(1)))
    return found


def best_size(candidates: Sequence[Size]) -> Size:
    """N*: the fastest. One node is plain decoding, which wins where no tree pays."""
    return max(candidates, key=lambda size: (size.speed_up, -size.nodes))


def store(heads: Heads, accuracy: Accuracy, directory: Path) -> None:
    """Writes the tree into the heads' config, and pictures of tree and accuracies beside it."""
    heads.config = replace(heads.config, tree=accuracy.tree)
    write_config(heads.config, directory)
    draw(accuracy, directory)


def draw(accuracy: Accuracy, directory: Path) -> None:
    """tree.svg and accuracy.svg."""
    tree = Tree.from_paths(dict(accuracy.tree))
    draw_tree(tree.best(DRAWN_NODES), directory / "tree.svg")
    draw_accuracy(accuracy.top, directory / "accuracy.svg")
