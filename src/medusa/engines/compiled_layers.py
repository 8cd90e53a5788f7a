"""Compiles the decoder layers of a transformers model for `verify`: one graph, shared by all layers.

Compiling a whole model takes a minute for each shape, compiling one decoder layer takes seconds. All layers can share
that graph only when nothing in it differs between them, so each is called with a view of its own part of the KV cache
in place of the whole (which it would index by its number), and all that changes from step to step is a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa.engines.kv_cache import SlotCache, SlotLayer
from medusa.errors import MedusaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = 64  # graphs that may be compiled before torch falls back to eager: (batch, nodes, used length)


class _LayerView:
    """Stands in for the whole cache in the call of one layer."""

    def __init__(
        self, keys: Tensor, values: Tensor, rows: Tensor, places: Tensor, used: int, consecutive: bool
    ) -> None:
        self.keys, self.values, self.rows, self.places, self.used = keys, values, rows, places, used
        self.consecutive = consecutive

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        buffer[self.rows, :, self.places] = states.transpose(1, 2)
        if self.consecutive:
            return buffer[: states.shape[0], :, : self.used]
        return buffer[self.rows[:, 0], :, : self.used]


def _call(layer: nn.Module, view: _LayerView, hidden: Tensor, options: dict[str, Any]) -> Any:
    return type(layer).forward(layer, hidden, past_key_values=view, **options)


def compile_layers(model: PreTrainedModel, cache: SlotCache) -> None:
    """From now on each decoder layer runs compiled where the cache's cursor is static, and as before elsewhere.
    Raises MedusaError: the model has no list of decoder layers to be found."""
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == len(cache)), None)
    if layers is None:
        raise MedusaError(f"{type(model).__name__} has no list of {len(cache)} decoder layers: leave --compile out")
    # On the CPU a graph for each shape is the faster one. On a GPU it takes longer to make, and its kernels are as fast
    # for sizes that change.
    device = next(model.parameters()).device
    compiled = torch.compile(_call, dynamic=None if device.type == "cuda" else False)
    for layer, rows in zip(layers, cache.slot_layers, strict=True):
        _route(layer, rows, compiled, cache)


def _route(layer: nn.Module, rows: SlotLayer, compiled: Any, cache: SlotCache) -> None:
    eager = layer.forward

    def forward(hidden: Tensor, *args: Any, **options: Any) -> Any:
        cursor = cache.cursor
        if args or not cursor.static or rows.keys is None or rows.values is None:
            return eager(hidden, *args, **options)
        options.pop("past_key_values", None)
        slots, places = cursor.index(rows.keys.device)
        view = _LayerView(rows.keys, rows.values, slots, places, cursor.used, cursor.consecutive)
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            return compiled(layer, view, hidden, options)

    layer.forward = forward
