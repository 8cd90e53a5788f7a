"""Many texts at once: what a batch gives and costs, with drafts and without."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import Scheduler, Task
from medusa.decoding.stepper import Request

if TYPE_CHECKING:
    from medusa.api import LanguageModel
    from medusa.decoding.stepper import Stepper


WARM_UP = 4  # steps


@dataclass(slots=True)
class Load:
    """Steps of a batch of `rows` texts. The prefill of texts that come in is not counted."""

    rows: int
    steps: int = 0
    tokens: int = 0  # of all rows
    seconds: float = 0.0
    nodes: int = 0  # verified, of all rows
    step_seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together: throughput."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Of one row."""
        return self.tokens / self.steps / self.rows

    @property
    def token_milliseconds(self) -> float:
        """How long one reader waits for a token, on average: latency."""
        return 1e3 * self.seconds * self.rows / self.tokens

    def add(self, tokens: int, nodes: int, seconds: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.nodes += nodes
        self.seconds += seconds
        self.step_seconds.append(seconds)


def run_load(
    lm: LanguageModel,
    stepper: Stepper,
    prompts: Iterator[list[int]],
    load: Load,
    *,
    steps: int | None = None,
    texts: int | None = None,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Decodes `load.rows` texts side by side for `steps` steps, or until the first `texts` have ended, and adds the
    steps to `load`; where a text ends, the next prompt comes in, so that there are always as many.

    `max_new_tokens` are at least 2: the first comes with the prefill, which is not counted.
    """
    scheduler = Scheduler(stepper, lm.slots, load.rows)
    ends = frozenset(lm.eos_token_ids)
    until = None if steps is None else load.steps + steps
    begun_texts: list[Task] = []

    def more() -> bool:
        if until is not None:
            return load.steps < until
        wanted = begun_texts[:texts]
        return len(wanted) < (texts or 0) or any(task.finish_reason is None for task in wanted)

    try:
        while more():
            while scheduler.has_room:
                begun_texts.append(scheduler.submit(Request(next(prompts), sampling, max_new_tokens, ends)))
            begun = time.perf_counter()
            done = [step for _, step in scheduler.step()]
            seconds = time.perf_counter() - begun
            if done[0].draft is not None:  # not a prefill
                load.add(sum(len(step.tokens) for step in done), sum(step.drafted for step in done), seconds)
    finally:
        scheduler.close()


def compare_loads(
    lm: LanguageModel,
    steppers: dict[str, Stepper],
    prompts: Sequence[list[int]],
    sizes: Sequence[int],
    *,
    steps: int | None = None,
    max_new_tokens: int,
    sampling: Sampling,
    rounds: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Load]]:
    """By stepper, a Load for each of `sizes`. In each of `rounds` all take turns, for so many `steps`, or until each of
    the prompts has been answered: the same for every size. A few steps before are not counted, in which a device is
    warmed up."""
    loads = {name: [Load(rows) for rows in sizes] for name in steppers}
    done = 0
    for turn in range(rounds):
        for i in range(len(sizes)):
            for name, stepper in steppers.items():
                first = (turn * max(sizes)) % len(prompts)
                order = [*prompts[first:], *prompts[:first]]
                options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
                run_load(lm, stepper, itertools.cycle(order), Load(sizes[i]), steps=WARM_UP, **options)
                texts = len(order) if steps is None else None
                run_load(lm, stepper, itertools.cycle(order), loads[name][i], steps=steps, texts=texts, **options)
                done += 1
                on_progress(done, rounds * len(sizes) * len(steppers))
    return loads
