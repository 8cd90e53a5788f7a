"""Drafting with heads: static and dynamic trees against literal computations on tiny random heads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import make_row, token_paths
from medusa.decoding.draft import MODEL, Draft
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.sampling import Sampling, rough_noise
from medusa.decoding.stepper import Row
from medusa.decoding.tree import Tree
from medusa.errors import UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.module import BaseWeights, Heads

H, V = 6, 23

CONFIGS = [
    {
        "kind": kind,
        "mlp_width": width,
        "draft_vocab": draft_vocab,
        "feature_layers": layers,
        "num_layers": num_layers,
        "tie_lm_head": tied,
    }
    for kind, width, draft_vocab, layers, num_layers, tied in itertools.product(
        ("residual", "sequential", "recurrent"), (0, 5), (0, 11), ((), (1, 2)), (1, 2), (True, False)
    )
    if not (kind == "recurrent" and num_layers == 2)
]


def config_name(config: dict[str, Any]) -> str:
    return "-".join(str(value) for value in config.values()).replace(" ", "")


def make_heads(*, num_heads: int = 3, vocab: int = V, seed: int = 0, spread: float = 0.7, **config: Any) -> Heads:
    """Heads whose every weight is random: those that training starts from are zero, which would hide mistakes. In
    double precision, so that a batch and its rows do not differ by rounding."""
    generator = torch.Generator().manual_seed(seed)
    base = BaseWeights(torch.randn(vocab, H, generator=generator), torch.randn(vocab, H, generator=generator))
    ids = torch.randperm(vocab, generator=generator)[: config["draft_vocab"]] if config.get("draft_vocab") else None
    heads = Heads(HeadsConfig(hidden_size=H, vocab_size=vocab, num_heads=num_heads, **config), base, ids)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=spread, generator=generator)
    return heads.double()


def make_rows(heads: Heads, count: int = 3, seed: int = 1) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    size, vocab = heads.config.feature_size, heads.config.vocab_size
    return [
        make_row(
            torch.randint(0, vocab, (4,), generator=generator).tolist(), features=torch.randn(size, generator=generator)
        )
        for _ in range(count)
    ]


# --- the heads, literally: one node at a time, from the formulas ------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def slow_block(block: Any, x: Tensor) -> Tensor:
    if block.gated:
        return block.down.weight @ (silu(block.gate.weight @ x) * (block.up.weight @ x))
    return silu(block.linear.weight @ x + block.linear.bias)


def slow_guesses(heads: Heads, row: Row, path: Sequence[int]) -> tuple[list[int], list[float]]:
    """What follows the tokens `path` (the root and what was drafted after it), by the head at that depth: token ids
    from the likeliest on, and their probabilities."""
    config, k = heads.config, len(path)
    features = row.features.double()
    base = features[-H:]
    if config.feature_layers:
        middle = [features[i * H : (i + 1) * H] for i in range(len(config.feature_layers))]
        base = heads.project.weight @ torch.cat([*(m / m.square().mean().sqrt() for m in middle), base])
    embedded = [heads.embedding[token] for token in path]
    if config.kind == "recurrent":
        hidden = base
        for e in embedded:
            hidden = hidden + slow_block(heads.block, torch.cat([hidden, base, e]))
    else:
        first, *others = heads.blocks[k - 1]
        seen = torch.cat([base, *embedded]) if config.kind == "sequential" else base
        hidden = base + slow_block(first, seen)
        for block in others:
            hidden = hidden + slow_block(block, hidden)
    lm_head = heads.lm_head if config.tie_lm_head else heads.lm_heads[k - 1]
    logits = lm_head @ hidden
    p = torch.softmax(logits, dim=-1)
    order = sorted(range(len(p)), key=lambda i: -float(logits[i]))
    ids = range(config.vocab_size) if heads.draft_ids is None else heads.draft_ids.tolist()
    return [ids[i] for i in order], [float(p[i]) for i in order]


# --- static trees -----------------------------------------------------------------------------------------------------

TREE = Tree.from_paths(
    {(0,): 0.6, (2,): 0.2, (0, 1): 0.3, (0, 0): 0.35, (2, 3): 0.1, (0, 1, 4): 0.05, (2, 3, 0): 0.06, (2, 3, 1): 0.01}
)


def check_static(heads: Heads, tree: Tree, nodes: int = 64) -> None:
    rows = make_rows(heads)
    used = tree.best(nodes)
    for row, draft in zip(rows, HeadsDrafter(heads, tree).propose(rows, nodes), strict=True):
        assert draft.parents == used.parents
        assert draft.probabilities == used.probabilities
        assert draft.sources == (MODEL, *["heads"] * (len(used) - 1))
        expected = {(): [row.tokens[-1]]}
        for ranks in used.paths[1:]:
            above = expected[ranks[:-1]]
            expected[ranks] = [*above, slow_guesses(heads, row, above)[0][ranks[-1]]]
        assert token_paths(draft) == [tuple(expected[ranks]) for ranks in used.paths]


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
@torch.no_grad()
def test_a_static_tree_holds_the_ranks_of_every_head(config: dict[str, Any]) -> None:
    check_static(make_heads(**config), TREE)


@pytest.mark.parametrize("nodes", [2, 3, 5, 8])
@torch.no_grad()
def test_a_static_tree_is_cut_to_the_nodes_asked_for(nodes: int) -> None:
    heads = make_heads(kind="recurrent")
    check_static(heads, TREE, nodes)
    assert all(len(draft) == nodes for draft in HeadsDrafter(heads, TREE).propose(make_rows(heads), nodes))


@torch.no_grad()
def test_a_static_tree_may_have_its_nodes_in_any_order() -> None:
    # Depth first, where levels are not contiguous.
    tree = Tree((-1, 0, 1, 2, 0, 4), (-1, 1, 0, 2, 0, 1), (1.0, 0.6, 0.5, 0.4, 0.3, 0.2))
    heads = make_heads(kind="sequential")
    rows = make_rows(heads)
    for row, draft in zip(rows, HeadsDrafter(heads, tree).propose(rows, 6), strict=True):
        for node in range(1, len(draft)):
            path = [draft.tokens[i] for i in draft.path(node)]
            ranks = [draft.sources[node] and slow_guesses(heads, row, path[:i])[0].index(path[i])
                     for i in range(1, len(path))]  # fmt: skip
            assert tuple(ranks) in tree.paths
        assert len(set(token_paths(draft))) == 6


def test_a_tree_that_the_heads_cannot_fill_is_refused_at_once() -> None:
    heads = make_heads(num_heads=2, draft_vocab=3)
    with pytest.raises(UsageError, match="3 levels deep, but there are 2 heads"):
        HeadsDrafter(heads, Tree.cartesian(1, 1, 1))
    with pytest.raises(UsageError, match="best 4 guesses of a head, but there are 3"):
        HeadsDrafter(heads, Tree.cartesian(4))
    HeadsDrafter(heads, Tree.cartesian(3, 3)).propose(make_rows(heads), 13)


@pytest.mark.parametrize("tree", [None, TREE])
def test_one_node_is_the_root_alone(tree: Tree | None) -> None:
    heads = make_heads()
    rows = make_rows(heads)
    assert HeadsDrafter(heads, tree).propose(rows, 1) == [Draft((row.tokens[-1],)) for row in rows]


# --- dynamic trees ----------------------------------------------------------------------------------------------------


def expansion(heads: Heads, row: Row) -> dict[tuple[int, ...], float]:
    """Every path that the heads can say, with the product of their probabilities."""
    found = {(row.tokens[-1],): 1.0}
    level = dict(found)
    for _ in range(heads.config.num_heads):
        level = {
            (*path, token): p * q
            for path, p in level.items()
            for token, q in zip(*slow_guesses(heads, row, path), strict=True)
        }
        found |= level
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=config_name)
@torch.no_grad()
def test_probabilities_of_a_dynamic_tree_are_products_along_the_path(config: dict[str, Any]) -> None:
    heads = make_heads(**config)
    rows = make_rows(heads, count=2)
    for row, draft in zip(rows, HeadsDrafter(heads).propose(rows, 12), strict=True):
        assert len(draft) == 12
        assert draft.sources == (MODEL, *["heads"] * 11)
        assert draft.tokens[0] == row.tokens[-1]
        assert len(set(token_paths(draft))) == len(draft)
        for path, p in zip(token_paths(draft), draft.probabilities, strict=True):
            expected = 1.0
            for i in range(1, len(path)):
                tokens, probabilities = slow_guesses(heads, row, path[:i])
                expected *= probabilities[tokens.index(path[i])]
            assert p == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["residual", "sequential", "recurrent"])
@pytest.mark.parametrize(("num_heads", "vocab", "nodes"), [(1, 9, 6), (2, 2, 6), (2, 4, 14), (3, 2, 14), (3, 4, 22)])
@torch.no_grad()
def test_a_dynamic_tree_is_the_best_of_all_trees_where_the_beam_does_not_bind(
    kind: str, num_heads: int, vocab: int, nodes: int
) -> None:
    checked = 0
    for seed in range(8):
        heads = make_heads(kind=kind, num_heads=num_heads, vocab=vocab, seed=seed, spread=1.0)
        (row,) = make_rows(heads, count=1, seed=seed)
        everything = expansion(heads, row)
        best = sorted(everything, key=lambda path: (-everything[path], len(path)))[:nodes]
        inner = [sum(len(path) == depth for path in best) for depth in range(2, num_heads + 1)]
        if max(inner, default=0) > max(2, min(16, (nodes + 2) // 4)):
            continue  # the beam binds
        (draft,) = HeadsDrafter(heads).propose([row], nodes)
        assert set(token_paths(draft)) == set(best)
        checked += 1
    assert checked >= 3


@torch.no_grad()
def test_a_dynamic_tree_expands_the_likeliest_nodes_of_a_level() -> None:
    """Where the beam binds: a literal beam search, then the best nodes of what it saw."""
    nodes, branch, beam = 12, 10, 3
    for seed in range(5):
        heads = make_heads(kind="recurrent", seed=seed)
        (row,) = make_rows(heads, count=1, seed=seed)
        level = {(row.tokens[-1],): 1.0}
        seen = dict(level)
        for _ in range(3):
            front = sorted(level, key=level.__getitem__, reverse=True)[:beam]
            level = {}
            for path in front:
                tokens, probabilities = slow_guesses(heads, row, path)
                for token, p in list(zip(tokens, probabilities, strict=True))[:branch]:
                    level[(*path, token)] = seen[path] * p
            seen |= level
        best = sorted(seen, key=seen.__getitem__, reverse=True)[:nodes]
        (draft,) = HeadsDrafter(heads).propose([row], nodes)
        assert set(token_paths(draft)) == set(best)


@torch.no_grad()
def test_a_level_that_is_not_worth_its_time_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    guess = Heads.guess
    monkeypatch.setattr(Heads, "guess", lambda self, k, *rest: levels.append(k) or guess(self, k, *rest))
    ended = set()
    for seed in range(5):
        heads = make_heads(kind="recurrent", num_heads=4, seed=seed)
        (row,) = make_rows(heads, count=1, seed=seed)
        (whole,) = HeadsDrafter(heads).propose([row], 300)
        depths = whole.topology.depths.tolist()
        best = [max(p for p, d in zip(whole.probabilities, depths, strict=True) if d == k) for k in range(1, 4)]
        for price in (0.0, 0.1, 0.5, 1.0, 3.0):
            levels.clear()
            row.price = price
            (draft,) = HeadsDrafter(heads).propose([row], 300)
            likely = [p >= 2 * price / 4 for p in best]  # a level costs a fourth of the draft, and may gain half of p
            last = 1 + (likely.index(False) if False in likely else 3)
            assert levels == list(range(1, last + 1))
            assert max(draft.topology.depths) == last
            ended.add(last)
    assert ended >= {1, 2, 4}, "the test has seen all kinds of ends"


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS[::5], ids=config_name)
@torch.no_grad()
def test_a_text_that_is_sampled_is_drafted_for_by_the_noise_it_will_be_drawn_with(config: dict[str, Any]) -> None:
    heads = make_heads(spread=0.3, **config)
    drawn, typical, greedy = make_rows(heads)
    drawn.sampling = Sampling(temperature=0.9, seed=11)
    typical.sampling = Sampling(temperature=0.9, seed=11, acceptance="typical")
    drafts = HeadsDrafter(heads).propose([drawn, typical, greedy], 12)
    plainly = [replace_sampling(row) for row in (typical, greedy)]
    assert [token_paths(draft) for draft in drafts[1:]] == [
        token_paths(draft) for draft in HeadsDrafter(heads).propose(plainly, 12)
    ]
    draft, depths = drafts[0], drafts[0].topology.depths
    for node in range(len(draft)):
        children = [i for i in range(len(draft)) if draft.parents[i] == node]
        ids, p = slow_guesses(heads, drawn, [draft.tokens[i] for i in draft.path(node)]) if children else ([], [])
        # The token that follows a node at depth d stands at len + d, and will be drawn by argmax(log p / T + noise).
        noise = rough_noise(11, len(drawn.tokens) + int(depths[node]), V)
        scores = {i: math.log(q) / 0.9 + noise[i] for i, q in zip(ids, p, strict=True)}
        best = sorted(scores, key=scores.__getitem__, reverse=True)[: len(children)]
        assert [draft.tokens[child] for child in children] == best
        total = sum(math.exp(HeadsDrafter.sureness * score) for score in scores.values())
        for child in children:
            share = math.exp(HeadsDrafter.sureness * scores[draft.tokens[child]]) / total
            assert draft.probabilities[child] == pytest.approx(share * draft.probabilities[node], rel=1e-4)


def replace_sampling(row: Row) -> Row:
    return make_row(row.tokens, features=row.features)


def test_a_small_draft_vocabulary_limits_the_branches_not_the_draft() -> None:
    heads = make_heads(draft_vocab=2)
    (draft,) = HeadsDrafter(heads).propose(make_rows(heads, count=1), 12)
    allowed = set(heads.draft_ids.tolist())
    assert len(draft) > 3
    assert set(draft.tokens[1:]) <= allowed


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [None, TREE], ids=["dynamic", "static"])
@pytest.mark.parametrize("config", CONFIGS[::5], ids=config_name)
def test_a_batch_of_rows_is_drafted_as_each_row_alone(config: dict[str, Any], tree: Tree | None) -> None:
    heads = make_heads(**config)
    drafter, rows = HeadsDrafter(heads, tree), make_rows(heads, count=5)
    together = drafter.propose(rows, 9)
    assert len({draft.tokens for draft in together}) == 5
    for row, draft in zip(rows, together, strict=True):
        (alone,) = drafter.propose([row], 9)
        assert (alone.tokens, alone.parents, alone.sources) == (draft.tokens, draft.parents, draft.sources)
        assert alone.probabilities == pytest.approx(draft.probabilities)


def test_features_of_another_precision_are_converted() -> None:
    heads = make_heads(kind="recurrent", feature_layers=(1,))
    (row,) = make_rows(heads, count=1)
    half = make_row(row.tokens, features=row.features.to(torch.bfloat16))
    single = make_row(row.tokens, features=row.features.to(torch.bfloat16).float())
    drafter: Callable[..., list[Draft]] = HeadsDrafter(heads).propose
    assert drafter([half], 8) == drafter([single], 8)
