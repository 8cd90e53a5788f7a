"""What heads are trained on: the sum over heads of lambda^k times the mean loss of head k over labelled tokens.

https://arxiv.org/abs/2401.10774, section 2.2.1, with cross-entropy; `distillation` mixes in the KL divergence to the
model's own distribution at that position, which tells a head about the runners-up too. `overlap` puts what decides in
the end, how much of the distributions p of the model and q of a head is common, into the place of a part of the KL:

    w KL(p, q) + (1 - w) (1 - sum min(p, q)),  w = exp(-overlap * mean of sum min(p, q))

so that heads that are still far off learn by the KL (https://arxiv.org/abs/2602.23881).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.heads.module import Heads


@dataclass(frozen=True, slots=True)
class Losses:
    """Per head: the sum of the losses of its labelled tokens [K], and their number [K]."""

    sums: Tensor
    counts: Tensor


def draft_labels(heads: Heads, tokens: Tensor) -> Tensor:
    """Token ids -> ids of the draft vocabulary; -100 for tokens outside it and for absent ones (below 0)."""
    if heads.draft_ids is None:
        return tokens.masked_fill(tokens < 0, -100)
    table = torch.full((heads.config.vocab_size + 1,), -100, device=tokens.device)  # the last place is for absent ones
    table[heads.draft_ids] = torch.arange(len(heads.draft_ids), device=tokens.device)
    return table[tokens.masked_fill(tokens < 0, heads.config.vocab_size)]


def losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    teacher: Sequence[Tensor] | None = None,
    distillation: float = 0.0,
    overlap: float = 0.0,
) -> Losses:
    """Args:
    logits: of head k = 1..K, [B, V'].
    labels: [B, K] in the draft vocabulary; -100 is not learned from.
    teacher: the model's own logits at those positions, K times [B, V'].
    distillation: share of the KL divergence; the rest is cross-entropy.
    overlap: see above; 0 is the KL alone.
    """
    sums = []
    for k, level in enumerate(logits):
        level, label = level.float(), labels[:, k]
        part = torch.zeros((), device=level.device)
        if distillation < 1:
            part = part + (1 - distillation) * F.cross_entropy(level, label, ignore_index=-100, reduction="sum")
        if distillation > 0:
            assert teacher is not None
            known = (label >= 0).float()
            own, guess = torch.log_softmax(teacher[k].float(), dim=-1), torch.log_softmax(level, dim=-1)
            away = F.kl_div(guess, own, log_target=True, reduction="none").sum(-1)
            if overlap:
                common = torch.minimum(own, guess).exp().sum(-1)
                weight = torch.exp(-overlap * (common.detach() * known).sum() / known.sum().clamp_min(1))
                away = weight * away + (1 - weight) * (1 - common)
            part = part + distillation * (away * known).sum()
        sums.append(part)
    return Losses(torch.stack(sums), (labels >= 0).sum(0))


def head_weights(num_heads: int, lambda_: float, device: torch.device | None = None) -> Tensor:
    """lambda^k for k = 1..K."""
    return lambda_ ** torch.arange(1, num_heads + 1, device=device)


@torch.no_grad()
def teacher_logits(finals: Tensor, lm_head: Tensor) -> list[Tensor]:
    """The model's own logits for the tokens that the heads guess: from its features [B, K, H] there and the rows of
    its LM head for the draft vocabulary [V', H], K times [B, V']."""
    return [F.linear(finals[:, k].to(lm_head.dtype), lm_head) for k in range(finals.shape[1])]
