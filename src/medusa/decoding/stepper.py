"""What is swapped: a stepper reads a prompt into a slot and then decodes it, one forward pass after another.

    row, step = stepper.start(slot, request)     # the prompt enters the slot; its last logits decide the first token
    steps = stepper.step([row, other])           # draft, verify, accept, keep: one pass for all rows

`reference.py` does this in readable Python on any backend; `device/stepper.py` does it as one CUDA graph and is tested
to give the same texts. Plain decoding is either of them with a drafter that proposes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from medusa.decoding.draft import MODEL, Draft
from medusa.decoding.sampling import GREEDY, Sampling
from medusa.errors import ContextFullError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from medusa.decoding.budget import NodeBudget
    from medusa.decoding.draft import Drafter
    from medusa.engines.protocol import Backend

FinishReason = Literal["stop", "length"]


class Constraint(Protocol):
    """What a text may become: a grammar, say. Every choice of a token asks it, that of the first token too."""

    def allowed(self, path: Sequence[int]) -> np.ndarray | None:
        """Which tokens, bool [V], may follow the text so far and the drafted tokens `path`, each of which was allowed;
        None: all."""
        ...

    def keep(self, tokens: Sequence[int]) -> None:
        """The text has grown by these tokens."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """Makes a constraint for each text, which begins anew whenever the text does."""

    def begin(self) -> Constraint: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A text to decode. The end-of-text token that ends it is part of it."""

    prompt: Sequence[int]
    sampling: Sampling = GREEDY
    max_new_tokens: int = 256
    eos_token_ids: frozenset[int] = frozenset()
    constraint: Constraint | Grammar | None = None  # a constraint is of this text alone: it follows what it becomes
    logprobs: int | None = None  # for each token its log-probability and those of so many of the likeliest; None: none

    def check(self, max_length: int) -> None:
        """Raises UsageError for an empty prompt or max_new_tokens < 1, ContextFullError (one too) for a prompt that
        leaves no room in a context of `max_length`."""
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not self.prompt:
            raise UsageError("the prompt is empty: give at least one token")
        if len(self.prompt) >= max_length:
            raise ContextFullError(len(self.prompt), max_length)


@dataclass(slots=True, eq=False)
class Row:
    """One text being decoded, in one slot of the backend. The last of `tokens` is the root of the next draft.

    Whoever runs a stepper reads `tokens` and `finish_reason` and leaves the rest to it.
    """

    slot: int
    tokens: list[int]  # prompt and output
    prompt_tokens: int
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    sampling: Sampling
    features: Tensor  # [F*H] of the last accepted token
    constraint: Constraint | None = None
    logprobs: int | None = None
    finish_reason: FinishReason | None = None
    frugal: bool = False  # only drafters that cost no time are to draft for it: see `budget.py`
    price: float = 0.0  # of drafting: the tokens that its time would give otherwise; 0: no matter, see `budget.py`
    notes: dict[object, Any] = field(default_factory=dict)  # what a drafter remembers of this row, under its own key

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def room(self) -> int:
        """How deep a draft may be: a path of d drafted nodes yields d + 1 tokens."""
        return self.max_new_tokens - self.new_tokens - 1

    def extend(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Adds tokens up to the first that ends the text, which then has a finish reason; returns those added."""
        tokens = tokens[: self.max_new_tokens - self.new_tokens]
        for i, token in enumerate(tokens):
            if token in self.eos_token_ids:
                tokens, self.finish_reason = tokens[: i + 1], "stop"
                break
        self.tokens.extend(tokens)
        if self.finish_reason is None and self.new_tokens >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.constraint is not None:
            self.constraint.keep(tokens)
        return tokens


class TokenLogprobs(NamedTuple):
    """The log-probability of a token in the model's own distribution, and the likeliest (token, log-probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


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
    logprobs: tuple[TokenLogprobs, ...] | None = None  # of `tokens`, where the request asks for them

    @classmethod
    def of(
        cls,
        draft: Draft,
        path: tuple[int, ...],
        tokens: tuple[int, ...],
        finish_reason: FinishReason | None,
        phases: Phases,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
    ) -> Step:
        """Of a verified draft: `tokens` are those of its accepted path and the model's next one, or the first of them
        where one ended the text."""
        sources = (*(draft.sources[node] for node in path[1:]), MODEL)[: len(tokens)]
        return cls(tokens, sources, finish_reason, draft, path, phases, logprobs)

    @property
    def drafted(self) -> int:
        """How many nodes were verified, the root included."""
        return 1 if self.draft is None else len(self.draft)


class Stepper(Protocol):
    """Decodes rows of text. It and its like on one backend are the only users of it, one at a time."""

    @property
    def backend(self) -> Backend: ...

    @property
    def drafter(self) -> Drafter: ...

    @property
    def nodes(self) -> int | NodeBudget:
        """The most nodes of a tree, the root included; or who chooses at each step."""
        ...

    def runs(self, request: Request) -> bool:
        """Whether it can do what a request asks for; the reference can do all."""
        ...

    def start(self, slot: int, request: Request, held: int = 0) -> tuple[Row, Step]:
        """Reads a prompt into a slot, of which it holds the first `held` tokens. The step holds the first token.

        Raises:
            UsageError: see `Request.check`; the slot holds another number of tokens; a request that this stepper
                does not run. After any error in reading the prompt the slot is empty.
        """
        ...

    def step(self, rows: Sequence[Row]) -> list[Step]:
        """One forward pass for all of `rows`, none of which may be finished."""
        ...

    def finish(self, row: Row) -> None:
        """Empties the slot of a row, finished or not."""
        ...
