"""The transformers backend against the plain model: every family, path by path, row by row, token by token.

The reference is always the unmodified model without a cache (`plain_logits`), or transformers' own `generate`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from helpers import fill, path_nodes, tree_parents
from medusa.decoding.draft import MODEL, Draft
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.scheduler import decode
from medusa.decoding.stepper import Row
from medusa.engines import kv_cache
from medusa.engines import transformers as transformers_backend
from medusa.engines.int8 import Int8Linear, quantise
from medusa.engines.transformers import SelfCheckError, TransformersBackend, check_tree_attention
from medusa.errors import MedusaError, UsageError
from tiny_models import (
    FAMILIES,
    VOCAB,
    WINDOW,
    agrees,
    build,
    make_model,
    plain_logits,
    shared_model,
)

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}  # logits have a standard deviation of about 3
ATTENTION = ("eager", "sdpa")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_attention = pytest.mark.parametrize("attention", ATTENTION)
# transformers itself has no sdpa for Gemma 2, whose attention scores are soft-capped.
every_combination = pytest.mark.parametrize(
    ("family", "attention"), [(f, a) for f in FAMILIES for a in ATTENTION if (f, a) != ("gemma2", "sdpa")]
)


class Nodes(NamedTuple):
    """The least that a backend asks of a draft."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]


def random_nodes(rng: random.Random, size: int) -> Nodes:
    parents = (-1, *(i - 1 if rng.random() < 0.5 else rng.randrange(i) for i in range(1, size)))
    return Nodes(tuple(rng.randrange(VOCAB) for _ in range(size)), parents)


def random_text(rng: random.Random, size: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(size)]


def assert_tree_is_plain(model: PreTrainedModel, text: list[int], draft: Nodes, logits: torch.Tensor) -> None:
    """Logits [N, V] of a draft after `text` equal those of each path run alone."""
    leaves = set(range(len(draft.tokens))) - set(draft.parents)
    for leaf in leaves:
        path = path_nodes(draft.parents, leaf)
        expected = plain_logits(model, [*text, *(draft.tokens[i] for i in path)])[len(text) :]
        torch.testing.assert_close(logits[path].float(), expected, **TOLERANCE)


def cache_rows(backend: TransformersBackend, slot: int) -> list[torch.Tensor]:
    """Keys and values [heads, length, size] of every layer of a slot."""
    length = backend.length(slot)
    return [
        rows[slot, :, :length].clone()
        for layer in backend.cache.slot_layers
        for rows in (layer.keys, layer.values)
        if rows is not None
    ]


def keep_random_path(
    rng: random.Random, backend: TransformersBackend, slot: int, text: list[int], draft: Nodes
) -> None:
    path = path_nodes(draft.parents, rng.randrange(len(draft.tokens)))
    backend.keep([slot], [path])
    text.extend(draft.tokens[i] for i in path)


# --- one row ----------------------------------------------------------------------------------------------------------


@every_combination
def test_tree_logits_equal_each_path_run_alone_over_several_rounds(family: str, attention: str) -> None:
    model, rng = shared_model(family, attention), random.Random(1)
    assert model.config._attn_implementation == attention
    backend = TransformersBackend(model)
    text = random_text(rng, 2 * WINDOW + 3)
    logits, _ = fill(backend, 0, text)
    torch.testing.assert_close(logits, plain_logits(model, text)[-1], **TOLERANCE)
    for size in (9, 1, 12, 6):
        draft = random_nodes(rng, size)
        logits, _ = backend.verify([0], [draft])
        assert logits.shape == (1, size, VOCAB)
        assert backend.length(0) == len(text), "verify leaves the length alone"
        assert_tree_is_plain(model, text, draft, logits[0])
        keep_random_path(rng, backend, 0, text, draft)
        assert backend.length(0) == len(text)


@every_combination
def test_after_keep_the_cache_equals_a_fresh_prefill(family: str, attention: str) -> None:
    model, rng = shared_model(family, attention), random.Random(2)
    used, fresh = TransformersBackend(model), TransformersBackend(model)
    text = random_text(rng, WINDOW + 5)
    fill(used, 0, text)
    for path in ([0, 2, 5], [0], [0, 1, 4], [0, 2]):
        draft = Nodes(tuple(random_text(rng, 6)), (-1, 0, 0, 1, 1, 2))
        used.verify([0], [draft])
        used.keep([0], [path])
        text.extend(draft.tokens[i] for i in path)
        fill(fresh, 0, text)
        for a, b in zip(cache_rows(used, 0), cache_rows(fresh, 0), strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
        probe = random_nodes(rng, 5)
        torch.testing.assert_close(used.verify([0], [probe])[0], fresh.verify([0], [probe])[0], **TOLERANCE)


@every_family
def test_chunked_prefill_equals_one_shot(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = shared_model(family), random_text(random.Random(3), 23)
    whole = TransformersBackend(model, feature_layers=[1])
    logits, features = fill(whole, 0, text)
    monkeypatch.setattr(transformers_backend, "PREFILL_CHUNK", 5)
    chunked = TransformersBackend(model, feature_layers=[1])
    chunk_logits, chunk_features = fill(chunked, 0, text)
    assert chunked.length(0) == len(text)
    torch.testing.assert_close(chunk_logits, logits, **TOLERANCE)
    torch.testing.assert_close(chunk_features, features, **TOLERANCE)
    for a, b in zip(cache_rows(chunked, 0), cache_rows(whole, 0), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


# --- many rows --------------------------------------------------------------------------------------------------------

SLOTS = 5


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, list[int], Nodes, int]]:
    """Rows (slot, text, draft, a node to keep) with slots in any order."""
    slots = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
    rows = []
    for slot in slots:
        text = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3 * WINDOW))
        parents = draw(tree_parents(8))
        tokens = tuple(draw(st.integers(0, VOCAB - 1)) for _ in parents)
        rows.append((slot, text, Nodes(tokens, parents), draw(st.integers(0, len(parents) - 1))))
    return rows


_backends: dict[str, tuple[TransformersBackend, TransformersBackend]] = {}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
@settings(max_examples=12)
@given(rows=batches(), again=st.lists(tree_parents(6), min_size=SLOTS, max_size=SLOTS))
def test_a_ragged_batch_equals_each_row_alone(
    family: str, rows: list[tuple[int, list[int], Nodes, int]], again: list[tuple[int, ...]]
) -> None:
    model = shared_model(family)
    if family not in _backends:
        _backends[family] = TransformersBackend(model, num_slots=SLOTS), TransformersBackend(model)
    together, alone = _backends[family]
    slots = [row[0] for row in rows]
    for slot, text, _, _ in rows:
        fill(together, slot, text)
    rounds = [[draft for _, _, draft, _ in rows], [Nodes(tuple(range(len(p))), p) for p in again[: len(rows)]]]
    paths = [[path_nodes(draft.parents, node) for _, _, draft, node in rows], [[0]] * len(rows)]
    texts = [list(text) for _, text, _, _ in rows]
    for drafts, kept in zip(rounds, paths, strict=True):
        logits, features = together.verify(slots, drafts)
        for b, draft in enumerate(drafts):
            fill(alone, 0, texts[b])
            one, one_features = alone.verify([0], [draft])
            n = len(draft.tokens)
            torch.testing.assert_close(logits[b, :n], one[0], **TOLERANCE)
            torch.testing.assert_close(features[b, :n], one_features[0], **TOLERANCE)
            texts[b] += [draft.tokens[i] for i in kept[b]]
        together.keep(slots, kept)
        assert [together.length(slot) for slot in slots] == [len(text) for text in texts]
    for slot in slots:
        together.release(slot)


@every_combination
def test_a_batch_of_two_rows_equals_the_plain_model(family: str, attention: str) -> None:
    model, rng = shared_model(family, attention), random.Random(4)
    backend = TransformersBackend(model, num_slots=4)
    texts = {3: random_text(rng, 21), 1: random_text(rng, 2)}
    for slot, text in texts.items():
        fill(backend, slot, text)
    drafts = [random_nodes(rng, 4), random_nodes(rng, 9)]
    logits, _ = backend.verify([3, 1], drafts)
    for b, slot in enumerate([3, 1]):
        assert_tree_is_plain(model, texts[slot], drafts[b], logits[b, : len(drafts[b].tokens)])


def test_a_released_slot_is_empty_and_can_be_used_again_beside_a_running_one() -> None:
    model, rng = shared_model("mistral"), random.Random(5)
    backend = TransformersBackend(model, num_slots=2)
    running = random_text(rng, 12)
    fill(backend, 0, random_text(rng, 30))
    fill(backend, 1, running)
    backend.release(0)
    assert (backend.length(0), backend.length(1)) == (0, 12)
    short = random_text(rng, 3)  # what the longer text left behind must not show
    fill(backend, 0, short)
    draft = random_nodes(rng, 7)
    logits, _ = backend.verify([0, 1], [draft, draft])
    assert_tree_is_plain(model, short, draft, logits[0])
    assert_tree_is_plain(model, running, draft, logits[1])


# --- decoding ---------------------------------------------------------------------------------------------------------


class HalfRight:
    """Any tree; some of its nodes hold what the model will say, which it was told."""

    name = "half"

    def __init__(self, answer: Sequence[int], seed: int) -> None:
        self.answer, self.rng = answer, random.Random(seed)

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        return [self._propose(row, self.rng.randint(1, nodes)) for row in rows]

    def _propose(self, row: Row, size: int) -> Draft:
        tokens, parents, depths = [row.tokens[-1]], [-1], [0]
        for i in range(1, size):
            parent = i - 1 if self.rng.random() < 0.6 else self.rng.randrange(i)
            at = row.new_tokens + depths[parent]
            right = self.rng.random() < 0.7 and at < len(self.answer)
            tokens.append(self.answer[at] if right else self.rng.randrange(VOCAB))
            parents.append(parent)
            depths.append(depths[parent] + 1)
        sources = (MODEL, *([self.name] * (size - 1)))
        return Draft(tuple(tokens), tuple(parents), tuple(0.9**d for d in depths), sources)


def generate_greedily(model: PreTrainedModel, prompt: list[int], new: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


@every_combination
def test_greedy_decoding_equals_generate_token_for_token(family: str, attention: str) -> None:
    model, rng = shared_model(family, attention), random.Random(6)
    prompt = random_text(rng, 10)
    expected = generate_greedily(model, prompt, 40)
    assert len(set(expected)) > 4, "a text of few tokens would hide mistakes"
    backend = TransformersBackend(model)
    steps = list(decode(ReferenceStepper(backend, HalfRight(expected, 7), 10), prompt, max_new_tokens=40))
    assert agrees(model, prompt, [token for step in steps for token in step.tokens], expected)
    assert len(steps) < 30, "drafts were accepted"
    assert steps[-1].finish_reason == "length"
    assert backend.length(0) == 0, "the slot is free again"


def test_greedy_decoding_stops_at_the_first_of_several_end_tokens_as_generate_does() -> None:
    model, prompt = shared_model("llama"), random_text(random.Random(8), 10)
    free = generate_greedily(model, prompt, 40)
    first = [i for i, token in enumerate(free) if token not in free[:i]]
    ends = [free[first[-1]], free[first[-2]]]
    expected = generate_greedily(model, prompt, 40, eos_token_id=ends)
    assert 3 < len(expected) < 40
    for seed in range(5):
        decoder = ReferenceStepper(TransformersBackend(model), HalfRight(free, seed), 10)
        steps = list(decode(decoder, prompt, max_new_tokens=40, eos_token_ids=ends))
        assert agrees(model, prompt, [token for step in steps for token in step.tokens], expected)
        assert steps[-1].finish_reason == "stop"


def test_decoding_ends_where_the_context_ends() -> None:
    model, prompt = shared_model("llama"), random_text(random.Random(9), 20)
    expected = generate_greedily(model, prompt, 30)
    decoder = ReferenceStepper(TransformersBackend(model, max_length=35), HalfRight(expected, 0), 12)
    tokens = [t for step in decode(decoder, prompt, max_new_tokens=500) for t in step.tokens]
    assert tokens == expected[:15]


# --- features ---------------------------------------------------------------------------------------------------------


@every_family
def test_features_are_the_input_of_the_lm_head_and_the_layers_asked_for(family: str) -> None:
    model, rng = shared_model(family), random.Random(10)
    backend = TransformersBackend(model, feature_layers=[1, 2])
    text, draft = random_text(rng, 15), Nodes((5, 6, 7), (-1, 0, 1))
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([[*text, *draft.tokens]]), output_hidden_states=True, use_cache=False)
    hook.remove()
    expected = torch.cat([out.hidden_states[1][0], out.hidden_states[2][0], seen[0][0]], dim=-1)
    _, last = fill(backend, 0, text)
    torch.testing.assert_close(last, expected[len(text) - 1], **TOLERANCE)
    _, features = backend.verify([0], [draft])
    assert features.shape == (1, 3, 3 * backend.hidden_size)
    torch.testing.assert_close(features[0], expected[len(text) :], **TOLERANCE)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_cache_grows_by_doubling_and_keeps_every_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "FIRST_CAPACITY", 16)
    model, rng = shared_model("gemma3"), random.Random(11)
    backend = TransformersBackend(model, num_slots=2, max_length=200)

    def capacities() -> set[int]:
        tensors = [rows for layer in backend.cache.slot_layers for rows in (layer.keys, layer.values)]
        return {rows.shape[2] for rows in tensors if rows is not None}

    assert capacities() == {16}, "a short text takes the first capacity only"
    other = random_text(rng, 9)
    fill(backend, 1, other)
    assert capacities() == {16}
    text = random_text(rng, 12)
    fill(backend, 0, text)
    for _ in range(12):
        draft = Nodes(tuple(random_text(rng, 8)), (-1, 0, 1, 2, 0, 4, 5, 0))
        logits, _ = backend.verify([0], [draft])
        assert_tree_is_plain(model, text, draft, logits[0])
        backend.keep([0], [[0, 4, 5, 6]])
        text.extend(draft.tokens[i] for i in (0, 4, 5, 6))
    assert len(text) == 60
    assert capacities() == {64}
    draft = random_nodes(rng, 6)
    logits, _ = backend.verify([1, 0], [draft, draft])
    assert capacities() == {128}
    assert_tree_is_plain(model, other, draft, logits[0])
    assert_tree_is_plain(model, text, draft, logits[1])


def test_a_long_context_costs_no_memory_before_it_is_used() -> None:
    backend = TransformersBackend(make_model("llama", max_position_embeddings=32768))
    assert backend.max_length == 32768
    fill(backend, 0, list(range(20)))
    assert all(
        rows is not None and rows.shape[2] == kv_cache.FIRST_CAPACITY
        for layer in backend.cache.slot_layers
        for rows in (layer.keys, layer.values)
    )


def test_a_text_past_the_first_thousand_places_equals_the_plain_model() -> None:
    model = make_model("mistral", max_position_embeddings=2048)
    text = random_text(random.Random(12), kv_cache.FIRST_CAPACITY - 4)
    backend = TransformersBackend(model)
    fill(backend, 0, text)
    draft = random_nodes(random.Random(13), 10)
    logits, _ = backend.verify([0], [draft])
    assert_tree_is_plain(model, text, draft, logits[0])


# --- refusals ---------------------------------------------------------------------------------------------------------


def assert_one_sentence(error: pytest.ExceptionInfo[Exception]) -> None:
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert ". " not in text
    assert len(text) < 300


def _bloom() -> PreTrainedModel:
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    return build(transformers.BloomForCausalLM, config)


def _falcon_with_alibi() -> PreTrainedModel:
    config = transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    )
    return build(transformers.FalconForCausalLM, config)


def _t5() -> PreTrainedModel:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return build(transformers.T5ForConditionalGeneration, config)


def _mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return build(transformers.MambaForCausalLM, config)


def _qwen3_next() -> PreTrainedModel:
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return build(transformers.Qwen3NextForCausalLM, config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_bloom, "ALiBi"),
        (_falcon_with_alibi, "ALiBi"),
        (_t5, "encoder-decoder"),
        (_mamba, "recurrent"),
        (_qwen3_next, "recurrent"),
    ],
)
def test_an_architecture_that_cannot_decode_trees_is_refused_in_one_sentence(make: Any, reason: str) -> None:
    with pytest.raises(MedusaError, match=reason) as error:
        TransformersBackend(make())
    assert_one_sentence(error)


def test_layers_of_an_unknown_kind_and_a_missing_lm_head_are_refused() -> None:
    model = make_model("llama")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(MedusaError, match="chunked_attention") as error:
        TransformersBackend(model)
    assert_one_sentence(error)
    bare = make_model("llama").model
    with pytest.raises(MedusaError, match="LM head") as error:
        TransformersBackend(bare)
    assert_one_sentence(error)


@every_family
@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_the_self_check_catches_a_model_that_ignores_masks_or_positions(family: str, ignored: str) -> None:
    model = make_model(family)
    forward = model.forward

    def deaf(*, logits_to_keep: int = 0, **options: Any) -> Any:
        if options.get("past_key_values") is not None:
            options.pop(ignored, None)
        return forward(logits_to_keep=logits_to_keep, **options)

    model.forward = deaf
    with pytest.raises(SelfCheckError) as error:
        TransformersBackend(model)
    assert_one_sentence(error)


def test_the_self_check_leaves_the_slot_empty_and_can_be_left_out() -> None:
    backend = TransformersBackend(shared_model("llama"), num_slots=2, self_check=False)
    assert backend.length(0) == 0
    check_tree_attention(backend)
    assert backend.length(0) == 0


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_empty_or_too_long_is_an_error_that_changes_nothing() -> None:
    backend = TransformersBackend(shared_model("llama"), max_length=20)
    with pytest.raises(UsageError, match="empty") as error:
        fill(backend, 0, [])
    assert_one_sentence(error)
    with pytest.raises(UsageError, match=r"21 tokens.*20") as error:
        fill(backend, 0, [1] * 21)
    assert_one_sentence(error)
    assert backend.length(0) == 0
    fill(backend, 0, [1] * 20)
    assert backend.length(0) == 20


def test_a_draft_may_fill_the_context_and_not_reach_past_it() -> None:
    model = shared_model("llama")
    backend = TransformersBackend(model, max_length=20)
    text = random_text(random.Random(14), 18)
    fill(backend, 0, text)
    fits = Nodes((3, 4, 5, 6), (-1, 0, 0, 0))  # four nodes, but two levels: positions 18 and 19
    logits, _ = backend.verify([0], [fits])
    assert_tree_is_plain(model, text, fits, logits[0])
    with pytest.raises(UsageError, match="past the context of 20") as error:
        backend.verify([0], [Nodes((3, 4, 5), (-1, 0, 1))])
    assert_one_sentence(error)
    assert backend.length(0) == 18


def test_the_most_nodes_work_at_the_end_of_the_context_and_one_more_is_an_error() -> None:
    model = shared_model("llama")
    backend = TransformersBackend(model)
    text = random_text(random.Random(15), backend.max_length - 2)
    fill(backend, 0, text)
    most = transformers_backend.MAX_NODES
    wide = Nodes(tuple(i % VOCAB for i in range(most)), (-1, *([0] * (most - 1))))
    logits, _ = backend.verify([0], [wide])
    expected = plain_logits(model, [*text, wide.tokens[0], wide.tokens[-1]])[-2:]
    torch.testing.assert_close(logits[0, [0, -1]], expected, **TOLERANCE)
    with pytest.raises(UsageError, match=f"at most {most}") as error:
        backend.verify([0], [Nodes((1,) * (most + 1), (-1, *([0] * most)))])
    assert_one_sentence(error)


@pytest.mark.parametrize("length", [0, -1, 257])
def test_a_bad_max_length_is_an_error(length: int) -> None:
    with pytest.raises(UsageError, match="max_length") as error:
        TransformersBackend(shared_model("llama"), max_length=length)
    assert_one_sentence(error)


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_a_short_max_length_works(length: int) -> None:
    model = shared_model("llama")
    backend = TransformersBackend(model, max_length=length)
    assert backend.max_length == length
    text = random_text(random.Random(16), length)
    torch.testing.assert_close(fill(backend, 0, text)[0], plain_logits(model, text)[-1], **TOLERANCE)


def test_long_context_rope_is_decoded_within_its_original_context_only() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    context = {"max_position_embeddings": 160, "original_max_position_embeddings": 40}
    model = make_model("phi3", rope_parameters=rope, **context)
    assert TransformersBackend(model).max_length == 40
    with pytest.raises(UsageError, match="context of 40"):
        TransformersBackend(model, max_length=41)


@pytest.mark.parametrize("layers", [[0], [3], [-1], [1, 9]])
def test_bad_feature_layers_are_an_error(layers: list[int]) -> None:
    with pytest.raises(UsageError, match="feature_layers") as error:
        TransformersBackend(shared_model("llama"), feature_layers=layers)
    assert_one_sentence(error)


def test_no_slots_are_an_error() -> None:
    with pytest.raises(UsageError, match="num_slots"):
        TransformersBackend(shared_model("llama"), num_slots=0)


# --- precisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
@every_attention
def test_bfloat16_passes_the_self_check_and_decodes(family: str, attention: str) -> None:
    model = make_model(family, attention=attention, dtype=torch.bfloat16)
    backend = TransformersBackend(model, num_slots=2)
    logits, features = fill(backend, 1, list(range(15)))
    assert logits.dtype == features.dtype == torch.bfloat16
    draft = random_nodes(random.Random(17), 8)
    logits, _ = backend.verify([1], [draft])
    leaf = max(range(8), key=lambda i: len(path_nodes(draft.parents, i)))
    path = path_nodes(draft.parents, leaf)
    expected = plain_logits(model, [*range(15), *(draft.tokens[i] for i in path)])[15:]
    # Eight bits of mantissa over three layers of a random model.
    assert float((logits[0, path].float() - expected).abs().mean() / expected.std()) < 0.1
    backend.release(1)
    decoder = ReferenceStepper(backend, HalfRight([], 0), 8)
    assert sum(len(step.tokens) for step in decode(decoder, [1, 2, 3], max_new_tokens=12)) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_int8_logits_are_near_those_of_the_float_model(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype=dtype)
    ids = random_text(random.Random(18), 20)
    expected = plain_logits(model, ids)
    quantise(model)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    found = plain_logits(model, ids)
    assert float((found - expected).abs().mean() / expected.std()) < (0.05 if dtype == torch.float32 else 0.12)
    backend = TransformersBackend(model)  # with its self-check
    torch.testing.assert_close(
        fill(backend, 0, ids)[0].float(), found[-1], atol=2e-3 if dtype == torch.float32 else 0.5, rtol=1e-2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_an_int8_layer_is_near_the_linear_layer_and_blind_to_neighbours(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(19)
    linear = torch.nn.Linear(64, 48, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(48, 64, generator=generator))
    layer, x = Int8Linear(linear), torch.randn(2, 9, 64, generator=generator).to(dtype)
    with torch.no_grad():
        found, expected = layer(x), linear(x)
        assert found.shape == expected.shape
        assert found.dtype == dtype
        assert float((found - expected).abs().max() / expected.std()) < 0.06
        torch.testing.assert_close(found, torch.nn.functional.linear(x, layer.weight, layer.bias), atol=0.2, rtol=0.02)
        for row in range(9):  # whoever stands beside it, a row's result is the same
            assert torch.equal(layer(x[:1, row : row + 1])[0, 0], found[0, row])
            assert torch.equal(layer(x[0, row:])[0], found[0, row])


def test_a_row_of_zeros_survives_int8() -> None:
    linear = torch.nn.Linear(8, 4, bias=False)
    torch.nn.init.zeros_(linear.weight)
    assert torch.equal(Int8Linear(linear)(torch.ones(1, 8)), torch.zeros(1, 4))


def test_base_weights_of_a_tied_int8_model_are_the_embeddings_and_the_rounded_lm_head() -> None:
    model = make_model("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight
    assert embedding is model.get_output_embeddings().weight, "tied"
    before = embedding.detach().clone()
    quantise(model)
    base = TransformersBackend(model).base_weights()
    assert torch.equal(base.embedding, before), "the embeddings keep their precision"
    assert base.lm_head.shape == before.shape
    torch.testing.assert_close(base.lm_head, before, atol=float(before.abs().max()) / 254 + 1e-6, rtol=0.0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_base_weights_are_the_models_own(family: str) -> None:
    model = shared_model(family)
    base = TransformersBackend(model).base_weights()
    assert base.embedding is model.get_input_embeddings().weight
    assert base.lm_head is model.get_output_embeddings().weight
