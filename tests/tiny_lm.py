"""A whole `LanguageModel` on a tiny model that writes ASCII and soon repeats itself, so that drafts are accepted."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa.api import LanguageModel
from medusa.engines.transformers import TransformersBackend
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads
from tiny_models import TOKENIZER_VOCAB, byte_ids, make_model, make_tokenizer, stirred

END = 2  # <|end|>


@cache
def writer() -> PreTrainedModel:
    """Without attention what it says depends on the last token, so it falls into a loop; it prefers printable ASCII."""
    model = make_model("llama", vocab_size=TOKENIZER_VOCAB)
    printable = set(byte_ids(bytes(range(32, 127))))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        head = model.get_output_embeddings().weight
        head[[i for i in range(TOKENIZER_VOCAB) if i not in printable]] = 0
    return model


def random_heads(model: PreTrainedModel, **changes: Any) -> Heads:
    backend = TransformersBackend(model)
    config = HeadsConfig(hidden_size=backend.hidden_size, vocab_size=backend.vocab_size, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = Heads(config, backend.base_weights())
    return stirred(heads, seed=5)


def make(*, heads: bool = False, **options: Any) -> LanguageModel:
    options.setdefault("backend", TransformersBackend(writer()))
    options.setdefault("tokenizer", make_tokenizer())
    options.setdefault("eos_token_ids", [END])
    return LanguageModel("tiny", heads=random_heads(writer(), kind="recurrent") if heads else None, **options)


def with_tree(**options: Any) -> LanguageModel:
    """A tiny model whose heads come with a tree of 300 nodes."""
    lm = make(heads=True, **options)
    assert lm.heads is not None
    table = [[min(3, int(random.Random(7 * i + k).expovariate(0.6))) for k in range(4)] for i in range(4000)]
    paths: dict[tuple[int, ...], float] = {}
    for line in table:
        for depth in range(1, 5):
            paths[tuple(line[:depth])] = paths.get(tuple(line[:depth]), 0.0) + 1 / len(table)
    best = sorted(paths.items(), key=lambda item: -item[1])[:299]
    lm.heads.config = replace(lm.heads.config, tree=tuple(best))
    return lm
