"""Tiny random models of many families, and a tiny byte-level tokenizer with a chat template. All are seeded.

transformers starts weights at 0.02, which makes every distribution flat and every argmax a near tie. Here the weights
are scaled up, so that logits lie apart, attention is far from uniform and a wrong mask or position shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from medusa.heads.module import Heads

VOCAB = 160
WINDOW = 8  # of sliding attention; shorter than the texts of the tests

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def _settings(**changes: Any) -> dict[str, Any]:
    return {**_BASE, **changes}


# Gemma and GPT-2 come with a tied LM head. A random model of that kind repeats the last token for ever, because its
# embedding is most of the hidden state; so here only Qwen 2 is tied.
# family -> (class name before "Config" and "ForCausalLM", its settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _settings()),
    "mistral": ("Mistral", _settings(sliding_window=WINDOW)),
    "qwen2": (
        "Qwen2",
        _settings(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, tie_word_embeddings=True),
    ),
    "qwen3": ("Qwen3", _settings(head_dim=16)),
    "smollm3": ("SmolLM3", _settings(no_rope_layers=[1, 0, 1])),
    "gemma2": ("Gemma2", _settings(head_dim=16, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=16)),
    "gemma3": (
        "Gemma3",
        _settings(head_dim=16, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=16),
    ),
    "phi3": ("Phi3", _settings()),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in _settings(rotary_pct=0.5).items() if k != "num_key_value_heads"}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}


def make_model(
    family: str = "llama",
    *,
    seed: int = 0,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A new model of a family, with random weights; `changes` go to its config."""
    name, settings = FAMILIES[family]
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**settings, **changes})
    model_class = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    return build(model_class, config, seed=seed, attention=attention, dtype=dtype)


def build(
    model_class: Callable[[Any], PreTrainedModel],
    config: Any,
    *,
    seed: int = 0,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A model of any class with weights scaled up; no text ends by chance, as no end-of-text token is set."""
    if attention is not None:
        config._attn_implementation = attention
    model = model_class(config)
    scale_up(model, seed)
    generation_config = model.generation_config
    assert generation_config is not None
    generation_config.eos_token_id = None
    generation_config.pad_token_id = 0
    return model.to(dtype).eval()


@torch.no_grad()
def scale_up(model: nn.Module, seed: int) -> None:
    """Embeddings of standard deviation 0.5, matrices of 2 / sqrt(inputs), and norms and biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * 2.0 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)


def stirred(heads: Heads, seed: int) -> Heads:
    """The same heads, frozen, every weight moved a little: those that training starts from are zero, which would hide
    mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_(False)
    return heads


@cache
def shared_model(family: str = "llama", attention: str | None = None) -> PreTrainedModel:
    """The float32 model of a family, made once; tests must not change it."""
    return make_model(family, attention=attention)


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of a text by the model itself, without a cache."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits.float()


def agrees(model: PreTrainedModel, prompt: list[int], found: list[int], expected: list[int]) -> bool:
    """Whether two greedy continuations are the same, but for a tie: a first mismatch where the model's two best
    logits lie less than 1e-4 apart."""
    for i, (a, b) in enumerate(zip(found, expected, strict=False)):
        if a != b:
            best = plain_logits(model, [*prompt, *expected[:i]])[-1].topk(2).values
            return bool(best[0] - best[1] < 1e-4)
    return len(found) == len(expected)


# --- a tokenizer ------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant may speak, not ' + m['role']) }}"
    "{% endif %}"
    "<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("â", "Ĥ")]
SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")
TOKENIZER_VOCAB = 256 + len(MERGES) + len(SPECIAL)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level: three special tokens, then the 256 bytes, then a few merges, one of which is a whole character of
    two bytes and one the first two bytes of a character of three."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def byte_ids(data: bytes) -> list[int]:
    """One token for each byte, merges left aside: characters are split over tokens."""
    ids = _byte_table()
    return [ids[byte] for byte in data]


@cache
def _byte_table() -> dict[int, int]:
    # A byte that is a printable Latin-1 character stands for itself, any other for the next character from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters, spare = {}, 256
    for byte in range(256):
        if byte in printable:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(spare)
            spare += 1
    order = {letter: len(SPECIAL) + i for i, letter in enumerate(sorted(letters.values()))}
    return {byte: order[letter] for byte, letter in letters.items()}
