"""How many nodes are verified: against brute force, and on toy texts where drafters lie, fail and recover."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import ChainDrafter, ToyBackend, ToyModel, always_agrees, drafts, make_row, never_agrees
from medusa.decoding.budget import Asking, NodeBudget, places
from medusa.decoding.draft import Draft, NgramDrafter, UnionDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.stepper import Request, Row
from medusa.decoding.times import MachineTimes, PassTimes
from medusa.decoding.tree import Tree
from medusa.errors import UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.module import HeadsState

#: Of the native engine in int8, by docs/decisions.md: flat at first, then steep.
INT8 = PassTimes.measured({1: 3.4, 4: 3.8, 8: 4.9, 12: 7.0, 16: 9.2, 32: 17.0}, draft_seconds=1.0)
FREE = INT8.free_drafts()
FLAT = PassTimes.measured({1: 1.0, 64: 1.1}, draft_seconds=2.0)

curves = st.builds(
    lambda steps: PassTimes(tuple(itertools.accumulate(steps, initial=1.0))),
    st.lists(st.floats(0, 0.6), min_size=1, max_size=30),
)

# --- times ------------------------------------------------------------------------------------------------------------


def test_times_lie_on_straight_lines_between_what_was_measured_and_go_on_past_it() -> None:
    times = PassTimes.measured({1: 10.0, 4: 13.0, 8: 15.0})
    assert [times(n) for n in (1, 2, 4, 6, 8, 10)] == pytest.approx([10, 11, 13, 14, 15, 16])
    assert (times(64), times(100)) == pytest.approx((15 + 56 / 2, 15 + 92 / 2))


@given(st.dictionaries(st.integers(2, 40), st.floats(0.1, 10), max_size=8), st.floats(0.1, 10))
def test_times_never_fall(seconds: dict[int, float], one: float) -> None:
    times = PassTimes.measured({**seconds, 1: one})
    assert times(1) == one
    assert all(times(n) <= times(n + 1) for n in range(1, 80))


@pytest.mark.parametrize("wrong", [(1.0,), (2.0, 1.0), (0.0, 1.0), (math.nan, 1.0)])
def test_times_that_cannot_be_are_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="positive and not fall"):
        PassTimes(wrong)


def test_a_longer_text_adds_what_two_sizes_after_one_show() -> None:
    def true(nodes: int, contexts: Sequence[int]) -> float:  # of rows of as many nodes each
        return 5 + 0.3 * nodes + 1e-3 * sum(contexts) + 2e-4 * nodes * sum(contexts) / len(contexts)

    near = {n: true(n, [64]) for n in (1, 2, 16)}
    times = PassTimes.measured(near, context=64, far={n: true(n, [500]) for n in (1, 16)}, far_context=500)
    assert (times.row_seconds, times.node_seconds) == pytest.approx((1e-3, 2e-4))
    for contexts in ([64], [3000], [200, 1000], [64] * 8):
        clock = times.after(contexts)
        assert [clock(n) for n in (8, 16, 40)] == pytest.approx([true(n, contexts) for n in (8, 16, 40)])
    assert times.after([10])(3) == times(3), "shorter texts than were measured are taken to be as quick as those"


@pytest.mark.parametrize(
    ("far", "expected"),
    [
        ({1: 1.0, 9: 2.0}, (0.0, 0.0)),
        ({1: 0.5, 9: 1.0}, (0.0, 0.0)),  # a long text is never quicker: noise
        ({1: 1.2, 9: 2.0}, (0.002, 0.0)),
        ({1: 1.0, 9: 2.9}, (0.0, 0.001)),  # a node cannot take more than all nodes did
        ({}, (0.0, 0.0)),
    ],
)
def test_noise_in_the_times_of_long_texts_makes_none_quicker(
    far: dict[int, float], expected: tuple[float, float]
) -> None:
    times = PassTimes.measured({1: 1.0, 9: 2.0}, context=100, far=far, far_context=200)
    assert (times.row_seconds, times.node_seconds) == pytest.approx(expected)


def test_positions_that_gain_time_are_refused() -> None:
    with pytest.raises(UsageError, match="further position cannot be negative"):
        PassTimes((1.0, 2.0), node_seconds=-1.0)


def test_times_are_measured_once_and_a_new_measurement_is_everybodys() -> None:
    asked: list[bool] = []
    found = iter([INT8, FLAT, None])

    def measure(refresh: bool) -> PassTimes | None:
        asked.append(refresh)
        return next(found)

    times = MachineTimes(measure)
    before = NodeBudget(times)
    assert asked == [False], "not in the middle of a text"
    assert (before.most, before.draft_seconds) == (9, 1.0)
    assert times.refresh() is FLAT
    after = NodeBudget(times, free=True)
    assert (before.most, before.draft_seconds) == (24, 2.0)
    assert (after.most, after.draft_seconds) == (24, 0.0)
    assert times.refresh() is times() is FLAT, "what cannot be measured just now stays as it was"
    assert asked == [False, True, True]


def test_where_nothing_can_be_measured_times_are_typical_and_not_asked_for_again() -> None:
    asked: list[bool] = []
    times = MachineTimes(lambda refresh: asked.append(refresh))
    assert times() == times() == PassTimes.typical()
    assert asked == [False]


def test_a_budget_asks_for_no_more_nodes_than_the_backend_takes() -> None:
    assert NodeBudget(FLAT).most == 24
    assert NodeBudget(FLAT, max_nodes=5).most == 5
    assert NodeBudget(FLAT, max_nodes=5).expected <= 5


def test_the_cheaper_a_node_the_more_are_asked_of_drafters() -> None:
    assert INT8.most == 9
    assert PassTimes.measured({1: 1.0, 16: 1.3, 32: 9.0}).most == 16
    assert PassTimes.measured({1: 1.0, 64: 1.1}).most == 24
    assert NodeBudget(INT8).expected < NodeBudget(PassTimes.measured({1: 1.0, 64: 1.1})).expected


# --- the choice -------------------------------------------------------------------------------------------------------


def subtrees(draft: Draft) -> list[tuple[int, ...]]:
    """All sets of nodes that form a tree with the root."""
    others = range(1, len(draft))
    chosen = ((0, *more) for size in range(len(draft)) for more in itertools.combinations(others, size))
    return [nodes for nodes in chosen if all(draft.parents[i] in nodes for i in nodes[1:])]


@given(drafts(max_nodes=9, falling=True), curves, st.sampled_from([0.0, 0.3]))
def test_the_choice_is_the_best_of_all_trees(draft: Draft, times: PassTimes, draft_seconds: float) -> None:
    share = NodeBudget(times).share([draft], draft_seconds)
    optimum = max(
        sum(draft.probabilities[i] for i in nodes) / (times(len(nodes)) + draft_seconds) for nodes in subtrees(draft)
    )
    assert share.rate == pytest.approx(optimum)
    kept = draft.pruned(nodes=share.nodes[0], depth=99)
    assert sum(kept.probabilities) == pytest.approx(share.tokens[0])


@given(st.lists(drafts(max_nodes=6, falling=True), min_size=1, max_size=3), curves)
def test_the_choice_for_a_batch_is_the_best_of_all_splits(many: list[Draft], times: PassTimes) -> None:
    share = NodeBudget(times).share(many, 0.0)
    expected = [[sum(d.pruned(nodes=n, depth=99).probabilities) for n in range(1, len(d) + 1)] for d in many]
    optimum = max(
        sum(e[n - 1] for e, n in zip(expected, split, strict=True)) / times(sum(split))
        for split in itertools.product(*(range(1, len(d) + 1) for d in many))
    )
    assert share.rate == pytest.approx(optimum)
    assert share.seconds == times(sum(share.nodes))


@given(st.lists(drafts(max_nodes=6, falling=True), min_size=1, max_size=3), curves, st.sampled_from([1, 4]))
def test_the_choice_for_a_padded_batch_is_the_best_of_all_splits(
    many: list[Draft], times: PassTimes, padding: int
) -> None:
    share = NodeBudget(times, padding=padding).share(many, 0.0)
    expected = [[sum(d.pruned(nodes=n, depth=99).probabilities) for n in range(1, len(d) + 1)] for d in many]
    optimum = 0.0
    for split in itertools.product(*(range(1, len(d) + 1) for d in many)):
        widest = max(split) if max(split) == 1 else padding * math.ceil(max(split) / padding)
        tokens = sum(e[n - 1] for e, n in zip(expected, split, strict=True))
        optimum = max(optimum, tokens / times(len(many) * widest))
    assert share.rate == pytest.approx(optimum)
    assert share.seconds == times(places(share.nodes, padding))


def test_a_wide_row_of_a_padded_batch_pays_for_the_others_too() -> None:
    good = Draft((1, 2, 3, 4), (-1, 0, 1, 2), (1.0, 0.9, 0.8, 0.7), ("",) * 4)
    bad = Draft((1, 2, 3, 4), (-1, 0, 1, 2), (1.0, 0.02, 0.01, 0.005), ("",) * 4)
    times = PassTimes(tuple(4.0 + 0.5 * n for n in range(1, 40)))
    assert NodeBudget(times).share([good, bad, bad, bad], 0.0).nodes == (4, 1, 1, 1)
    assert NodeBudget(times, padding=1).share([good, bad, bad, bad], 0.0).nodes == (1, 1, 1, 1)
    assert NodeBudget(times, padding=1).share([good, good, good, bad], 0.0).nodes == (4, 4, 4, 4)


def test_after_a_long_text_that_each_node_attends_to_fewer_are_verified() -> None:
    model = ToyModel(vocab=40, seed=2, order=1)
    times = PassTimes((1.0, *(1.02 + 0.02 * n for n in range(20))), context=64, node_seconds=3e-4)

    def nodes(length: int, *others: int, padding: int = 0) -> int:
        rows = [make_row([1] * n) for n in (length, *others)]
        return len(NodeBudget(times, padding=padding).propose(always_agrees(model, 8), rows)[0])

    assert nodes(65) == nodes(10) == 9
    assert nodes(65) > nodes(1200) > nodes(20000) == 1
    assert nodes(65, 65) > nodes(65, 2400), "a node is priced at the mean of the rows"
    assert nodes(65, 1000, padding=1) == nodes(1000, 1000, padding=1) < nodes(65, 1000), "padded to the longest text"


def test_a_text_that_takes_long_however_few_nodes_makes_more_of_them_pay() -> None:
    draft = Draft((1, 2, 3), (-1, 0, 1), (1.0, 0.3, 0.1), ("",) * 3)
    times = PassTimes(tuple(1.0 + 0.4 * n for n in range(20)), context=64, row_seconds=1e-3)
    budget = NodeBudget(times)
    assert budget.share([draft], 0.0).nodes == (1,)
    assert budget.share([draft], 0.0, times.after([4000])).nodes == (3,), "plain passes take longer as well"
    assert budget.bar(1, times.after([4000])) < budget.bar(1)


@given(st.lists(drafts(max_nodes=9), min_size=1, max_size=3))
def test_nothing_is_verified_where_nothing_pays(many: list[Draft]) -> None:
    dear = PassTimes((1.0, 2.5))  # another node takes longer than another pass
    assert NodeBudget(dear).share(many, 0.0).nodes == (1,) * len(many)


def test_a_row_that_is_drafted_well_gets_the_nodes_of_one_that_is_not() -> None:
    model = ToyModel()
    rows = [make_row([1]), make_row([2])]
    good, bad = always_agrees(model, 6).propose(rows, 7)
    bad = replace(bad, probabilities=tuple(0.03 * p if i else p for i, p in enumerate(bad.probabilities)))
    one, other = NodeBudget(FREE).share([good, bad], 0.0).nodes
    assert one > 3
    assert other == 1


@pytest.mark.parametrize("rows", [1, 2, 4, 16])
def test_the_bar_is_what_a_node_must_reach_to_pay(rows: int) -> None:
    times = PassTimes(tuple(4.0 + 0.5 * n for n in range(1, 40)))
    budget = NodeBudget(times)
    bar = budget.bar(rows)
    assert bar == pytest.approx(rows * 0.5 / (4.0 + 0.5 * rows))
    for p, nodes in ((bar * 0.99, rows), (min(1.0, bar * 1.01), rows + 1)):
        drafted = Draft((1, 2), (-1, 0), (1.0, p), ("", ""))
        others = [Draft((1,))] * (rows - 1)
        assert sum(budget.share([drafted, *others], 0.0).nodes) == nodes


@pytest.mark.parametrize(("rows", "padding"), [(1, 1), (3, 1), (2, 4)])
def test_the_bar_of_a_padded_batch_is_for_the_nodes_of_all_rows(rows: int, padding: int) -> None:
    times = PassTimes(tuple(9.0 + 0.5 * n for n in range(1, 40)))
    budget = NodeBudget(times, padding=padding)
    bar = budget.bar(rows)
    for p, pays in ((bar * 0.99, False), (bar * 1.01, True)):
        chain = Draft((1, 2, 3, 4), (-1, 0, 0, 0), (1.0, p, p, p), ("",) * 4)
        assert (budget.share([chain.pruned(nodes=max(2, padding), depth=9)] * rows, 0.0).nodes[0] > 1) is pays


def test_many_rows_fill_a_pass_and_nobody_is_asked() -> None:
    model = ToyModel()
    asked: list[int] = []

    class Listening(ChainDrafter):
        def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
            asked.append(len(rows))
            return super().propose(rows, nodes)

    drafter = Listening(model.best, 3)
    budget = NodeBudget(PassTimes(tuple(4.0 + 0.5 * n for n in range(1, 40))))
    rows = [make_row([i % 4, 2]) for i in range(9)]
    assert budget.bar(4) < 0.5 < budget.bar(9)
    assert [len(draft) for draft in budget.propose(drafter, rows)] == [1] * 9
    assert asked == []
    budget.propose(drafter, rows[:4])
    assert asked == [4]


# --- drafters that lie, fail and recover ------------------------------------------------------------------------------


@dataclass
class StubHeads:
    """Heads that claim one token after each; `agrees` says whether it is what the model says. A call of `begin` is a
    draft. The model must be of order 1."""

    model: ToyModel
    claim: float
    agrees: float = 1.0  # share of levels that are right
    drafted: int = 0

    device = torch.device("cpu")
    dtype = torch.float32

    def __post_init__(self) -> None:
        self.config = HeadsConfig(hidden_size=2, vocab_size=self.model.vocab, num_heads=4)
        self.lm_head_rows = self.model.vocab
        self.random = random.Random(0)

    def num_parameters(self) -> int:
        return 0

    def begin(self, features: torch.Tensor) -> HeadsState:
        self.drafted += 1
        return HeadsState(features, features)

    def guess(
        self, k: int, state: HeadsState, parents: torch.Tensor, tokens: torch.Tensor, count: int, tilt: object = None
    ) -> tuple[torch.Tensor, torch.Tensor, HeadsState]:
        right = self.random.random() < self.agrees
        ids = []
        for token in tokens.flatten().tolist():
            order = sorted(range(self.model.vocab), key=self.model([token]).__getitem__, reverse=right)
            ids.append(order[:count])
        p = [self.claim] + [(1 - self.claim) / (self.model.vocab - 1)] * (count - 1)
        return (
            torch.tensor(p).log().expand(*tokens.shape, count),
            torch.tensor(ids).reshape(*tokens.shape, count),
            state,
        )


class Run:
    """One long text, step by step."""

    def __init__(self, heads: StubHeads, *others: object, budget: NodeBudget | None = None) -> None:
        self.heads = heads
        self.backend = ToyBackend(heads.model, max_length=4000)
        self.times = INT8
        drafter = UnionDrafter(HeadsDrafter(heads), *others) if others else HeadsDrafter(heads)  # type: ignore[arg-type]
        self.decoder = ReferenceStepper(self.backend, drafter, budget or NodeBudget(INT8))
        self.row, _ = self.decoder.start(0, Request([1], Sampling(), max_new_tokens=3900))
        self.seconds = 0.0

    def steps(self, count: int) -> list[int]:
        """The number of nodes of each step."""
        nodes = []
        for _ in range(count):
            before = self.heads.drafted
            (step,) = self.decoder.step([self.row])
            nodes.append(step.drafted)
            self.seconds += INT8(step.drafted) + (self.heads.drafted - before) * INT8.draft_seconds
        return nodes


def long_model() -> ToyModel:
    return ToyModel(vocab=40, seed=2, order=1)


def test_heads_that_are_right_are_asked_at_every_step() -> None:
    run = Run(StubHeads(long_model(), claim=0.9))
    nodes = run.steps(50)
    assert run.heads.drafted == 50
    assert min(nodes) >= 4
    assert run.row.new_tokens > 4 * 50


def test_fewer_nodes_are_verified_for_heads_that_claim_more_than_comes_true() -> None:
    run = Run(StubHeads(long_model(), claim=0.9, agrees=0.1))
    nodes = run.steps(200)
    assert sum(nodes[:5]) >= 4 * 5
    assert sum(nodes[100:]) < 1.3 * 100


def test_estimates_of_heads_come_down_to_what_comes_true() -> None:
    heads = StubHeads(long_model(), claim=0.9, agrees=0.5)
    drafter, row, model = HeadsDrafter(heads), make_row([1]), heads.model
    for _ in range(100):
        (draft,) = drafter.propose([row], 6)
        row.tokens.append(model.best(row.tokens))
    assert draft.probabilities[1] == pytest.approx(0.5, abs=0.15)
    assert all(0 <= p <= 1 for p in draft.probabilities)
    row.frugal = True
    assert drafter.propose([row], 6) == [Draft((row.tokens[-1],))]


def test_estimates_of_a_fixed_tree_come_down_too() -> None:
    heads = StubHeads(long_model(), claim=0.9, agrees=0.0)
    drafter, row = HeadsDrafter(heads, Tree.from_paths({(0,): 0.8, (0, 0): 0.6, (1,): 0.1})), make_row([1])
    for _ in range(60):
        (draft,) = drafter.propose([row], 6)
        row.tokens.append(heads.model.best(row.tokens))
    assert 0 < draft.probabilities[-1] < draft.probabilities[1] < 0.2
    assert draft.parents == drafter.tree.parents  # type: ignore[union-attr]


def test_heads_are_left_alone_where_they_are_wrong_and_tried_again_where_they_are_right() -> None:
    run = Run(StubHeads(long_model(), claim=0.9, agrees=0.0))
    run.steps(150)
    before = run.heads.drafted
    run.steps(330)
    assert 5 <= run.heads.drafted - before <= 11, "one step in 33"
    run.heads.agrees = 1.0
    run.steps(120)
    assert min(run.steps(50)) >= 4, "the text became draftable"


def test_where_heads_are_wrong_it_takes_hardly_longer_than_plain_decoding() -> None:
    run = Run(StubHeads(long_model(), claim=0.9, agrees=0.0))
    run.steps(600)
    assert run.row.new_tokens == 601
    assert run.seconds < 1.03 * 600 * INT8(1)


def test_heads_are_not_asked_beside_a_drafter_that_knows_the_text() -> None:
    run = Run(StubHeads(long_model(), claim=0.5, agrees=0.5), always_agrees(long_model(), 8))
    run.steps(150)
    before = run.heads.drafted
    assert min(run.steps(66)) >= 8
    assert run.heads.drafted - before <= 3


def test_heads_are_asked_where_the_other_drafter_is_silent_and_not_where_it_speaks() -> None:
    class Moody(ChainDrafter):
        """Right, but silent at every other step."""

        def __init__(self) -> None:
            super().__init__(long_model().best, 8)
            self.turns: list[int] = []  # lengths of the text at each step so far

        def speaks(self, row: Row) -> bool:
            if len(row.tokens) not in self.turns:
                self.turns.append(len(row.tokens))
            return len(self.turns) % 2 == 0

        def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
            drafted = super().propose(rows, nodes)
            return [d if self.speaks(row) else Draft((row.tokens[-1],)) for d, row in zip(drafted, rows, strict=True)]

    moody = Moody()
    run = Run(StubHeads(long_model(), claim=0.9), moody)
    run.steps(120)
    asked = {True: 0, False: 0}
    for _ in range(66):
        before = run.heads.drafted
        run.steps(1)
        asked[len(moody.turns) % 2 == 0] += run.heads.drafted - before
    assert asked[False] == 33
    assert asked[True] <= 2


def test_drafts_that_cost_no_time_are_asked_for_once_at_every_step() -> None:
    class Counting(NgramDrafter):
        asked = 0

        def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
            self.asked += 1
            return super().propose(rows, nodes)

    drafter = Counting()
    decoder = ReferenceStepper(ToyBackend(ToyModel(order=1)), drafter, NodeBudget(FREE))
    row, _ = decoder.start(0, Request([1], Sampling(), max_new_tokens=30))
    steps = 0
    while row.finish_reason is None:
        decoder.step([row])
        steps += 1
    assert drafter.asked == steps < 29


def test_text_that_does_not_repeat_itself_takes_ngrams_hardly_longer_than_plain_decoding() -> None:
    decoder = ReferenceStepper(ToyBackend(ToyModel(vocab=50, seed=4), max_length=600), NgramDrafter(), NodeBudget(FREE))
    row, _ = decoder.start(0, Request([1, 1], Sampling(), max_new_tokens=500))
    assert sum(FREE(decoder.step([row])[0].drafted) for _ in range(400)) < 1.03 * 400 * FREE(1)


def test_the_same_text_is_drafted_the_same_way_again() -> None:
    def nodes() -> list[int]:
        return Run(StubHeads(long_model(), claim=0.7, agrees=0.5), NgramDrafter()).steps(80)

    assert nodes() == nodes()


def test_rows_of_a_batch_are_asked_for_one_by_one() -> None:
    """One row's heads are right, the other's never: only the first is drafted for in the end."""
    model = long_model()
    backend = ToyBackend(model, num_slots=2, max_length=2000)

    class Half(HeadsDrafter):
        asked: list[int] = []  # noqa: RUF012

        def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
            asked = [row for row in rows if not row.frugal]
            Half.asked += [row.slot for row in asked]
            right = always_agrees(model, 4).propose(rows, nodes)
            wrong = never_agrees(model, 4).propose(rows, nodes)
            honest = [Draft(d.tokens, d.parents, (1.0, *([0.01] * 4)), d.sources) for d in wrong]
            return [
                Draft((row.tokens[-1],)) if row.frugal else (right[b] if row.slot == 0 else honest[b])
                for b, row in enumerate(rows)
            ]

    decoder = ReferenceStepper(backend, Half(StubHeads(model, 0.9)), NodeBudget(INT8))
    rows = [decoder.start(slot, Request([1], Sampling(), max_new_tokens=1900))[0] for slot in range(2)]
    for _ in range(100):
        decoder.step(rows)
    Half.asked.clear()
    for _ in range(33):
        one, other = decoder.step(rows)
        assert (one.drafted, other.drafted) == (5, 1)
    assert Half.asked.count(0) == 33
    assert Half.asked.count(1) <= 2


def test_pauses_double_up_to_a_bound_and_end_with_a_gain() -> None:
    asking, pauses = Asking(), []
    for _ in range(6):
        asking.learn(-1.0)
        pauses.append(0)
        while not asking.due():
            pauses[-1] += 1
    assert pauses == [4, 8, 16, 32, 32, 32]
    asking.learn(1.0)
    assert asking.due()
    asking.learn(-1.0)
    assert [asking.due() for _ in range(5)] == [False] * 4 + [True]
    for _ in range(9):
        asking.learn(-1.0)
    asking.learn(0.5)  # not enough, but it looks better
    assert asking.pause == 4
