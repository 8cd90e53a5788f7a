"""The decoding loop on a toy model: whatever is drafted, the text is that of plain decoding."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    RandomTreeDrafter,
    ToyBackend,
    ToyModel,
    always_agrees,
    chi_square_p,
    never_agrees,
    plain_decode,
    slow_probabilities,
)
from medusa.decoding.accept import Accepted
from medusa.decoding.budget import NodeBudget
from medusa.decoding.draft import MODEL, Draft, Drafter, NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import decode
from medusa.decoding.stepper import NO_TIME, Request, Row, Step
from medusa.decoding.times import PassTimes
from medusa.errors import UsageError


def run(
    model: ToyModel,
    drafter: Drafter,
    prompt: Sequence[int],
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int = 20,
    eos: Iterable[int] = (),
    nodes: int | NodeBudget = 12,
    max_length: int = 64,
) -> tuple[list[Step], ToyBackend]:
    backend = ToyBackend(model, max_length=max_length)
    decoder = ReferenceStepper(backend, drafter, nodes)
    steps = list(decode(decoder, prompt, sampling, max_new_tokens=max_new_tokens, eos_token_ids=eos))
    assert backend.text == {}, "the slot is free again"
    assert backend.largest <= (nodes.most if isinstance(nodes, NodeBudget) else nodes)
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    return steps, backend


def text_of(steps: Iterable[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


def drafters_of(model: ToyModel, depth: int = 4) -> list[Drafter]:
    """They never, always and sometimes agree."""
    return [
        never_agrees(model, depth),
        always_agrees(model, depth),
        RandomTreeDrafter(model, seed=1, right=0.6),
        NgramDrafter(),
        UnionDrafter(NgramDrafter(), RandomTreeDrafter(model, seed=2, right=0.6)),
    ]


# --- lossless, one text -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One request and what plain decoding makes of it."""

    prompt: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    eos: frozenset[int]


@st.composite
def texts(draw: st.DrawFn, vocab: int, sampling: st.SearchStrategy[Sampling], longest: int = 24) -> Text:
    token = st.integers(0, vocab - 1)
    return Text(
        tuple(draw(st.lists(token, min_size=1, max_size=8))),
        draw(sampling),
        draw(st.integers(1, longest)),
        draw(st.frozensets(token, max_size=2)),
    )


greedy = st.just(Sampling())
sampled = st.builds(
    Sampling,
    temperature=st.sampled_from([0.5, 1.0, 1.6]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**64 - 1),
)
penalised = st.sampled_from([0.8, 1.2, 2.0])
any_sampling = st.one_of(
    greedy,
    sampled,
    st.builds(lambda penalty: Sampling(repetition_penalty=penalty), penalised),
    st.builds(lambda base, penalty: replace(base, repetition_penalty=penalty), sampled, penalised),
    st.builds(
        lambda base, presence, frequency, bias: replace(
            base, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
        ),
        st.one_of(greedy, sampled),
        st.sampled_from([0.0, 0.5, -1.0]),
        st.sampled_from([0.0, 0.25]),
        st.sampled_from([(), ((0, 1.5), (1, -100.0))]),
    ),
)
# A model of low order repeats itself, so that the n-gram drafter has something to say.
models = st.builds(ToyModel, vocab=st.integers(2, 9), seed=st.integers(0, 99), order=st.sampled_from([None, 1, 2]))


# A pass is from free to dear, and drafting too: all that may be chosen is chosen somewhere.
budgets = st.builds(
    lambda steps, draft: NodeBudget(PassTimes(tuple(itertools.accumulate(steps, initial=1.0)), draft)),
    st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.5]), min_size=1, max_size=20),
    st.sampled_from([0.0, 0.2, 2.0]),
)


def check_lossless(
    model: ToyModel, text: Text, drafter: Drafter, nodes: int | NodeBudget, max_length: int = 40
) -> None:
    steps, _ = run(
        model,
        drafter,
        text.prompt,
        text.sampling,
        max_new_tokens=text.max_new_tokens,
        eos=text.eos,
        nodes=nodes,
        max_length=max_length,
    )
    expected = plain_decode(
        model, text.prompt, text.sampling, max_new_tokens=text.max_new_tokens, eos=text.eos, max_length=max_length
    )
    assert (text_of(steps), steps[-1].finish_reason) == expected


@given(st.data(), models, st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 16))
def test_greedy_equals_plain_decoding_for_any_tree(
    data: st.DataObject, model: ToyModel, seed: int, right: float, nodes: int
) -> None:
    check_lossless(model, data.draw(texts(model.vocab, greedy)), RandomTreeDrafter(model, seed, right), nodes)


@given(st.data(), models, st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 16))
def test_sampling_with_a_seed_equals_plain_sampling_token_for_token(
    data: st.DataObject, model: ToyModel, seed: int, right: float, nodes: int
) -> None:
    check_lossless(model, data.draw(texts(model.vocab, sampled)), RandomTreeDrafter(model, seed, right), nodes)


@given(st.data(), models, st.integers(0, 2**32), penalised)
def test_a_repetition_penalty_is_lossless(data: st.DataObject, model: ToyModel, seed: int, penalty: float) -> None:
    text = data.draw(texts(model.vocab, st.one_of(greedy, sampled)))
    text = replace(text, sampling=replace(text.sampling, repetition_penalty=penalty))
    check_lossless(model, text, RandomTreeDrafter(model, seed, 0.7), 12)


@given(st.data(), models, st.integers(0, 2**32), st.floats(0, 1), budgets)
def test_any_choice_of_nodes_is_lossless(
    data: st.DataObject, model: ToyModel, seed: int, right: float, budget: NodeBudget
) -> None:
    drafter = UnionDrafter(RandomTreeDrafter(model, seed, right), NgramDrafter())
    check_lossless(model, data.draw(texts(model.vocab, any_sampling)), drafter, budget)


@given(st.data(), models, any_sampling)
def test_every_drafter_is_lossless(data: st.DataObject, model: ToyModel, sampling: Sampling) -> None:
    text = data.draw(texts(model.vocab, st.just(sampling)))
    for drafter in drafters_of(model):
        check_lossless(model, text, drafter, 10)


@given(st.data(), models, any_sampling)
def test_plain_decoding_is_the_loop_without_a_drafter(data: st.DataObject, model: ToyModel, sampling: Sampling) -> None:
    check_lossless(model, data.draw(texts(model.vocab, st.just(sampling))), NoDrafter(), 1)


def test_the_test_of_losslessness_notices_a_wrong_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa.decoding.reference.accept", first_child_always)
    model = ToyModel()
    text = Text((1,), Sampling(), 20, frozenset())
    with pytest.raises(AssertionError):
        check_lossless(model, text, RandomTreeDrafter(model, 0, 0.5), 12)


# --- lossless, many texts ---------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.data(), models, st.integers(1, 4), st.one_of(st.just(8), budgets))
def test_rows_of_a_batch_are_decoded_as_if_alone(
    data: st.DataObject, model: ToyModel, num_slots: int, nodes: int | NodeBudget
) -> None:
    """Texts of all lengths come and go, in any slot; a step takes any of the running rows, in any order."""
    wanted = data.draw(st.lists(texts(model.vocab, any_sampling, longest=12), min_size=1, max_size=7))
    backend = ToyBackend(model, num_slots=num_slots, max_length=16)
    drafter = UnionDrafter(RandomTreeDrafter(model, seed=len(wanted), right=0.6), NgramDrafter())
    decoder = ReferenceStepper(backend, drafter, nodes)
    waiting, running, free = list(enumerate(wanted)), {}, list(range(num_slots))
    found: dict[int, tuple[list[int], str | None]] = {}

    def settle(i: int, row: Row) -> None:
        if row.finish_reason is not None:
            found[i] = (row.tokens[row.prompt_tokens :], row.finish_reason)
            decoder.finish(row)
            free.append(row.slot)
            running.pop(i, None)

    while waiting or running:
        while waiting and free and (not running or data.draw(st.booleans())):
            i, text = waiting.pop(0)
            slot = free.pop(data.draw(st.integers(0, len(free) - 1)))
            row, step = decoder.start(slot, Request(text.prompt, text.sampling, text.max_new_tokens, text.eos))
            assert row.tokens == [*text.prompt, *step.tokens]
            running[i] = row
            settle(i, row)
        if not running:
            continue
        chosen = data.draw(st.permutations(sorted(running)))[: data.draw(st.integers(1, len(running)))]
        rows = [running[i] for i in chosen]
        before = [list(row.tokens) for row in rows]
        steps = decoder.step(rows)
        for i, row, text_before, step in zip(chosen, rows, before, steps, strict=True):
            assert row.tokens == [*text_before, *step.tokens]
            assert row.finish_reason == step.finish_reason
            settle(i, row)
    assert backend.text == {}
    for i, text in enumerate(wanted):
        assert found[i] == plain_decode(
            model, text.prompt, text.sampling, max_new_tokens=text.max_new_tokens, eos=text.eos, max_length=16
        )


# --- the distribution of exact sampling -------------------------------------------------------------------------------

SMALL = ToyModel(vocab=4, seed=3, scale=1.0)
PROMPT = [1, 2]
LENGTH = 3
RUNS = 3000


def enumerated(sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of each text of LENGTH tokens, as a product of the model's own."""
    found = {}
    for text in itertools.product(range(SMALL.vocab), repeat=LENGTH):
        p = 1.0
        for i, token in enumerate(text):
            p *= slow_probabilities(SMALL([*PROMPT, *text[:i]]), sampling)[0][token]
        found[text] = p
    return found


def counted(sampling: Sampling, drafter: Drafter) -> tuple[list[int], list[float], float]:
    """Counts and probabilities of all texts, and the mean length of a step after the first."""
    expected = enumerated(sampling)
    counts: Counter[tuple[int, ...]] = Counter()
    decoder = ReferenceStepper(ToyBackend(SMALL), drafter, nodes=8)
    steps = 0
    for seed in range(RUNS):
        made = list(decode(decoder, PROMPT, replace(sampling, seed=seed), max_new_tokens=LENGTH))
        counts[tuple(text_of(made))] += 1
        steps += len(made) - 1
    return [counts[text] for text in expected], list(expected.values()), RUNS * (LENGTH - 1) / steps


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=1.4, top_p=0.9)], ids=str)
def test_exact_sampling_has_the_distribution_of_the_model(sampling: Sampling) -> None:
    counts, expected, per_step = counted(sampling, RandomTreeDrafter(SMALL, seed=0, right=0.5, max_nodes=8))
    assert per_step > 1.15  # drafts were accepted, or this would say nothing
    assert chi_square_p(counts, expected) > 1e-3


def first_child_always(logits: torch.Tensor, draft: Draft, row: Row) -> Accepted:
    """What an acceptance rule must not do."""
    path = [0]
    while children := [i for i in range(len(draft)) if draft.parents[i] == path[-1]]:
        path.append(children[0])
    return Accepted(tuple(path), int(logits[path[-1]].argmax()))


def accept_what_is_likely(logits: torch.Tensor, draft: Draft, row: Row) -> Accepted:
    """A subtler mistake: the first child is taken with the probability that the model gives it, else another draw is
    made from the whole distribution, not from what is left of it."""
    from medusa.decoding.sampling import sample

    path = [0]
    while children := [i for i in range(len(draft)) if draft.parents[i] == path[-1]]:
        place = len(row.tokens) + len(path)
        p = torch.softmax(logits[path[-1]] / row.sampling.temperature, dim=-1)[draft.tokens[children[0]]]
        if not torch.rand((), generator=torch.Generator().manual_seed(1000 * row.sampling.seed + place)) < p:
            break
        path.append(children[0])
    return Accepted(tuple(path), sample(logits[path[-1]], row.sampling, len(row.tokens) + len(path) - 1))


@pytest.mark.parametrize("wrong", [first_child_always, accept_what_is_likely])
def test_the_test_of_the_distribution_notices_a_wrong_acceptance(
    wrong: Callable[..., Accepted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa.decoding.reference.accept", wrong)
    counts, expected, _ = counted(
        Sampling(temperature=1.0), RandomTreeDrafter(SMALL, seed=0, right=0.5, max_nodes=8)
    )  # fmt: skip
    assert chi_square_p(counts, expected) < 1e-6


def test_the_test_of_the_distribution_notices_a_wrong_temperature() -> None:
    counts, _, _ = counted(Sampling(temperature=1.25), NoDrafter())
    assert chi_square_p(counts, list(enumerated(Sampling(temperature=1.0)).values())) < 1e-6


def test_without_a_seed_texts_differ() -> None:
    made = {tuple(text_of(run(ToyModel(), NoDrafter(), [1], Sampling(temperature=1.0))[0])) for _ in range(5)}
    assert len(made) > 1


# --- typical acceptance in the loop -----------------------------------------------------------------------------------


def test_typical_says_what_greedy_says_when_greedy_is_drafted() -> None:
    model = ToyModel()
    sampling = Sampling(temperature=1.0, acceptance="typical", epsilon=0.0)
    steps, _ = run(model, always_agrees(model, 4), [3, 1], sampling)
    assert text_of(steps) == plain_decode(model, [3, 1], Sampling(), max_new_tokens=20)[0]
    assert len(steps) < 8


def test_typical_says_what_was_drafted_when_anything_goes() -> None:
    model = ToyModel()
    sampling = Sampling(temperature=1.0, acceptance="typical", epsilon=0.0)
    steps, _ = run(model, never_agrees(model, 3), [3, 1], sampling, max_new_tokens=9)
    assert steps[1].sources == ("chain", "chain", "chain", MODEL)
    text = [3, 1, *text_of(steps)]
    assert text[3] == min(range(model.vocab), key=model(text[:3]).__getitem__)


# --- how much, and where it ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(7))
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5, 8, 13])
def test_exactly_as_many_tokens_as_asked_for_at_every_depth(depth: int, max_new_tokens: int) -> None:
    model = ToyModel()
    for drafter in (never_agrees(model, depth), always_agrees(model, depth)):
        steps, _ = run(model, drafter, [2, 5], max_new_tokens=max_new_tokens)
        assert len(text_of(steps)) == max_new_tokens
        assert steps[-1].finish_reason == "length"


@pytest.mark.parametrize("depth", range(7))
@pytest.mark.parametrize("max_new_tokens", [1, 2, 6, 7, 20, 31])
def test_a_drafter_that_is_always_right_needs_the_fewest_passes(depth: int, max_new_tokens: int) -> None:
    model = ToyModel()
    steps, backend = run(model, always_agrees(model, depth), [2, 5], max_new_tokens=max_new_tokens)
    assert backend.forwards == len(steps) - 1 == math.ceil((max_new_tokens - 1) / (depth + 1))


def test_a_drafter_that_is_never_right_needs_a_pass_for_each_token() -> None:
    model = ToyModel()
    steps, backend = run(model, never_agrees(model, 4), [2, 5], max_new_tokens=20)
    assert backend.forwards == 19
    assert [step.tokens for step in steps] == [(token,) for token in text_of(steps)]


def test_nothing_is_verified_that_there_is_no_room_for() -> None:
    model = ToyModel()
    steps, _ = run(model, always_agrees(model, 9), [2, 5], max_new_tokens=4)
    assert [step.drafted for step in steps] == [1, 3]  # the root and two nodes give the three tokens that are missing


@pytest.mark.parametrize("drafter", range(5))
@pytest.mark.parametrize("prompt_tokens", [1, 5, 13, 14, 15])
def test_the_context_limit_ends_the_text_and_is_no_error(drafter: int, prompt_tokens: int) -> None:
    model = ToyModel()
    prompt = [i % model.vocab for i in range(prompt_tokens)]
    steps, _ = run(model, drafters_of(model)[drafter], prompt, max_new_tokens=1000, max_length=16)
    assert prompt_tokens + len(text_of(steps)) == 16
    assert steps[-1].finish_reason == "length"


def test_the_first_end_token_inside_an_accepted_path_ends_the_text() -> None:
    model = ToyModel(vocab=9)
    whole = plain_decode(model, [4], Sampling(), max_new_tokens=20)[0]
    for at in range(1, 12):
        ends = {whole[at], whole[(at + 3) % 20]}
        first = min(whole.index(end) for end in ends)
        steps, _ = run(model, always_agrees(model, 5), [4], eos=ends)
        assert text_of(steps) == whole[: first + 1]
        assert steps[-1].finish_reason == "stop"
        assert all(len(step.tokens) == len(step.sources) for step in steps)
        # The end itself was drafted, unless it is where a pass ends (0 is the prefill, then 6 tokens a pass).
        assert steps[-1].sources[-1] == (MODEL if first % 6 == 0 else "chain")


def test_an_end_token_that_comes_last_is_a_stop_and_not_a_length() -> None:
    model = ToyModel()
    whole = plain_decode(model, [4], Sampling(), max_new_tokens=6)[0]
    at = next(i for i in range(1, 6) if whole[i] not in whole[:i])
    for drafter in (NoDrafter(), always_agrees(model, 3)):
        steps, _ = run(model, drafter, [4], max_new_tokens=at + 1, eos=[whole[at]])
        assert (text_of(steps), steps[-1].finish_reason) == (whole[: at + 1], "stop")


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    model = ToyModel()
    said = {end: plain_decode(model, [end, 4], Sampling(), max_new_tokens=3)[0] for end in range(model.vocab)}
    end = next(end for end in said if end not in said[end])
    for drafter in (NoDrafter(), always_agrees(model, 3)):
        assert text_of(run(model, drafter, [end, 4], max_new_tokens=3, eos=[end])[0]) == said[end]


def test_sources_say_who_proposed_each_token() -> None:
    model = ToyModel()
    steps, _ = run(model, always_agrees(model, 2), [4], max_new_tokens=8)
    assert [step.sources for step in steps] == [
        (MODEL,),
        ("chain", "chain", MODEL),
        ("chain", "chain", MODEL),
        (MODEL,),
    ]
    assert [step.drafted for step in steps] == [1, 3, 3, 1]


def test_a_step_tells_its_draft_its_path_and_where_its_time_went() -> None:
    model = ToyModel()
    steps, _ = run(model, RandomTreeDrafter(model, seed=3, right=0.8), [4], max_new_tokens=12)
    assert (steps[0].draft, steps[0].path, steps[0].phases) == (None, (), NO_TIME)
    for before, step in itertools.pairwise(steps):
        assert step.draft is not None
        assert step.draft.tokens[0] == before.tokens[-1], "the root is the last token said"
        assert tuple(step.draft.tokens[node] for node in step.path[1:]) == step.tokens[:-1]
        assert step.path == step.draft.path(step.path[-1])
        assert min(step.phases) > 0


# --- errors, and slots given back -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([1], 0, "max_new_tokens must be at least 1, not 0"),
        ([1], -5, "max_new_tokens must be at least 1, not -5"),
        ([], 1, "the prompt is empty"),
        ([1] * 16, 1, "the prompt has 16 tokens, which leaves no room in the context of 16"),
        ([1] * 99, 1, "the prompt has 99 tokens"),
    ],
)
def test_what_cannot_be_decoded_is_refused_and_leaves_the_slot_free(
    prompt: list[int], max_new_tokens: int, message: str
) -> None:
    backend = ToyBackend(ToyModel(), max_length=16)
    decoder = ReferenceStepper(backend, NoDrafter(), 1)
    with pytest.raises(UsageError, match=message):
        Request(prompt, max_new_tokens=max_new_tokens).check(backend.max_length)
    with pytest.raises(UsageError, match=message):
        decoder.start(0, Request(prompt, Sampling(), max_new_tokens=max_new_tokens))
    with pytest.raises(UsageError, match=message):
        list(decode(decoder, prompt, max_new_tokens=max_new_tokens))
    assert backend.text == {}


def test_a_decoder_needs_room_for_the_root() -> None:
    with pytest.raises(UsageError, match=r"nodes must be at least 1 \(the root\), not 0"):
        ReferenceStepper(ToyBackend(ToyModel()), NoDrafter(), 0)


def test_the_slot_is_given_back_when_the_reader_goes_away() -> None:
    backend = ToyBackend(ToyModel(), num_slots=2)
    steps = decode(ReferenceStepper(backend, NoDrafter(), 1), [1], max_new_tokens=50)
    next(steps)
    next(steps)
    assert backend.length(0) == 2
    steps.close()
    assert backend.text == {}


def test_the_slot_is_given_back_when_the_drafter_fails() -> None:
    class Broken:
        name = "broken"

        def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
            raise RuntimeError("out of ideas")

    backend = ToyBackend(ToyModel())
    with pytest.raises(RuntimeError, match="out of ideas"):
        list(decode(ReferenceStepper(backend, Broken(), 8), [1], max_new_tokens=50))
    assert backend.text == {}


@pytest.mark.parametrize("nodes", [6, NodeBudget(PassTimes((1.0, 1.0)))])
def test_a_decoder_refuses_trees_that_its_backend_does_not_take(nodes: int | NodeBudget) -> None:
    backend = ToyBackend(SMALL)
    ReferenceStepper(backend, NoDrafter(), nodes)
    backend.max_nodes = 5
    with pytest.raises(UsageError, match="nodes may be at most 5 on the toy backend, not"):
        ReferenceStepper(backend, NoDrafter(), nodes)
    ReferenceStepper(backend, NoDrafter(), 5)
