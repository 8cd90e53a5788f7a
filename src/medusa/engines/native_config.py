"""A Hugging Face configuration -> what the native engine is told, or the reason why it cannot run the model.

The engine is taken only for what it knows whole: a field that is not named here, or a value that is not understood, is
an `UnsupportedError`, and transformers runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from medusa.errors import MedusaError, shortened

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Kinds of rotary embedding whose frequencies do not follow the length of the text, and what each may be told.
_ROTARY: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip
_GATES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

# --- what a configuration may hold ------------------------------------------------------------------------------------
# A field not named here, or of a value not understood, might change the numbers: such a model is left to transformers.

Understood = Callable[[Any], bool]


def _a(*kinds: type) -> Understood:
    """A value of these types. True and False are no numbers here."""
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


_is_int, _is_bool, _is_text, _is_token = _a(int), _a(bool), _a(str), _a(int, NoneType)


def _is_number(value: Any) -> bool:
    return _a(int, float)(value) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_dtype(value: Any) -> bool:
    return value is None or str(value).removeprefix("torch.") in ("float32", "float16", "bfloat16")


def _is_list_of(kind: Understood) -> Understood:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _one_of(*values: Any) -> Understood:
    return lambda value: any(value is known or (type(value) is type(known) and value == known) for known in values)


def _anything(value: Any) -> bool:
    return True


def _all_are(understood: Understood, *names: str) -> dict[str, Understood]:
    return dict.fromkeys(names, understood)


# Read by `native_config`, in every family. A file that says all of it needs no defaults of transformers.
_READ: dict[str, Understood] = {
    "model_type": _one_of(*FAMILIES),
    **_all_are(_is_count, "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    **_all_are(_is_count, "vocab_size", "max_position_embeddings", "num_hidden_layers"),
    "rms_norm_eps": lambda value: isinstance(value, float) and 0 < value < 1,
    "hidden_act": _one_of(*_GATES),
    "tie_word_embeddings": _is_bool,
    "rope_parameters": _a(dict),
    "architectures": lambda value: value is None or (bool(value) and _is_list_of(_is_text)(value)),
    "eos_token_id": lambda value: _is_token(value) or _is_list_of(_is_int)(value),
    "pad_token_id": _is_token,
}
# Read too, in these families; what stands in brackets may be absent from a file.
_WINDOWS: dict[str, Understood] = {
    "layer_types": _is_list_of(_is_text),
    "sliding_window": lambda value: value is None or _is_count(value),
}
_BIASES: dict[str, Understood] = {"attention_bias": _is_bool, "mlp_bias": _is_bool}
_FAMILY: dict[str, dict[str, Understood]] = {
    "llama": _BIASES,
    "mistral": {"sliding_window": _WINDOWS["sliding_window"]},
    "qwen2": _WINDOWS,
    "qwen3": {**_WINDOWS, "attention_bias": _is_bool, "head_dim": _is_count},
    "smollm3": {**_WINDOWS, **_BIASES, "no_rope_layers": _is_list_of(_one_of(0, 1))},
}
# Not read, and of no effect on the numbers of a pass.
_HARMLESS: dict[str, Understood] = {
    "head_dim": _is_count,  # read, but a family may do without
    **_all_are(_is_token, "bos_token_id", "unk_token_id"),
    "initializer_range": lambda value: isinstance(value, float) and 0 <= value <= 1,
    "attention_dropout": _is_number,
    "use_cache": _is_bool,
    "pretraining_tp": _one_of(1),
    **_all_are(_is_dtype, "dtype", "torch_dtype"),
    **_all_are(_is_text, "transformers_version", "_name_or_path", "_model_name_or_path"),
    "use_sliding_window": _is_bool,  # layer_types say the same, layer by layer
    **_all_are(_is_int, "max_window_layers", "no_rope_layer_interval"),
    # Notes that exporters leave.
    "transformers.js_config": _anything,
    "is_llama_config": _one_of(True),
    **_all_are(_one_of(False), "rope_interleaved", "use_mrope"),
    "unsloth_fixed": _is_bool,
    "unsloth_version": _is_text,
}
# What transformers' own object holds besides.
_RESOLVED: dict[str, Understood] = {
    "pretraining_tp": _anything,  # of no effect since transformers 5
    **_all_are(_anything, "transformers_version", "id2label", "label2id", "problem_type"),
    **_all_are(_anything, "attention_dropout", "initializer_range", "use_cache"),
    **_all_are(_one_of(None, True, False), "output_attentions", "output_hidden_states", "return_dict"),
    "is_encoder_decoder": _one_of(False),
    "chunk_size_feed_forward": _one_of(0),
    "auto_map": _anything,  # code beside the weights, which is never run
    "quantization_config": _one_of(None),
}


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
    """Whether a config.json says by itself, in words known here, all that `native_config` reads: transformers, which
    fills in defaults and reads older spellings, takes a second to start."""
    family = _FAMILY.get(data["model_type"]) if isinstance(data.get("model_type"), str) else None
    if family is None:
        return False
    needed = {**_READ, **family}
    known = {**_HARMLESS, **needed}
    if not needed.keys() <= data.keys() <= known.keys():
        return False
    if not all(known[name](value) for name, value in data.items()):
        return False
    rope = data["rope_parameters"]
    layers = data["num_hidden_layers"]
    return (
        rope.keys() == {"rope_type", "rope_theta"}
        and rope["rope_type"] == "default"
        and _is_theta(rope["rope_theta"])
        and data["hidden_size"] % data["num_attention_heads"] == 0
        # transformers turns windows on and off by several fields together
        and all(kind == "full_attention" for kind in data.get("layer_types", ()))
        and len(data.get("layer_types", range(layers))) == layers == len(data.get("no_rope_layers", range(layers)))
    )


def native_config(config: Any) -> NativeConfig:
    """Reads the configuration of a model: a PreTrainedConfig, or a namespace of a file that `is_complete`. Raises
    UnsupportedError: another family, a field that the engine does not know, or a value that it does not understand."""
    c, kind = config, config.model_type
    if kind not in FAMILIES:
        raise UnsupportedError(f"it runs {', '.join(FAMILIES)} models, not {kind}")
    if getattr(c, "quantization_config", None):
        raise UnsupportedError("the checkpoint is quantised")
    if not _READ["hidden_act"](c.hidden_act):
        raise UnsupportedError(f"it does not know the activation {c.hidden_act}")
    _check_fields(c.to_dict() if hasattr(c, "to_dict") else vars(c), kind)
    rope = dict(c.rope_parameters)
    rotary = _check_rope(rope)
    if c.pad_token_id is not None and c.pad_token_id >= c.vocab_size:  # torch makes no such embeddings
        raise UnsupportedError(f"its pad_token_id {c.pad_token_id} is outside the vocabulary of {c.vocab_size}")
    head_dim: int = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if head_dim % 2 or c.num_attention_heads % c.num_key_value_heads:
        raise UnsupportedError(
            f"it does not know {c.num_attention_heads} heads of {head_dim} numbers, {c.num_key_value_heads} of keys"
        )
    frequencies, scale = _frequencies(c, rotary, rope, head_dim)
    biased = kind == "qwen2" or bool(getattr(c, "attention_bias", False))
    return NativeConfig(
        hidden_size=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        context=c.max_position_embeddings,
        epsilon=c.rms_norm_eps,
        gate=_GATES[c.hidden_act],
        tied=c.tie_word_embeddings,
        qk_norm=kind == "qwen3",
        attention_bias=biased,
        output_bias=biased and kind != "qwen2",
        mlp_bias=bool(getattr(c, "mlp_bias", False)),
        inverse_frequencies=frequencies,
        rotary_scale=scale,
        layers=_layers(c, kind),
    )


def _check_fields(fields: Mapping[str, Any], kind: str) -> None:
    """Raises UnsupportedError for the first field that is not known, or whose value is not."""
    known = {**_HARMLESS, **_RESOLVED, **_READ, **_FAMILY[kind]}
    for name, value in fields.items():
        if name not in known:
            raise UnsupportedError(f"its configuration holds {name}, which the engine does not know")
        if not known[name](value):
            raise UnsupportedError(f"it does not know the {name} {shortened(value)}")


def _is_theta(value: Any) -> bool:
    return _is_number(value) and value > 0


def _check_rope(rope: dict[str, Any]) -> str:
    """The kind of rotary embedding. Raises UnsupportedError: it is not known, or is told more than belongs to it."""
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROTARY:
        raise UnsupportedError(f"it does not know rotary embeddings of the kind {shortened(kind)}")
    known = {"rope_type", "type", "rope_theta"} | _ROTARY[kind]
    if other := sorted(map(str, rope.keys() - known)):
        raise UnsupportedError(f"it does not know {other[0]} of rotary embeddings of the kind {kind}")
    if rope.get("type", kind) != kind or not _is_theta(rope.get("rope_theta")):
        raise UnsupportedError(f"it does not understand the rotary embeddings {shortened(rope)}")
    return kind


def _frequencies(config: Any, kind: str, rope: dict[str, Any], head_dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies [rotary dimensions / 2], and the factor of cosines and sines."""
    if kind == "default":
        import torch

        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / (rope["rope_theta"] ** exponents)).tolist()), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        inverse, factor = tuple(frequencies.tolist()), float(scale)
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError):
        inverse, factor = (), math.nan
    if len(inverse) != head_dim // 2 or not all(map(math.isfinite, (*inverse, factor))):
        raise UnsupportedError(f"it does not understand the rotary embeddings {shortened(rope)}")
    return inverse, factor


def _layers(c: Any, kind: str) -> tuple[tuple[bool, int], ...]:
    """For each layer, whether it rotates and its window."""
    count: int = c.num_hidden_layers
    window: int | None = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedError(f"it does not know attention of the kind {', '.join(sorted(other))}")
    rotates = (getattr(c, "no_rope_layers", None) if kind == "smollm3" else None) or [1] * count  # 1: it does rotate
    if not len(kinds) == len(rotates) == count:
        raise UnsupportedError(f"it has {count} layers, but tells of {len(kinds)} and {len(rotates)}")
    if "sliding_attention" in kinds and not window:
        raise UnsupportedError("it has layers of sliding attention, but no sliding_window")
    windows = [(window or 0) if layer == "sliding_attention" else 0 for layer in kinds]
    return tuple(zip(map(bool, rotates), windows, strict=True))
