"""Attention of one new token per row over a KV cache in static buffers, for passes that run the same kernels each step.

transformers repeats the keys of grouped-query attention for each query head, which for many rows is most of the time of
a step. Here the query heads that share keys stand in one matrix instead, so that keys are read once. On CUDA flash
attention also reads no further than each row reaches, where a check on random numbers finds that it does so here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "medusa_decoding"


class DecodingAttention:
    """What takes the place of a model's attention within `used_by`. `reach` [B] is where each row's token stands."""

    def __init__(self, model: PreTrainedModel, reach: Tensor, *, flash: bool) -> None:
        self._model = model
        self._reach = reach
        self._flash = flash
        self._bounds: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model attends in this way, if it is one that can be told how."""
        model, before = self._model, self._model.config._attn_implementation
        if before != "sdpa":  # soft-capping, for one: what it computes is its own
            yield
            return
        ALL_ATTENTION_FUNCTIONS.register(NAME, self.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            model.set_attn_implementation(before)

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,  # [B, heads, N, size]
        key: Tensor,  # [B, KV heads, used, size]
        value: Tensor,
        attention_mask: Tensor,  # [B, 1, N, used]
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: [B, N, heads, size]."""
        if self._flash and query.shape[2] == 1:
            return self._flashed(query, key, value, scaling).transpose(1, 2), None
        return masked(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None

    def _flashed(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        batch, kv_heads, _, size = key.shape
        groups, capacity = query.shape[1] // kv_heads, key.stride(1) // size
        shape = (batch, kv_heads, groups, capacity)
        if shape not in self._bounds:  # outside of any graph: a first step is always run before one is captured
            texts = torch.arange(batch * kv_heads + 1, dtype=torch.int32, device=key.device)
            self._bounds[shape] = texts * groups, texts * capacity
        return flash(query, key, value, self._reach, *self._bounds[shape], scaling)


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """[B, heads, N, size], by a mask [B, 1, N, used]."""
    batch, heads, count, size = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * count, size)
    out = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=mask if groups == 1 else mask.repeat(1, 1, groups, 1), scale=scaling
    )
    return out.reshape(batch, heads, count, size)


def flash(
    query: Tensor, key: Tensor, value: Tensor, reach: Tensor, query_bounds: Tensor, key_bounds: Tensor, scaling: Any
) -> Tensor:
    """[B, heads, 1, size]: row b sees the places up to `reach[b]`. Each KV head of each row is a text of its own to the
    kernel, `capacity` places after the one before, of which so many count."""
    batch, kv_heads, used, size = key.shape
    capacity = key.stride(1) // size
    lengths = (reach + 1).int().repeat_interleave(kv_heads, output_size=batch * kv_heads)
    whole = (batch * kv_heads * capacity, 1, size)
    keys, values = (t.as_strided(whole, (size, size, 1), t.storage_offset()) for t in (key, value))
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query.reshape(-1, 1, size),
        keys,
        values,
        query_bounds,
        key_bounds,
        query.shape[1] // kv_heads,
        used,
        0.0,
        False,
        False,
        scale=scaling,
        seqused_k=lengths,
    )[0]
    return out.reshape(query.shape)


@torch.inference_mode()
def flash_works(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> str:
    """Why flash attention cannot be taken here; "" if it gives what masks give, on random numbers."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not know {dtype}"
    try:
        numbers = torch.Generator(device).manual_seed(0)
        batch, capacity, used = 5, 320, 256
        buffers = torch.randn(2, batch, kv_heads, capacity, size, device=device, generator=numbers).to(dtype)
        query = torch.randn(batch, heads, 1, size, device=device, generator=numbers).to(dtype)
        reach = torch.tensor([0, 7, 63, 200, 255], device=device)
        texts = torch.arange(batch * kv_heads + 1, dtype=torch.int32, device=device)
        keys, values = buffers[0][:, :, :used], buffers[1][:, :, :used]
        found = flash(query, keys, values, reach, texts * (heads // kv_heads), texts * capacity, None)
        hidden = torch.arange(used, device=device) > reach[:, None]
        mask = torch.zeros(batch, 1, 1, used, device=device).masked_fill(hidden[:, None, None], -1e30)
        expected = masked(query.float(), keys.float(), values.float(), mask, None)
        away = float((found.float() - expected).abs().max())
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        return f"it fails ({str(error).splitlines()[0][:100]})"
    return "" if away < 0.03 else f"it is {away:.2g} away from attention by masks"
