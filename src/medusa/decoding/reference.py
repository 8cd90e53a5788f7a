"""The reference of a stepper: draft, verify, accept, keep, on any backend.

`step` takes any rows that are running, verifies all their drafts in one forward pass, and each row keeps its own number
of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medusa.decoding.accept import Accepted, accept, first_token, logprobs_of
from medusa.decoding.budget import NodeBudget
from medusa.decoding.constrain import begun, for_rows
from medusa.decoding.draft import MODEL, Draft, Drafter
from medusa.decoding.sampling import GREEDY
from medusa.decoding.stepper import Phases, Request, Row, Step, TokenLogprobs
from medusa.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.engines.protocol import Backend


class ReferenceStepper:
    """See `Stepper`.

    Args:
        backend: where the model runs.
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

    def runs(self, request: Request) -> bool:
        return True

    def start(self, slot: int, request: Request, held: int = 0) -> tuple[Row, Step]:
        request.check(self.backend.max_length)
        if self.backend.length(slot) != held:
            raise UsageError(f"slot {slot} is in use: finish or close what is being decoded there first")
        try:
            logits, features = self.backend.extend(slot, request.prompt[held:])
        except BaseException:  # also Ctrl-C in a long prompt: what is half filled must not stay
            if self.backend.length(slot):
                self.backend.release(slot)
            raise
        return self._begin(slot, request, logits, features)

    def step(self, rows: Sequence[Row]) -> list[Step]:
        # draft
        begun = time.perf_counter()
        drafts = self._draft(rows)
        # verify
        drafted = time.perf_counter()
        slots = [row.slot for row in rows]
        logits, features = self.backend.verify(slots, drafts)  # [B, N, V], [B, N, F*H]
        # accept
        verified = time.perf_counter()
        accepted = self._accept(logits, features, drafts, rows)
        added, logprobs = [], []
        for b, (row, draft, choice) in enumerate(zip(rows, drafts, accepted, strict=True)):
            tokens = row.extend((*(draft.tokens[node] for node in choice.path[1:]), choice.next_token))
            added.append(tokens)
            logprobs.append(_logprobs(row, logits[b], choice.path, tokens))
        # keep: all of a row's tokens but the last, which is the next root
        chosen = time.perf_counter()
        paths = [choice.path[: len(tokens)] for choice, tokens in zip(accepted, added, strict=True)]
        self.backend.keep(slots, paths)
        phases = Phases(drafted - begun, verified - drafted, chosen - verified, time.perf_counter() - chosen)
        if isinstance(self.nodes, NodeBudget) and self.backend.same_bits:
            self.nodes.learn(drafts, phases.draft, phases.verify)
        return [
            Step.of(draft, choice.path, tokens, row.finish_reason, phases, known)
            for row, draft, choice, tokens, known in zip(rows, drafts, accepted, added, logprobs, strict=True)
        ]

    def finish(self, row: Row) -> None:
        self.backend.release(row.slot)

    def draft_after(self, features: Tensor) -> Draft:
        """A draft after a text of one token with these features [F*H], as a step begins with it: to be timed."""
        row = Row(0, [1], 1, self.backend.max_length, frozenset(), GREEDY, features)
        self._enter(row)
        return self._draft([row])[0]

    def _enter(self, row: Row) -> None:
        """Before the first step of a row."""

    def _draft(self, rows: Sequence[Row]) -> list[Draft]:
        """A tree for each row, without what the row has no room for."""
        drafter = for_rows(self.drafter, rows)
        if isinstance(self.nodes, NodeBudget):
            return self.nodes.propose(drafter, rows)
        drafts = drafter.propose(rows, self.nodes)
        return [draft.pruned(nodes=self.nodes, depth=row.room) for draft, row in zip(drafts, rows, strict=True)]

    def _accept(self, logits: Tensor, features: Tensor, drafts: Sequence[Draft], rows: Sequence[Row]) -> list[Accepted]:
        """What is kept of each draft, by logits [B, N, V]; the features [B, N, F*H] of the last node that is kept are
        those by which the row is drafted for next."""
        accepted = []
        for b, (draft, row) in enumerate(zip(drafts, rows, strict=True)):
            accepted.append(accept(logits[b, : len(draft)], draft, row))
            row.features = features[b, accepted[-1].path[-1]]
        return accepted

    def _begin(self, slot: int, request: Request, logits: Tensor, features: Tensor) -> tuple[Row, Step]:
        """The row of a prompt that has been read: logits [V] and features [F*H] are those of its last token."""
        row = Row(
            slot=slot,
            tokens=list(request.prompt),
            prompt_tokens=len(request.prompt),
            max_new_tokens=min(request.max_new_tokens, self.backend.max_length - len(request.prompt)),
            eos_token_ids=request.eos_token_ids,
            sampling=request.sampling.seeded(),
            features=features,
            constraint=begun(request.constraint),
            logprobs=request.logprobs,
        )
        self._enter(row)
        tokens = row.extend((first_token(logits, row),))
        logprobs = _logprobs(row, logits[None], (0,), tokens)
        return row, Step(tokens, (MODEL,), row.finish_reason, logprobs=logprobs)


def _logprobs(row: Row, logits: Tensor, path: Sequence[int], tokens: Sequence[int]) -> tuple[TokenLogprobs, ...] | None:
    """Of tokens, each by the logits [N, V] of the node of `path` before it, where the row asks for them."""
    if row.logprobs is None:
        return None
    return tuple(logprobs_of(logits[node], token, row.logprobs) for node, token in zip(path, tokens, strict=False))
