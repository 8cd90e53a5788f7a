"""Families that no code here knows, each with a random configuration: greedy text on `auto` is that of transformers, or
the model is refused in one sentence."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from medusa.models import zoo
from medusa.models.quiet import quiet
from test_perturbations import assert_right_or_refused
from tiny_models import build

# What a configuration may be told, by whatever name; a list holds what is drawn from.
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 160),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    "num_key_value_heads": [1, 2, 4],
    "head_dim": [8, 16],
    "hidden_act": ["silu", "gelu", "relu"],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "use_bias": [True, False],
    "sliding_window": [None, 3, 6],
    "window_size": [3, 6],
    "use_sliding_window": [True, False],
    "parallel_attn": [True, False],
    "new_decoder_architecture": [True, False],
    "multi_query": [True, False],
    "alibi": [True, False],
    "use_parallel_residual": [True, False],
    "qk_layernorm": [True, False],
    "use_qk_norm": [True, False],
    "logit_scale": [0.5, 2.0],
    "embedding_multiplier": [0.5, 2.0],
    "residual_multiplier": [0.5, 2.0],
    "final_logit_softcapping": [None, 5.0],
    "attn_logit_softcapping": [None, 5.0],
    "rotary_dim": 8,
    "rope_parameters": [
        None,
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ],
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "hidden_size_per_layer_input": 8,
    "attention_types": [[[["global", "local"], 1]]],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOST_PARAMETERS = 3_000_000
KINDS = [
    "afmoe", "apertus", "arcee", "bert", "bitnet", "bloom", "codegen", "cohere", "cohere2", "ctrl", "exaone4", "falcon",
    "falcon_h1", "gemma", "gemma4_text", "glm4", "gpt_bigcode", "gpt_neo", "gpt_oss", "gptj", "granite", "helium",
    "hunyuan_v1_dense", "llama4_text", "mamba", "ministral", "mixtral", "mpt", "nemotron", "olmo2", "olmo3",
    "openai-gpt", "opt", "phi", "phimoe", "qwen2_moe", "stablelm", "starcoder2", "xglm", "xlnet",
]  # fmt: skip


def random_model(kind: str, seed: int) -> transformers.PreTrainedModel:
    """A model of the first random configuration of its family that transformers can make and run."""
    rng = random.Random(f"{kind} {seed}")
    config_class = CONFIG_MAPPING[kind]
    names = [field.name for field in dataclasses.fields(config_class)]
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    for _ in range(20):
        settings = {
            name: rng.choice(SETTINGS[name]) if isinstance(SETTINGS[name], list) else SETTINGS[name]
            for name in names
            if name in SETTINGS
        }
        try:
            with quiet():
                with torch.device("meta"):
                    size = model_class(config_class(**settings)).num_parameters()
                if size > MOST_PARAMETERS:
                    continue
                model = build(model_class, config_class(**settings), seed=seed)
                model(torch.arange(20)[None])
        except Exception:  # noqa: BLE001  # settings that do not go together
            continue
        return model
    raise AssertionError(f"no configuration of {kind} could be made")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_hub_is_reachable", lambda: False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # of transformers' own, about its own models
def test_another_family_gives_the_text_of_transformers_or_is_refused(kind: str, tmp_path: Path) -> None:
    random_model(kind, seed=0).save_pretrained(tmp_path)
    assert_right_or_refused(tmp_path, "auto")
