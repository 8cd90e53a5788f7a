"""How good heads are: at which rank the true token stands at each level, and what trees follow from that."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.decoding.tree import RankPath
from medusa.errors import MedusaError
from medusa.heads.module import Heads
from medusa.training.features import Batch
from medusa.training.objective import draft_labels

DEEPEST = 64  # ranks from here on are not told apart
TREE_NODES = 256  # that are stored; a step verifies far fewer, an ablation all
TOPS = (1, 5, 10)
SIZES = (4, 8, 16, 64)


@torch.inference_mode()
def ranks(heads: Heads, batches: Iterable[Batch]) -> Tensor:
    """Rank of the true token at each level, given the true tokens before it: [P, K], 0 is the best guess.

    DEEPEST stands for all lower ranks and for tokens that cannot be guessed; positions with an answer too short for
    all K heads are left out.

    Heads are measured in the precision of their own weights, which is float32 in training and calibration, whatever the
    machine does fast: it is what all ways of decoding round from (int8 weights with float32 logits, bfloat16, float32),
    and logits rounded to bfloat16 tie so often that ties would decide some ranks in a hundred. Of equal logits the
    smaller id of the draft vocabulary comes first.
    """
    tables = []
    dtype = next(heads.parameters()).dtype
    for batch in batches:
        whole = (batch.tokens >= 0).all(dim=1)
        if not bool(whole.any()):
            continue
        tokens = batch.tokens[whole].to(heads.device)
        labels = draft_labels(heads, tokens[:, 1:])
        with torch.autocast(heads.device.type, enabled=False):
            logits = heads(batch.features[whole].to(heads.device, dtype), tokens[:, :-1])
        ids = torch.arange(heads.lm_head_rows, device=heads.device)
        levels = []
        for k, level in enumerate(logits):
            label = labels[:, k, None]
            value = level.gather(1, label.clamp_min(0))
            before = (level > value) | ((level == value) & (ids < label))
            known = (label[:, 0] >= 0) & level.isfinite().all(1)  # NaN compares as smaller: all would be right
            levels.append(torch.where(known, before.sum(1).clamp_max(DEEPEST), DEEPEST))
        tables.append(torch.stack(levels, dim=1).cpu())
    return torch.cat(tables) if tables else torch.empty(0, heads.config.num_heads, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What held-out text says. `top[n][k]` is how often the true token was among the best n of head k + 1 (given the
    right tokens before it); `tree` the rank paths that are right most often, with how often, best first."""

    positions: int
    top: dict[int, tuple[float, ...]]
    tree: tuple[tuple[RankPath, float], ...]

    @classmethod
    def of(cls, table: Tensor, nodes: int = TREE_NODES) -> Accuracy:
        """From the ranks [P, K]. Raises MedusaError where there are none."""
        if not len(table):
            raise MedusaError(f"nothing measures the heads: every answer is shorter than {table.shape[1] + 1} tokens")
        top = {n: tuple(round(x, 4) for x in (table < n).float().mean(0).tolist()) for n in TOPS}
        return cls(len(table), top, best_paths(table.tolist(), nodes))

    def expected_tokens(self, nodes: int) -> float:
        """E(N) = 1 + the sum over the best N - 1 paths: tokens per step of the fixed tree of `nodes` nodes."""
        return 1 + sum(f for _, f in self.tree[: nodes - 1])

    def facts(self) -> dict[str, object]:
        """For logs and the heads' config."""
        return {
            "positions": self.positions,
            **{f"top{n}": list(shares) for n, shares in self.top.items()},
            "tokens_per_step": {str(n): round(self.expected_tokens(n), 3) for n in SIZES},
        }


def best_paths(table: Iterable[Sequence[int]], nodes: int) -> tuple[tuple[RankPath, float], ...]:
    """The `nodes` - 1 rank paths that are right most often, counted jointly over positions: f falls along paths and
    siblings, so the best of them are always a tree, and the optimal one of that size."""
    counts: collections.Counter[RankPath] = collections.Counter()
    positions = 0
    for row in table:
        positions += 1
        path: RankPath = ()
        for rank in row:
            if rank >= DEEPEST:
                break
            path = (*path, rank)
            counts[path] += 1
    best = sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[: nodes - 1]
    return tuple((path, round(count / positions, 5)) for path, count in best)


def describe(accuracy: Accuracy) -> str:
    """One line for people."""
    top = " ".join(f"{share:.2f}" for share in accuracy.top[1])
    expected = " / ".join(f"{accuracy.expected_tokens(n):.2f}" for n in SIZES)
    return f"top-1 {top}; {expected} tokens per step with {' / '.join(map(str, SIZES))} nodes"
