"""Drafting with Medusa heads: a fixed tree of ranks, or a tree grown anew at each step by the heads' probabilities.

Exact sampling draws argmax(log p / T + g), and its noise g is known before p is. A tree that grows guesses by the same
noise: argmax(log q / T + g) is far likelier to be what will be drawn than argmax q is, and the nearer q is to p, the
likelier. (Known from drafter-invariant speculative decoding, https://arxiv.org/abs/2408.07978, there for chains.)

Both go level by level: the nodes of one level ask the next head for their children in one product. The heads run at
the last accepted node only, never on the prompt and never on rejected nodes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from medusa.decoding.draft import MODEL, Draft
from medusa.decoding.sampling import rough_noise
from medusa.decoding.stepper import Row
from medusa.decoding.tree import Tree
from medusa.errors import UsageError
from medusa.heads.module import HeadsRunner, Tilt


@dataclass(slots=True)
class HeadsMemory:
    """What the drafter knows of one row: its last draft, and how often its guesses came true."""

    draft: Draft | None = None
    start: int = 0  # where the last draft began
    ratio: float = 1.0  # as it was then
    right: float = 0.0  # decayed count of guesses that came true
    expected: float = 0.0  # and of those that the heads themselves expected to
    noise: dict[int, Tensor] = field(default_factory=dict)  # of positions to come, for the tokens that heads propose


class HeadsDrafter:
    """`tree` is the fixed tree; without one each step grows its own.

    The dynamic tree expands, at each level, the `beam` nodes of greatest probability (the product along the path)
    with their `branch` best children, and keeps the best N nodes of all; `beam` and `branch` follow from N. It ends
    before the last head where deeper nodes cannot be among the N, or are too unlikely for the time of a level.

    Heads may be surer than they should be, by the text. So each row keeps what they expected of the children of right
    nodes beside what came true, and the ratio corrects every estimate of a child, given its parent.
    """

    name = "heads"
    weight = 4.0  # the prior, that the heads are right about themselves, counts like this many expected guesses
    fade = 0.95  # of what was observed, with each observation
    # With noise, guess i is taken to be right with the share of exp(sureness * (log q / T + g)): measured, see
    # docs/decisions.md. It moves nodes between the branches of a tree; which child is the best does not depend on it.
    sureness = 0.8

    def __init__(self, heads: HeadsRunner, tree: Tree | None = None) -> None:
        if tree is not None and tree.depth > heads.config.num_heads:
            raise UsageError(f"the tree is {tree.depth} levels deep, but there are {heads.config.num_heads} heads")
        if tree is not None and tree.widest_rank > heads.lm_head_rows:
            raise UsageError(
                f"the tree asks for the best {tree.widest_rank} guesses of a head, but there are {heads.lm_head_rows}"
            )
        self.heads = heads
        self.tree = tree

    @torch.inference_mode()
    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        drafts = [Draft((row.tokens[-1],)) for row in rows]
        asked = [b for b, row in enumerate(rows) if not row.frugal]
        if nodes >= 2 and asked:
            for b, draft in zip(asked, self._propose([rows[b] for b in asked], nodes), strict=True):
                drafts[b] = draft
        return drafts

    def _propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        memories: list[HeadsMemory] = [row.notes.setdefault(self, HeadsMemory()) for row in rows]
        for memory, row in zip(memories, rows, strict=True):
            self._learn(memory, row.tokens)
        ratios = [memory.ratio for memory in memories]
        features = torch.stack([row.features for row in rows]).to(self.heads.device, self.heads.dtype)  # [B, F*H]
        roots = torch.tensor([[row.tokens[-1]] for row in rows], device=self.heads.device)  # [B, 1]
        if self.tree is None:
            # Of the tokens after a node the next level guesses half or so; it must be worth its share of the draft.
            floors = [2 * row.price / self.heads.config.num_heads for row in rows]
            drafts = self._dynamic(rows, features, roots, nodes, floors)
        else:
            drafts = self._static(features, roots, _cut(self.tree, nodes), ratios)
        for memory, draft in zip(memories, drafts, strict=True):
            memory.draft = draft
        return drafts

    def _learn(self, memory: HeadsMemory, tokens: Sequence[int]) -> None:
        """Compares the last draft with what the text became, whether or not its nodes were verified."""
        if memory.draft is not None:
            draft, node = memory.draft, 0
            for token in tokens[memory.start :]:
                mass = sum(p for p, parent in zip(draft.probabilities, draft.parents, strict=True) if parent == node)
                if draft.probabilities[node] <= 0 or mass <= 0:
                    break
                memory.right *= self.fade
                memory.expected = self.fade * memory.expected + mass / draft.probabilities[node] / memory.ratio
                child = draft.child(node, token)
                if child is None:
                    break
                memory.right += 1
                node = child
        memory.draft, memory.start = None, len(tokens)
        memory.ratio = (memory.right + self.weight) / (memory.expected + self.weight)

    def _static(self, features: Tensor, roots: Tensor, tree: Tree, ratios: Sequence[float]) -> list[Draft]:
        levels = tree.levels
        drafted = [roots]  # per level, [B, nodes of the level]
        tokens, parents = roots, torch.zeros_like(roots)
        state = self.heads.begin(features)
        for k in range(1, len(levels)):
            place = {node: i for i, node in enumerate(levels[k - 1])}
            of = [place[tree.parents[node]] for node in levels[k]]
            ranks = [tree.ranks[node] for node in levels[k]]
            _, top, state = self.heads.guess(k, state, parents, tokens, max(ranks) + 1)  # [B, M or 1, R]
            tokens = top.expand(-1, len(levels[k - 1]), -1)[:, of, ranks]
            parents = torch.tensor([of], device=roots.device).expand(len(roots), -1)
            drafted.append(tokens)
        order = [node for level in levels for node in level]
        table = np.empty((len(roots), len(tree)), dtype=np.int64)
        table[:, order] = torch.cat(drafted, dim=1).cpu().numpy()
        sources = (MODEL, *([self.name] * (len(tree) - 1)))
        return [
            Draft(tuple(row), tree.parents, _corrected(tree, ratio), sources)
            for row, ratio in zip(table.tolist(), ratios, strict=True)
        ]

    def _dynamic(
        self, rows: Sequence[Row], features: Tensor, roots: Tensor, nodes: int, floors: Sequence[float]
    ) -> list[Draft]:
        # The trees grow in plain lists: for the few dozen candidates of a level, a tensor operation costs more.
        branch = min(nodes - 1, 10, self.heads.lm_head_rows)
        beam = max(2, min(16, (nodes + 2) // 4))
        state = self.heads.begin(features)
        trees = [
            _Growing(row.tokens[-1], row.notes[self].ratio, floor) for row, floor in zip(rows, floors, strict=True)
        ]
        for k in range(1, self.heads.config.num_heads + 1):
            tokens = torch.tensor([[tree.tokens[node] for node in tree.tips] for tree in trees], device=roots.device)
            parents = torch.tensor([tree.places for tree in trees], device=roots.device)
            log_p, ids, state = self.heads.guess(k, state, parents, tokens, branch, self._tilt(rows, k))
            for tree, row_log_p, row_ids in zip(trees, log_p.tolist(), ids.tolist(), strict=True):
                tree.grow(row_log_p, row_ids, beam)
            if all(tree.settled(nodes) for tree in trees):
                break
        return [tree.draft(self.name, nodes) for tree in trees]

    def _tilt(self, rows: Sequence[Row], level: int) -> Tilt | None:
        """The noise of the position that a level is for, where texts are sampled by it."""
        drawn = [not row.sampling.greedy and not row.sampling.lossy for row in rows]
        if not any(drawn):
            return None
        factors = torch.ones(len(rows))
        noise = torch.zeros(len(rows), self.heads.lm_head_rows)
        for b, row in enumerate(rows):
            if drawn[b]:
                factors[b] = float(np.float32(self.sureness) / np.float32(row.sampling.temperature))
                noise[b] = self._noise(row, len(row.tokens) + level - 1)
        return Tilt(factors.to(self.heads.device), noise.to(self.heads.device))

    def _noise(self, row: Row, position: int) -> Tensor:
        known: dict[int, Tensor] = row.notes[self].noise
        if position not in known:
            for passed in [p for p in known if p < len(row.tokens)]:
                del known[passed]
            assert row.sampling.seed is not None
            ids = None if self.heads.draft_ids is None else self.heads.draft_ids.cpu().numpy()
            drawn = rough_noise(row.sampling.seed, position, self.heads.config.vocab_size, ids)
            known[position] = torch.from_numpy(np.float32(self.sureness) * drawn)
        return known[position]


class _Growing:
    """A tree that grows level by level. `scores` are log-probabilities of whole paths, which fall along them."""

    def __init__(self, root: int, ratio: float, floor: float) -> None:
        self.shift = math.log(ratio)
        self.floor = math.log(floor) if floor > 0 else -math.inf
        self.tokens = [root]
        self.parents = [-1]
        self.scores = [0.0]
        self.tips = [0]  # nodes that get children next
        self.places = [0]  # of the parent of each tip, among the tips of the level above

    def grow(self, log_p: Sequence[Sequence[float]], ids: Sequence[Sequence[int]], beam: int) -> None:
        """Adds children of the tips (one list for all, or one for each); the `beam` best of them are the new tips."""
        first, branch = len(self.tokens), len(ids[0])
        for i, tip in enumerate(self.tips):
            of = i if len(ids) > 1 else 0
            score = self.scores[tip]
            self.tokens += ids[of]
            self.parents += [tip] * branch
            self.scores += [score + min(p + self.shift, 0.0) for p in log_p[of]]
        # Stable: among equals the first.
        self.tips = sorted(range(first, len(self.tokens)), key=self.scores.__getitem__, reverse=True)[:beam]
        self.places = [(tip - first) // branch for tip in self.tips]

    def settled(self, nodes: int) -> bool:
        """Whether no deeper node is worth a level: none can be among the best `nodes`, since those there are already
        score more than any tip, or every tip is too unlikely."""
        best = self.scores[self.tips[0]]
        if best < self.floor:
            return True
        return len(self.scores) >= nodes and heapq.nlargest(nodes, self.scores)[-1] > best

    def draft(self, source: str, nodes: int) -> Draft:
        """The best `nodes` nodes."""
        size = len(self.tokens)
        return Draft(
            tuple(self.tokens),
            tuple(self.parents),
            tuple(map(math.exp, self.scores)),
            (MODEL, *([source] * (size - 1))),
        ).pruned(nodes=nodes, depth=size)


def _corrected(tree: Tree, ratio: float) -> tuple[float, ...]:
    """The probabilities of a fixed tree, each child's given its parent times `ratio` (and at most 1)."""
    if ratio == 1:
        return tree.probabilities
    found = [1.0]
    for node, parent in enumerate(tree.parents[1:], start=1):
        above = tree.probabilities[parent]
        found.append(found[parent] * min(1.0, ratio * tree.probabilities[node] / above) if above else 0.0)
    return tuple(found)


@lru_cache(maxsize=256)
def _cut(tree: Tree, nodes: int) -> Tree:
    return tree.best(nodes)
