"""A Hugging Face configuration -> what the native engine is told, or the reason why it cannot run the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa.errors import MedusaError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# What `native_config` reads, and what only some families have: a configuration file that says all of it needs no
# defaults of transformers.
_SETTINGS = {
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "num_hidden_layers",
    "rope_parameters", "architectures", "eos_token_id",
}  # fmt: skip
_FAMILY_SETTINGS = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": {"layer_types", "sliding_window"},
    "qwen3": {"layer_types", "sliding_window", "attention_bias"},
    "smollm3": {"layer_types", "no_rope_layers", "sliding_window", "attention_bias", "mlp_bias"},
}
# Kinds of rotary embedding whose frequencies do not follow the length of the text.
_ROTARY = ("default", "linear", "llama3", "yarn")
_GATES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class UnsupportedError(MedusaError):
    """The native engine cannot run this model; the message is the reason."""


@dataclass(frozen=True, slots=True)
class NativeConfig:
    """A decoder of the Llama kind. `layers` holds, for each layer, whether it rotates and its window (0: none)."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context: int
    epsilon: float
    gate: str
    tied: bool
    qk_norm: bool
    attention_bias: bool  # of q, k and v
    output_bias: bool  # of the attention's output
    mlp_bias: bool
    inverse_frequencies: tuple[float, ...]
    rotary_scale: float
    layers: tuple[tuple[bool, int], ...]

    @property
    def attention_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


def is_complete(data: Mapping[str, Any]) -> bool:
    """Whether a config.json says by itself all that `native_config` reads; transformers takes a second to start."""
    extra = _FAMILY_SETTINGS.get(str(data.get("model_type")))
    if extra is None or not data.keys() >= _SETTINGS | extra:
        return False
    rope = data["rope_parameters"]
    return isinstance(rope, dict) and rope.get("rope_type") == "default" and "rope_theta" in rope


def native_config(config: Any) -> NativeConfig:
    """Reads the configuration of a model: a PreTrainedConfig, or anything with its attributes.

    Raises:
        UnsupportedError: another family, or a setting that the engine does not know.
    """
    kind: str = config.model_type
    if kind not in FAMILIES:
        raise UnsupportedError(f"it runs {', '.join(FAMILIES)} models, not {kind}")
    c = config
    if getattr(c, "quantization_config", None):
        raise UnsupportedError("the checkpoint is quantised")
    gate = _GATES.get(c.hidden_act)
    if gate is None:
        raise UnsupportedError(f"it does not know the activation {c.hidden_act}")
    rope = dict(getattr(c, "rope_parameters", None) or {})
    rotary = rope.get("rope_type", "default")
    if rotary not in _ROTARY:
        raise UnsupportedError(f"it does not know rotary embeddings of the kind {rotary}")
    head_dim: int = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    frequencies, scale = _frequencies(config, rotary, rope, head_dim)
    biased = kind == "qwen2" or bool(getattr(c, "attention_bias", False))
    return NativeConfig(
        hidden_size=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        head_dim=head_dim,
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        context=c.max_position_embeddings,
        epsilon=c.rms_norm_eps,
        gate=gate,
        tied=bool(c.tie_word_embeddings),
        qk_norm=kind == "qwen3",
        attention_bias=biased,
        output_bias=biased and kind != "qwen2",
        mlp_bias=bool(getattr(c, "mlp_bias", False)),
        inverse_frequencies=frequencies,
        rotary_scale=scale,
        layers=_layers(c, kind),
    )


def _frequencies(config: Any, kind: str, rope: dict[str, Any], head_dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies [rotary dimensions / 2], and the factor of cosines and sines."""
    if kind == "default":
        import torch

        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / (rope["rope_theta"] ** exponents)).tolist()), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return tuple(frequencies.tolist()), float(scale)


def _layers(c: Any, kind: str) -> tuple[tuple[bool, int], ...]:
    """For each layer, whether it rotates and its window. What transformers ignores in a family is ignored here, too."""
    count: int = c.num_hidden_layers
    window: int = 0 if kind == "llama" else getattr(c, "sliding_window", None) or 0
    kinds = ["sliding_attention" if window else "full_attention"] * count
    if kind in ("qwen2", "qwen3", "smollm3"):
        kinds = getattr(c, "layer_types", None) or ["full_attention"] * count
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedError(f"it does not know attention of the kind {', '.join(sorted(other))}")
    rotates = (getattr(c, "no_rope_layers", None) if kind == "smollm3" else None) or [1] * count  # 1: it does rotate
    return tuple(
        (bool(turn), window if of == "sliding_attention" else 0) for turn, of in zip(rotates, kinds, strict=True)
    )
