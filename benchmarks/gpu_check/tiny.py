"""A tiny model directory with tokenizer and heads, random and seeded, to try everything with where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gpu_check.shapes import SHIPPED, Shape, random_heads, random_model, stir
from medusa.engines.transformers import TransformersBackend
from medusa.heads.config import HeadsConfig
from medusa.heads.file import read_config, save_heads

SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def write_tiny(directory: Path) -> tuple[Path, Path]:
    """Writes a model and heads; returns their directories."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
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
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    shape = Shape(3, 32, 4, 2, 48, len(vocabulary))
    model = random_model(shape, "cpu", torch.float32, std=0.3)
    model_directory, heads_directory = directory / "model", directory / "heads"
    model.save_pretrained(model_directory)
    fast.save_pretrained(model_directory)
    backend = TransformersBackend(model, self_check=False)
    config = HeadsConfig(
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        kind="recurrent",
        draft_vocab=128,
        mlp_width=2 * shape.hidden,
        feature_layers=(1, 2),
        tree=read_config(SHIPPED).tree[:63],
    )
    heads = random_heads(config, backend, "cpu", torch.float32)
    stir(heads, 0.1)
    save_heads(heads, heads_directory, torch.float32)
    return model_directory, heads_directory
