"""The decoding loop: draft, verify, accept, keep.

One `Decoder` serves one text or many: `step` takes any rows that are running, verifies all their drafts in one forward
pass, and each row keeps its own number of tokens. Plain decoding is the same loop with a drafter that proposes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from medusa.decoding.accept import accept, first_token
from medusa.decoding.budget import NodeBudget
from medusa.decoding.draft import MODEL, Draft, Drafter, Row
from medusa.decoding.sampling import Sampling
from medusa.engines.protocol import Backend
from medusa.errors import ContextFullError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]


class Phases(NamedTuple):
    """Seconds of the four parts of a step. On a device that works on its own, the wait for it is in `accept`."""

    draft: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    keep: float = 0.0

    def plus(self, other: Phases) -> Phases:
        return Phases(*(a + b for a, b in zip(self, other, strict=True)))


NO_TIME = Phases()


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass gave one row.

    `sources[i]` says who proposed `tokens[i]`: a drafter, or "model" for the token that the model itself decided
    (always the last one, unless an earlier token ended the text).
    """

    tokens: tuple[int, ...]
    sources: tuple[str, ...]
    finish_reason: FinishReason | None
    draft: Draft | None = None  # what was verified; None for the prefill
    path: tuple[int, ...] = ()  # the nodes of it that were accepted, from the root on
    phases: Phases = NO_TIME  # of the whole pass, which the rows of a batch share

    @classmethod
    def of(
        cls,
        draft: Draft,
        path: tuple[int, ...],
        tokens: tuple[int, ...],
        finish_reason: FinishReason | None,
        phases: Phases,
    ) -> Step:
        """Of a verified draft: `tokens` are those of its accepted path and the model's next one, or the first of them
        where one ended the text."""
        sources = (*(draft.sources[node] for node in path[1:]), MODEL)[: len(tokens)]
        return cls(tokens, sources, finish_reason, draft, path, phases)

    @property
    def drafted(self) -> int:
        """How many nodes were verified, the root included."""
        return 1 if self.draft is None else len(self.draft)


class Decoder:
    """Runs rows of text on a backend.

    Args:
        backend: where the model runs. The decoder is its only user.
        drafter: who proposes.
        nodes: the most nodes of a tree, the root included; 1 is plain decoding. A NodeBudget chooses at each step.

    Raises:
        UsageError: `nodes` is below 1 or more than the backend takes.
    """

    def __init__(self, backend: Backend, drafter: Drafter, nodes: int | NodeBudget) -> None:
        if isinstance(nodes, int) and nodes < 1:
            raise UsageError(f"nodes must be at least 1 (the root), not {nodes}")
        if (most := nodes if isinstance(nodes, int) else nodes.most) > backend.max_nodes:
            raise UsageError(f"nodes may be at most {backend.max_nodes} on the {backend.name} backend, not {most}")
        self.backend = backend
        self.drafter = drafter
        self.nodes = nodes

    def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raises UsageError for an empty prompt or max_new_tokens < 1, ContextFullError (one too) for a prompt that
        leaves no room."""
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if not prompt:
            raise UsageError("the prompt is empty: give at least one token")
        if len(prompt) >= self.backend.max_length:
            raise ContextFullError(len(prompt), self.backend.max_length)

    def start(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        eos_token_ids: Iterable[int] = (),
    ) -> tuple[Row, Step]:
        """Prefills a free slot. The step holds the first token, which the prompt's last logits decide.

        Raises:
            UsageError: see `check`; or the slot is not free.
        """
        self.check(prompt, max_new_tokens)
        if self.backend.length(slot):
            raise UsageError(f"slot {slot} is in use: finish or close what is being decoded there first")
        sampling = sampling.seeded()
        try:
            logits, features = self.backend.extend(slot, prompt)
        except BaseException:  # also Ctrl-C in a long prompt: what is half filled must not stay
            self.backend.release(slot)
            raise
        return self._begin(slot, prompt, sampling, max_new_tokens, eos_token_ids, logits, features)

    def step(self, rows: Sequence[Row]) -> list[Step]:
        """One forward pass for all of `rows`, none of which may be finished."""
        # draft
        begun = time.perf_counter()
        drafts = self._draft(rows)
        # verify
        drafted = time.perf_counter()
        slots = [row.slot for row in rows]
        logits, features = self.backend.verify(slots, drafts)  # [B, N, V], [B, N, F*H]
        # accept
        verified = time.perf_counter()
        accepted = [
            accept(logits[b, : len(draft)], draft, row) for b, (draft, row) in enumerate(zip(drafts, rows, strict=True))
        ]
        said = []
        for b, (row, draft, choice) in enumerate(zip(rows, drafts, accepted, strict=True)):
            row.features = features[b, choice.path[-1]]
            tokens = (*(draft.tokens[node] for node in choice.path[1:]), choice.next_token)
            said.append(self._extend(row, tokens))
        # keep: all of a row's tokens but the last, which is the next root
        chosen = time.perf_counter()
        paths = [choice.path[: len(tokens)] for choice, (tokens, _) in zip(accepted, said, strict=True)]
        self.backend.keep(slots, paths)
        phases = Phases(drafted - begun, verified - drafted, chosen - verified, time.perf_counter() - chosen)
        steps = []
        for draft, choice, (tokens, reason) in zip(drafts, accepted, said, strict=True):
            steps.append(Step.of(draft, choice.path, tokens, reason, phases))
        return steps

    def resume(
        self,
        row: Row,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        eos_token_ids: Iterable[int] = (),
    ) -> tuple[Row, Step]:
        """Continues from the text of a finished row after `tokens` more, in its slot: what is in the cache stays there.
        The new row's prompt is all of the text so far. Arguments and errors as for `start`; the old row is used up."""
        prompt = [*row.tokens, *tokens]
        self.check(prompt, max_new_tokens)
        sampling = sampling.seeded()
        unread = prompt[self.backend.length(row.slot) :]  # the last token of a row is not in the cache yet
        logits, features = self.backend.extend(row.slot, unread)
        return self._begin(row.slot, prompt, sampling, max_new_tokens, eos_token_ids, logits, features)

    def _draft(self, rows: Sequence[Row]) -> list[Draft]:
        """A tree for each row, without what the row has no room for."""
        if isinstance(self.nodes, NodeBudget):
            return self.nodes.propose(self.drafter, rows)
        drafts = self.drafter.propose(rows, self.nodes)
        return [draft.pruned(nodes=self.nodes, depth=row.room) for draft, row in zip(drafts, rows, strict=True)]

    def finish(self, row: Row) -> None:
        """Gives the slot of a row back, finished or not."""
        self.backend.release(row.slot)

    def _begin(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        eos_token_ids: Iterable[int],
        logits: Tensor,  # [V] of the last token of the prompt
        features: Tensor,  # [F*H] of it
    ) -> tuple[Row, Step]:
        row = Row(
            slot=slot,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            max_new_tokens=min(max_new_tokens, self.backend.max_length - len(prompt)),
            eos_token_ids=frozenset(eos_token_ids),
            sampling=sampling,
            features=features,
        )
        tokens, reason = self._extend(row, (first_token(logits, row.tokens, sampling),))
        return row, Step(tokens, (MODEL,), reason)

    def _extend(self, row: Row, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Adds tokens to a row, up to the first that ends it; returns those added, and why the text ends if it does."""
        tokens = tokens[: row.max_new_tokens - row.new_tokens]
        reason: FinishReason | None = None
        for i, token in enumerate(tokens):
            if token in row.eos_token_ids:
                tokens, reason = tokens[: i + 1], "stop"
                break
        row.tokens.extend(tokens)
        if reason is None and row.new_tokens >= row.max_new_tokens:
            reason = "length"
        row.finish_reason = reason
        return tokens, reason


def decode(
    decoder: Decoder,
    prompt: Sequence[int],
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
    slot: int = 0,
) -> Iterator[Step]:
    """Decodes one text, step by step; the slot is free again when the iterator ends or is closed."""
    row, step = decoder.start(
        slot, prompt, sampling or Sampling(), max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids
    )
    try:
        yield step
        while row.finish_reason is None:
            (step,) = decoder.step([row])
            yield step
    finally:
        decoder.finish(row)
