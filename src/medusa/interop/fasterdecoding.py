"""The names of the original project (github.com/FasterDecoding/Medusa), which TGI and TensorRT-LLM took over.

A head is a list: `{h}.{l}.linear.weight` [H, H] and `{h}.{l}.linear.bias` [H] for its layers l < L, and
`{h}.{L}.weight` [V, H], its LM head. v0.1 keeps the heads alone in `medusa_lm_head.pt` (or .safetensors); "version 2"
leaves out the LM heads, for the model's own; v1.0 keeps the whole model and calls the heads `medusa_head.{h}...`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor

from medusa.interop.layouts import Layout, Part

PICKLE, SAFETENSORS = "medusa_lm_head.pt", "medusa_lm_head.safetensors"
WHOLE_PREFIX = "medusa_head."
BASE_PREFIXES = ("model.", "lm_head.")  # what a whole model holds beside its heads
_NUMBER = r"(0|[1-9][0-9]{0,5})"
_BLOCK = re.compile(rf"{_NUMBER}\.{_NUMBER}\.linear\.(weight|bias)")
_LM_HEAD = re.compile(rf"{_NUMBER}\.{_NUMBER}\.weight")


def parse(name: str) -> Part | None:
    if match := _BLOCK.fullmatch(name):
        return Part(cast("Literal['weight', 'bias']", match[3]), int(match[1]), int(match[2]))
    if match := _LM_HEAD.fullmatch(name):
        return Part("lm_head", int(match[1]), int(match[2]))
    return None


def spell(part: Part) -> str:
    return f"{part.head}.{part.layer}." + ("weight" if part.what == "lm_head" else f"linear.{part.what}")


LAYOUT = Layout("FasterDecoding v0.1", parse, spell)
VERSION_2 = Layout('"version 2"', parse, spell)
WHOLE = Layout("FasterDecoding v1.0, whole model", parse, spell, WHOLE_PREFIX)


def config(base: str, num_heads: int, num_layers: int) -> dict[str, Any]:
    """What the original project's config.json holds."""
    return {"base_model_name_or_path": base, "medusa_num_heads": num_heads, "medusa_num_layers": num_layers}


def tensors(ours: Mapping[str, Tensor], num_layers: int, lm_heads: list[Tensor]) -> dict[str, Tensor]:
    """Our residual heads (`blocks.{h}.{l}.linear.*`) by these names; `lm_heads`: one a head, or none."""
    found = {name.removeprefix("blocks."): tensor for name, tensor in ours.items() if name.startswith("blocks.")}
    return found | {spell(Part("lm_head", head, num_layers)): rows for head, rows in enumerate(lm_heads)}
