"""The step on the device, run eagerly, against the reference loop and its parts. With MEDUSA_TEST_DEVICE=cuda all of it
runs there instead, captured as graphs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import fill, make_row, tree_parents
from medusa.decoding.draft import Draft, NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling, candidates
from medusa.decoding.sampling import gumbel_noise as reference_noise
from medusa.decoding.scheduler import Scheduler, Task, decode
from medusa.decoding.slots import Slots as EngineSlots
from medusa.decoding.stepper import Request
from medusa.decoding.tree import Tree
from medusa.device import accept, step
from medusa.device.capture import Captured
from medusa.device.nodes import NodesByTime
from medusa.device.noise import compiled_gumbel_noise, gumbel_noise, random_words, signed
from medusa.device.slots import Needs, Slots
from medusa.device.stepper import DeviceStepper, bucket
from medusa.engines.kv_cache import DeviceCursor, SlotLayer
from medusa.engines.protocol import PlainTree
from medusa.engines.topology import topology
from medusa.engines.transformers import TransformersBackend
from medusa.engines.tree_attention import use_grouped_attention
from medusa.errors import UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads
from tiny_models import agrees, make_model

DEVICE = torch.device(os.environ.get("MEDUSA_TEST_DEVICE", "cpu"))
ON_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs MEDUSA_TEST_DEVICE=cuda")
EXAMPLES = 4 if DEVICE.type == "cuda" else 20  # each captures graphs there
VOCAB = 24  # so small that even random heads are right now and then
SLOTS = 3
NEW_TOKENS = 24
TREES = (
    Tree.cartesian(2, 2, 1),
    Tree.from_paths({(0,): 0.6, (0, 0): 0.4, (1,): 0.3, (2,): 0.2, (2, 1): 0.1, (0, 0, 3): 0.05}),
    Tree.from_paths([[4]]),
)


@cache
def backend_of(family: str = "llama", dtype: torch.dtype = torch.float32) -> TransformersBackend:
    model = make_model(family, vocab_size=VOCAB, dtype=dtype).to(DEVICE)  # type: ignore[arg-type]
    use_grouped_attention(model)
    return TransformersBackend(model, num_slots=SLOTS, feature_layers=(1,))


def heads_of(backend: TransformersBackend, kind: str, tied: bool, draft_vocab: int, seed: int) -> Heads:
    config = HeadsConfig(
        hidden_size=backend.hidden_size,
        vocab_size=VOCAB,
        kind=kind,  # type: ignore[arg-type]
        num_heads=3,
        mlp_width=8,
        tie_lm_head=tied,
        draft_vocab=draft_vocab,
        feature_layers=(1,),
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(VOCAB, generator=generator)[:draft_vocab].sort().values
    heads = Heads(config, backend.base_weights(), ids if draft_vocab else None)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return heads.to(DEVICE)


@st.composite
def fixed_drafters(draw: st.DrawFn, backend: TransformersBackend) -> HeadsDrafter:
    kind = draw(st.sampled_from(["residual", "sequential", "recurrent"]))
    heads = heads_of(backend, kind, draw(st.booleans()), draw(st.sampled_from([0, 9])), draw(st.integers(0, 99)))
    return HeadsDrafter(heads, draw(st.sampled_from(TREES)))


lossless = st.one_of(
    st.just(Sampling()),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_p=st.sampled_from([1.0, 0.8]),
        top_k=st.sampled_from([0, 7]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.sampled_from([0, 7, 2**63 + 5, 2**64 - 1]),
    ),
)
any_sampling = st.one_of(
    lossless,
    st.builds(
        Sampling,
        temperature=st.just(1.2),
        top_k=st.sampled_from([0, 7]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        acceptance=st.just("typical"),
        epsilon=st.sampled_from([0.01, 0.09]),
        delta=st.sampled_from([0.1, 0.3]),
        seed=st.just(1),
    ),
)
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


def text_of(decoder: ReferenceStepper, prompt: Sequence[int], sampling: Sampling) -> tuple[list[int], int]:
    """The text, and in how many steps."""
    steps = list(decode(decoder, prompt, sampling, max_new_tokens=NEW_TOKENS))
    return [token for step in steps for token in step.tokens], len(steps) - 1


# --- noise ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40)), min_size=1, max_size=3), st.integers(1, 40)
)
def test_random_words_are_those_of_numpy(keys: list[tuple[int, int]], size: int) -> None:
    seeds = torch.tensor([signed(seed) for seed, _ in keys], device=DEVICE)
    positions = torch.tensor([position for _, position in keys], device=DEVICE)
    words = random_words(seeds, positions, size).cpu().numpy().view(np.uint64)
    for (seed, position), found in zip(keys, words, strict=True):
        expected = np.random.Philox(key=np.array([seed, position], dtype=np.uint64)).random_raw(size)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=ON_GPU)])
def test_noise_is_that_of_the_reference(compiled: bool) -> None:
    noise_of = compiled_gumbel_noise() if compiled else gumbel_noise
    seeds = torch.tensor([[1], [signed(2**64 - 3)]], device=DEVICE)
    found = noise_of(seeds.expand(2, 2), torch.tensor([[5, 6], [7, 8]], device=DEVICE), 1001).cpu()
    for b, seed in enumerate((1, 2**64 - 3)):
        for i in range(2):
            np.testing.assert_allclose(found[b, i].numpy(), reference_noise(seed, 5 + 2 * b + i, 1001), rtol=1e-14)


# --- the rules --------------------------------------------------------------------------------------------------------


def slots_for(samplings: Sequence[Sampling], texts: Sequence[Sequence[int]]) -> Slots:
    slots = Slots(len(texts), VOCAB, 1, torch.float32, DEVICE)
    for b, (sampling, text) in enumerate(zip(samplings, texts, strict=True)):
        row = make_row(list(text), sampling=sampling.seeded(), features=torch.zeros(1))
        row.slot = b
        slots.begin(row)
    return slots


@given(
    st.lists(any_sampling.filter(lambda s: not s.greedy), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.sampled_from([1, 4]),
)
def test_filters_keep_what_the_reference_keeps(samplings: list[Sampling], seed: int, coarse: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(samplings), 2, VOCAB, generator=generator) * coarse).round(decimals=1) / coarse  # ties
    slots = slots_for(samplings, [[1, 2]] * len(samplings))
    scores = logits.to(DEVICE) / slots.setting("temperature", len(samplings)).float()
    found = accept.filtered(scores, slots).cpu()
    for b, sampling in enumerate(samplings):
        for node in range(2):
            ids, _ = candidates(logits[b, node], sampling)
            kept = torch.isfinite(found[b, node]).nonzero().flatten().tolist()
            assert kept == (list(range(VOCAB)) if ids is None else ids.tolist())


# --- the whole step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
@settings(max_examples=EXAMPLES)
@given(data=st.data(), prompt=prompts, sampling=any_sampling, nodes=st.integers(1, 14))
def test_a_step_accepts_what_the_reference_accepts(
    family: str, data: st.DataObject, prompt: list[int], sampling: Sampling, nodes: int
) -> None:
    backend = backend_of(family)
    drafter = data.draw(fixed_drafters(backend))
    expected = text_of(ReferenceStepper(backend, drafter, nodes), prompt, sampling)
    assert text_of(DeviceStepper(backend, drafter, nodes), prompt, sampling) == expected


@settings(max_examples=2 * EXAMPLES)
@given(
    data=st.data(),
    texts=st.lists(prompts, min_size=1, max_size=SLOTS),
    nodes=st.integers(1, 20),
    begin=st.integers(0, 3),
)
def test_any_heads_chain_and_batch_give_the_text_of_plain_decoding(
    data: st.DataObject, texts: list[list[int]], nodes: int, begin: int
) -> None:
    """Rows of other sampling share the pass; the last one joins after a few steps."""
    backend = backend_of()
    heads = data.draw(fixed_drafters(backend))
    drafter = data.draw(st.sampled_from([heads, NgramDrafter(), UnionDrafter(heads, NgramDrafter())]))
    samplings = [data.draw(lossless) for _ in texts]
    decoder = DeviceStepper(backend, drafter, nodes)
    rows = []
    for i, (text, sampling) in enumerate(zip(texts, samplings, strict=True)):
        if i == len(texts) - 1:
            for _ in range(begin):
                if running := [row for row in rows if row.finish_reason is None]:
                    decoder.step(running)
        rows.append(decoder.start(SLOTS - 1 - i, Request(text, sampling, max_new_tokens=NEW_TOKENS))[0])
    while running := [row for row in rows if row.finish_reason is None]:
        decoder.step(running)
    for row in rows:
        decoder.finish(row)
    plain = ReferenceStepper(backend, NoDrafter(), 1)
    for row, text, sampling in zip(rows, texts, samplings, strict=True):
        found = row.tokens[len(text) :]
        expected, _ = text_of(plain, text, sampling)
        if sampling.greedy and sampling.repetition_penalty == 1:
            assert agrees(backend.model, text, found, expected)
        else:
            assert found == expected


def test_drafts_are_accepted_in_these_tests() -> None:
    """Else the identity above would say nothing."""
    backend = backend_of()
    heads = Heads(
        HeadsConfig(hidden_size=backend.hidden_size, vocab_size=VOCAB, feature_layers=(1,)), backend.base_weights()
    )
    drafter = UnionDrafter(HeadsDrafter(heads.to(DEVICE), TREES[0]), NgramDrafter())
    text, steps = text_of(DeviceStepper(backend, drafter, 14), [3, 1, 4, 1, 5, 9, 2, 6], Sampling())
    assert len(text) == NEW_TOKENS
    assert steps < NEW_TOKENS - 1


def test_a_wrong_noise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of exact sampling."""
    backend, prompt, sampling = backend_of(), [3, 1, 4, 1, 5], Sampling(temperature=1.0, seed=3)
    expected = text_of(ReferenceStepper(backend, NoDrafter(), 1), prompt, sampling)
    monkeypatch.setattr(step, "gumbel_noise", lambda seeds, positions, size: gumbel_noise(seeds, positions + 1, size))
    assert text_of(DeviceStepper(backend, NoDrafter(), 1), prompt, sampling) != expected


def test_a_step_tells_what_was_drafted_and_by_whom() -> None:
    backend = backend_of()
    heads = heads_of(backend, "recurrent", True, 0, 1)
    decoder = DeviceStepper(backend, UnionDrafter(HeadsDrafter(heads, TREES[1]), NgramDrafter()), 16)
    reference = ReferenceStepper(backend, HeadsDrafter(heads, TREES[1]), 16)
    prompt = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
    row, _ = decoder.start(0, Request(prompt, Sampling(), max_new_tokens=9))
    other, _ = reference.start(1, Request(prompt, Sampling(), max_new_tokens=9))
    (step,), (expected,) = decoder.step([row]), reference.step([other])
    assert step.draft is not None
    assert expected.draft is not None
    links = len(step.draft) - 7
    assert step.draft.tokens[:7] == expected.draft.tokens
    assert step.draft.parents[:7] == expected.draft.parents
    assert step.draft.sources == ("model", *["heads"] * 6, *["ngram"] * links)
    assert [step.draft.tokens[node] for node in step.path[1:]] == list(step.tokens[: len(step.path) - 1])
    decoder.finish(row)
    reference.finish(other)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_text_ends_at_its_limit_and_at_its_end_token(limit: int) -> None:
    backend = backend_of()
    heads = heads_of(backend, "residual", True, 0, 0)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    for drafter in (NoDrafter(), NgramDrafter(), HeadsDrafter(heads, TREES[0])):
        steps = list(decode(ReferenceStepper(backend, drafter, 9), prompt, max_new_tokens=limit))
        found = list(decode(DeviceStepper(backend, drafter, 9), prompt, max_new_tokens=limit))
        assert [step.tokens for step in found] == [step.tokens for step in steps]
        assert found[-1].finish_reason == "length"
    text, _ = text_of(ReferenceStepper(backend, NoDrafter(), 1), prompt, Sampling())
    ends = list(decode(DeviceStepper(backend, NgramDrafter(), 9), prompt, max_new_tokens=24, eos_token_ids=[text[7]]))
    assert ends[-1].finish_reason == "stop"
    assert [token for step in ends for token in step.tokens] == text[: text.index(text[7]) + 1]


def test_a_row_goes_on_after_its_end_and_after_more_text() -> None:
    backend = backend_of()
    drafter = HeadsDrafter(heads_of(backend, "recurrent", True, 0, 2), TREES[0])
    texts = []
    for decoder in (ReferenceStepper(backend, NoDrafter(), 1), DeviceStepper(backend, drafter, 7)):
        row, _ = decoder.start(1, Request([3, 1, 4], Sampling(), max_new_tokens=10))
        while row.finish_reason is None:
            decoder.step([row])
        more = Request([*row.tokens, 9, 9, 2], Sampling(temperature=0.8, seed=4), max_new_tokens=10)
        row, _ = decoder.start(1, more, backend.length(1))
        while row.finish_reason is None:
            decoder.step([row])
        decoder.finish(row)
        texts.append(row.tokens)
    assert texts[0] == texts[1]


def test_the_context_may_be_filled_to_its_end() -> None:
    """Nodes past it are computed and never accepted; learned positions have no row for them."""
    backend = backend_of("gpt2")
    prompt = [i % VOCAB for i in range(250)]
    heads = heads_of(backend, "residual", True, 0, 0)
    decoder = DeviceStepper(backend, UnionDrafter(HeadsDrafter(heads, TREES[0]), NgramDrafter()), 16)
    text, _ = text_of(decoder, prompt, Sampling())
    assert text == text_of(ReferenceStepper(backend, NoDrafter(), 1), prompt, Sampling())[0]
    assert len(prompt) + len(text) == 256


def test_a_cache_that_another_decoder_moved_is_found_again() -> None:
    model = make_model(max_position_embeddings=4096, vocab_size=VOCAB).to(DEVICE)  # type: ignore[arg-type]
    backend = TransformersBackend(model, num_slots=2, feature_layers=(1,))
    decoder, other = DeviceStepper(backend, NgramDrafter(), 6), DeviceStepper(backend, NoDrafter(), 1)
    row, _ = decoder.start(0, Request([1, 2, 3, 1, 2], Sampling(), max_new_tokens=30))
    decoder.step([row])
    before = backend.capacity
    long, _ = other.start(1, Request([i % VOCAB for i in range(1500)], Sampling(), max_new_tokens=4))
    assert backend.capacity > before
    while row.finish_reason is None:
        decoder.step([row])
    other.finish(long)
    decoder.finish(row)
    expected = decode(ReferenceStepper(backend, NoDrafter(), 1), [1, 2, 3, 1, 2], max_new_tokens=30)
    assert row.tokens[5:] == [token for step in expected for token in step.tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=EXAMPLES // 2)
@given(parents=tree_parents(10), seed=st.integers(0, 999))
def test_a_pass_on_the_device_gives_the_logits_of_verify(
    dtype: torch.dtype, parents: tuple[int, ...], seed: int
) -> None:
    backend = backend_of("gemma3", dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (2, len(parents)), generator=generator)
    lengths = torch.tensor([5, 12], device=DEVICE)
    for slot, length in enumerate(lengths.tolist()):
        fill(backend, slot, torch.randint(0, VOCAB, (length,), generator=generator).tolist())
    backend.reserve(64)
    drafts = [PlainTree(tuple(row), parents) for row in tokens.tolist()]
    expected, hidden = backend.verify([0, 1], drafts)
    expected, hidden = expected.clone(), hidden.clone()
    shape = topology(parents)
    mask = torch.from_numpy(shape.mask.copy()).to(DEVICE)
    depths = torch.from_numpy(shape.depths.copy()).to(DEVICE).expand(2, -1)
    with torch.inference_mode():
        masks = backend.masks.make_on_device(lengths, depths, mask, 64)
        places = lengths[:, None] + torch.arange(len(parents), device=DEVICE)
        logits, features = backend.device_pass(
            tokens.to(DEVICE), lengths[:, None] + depths, masks, DeviceCursor(places, 64)
        )
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    torch.testing.assert_close(logits, expected, **tolerance)
    torch.testing.assert_close(features, hidden, **tolerance)


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (6, 3)])
def test_grouped_attention_is_attention(heads: int, groups: int) -> None:
    from medusa.engines.tree_attention import grouped_attention

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 5, 8, generator=generator)
    key, value = (torch.randn(2, heads // groups, 9, 8, generator=generator) for _ in range(2))
    mask = torch.where(torch.rand(2, 1, 5, 9, generator=generator) < 0.3, -1e9, 0.0)
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    keys, values = (rows.repeat_interleave(groups, dim=1) for rows in (key, value))
    weights = torch.softmax(query @ keys.transpose(2, 3) * 0.3 + mask, dim=-1)
    torch.testing.assert_close(found, (weights @ values).transpose(1, 2))


# --- around it ----------------------------------------------------------------------------------------------------


def test_a_drafter_that_the_step_does_not_know_is_refused() -> None:
    class Own:
        name = "own"

        def propose(self, rows: object, nodes: int) -> list[Draft]:
            return []

    backend = backend_of()
    with pytest.raises(UsageError, match="with heads and n-grams, not with own"):
        DeviceStepper(backend, Own(), 4)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--tree static"):
        DeviceStepper(backend, HeadsDrafter(heads_of(backend, "residual", True, 0, 0)), 4)
    with pytest.raises(UsageError, match="at most 256"):
        DeviceStepper(backend, NgramDrafter(), 257)


def test_nodes_follow_the_times_and_what_comes_true() -> None:
    times = {1: 1.0, 8: 1.1, 16: 2.0}
    asked = []

    def seconds(rows: int, nodes: int) -> float:
        asked.append((rows, nodes))
        return times[nodes] if rows == 1 else 4.0 * nodes

    nodes = NodesByTime({1: 0.0, 8: 1.0, 16: 1.4}, seconds)
    assert nodes.choose(1) == 8
    assert nodes.choose(32) == 1
    assert sorted(asked) == [(1, 1), (1, 8), (1, 16), (32, 1), (32, 8), (32, 16)]
    for _ in range(200):
        nodes.learn(8, 0.0)  # nothing comes true
    assert nodes.choose(1) == 1
    steps = 0
    while nodes.choose(1) == 1:
        nodes.learn(1, 0.0)
        steps += 1
    assert 10 < steps < 500  # and is tried again
    for _ in range(50):
        nodes.learn(8, 2.0)
    assert nodes.choose(1) == 8


def test_auto_gives_the_text_of_plain_decoding() -> None:
    backend = backend_of()
    drafter = UnionDrafter(HeadsDrafter(heads_of(backend, "recurrent", True, 0, 0), TREES[1]), NgramDrafter())
    for sampling in (Sampling(), Sampling(temperature=0.9, seed=1)):
        text, _ = text_of(DeviceStepper(backend, drafter, "auto"), [3, 1, 4, 1, 5], sampling)
        assert text == text_of(ReferenceStepper(backend, NoDrafter(), 1), [3, 1, 4, 1, 5], sampling)[0]


def test_a_pass_leaves_the_texts_of_others_as_they_are() -> None:
    """Those whose prompts are being read in pieces, those of another stepper, and what a free slot still holds."""
    backend = backend_of()
    slots = EngineSlots(backend, kept=1000)
    steppers = DeviceStepper(backend, NgramDrafter(), 8), ReferenceStepper(backend, NgramDrafter(), 8)
    asked = [[1, 2, 3], [*range(20), 7, 7], [5, 6, 5, 6, 5]]
    alone = [text_of(ReferenceStepper(backend, NoDrafter(), 1), prompt, Sampling())[0] for prompt in asked]
    mine, theirs = (Scheduler(stepper, slots, piece=4) for stepper in steppers)
    said: dict[Task, list[int]] = {}

    def run(*schedulers: Scheduler, steps: int = 1000) -> None:
        for _ in range(steps):
            for scheduler in schedulers:
                if not scheduler.idle:
                    for task, step in scheduler.step():
                        said.setdefault(task, []).extend(step.tokens)

    for _ in range(2):  # these slots will be taken by others, below that of a text that goes on
        mine.submit(Request([8, 9], Sampling(), 2))
    tasks = [mine.submit(Request(asked[0], Sampling(), NEW_TOKENS))]
    while mine._inside > 1 or tasks[0] not in said:
        run(mine, steps=1)
    tasks.append(mine.submit(Request(asked[1], Sampling(), NEW_TOKENS)))
    tasks.append(theirs.submit(Request(asked[2], Sampling(), NEW_TOKENS)))
    run(mine, theirs)
    assert [task.slot for task in tasks] == [2, 0, 1]
    assert [said[task] for task in tasks] == alone
    # What a slot holds that nobody decodes in.
    slots.clear()
    ids = asked[1]
    backend.extend(0, ids)
    row, _ = steppers[0].start(2, Request([8, 9], Sampling(), NEW_TOKENS))
    steppers[0].step([row])
    assert torch.allclose(backend.extend(0, [5])[0], backend.extend(1, [*ids, 5])[0], atol=1e-4)
    for slot in range(SLOTS):
        backend.release(slot)


def test_graphs_are_void_when_buffers_have_moved() -> None:
    """Also without more capacity: the first pass makes them, and they are stacked then."""
    model = make_model("llama", vocab_size=VOCAB).to(DEVICE)
    backend = TransformersBackend(model, num_slots=1, self_check=False)
    stepper = DeviceStepper(backend, NoDrafter(), 1)
    assert stepper.time_step(1, 1, 20, repeats=1) > 0
    assert backend.cache.stacks
    seen = backend.cache.moves
    backend.reserve(100)
    assert backend.cache.moves == seen
    for move in (lambda: None, lambda: backend.reserve(1100), lambda: backend.resize(1)):
        stepper.captured._graphs["a graph"] = (None, torch.zeros(1))
        seen = backend.cache.moves
        move()
        stepper._ready(1)
        assert len(stepper.captured) == (backend.cache.moves == seen)
    assert backend.cache.moves > seen


def test_a_cache_that_cannot_grow_says_what_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TransformersBackend(make_model("llama", vocab_size=VOCAB).to(DEVICE), num_slots=1)
    backend.extend(0, [1, 2, 3])
    before, allocate, calls = backend.capacity, SlotLayer.allocate, []

    def failing(self: SlotLayer, states: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return allocate(self, states)

    monkeypatch.setattr(SlotLayer, "allocate", failing)
    with pytest.raises(torch.OutOfMemoryError):
        backend.reserve(before + 1)
    assert backend.capacity == before
    assert {rows.shape[2] for *_, rows in backend.cache._buffers()} == {before}
    monkeypatch.undo()
    backend.reserve(before + 300)
    assert all(rows.shape[2] == backend.capacity >= before + 300 for *_, rows in backend.cache._buffers())
    before = backend.capacity
    monkeypatch.setattr(backend.cache, "stack", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend.reserve(2 * before)
    assert {rows.shape[2] for *_, rows in backend.cache._buffers()} == {backend.capacity} == {before}


def test_timing_a_step_leaves_the_slots_free() -> None:
    backend = backend_of()
    decoder = DeviceStepper(backend, NgramDrafter(), 8)
    assert decoder.time_step(2, 8, 40, repeats=2) > 0
    assert [backend.length(slot) for slot in range(SLOTS)] == [0] * SLOTS
    with pytest.raises(UsageError, match="4 free slots"):
        decoder.time_step(4, 8, 40)
    with pytest.raises(UsageError, match="context"):
        decoder.time_step(1, 8, 256)


def test_needs_name_only_what_a_row_asks_for() -> None:
    rows = [make_row([1], sampling=Sampling(top_k=3)), make_row([1], sampling=Sampling())]
    assert Needs.of(rows) == Needs()  # a greedy row has no use for filters
    rows.append(make_row([1], sampling=Sampling(temperature=1.0, acceptance="typical", repetition_penalty=1.1)))
    assert Needs.of(rows) == Needs(typical=True, penalty=True)


def test_buckets_are_few_and_hold_the_text() -> None:
    found = sorted({bucket(n) for n in range(1, 8193)})
    assert found[:5] == [256, 512, 768, 1024, 1280]
    assert all(bucket(n) >= n for n in range(1, 9000, 7))
    assert len(found) < 20


def test_without_a_gpu_nothing_is_captured() -> None:
    calls: list[int] = []

    def function() -> Tensor:
        calls.append(1)
        return torch.zeros(1)

    captured = Captured(torch.device("cpu"))
    captured.run("a", function, lambda: lambda: None)
    captured.run("a", function, lambda: lambda: None)
    assert len(calls) == 2
    assert len(captured) == 0
