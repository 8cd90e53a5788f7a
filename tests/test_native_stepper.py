"""Drafts and choices made in the native engine beside the reference's: the same, on ten thousand random cases each."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from helpers import make_row
from medusa.decoding.accept import accept
from medusa.decoding.budget import NodeBudget
from medusa.decoding.draft import Draft, Drafter, NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling, sample
from medusa.decoding.scheduler import Scheduler
from medusa.decoding.stepper import Request, Row
from medusa.decoding.times import MachineTimes, PassTimes
from medusa.decoding.tree import Tree
from medusa.engines.native import NativeBackend, native_module
from medusa.engines.native_config import native_config
from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads
from medusa.steppers import make_stepper
from test_times import learn
from tiny_models import make_model, stirred

pytest.importorskip("medusa_native")

from medusa.engines.native_heads import NativeHeads
from medusa.native_stepper import NativeStepper, knows

CASES = 10_000
VOCAB = 24  # so small that even random heads are right now and then
SLOTS = 4
INT8 = PassTimes.measured({1: 3.4, 4: 3.8, 8: 4.9, 12: 7.0, 16: 9.2, 32: 17.0}, draft_seconds=1.0)
FLAT = PassTimes.measured({1: 1.0, 64: 1.1}, draft_seconds=0.4, context=4, far={1: 1.2, 16: 1.6}, far_context=60)
CHEAP = replace(FLAT, more_draft_seconds=0.03)
STEEP = PassTimes.measured({1: 1.0, 2: 1.3, 4: 2.5, 8: 6.0}, draft_seconds=0.1)


@cache
def engine() -> NativeBackend:
    model = make_model("llama", vocab_size=VOCAB)
    config = native_config(model.config)
    return NativeBackend(config, model.state_dict(), dtype="float32", feature_layers=(1,), num_slots=SLOTS, threads=1)


@cache
def heads_of(kind: str, levels: int = 3, draft_vocab: int = 0, seed: int = 0) -> NativeHeads:
    config = HeadsConfig(
        hidden_size=engine().hidden_size,
        vocab_size=VOCAB,
        kind=kind,  # type: ignore[arg-type]
        num_heads=levels,
        draft_vocab=draft_vocab,
        feature_layers=(1,),
    )
    ids = torch.arange(0, 2 * draft_vocab, 2) if draft_vocab else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = Heads(config, engine().base_weights(), ids)
    return NativeHeads(engine(), stirred(heads, seed=seed + 1), "float32")


def some_drafter(source: random.Random) -> Drafter:
    if source.random() < 0.15:
        return NgramDrafter(source.choice([1, 4, 8]))
    kind = source.choice(["residual", "sequential", "recurrent"])
    heads = HeadsDrafter(heads_of(kind, source.choice([1, 3, 4]), source.choice([0, 9])))
    return heads if source.random() < 0.4 else UnionDrafter(heads, NgramDrafter())


def some_nodes(source: random.Random, *, free: bool) -> int | NodeBudget:
    if source.random() < 0.3:
        return source.choice([1, 2, 3, 8, 16, 40])
    return NodeBudget(source.choice([INT8, FLAT, CHEAP, STEEP, INT8.free_drafts()]), free=free)


def some_text(source: random.Random, length: int) -> list[int]:
    """One that repeats now and then."""
    text = [source.randrange(VOCAB) for _ in range(length)]
    while source.random() < 0.7:
        at, size = source.randrange(length), source.randrange(1, 8)
        text += text[at : at + size]
    return text


def beside(drafter: Drafter, nodes: int | NodeBudget) -> tuple[ReferenceStepper, NativeStepper]:
    twin = NodeBudget(nodes.times, free=not nodes.draft_seconds) if isinstance(nodes, NodeBudget) else nodes
    return ReferenceStepper(engine(), drafter, nodes), NativeStepper(engine(), drafter, twin)


def as_native(stepper: NativeStepper, row: Row) -> Row:
    stepper._enter(row)
    return row


def same(ours: Draft, theirs: Draft) -> None:
    assert (ours.tokens, ours.parents, ours.sources) == (theirs.tokens, theirs.parents, theirs.sources)
    assert ours.probabilities == pytest.approx(theirs.probabilities, rel=1e-9)


def test_drafts_are_those_of_the_reference_step_by_step() -> None:
    source, cases = random.Random(0), 0
    noise = torch.Generator().manual_seed(0)
    while cases < CASES:
        drafter = some_drafter(source)
        nodes = some_nodes(source, free=isinstance(drafter, NgramDrafter))
        reference, native = beside(drafter, nodes)
        rows = []
        for _ in range(source.randint(1, 4)):
            text = some_text(source, source.randint(1, 30))
            sampling = source.choice([Sampling(), some_sampling(source, VOCAB)])
            made = [make_row(text, sampling), as_native(native, make_row(text, sampling))]
            for row in made:
                row.prompt_tokens, row.max_new_tokens = len(text), 40
            rows.append(made)
        for _ in range(12):
            features = torch.randn(len(rows), 2 * engine().hidden_size, generator=noise)
            for pair, seen in zip(rows, features, strict=True):
                pair[0].features = seen
                pair[1].notes[native][0].see(seen)
            expected = reference._draft([pair[0] for pair in rows])
            found = native._draft([pair[1] for pair in rows])
            for pair, ours, theirs in zip(rows, found, expected, strict=True):
                same(ours, theirs)
                # The text goes on as drafted, for a while, or otherwise.
                path = ours.path(source.randrange(len(ours)))[1:]
                tokens = (*(ours.tokens[node] for node in path), source.randrange(VOCAB))
                for row in pair:
                    row.extend(tokens)
            cases += len(rows)
            rows = [pair for pair in rows if pair[0].finish_reason is None]
            if not rows:
                break


def some_sampling(source: random.Random, vocabulary: int) -> Sampling:
    return Sampling(
        temperature=source.choice([0.3, 0.7, 1.0, 1.7]),
        top_k=source.choice([0, 0, 1, 3, 17, vocabulary]),
        top_p=source.choice([1.0, 1.0, 0.9, 0.5, 0.01]),
        min_p=source.choice([0.0, 0.0, 0.02, 0.3]),
        repetition_penalty=source.choice([1.0, 1.0, 1.3, 0.8]),
        acceptance=source.choice(["exact", "exact", "typical"]),
        epsilon=source.choice([0.09, 0.3]),
        delta=source.choice([0.3, 0.9]),
        seed=source.randrange(2**63),
    )


def rule_of(sampling: Sampling) -> Any:
    stepper = NativeStepper(engine(), NoDrafter(), 1)
    return stepper._rule(sampling)


@pytest.mark.parametrize("isa", native_module().usable_isas() if native_module() else [])
def test_a_token_is_drawn_as_the_reference_draws_it(isa: str) -> None:
    source, model = random.Random(1), make_model("llama", vocab_size=VOCAB)
    backend = NativeBackend(native_config(model.config), model.state_dict(), dtype="float32", isa=isa, threads=2)
    draw = np.random.default_rng(1)
    for case in range(CASES // 4):
        size = source.choice([2, 15, 16, 33, 300, 2000]) if case % 50 else 49152
        logits = (source.choice([0.5, 3, 10]) * draw.standard_normal(size)).astype(np.float32)
        if source.random() < 0.3:
            logits = np.round(logits)  # equals
        if source.random() < 0.2:
            logits[draw.random(size) < 0.5] = -np.inf
            logits[source.randrange(size)] = 1.0
        if source.random() < 0.02:
            logits[source.randrange(size)] = np.inf
        sampling = replace(some_sampling(source, size), acceptance="exact", repetition_penalty=1.0)
        position = source.randrange(10**6)
        found = native_module().sample(backend.engine, logits, rule_of(sampling), position)
        assert found == sample(torch.from_numpy(logits), sampling, position), (size, sampling, position)


def test_choices_are_those_of_the_reference() -> None:
    source, cases = random.Random(2), 0
    native = NativeStepper(engine(), NoDrafter(), 1)
    backend = engine()
    while cases < CASES // 4:
        rows, drafts = [], []
        for slot in range(source.randint(1, SLOTS)):
            sampling = some_sampling(source, VOCAB)
            if source.random() < 0.3:
                sampling = Sampling(repetition_penalty=sampling.repetition_penalty)
            text = some_text(source, source.randint(2, 20))
            row = as_native(native, make_row(text, sampling))
            row.notes[native][0].extend(text)
            row.slot = slot
            backend.extend(slot, text[:-1])
            rows.append(row)
            parents: list[int] = [-1]
            tokens = [text[-1]]
            for _ in range(source.choice([0, 3, 12, 30])):
                parent = source.randrange(len(parents))
                if (token := source.randrange(VOCAB)) not in {
                    t for t, p in zip(tokens, parents, strict=True) if p == parent
                }:
                    parents.append(parent)
                    tokens.append(token)
            size = len(tokens)
            drafts.append(Draft(tuple(tokens), tuple(parents), (1.0,) * size, ("",) * size))
        logits, features = backend.verify([row.slot for row in rows], drafts)
        found = native._accept(logits, features, drafts, rows)
        for b, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            assert found[b] == accept(logits[b, : len(draft)], draft, row), (row.sampling, draft)
        for row in rows:
            backend.release(row.slot)
        cases += len(rows)


@pytest.mark.parametrize("acceptance", ["greedy", "exact", "typical"])
def test_texts_are_those_of_the_reference(acceptance: str) -> None:
    """Whole steps of batches in which each row has its own sampling, length and penalties."""
    source = random.Random(3)
    for _ in range(12):
        drafter = some_drafter(source)
        steppers = beside(drafter, some_nodes(source, free=isinstance(drafter, NgramDrafter)))
        requests = []
        for _ in range(6):
            sampling = some_sampling(source, VOCAB)
            if acceptance == "greedy":
                sampling = Sampling(repetition_penalty=sampling.repetition_penalty)
            else:
                sampling = replace(sampling, acceptance=acceptance)  # type: ignore[arg-type]
            if source.random() < 0.3:  # what the engine leaves to the reference
                sampling = replace(sampling, presence_penalty=0.5, logit_bias=((3, 1.0),))
            text = some_text(source, source.randint(1, 20))
            requests.append(
                Request(text, sampling, source.randint(1, 30), frozenset({5}), logprobs=source.choice([None, 2]))
            )
        told = []
        for stepper in steppers:
            steps = [step for _, step in Scheduler(stepper).run(requests)]
            drafted = [None if step.draft is None else step.draft.tokens for step in steps]
            told.append(
                [
                    (step.tokens, step.sources, step.finish_reason, step.path, step.logprobs, tokens)
                    for step, tokens in zip(steps, drafted, strict=True)
                ]
            )
        assert told[0] == told[1]


def test_a_top_k_of_any_size_is_all_of_the_vocabulary() -> None:
    told = []
    for top_k in (VOCAB, 10**400):
        stepper = NativeStepper(engine(), NgramDrafter(), 4)
        request = Request([3, 4, 5], Sampling(temperature=1.0, seed=1, top_k=top_k), 12, frozenset({5}))
        told.append([step.tokens for _, step in Scheduler(stepper).run([request])])
    assert told[0] == told[1]


class Nothing:
    """A constraint that allows two tokens."""

    def allowed(self, path: Any) -> np.ndarray:
        mask = np.zeros(VOCAB, dtype=bool)
        mask[[7, 9]] = True
        return mask

    def keep(self, tokens: Any) -> None:
        pass


def test_a_constraint_is_asked_by_the_reference_while_the_other_rows_go_on_in_the_engine() -> None:
    stepper = NativeStepper(engine(), NgramDrafter(), 8)
    bound, free = Request([1, 2, 3], max_new_tokens=20, constraint=Nothing()), Request([1, 2, 3], max_new_tokens=20)
    scheduler = Scheduler(stepper)
    tasks = [scheduler.submit(bound), scheduler.submit(free)]
    while not scheduler.idle:
        scheduler.step()
    assert set(tasks[0].new_tokens) <= {7, 9}
    plain = Scheduler(ReferenceStepper(engine(), NoDrafter(), 1))
    alone = plain.submit(free)
    while not plain.idle:
        plain.step()
    assert tasks[1].new_tokens == alone.new_tokens


class Rhythm:
    """Every third token is 5, the others are 1, 2 or 3; it can be walked along."""

    def __init__(self) -> None:
        self.place = 0

    def allowed(self, path: Any) -> np.ndarray:
        mask = np.zeros(VOCAB, dtype=bool)
        mask[[5] if (self.place + len(path)) % 3 == 0 else [1, 2, 3]] = True
        return mask

    def keep(self, tokens: Any) -> None:
        self.place += len(tokens)

    def enter(self, token: int) -> bool:
        fits = bool(self.allowed(())[token])
        self.place += fits
        return fits

    def leave(self, count: int = 1) -> None:
        self.place -= count

    def forced(self) -> list[int]:
        return [5] if self.place % 3 == 0 else []


@pytest.mark.parametrize("nodes", [4, NodeBudget(INT8)], ids=["four", "auto"])
def test_what_a_constraint_forces_is_drafted_and_what_it_forbids_is_not_verified(nodes: int | NodeBudget) -> None:
    drafter = UnionDrafter(HeadsDrafter(heads_of("recurrent")), NgramDrafter())
    texts = []
    for stepper in (ReferenceStepper(engine(), NoDrafter(), 1), NativeStepper(engine(), drafter, nodes)):
        requests = [
            Request([4, 4, 9], Sampling(temperature=t, seed=1), 30, constraint=Rhythm()) for t in (0.0, 0.0, 0.9)
        ]
        requests.append(Request([4, 4, 9], max_new_tokens=30))
        scheduler = Scheduler(stepper)
        tasks, sources = [scheduler.submit(request) for request in requests], set()
        while not scheduler.idle:
            for task, step in scheduler.step():
                sources |= set(step.sources)
                if step.draft is not None and task is not tasks[3]:
                    assert set(step.draft.tokens) <= {1, 2, 3, 5, 9}
        texts.append([task.new_tokens for task in tasks])
    assert texts[0] == texts[1]
    assert "grammar" in sources


def test_the_native_backend_brings_its_stepper_where_it_knows_the_drafter() -> None:
    heads = heads_of("recurrent")
    times = MachineTimes(lambda again: INT8)

    class Mine(NgramDrafter):
        pass

    known: list[Drafter] = [NoDrafter(), NgramDrafter(), HeadsDrafter(heads), UnionDrafter(NgramDrafter())]
    tree = Tree.cartesian(2, 2)
    others: list[Drafter] = [Mine(), HeadsDrafter(heads, tree), UnionDrafter(NgramDrafter(), HeadsDrafter(heads))]
    assert all(map(knows, known))
    assert not any(map(knows, others))
    assert [type(make_stepper(engine(), drafter, 8, times)) for drafter in known] == [NativeStepper] * 4
    assert [type(make_stepper(engine(), drafter, 8, times)) for drafter in others] == [ReferenceStepper] * 3
    with pytest.raises(UsageError, match="does not know"):
        NativeStepper(engine(), Mine(), 8)


def test_typical_texts_are_drafted_for_by_the_profile_alone() -> None:
    """How many nodes are asked for too: they depend on what is drafted, and must not on what steps took lately."""
    times = MachineTimes(lambda refresh: FLAT)
    budget = NodeBudget(times)
    stepper = NativeStepper(engine(), NgramDrafter(), budget)
    asked: list[tuple[PassTimes, int]] = []
    real = stepper._engine_times

    def watched(current: PassTimes, most: int) -> Any:
        asked.append((current, most))
        return real(current, most)

    stepper._engine_times = watched  # type: ignore[method-assign]
    profile = budget.most
    learn(times, lambda n: 1.0 + 5.0 * (n > 9), (1, 8, 9, 10, 16), 3000)
    assert budget.most != profile
    for acceptance, most in (("typical", profile), ("exact", budget.most)):
        sampling = Sampling(temperature=1.0, seed=1, acceptance=acceptance)  # type: ignore[arg-type]
        asked.clear()
        list(Scheduler(stepper).run([Request([3, 4, 3, 4, 3], sampling, 8)]))
        assert {count for _, count in asked} == {most}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("place", [0, 5])
def test_a_residual_that_is_not_finite_shows_in_the_logits(dtype: str, place: int) -> None:
    model = make_model("llama", vocab_size=VOCAB, hidden_size=128, intermediate_size=128)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name.endswith("up_proj.weight"):
            tensor *= 1e3
        if name.endswith("down_proj.weight"):
            tensor[place] = 3e38
    backend = NativeBackend(native_config(model.config), tensors, dtype=dtype, num_slots=1, threads=1)
    logits, _ = backend.extend(0, [1, 2, 3])
    assert not torch.isfinite(logits).any()


def test_numbers_that_are_none_are_an_error_and_no_token() -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[70] = np.nan
    for sampling in (Sampling(), Sampling(temperature=1, seed=1), Sampling(temperature=1, seed=1, top_k=5)):
        row = make_row([1], sampling)
        with pytest.raises(MedusaError, match="not finite"):
            accept(torch.from_numpy(logits[None]), Draft((1,)), row)
    with pytest.raises(ValueError, match="not finite"):
        native_module().sample(engine().engine, logits, rule_of(Sampling(temperature=1, seed=1)), 0)


def test_a_choice_that_does_not_fit_the_last_pass_is_refused() -> None:
    backend, module = engine(), native_module()
    text = module.Text()
    text.extend([1, 2, 3])
    backend.extend(0, [1, 2])
    backend.verify([0], [Draft((3,))])
    rule = rule_of(Sampling())
    for tokens, parents in (
        ([[3, 4]], [[-1, 0]]),
        ([[3]], [[0]]),
        ([[VOCAB]], [[-1]]),
        ([[3], [3]], [[-1], [-1]]),
        ([[]], [[]]),
    ):
        with pytest.raises(ValueError, match="fit"):
            module.choose(backend.engine, [text] * len(tokens), [rule] * len(tokens), tokens, parents)
    backend.release(0)
