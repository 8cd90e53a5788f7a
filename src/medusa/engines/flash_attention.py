"""Attention of one new token per row over a KV cache, that reads no further than each row reaches.

With a mask, every row reads as many places as the longest, and of hundreds of texts side by side most are much shorter.
torch has flash attention over texts of different lengths, but for keys that lie one after another; here each KV head of
each slot is a text of its own to it, of which the first places count. That is CUDA's alone and no public function of
torch, so it is taken where it gives what masks give, on random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medusa.engines.transformers import TransformersBackend

NAME = "medusa_reach"  # not a name with "flash" in it, for which transformers would look for a kernel
NEAR = 0.03  # in bfloat16, of numbers around 1


class FlashAttention:
    """Takes the place of a model's attention within `used`, for passes of one token a row.

    Attributes:
        refused: why it is not taken; "" if it is.
    """

    def __init__(self, backend: TransformersBackend, positions: Tensor) -> None:
        """`positions` [B] are those of the new tokens, in the tensor in which they will change."""
        self._model, self._positions = backend.model, positions
        self._bounds: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.refused = refusal(backend)

    @contextmanager
    def used(self) -> Iterator[None]:
        if self.refused:
            yield
            return
        from transformers import AttentionInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

        before = self._model.config._attn_implementation
        AttentionInterface.register(NAME, self._attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
        self._model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)
            AttentionInterface.register(NAME, _gone)  # transformers would keep the model alive

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,  # [B, heads, 1, D]
        key: Tensor,  # [B, KV heads, L, D], the first places of buffers
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """The output [B, 1, heads, D], as transformers calls it."""
        batch, kv_heads, _, size = key.shape
        groups, capacity = query.shape[1] // kv_heads, key.stride(1) // size
        shape = (batch, kv_heads, groups, capacity)
        if shape not in self._bounds:  # in no graph: each is warmed up before it is captured
            self._bounds[shape] = bounds(*shape, key.device)
        return flash(query, key, value, self._positions, *self._bounds[shape], scaling).transpose(1, 2), None


def _gone(*_: Any, **__: Any) -> tuple[Tensor, None]:
    raise RuntimeError("the conversations that attended in this way are over")


def bounds(batch: int, kv_heads: int, groups: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the queries and the keys of each text begin, and where the last ones end: [B * KV heads + 1]."""
    texts = torch.arange(batch * kv_heads + 1, dtype=torch.int32, device=device)
    return texts * groups, texts * capacity


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    scaling: float | None,
) -> Tensor:
    """[B, heads, 1, D]: row b sees the places up to `positions[b]`."""
    batch, kv_heads, used, size = key.shape
    capacity = key.stride(1) // size
    lengths = (positions + 1).int().repeat_interleave(kv_heads, output_size=batch * kv_heads)
    whole = (batch * kv_heads * capacity, 1, size)  # slots, heads and places of the buffer, one after another
    keys, values = (t.as_strided(whole, (size, size, 1), t.storage_offset()) for t in (key, value))
    longest, dropout, causal, debug_mask = query.shape[1] // kv_heads, 0.0, False, False
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query.reshape(-1, 1, size), keys, values, query_bounds, key_bounds, longest, used, dropout, causal, debug_mask,
        scale=scaling, seqused_k=lengths,
    )[0]  # fmt: skip
    return out.reshape(query.shape)


def refusal(backend: TransformersBackend) -> str:
    """Why flash attention cannot be taken for a model here; "" if it can."""
    config, dtype, device = backend.model.config.get_text_config(), backend.model.dtype, backend.device
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not know {dtype}"
    if backend.masks.window is not None:
        return "it would see past a sliding window"
    if backend.model.config._attn_implementation not in ("sdpa", "medusa_grouped"):
        return "the model attends in a way of its own"
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    try:
        away = error(heads, kv_heads, size, dtype, device)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as problem:
        return f"it fails ({str(problem).splitlines()[0][:100]})"
    return "" if away < NEAR else f"it is {away:.2g} away from attention by masks"


@torch.inference_mode()
def error(heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> float:
    """How far it is away from attention by masks in float32, on random numbers, at the most."""
    numbers = torch.Generator(device).manual_seed(0)
    batch, capacity, used = 5, 320, 256
    buffers = torch.randn(2, batch + 1, kv_heads, capacity, size, device=device, generator=numbers).to(dtype)
    query = torch.randn(batch, heads, 1, size, device=device, generator=numbers).to(dtype)
    positions = torch.tensor([0, 7, 63, 200, 255], device=device)
    key, value = buffers[0][:batch, :, :used], buffers[1][:batch, :, :used]
    groups = heads // kv_heads
    actual = flash(query, key, value, positions, *bounds(batch, kv_heads, groups, capacity, device), None)
    allowed = torch.arange(used, device=device) <= positions[:, None, None, None]
    keys, values = (t.float().repeat_interleave(groups, dim=1) for t in (key, value))
    expected = F.scaled_dot_product_attention(query.float(), keys, values, attn_mask=allowed)
    return float((actual.float() - expected).abs().max())
