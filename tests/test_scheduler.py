"""The scheduler and its slots on a toy model: whoever runs beside a text, and whatever a slot held, it is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import RandomTreeDrafter, ToyBackend, ToyModel, plain_decode
from medusa.decoding.draft import Drafter, NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import Scheduler, Task
from medusa.decoding.slots import Slots
from medusa.decoding.stepper import Request, TokenLogprobs
from medusa.errors import UsageError

ROOM = 40
requests = st.builds(
    Request,
    st.lists(st.integers(0, 3), min_size=1, max_size=12),  # few tokens: many texts begin alike
    st.one_of(st.just(Sampling()), st.builds(Sampling, temperature=st.just(1.0), seed=st.integers(0, 9))),
    st.integers(1, 12),
    st.frozensets(st.integers(0, 3), max_size=1),
)


def toy(slots: int, drafter: Drafter | None = None) -> ReferenceStepper:
    return ReferenceStepper(ToyBackend(ToyModel(4), num_slots=slots, max_length=ROOM), drafter or NoDrafter(), 6)


def alone(request: Request) -> tuple[list[int], str]:
    return plain_decode(
        ToyModel(4),
        request.prompt,
        request.sampling,
        max_new_tokens=request.max_new_tokens,
        eos=request.eos_token_ids,
        max_length=ROOM,
    )


def drain(scheduler: Scheduler) -> None:
    while not scheduler.idle:
        scheduler.step()


def held(stepper: ReferenceStepper) -> dict[int, list[int]]:
    return stepper.backend.text  # type: ignore[attr-defined, no-any-return]


# --- scheduler --------------------------------------------------------------------------------------------------------


@given(
    st.lists(requests, min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([0, 7, 30, 1000]),
    st.booleans(),
    st.sampled_from([None, 1, 3, 8]),
    st.data(),
)
def test_every_text_is_the_one_it_would_be_alone(
    wanted: list[Request], slots: int, width: int, kept: int, lend: bool, piece: int | None, data: st.DataObject
) -> None:
    """Whatever slots keep and lend, in whatever pieces prompts are read, and while others are cancelled."""
    model = ToyModel(4)
    stepper = toy(slots, UnionDrafter(RandomTreeDrafter(model, seed=1, right=0.6), NgramDrafter()))
    scheduler = Scheduler(stepper, Slots(stepper.backend, kept, lend=lend), width, piece)
    tasks = [scheduler.submit(request) for request in wanted]
    started: list[Task] = []
    steps: dict[Task, list[int]] = {task: [] for task in tasks}
    cancelled: set[Task] = set()
    while not scheduler.idle:
        for task, step in scheduler.step():
            assert task not in cancelled
            started += [task] if task not in started else []
            steps[task] += step.tokens
        assert sum(task.row is not None and not task.finish_reason for task in tasks if task not in cancelled) <= width
        if data.draw(st.integers(0, 9)) == 0:
            task = data.draw(st.sampled_from(tasks))
            scheduler.cancel(task)
            cancelled |= set() if task.finish_reason else {task}
    for request, task in zip(wanted, tasks, strict=True):
        said, reason = alone(request)
        assert steps[task] == task.new_tokens == said[: len(task.new_tokens)]
        assert task in cancelled or (task.new_tokens, task.finish_reason) == (said, reason)
    if piece is None:
        assert started == [task for task in tasks if task in started], "first come, first served"
    assert sum(map(len, held(stepper).values())) <= kept
    assert scheduler.slots.free == slots
    scheduler.slots.clear()
    assert held(stepper) == {}


def test_requests_are_asked_for_as_slots_become_free() -> None:
    asked: list[int] = []

    def source() -> Any:
        for length in (3, 5, 2, 4):
            asked.append(length)
            yield Request([1], max_new_tokens=length)

    scheduler = Scheduler(toy(2))
    found = [(task.request.max_new_tokens, list(asked)) for task, _ in scheduler.run(source())]
    assert found[0] == (3, [3, 5])
    assert [length for length, _ in found].count(5) == 5
    assert next(seen for length, seen in found if length == 2) == [3, 5, 2]
    assert asked == [3, 5, 2, 4]


def test_a_text_that_cannot_start_leaves_the_others_running() -> None:
    stepper = toy(2)
    scheduler = Scheduler(stepper)
    good = scheduler.submit(Request([1, 2], max_new_tokens=5))
    scheduler.step()
    extend = stepper.backend.extend
    stepper.backend.extend = lambda *_: (_ for _ in ()).throw(MemoryError())  # type: ignore[method-assign]
    bad = scheduler.submit(Request([1, 2, 3]))
    with pytest.raises(MemoryError):
        scheduler.step()
    stepper.backend.extend = extend  # type: ignore[method-assign]
    drain(scheduler)
    assert bad.row is None
    assert (good.new_tokens, good.finish_reason) == alone(good.request)
    assert held(stepper) == {}


def test_after_an_error_in_a_pass_nothing_runs_and_every_slot_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = toy(2)
    scheduler = Scheduler(stepper, Slots(stepper.backend, kept=1000))
    for _ in range(2):
        scheduler.submit(Request([1, 2], max_new_tokens=9))
        scheduler.step()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    assert scheduler.idle
    assert scheduler.slots.free == 2
    assert held(stepper) == {}


def test_a_long_prompt_is_read_in_pieces_between_the_passes_of_others() -> None:
    stepper = toy(2)
    scheduler = Scheduler(stepper, piece=5)
    first = scheduler.submit(Request([1, 2], max_new_tokens=20))
    scheduler.step()
    long = scheduler.submit(Request([i % 4 for i in range(17)], max_new_tokens=3))
    lengths, said = [], []
    while long.row is None:
        scheduler.step()
        lengths.append(len(held(stepper).get(1, ())))
        said.append(len(first.new_tokens))
    assert lengths == [5, 5, 10, 10, 15, 15, 17]
    assert said == [1, 2, 2, 3, 3, 4, 4]
    drain(scheduler)
    assert [(task.new_tokens, task.finish_reason) for task in (first, long)] == [
        alone(first.request),
        alone(long.request),
    ]


def test_a_short_prompt_does_not_wait_for_a_long_one_to_be_read() -> None:
    scheduler = Scheduler(toy(2), piece=4)
    long = scheduler.submit(Request([1] * 30, max_new_tokens=2))
    scheduler.step()
    short = scheduler.submit(Request([2, 3], max_new_tokens=2))
    scheduler.step()
    assert short.row is not None
    assert long.row is None
    drain(scheduler)
    assert (long.new_tokens, long.finish_reason) == alone(long.request)


def test_a_text_that_is_cancelled_while_it_is_read_leaves_what_was_read() -> None:
    stepper = toy(2)
    scheduler = Scheduler(stepper, Slots(stepper.backend, kept=99), piece=4)
    prompt = [i % 3 for i in range(12)]
    task = scheduler.submit(Request(prompt))
    scheduler.step()
    assert task in scheduler
    scheduler.cancel(task)
    assert task not in scheduler
    assert scheduler.idle
    assert held(stepper) == {0: prompt[:4]}
    again = scheduler.submit(Request(prompt, max_new_tokens=2))
    drain(scheduler)
    assert again.reused == 4
    assert again.new_tokens == alone(again.request)[0]


def test_a_piece_that_cannot_be_read_loses_its_own_text_alone() -> None:
    stepper = toy(2)
    scheduler = Scheduler(stepper, piece=4)
    good = scheduler.submit(Request([1, 2], max_new_tokens=5))
    scheduler.step()
    bad = scheduler.submit(Request([3] * 12))
    scheduler.step()
    extend = stepper.backend.extend
    stepper.backend.extend = lambda *_: (_ for _ in ()).throw(MemoryError())  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        drain(scheduler)
    stepper.backend.extend = extend  # type: ignore[method-assign]
    assert bad not in scheduler
    assert good in scheduler
    drain(scheduler)
    assert (good.new_tokens, good.finish_reason) == alone(good.request)
    assert held(stepper) == {}


def test_a_piece_has_a_token_at_least() -> None:
    with pytest.raises(UsageError, match="piece must be at least 1, not 0"):
        Scheduler(toy(1), piece=0)


@pytest.mark.parametrize(("slots", "which"), [(1, "slot 0 is in use"), (3, "slots 0 to 2 are in use")])
def test_slots_that_others_use_are_an_error_and_not_a_wait(slots: int, which: str) -> None:
    stepper = toy(slots)
    shared = Slots(stepper.backend)
    first, second = Scheduler(stepper, shared), Scheduler(stepper, shared)
    for _ in range(slots):
        first.submit(Request([1], max_new_tokens=9))
        first.step()
    second.submit(Request([1]))
    assert not second.has_room
    with pytest.raises(UsageError, match=which):
        second.step()
    first.close()
    assert second.step()


@pytest.mark.parametrize(("prompt", "limit"), [([], 1), ([1], 0), ([1] * ROOM, 1)])
def test_a_request_that_cannot_be_decoded_is_refused_before_it_waits(prompt: list[int], limit: int) -> None:
    scheduler = Scheduler(toy(1))
    with pytest.raises(UsageError):
        scheduler.submit(Request(prompt, max_new_tokens=limit))
    assert scheduler.idle


# --- slots ------------------------------------------------------------------------------------------------------------


def slots_with(kept: int, *texts: Sequence[int], number: int = 3) -> tuple[Slots, ToyBackend]:
    """Slots that were given back with these texts, the first of them first."""
    backend = ToyBackend(ToyModel(9), num_slots=number, max_length=ROOM)
    slots = Slots(backend, kept)
    taken = []
    for text in texts:
        slot, _ = slots.take([8])
        backend.extend(slot, text)
        taken.append((slot, text))
    for slot, text in taken:
        slots.give_back(slot, [*text, 7])  # the last token of a text is not in the cache
    return slots, backend


Case = tuple[int, list[list[int]], list[int], tuple[int, int], dict[int, list[int]]]
TAKEN: dict[str, Case] = {
    "nothing is kept": (0, [[1, 2, 3]], [1, 2, 3, 4], (0, 0), {}),
    "a slot that holds the beginning": (99, [[5], [1, 2, 3]], [1, 2, 3, 4], (1, 3), {0: [5], 1: [1, 2, 3]}),
    "but for the last token": (99, [[1, 2, 3]], [1, 2, 3], (1, 2), {0: [1, 2, 3], 1: [1, 2]}),
    "a longer text is copied": (99, [[1, 2, 3, 4]], [1, 2, 9, 9], (1, 2), {0: [1, 2, 3, 4], 1: [1, 2]}),
    "or cut where no slot is empty": (99, [[1], [1, 2, 3], [5]], [1, 2, 9], (1, 2), {0: [1], 1: [1, 2], 2: [5]}),
    "an empty slot before another's text": (99, [[1, 2]], [5, 6], (1, 0), {0: [1, 2]}),
    "else the one that was used longest ago": (99, [[1], [2], [3]], [5, 6], (0, 0), {1: [2], 2: [3]}),
    "what is too much goes, oldest first": (4, [[1, 2], [3, 4], [5, 6]], [3, 4, 5], (1, 2), {1: [3, 4], 2: [5, 6]}),
    "a text that is longer than all that is kept": (2, [[1, 2, 3]], [1, 2, 3, 4], (0, 0), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_a_prompt_gets_the_slot_that_holds_most_of_it(case: str) -> None:
    kept, texts, prompt, expected, left = TAKEN[case]
    slots, backend = slots_with(kept, *texts)
    assert slots.take(prompt) == expected
    assert backend.text == left


# --- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("alternatives", [0, 2])
def test_log_probabilities_are_the_models_own_whoever_drafted_the_token(temperature: float, alternatives: int) -> None:
    """Before temperature, penalties and bias; for the first token too, and for none past the end of the text."""
    model = ToyModel(6, seed=4)
    sampling = Sampling(temperature=temperature, seed=3, presence_penalty=1.0, repetition_penalty=1.3)
    stepper = ReferenceStepper(ToyBackend(model), RandomTreeDrafter(model, seed=1, right=0.8), 9)
    scheduler = Scheduler(stepper)
    task = scheduler.submit(Request([1, 2], sampling, 20, frozenset({5}), logprobs=alternatives))
    found: list[TokenLogprobs] = []
    accepted = 0
    while not scheduler.idle:
        ((_, step),) = scheduler.step()
        assert step.logprobs is not None
        assert len(step.logprobs) == len(step.tokens)
        found += step.logprobs
        accepted += len(step.tokens) - 1
    assert accepted > 0
    for i, (token, known) in enumerate(zip(task.new_tokens, found, strict=True)):
        right = torch.tensor(model([1, 2, *task.new_tokens[:i]]), dtype=torch.float64).log_softmax(0)
        assert known.logprob == pytest.approx(float(right[token]), abs=1e-5)
        assert [token for token, _ in known.top] == right.argsort(descending=True)[:alternatives].tolist()
        assert [value for _, value in known.top] == pytest.approx(
            right.sort(descending=True)[0][:alternatives].tolist()
        )


def test_log_probabilities_cost_nothing_where_nobody_asks() -> None:
    ((_, step), *_) = Scheduler(toy(1)).run([Request([1], max_new_tokens=3)])
    assert step.logprobs is None


def test_what_a_slot_in_use_has_read_serves_others() -> None:
    stepper = toy(3)
    scheduler = Scheduler(stepper, Slots(stepper.backend, kept=99, lend=True), piece=6)
    shared = [i % 4 for i in range(10)]
    first = scheduler.submit(Request([*shared, 1], max_new_tokens=9))
    scheduler.step()
    second = scheduler.submit(Request([*shared, 2], max_new_tokens=9))
    scheduler.step()
    third = scheduler.submit(Request([*shared, 1, 3], max_new_tokens=9))
    drain(scheduler)
    assert [task.reused for task in (first, second, third)] == [0, 6, 10]
    for task in (first, second, third):
        assert (task.new_tokens, task.finish_reason) == alone(task.request)


def test_a_slot_that_takes_a_copy_forgets_its_own_text() -> None:
    slots, backend = slots_with(99, [1], [2], [3])
    slots.lend = True
    lender, _ = slots.take([7, 7, 7, 7])
    backend.extend(lender, [7, 7, 7])
    assert slots.take([7, 7, 5]) == (1, 2)
    assert backend.text == {0: [7, 7, 7], 1: [7, 7], 2: [3]}


# --- constraints ------------------------------------------------------------------------------------------------------


class OnlyAfter:
    """Allows after each token those in `follow[token]`, and knows the text by what it is told."""

    def __init__(self, follow: Sequence[frozenset[int]], vocab: int, last: int) -> None:
        import numpy as np

        self.masks = [np.array([token in some for token in range(vocab)]) for some in follow]
        self.last = last

    def allowed(self, path: Sequence[int]) -> Any:
        return self.masks[path[-1] if path else self.last]

    def keep(self, tokens: Sequence[int]) -> None:
        self.last = tokens[-1]


class Masked(ToyModel):
    """The toy model with the constraint built in, for plain decoding."""

    follow: Sequence[frozenset[int]]

    def __call__(self, tokens: Sequence[int]) -> list[float]:
        allowed = self.follow[tokens[-1]]
        return [score if token in allowed else float("-inf") for token, score in enumerate(super().__call__(tokens))]


some_tokens = st.frozensets(st.integers(0, 4), min_size=1)


@given(
    st.lists(some_tokens, min_size=5, max_size=5),
    st.one_of(
        st.just(Sampling()),
        st.builds(Sampling, temperature=st.just(1.0), top_p=st.sampled_from([0.9, 1.0]), seed=st.integers(0, 99)),
    ),
    st.integers(0, 2**32),
)
def test_a_constrained_text_is_that_of_plain_constrained_decoding(
    follow: list[frozenset[int]], sampling: Sampling, seed: int
) -> None:
    """Drafts know nothing of the constraint; every choice asks it, the first token's too."""
    model, masked = ToyModel(5, seed=2), Masked(5, seed=2)
    masked.follow = follow
    stepper = ReferenceStepper(ToyBackend(model), RandomTreeDrafter(masked, seed, right=0.7), 12)
    request = Request([1, 2], sampling, 20, constraint=OnlyAfter(follow, 5, last=2))
    scheduler = Scheduler(stepper)
    task = scheduler.submit(request)
    drain(scheduler)
    assert task.new_tokens == plain_decode(masked, [1, 2], sampling, max_new_tokens=20)[0]


@given(st.lists(some_tokens, min_size=5, max_size=5), st.integers(0, 2**32))
def test_typical_acceptance_says_nothing_that_is_not_allowed(follow: list[frozenset[int]], seed: int) -> None:
    sampling = Sampling(temperature=1.0, acceptance="typical", epsilon=0.0, delta=0.0, seed=1)
    stepper = ReferenceStepper(ToyBackend(ToyModel(5)), RandomTreeDrafter(ToyModel(5), seed, right=0.5), 12)
    scheduler = Scheduler(stepper)
    task = scheduler.submit(Request([1, 2], sampling, 20, constraint=OnlyAfter(follow, 5, last=2)))
    drain(scheduler)
    text = [2, *task.new_tokens]
    assert all(token in follow[before] for before, token in pairwise(text))


@pytest.mark.parametrize("after", [0, 1])
def test_a_constraint_that_allows_nothing_is_an_error(after: int) -> None:
    import numpy as np

    class Never:
        told = 0

        def allowed(self, path: Sequence[int]) -> Any:
            return np.full(4, self.told < after)

        def keep(self, tokens: Sequence[int]) -> None:
            self.told += len(tokens)

    scheduler = Scheduler(toy(1))
    scheduler.submit(Request([1], constraint=Never()))
    call: Callable[[], object] = lambda: drain(scheduler)  # noqa: E731
    with pytest.raises(Exception, match="the constraint allows no token here"):
        call()
    assert scheduler.slots.free == 1
