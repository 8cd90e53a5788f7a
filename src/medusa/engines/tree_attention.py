"""Attention of a few tokens with a mask, without a copy of keys and values for each head of a group.

transformers' sdpa expands grouped keys to all heads wherever there is a mask. Here the heads that share keys stand in
the query axis one after another instead, which is the same product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "medusa_grouped"


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Puts `grouped_attention` in the place of sdpa where the model uses that, and keeps others as they are."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    if getattr(model.config.get_text_config(), "_attn_implementation", "") != "sdpa":
        return
    AttentionInterface.register(NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def grouped_attention(
    module: nn.Module,
    query: Tensor,  # [B, heads, N, D]
    key: Tensor,  # [B, KV heads, L, D]
    value: Tensor,  # [B, KV heads, L, D']
    attention_mask: Tensor | None,  # additive [B, 1, N, L]
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The output [B, N, heads, D']. Without a mask, or with one for each head: as transformers does it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.shape[1] != 1 or options.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return out, None
    batch, heads, count, _ = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * count, -1)
    mask = attention_mask if groups == 1 else attention_mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, heads, count, -1).transpose(1, 2).contiguous(), None
