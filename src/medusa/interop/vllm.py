"""vLLM's own names: `blocks.{h}.layers.{l}.weight` [H, H] and `.bias` [H], `lm_heads.{h}.weight` [V, H].

With `original_lm_head: true` in the config all heads share the one LM head `lm_head.weight`. A file may put
`medusa_heads.` before its names. Layers have biases only where the config says `medusa_fc_bias: true`; without it vLLM
drops those in the file without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor

from medusa.interop.layouts import SHARED, Layout, Part

FILE = "model.safetensors"
_NUMBER = r"(0|[1-9][0-9]{0,5})"
_BLOCK = re.compile(rf"blocks\.{_NUMBER}\.layers\.{_NUMBER}\.(weight|bias)")
_LM_HEAD = re.compile(rf"lm_heads\.{_NUMBER}\.weight")


def parse(name: str) -> Part | None:
    name = name.removeprefix("medusa_heads.")
    if match := _BLOCK.fullmatch(name):
        return Part(cast("Literal['weight', 'bias']", match[3]), int(match[1]), int(match[2]))
    if match := _LM_HEAD.fullmatch(name):
        return Part("lm_head", int(match[1]), -1)
    return Part("lm_head", SHARED, -1) if name == "lm_head.weight" else None


def spell(part: Part) -> str:
    if part.what == "lm_head":
        return "lm_head.weight" if part.head == SHARED else f"lm_heads.{part.head}.weight"
    return f"blocks.{part.head}.layers.{part.layer}.{part.what}"


LAYOUT = Layout("vLLM", parse, spell)


def config(base: str, num_heads: int, num_layers: int, hidden_size: int, vocab_size: int) -> dict[str, Any]:
    """What config.json holds for vLLM, and all that the other engines look for: one directory serves them. Any further
    key with num and heads, or num and layers, would be taken for one of these."""
    return {
        "model_type": "medusa",
        "medusa_num_heads": num_heads,
        "medusa_num_layers": num_layers,
        "medusa_fc_bias": True,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "base_model_name_or_path": base,
    }


def tensors(ours: Mapping[str, Tensor], lm_head: Tensor) -> dict[str, Tensor]:
    """Our residual heads (`blocks.{h}.{l}.linear.*`) by these names, with the LM head that they share."""
    found = {"lm_head.weight": lm_head}
    for name, tensor in ours.items():
        _, head, layer, _, what = name.split(".")
        found[f"blocks.{head}.layers.{layer}.{what}"] = tensor
    return found
