"""The native engine is strict about what it knows. These are configurations as people publish them; it knows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medusa.engines.native_config import native_config
from medusa.models import zoo

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
}
_QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def shape(hidden: int, heads: int, kv_heads: int, inner: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 2 chat": {
        **{name: value for name, value in _LLAMA.items() if name not in ("attention_bias", "attention_dropout")},
        **shape(4096, 32, 32, 11008, 32),
        "_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
    },
    "Llama 3.2 1B": {
        **_LLAMA,
        **shape(2048, 32, 8, 8192, 16),
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "SmolLM2 135M": {
        **_LLAMA,
        **shape(576, 9, 3, 1536, 30),
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "pad_token_id": 2,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "vocab_size": 49152,
    },
    "Qwen 2.5 0.5B": {
        **_QWEN,
        **shape(896, 14, 2, 4864, 24),
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 21,
        "model_type": "qwen2",
        "sliding_window": 32768,
    },
    "DeepSeek R1 distilled into Qwen": {
        **_QWEN,
        **shape(1536, 12, 2, 8960, 28),
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 21,
        "model_type": "qwen2",
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_mrope": False,
    },
    "Qwen 3 0.6B": {
        **_QWEN,
        **shape(1024, 16, 8, 3072, 28),
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Mistral 7B v0.3": {
        **{name: value for name, value in _LLAMA.items() if name not in ("attention_bias", "pretraining_tp")},
        **shape(4096, 32, 8, 14336, 32),
        "architectures": ["MistralForCausalLM"],
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32768,
    },
    "SmolLM 3": {
        **{name: value for name, value in _LLAMA.items() if name != "pretraining_tp"},
        **shape(2048, 16, 4, 11008, 36),
        "architectures": ["SmolLM3ForCausalLM"],
        "bos_token_id": 128000,
        "eos_token_id": 128012,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "pad_token_id": 128004,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_known_whole(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
    config = native_config(zoo.load_config(zoo.resolve(str(tmp_path))))
    assert config.hidden_size == PUBLISHED[name]["hidden_size"]
    assert all(window == 0 for _, window in config.layers)
