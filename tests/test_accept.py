"""Acceptance rules against slow, literal references."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import drafts, make_row, path_nodes, slow_penalised, slow_probabilities
from medusa.decoding.accept import Accepted, accept, first_token
from medusa.decoding.draft import MODEL, Draft
from medusa.decoding.sampling import Sampling, gumbel_noise

V = 5
# Quarters: ties happen, and sums are exact.
quarters = st.integers(-12, 12).map(lambda i: i / 4)
FILTERS = [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.8}, {"top_p": 0.4, "top_k": 4}, {"min_p": 0.3}]


@st.composite
def verified(draw: st.DrawFn, ties: bool = True) -> tuple[Draft, list[list[float]], list[int]]:
    """A draft, logits for each node, and the text up to the root."""
    draft = draw(drafts(vocab=V, max_nodes=9))
    row = st.lists(quarters if ties else st.floats(-4, 4, width=32), min_size=V, max_size=V, unique=not ties)
    logits = [draw(row) for _ in range(len(draft))]
    before = draw(st.lists(st.integers(0, V - 1), max_size=4))
    return draft, logits, [*before, draft.tokens[0]]


def slow_descent(draft: Draft, choices: Sequence[int]) -> Accepted:
    """Looks through all nodes for the child that holds the choice, until there is none."""
    path = [0]
    while True:
        at, token = path[-1], choices[path[-1]]
        matches = [i for i in range(len(draft)) if draft.parents[i] == at and draft.tokens[i] == token]
        if not matches:
            return Accepted(tuple(path), token)
        path.append(matches[0])


def slow_node_logits(
    draft: Draft, logits: Sequence[Sequence[float]], tokens: Sequence[int], penalty: float
) -> list[list[float]]:
    """Each node penalised for the text and for its own path."""
    return [
        slow_penalised(logits[node], {*tokens, *(draft.tokens[i] for i in path_nodes(draft.parents, node))}, penalty)
        for node in range(len(draft))
    ]


# --- greedy -----------------------------------------------------------------------------------------------------------


@given(verified(ties=False), st.sampled_from([1.0, 1.3, 2.0, 0.7]))
def test_greedy_follows_the_likeliest_token(case: tuple[Draft, list[list[float]], list[int]], penalty: float) -> None:
    draft, logits, tokens = case
    scored = slow_node_logits(draft, logits, tokens, penalty)
    for row in scored:
        best, second = sorted(row, reverse=True)[:2]
        assume(best - second > 1e-5)
    row = make_row(tokens, Sampling(repetition_penalty=penalty))
    expected = slow_descent(draft, [row.index(max(row)) for row in scored])
    assert accept(torch.tensor(logits), draft, row) == expected


#      0                 a worked example: the numbers are tokens
#    /   \
#   1     2
#  / \     \
# 3   4     3
WORKED = Draft((0, 1, 2, 3, 4, 3), (-1, 0, 0, 1, 1, 2), (1.0,) * 6, (MODEL, *"aaaaa"))


def one_hot(*choices: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(choices), V).float()


def test_greedy_by_hand() -> None:
    row = make_row([0])
    assert accept(one_hot(1, 4, 0, 0, 2, 0), WORKED, row) == Accepted((0, 1, 4), 2)
    assert accept(one_hot(2, 4, 3, 0, 2, 1), WORKED, row) == Accepted((0, 2, 5), 1)
    assert accept(one_hot(2, 4, 4, 0, 2, 1), WORKED, row) == Accepted((0, 2), 4)
    assert accept(one_hot(3, 4, 4, 0, 2, 1), WORKED, row) == Accepted((0,), 3)
    assert accept(one_hot(3), Draft((0,)), row) == Accepted((0,), 3)


def test_a_node_is_penalised_for_its_own_path_and_not_for_its_siblings() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.9, 0.0, 0.0]] * 6)
    # Token 1 leads everywhere, until it has been said: then token 2 does, also at the node that follows 1. The
    # sibling that holds 2 must not count there.
    row = make_row([0], Sampling(repetition_penalty=1.5))
    draft = Draft((0, 2, 1, 2, 3), (-1, 0, 0, 2, 3), (1.0,) * 5, (MODEL, *"aaaa"))
    assert accept(logits, draft, row) == Accepted((0, 2, 3), 1)  # 2 / 1.5 beats 1.9 / 1.5
    # Said before the draft: it counts from the root on.
    assert accept(logits, draft, make_row([1, 0], row.sampling)) == Accepted((0, 1), 1)


# --- exact ------------------------------------------------------------------------------------------------------------


@given(
    verified(ties=False),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from(FILTERS),
    st.sampled_from([1.0, 1.3]),
    st.integers(0, 2**64 - 1),
)
def test_exact_follows_the_token_that_plain_sampling_draws(
    case: tuple[Draft, list[list[float]], list[int]],
    temperature: float,
    filters: dict[str, float],
    penalty: float,
    seed: int,
) -> None:
    draft, logits, tokens = case
    sampling = Sampling(temperature=temperature, seed=seed, repetition_penalty=penalty, **filters)
    choices = []
    for node, scores in enumerate(slow_node_logits(draft, logits, tokens, penalty)):
        p, margin = slow_probabilities(scores, sampling)
        assume(margin > 1e-5)
        # What follows the root, which is the last of the tokens, has the index len(tokens).
        noise = gumbel_noise(seed, len(tokens) + len(path_nodes(draft.parents, node)) - 1, V)
        keys = [math.log(p[i]) + noise[i] if p[i] else -math.inf for i in range(V)]
        best, second = sorted(keys, reverse=True)[:2]
        assume(best - second > 1e-4)
        choices.append(keys.index(best))
    assert accept(torch.tensor(logits), draft, make_row(tokens, sampling)) == slow_descent(draft, choices)


def test_exact_needs_no_more_than_the_rows_of_the_nodes_it_reaches() -> None:
    logits = one_hot(1, 4, 0, 0, 2, 0) * 50
    logits[[2, 3, 5]] = math.nan
    assert accept(logits, WORKED, make_row([0], Sampling(temperature=1.0, seed=0))) == Accepted((0, 1, 4), 2)


# --- typical ----------------------------------------------------------------------------------------------------------


def slow_typical(
    draft: Draft, scored: Sequence[Sequence[float]], sampling: Sampling
) -> tuple[list[tuple[tuple[int, ...], float]], float]:
    """The rule as the paper and the design have it, over all paths from the root to a node. Returns the longest
    accepted paths with their summed log p, and how near the nearest decision was."""
    nearest = math.inf
    good: dict[int, float] = {0: 0.0}  # edge into node -> log p, where it is accepted
    for child in range(1, len(draft)):
        p, margin = slow_probabilities(scored[draft.parents[child]], sampling)
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        threshold = min(sampling.epsilon, sampling.delta * math.exp(-entropy))
        x = p[draft.tokens[child]]
        nearest = min(nearest, margin, abs(x - threshold) if x else math.inf)
        if x > threshold:
            good[child] = math.log(x)
    paths = [path_nodes(draft.parents, node) for node in range(len(draft))]
    accepted = [(tuple(path), sum(good[i] for i in path)) for path in paths if all(i in good for i in path)]
    longest = max(len(path) for path, _ in accepted)
    return [(path, total) for path, total in accepted if len(path) == longest], nearest


@given(
    verified(),
    st.sampled_from([0.4, 1.0, 1.8]),
    st.sampled_from(FILTERS),
    st.sampled_from([1.0, 1.3]),
    st.sampled_from([0.0, 0.05, 0.09, 0.3, 1.0]),
    st.sampled_from([0.0, 0.1, 0.3, 1.0, 1e9]),
)
def test_typical_is_the_rule_of_the_paper(
    case: tuple[Draft, list[list[float]], list[int]],
    temperature: float,
    filters: dict[str, float],
    penalty: float,
    epsilon: float,
    delta: float,
) -> None:
    draft, logits, tokens = case
    sampling = Sampling(
        temperature=temperature,
        acceptance="typical",
        epsilon=epsilon,
        delta=delta,
        repetition_penalty=penalty,
        seed=0,
        **filters,
    )
    scored = slow_node_logits(draft, logits, tokens, penalty)
    longest, nearest = slow_typical(draft, scored, sampling)
    assume(nearest > 1e-5)
    found = accept(torch.tensor(logits), draft, make_row(tokens, sampling))
    totals = dict(longest)
    assert found.path in totals
    assert totals[found.path] == pytest.approx(max(totals.values()), abs=1e-5)
    last = scored[found.path[-1]]
    assert last[found.next_token] == pytest.approx(max(last), abs=1e-6)


def typical(**settings: float) -> Sampling:
    return Sampling(temperature=1.0, acceptance="typical", seed=0, **settings)


@given(verified())
def test_typical_accepts_nothing_when_the_bar_is_1(case: tuple[Draft, list[list[float]], list[int]]) -> None:
    draft, logits, tokens = case
    found = accept(torch.tensor(logits), draft, make_row(tokens, typical(epsilon=1.0, delta=1e9)))
    assert found.path == (0,)
    assert logits[0][found.next_token] == max(logits[0])


@given(verified())
def test_typical_accepts_a_deepest_path_when_the_bar_is_0(case: tuple[Draft, list[list[float]], list[int]]) -> None:
    draft, logits, tokens = case
    for bar in ({"epsilon": 0.0}, {"delta": 0.0}):
        found = accept(torch.tensor(logits), draft, make_row(tokens, typical(**bar)))
        assert len(found.path) == 1 + max(draft.topology.depths)


def test_typical_by_hand() -> None:
    p = torch.tensor([[0.0, 0.7, 0.3, 0.0, 0.0]] * 6)
    p[1] = torch.tensor([0.2, 0.2, 0.2, 0.15, 0.25])  # many may follow: exp(-H) = 0.2, the bar is 0.06
    p[2] = torch.tensor([0.0, 0.05, 0.0, 0.95, 0.0])
    p[5] = torch.tensor([0.1, 0.1, 0.6, 0.1, 0.1])
    # 0 -> 1 -> 3 says 0.7 * 0.15, 0 -> 1 -> 4 says 0.7 * 0.25, 0 -> 2 -> 3 says 0.3 * 0.95: the likeliest wins.
    row = make_row([0], typical())
    assert accept(p.log(), WORKED, row) == Accepted((0, 2, 5), 2)
    # A bar of 0.3 keeps 0 -> 1 alone: 0.3 is not above 0.3, nor 0.25.
    strict = make_row([0], typical(epsilon=0.3, delta=10.0))
    p[0] = torch.tensor([0.0, 0.75, 0.25, 0.0, 0.0])
    assert accept(p.log(), WORKED, strict) == Accepted((0, 1), 4)


def test_a_longer_path_wins_over_a_likelier_one() -> None:
    draft = Draft((0, 1, 2, 3), (-1, 0, 0, 2), (1.0,) * 4, (MODEL, *"aaa"))
    p = torch.tensor([[0.0, 0.8, 0.2, 0.0, 0.0], [1.0, 0, 0, 0, 0], [0.1, 0.1, 0.1, 0.6, 0.1], [0, 0, 0, 0, 1.0]])
    assert accept(p.log(), draft, make_row([0], typical())) == Accepted((0, 2, 3), 4)


def test_of_equally_long_paths_the_likelier_as_a_whole_wins_and_not_the_one_of_the_surer_end() -> None:
    draft = Draft((0, 1, 2, 3, 3), (-1, 0, 0, 1, 2), (1.0,) * 5, (MODEL, *"aaaa"))
    p = torch.full((5, V), 0.2)
    p[0] = torch.tensor([0.0, 0.8, 0.2, 0.0, 0.0])
    p[1] = torch.tensor([0.5, 0.0, 0.0, 0.5, 0.0])  # 0.8 * 0.5
    p[2] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])  # 0.2 * 1.0
    p[3] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    assert accept(p.log(), draft, make_row([0], typical())) == Accepted((0, 1, 3), 4)


def test_equal_paths_go_to_the_earlier_node() -> None:
    draft = Draft((0, 1, 2), (-1, 0, 0), (1.0,) * 3, (MODEL, *"aa"))
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0], [0, 0, 0, 1.0, 0], [0, 0, 0, 0, 1.0]])
    assert accept(p.log(), draft, make_row([0], typical())) == Accepted((0, 1), 3)


def test_a_path_is_not_taken_up_again_behind_a_rejected_node() -> None:
    draft = Draft((0, 1, 2), (-1, 0, 1), (1.0,) * 3, (MODEL, *"aa"))
    p = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0, 1.0]])
    assert accept(p.log(), draft, make_row([0], typical(epsilon=0.0))) == Accepted((0,), 3)


@given(verified(ties=False))
def test_typical_at_temperature_0_is_greedy(case: tuple[Draft, list[list[float]], list[int]]) -> None:
    draft, logits, tokens = case
    row, greedy = make_row(tokens, Sampling(acceptance="typical")), make_row(tokens)
    assert accept(torch.tensor(logits), draft, row) == accept(torch.tensor(logits), draft, greedy)


# --- the first token --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=0.8, seed=5),
        Sampling(temperature=0.8, seed=5, repetition_penalty=1.5, top_p=0.9),
        typical(),
        typical(repetition_penalty=1.5),
    ],
    ids=str,
)
def test_the_first_token_is_chosen_as_any_other(sampling: Sampling) -> None:
    for seed in range(20):
        logits = torch.randn(V, generator=torch.Generator().manual_seed(seed))
        tokens = [1, 0, 3]
        chosen = first_token(logits, make_row(tokens, sampling))
        assert accept(logits[None], Draft((3,)), make_row(tokens, sampling)) == Accepted((0,), chosen)
