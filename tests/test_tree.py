"""Trees of ranks, the choice of the best nodes, and the mask that follows from parent pointers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import path_nodes, tree_parents
from medusa.decoding.tree import Tree, best_nodes
from medusa.engines.topology import check_parents, topology
from medusa.errors import UsageError

PATHS = {(0,): 0.6, (1,): 0.2, (0, 0): 0.4, (0, 2): 0.1, (1, 0): 0.05, (0, 0, 0): 0.3}


@st.composite
def weighted_trees(draw: st.DrawFn, max_nodes: int = 9, falling: bool = True) -> tuple[tuple[int, ...], list[float]]:
    """Parents, and a probability for each node; falling: none is above its parent's."""
    parents = draw(tree_parents(max_nodes))
    probabilities = [1.0]
    for parent in parents[1:]:
        p = draw(st.integers(0, 8)) / 8  # eighths, so that ties are common
        probabilities.append(p * probabilities[parent] if falling else p)
    return parents, probabilities


# --- topology ---------------------------------------------------------------------------------------------------------


@given(tree_parents(24))
def test_a_node_sees_its_ancestors_and_itself_and_nothing_else(parents: tuple[int, ...]) -> None:
    shape = topology(parents)
    for i in range(len(parents)):
        ancestors = path_nodes(parents, i)
        assert [j for j in range(len(parents)) if shape.mask[i, j]] == sorted(ancestors)
        assert shape.depths[i] == len(ancestors) - 1


def test_the_drawing_in_the_docstring_is_right() -> None:
    shape = topology((-1, 0, 0, 1, 1))
    assert shape.depths.tolist() == [0, 1, 1, 2, 2]
    assert np.flatnonzero(shape.mask[3]).tolist() == [0, 1, 3]


def test_a_topology_is_computed_once_and_cannot_be_changed() -> None:
    shape = topology((-1, 0, 1))
    assert topology((-1, 0, 1)) is shape
    with pytest.raises(ValueError, match="read-only"):
        shape.mask[0, 0] = False
    with pytest.raises(ValueError, match="read-only"):
        shape.depths[0] = 1


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((), "starts with its root"),
        ((0,), "starts with its root"),
        ((-1, -1), "node 1 of a tree has parent -1"),
        ((-1, 0, 2), "node 2 of a tree has parent 2"),
        ((-1, 2, 0), "node 1 of a tree has parent 2"),
    ],
)
def test_parents_that_are_no_tree_are_refused(parents: tuple[int, ...], message: str) -> None:
    for check in (check_parents, topology):
        with pytest.raises(UsageError, match=message):
            check(parents)


# --- the best nodes ---------------------------------------------------------------------------------------------------


@given(weighted_trees(falling=False), st.integers(1, 12))
def test_the_best_nodes_are_a_tree_even_when_probabilities_do_not_fall(
    tree: tuple[tuple[int, ...], list[float]], nodes: int
) -> None:
    parents, probabilities = tree
    kept = best_nodes(parents, probabilities, nodes)
    assert kept == sorted(set(kept))
    assert len(kept) == min(nodes, len(parents))
    assert kept[0] == 0
    assert all(parents[node] in kept for node in kept[1:])


@given(weighted_trees(), st.integers(1, 9))
def test_the_best_nodes_are_optimal_when_probabilities_fall(
    tree: tuple[tuple[int, ...], list[float]], nodes: int
) -> None:
    parents, probabilities = tree
    size = min(nodes, len(parents))
    optimum = max(
        sum(probabilities[node] for node in chosen)
        for chosen in itertools.combinations(range(len(parents)), size)
        if chosen[0] == 0 and all(parents[node] in chosen for node in chosen[1:])
    )
    assert sum(probabilities[node] for node in best_nodes(parents, probabilities, nodes)) == optimum


def test_ties_go_to_the_earlier_node() -> None:
    assert best_nodes((-1, 0, 0, 0), (1.0, 0.5, 0.5, 0.5), 3) == [0, 1, 2]


# --- trees of ranks ---------------------------------------------------------------------------------------------------


def test_a_tree_from_paths_holds_each_path_with_its_probability() -> None:
    tree = Tree.from_paths(PATHS)
    assert dict(zip(tree.paths, tree.probabilities, strict=True)) == {(): 1.0, **PATHS}
    assert tree.depth == 3
    assert tree.widest_rank == 3
    assert tree.ranks[0] == -1
    assert tree.levels[0] == (0,)
    assert [{tree.paths[node] for node in level} for level in tree.levels[1:]] == [
        {(0,), (1,)},
        {(0, 0), (0, 2), (1, 0)},
        {(0, 0, 0)},
    ]


def test_paths_may_come_in_any_order_and_without_probabilities() -> None:
    paths = list(PATHS)
    trees = {Tree.from_paths([list(path) for path in order]) for order in itertools.permutations(paths)}
    assert len(trees) == 1
    assert set(trees.pop().paths) == {(), *paths}


@given(weighted_trees())
def test_paths_and_tree_are_inverses(tree: tuple[tuple[int, ...], list[float]]) -> None:
    parents, probabilities = tree
    ranks = (-1, *(parents[:node].count(parents[node]) for node in range(1, len(parents))))
    made = Tree(parents, ranks, tuple(probabilities))
    again = Tree.from_paths(dict(zip(made.paths, made.probabilities, strict=True)))
    assert dict(zip(again.paths, again.probabilities, strict=True)) == dict(
        zip(made.paths, made.probabilities, strict=True)
    )
    assert sorted(node for level in again.levels for node in level) == list(range(len(again)))
    for depth, level in enumerate(again.levels):
        assert all(len(again.paths[node]) == depth for node in level)


def test_a_path_without_its_prefix_is_refused() -> None:
    with pytest.raises(UsageError, match=r"path \[0, 1\] but not its prefix \[0\]"):
        Tree.from_paths([[0, 1], [1]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((-1, 0), (-1,), (1.0, 0.5)), "one rank and one probability"),
        (((-1, 0), (-1, 0), (1.0,)), "one rank and one probability"),
        (((-1, 0), (-1, -2), (1.0, 0.5)), "count from 0"),
        (((-1, 1), (-1, 0), (1.0, 0.5)), "earlier node"),
    ],
)
def test_a_tree_that_does_not_add_up_is_refused(fields: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Tree(*fields)


def test_a_cartesian_tree_holds_every_combination() -> None:
    tree = Tree.cartesian(2, 3)
    assert set(tree.paths) == {(), (0,), (1,), *itertools.product(range(2), range(3))}
    assert len(tree) == 1 + 2 + 6
    assert [len(level) for level in tree.levels] == [1, 2, 6]
    assert len(Tree.cartesian()) == 1
    with pytest.raises(UsageError, match="at least one guess"):
        Tree.cartesian(2, 0)


def test_a_lone_root_is_a_tree_of_depth_0() -> None:
    tree = Tree.from_paths([])
    assert (tree.depth, tree.widest_rank, tree.levels, tree.expected_tokens()) == (0, 0, ((0,),), 1.0)


def test_expected_tokens_is_one_and_the_sum_of_the_probabilities() -> None:
    assert Tree.from_paths(PATHS).expected_tokens() == pytest.approx(1 + 0.6 + 0.2 + 0.4 + 0.1 + 0.05 + 0.3)


def test_the_best_tree_of_a_tree_keeps_the_most_probable_paths() -> None:
    best = Tree.from_paths(PATHS).best(4)
    assert dict(zip(best.paths, best.probabilities, strict=True)) == {
        (): 1.0,
        (0,): 0.6,
        (0, 0): 0.4,
        (0, 0, 0): 0.3,
    }


@given(weighted_trees(), st.integers(1, 9))
def test_the_best_tree_keeps_ranks_and_probabilities(tree: tuple[tuple[int, ...], list[float]], nodes: int) -> None:
    parents, probabilities = tree
    ranks = (-1, *(parents[:node].count(parents[node]) for node in range(1, len(parents))))
    full = Tree(parents, ranks, tuple(probabilities))
    best = full.best(nodes)
    known = dict(zip(full.paths, full.probabilities, strict=True))
    assert len(best) == min(nodes, len(full))
    assert all(known[path] == p for path, p in zip(best.paths, best.probabilities, strict=True))
    dropped = [p for path, p in known.items() if path not in best.paths]
    assert all(p <= min(best.probabilities) for p in dropped)
    assert best.expected_tokens() == pytest.approx(full.expected_tokens() - sum(dropped))
