"""Drafting with Medusa heads: a fixed tree of ranks, or a tree grown anew at each step by the heads' probabilities.

Both go level by level: the nodes of one level ask the next head for their children in one product. The heads run at
the last accepted node only, never on the prompt and never on rejected nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from medusa.decoding.draft import MODEL, Draft, Row
from medusa.decoding.tree import Tree
from medusa.errors import UsageError
from medusa.models.heads import HeadsRunner


class HeadsDrafter:
    """`tree` is the fixed tree; without one each step grows its own.

    The dynamic tree expands, at each level, the `beam` nodes of greatest probability (the product along the path)
    with their `branch` best children, and keeps the best N nodes of all; `beam` and `branch` follow from N.
    """

    name = "heads"

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
        if nodes < 2:
            return [Draft((row.tokens[-1],)) for row in rows]
        features = torch.stack([row.features for row in rows]).to(self.heads.device, self.heads.dtype)  # [B, F*H]
        roots = torch.tensor([[row.tokens[-1]] for row in rows], device=self.heads.device)  # [B, 1]
        if self.tree is None:
            return self._dynamic(features, roots, nodes)
        return self._static(features, roots, _cut(self.tree, nodes))

    def _static(self, features: torch.Tensor, roots: torch.Tensor, tree: Tree) -> list[Draft]:
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
        return [Draft(tuple(row), tree.parents, tree.probabilities, sources) for row in table.tolist()]

    def _dynamic(self, features: torch.Tensor, roots: torch.Tensor, nodes: int) -> list[Draft]:
        batch = len(roots)
        branch = min(nodes - 1, 10, self.heads.lm_head_rows)
        beam = max(2, min(16, (nodes + 2) // 4))
        state = self.heads.begin(features)
        tokens, parents = roots, torch.zeros_like(roots)
        scores = torch.zeros_like(roots, dtype=torch.float32)  # [B, M] log-probability of the path
        index = torch.zeros_like(roots)  # [B, M] number of each expanded node in the whole tree
        size = 1
        all_tokens, all_parents, all_scores = [roots], [torch.full_like(roots, -1)], [scores]
        for k in range(1, self.heads.config.num_heads + 1):
            best, ids, state = self.heads.guess(k, state, parents, tokens, branch)  # [B, M or 1, branch]
            width = tokens.shape[1]
            children = ids.expand(batch, width, branch).flatten(1)  # [B, M * branch]
            child_scores = (best + scores.unsqueeze(-1)).flatten(1)
            of = torch.arange(width, device=roots.device).repeat_interleave(branch).expand(batch, -1)
            all_tokens.append(children)
            all_parents.append(index.gather(1, of))
            all_scores.append(child_scores)
            scores, chosen = child_scores.topk(min(beam, child_scores.shape[1]), dim=-1)
            tokens, parents, index = children.gather(1, chosen), of.gather(1, chosen), size + chosen
            size += children.shape[1]
        sources = (MODEL, *([self.name] * (size - 1)))
        columns = (torch.cat(all_tokens, 1), torch.cat(all_parents, 1), torch.cat(all_scores, 1).exp())
        return [
            Draft(tuple(row_tokens), tuple(row_parents), tuple(probabilities), sources).pruned(nodes=nodes, depth=nodes)
            for row_tokens, row_parents, probabilities in zip(*(column.tolist() for column in columns), strict=True)
        ]


@lru_cache(maxsize=256)
def _cut(tree: Tree, nodes: int) -> Tree:
    return tree.best(nodes)
