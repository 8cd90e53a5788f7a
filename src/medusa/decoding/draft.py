"""Drafts: trees of guessed tokens, who proposes them, and how proposals become one.

A drafter sees a `Row` (one text being decoded) and returns a `Draft` whose nodes carry an estimated probability of
being accepted. `UnionDrafter` merges the drafts of several and keeps the best nodes. A wrong estimate costs speed,
never correctness: what is kept is decided in `accept.py` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from medusa.decoding.tree import best_nodes
from medusa.engines.topology import Parents, Topology, topology
from medusa.errors import UsageError

if TYPE_CHECKING:
    from medusa.decoding.stepper import Row

MODEL = "model"  # the source of tokens that the model itself decided


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree of N tokens. Node 0 is the root; `probabilities[i]` estimates that the whole path to node i is right."""

    tokens: tuple[int, ...]
    parents: Parents = (-1,)
    probabilities: tuple[float, ...] = (1.0,)
    sources: tuple[str, ...] = (MODEL,)

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.parents) == len(self.probabilities) == len(self.sources):
            raise UsageError("a draft needs a token, a parent, a probability and a source for each of its nodes")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def topology(self) -> Topology:
        return topology(self.parents)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that holds `token`, if the draft has one."""
        for i in range(node + 1, len(self.tokens)):
            if self.parents[i] == node and self.tokens[i] == token:
                return i
        return None

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to `node`, both included."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(self.parents[nodes[-1]])
        return tuple(reversed(nodes))

    def pruned(self, *, nodes: int, depth: int) -> Draft:
        """The best `nodes` nodes no deeper than `depth`."""
        depths = [0] * len(self)  # not `topology`: its cache is for the trees that are verified, not for candidates
        for node in range(1, len(self)):
            depths[node] = depths[self.parents[node]] + 1
        if len(self) <= nodes and max(depths) <= depth:
            return self
        shallow = [p if d <= depth else -1.0 for p, d in zip(self.probabilities, depths, strict=True)]
        kept = [i for i in best_nodes(self.parents, shallow, nodes) if depths[i] <= depth]
        index = {node: i for i, node in enumerate(kept)}
        return Draft(
            tuple(self.tokens[i] for i in kept),
            tuple(index[self.parents[i]] if i else -1 for i in kept),
            tuple(self.probabilities[i] for i in kept),
            tuple(self.sources[i] for i in kept),
        )


def merge(drafts: Iterable[Draft]) -> Draft:
    """One tree that holds every path of every draft once; all must share the root.

    A path that two drafters propose is likelier than either says, so their estimates are joined as if independent,
    1 - (1 - a)(1 - b): it keeps falling along a path, whatever the drafters. The surer drafter is named the source.
    """
    index: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents, probabilities, best, sources = [-1], [1.0], [1.0], [MODEL]
    for draft in drafts:
        if not tokens:
            tokens.append(draft.tokens[0])
        elif tokens[0] != draft.tokens[0]:
            raise UsageError("drafts can be merged only when they start from the same root token")
        place = [0] * len(draft)
        for node in range(1, len(draft)):
            key = (place[draft.parents[node]], draft.tokens[node])
            probability = draft.probabilities[node]
            at = index.get(key)
            if at is None:
                at = index[key] = len(tokens)
                tokens.append(draft.tokens[node])
                parents.append(key[0])
                probabilities.append(probability)
                best.append(probability)
                sources.append(draft.sources[node])
            else:
                probabilities[at] += probability * (1 - probabilities[at])
                if probability > best[at]:
                    best[at], sources[at] = probability, draft.sources[node]
            place[node] = at
    return Draft(tuple(tokens), tuple(parents), tuple(probabilities), tuple(sources))


class Drafter(Protocol):
    """Proposes a tree of at most `nodes` nodes (the root counts) for each row."""

    name: str

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]: ...


class NoDrafter:
    """Proposes nothing: plain decoding."""

    name = "none"

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        return [Draft((row.tokens[-1],)) for row in rows]


class UnionDrafter:
    """The best nodes of several drafters in one tree."""

    name = "union"

    def __init__(self, *drafters: Drafter) -> None:
        self.drafters = drafters

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        proposals = [drafter.propose(rows, nodes) for drafter in self.drafters]
        return [merge(drafts).pruned(nodes=nodes, depth=nodes) for drafts in zip(*proposals, strict=True)]


@dataclass(slots=True)
class NgramMemory:
    """What the n-gram drafter knows of one row: where each n-gram last ended, and how well it has guessed so far."""

    last: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> index of the token after it
    indexed: int = 0  # tokens[:indexed] have been read
    start: int = 0  # where the last chain began
    chain: tuple[int, ...] = ()
    order: int = 0  # n of the n-gram that gave the last chain
    right: dict[tuple[int, int], float] = field(default_factory=dict)  # (n, place in the chain) -> decayed count
    tried: dict[tuple[int, int], float] = field(default_factory=dict)


# How often a copied token is right where those before it were: for the n of the n-gram, by place in the chain (the
# last value goes for all later places). Measured on 250 greedy answers of smollm2-135m.
NGRAM_PRIOR = {
    3: (0.70, 0.76, 0.80, 0.84),
    2: (0.49, 0.55, 0.65, 0.76),
    1: (0.19, 0.50, 0.60, 0.73),
}


class NgramDrafter:
    """Looks the last tokens up in prompt and output, and proposes what followed them last time.

    One chain of up to `length` tokens after the longest of the n-grams (n = 3, 2, 1) that occurred before. Cost per
    token is constant. Its estimates start from what was measured on self-distilled text of the default model and move
    with the row: copying pays in one text and not in the next.
    """

    name = "ngram"
    orders = (3, 2, 1)
    weight = 4.0  # the prior counts like this many observations
    fade = 0.98  # of what was observed, with each observation

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        return [self._propose(row, min(self.length, nodes - 1)) for row in rows]

    def _propose(self, row: Row, length: int) -> Draft:
        memory: NgramMemory = row.notes.setdefault(self, NgramMemory())
        tokens = row.tokens
        self._learn(memory, tokens)
        for end in range(max(1, memory.indexed), len(tokens)):  # n-grams whose next token is tokens[end]
            for n in self.orders:
                if end >= n:
                    memory.last[tuple(tokens[end - n : end])] = end
        memory.indexed = len(tokens)
        for n in self.orders:
            at = memory.last.get(tuple(tokens[-n:])) if len(tokens) > n else None
            if at is not None:
                break
        else:
            memory.chain = ()
            return Draft((tokens[-1],))
        # Past the end of the text the chain goes on with itself: a text that repeats is drafted as far as wanted.
        chain: list[int] = []
        for i in range(length):
            chain.append(tokens[at + i] if at + i < len(tokens) else chain[at + i - len(tokens)])
        memory.start, memory.chain, memory.order = len(tokens), tuple(chain), n
        sure, probabilities = 1.0, [1.0]
        for i in range(length):
            sure *= self._estimate(memory, n, i)
            probabilities.append(sure)
        return Draft(
            (tokens[-1], *chain),
            tuple(range(-1, length)),
            tuple(probabilities),
            (MODEL, *(self.name for _ in chain)),
        )

    def _learn(self, memory: NgramMemory, tokens: Sequence[int]) -> None:
        """Compares the last chain with what the text became, whether or not its nodes were in the tree."""
        for i, (guess, token) in enumerate(zip(memory.chain, tokens[memory.start :], strict=False)):
            key = _cell(memory.order, i)
            memory.tried[key] = self.fade * memory.tried.get(key, 0.0) + 1.0
            memory.right[key] = self.fade * memory.right.get(key, 0.0) + (guess == token)
            if guess != token:
                break
        memory.chain = ()

    def _estimate(self, memory: NgramMemory, n: int, place: int) -> float:
        key = _cell(n, place)
        right = memory.right.get(key, 0.0) + self.weight * NGRAM_PRIOR[n][key[1]]
        return right / (memory.tried.get(key, 0.0) + self.weight)


def _cell(n: int, place: int) -> tuple[int, int]:
    return n, min(place, len(NGRAM_PRIOR[n]) - 1)
