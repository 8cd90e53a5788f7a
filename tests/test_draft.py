"""Drafts: pruning, merging, and the drafters that need no heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import ChainDrafter, drafts, make_row, path_nodes, token_paths
from medusa.decoding.draft import MODEL, NGRAM_PRIOR, Draft, NgramDrafter, NoDrafter, UnionDrafter, merge
from medusa.decoding.stepper import Row
from medusa.errors import UsageError

#      5
#     / \
#    1   2        a worked example: the numbers are tokens
#   / \   \
#  3   4   3
EXAMPLE = Draft((5, 1, 2, 3, 4, 3), (-1, 0, 0, 1, 1, 2), (1.0, 0.6, 0.4, 0.3, 0.2, 0.35), (MODEL, *"aabba"))

few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)


# --- a draft ----------------------------------------------------------------------------------------------------------


def test_a_draft_knows_its_children_and_paths() -> None:
    assert EXAMPLE.child(0, 2) == 2
    assert EXAMPLE.child(2, 3) == 5
    assert EXAMPLE.child(1, 3) == 3
    assert EXAMPLE.child(0, 3) is None
    assert EXAMPLE.child(5, 3) is None
    assert EXAMPLE.path(5) == (0, 2, 5)
    assert EXAMPLE.path(0) == (0,)
    assert EXAMPLE.topology.depths.tolist() == [0, 1, 1, 2, 2, 2]


@given(drafts())
def test_children_and_paths_follow_the_parents(draft: Draft) -> None:
    for node in range(len(draft)):
        assert list(draft.path(node)) == path_nodes(draft.parents, node)
        for token in range(5):
            children = [
                i for i in range(1, len(draft)) if draft.parents[i] == node and draft.tokens[i] == token
            ]  # fmt: skip
            assert draft.child(node, token) == (children[0] if children else None)


def test_a_draft_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(UsageError, match="a token, a parent, a probability and a source"):
        Draft((1, 2), (-1, 0), (1.0, 0.5))


# --- pruning ----------------------------------------------------------------------------------------------------------


def test_pruning_keeps_the_best_nodes() -> None:
    small = EXAMPLE.pruned(nodes=4, depth=2)
    assert small.tokens == (5, 1, 2, 3)
    assert small.parents == (-1, 0, 0, 2)
    assert small.probabilities == (1.0, 0.6, 0.4, 0.35)
    assert small.sources == (MODEL, "a", "a", "a")


def test_pruning_keeps_what_is_shallow_enough() -> None:
    assert EXAMPLE.pruned(nodes=6, depth=1).tokens == (5, 1, 2)
    assert EXAMPLE.pruned(nodes=6, depth=0) == Draft((5,))


def test_nodes_too_deep_do_not_take_the_place_of_shallow_ones() -> None:
    draft = Draft((0, 1, 2, 3, 4), (-1, 0, 1, 2, 0), (1.0, 0.9, 0.8, 0.7, 0.1), (MODEL, *"aaaa"))
    assert draft.pruned(nodes=3, depth=1).tokens == (0, 1, 4)


def test_a_draft_that_is_small_enough_stays_as_it_is() -> None:
    assert EXAMPLE.pruned(nodes=6, depth=2) is EXAMPLE


@given(drafts(max_nodes=9, falling=True), st.integers(1, 9), st.integers(0, 5))
def test_pruning_is_optimal_when_probabilities_fall(draft: Draft, nodes: int, depth: int) -> None:
    small = draft.pruned(nodes=nodes, depth=depth)
    shallow = [i for i in range(len(draft)) if len(path_nodes(draft.parents, i)) - 1 <= depth]
    size = min(nodes, len(shallow))
    optimum = max(
        sum(draft.probabilities[i] for i in chosen)
        for chosen in itertools.combinations(shallow, size)
        if chosen[0] == 0 and all(draft.parents[i] in chosen for i in chosen[1:])
    )
    assert len(small) == size
    assert sum(small.probabilities) == pytest.approx(optimum)


@given(drafts(distinct=True), st.integers(1, 12), st.integers(0, 8))
def test_pruning_leaves_paths_probabilities_and_sources_as_they_were(draft: Draft, nodes: int, depth: int) -> None:
    small = draft.pruned(nodes=nodes, depth=depth)
    table = {path: i for i, path in enumerate(token_paths(draft))}
    assert len(small) <= nodes
    for i, path in enumerate(token_paths(small)):
        assert len(path) - 1 <= depth
        assert small.probabilities[i] == draft.probabilities[table[path]]
        assert small.sources[i] == draft.sources[table[path]]
    assert len(set(token_paths(small))) == len(small)


# --- merging ----------------------------------------------------------------------------------------------------------

same_root = st.lists(drafts(root=3, falling=True, max_nodes=8), min_size=1, max_size=3)


@given(same_root)
def test_a_merged_tree_holds_every_path_of_every_draft_once(parts: list[Draft]) -> None:
    merged = merge(parts)
    paths = token_paths(merged)
    assert len(set(paths)) == len(paths)
    assert set(paths) == {path for part in parts for path in token_paths(part)}
    assert merged.topology.parents[0] == -1  # and the other parents come before their children, or this raises
    assert (merged.tokens[0], merged.probabilities[0], merged.sources[0]) == (3, 1.0, MODEL)


@given(st.lists(drafts(root=3, falling=True, max_nodes=8, distinct=True), min_size=1, max_size=3))
def test_probabilities_fall_along_merged_paths(parts: list[Draft]) -> None:
    merged = merge(parts)
    for node in range(1, len(merged)):
        assert 0 <= merged.probabilities[node] <= merged.probabilities[merged.parents[node]] + 1e-12


@given(same_root, st.data())
def test_the_order_of_the_drafts_does_not_matter(parts: list[Draft], data: st.DataObject) -> None:
    def table(merged: Draft) -> dict[tuple[int, ...], float]:
        return dict(zip(token_paths(merged), merged.probabilities, strict=True))

    expected = table(merge(parts))
    found = table(merge(data.draw(st.permutations(parts))))
    assert found.keys() == expected.keys()
    assert all(found[path] == pytest.approx(expected[path]) for path in expected)


def test_a_path_proposed_twice_is_likelier_and_named_after_the_surer_drafter() -> None:
    one = Draft((7, 1, 2), (-1, 0, 1), (1.0, 0.5, 0.1), (MODEL, "a", "a"))
    two = Draft((7, 9, 1, 2), (-1, 0, 0, 2), (1.0, 0.2, 0.4, 0.3), (MODEL, "b", "b", "b"))
    merged = merge([one, two])
    assert dict(zip(token_paths(merged), zip(merged.probabilities, merged.sources, strict=True), strict=True)) == {
        (7,): (1.0, MODEL),
        (7, 1): (pytest.approx(1 - 0.5 * 0.6), "a"),
        (7, 1, 2): (pytest.approx(1 - 0.9 * 0.7), "b"),
        (7, 9): (0.2, "b"),
    }


def test_one_draft_merges_to_itself() -> None:
    assert merge([EXAMPLE]) == EXAMPLE


def test_drafts_from_different_roots_do_not_merge() -> None:
    with pytest.raises(UsageError, match="same root"):
        merge([Draft((1,)), Draft((2,))])


# --- the n-gram drafter -----------------------------------------------------------------------------------------------


def slow_lookup(tokens: Sequence[int], length: int) -> tuple[list[int], int]:
    """Searches backwards for the last 3, 2, 1 tokens. Returns what followed, and n (0: they are new)."""
    for n in (3, 2, 1):
        for end in range(len(tokens) - 1, n - 1, -1):  # the text before `end` ended as the text now does
            if list(tokens[end - n : end]) == list(tokens[-n:]):
                text = list(tokens)
                for i in range(length):
                    text.append(text[end + i])  # reads what it wrote, once it is past the end
                return text[len(tokens) :], n
    return [], 0


@given(few_tokens, st.integers(1, 8), st.integers(1, 12))
def test_the_ngram_drafter_finds_what_a_backward_search_finds(tokens: list[int], length: int, nodes: int) -> None:
    (draft,) = NgramDrafter(length).propose([make_row(tokens)], nodes)
    chain, n = slow_lookup(tokens, min(length, nodes - 1))
    assert draft.tokens == (tokens[-1], *chain)
    assert draft.parents == tuple(range(-1, len(chain)))
    assert draft.sources == (MODEL, *["ngram"] * len(chain))
    expected = [1.0]
    for i in range(len(chain)):
        expected.append(expected[-1] * NGRAM_PRIOR[n][min(i, len(NGRAM_PRIOR[n]) - 1)])
    assert draft.probabilities == pytest.approx(expected)


@given(st.lists(few_tokens, min_size=1, max_size=6))
def test_a_growing_row_is_drafted_as_a_fresh_one(pieces: list[list[int]]) -> None:
    drafter, row = NgramDrafter(), make_row([])
    for piece in pieces:
        row.tokens.extend(piece)
        (grown,) = drafter.propose([row], 9)
        (fresh,) = NgramDrafter().propose([make_row(row.tokens)], 9)
        assert grown.tokens == fresh.tokens  # the probabilities have learnt, the tokens are the same
        assert grown.parents == fresh.parents


@given(few_tokens)
def test_asking_twice_gives_the_same_draft(tokens: list[int]) -> None:
    drafter, row = NgramDrafter(), make_row(tokens)
    assert drafter.propose([row], 6) == drafter.propose([row], 6)


def test_the_most_recent_occurrence_of_the_longest_ngram_wins() -> None:
    (draft,) = NgramDrafter(2).propose([make_row([1, 2, 3, 7, 1, 2, 3, 8, 3, 9, 1, 2, 3])], 8)
    assert draft.tokens == (3, 8, 3)


def test_a_repeating_text_is_drafted_past_its_end() -> None:
    (draft,) = NgramDrafter(8).propose([make_row([4, 5, 6, 4, 5, 6])], 9)
    assert draft.tokens == (6, 4, 5, 6, 4, 5, 6, 4, 5)
    (draft,) = NgramDrafter(5).propose([make_row([4, 4])], 9)
    assert draft.tokens == (4,) * 6


def test_a_text_without_repetition_is_not_drafted() -> None:
    assert NgramDrafter().propose([make_row([1, 2, 3])], 9) == [Draft((3,))]
    assert NgramDrafter().propose([make_row([1, 1])], 1) == [Draft((1,))]


def estimates(draft: Draft) -> list[float]:
    """Of each token of a chain, given those before it."""
    return [p / before for before, p in zip(draft.probabilities, draft.probabilities[1:], strict=False)]


def test_estimates_rise_where_copying_works() -> None:
    drafter, row = NgramDrafter(3), make_row([1, 2, 3, 4, 1, 2, 3])
    prior = estimates(drafter.propose([row], 9)[0])
    row.tokens.extend([4, 1, 2])  # all three were right
    (draft,) = drafter.propose([row], 9)
    assert estimates(draft) == pytest.approx([(drafter.weight * p + 1) / (drafter.weight + 1) for p in prior])
    for _ in range(60):
        row.tokens.extend(draft.tokens[1:])
        (draft,) = drafter.propose([row], 9)
    assert min(estimates(draft)) > 0.95
    assert max(estimates(draft)) < 1


def test_estimates_fall_where_copying_fails() -> None:
    drafter, row = NgramDrafter(3), make_row([1, 2, 3, 4, 1, 2, 3])
    first, *later = estimates(drafter.propose([row], 9)[0])
    row.tokens.extend([9, 1, 2, 3])  # it said 4; the two after it were never reached
    (draft,) = drafter.propose([row], 9)
    assert draft.tokens == (3, 9, 1, 2)
    assert estimates(draft) == pytest.approx([drafter.weight * first / (drafter.weight + 1), *later])
    for other in range(60):
        row.tokens.extend([10 + other, 1, 2, 3])
        (draft,) = drafter.propose([row], 9)
    assert estimates(draft)[0] < 0.1
    assert estimates(draft)[1:] == pytest.approx(later)


def test_old_observations_fade() -> None:
    drafter, row = NgramDrafter(1), make_row([1, 2, 3, 4, 1, 2, 3])
    for other in range(100):
        drafter.propose([row], 9)
        row.tokens.extend([10 + other, 1, 2, 3])  # wrong each time
    for _ in range(60):
        row.tokens.extend(drafter.propose([row], 9)[0].tokens[1:])  # then right each time
    (draft,) = drafter.propose([row], 9)
    assert estimates(draft)[0] > 0.6  # 60 of 160 would be 0.38


def test_rows_and_drafters_do_not_share_what_they_remember() -> None:
    one, two = NgramDrafter(), NgramDrafter()
    here, there = make_row([1, 2, 1]), make_row([2, 9, 2])
    assert [draft.tokens[1:3] for draft in one.propose([here, there], 9)] == [(2, 1), (9, 2)]
    here.tokens.extend([8, 2])
    assert [draft.tokens[1:3] for draft in one.propose([there, here], 9)] == [(9, 2), (1, 8)]
    assert two.propose([here], 9)[0].tokens[1:3] == (1, 8)


# --- the others -------------------------------------------------------------------------------------------------------


def test_no_drafter_proposes_nothing() -> None:
    assert NoDrafter().propose([make_row([1, 2]), make_row([3])], 9) == [Draft((2,)), Draft((3,))]


class Fixed:
    """Proposes the draft it was made with."""

    name = "fixed"

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        return [self.draft.pruned(nodes=nodes, depth=nodes) for _ in rows]


@given(same_root, st.integers(1, 10))
def test_a_union_is_the_best_nodes_of_all_proposals(parts: list[Draft], nodes: int) -> None:
    (draft,) = UnionDrafter(*map(Fixed, parts)).propose([make_row([3])], nodes)
    proposals = [part.pruned(nodes=nodes, depth=nodes) for part in parts]
    paths = {path for part in proposals for path in token_paths(part)}
    assert len(draft) == min(nodes, len(paths))
    assert set(token_paths(draft)) <= paths
    merged = merge(proposals)
    left = sorted(merged.probabilities, reverse=True)[: len(draft)]
    assert sum(draft.probabilities) == pytest.approx(sum(left))


def test_a_union_gives_each_row_its_own_tree() -> None:
    rows = [make_row([1, 2, 1, 2, 1]), make_row([4, 3])]
    drafter = UnionDrafter(NgramDrafter(), ChainDrafter(lambda text: 2 + len(text), 1))
    one, two = drafter.propose(rows, 6)
    assert set(token_paths(one)) == {(1,), (1, 7), (1, 2), (1, 2, 1), (1, 2, 1, 2), (1, 2, 1, 2, 1)}
    assert set(token_paths(two)) == {(3,), (3, 4)}
    assert drafter.propose(rows[::-1], 6)[0] == two
