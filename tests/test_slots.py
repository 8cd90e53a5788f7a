"""What a slot holds: texts that come in pieces, are copied, cut short, interrupted and released. On transformers; the
bits of the native engine are in test_native_slots.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import ToyBackend, ToyModel, fill
from medusa.decoding.draft import NoDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.stepper import Request
from medusa.engines import transformers as transformers_backend
from medusa.engines.kv_cache import FIRST_CAPACITY
from medusa.engines.transformers import MAX_NODES, TransformersBackend
from medusa.errors import UsageError
from test_transformers_backend import TOLERANCE, Nodes, assert_one_sentence, cache_rows
from tiny_models import VOCAB, make_model, shared_model

PROBE = Nodes((9, 8, 7, 6), (-1, 0, 0, 2))
texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@cache
def backend_of(family: str, dtype: torch.dtype = torch.float32) -> TransformersBackend:
    model = shared_model(family) if dtype == torch.float32 else make_model(family, dtype=dtype)
    return TransformersBackend(model, num_slots=3, feature_layers=(1,))


def pieces(text: list[int], cuts: list[int]) -> list[list[int]]:
    return [text[a:b] for a, b in pairwise(sorted({0, len(text), *(cut % len(text) for cut in cuts)}))]


@contextmanager
def rows_of_logits(backend: TransformersBackend) -> Iterator[list[int]]:
    """How many rows the LM head computes in each pass."""
    rows: list[int] = []
    hook = backend._lm_head.register_forward_hook(lambda _module, _args, out: rows.append(out.shape[1]))
    try:
        yield rows
    finally:
        hook.remove()


# --- extend -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
@settings(max_examples=12)
@given(text=texts, cuts=st.lists(st.integers(0, 39), max_size=5), chunk=st.integers(3, 50))
def test_a_text_in_any_pieces_gives_the_numbers_of_one(
    family: str, text: list[int], cuts: list[int], chunk: int
) -> None:
    backend = backend_of(family)
    logits, features = fill(backend, 0, text, every=True)
    after, _ = backend.verify([0], [PROBE])
    backend.release(1)
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_backend, "PREFILL_CHUNK", chunk)
        for piece in pieces(text, cuts):
            last, every = backend.extend(1, piece, every=True)
            read.append(every)
        alone = fill(backend, 2, text)
    assert backend.length(1) == len(text)
    torch.testing.assert_close(last, logits, **TOLERANCE)
    torch.testing.assert_close(torch.cat(read), features, **TOLERANCE)
    torch.testing.assert_close(alone[0], logits, **TOLERANCE)
    torch.testing.assert_close(alone[1], features[-1], **TOLERANCE)
    torch.testing.assert_close(backend.verify([1], [PROBE])[0], after, **TOLERANCE)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("knows", [True, False])
def test_a_text_costs_one_row_of_logits_in_each_pass(every: bool, knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model cannot be told which are wanted."""
    model = make_model("llama")
    forward = model.forward
    if not knows:
        model.forward = lambda **options: forward(**options)  # type: ignore[method-assign]
    backend = TransformersBackend(model)
    monkeypatch.setattr(transformers_backend, "PREFILL_CHUNK", 16)
    with rows_of_logits(backend) as rows:
        logits, features = backend.extend(0, list(range(40)), every)
        backend.extend(0, [1, 2, 3], every)
    assert rows == [1, 1, 1, 1]
    assert logits.shape == (VOCAB,)
    assert features.shape == ((40, 32) if every else (32,))


def test_a_conversation_that_continues_makes_one_row_of_logits() -> None:
    backend = TransformersBackend(make_model("llama"))
    decoder = ReferenceStepper(backend, NoDrafter(), 1)
    row, _ = decoder.start(0, Request([1, 2, 3], Sampling(), max_new_tokens=4))
    while row.finish_reason is None:
        decoder.step([row])
    held = backend.length(0)
    with rows_of_logits(backend) as rows:
        decoder.start(0, Request([*row.tokens, *range(50)], Sampling(), max_new_tokens=4), held)
    assert rows == [1]
    assert backend.length(0) == held + 1 + 50


def test_a_conversation_that_continues_reads_by_one_call_what_the_slot_does_not_hold() -> None:
    read = []

    class Listening(ToyBackend):
        def extend(self, slot: int, token_ids: Sequence[int], every: bool = False) -> tuple[Tensor, Tensor]:
            read.append(len(token_ids))
            return super().extend(slot, token_ids, every)

    backend = Listening(ToyModel(), max_length=200)
    decoder = ReferenceStepper(backend, NoDrafter(), 1)
    row, _ = decoder.start(0, Request([1, 2, 3], Sampling(), max_new_tokens=1))
    decoder.start(0, Request([*row.tokens, *[1] * 100], Sampling(), max_new_tokens=4), 3)
    assert backend.forwards == 0  # of `verify`
    assert read == [3, 1 + 100]  # the last token of the answer was not there yet
    assert backend.length(0) == 104


def test_extending_past_the_context_is_refused_and_changes_nothing() -> None:
    backend = TransformersBackend(shared_model("llama"), max_length=20)
    backend.extend(0, [1] * 15)
    for tokens, reason in (([], "empty"), ([1] * 6, r"21 tokens.*20")):
        with pytest.raises(UsageError, match=reason) as error:
            backend.extend(0, tokens)
        assert_one_sentence(error)
    assert backend.length(0) == 15
    backend.extend(0, [1] * 5)
    assert backend.length(0) == 20


def test_a_text_that_is_interrupted_leaves_the_one_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    backend, calm = TransformersBackend(model), TransformersBackend(model)
    monkeypatch.setattr(transformers_backend, "PREFILL_CHUNK", 8)
    for one in (backend, calm):
        one.extend(0, list(range(10)))
    forward, passes = model.forward, []

    def interrupted(**options: Any) -> Any:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return forward(**options)

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.extend(0, list(range(30)))
    assert len(passes) == 3
    assert backend.length(0) == 10
    assert torch.equal(backend.extend(0, [5, 6])[0], calm.extend(0, [5, 6])[0])


# --- copy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@settings(max_examples=10)
@given(text=texts, other=texts, length=st.integers(1, 40))
def test_what_follows_a_copy_has_the_bits_that_follow_the_text(
    family: str, dtype: torch.dtype, text: list[int], other: list[int], length: int
) -> None:
    backend = backend_of(family, dtype)
    length = min(length, len(text))
    fill(backend, 0, text[:length])
    if text[length:]:
        backend.extend(0, text[length:])
    fill(backend, 2, other)
    kept = cache_rows(backend, 0)
    backend.copy(0, 2, length)
    assert backend.length(2) == length
    assert all(torch.equal(a[:, :length], b) for a, b in zip(kept, cache_rows(backend, 2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, cache_rows(backend, 0), strict=True))
    backend.copy(0, 0, length)  # cut short
    for found, right in zip(backend.verify([2], [PROBE]), backend.verify([0], [PROBE]), strict=True):
        assert torch.equal(found, right)
    for found, right in zip(backend.extend(2, [3, 4, 5]), backend.extend(0, [3, 4, 5]), strict=True):
        assert torch.equal(found, right)


REFUSALS: dict[str, tuple[tuple[int, int, int], str]] = {
    "from a slot that is not there": ((2, 0, 1), "no slot 2"),
    "to a slot that is not there": ((0, -1, 1), "no slot -1"),
    "more than a slot holds": ((0, 1, 4), "slot 0 holds 3 tokens"),
    "from an empty slot": ((1, 0, 1), "slot 1 holds 0 tokens"),
    "fewer than none": ((0, 1, -1), "-1 of them cannot"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_bad_copy_is_refused_and_changes_nothing(refusal: str) -> None:
    arguments, reason = REFUSALS[refusal]
    backend = TransformersBackend(shared_model("llama"), num_slots=2)
    backend.extend(0, [1, 2, 3])
    with pytest.raises(UsageError, match=reason) as error:
        backend.copy(*arguments)
    assert_one_sentence(error)
    assert [backend.length(slot) for slot in range(2)] == [3, 0]


def test_samples_of_one_prompt_are_those_of_prompts_read_anew() -> None:
    """A batch whose rows begin as copies."""
    rng, backend = random.Random(1), backend_of("llama")
    prompt = [rng.randrange(VOCAB) for _ in range(30)]
    fill(backend, 0, prompt)
    for slot in (1, 2):
        backend.copy(0, slot, len(prompt))
    found = backend.verify([0, 1, 2], [PROBE] * 3)[0]
    for slot in range(3):
        fill(backend, slot, prompt)
    assert torch.equal(backend.verify([0, 1, 2], [PROBE] * 3)[0], found)


# --- release ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "capacity"), [(30, FIRST_CAPACITY), (1025, 2048), (2800, 2816 + MAX_NODES)])
def test_slots_keep_room_for_less_than_twice_the_longest_text(length: int, capacity: int) -> None:
    backend = TransformersBackend(make_model(max_position_embeddings=2816), num_slots=2)
    backend.extend(0, [1] * length)
    backend.release(0)
    assert backend.capacity == capacity
    backend.resize(2)
    assert backend.capacity == FIRST_CAPACITY


def ends_early(call: Callable[[], object]) -> None:
    with pytest.raises(KeyboardInterrupt):
        call()


def test_a_start_that_is_interrupted_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ToyBackend(ToyModel())
    decoder = ReferenceStepper(backend, NoDrafter(), 1)

    def half(slot: int, tokens: list[int], every: bool = False) -> None:
        backend.text[slot] = tokens[:1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend, "extend", half)
        ends_early(lambda: decoder.start(0, Request([1, 2], Sampling(), max_new_tokens=1)))
    assert backend.length(0) == 0
    decoder.start(0, Request([1, 2], Sampling(), max_new_tokens=1))
