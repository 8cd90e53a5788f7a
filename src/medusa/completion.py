"""Steps of a text -> chunks of characters, with running counts -> a completion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medusa.decoding.stepper import NO_TIME, FinishReason, Phases, Step
from medusa.text.stream import Detokenizer, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Stats:
    """Running counts of one text. The first token comes from the prefill, all others from steps."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0  # forward passes after the prefill
    ttft_seconds: float = 0.0  # from the call to the first token
    decode_seconds: float = 0.0  # in the steps; waiting for whoever reads the stream is not counted
    phases: Phases = NO_TIME  # what of that went where; the rest is making text of tokens

    @property
    def decoded_tokens(self) -> int:
        """Tokens that came from steps: all but the first."""
        return max(0, self.new_tokens - 1)

    @property
    def tokens_per_step(self) -> float:
        """1.0 is plain decoding; 0.0 where no step was needed."""
        return self.decoded_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, without the prefill; 0.0 where no step was needed."""
        return self.decoded_tokens / self.decode_seconds if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step added.

    `spans` are pieces of text with their source, which join to `text`: "model" for what the model decided itself, the
    name of a drafter for an accepted draft. `text` never ends in half a character, so it may lag behind `token_ids`.
    """

    text: str
    spans: tuple[tuple[str, str], ...]
    token_ids: tuple[int, ...]
    stats: Stats
    finish_reason: FinishReason | None
    step: Step  # as decoded; a stop string may have cut `token_ids` shorter


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. `token_ids` include the end-of-text token if the model wrote one; `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    stats: Stats
    finish_reason: str  # "stop", "length", or "interrupted": stopped half-way by whoever read it

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Completion:
        """Of the chunks of one text, which may have been interrupted."""
        found = list(chunks)
        stats, reason = (found[-1].stats, found[-1].finish_reason) if found else (Stats(), None)
        token_ids = tuple(token for chunk in found for token in chunk.token_ids)
        return cls("".join(chunk.text for chunk in found), token_ids, stats, reason or "interrupted")


def in_order(chunks: Iterable[tuple[int, Chunk]], count: int, on_end: Callable[[], object]) -> Iterator[Completion]:
    """The whole answers to `count` prompts in their order, each as soon as it and all before it have ended.

    Args:
        chunks: (which prompt, its chunk), as they come.
        on_end: called whenever an answer has ended.
    """
    parts: list[list[Chunk]] = [[] for _ in range(count)]
    following = 0
    for i, chunk in chunks:
        parts[i].append(chunk)
        if chunk.finish_reason is not None:
            on_end()
        while following < count and parts[following] and parts[following][-1].finish_reason is not None:
            yield Completion.of(parts[following])
            parts[following].clear()
            following += 1


class TextOfSteps:
    """Makes the chunks of one text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: StopStrings,
        ends: Iterable[int],
        prompt_tokens: int,
        before: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, before)
        self._stops = stops
        self._ends = frozenset(ends)  # tokens that are not shown: some tokenizers give the end of text a text
        self._stats = Stats(prompt_tokens=prompt_tokens)

    def push(self, step: Step, begun: float) -> Chunk:
        """The chunk of a step that took from the time `begun` till now. One with a finish reason is the last; it may
        have one where the step has none, for a stop string."""
        spans: list[tuple[str, str]] = []
        taken = 0
        source = ""
        for token, source in zip(step.tokens, step.sources, strict=True):
            if token not in self._ends:
                spans += self._stops.push(self._detokenizer.push(token), source)
            taken += 1
            if self._stops.hit:
                break
        reason: FinishReason | None = "stop" if self._stops.hit else step.finish_reason
        if reason is not None:
            spans += self._stops.push(self._detokenizer.flush(), source)
            reason = "stop" if self._stops.hit else reason
            spans += self._stops.flush()
        self._count(step, taken, time.perf_counter() - begun)
        return Chunk("".join(text for text, _ in spans), tuple(spans), step.tokens[:taken], self._stats, reason, step)

    def _count(self, step: Step, taken: int, seconds: float) -> None:
        stats = self._stats
        if stats.new_tokens == 0:
            self._stats = replace(stats, ttft_seconds=seconds, new_tokens=taken)
        else:
            self._stats = replace(
                stats,
                new_tokens=stats.new_tokens + taken,
                steps=stats.steps + 1,
                decode_seconds=stats.decode_seconds + seconds,
                phases=stats.phases.plus(step.phases),
            )
