"""Drafts of texts that are constrained: what must not come is not verified, and what must come is drafted for free.

A grammar is asked before the pass where it can be asked cheaply (`Walk`). Nodes that it does not allow are dropped with
all that hangs on them. Where it leaves a single token it is surer than any drafter: that token is drafted with the
probability of the node before it. Both change what a step costs and never the text, which acceptance decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from medusa.decoding.draft import MODEL, Draft, NoDrafter
from medusa.decoding.stepper import Grammar

if TYPE_CHECKING:
    from medusa.decoding.draft import Drafter
    from medusa.decoding.stepper import Constraint, Row

GRAMMAR = "grammar"  # the source of tokens that a constraint leaves no choice about


@runtime_checkable
class Walk(Protocol):
    """A constraint that can be walked along, from the text as it is; it must be back there before anything else."""

    def enter(self, token: int) -> bool:
        """Goes on by a token; False where that must not come: then it stays."""
        ...

    def leave(self, count: int = 1) -> None:
        """Goes back by so many tokens."""
        ...

    def forced(self) -> Sequence[int]:
        """The tokens that must come next, as far as there is no choice."""
        ...


class ConstrainedDrafter:
    """What another drafter proposes, made to fit the constraints of the rows. See `Drafter`."""

    def __init__(self, drafter: Drafter) -> None:
        self.name = drafter.name
        self._drafter = drafter

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        drafts = self._drafter.propose(rows, nodes)
        return [
            constrained(draft, row.constraint, nodes, row.eos_token_ids) if isinstance(row.constraint, Walk) else draft
            for draft, row in zip(drafts, rows, strict=True)
        ]


def for_rows(drafter: Drafter, rows: Sequence[Row]) -> Drafter:
    """The drafter, or one that heeds the constraints of the rows where there are any. Plain decoding stays plain."""
    walks = not isinstance(drafter, NoDrafter) and any(isinstance(row.constraint, Walk) for row in rows)
    return ConstrainedDrafter(drafter) if walks else drafter


def begun(constraint: Constraint | Grammar | None) -> Constraint | None:
    """For one text from its beginning: a grammar makes a constraint for each."""
    return constraint.begin() if isinstance(constraint, Grammar) else constraint


def constrained(draft: Draft, walk: Walk, nodes: int, ends: frozenset[int] = frozenset()) -> Draft:
    """The part of a draft that is allowed, and below its nodes what is forced: no path has more than `nodes` nodes.
    Nothing follows a token that ends the text."""
    children: list[list[int]] = [[] for _ in draft.parents]
    for node, parent in enumerate(draft.parents[1:], start=1):
        children[parent].append(node)
    tokens, parents = [draft.tokens[0]], [-1]
    probabilities, sources = [1.0], [MODEL]

    def add(token: int, parent: int, probability: float, source: str) -> int:
        tokens.append(token)
        parents.append(parent)
        probabilities.append(probability)
        sources.append(source)
        return len(tokens) - 1

    def follow(node: int, place: int, depth: int) -> None:
        """Adds what may follow a node of the draft, which stands at `place` now."""
        must = walk.forced()[: nodes - 1 - depth]
        for child in children[node]:
            token = draft.tokens[child]
            if (must and token != must[0]) or not walk.enter(token):
                continue
            # Likely as before where its parent is right; certain where nothing else may come.
            share = 1.0 if must else draft.probabilities[child] / (draft.probabilities[node] or 1.0)
            source = GRAMMAR if must else draft.sources[child]
            at = add(token, place, probabilities[place] * min(share, 1.0), source)
            if token not in ends:
                follow(child, at, depth + 1)
            walk.leave()
            must = () if must else must  # it is there
        for token in must:
            place = add(token, place, probabilities[place], GRAMMAR)
            if token in ends:
                break

    follow(0, 0, 0)
    return Draft(tuple(tokens), tuple(parents), tuple(probabilities), tuple(sources))
