"""A stepper whose drafts and choices are made in the native engine, for all rows in one call each.

What is drafted and chosen is what the reference drafts and chooses, to the last node and token; the tests hold one
against the other. So all else is the reference's: only these two parts are replaced, where the engine knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medusa.decoding.accept import Accepted, accept
from medusa.decoding.budget import HIGHEST_BAR, USUAL_TOKENS, NodeBudget
from medusa.decoding.constrain import Walk, constrained
from medusa.decoding.draft import MODEL, NGRAM_PRIOR, Draft, Drafter, NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.engines.native import NativeBackend, explained, native_module
from medusa.engines.native_heads import NativeHeads
from medusa.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.decoding.stepper import Row
    from medusa.decoding.times import PassTimes

NAMES = (MODEL, HeadsDrafter.name, NgramDrafter.name)  # in the engine's order


class NativeStepper(ReferenceStepper):
    """See `Stepper`.

    Args:
        backend, drafter, nodes: as in `ReferenceStepper`.

    Raises:
        UsageError: a drafter that the engine does not know (see `knows`), or as the reference.
    """

    backend: NativeBackend

    def __init__(self, backend: NativeBackend, drafter: Drafter, nodes: int | NodeBudget) -> None:
        super().__init__(backend, drafter, nodes)
        if not knows(drafter):
            raise UsageError(f"the native engine does not know this {drafter.name} drafter: use the reference")
        module = native_module()
        assert module is not None, "a native backend is running"
        self._module: Any = module
        heads, ngram = _parts(drafter)
        self._drafting = module.Drafting(
            heads=heads.heads.engine_heads if heads is not None and isinstance(heads.heads, NativeHeads) else None,
            heads_weight=HeadsDrafter.weight,
            heads_fade=HeadsDrafter.fade,
            sureness=HeadsDrafter.sureness,
            chain=0 if ngram is None else ngram.length,
            prior=[NGRAM_PRIOR[n] for n in sorted(NGRAM_PRIOR)],
            ngram_weight=NgramDrafter.weight,
            ngram_fade=NgramDrafter.fade,
            highest_bar=HIGHEST_BAR,
            usual_tokens=USUAL_TOKENS,
        )
        self._times: tuple[PassTimes | None, Any] = (None, None)  # and what the engine made of it

    def _enter(self, row: Row) -> None:
        text = self._module.Text()
        text.see(row.features)
        # What the engine knows: a text, its rule, and whether it chooses by that or leaves the choice to the reference.
        there = not row.sampling.adjusts_output and row.constraint is None
        row.notes[self] = text, self._rule(row.sampling), there

    def _draft(self, rows: Sequence[Row]) -> list[Draft]:
        nodes, times = 1, None
        if isinstance(self.nodes, NodeBudget):
            current = self.nodes.times_for(rows)
            most = self.nodes.most_by(current)
            times = self._engine_times(current, most)
        else:
            nodes = most = self.nodes
        texts, rules, _ = self._known(rows)
        for text, row in zip(texts, rows, strict=True):
            text.extend(row.tokens[len(text) :])
        with explained():
            drafts, asked = self._drafting.propose(texts, rules, [row.room for row in rows], nodes, times, NAMES)
        if isinstance(self.nodes, NodeBudget):
            self.nodes.drafted_for([len(row.tokens) - 1 for row in rows], asked)
        return [self._constrained(Draft(*draft), row, most) for draft, row in zip(drafts, rows, strict=True)]

    def _constrained(self, draft: Draft, row: Row, most: int) -> Draft:
        """What a constraint leaves of a draft, and what it forces: that pays however many rows there are."""
        walk: object = row.constraint
        if type(self.drafter) is NoDrafter or not isinstance(walk, Walk):
            return draft
        return constrained(draft, walk, most, row.eos_token_ids).pruned(nodes=most, depth=row.room)

    def _accept(self, logits: Tensor, features: Tensor, drafts: Sequence[Draft], rows: Sequence[Row]) -> list[Accepted]:
        texts, rules, chosen_there = self._known(rows)
        with explained():
            found = self._module.choose(
                self.backend.engine,
                texts,
                [rule if there else None for rule, there in zip(rules, chosen_there, strict=True)],
                [draft.tokens for draft in drafts],
                [draft.parents for draft in drafts],
            )
        accepted = []
        for b, (choice, draft, row) in enumerate(zip(found, drafts, rows, strict=True)):
            if choice is None:
                accepted.append(accept(logits[b, : len(draft)], draft, row))
                texts[b].see(features[b, accepted[-1].path[-1]])
            else:
                accepted.append(Accepted(*choice))
        return accepted

    def _known(self, rows: Sequence[Row]) -> tuple[list[Any], list[Any], list[bool]]:
        texts, rules, there = zip(*(row.notes[self] for row in rows), strict=True)
        return list(texts), list(rules), list(there)

    def _rule(self, sampling: Sampling) -> Any:
        return self._module.Rule(
            typical=sampling.acceptance == "typical",
            temperature=sampling.temperature,
            top_k=min(sampling.top_k, 2**31 - 1),  # the engine counts in 32 bits
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed or 0,
            epsilon=sampling.epsilon,
            delta=sampling.delta,
            penalty=sampling.repetition_penalty,
        )

    def _engine_times(self, times: PassTimes, most: int) -> Any:
        if self._times[0] is not times:
            made = self._module.Times(
                times.seconds,
                draft=times.draft_seconds,
                more=times.draft(2) - times.draft(1),
                context=times.context,
                row=times.row_seconds,
                node=times.node_seconds,
                most=most,
            )
            self._times = times, made
        return self._times[1]


def knows(drafter: Drafter) -> bool:
    """Whether the engine drafts as this one does: plainly, by n-grams, by heads on the engine with a tree that grows,
    or by both."""
    if type(drafter) is NoDrafter:
        return True
    heads, ngram = _parts(drafter)
    known = [part for part in (heads, ngram) if part is not None]
    if list(drafter.drafters if isinstance(drafter, UnionDrafter) else (drafter,)) != known:
        return False
    return heads is None or (isinstance(heads.heads, NativeHeads) and heads.tree is None)


def _parts(drafter: Drafter) -> tuple[HeadsDrafter | None, NgramDrafter | None]:
    """The drafters of a union, or one alone. Of a class derived from these nothing is known."""
    parts = drafter.drafters if isinstance(drafter, UnionDrafter) else (drafter,)
    heads = next((part for part in parts if type(part) is HeadsDrafter), None)
    return heads, next((part for part in parts if type(part) is NgramDrafter), None)
