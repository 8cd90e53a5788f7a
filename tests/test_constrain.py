"""Drafts and constraints: what is dropped, what is drafted for free; on a toy grammar, whose rules are a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helpers import (
    RandomTreeDrafter,
    ToyBackend,
    ToyModel,
    always_agrees,
    make_row,
    never_agrees,
    plain_decode,
    token_paths,
)
from medusa.decoding.constrain import GRAMMAR, ConstrainedDrafter, constrained, for_rows
from medusa.decoding.draft import Draft, NoDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import Scheduler
from medusa.decoding.stepper import Request

Follow = Sequence[frozenset[int]]


class Table:
    """After each token those in `follow[token]`; what follows is forced while there is one alone."""

    def __init__(self, follow: Follow, last: int) -> None:
        self.follow = follow
        self.text = [last]
        self.kept = 0

    def allowed(self, path: Sequence[int]) -> np.ndarray:
        last = path[-1] if path else self.text[-1]
        return np.array([token in self.follow[last] for token in range(len(self.follow))])

    def keep(self, tokens: Sequence[int]) -> None:
        assert self.kept == len(self.text) - 1, "a walk ends where it began"
        assert all(b in self.follow[a] for a, b in zip((self.text[-1], *tokens), tokens, strict=False))
        self.text += tokens
        self.kept = len(self.text) - 1

    def enter(self, token: int) -> bool:
        if token not in self.follow[self.text[-1]]:
            return False
        self.text.append(token)
        return True

    def leave(self, count: int = 1) -> None:
        assert len(self.text) - count > self.kept
        del self.text[len(self.text) - count :]

    def forced(self) -> Sequence[int]:
        chain, last = [], self.text[-1]
        while len(self.follow[last]) == 1 and len(chain) < 9:
            (last,) = self.follow[last]
            chain.append(last)
        return chain


class Tables:
    """A grammar of such constraints, which counts those that it has made."""

    def __init__(self, follow: Follow, last: int) -> None:
        self.follow, self.last, self.made = follow, last, 0

    def begin(self) -> Table:
        self.made += 1
        return Table(self.follow, self.last)


ANY = frozenset(range(6))
FOLLOW = (frozenset({1}), frozenset({2}), frozenset({3, 4}), ANY, frozenset({0}), ANY)


def test_what_must_not_come_is_dropped_with_all_that_hangs_on_it() -> None:
    draft = Draft((2, 3, 5, 1, 4), (-1, 0, 0, 2, 1), (1.0, 0.5, 0.4, 0.3, 0.25), ("model", "a", "a", "a", "b"))
    walk = Table(FOLLOW, 2)
    found = constrained(draft, walk, 4)
    assert (found.tokens, found.parents) == ((2, 3, 4, 0), (-1, 0, 1, 2)), "5 must not follow 2, nor 1 be reached"
    assert found.sources == ("model", "a", "b", GRAMMAR)
    assert found.probabilities == (1.0, 0.5, 0.25, 0.25)
    assert walk.text == [2]


def test_what_must_come_is_drafted_with_the_probability_of_what_it_follows() -> None:
    found = constrained(Draft((0,)), Table(FOLLOW, 0), 10)
    assert (found.tokens, found.parents) == ((0, 1, 2), (-1, 0, 1))
    assert found.probabilities == (1.0, 1.0, 1.0)
    assert found.sources == ("model", GRAMMAR, GRAMMAR)


def test_a_guess_that_must_come_becomes_certain_and_so_what_follows_it_likelier() -> None:
    draft = Draft((0, 1, 2, 3), (-1, 0, 1, 2), (1.0, 0.5, 0.25, 0.125), ("model", "a", "a", "a"))
    found = constrained(draft, Table(FOLLOW, 0), 10)
    assert found.tokens[:4] == draft.tokens
    assert found.probabilities == (1.0, 1.0, 1.0, 0.5)
    assert found.sources == ("model", GRAMMAR, GRAMMAR, "a")


def test_nothing_follows_the_end_of_the_text() -> None:
    draft = Draft((3, 1, 2), (-1, 0, 1), (1.0, 0.5, 0.25), ("model", "a", "a"))
    assert constrained(draft, Table(FOLLOW, 3), 10, frozenset({1})).tokens == (3, 1)


def test_a_constraint_is_not_asked_what_follows_the_end() -> None:
    """Of its own it may know nothing of ends, and allow nothing there; plain decoding does not ask."""
    model, asked = ToyModel(6), []

    class Mine:
        def allowed(self, path: Sequence[int]) -> np.ndarray:
            asked.append(tuple(path))
            return np.full(6, end not in path)

        def keep(self, tokens: Sequence[int]) -> None: ...

    first = plain_decode(model, [1], Sampling(), max_new_tokens=30, eos=frozenset(), max_length=99)[0]
    end = first[-1]
    want, _ = plain_decode(model, [1], Sampling(), max_new_tokens=30, eos=frozenset([end]), max_length=99)
    stepper = ReferenceStepper(ToyBackend(model), always_agrees(model, 8), 8)
    request = Request([1], Sampling(), 30, frozenset([end]), constraint=Mine())
    steps = [step for _, step in Scheduler(stepper).run([request])]
    assert [token for step in steps for token in step.tokens] == want
    assert asked
    assert all(end not in path for path in asked)


def test_no_path_is_longer_than_the_nodes_that_were_asked_for() -> None:
    circle = (frozenset({1}), frozenset({0}))
    assert len(constrained(Draft((0,)), Table(circle, 0), 5)) == 5
    assert len(constrained(Draft((0,)), Table(circle, 0), 1)) == 1


def test_drafters_are_left_alone_where_no_row_can_be_walked() -> None:
    drafter = never_agrees(ToyModel(6), 0)
    free, held = make_row([1, 2]), make_row([1, 0])
    held.constraint = Table(FOLLOW, 0)
    assert for_rows(drafter, [free]) is drafter
    found = for_rows(drafter, [free, held]).propose([free, held], 8)
    assert [draft.tokens for draft in found] == [(2,), (0, 1, 2)]
    assert ConstrainedDrafter(drafter).name == drafter.name
    plain = NoDrafter()
    assert for_rows(plain, [free, held]) is plain


class Masked(ToyModel):
    """The toy model with the table built in, for plain decoding."""

    follow: Follow

    def __call__(self, tokens: Sequence[int]) -> list[float]:
        allowed = self.follow[tokens[-1]]
        return [score if token in allowed else float("-inf") for token, score in enumerate(super().__call__(tokens))]


tables = st.lists(st.frozensets(st.integers(0, 4), min_size=1), min_size=5, max_size=5)
samplings = st.one_of(
    st.just(Sampling()),
    st.builds(Sampling, temperature=st.just(1.0), top_p=st.sampled_from([0.9, 1.0]), seed=st.integers(0, 99)),
)


@given(tables, samplings, st.integers(0, 2**32), st.integers(1, 12), st.frozensets(st.integers(0, 4), max_size=1))
def test_a_text_is_that_of_plain_constrained_decoding_and_every_node_was_allowed(
    follow: list[frozenset[int]], sampling: Sampling, seed: int, nodes: int, eos: frozenset[int]
) -> None:
    model, masked = ToyModel(5, seed=2), Masked(5, seed=2)
    masked.follow = follow
    grammar = Tables(follow, last=2)
    stepper = ReferenceStepper(ToyBackend(model), RandomTreeDrafter(masked, seed, right=0.7), nodes)
    expected = plain_decode(masked, [1, 2], sampling, max_new_tokens=20, eos=eos)
    for _ in range(2):  # the grammar makes a constraint for each text
        scheduler = Scheduler(stepper)
        task = scheduler.submit(Request([1, 2], sampling, 20, eos, constraint=grammar))
        while not scheduler.idle:
            for _, step in scheduler.step():
                if step.draft is not None:
                    pairs = [pair for path in token_paths(step.draft) for pair in pairwise(path)]
                    assert all(b in follow[a] for a, b in pairs if a not in eos)
                    assert not any(a in eos for a, _ in pairs)
                    assert len(step.draft) <= nodes
        assert (task.new_tokens, task.finish_reason) == expected
    assert grammar.made == 2


def test_a_forced_text_takes_one_pass() -> None:
    circle = (frozenset({1}), frozenset({2}), frozenset({3}), frozenset({0}))
    backend = ToyBackend(ToyModel(4))
    scheduler = Scheduler(ReferenceStepper(backend, never_agrees(backend.model, 0), 8))
    task = scheduler.submit(Request([0], max_new_tokens=8, constraint=Tables(circle, last=0)))
    while not scheduler.idle:
        scheduler.step()
    assert task.new_tokens == [1, 2, 3, 0, 1, 2, 3, 0]
    assert backend.forwards == 1
