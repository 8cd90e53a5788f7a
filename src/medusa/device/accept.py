"""The acceptance rules of `decoding/accept.py` for all nodes of all rows at once.

There one walks from the root and looks at the nodes that are reached. Here every node is judged: which token plain
decoding has after it (`choose`), or whether it is likely enough after its parent (`likely`). A node is accepted where
that holds on all of its path, so no step waits for the one before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa.device.shape import FixedShape
from medusa.device.slots import Slots


def penalised(logits: Tensor, tokens: Tensor, shape: FixedShape, slots: Slots) -> Tensor:
    """Repetition penalty: logits [B, N, V] in float32, each node's by the text of its row and its own path."""
    batch, _, vocab = logits.shape
    path = tokens[:, shape.paths]  # [B, N, D + 1]
    seen = slots.seen[:batch].unsqueeze(1).expand(-1, len(shape), vocab).clone().scatter_(2, path, True)
    penalty = slots.setting("repetition_penalty", batch).float()
    logits = logits.float()
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen & (penalty != 1), lowered, logits)


def filtered(scores: Tensor, slots: Slots) -> Tensor:
    """Scores [B, N, V], which are logits / temperature, with -inf for what top-k, top-p and min-p drop. Where the last
    place falls among equals, the lower ids are kept."""
    batch, _, vocab = scores.shape
    top_k, top_p, min_p = (slots.setting(name, batch) for name in ("top_k", "top_p", "min_p"))
    best, ids = scores.sort(dim=-1, descending=True, stable=True)
    weights = torch.exp(best - best[..., :1])  # probabilities, but for a factor
    within = (torch.arange(vocab, device=scores.device) < top_k) | (top_k == 0)
    total = (weights * within).sum(-1, keepdim=True, dtype=torch.float64)  # renormalised over the top-k
    better = weights.cumsum(-1, dtype=torch.float64) - weights  # the mass of all better tokens
    keep = within & (weights >= min_p.float()) & ((better < top_p * total) | (top_p >= 1))
    keep[..., 0] = True
    return scores.masked_fill(~torch.zeros_like(keep).scatter_(2, ids, keep), -torch.inf)


def choose(logits: Tensor, scores: Tensor | None, shape: FixedShape, slots: Slots, noise: Tensor | None) -> Tensor:
    """The token that plain decoding with the same seed has after each node, [B, N]; the argmax for typical rows.

    Args:
        logits: [B, N, V], penalised.
        scores: [B, N, V] after temperature and filters; None where no row samples.
        noise: [B, D + 1, V] of what follows a node at depth 0 to D; None where no row draws by it.
    """
    best = logits.argmax(-1)
    if noise is None:
        return best
    assert scores is not None
    drawn = torch.empty_like(best)
    for depth, nodes in enumerate(shape.by_depth):
        drawn[:, nodes] = (scores[:, nodes] + noise[:, depth : depth + 1]).argmax(-1)
    return torch.where(slots.exact[: len(logits), None], drawn, best)


def likely(scores: Tensor, tokens: Tensor, shape: FixedShape, slots: Slots) -> tuple[Tensor, Tensor]:
    """Typical acceptance: whether each node's token x is likely enough after its parent, [B, N], by
    p(x) > min(epsilon, delta * exp(-H(p))), and the log-probability [B, N] of its path (the root's is 0)."""
    batch = len(scores)
    log_p = torch.log_softmax(scores.double(), dim=-1)  # [B, N, V]
    entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)  # [B, N]; 0 log 0 is 0
    epsilon, delta = (slots.setting(name, batch).squeeze(-1) for name in ("epsilon", "delta"))
    threshold = torch.minimum(epsilon, delta * torch.exp(-entropy))
    own = log_p[:, shape.above].gather(2, tokens.unsqueeze(-1)).squeeze(-1)  # [B, N] of each node after its parent
    own[:, 0] = 0.0
    path = torch.where(shape.ancestors, own.unsqueeze(1), 0.0).sum(-1)
    return own.exp() > threshold[:, shape.above], path
