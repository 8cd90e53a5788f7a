"""Conversations side by side, one in each slot of a backend, by plain decoding.

A conversation is a generator: it yields what is to be added to its text and how to go on from there (`Turn`), and is
sent what the model said (`Said`). Its text stays in the slot from turn to turn, so that no turn is computed twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from medusa.decoding.draft import Row
from medusa.decoding.loop import Decoder
from medusa.decoding.sampling import Sampling


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
class Talked:
    """A conversation as it grew. `labels` are the answers' tokens, [start, end). `fault` says why it is not kept."""

    temperature: float
    messages: list[dict[str, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    labels: list[tuple[int, int]] = field(default_factory=list)
    fault: str = ""
    spent: int = 0  # tokens that the model wrote, kept or not

    @property
    def answer_tokens(self) -> int:
        return sum(end - start for start, end in self.labels)


class Turn(NamedTuple):
    """What a conversation asks for: tokens to add to its text, and how to go on from there until one of `ends`."""

    tokens: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int]
    drop_last: bool = False  # the last token of the text is taken back first


class Said(NamedTuple):
    """What the model said, the token that ended it included."""

    tokens: list[int]
    finish_reason: str  # "stop", "length" or "loop"


Talk = Generator[Turn, Said, "Talked"]


def talk_in_slots(
    decoder: Decoder, talks: Iterable[tuple[int, Talk]], spent: Callable[[int], None] = lambda tokens: None
) -> Iterator[tuple[int, Talked]]:
    """Runs numbered conversations, as many at once as there are slots; gives what each returns, as they end.

    `spent` is told after each pass, and each turn that begins, how many tokens it gave.
    """
    queue = iter(talks)
    free = list(range(decoder.backend.num_slots))[::-1]
    running: dict[int, tuple[int, Talk, Row, LoopWatch]] = {}
    ended: list[tuple[int, Talked]] = []

    def release(slot: int) -> None:
        if decoder.backend.length(slot):  # else the conversation was over before it began, or the prefill failed
            decoder.backend.release(slot)

    def go_on(slot: int, number: int, talk: Talk, said: Said | None, before: Row | None) -> None:
        """Starts the conversation's next turn; one that is over at once is followed by the next."""
        try:
            while True:
                try:
                    turn = next(talk) if said is None else talk.send(said)
                except StopIteration as end:
                    release(slot)
                    free.append(slot)
                    ended.append((number, end.value))
                    return
                options: dict[str, Any] = {"max_new_tokens": turn.max_new_tokens, "eos_token_ids": turn.ends}
                if before is None:
                    row, step = decoder.start(slot, turn.tokens, turn.sampling, **options)
                else:
                    if turn.drop_last:
                        before.tokens.pop()
                    row, step = decoder.resume(before, turn.tokens, turn.sampling, **options)
                spent(len(step.tokens))
                if row.finish_reason is None:
                    watch = LoopWatch()
                    watch.push(step.tokens[0])
                    running[slot] = number, talk, row, watch
                    return
                said, before = Said(list(step.tokens), row.finish_reason), row
        except BaseException:  # also Ctrl-C: the slot is not among those running, which are released below
            release(slot)
            raise

    try:
        while True:
            while free and (item := next(queue, None)) is not None:
                go_on(free.pop(), *item, None, None)
                yield from ended  # at once: there may be no end of conversations that are over before they begin
                ended.clear()
            yield from ended
            ended.clear()
            if not running:
                return
            steps = decoder.step([row for _, _, row, _ in running.values()])
            spent(sum(len(step.tokens) for step in steps))
            for (slot, (number, talk, row, watch)), step in zip(list(running.items()), steps, strict=True):
                looped = sum(watch.push(token) for token in step.tokens) > 0  # all are pushed
                if row.finish_reason is not None or looped:
                    del running[slot]
                    said = Said(row.tokens[row.prompt_tokens :], row.finish_reason or "loop")
                    go_on(slot, number, talk, said, row)
    finally:
        for slot in running:
            decoder.backend.release(slot)
