"""Times of passes that follow the machine: what a profile got wrong is mended by what steps take."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from helpers import ToyBackend, ToyModel, always_agrees, make_row
from medusa.decoding import reference
from medusa.decoding.budget import NodeBudget
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import decode
from medusa.decoding.times import FARTHEST, MachineTimes, PassTimes

PROFILE = PassTimes.measured({1: 1.0, 4: 1.1, 8: 1.3, 16: 2.0, 32: 4.0}, draft_seconds=0.2)


def machine(profile: PassTimes = PROFILE) -> MachineTimes:
    return MachineTimes(lambda refresh: profile)


def learn(times: MachineTimes, truth: Callable[[int], float], sizes: tuple[int, ...], steps: int) -> None:
    for i in range(steps):
        size = sizes[i % len(sizes)]
        times.learn(size, [0], truth(size))


def test_sizes_that_are_seen_come_to_what_they_take() -> None:
    truth = {1: 0.02, 8: 0.06, 16: 0.05}  # 8 tokens dear, 16 cheap: the profile had it otherwise
    times = machine()
    learn(times, truth.__getitem__, (1, 8, 16), 2400)
    now = times()
    assert now(1) == pytest.approx(truth[1], rel=0.1)
    assert now(8) == pytest.approx(truth[8], rel=0.1)
    assert now(16) >= now(8), "more tokens are never cheaper"


def test_sizes_that_are_not_seen_keep_their_place_beside_the_others() -> None:
    times = machine()
    learn(times, lambda n: 7.0 * PROFILE(n), (1, 8), 300)
    for size in (2, 16, 30, 64, 90):
        assert times()(size) / times()(1) == pytest.approx(PROFILE(size) / PROFILE(1), rel=0.15)
    assert times().draft_seconds == pytest.approx(7.0 * 0.2, rel=0.1)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_draft_that_was_timed_on_a_busy_machine_heals(rows: int) -> None:
    times = machine()
    for _ in range(200):
        times.learn(8, [0], PROFILE(8))
        times.learn_draft(rows, 0.1)
    assert times().draft(rows) == pytest.approx(0.1, rel=0.1)
    assert times()(8) == pytest.approx(PROFILE(8), rel=0.1)


def test_what_a_draft_takes_for_more_rows_is_learnt_beside_what_it_takes_for_one() -> None:
    times = machine()
    assert times().draft(4) == pytest.approx(4 * times().draft(1))
    for _ in range(200):
        times.learn(8, [0], PROFILE(8))
        times.learn_draft(1, 0.2)
        times.learn_draft(5, 0.4)
    assert times().draft(1) == pytest.approx(0.2, rel=0.1)
    assert times().draft(5) == pytest.approx(0.4, rel=0.1)
    assert times().draft(0) == 0


def test_pauses_of_the_machine_count_no_more_than_other_passes() -> None:
    rng, times = random.Random(0), machine()
    for _ in range(1000):
        times.learn(8, [0], PROFILE(8) * (50.0 if rng.random() < 0.1 else rng.uniform(0.99, 1.01)))
    assert times()(8) == pytest.approx(PROFILE(8), rel=0.1)


def test_longer_texts_are_not_taken_for_a_slower_machine() -> None:
    long = PassTimes(PROFILE.seconds, context=100, row_seconds=0.01, node_seconds=0.001)
    times = machine(long)
    for i in range(400):
        contexts = [100 + 10 * (i % 40), 2000]
        times.learn(9, contexts, long.after(contexts)(9))
    assert times()(9) == pytest.approx(long(9), rel=0.1)


def test_what_is_learnt_is_bounded() -> None:
    times = machine()
    learn(times, lambda n: PROFILE(n) * (1000.0 if n == 8 else 1.0), (1, 8, 8), 5000)
    assert times()(8) / PROFILE(8) <= math.exp(2 * FARTHEST) * times()(1) / PROFILE(1)


def test_a_new_measurement_forgets_what_was_learnt() -> None:
    times = machine()
    learn(times, lambda n: 3 * PROFILE(n), (1, 8), 64)
    assert times() != PROFILE
    assert times.measured == PROFILE
    assert times.refresh() == times() == PROFILE


def test_where_nothing_new_can_be_measured_what_is_known_stays() -> None:
    times = MachineTimes(lambda refresh: None if refresh else PROFILE)
    learn(times, lambda n: 3 * PROFILE(n), (1, 8), 64)
    assert times.refresh() == times() != PROFILE


# --- who learns, and who listens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_bits", [True, False])
def test_steps_are_learnt_from_only_where_no_text_depends_on_them(
    same_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(reference.time, "perf_counter", lambda: float(next(clock)))
    model = ToyModel()
    backend, times = ToyBackend(model), machine()
    backend.same_bits = same_bits
    stepper = ReferenceStepper(backend, always_agrees(model, 4), NodeBudget(times))
    steps = list(decode(stepper, [1], max_new_tokens=50))
    assert len(steps) > 8
    assert (times() != PROFILE) is same_bits


def test_typical_acceptance_goes_by_the_profile_alone() -> None:
    """Its texts depend on what is drafted: they must not depend on a clock."""
    times = machine()
    budget = NodeBudget(times)
    learn(times, lambda n: PROFILE(n) if n == 1 else 40.0, (1, 2, 4, 8, 16), 3000)  # now no draft pays
    drafter, features = always_agrees(ToyModel(), 8), torch.zeros(2)

    def nodes(sampling: Sampling) -> int:
        return len(budget.propose(drafter, [make_row([1, 2], sampling, features)])[0])

    assert nodes(Sampling()) == nodes(Sampling(temperature=1.0, seed=1)) == 1
    assert nodes(Sampling(temperature=1.0, seed=1, acceptance="typical")) > 4
