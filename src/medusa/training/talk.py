"""Conversations side by side, one in each slot of a backend, by plain decoding.

A conversation is a generator: it yields what is to be added to its text and how it continues from there (`Turn`), and
is sent what the model said (`Reply`). Its text stays in the slot from turn to turn, so that no turn is computed twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import Scheduler, Task
from medusa.decoding.slots import Slots
from medusa.decoding.stepper import Request

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.decoding.stepper import Stepper


class LoopWatch:
    """Tells when a text has fallen into a loop: nearly all of its last `window` 4-grams have occurred in it before."""

    def __init__(self, window: int = 64, share: float = 0.85) -> None:
        self._window, self._share = window, share
        self._last: deque[int] = deque(maxlen=4)
        self._seen: set[tuple[int, ...]] = set()
        self._repeats: deque[bool] = deque(maxlen=window)
        self._count = 0  # of those among them that are

    def push(self, token: int) -> bool:
        """Adds a token; whether the text loops."""
        self._last.append(token)
        if len(self._last) == 4:
            gram = tuple(self._last)
            repeated = gram in self._seen
            if len(self._repeats) == self._window:
                self._count -= self._repeats[0]
            self._count += repeated
            self._repeats.append(repeated)
            self._seen.add(gram)
        return len(self._repeats) == self._window and self._count >= self._share * self._window


@dataclass(slots=True)
class Transcript:
    """A conversation as it grew. `labels` are the answers' tokens, [start, end). `fault` says why it is not kept."""

    temperature: float
    messages: list[dict[str, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    labels: list[tuple[int, int]] = field(default_factory=list)
    # Of each answer, by the start of its label, where features are kept: see `Reply`.
    features: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    fault: str = ""
    spent: int = 0  # tokens that the model wrote, kept or not

    @property
    def answer_tokens(self) -> int:
        return sum(end - start for start, end in self.labels)


class Turn(NamedTuple):
    """What a conversation asks for: tokens to add to its text, and how to decode from there until one of `ends`."""

    tokens: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int]
    drop_last: bool = False  # the last token of the text is taken back first


class Reply(NamedTuple):
    """What the model said, the token that ended it included."""

    tokens: list[int]
    finish_reason: str  # "stop", "length" or "loop"
    features: Tensor | None = None  # [tokens, F*H], bfloat16: those by which the model chose each of the tokens


Talk = Generator[Turn, Reply, Transcript]


def next_turn(talk: Talk, reply: Reply | None) -> Turn | Transcript:
    """What a conversation asks for after a reply (None: at its start), or what it returns, if it is over."""
    try:
        return next(talk) if reply is None else talk.send(reply)
    except StopIteration as end:
        transcript: Transcript = end.value
        return transcript


class _Running(NamedTuple):
    """A conversation whose turn is being decoded."""

    number: int
    talk: Talk
    text: list[int]  # up to the turn's answer
    watch: LoopWatch
    features: list[Tensor]


def talk_in_slots(
    stepper: Stepper,
    talks: Iterable[tuple[int, Talk]],
    on_tokens: Callable[[int], None] = lambda count: None,
    *,
    features: bool = False,
) -> Iterator[tuple[int, Transcript]]:
    """Runs numbered conversations, as many at once as there are slots; gives what each returns, as they end.

    `on_tokens` is called after each pass, and each turn that begins, with how many tokens it gave. `features` keeps
    those of each token that is said, and asks for a stepper that decodes plainly: one token a pass.
    """
    backend = stepper.backend
    # A turn continues from the slot that still holds its text: it is queued before a new conversation can take a slot.
    scheduler = Scheduler(stepper, Slots(backend, kept=backend.num_slots * backend.max_length))
    queue = iter(talks)
    running: dict[Task, _Running] = {}

    def take_turn(number: int, talk: Talk, text: list[int], reply: Reply | None) -> Transcript | None:
        """Queues the conversation's next turn; or what it returns, if it is over."""
        turn = next_turn(talk, reply)
        if isinstance(turn, Transcript):
            return turn
        text = [*(text[:-1] if turn.drop_last else text), *turn.tokens]
        task = scheduler.submit(Request(text, turn.sampling, turn.max_new_tokens, turn.ends))
        running[task] = _Running(number, talk, text, LoopWatch(), [])
        return None

    try:
        while True:
            while scheduler.has_room and (item := next(queue, None)) is not None:
                if (transcript := take_turn(*item, [], None)) is not None:
                    yield item[0], transcript
            if scheduler.idle:
                return
            steps = scheduler.step()
            on_tokens(sum(len(step.tokens) for _, step in steps))
            over = []
            for task, step in steps:
                number, talk, text, watch, kept = running[task]
                if features:
                    kept.append(_features_of(task))
                looped = sum(watch.push(token) for token in step.tokens) > 0  # all are pushed
                if task.finish_reason is None and not looped:
                    continue
                scheduler.cancel(task)
                del running[task]
                reply = Reply(task.new_tokens, task.finish_reason or "loop", _stacked(kept))
                if (transcript := take_turn(number, talk, [*text, *reply.tokens], reply)) is not None:
                    over.append((number, transcript))
            yield from over
    finally:
        scheduler.close()
        scheduler.slots.clear()


def _features_of(task: Task) -> Tensor:
    """Those by which the last token was chosen: a copy, for what they are a part of is much larger."""
    import torch

    assert task.row is not None
    return task.row.features.to("cpu", torch.bfloat16, copy=True)


def _stacked(features: list[Tensor]) -> Tensor | None:
    if not features:
        return None
    import torch

    return torch.stack(features)
