"""The native backend against transformers: every family and setting it runs, whole texts, checkpoints on disk, and what
it refuses. Its kernels are tested in test_native_kernels.py.
"""

from __future__ import annotations

import importlib
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from helpers import fill, path_nodes
from medusa.decoding.draft import NgramDrafter, UnionDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import decode
from medusa.engines.native import ISA_VARIABLE, PRECISIONS, Checkpoint, NativeBackend, native_module
from medusa.engines.native_config import NativeConfig, UnsupportedError, native_config
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads
from test_losslessness import NEW_TOKENS, SLOTS, batch, heads_drafters, plain, prompts, samplings
from test_losslessness import VOCAB as SMALL_VOCAB
from test_transformers_backend import Nodes, assert_one_sentence
from tiny_models import VOCAB, WINDOW, agrees, make_model, plain_logits, shared_model

medusa_native = pytest.importorskip("medusa_native")

ISAS = medusa_native.usable_isas()
every_isa = pytest.mark.parametrize("isa", ISAS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
NEAR = 3e-5  # of the largest logit; single precision comes to 1e-6, and the two kinds of GELU differ by 1e-4


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


# name -> (family, what is changed in its settings)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with gelu": ("llama", {"hidden_act": "gelu"}),
    "llama with gelu of tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama with linear rope": ("llama", rope("linear", factor=4.0)),
    "llama with the rope of llama 3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama with yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama, one key-value head": ("llama", {"num_key_value_heads": 1}),
    "llama, a key-value head for each": ("llama", {"num_key_value_heads": 4}),
    "llama, eight heads to two": ("llama", {"num_attention_heads": 8, "head_dim": 6}),
    "llama, odd sizes": ("llama", {"hidden_size": 40, "intermediate_size": 50, "vocab_size": 157}),
    "llama, odd heads": ("llama", {"hidden_size": 40, "head_dim": 12, "intermediate_size": 50, "vocab_size": 157}),
    "llama, wide heads": ("llama", {"head_dim": 80, "intermediate_size": 200}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "mistral, full attention": ("mistral", {"sliding_window": None}),
    "mistral, narrow windows": ("mistral", {"sliding_window": 2, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2, full attention": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 with windows and biases": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "attention_bias": True},
    ),
    "smollm3": ("smollm3", {}),
    "smollm3 with windows and biases": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "attention_bias": True, "mlp_bias": True},
    ),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def variant_model(variant: str) -> PreTrainedModel:
    family, changes = VARIANTS[variant]
    return make_model(family, **changes)


def native(model: PreTrainedModel, dtype: str = "float32", **options: Any) -> NativeBackend:
    return NativeBackend(native_config(model.config), model.state_dict(), dtype=dtype, **options)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < NEAR * float(expected.abs().max())


def random_text(rng: random.Random, size: int, vocab: int = VOCAB) -> list[int]:
    return [rng.randrange(vocab) for _ in range(size)]


def random_tree(rng: random.Random, size: int, vocab: int = VOCAB) -> Nodes:
    parents = (-1, *(i - 1 if rng.random() < 0.5 else rng.randrange(i) for i in range(1, size)))
    return Nodes(tuple(random_text(rng, size, vocab)), parents)


# --- the numbers of transformers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """A prompt, then rounds of a tree and the path kept of it, with the logits and features of transformers."""

    text: list[int]
    prefill: tuple[Tensor, Tensor]
    rounds: list[tuple[Nodes, tuple[Tensor, Tensor], list[int]]]


@cache
def session(variant: str) -> Session:
    rng = random.Random(variant)
    backend = TransformersBackend(variant_model(variant), feature_layers=(1, 2))
    vocab = backend.vocab_size
    text = random_text(rng, 2 * WINDOW + 3, vocab)
    prefill = fill(backend, 0, text)
    rounds = []
    for size in (9, 1, 14, 6):
        tree = random_tree(rng, size, vocab)
        results = backend.verify([0], [tree])
        path = path_nodes(tree.parents, rng.randrange(size))
        backend.keep([0], [path])
        rounds.append((tree, results, path))
    return Session(text, prefill, rounds)


@every_isa
@every_variant
def test_prompts_trees_and_what_is_kept_give_the_numbers_of_transformers(variant: str, isa: str) -> None:
    expected = session(variant)
    backend = native(variant_model(variant), feature_layers=(1, 2), isa=isa)
    assert backend.engine.isa == isa
    for found, right in zip(fill(backend, 0, expected.text), expected.prefill, strict=True):
        assert_near(found, right)
    length = len(expected.text)
    for tree, results, path in expected.rounds:
        assert backend.length(0) == length
        for found, right in zip(backend.verify([0], [tree]), results, strict=True):
            assert_near(found, right)
        assert backend.length(0) == length, "verify leaves the length alone"
        backend.keep([0], [path])
        length += len(path)


@pytest.mark.parametrize(
    ("variant", "other"),
    [
        ("llama with linear rope", rope("default")),
        ("llama with the rope of llama 3", rope("default")),
        ("llama with yarn", rope("default")),
        ("llama with gelu", {"hidden_act": "gelu_new"}),
        ("llama with gelu of tanh", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": WINDOW + 1}),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ("smollm3 with windows and biases", {"sliding_window": WINDOW - 1}),
    ],
)
def test_another_setting_would_show_in_the_numbers(variant: str, other: dict[str, Any]) -> None:
    """Else the test above would be blind to it."""
    model, expected = variant_model(variant), session(variant)
    config = type(model.config)(**{**model.config.to_dict(), **other})
    backend = NativeBackend(native_config(config), model.state_dict(), dtype="float32")
    right = expected.prefill[0]
    assert float((fill(backend, 0, expected.text)[0] - right).abs().max()) > 1e-4 * float(right.abs().max())


@pytest.mark.parametrize("layers", [(), (1,), (2, 1)])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "smollm3"])
def test_features_are_the_hidden_states_asked_for_and_the_input_of_the_lm_head(
    variant: str, layers: tuple[int, ...]
) -> None:
    model, rng = variant_model(variant), random.Random(0)
    text, chain = random_text(rng, 15), Nodes((5, 6, 7), (-1, 0, 1))
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([[*text, *chain.tokens]]), output_hidden_states=True, use_cache=False)
    hook.remove()
    expected = torch.cat([*(out.hidden_states[i][0] for i in layers), seen[0][0]], dim=-1)
    backend = native(model, feature_layers=layers)
    assert_near(fill(backend, 0, text)[1], expected[len(text) - 1])
    _, features = backend.verify([0], [chain])
    assert features.shape == (1, 3, (1 + len(layers)) * backend.hidden_size)
    for part, right in zip(
        features[0].split(backend.hidden_size, -1), expected[len(text) :].split(backend.hidden_size, -1), strict=True
    ):
        assert_near(part, right)


def test_features_stay_when_the_backend_goes_on() -> None:
    """The loop holds those of the last accepted token until the next draft."""
    backend = native(shared_model("llama"), num_slots=2)
    _, first = fill(backend, 0, [1, 2, 3])
    _, second = backend.verify([0], [Nodes((4, 5), (-1, 0))])
    before = first.clone(), second.clone()
    fill(backend, 1, list(range(30)))
    backend.verify([0, 1], [Nodes((7, 8, 9), (-1, 0, 1))] * 2)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


@every_isa
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("mistral", {"sliding_window": 300}), ("qwen2", {}), ("smollm3", {})]
)
def test_a_prompt_of_several_chunks_gives_the_numbers_of_transformers(
    family: str, changes: dict[str, Any], isa: str
) -> None:
    model, text, tree, expected = long_text(family, **changes)
    backend = native(model, isa=isa)
    assert len(text) > 2 * medusa_native.CHUNK
    logits, _ = fill(backend, 0, text)
    assert_near(logits, expected[0])
    logits, _ = backend.verify([0], [tree])
    assert_near(logits[0], expected[1])


@every_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_reading_a_text_gives_the_features_of_each_of_its_beginnings(dtype: str, isa: str) -> None:
    model, text, _, _ = long_text("llama")
    backend = native(model, isa=isa, dtype=dtype, feature_layers=(1, 2))
    last, read = backend.extend(0, text, every=True)
    last = last.clone()
    assert backend.length(0) == len(text)
    assert read.shape == (len(text), 3 * model.config.hidden_size)
    assert torch.equal(last, fill(backend, 0, text)[0])
    for end in (1, 2, 255, 256, 257, 400, len(text)):
        assert torch.equal(read[end - 1], fill(backend, 0, text[:end])[1]), end


@cache
def _long_text(family: str, changes: tuple[tuple[str, Any], ...]) -> tuple[PreTrainedModel, list[int], Nodes, Any]:
    model = make_model(family, max_position_embeddings=1024, **dict(changes))
    rng = random.Random(family)
    text, tree = random_text(rng, 600), random_tree(rng, 12)
    reference = TransformersBackend(model)
    return model, text, tree, (fill(reference, 0, text)[0].clone(), reference.verify([0], [tree])[0][0])


def long_text(family: str, **changes: Any) -> tuple[PreTrainedModel, list[int], Nodes, Any]:
    return _long_text(family, tuple(sorted(changes.items())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_every_float_type_are_read_as_they_are(dtype: torch.dtype) -> None:
    model, text = make_model("qwen2"), list(range(20))
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    backend = NativeBackend(native_config(model.config), tensors, dtype="float32")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert_near(fill(backend, 0, text)[0], plain_logits(model, text)[-1])


@every_precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["qwen2", "llama, odd sizes", "llama, odd heads", "llama, wide heads"])
def test_a_weight_is_its_number_whatever_type_holds_it(variant: str, dtype: torch.dtype, precision: str) -> None:
    model = variant_model(variant)
    config, text = native_config(model.config), list(range(20))
    small = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    wide = {name: tensor.float() for name, tensor in small.items()}
    found, expected = (fill(NativeBackend(config, tensors, dtype=precision), 0, text)[0] for tensors in (small, wide))
    assert torch.equal(found, expected)


def test_weights_need_not_be_contiguous_and_may_ask_for_gradients() -> None:
    model, text = shared_model("llama"), list(range(20))
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        tensors[name] = tensor
        if tensor.ndim == 2:
            tensors[name] = tensor.detach().t().contiguous().t()
            assert not tensors[name].is_contiguous()
    backend = NativeBackend(native_config(model.config), tensors, dtype="float32")
    del tensors
    assert_near(fill(backend, 0, text)[0], plain_logits(model, text)[-1])


def test_the_engine_reads_embeddings_where_they_lie_and_takes_no_copy() -> None:
    backend = native(shared_model("llama"))
    embedding, norm = backend.base_weights().embedding, torch.ones(backend.hidden_size)
    with_gaps = embedding.t().contiguous().t()
    for ends in ((with_gaps, norm, embedding), (embedding, norm, with_gaps)):
        with pytest.raises(ValueError, match="without gaps"):
            backend.engine.load_ends(*ends)


def test_base_weights_are_the_tensors_of_the_checkpoint() -> None:
    for family in ("llama", "qwen2"):
        tensors = shared_model(family).state_dict()
        base = NativeBackend(native_config(shared_model(family).config), tensors).base_weights()
        assert torch.equal(base.embedding, tensors["model.embed_tokens.weight"])
        assert torch.equal(base.lm_head, tensors["lm_head.weight"])


def test_the_context_can_be_filled_to_the_last_place() -> None:
    model, rng = shared_model("llama"), random.Random(1)
    backend = native(model)
    assert backend.max_length == 256
    text = random_text(rng, 254)
    fill(backend, 0, text)
    most = backend.max_nodes
    wide = Nodes(tuple(i % VOCAB for i in range(most)), (-1, *([0] * (most - 1))))
    logits, _ = backend.verify([0], [wide])
    expected = plain_logits(model, [*text, wide.tokens[0], wide.tokens[-1]])[-2:]
    assert_near(logits[0, [0, -1]].contiguous(), expected)
    backend.keep([0], [[0, most - 1]])
    assert backend.length(0) == 256
    with pytest.raises(UsageError, match="past the context"):
        backend.verify([0], [Nodes((1,), (-1,))])
    text = random_text(rng, 256)
    assert_near(fill(backend, 0, text)[0], plain_logits(model, text)[-1])


@pytest.mark.parametrize("length", [1, 5, 17])
def test_a_short_max_length_works(length: int) -> None:
    backend, text = native(shared_model("llama"), max_length=length), random_text(random.Random(2), length)
    assert backend.max_length == length
    assert_near(fill(backend, 0, text)[0], plain_logits(shared_model("llama"), text)[-1])


def test_progress_is_told_layer_by_layer() -> None:
    told: list[tuple[int, int]] = []
    native(shared_model("llama"), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- whole texts ------------------------------------------------------------------------------------------------------


@cache
def text_backend(precision: str) -> NativeBackend:
    model = make_model("mistral", vocab_size=SMALL_VOCAB)
    return native(model, precision, num_slots=SLOTS, feature_layers=(1,))


@every_precision
@settings(max_examples=10)
@given(data=st.data(), prompts=prompts, sampling=samplings, nodes=st.integers(1, 14))
def test_any_heads_tree_and_batch_give_the_text_of_plain_decoding_without_tolerance(
    precision: str, data: st.DataObject, prompts: list[list[int]], sampling: Sampling, nodes: int
) -> None:
    backend = text_backend(precision)
    heads = data.draw(heads_drafters(backend))
    drafter = data.draw(st.sampled_from([heads, NgramDrafter(), UnionDrafter(heads, NgramDrafter())]))
    texts, _ = batch(backend, drafter, nodes, prompts, sampling)
    assert texts == [plain(backend, prompt, sampling) for prompt in prompts]


@every_precision
def test_drafts_are_accepted_in_these_texts(precision: str) -> None:
    """Else the identity above would say nothing."""
    backend = text_backend(precision)
    heads = Heads(
        HeadsConfig(hidden_size=backend.hidden_size, vocab_size=SMALL_VOCAB, feature_layers=(1,)),
        backend.base_weights(),
    )
    rng = random.Random(0)
    texts = [random_text(rng, 12, SMALL_VOCAB) for _ in range(SLOTS)]
    _, steps = batch(backend, UnionDrafter(HeadsDrafter(heads), NgramDrafter()), 14, texts, Sampling())
    assert steps < NEW_TOKENS - 1


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_greedy_text_in_float32_is_that_of_transformers(variant: str) -> None:
    model, rng = variant_model(variant), random.Random(3)
    backend = native(model)
    for _ in range(3):
        prompt = random_text(rng, rng.randint(1, 20))
        steps = decode(ReferenceStepper(backend, NgramDrafter(), 8), prompt, max_new_tokens=30)
        found = [token for step in steps for token in step.tokens]
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
        assert agrees(model, prompt, found, out[0, len(prompt) :].tolist())


# --- a bad call changes nothing ---------------------------------------------------------------------------------------

ONE = Nodes((1,), (-1,))
TREE = Nodes((1, 2, 3, 4, 5), (-1, 0, 0, 1, 3))
DEEP = Nodes(tuple(range(12)), tuple(range(-1, 11)))

REFUSALS: dict[str, tuple[Callable[[NativeBackend], Any], str]] = {
    "a prompt for a slot that is not there": (lambda b: b.extend(4, [1]), "no slot 4"),
    "a prompt for a negative slot": (lambda b: b.extend(-1, [1]), "no slot -1"),
    "a draft for a slot that is not there": (lambda b: b.verify([0, 9], [ONE, ONE]), "no slot 9"),
    "a path for a slot that is not there": (lambda b: b.keep([7], [[0]]), "no slot 7"),
    "an empty prompt": (lambda b: b.extend(2, []), "empty"),
    "a prompt past the context": (lambda b: b.extend(2, [1] * 31), "31 tokens.*30"),
    "a prompt outside the vocabulary": (lambda b: b.extend(2, [1, VOCAB]), f"token {VOCAB} .*vocabulary"),
    "a negative token": (lambda b: b.extend(2, [-1]), "token -1 .*vocabulary"),
    "a draft outside the vocabulary": (lambda b: b.verify([0], [Nodes((1, 999), (-1, 0))]), "token 999 .*vocabulary"),
    "a draft past the context": (lambda b: b.verify([1, 0], [ONE, DEEP]), "past the context"),
    "a draft with too many nodes": (lambda b: b.verify([0], [Nodes((1,) * 257, (-1, *([0] * 256)))]), "256 nodes"),
    "a draft without nodes": (lambda b: b.verify([0], [Nodes((), ())]), "1 to"),
    "a draft without a root": (lambda b: b.verify([0], [Nodes((1, 2), (0, 0))]), "parent"),
    "two roots": (lambda b: b.verify([0], [Nodes((1, 2), (-1, -1))]), "parent"),
    "a child before its parent": (lambda b: b.verify([0], [Nodes((1, 2, 3), (-1, 2, 0))]), "parent"),
    "tokens without parents": (lambda b: b.verify([0], [Nodes((1, 2), (-1,))]), "parent"),
    "a draft for an empty slot": (lambda b: b.verify([0, 2], [ONE, ONE]), "slot 2 is empty"),
    "drafts twice for a slot": (lambda b: b.verify([0, 0], [ONE, ONE]), "twice"),
    "fewer drafts than slots": (lambda b: b.verify([0, 1], [ONE]), "needs a tree"),
    "no drafts": (lambda b: b.verify([], []), "needs a tree"),
    "a path that begins below the root": (lambda b: b.keep([0], [[1]]), "path"),
    "a path with a gap": (lambda b: b.keep([0], [[0, 3]]), "path"),
    "a path that goes sideways": (lambda b: b.keep([0], [[0, 1, 2]]), "path"),
    "a path that stays": (lambda b: b.keep([0], [[0, 0]]), "path"),
    "a path past the tree": (lambda b: b.keep([0], [[0, 5]]), "path"),
    "a negative node": (lambda b: b.keep([0], [[-1]]), "path"),
    "a path for a slot that was not verified": (lambda b: b.keep([0, 3], [[0], [0]]), "path"),
    "paths twice for a slot": (lambda b: b.keep([0, 0], [[0], [0]]), "twice"),
    "a copy from a slot that is not there": (lambda b: b.copy(4, 1, 1), "no slot 4"),
    "a copy to a slot that is not there": (lambda b: b.copy(1, -1, 1), "no slot -1"),
    "a copy of more than a slot holds": (lambda b: b.copy(0, 1, 21), "slot 0 holds 20 tokens: 21"),
    "a copy from an empty slot": (lambda b: b.copy(2, 0, 1), "slot 2 holds 0 tokens"),
    "a copy of fewer tokens than none": (lambda b: b.copy(0, 1, -1), "-1 of them cannot"),
    "a copy of more than 32 bits": (lambda b: b.copy(0, 1, 2**40), "whole number"),
    "a text past the context": (lambda b: b.extend(0, [1] * 11), "31 tokens.*30"),
    "no tokens after a text": (lambda b: b.extend(0, []), "empty"),
    "a token outside the vocabulary after a text": (lambda b: b.extend(0, [1, VOCAB]), f"token {VOCAB} .*vocabulary"),
    "fewer paths than slots": (lambda b: b.keep([0, 1], [[0]]), "needs a path"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_bad_call_is_refused_in_one_sentence_and_changes_nothing(refusal: str) -> None:
    call, reason = REFUSALS[refusal]
    model = shared_model("mistral")
    disturbed, calm = (native(model, num_slots=4, max_length=30) for _ in range(2))
    texts = [random_text(random.Random(4), size) for size in (20, 12)]
    for backend in (disturbed, calm):
        for slot in (3, 0, 1):
            fill(backend, slot, texts[slot % 2])
        backend.verify([1, 0], [TREE, TREE])
    with pytest.raises(UsageError, match=reason) as error:
        call(disturbed)
    assert_one_sentence(error)
    assert [disturbed.length(slot) for slot in range(4)] == [20, 12, 0, 12]
    for backend in (disturbed, calm):  # what was verified before can still be kept
        backend.keep([1, 0], [[0, 1, 3], [0, 2]])
    for a, b in zip(disturbed.verify([0, 3, 1], [TREE] * 3), calm.verify([0, 3, 1], [TREE] * 3), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fill(disturbed, 2, texts[0])[0], fill(calm, 2, texts[0])[0])


def test_a_path_can_be_kept_once() -> None:
    backend = native(shared_model("llama"))
    fill(backend, 0, [1, 2, 3])
    with pytest.raises(UsageError, match="not verified"):
        backend.keep([0], [[0]])
    backend.verify([0], [TREE])
    backend.keep([0], [[0, 2]])
    with pytest.raises(UsageError, match="not verified"):
        backend.keep([0], [[0]])
    backend.verify([0], [TREE])
    backend.release(0)
    with pytest.raises(UsageError, match="not verified"):
        backend.keep([0], [[0]])
    assert backend.length(0) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float16"}, "float16.*float32, bfloat16, int8, int4"),
        ({"num_slots": 0}, "num_slots"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 257}, "max_length"),
        ({"feature_layers": (0,)}, "feature_layers"),
        ({"feature_layers": (1, 3)}, "feature_layers"),
        ({"isa": "mmx"}, "mmx.*usable.*portable"),
        ({"threads": 0}, "threads.*not 0"),
        ({"threads": -2}, "threads.*not -2"),
        ({"threads": 5000}, "threads.*not 5000"),
    ],
)
def test_a_bad_option_is_a_usage_error(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        native(shared_model("llama"), **options)
    assert_one_sentence(error)


@every_isa
def test_the_environment_chooses_the_instruction_set_where_the_caller_does_not(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model("llama")
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert native(model).engine.isa == ISAS[0], "the best"
    monkeypatch.setenv(ISA_VARIABLE, isa)
    assert native(model).engine.isa == isa
    assert native(model, isa="portable").engine.isa == "portable"
    monkeypatch.setenv(ISA_VARIABLE, "mmx")
    assert native(model, isa=isa).engine.isa == isa
    with pytest.raises(UsageError, match=f"mmx.*{isa}") as error:
        native(model)
    assert_one_sentence(error)


def test_threads_are_those_asked_for_or_those_of_torch() -> None:
    model = shared_model("llama")
    assert native(model, threads=3).engine.threads == 3
    assert native(model).engine.threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": ((True, 0), (True, -1), (True, 0))}, "window must not be negative"),
        ({"epsilon": math.nan}, "epsilon is not a finite number"),
        ({"rotary_scale": math.inf}, "rotary_scale is not a finite number"),
        ({"inverse_frequencies": (1.0, math.nan, 0.1, 0.01)}, "frequency is not a finite number"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    model = shared_model("llama")
    config = replace(native_config(model.config), **changes)
    with pytest.raises(MedusaError, match=reason) as error:
        NativeBackend(config, model.state_dict())
    assert_one_sentence(error)


@pytest.mark.parametrize(("level", "count"), [(2**31 - 1, 1), (0, 1), (1, -1), (1, 2**31 - 1), (1, 0)])
def test_heads_are_asked_for_a_level_and_a_number_of_tokens_that_there_are(level: int, count: int) -> None:
    backend = native(shared_model("llama"))
    heads = medusa_native.Heads(backend.engine, kind="sequential", levels=1, features=1, precision="float32")
    size = backend.hidden_size
    heads.load_level(1, [{"linear": torch.zeros(size, 2 * size)}])
    heads.load_tied([])
    base, nodes = np.zeros((1, size), np.float32), np.zeros((1, 1, 0), np.float32)
    zero = np.zeros((1, 1), np.int32)
    assert heads.level(1, base, nodes, zero, zero, 1)[1].shape == (1, 1, 1)
    with pytest.raises(ValueError, match=r"no such level|more guesses"):
        heads.level(level, base, nodes, zero, zero, count)


# --- bad weights ------------------------------------------------------------------------------------------------------

# name in the checkpoint of a Qwen 3 -> how messages name it
PLACES = {
    "model.embed_tokens.weight": "embeddings",
    "model.layers.0.self_attn.q_proj.weight": "layer 0: q",
    "model.layers.1.self_attn.k_proj.weight": "layer 1: .*k",
    "model.layers.1.self_attn.v_proj.weight": "layer 1: .*v",
    "model.layers.2.self_attn.o_proj.weight": "layer 2: o",
    "model.layers.1.self_attn.q_norm.weight": "layer 1: q norm",
    "model.layers.1.self_attn.k_norm.weight": "layer 1: k norm",
    "model.layers.1.self_attn.k_proj.bias": "layer 1: k bias",
    "model.layers.0.self_attn.o_proj.bias": "layer 0: o",
    "model.layers.2.mlp.gate_proj.weight": "layer 2: gate",
    "model.layers.2.mlp.up_proj.weight": "layer 2: .*up",
    "model.layers.1.mlp.down_proj.weight": "layer 1: down",
    "model.layers.1.input_layernorm.weight": "layer 1: input norm",
    "model.layers.1.post_attention_layernorm.weight": "layer 1: post norm",
    "model.norm.weight": "final norm",
    "lm_head.weight": "LM head",
}
every_place = pytest.mark.parametrize("name", PLACES)


@cache
def _sound() -> tuple[NativeConfig, dict[str, Tensor]]:
    model = make_model("qwen3", attention_bias=True)
    return native_config(model.config), dict(model.state_dict())


def test_the_places_of_weights_are_all_tried() -> None:
    kinds = {name.split(".", 3)[-1] if "layers" in name else name for name in _sound()[1]}
    tried = {name.split(".", 3)[-1] if "layers" in name else name for name in PLACES}
    assert kinds - tried == {"self_attn.q_proj.bias", "self_attn.v_proj.bias"}
    assert tried <= kinds


@every_place
def test_a_missing_weight_is_named(name: str) -> None:
    config, tensors = _sound()
    with pytest.raises(MedusaError, match=f"{name} is missing") as error:
        NativeBackend(config, {key: tensor for key, tensor in tensors.items() if key != name})
    assert_one_sentence(error)


@every_place
@pytest.mark.parametrize("shape", ["a row too many", "transposed", "three dimensions"])
def test_a_weight_of_the_wrong_shape_is_named(name: str, shape: str) -> None:
    config, tensors = _sound()
    weight = tensors[name]
    if shape == "a row too many":
        weight = torch.cat([weight, weight[:1]])
    elif shape == "transposed":
        weight = weight.t().contiguous() if weight.ndim == 2 else weight[:, None]
        if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
            weight = weight[:, 1:].contiguous()
    else:
        weight = weight.reshape(1, *weight.shape, 1)
    with pytest.raises(MedusaError, match="dimensions" if weight.ndim > 2 else f"{PLACES[name]}.*expected") as error:
        NativeBackend(config, {**tensors, name: weight})
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [*((precision, torch.float32) for precision in PRECISIONS)]
    + [(precision, dtype) for precision in ("bfloat16", "int8") for dtype in (torch.bfloat16, torch.float16)],
)
@every_place
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_a_finite_number_is_an_error_that_names_the_layer(
    name: str, value: float, precision: str, dtype: torch.dtype
) -> None:
    config, tensors = _sound()
    weight = tensors[name].clone()
    weight.view(-1)[weight.numel() * 2 // 3 + (value > 0)] = value  # at even and at odd places
    with pytest.raises(MedusaError, match=f"{PLACES[name]}.* not a finite number") as error:
        NativeBackend(
            config, {key: tensor.to(dtype) for key, tensor in {**tensors, name: weight}.items()}, dtype=precision
        )
    assert_one_sentence(error)
    assert not isinstance(error.value, UsageError)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_weights_that_are_no_floats_of_16_or_32_bits_are_refused(dtype: torch.dtype) -> None:
    config, tensors = _sound()
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        with pytest.raises(MedusaError, match="float32, bfloat16 or float16") as error:
            NativeBackend(config, {**tensors, name: tensors[name].to(dtype)})
        assert_one_sentence(error)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.2.mlp.down_proj.bias",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "model.layers.1.pre_feedforward_layernorm.weight",
        "model.layers.3.self_attn.q_proj.weight",  # of three layers
        "model.layers.0",
        "model.layers.0.",
        "model.embed_positions.weight",
        "lm_head.bias",
    ],
)
def test_a_tensor_that_the_engine_would_leave_out_is_refused(name: str) -> None:
    model = shared_model("llama")
    with pytest.raises(UnsupportedError, match=name) as error:
        NativeBackend(native_config(model.config), {**model.state_dict(), name: torch.zeros(32)})
    assert_one_sentence(error)


def test_frequencies_in_old_checkpoints_are_left_aside() -> None:
    model = shared_model("llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(3)}
    backend = NativeBackend(native_config(model.config), {**model.state_dict(), **extra}, dtype="float32")
    assert_near(fill(backend, 0, [1, 2, 3])[0], plain_logits(model, [1, 2, 3])[-1])


def test_weights_that_do_not_fit_into_memory_are_an_error_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=60_000))
    with pytest.raises(MedusaError, match=r"memory are free.*smaller dtype or model") as error:
        native(model)
    assert_one_sentence(error)
    assert not isinstance(error.value, UsageError)
    native(model, "int4")  # which takes fewer


def test_a_slot_that_no_memory_can_hold_is_an_error() -> None:
    model = make_model("llama", max_position_embeddings=1 << 24, num_hidden_layers=1)
    with pytest.raises(MedusaError, match="not enough memory") as error:
        native(model, num_slots=1 << 20, max_length=1 << 24)
    assert_one_sentence(error)


# --- what it cannot run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "gpt_neox", "gpt2"])
def test_another_family_is_unsupported(family: str) -> None:
    with pytest.raises(UnsupportedError, match=r"llama.*not ") as error:
        native_config(shared_model(family).config)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (rope("dynamic", factor=2.0), "rotary.*dynamic"),
        (
            rope(
                "longrope",
                short_factor=[1.0] * 4,
                long_factor=[4.0] * 4,
                factor=4.0,
                original_max_position_embeddings=64,
            ),
            "rotary.*longrope",
        ),
        ({"hidden_act": "relu"}, "activation relu"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_a_setting_that_the_engine_does_not_know_is_unsupported(changes: dict[str, Any], reason: str) -> None:
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **changes)
    with pytest.raises(UnsupportedError, match=reason) as error:
        native_config(config)
    assert_one_sentence(error)


def test_layers_of_an_unknown_kind_are_unsupported() -> None:
    config = shared_model("qwen3").config
    config = type(config)(**{**config.to_dict(), "layer_types": ["full_attention"] * 3})
    config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(UnsupportedError, match="chunked_attention") as error:
        native_config(config)
    assert_one_sentence(error)


def test_without_the_extension_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama")

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert native_module() is None
    with pytest.raises(MedusaError, match=r"pip install \./native") as error:
        native(model)
    assert_one_sentence(error)


def test_an_extension_that_lacks_a_part_is_no_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'medusa_native._engine'", name="medusa_native._engine")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="_engine"):
        native_module()


# --- checkpoints on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_a_checkpoint_on_disk_in_one_file_or_many_is_the_model(tmp_path: Path, family: str, shard: str) -> None:
    model, text = shared_model(family), list(range(20))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "20KB")
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint) == len(list(checkpoint)) == len(dict(model.named_parameters()))
    backend = NativeBackend(native_config(model.config), checkpoint, dtype="float32")
    del checkpoint
    assert_near(fill(backend, 0, text)[0], plain_logits(model, text)[-1])
    base = backend.base_weights()
    assert torch.equal(base.embedding, model.get_input_embeddings().weight)


def _cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def _index(directory: Path) -> Path:
    return directory / "model.safetensors.index.json"


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard cut short": (lambda d: _cut(_shards(d)[1], 0.9), "damaged or cut short"),
    "a shard cut within its header": (lambda d: _cut(_shards(d)[0], 0.01), "damaged or cut short"),
    "an empty shard": (lambda d: _cut(_shards(d)[0], 0), "damaged or cut short"),
    "a shard of something else": (lambda d: _shards(d)[0].write_text("version https://git-lfs"), "damaged"),
    "a missing shard": (lambda d: _shards(d)[-1].unlink(), "incomplete.*is missing"),
    "an index cut short": (lambda d: _cut(_index(d), 0.5), "damaged"),
    "an index that is a list": (lambda d: _index(d).write_text("[]"), "damaged"),
    "an index without its map": (lambda d: _index(d).write_text("{}"), "damaged"),
    "an index that is no text": (lambda d: _index(d).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "an index with numbers for names": (lambda d: _index(d).write_text('{"weight_map": {"a": 1}}'), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path, damage: str) -> None:
    harm, reason = DAMAGE[damage]
    shared_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    Checkpoint(tmp_path)
    harm(tmp_path)
    with pytest.raises(MedusaError, match=reason) as error:
        Checkpoint(tmp_path)
    assert_one_sentence(error)
    assert not isinstance(error.value, UsageError | UnsupportedError)


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    shared_model("llama").save_pretrained(tmp_path)
    _cut(tmp_path / "model.safetensors", 0.99)
    with pytest.raises(MedusaError, match="cut short"):
        Checkpoint(tmp_path)


def test_a_directory_without_safetensors_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="safetensors") as error:
        Checkpoint(tmp_path)
    assert_one_sentence(error)


def test_a_shard_that_lacks_what_the_index_says_is_an_error_of_the_backend(tmp_path: Path) -> None:
    model = shared_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    weight_map = json.loads(_index(tmp_path).read_text(encoding="utf-8"))["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({"model.rotary_emb.inv_freq": torch.zeros(1)}, tmp_path / weight_map[name])
    with pytest.raises(MedusaError, match="is missing"):
        NativeBackend(native_config(model.config), Checkpoint(tmp_path))


# --- threads ----------------------------------------------------------------------------------------------------------


def together(*work: Callable[[], None]) -> None:
    """Runs all at once; raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:  # noqa: BLE001 - handed on
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_two_engines_used_at_once_say_what_each_says_alone(threads: int) -> None:
    backends = [native(shared_model(family), "int8", threads=threads) for family in ("llama", "qwen3")]
    prompt = list(range(40, 60))

    def text(backend: NativeBackend) -> list[int]:
        steps = decode(ReferenceStepper(backend, NgramDrafter(), 6), prompt, max_new_tokens=40)
        return [token for step in steps for token in step.tokens]

    alone = [text(backend) for backend in backends]
    found: list[list[int]] = [[], []]

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = text(backends[i])
            assert found[i] == alone[i]

    together(lambda: work(0), lambda: work(1))
    assert found == alone


def test_one_engine_called_from_two_threads_survives() -> None:
    """One thread should own it, as results may be mixed up; but no text is."""
    backend = native(shared_model("llama"), num_slots=2, threads=2)
    rng = random.Random(5)
    tree, texts = random_tree(rng, 20), [random_text(rng, 9) for _ in range(2)]

    def work(slot: int) -> None:
        for _ in range(10):
            backend.engine.release(slot)
            backend.engine.extend(slot, texts[slot], True)
            for _ in range(10):
                backend.engine.verify([slot], [20], list(tree.tokens), list(tree.parents))
                backend.engine.keep([slot], [[0]])
                assert backend.engine.length(slot) > 9

    together(lambda: work(0), lambda: work(1))
    calm = native(shared_model("llama"))
    for slot in range(2):
        fill(calm, 0, texts[slot] + [tree.tokens[0]] * 10)
        assert torch.equal(backend.verify([slot], [tree])[0], calm.verify([0], [tree])[0])


def test_other_threads_run_while_the_engine_computes() -> None:
    """Python's lock is not held: a thread that notes the time does so in the middle of a call."""
    model = make_model("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    backend = native(model, isa="portable", threads=1)
    fill(backend, 0, [1])
    wide = Nodes((1,) * 256, (-1, *([0] * 255)))
    ticks: list[float] = []
    done = threading.Event()

    def note() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    noter = threading.Thread(target=note)
    noter.start()
    try:
        middles = []
        for _ in range(5):
            start = time.perf_counter()
            backend.engine.verify([0], [256], list(wide.tokens), list(wide.parents))
            quarter = (time.perf_counter() - start) / 4
            middles.append((start + quarter, start + 3 * quarter))
    finally:
        done.set()
        noter.join()
    assert sum(any(a < tick < b for tick in ticks) for a, b in middles) >= 3


# --- what once went wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["release", "length"])
@pytest.mark.parametrize("slot", [-1, 1])
def test_a_slot_that_is_not_there_is_a_usage_error(call: str, slot: int) -> None:
    backend = native(shared_model("llama"))
    with pytest.raises(UsageError, match=f"no slot {slot}") as error:
        getattr(backend, call)(slot)
    assert_one_sentence(error)


@pytest.mark.parametrize("token", [2**31, 2**40, -(2**40)])
def test_a_token_of_more_than_32_bits_is_outside_the_vocabulary(token: int) -> None:
    backend = native(shared_model("llama"))
    with pytest.raises(UsageError) as error:
        fill(backend, 0, [1, token])
    assert_one_sentence(error)


def test_a_feature_layer_named_twice_is_delivered_twice() -> None:
    backend = native(shared_model("llama"), feature_layers=(1, 1))
    first, second, _ = fill(backend, 0, [1, 2, 3])[1].split(backend.hidden_size)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"sliding_window": 8}),
        ("llama", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}),
        ("llama", {"no_rope_layers": [1, 0, 1]}),
        ("llama", rope("default", partial_rotary_factor=0.5)),
        ("qwen3", {"no_rope_layers": [1, 0, 1]}),
    ],
)
def test_settings_of_other_families_are_left_to_transformers(family: str, changes: dict[str, Any]) -> None:
    """Of some, transformers' cache makes something that its layers do not: see test_perturbations.py."""
    name = "partial_rotary_factor" if "rope_parameters" in changes else next(iter(changes))
    with pytest.raises(UnsupportedError, match=name) as error:
        native_config(make_model(family, **changes).config)
    assert_one_sentence(error)


def test_float32_weights_past_the_range_of_the_format_are_an_error() -> None:
    model = shared_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    huge = torch.full_like(model.state_dict()[name], torch.finfo(torch.float32).max)
    with pytest.raises(Exception, match="layer 1"):
        NativeBackend(native_config(model.config), {**model.state_dict(), name: huge}, dtype="bfloat16")


def test_a_prompt_that_is_refused_leaves_its_slot_empty() -> None:
    backend = native(make_model("llama", max_position_embeddings=1024))
    with pytest.raises(UsageError, match="vocabulary"):
        fill(backend, 0, [1] * 300 + [999])
    assert backend.length(0) == 0


HEAD = """
import sys; sys.path.insert(0, sys.argv[1])
import resource, threading, torch
from helpers import fill
from test_native_backend import native
from test_transformers_backend import Nodes
from tiny_models import make_model
def wide(n): return Nodes((1,) * n, (-1, *([0] * (n - 1))))
"""
OLD_VIEW = """
backend = native(make_model("llama", vocab_size=40000))
old, _ = fill(backend, 0, [1, 2, 3])
backend.verify([0], [wide(200)])
old.sum()
"""
TWO_THREADS = """
backend = native(make_model("llama", vocab_size=4000), num_slots=2)
for slot in range(2): fill(backend, slot, [1, 2, 3])
def work(slot):
    for n in range(1, 250):
        try: backend.verify([slot], [wide(n)])[0].sum()
        except Exception: pass
threads = [threading.Thread(target=work, args=(slot,)) for slot in range(2)]
for t in threads: t.start()
for t in threads: t.join()
"""
NO_MEMORY = """
backend = native(make_model("llama", hidden_size=512, intermediate_size=4096, num_attention_heads=8), threads=1)
fill(backend, 0, [1, 2, 3])
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))
try: backend.verify([0], [wide(256)])
except Exception as error: assert "memory" in str(error)
else: raise AssertionError
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
backend.verify([0], [wide(250)])
"""


@pytest.mark.parametrize("script", [OLD_VIEW, TWO_THREADS, NO_MEMORY], ids=["old view", "two threads", "no memory"])
def test_the_process_survives(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
