"""Acceptance: which path of a verified draft is kept, and which token comes after it.

Each rule walks from the root by parent pointers and looks at the logits of the nodes it reaches, no others. A rule
returns the accepted nodes (the root first) and the next root token.

- `greedy`: descend while a child holds the argmax. The output is that of plain greedy decoding.
- `exact`: descend while a child holds the token that plain sampling would draw at that position with this seed. The
  output is that of plain sampling, token for token, whatever was drafted.
- `typical` (https://arxiv.org/abs/2401.10774, section 2.3.1): accept what is likely enough. Lossy, and faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medusa.decoding.sampling import Sampling, adjust, candidates, check_number, penalise, sample
from medusa.decoding.stepper import TokenLogprobs
from medusa.errors import MedusaError

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.decoding.draft import Draft
    from medusa.decoding.stepper import Row


@dataclass(frozen=True, slots=True)
class Accepted:
    """`path`: accepted nodes from the root on, the root included. `next_token`: the root of the next draft."""

    path: tuple[int, ...]
    next_token: int


def accept(logits: Tensor, draft: Draft, row: Row) -> Accepted:
    """Applies the rule that `row.sampling` asks for to logits [N, V] of `draft`."""
    sampling = row.sampling
    as_they_are = not sampling.adjusts and row.constraint is None

    def node_logits(node: int) -> Tensor:
        if as_they_are:
            return logits[node]
        # A node is penalised for its own path, not its siblings'; the root is of the text already.
        return _scores(logits[node], row, [draft.tokens[i] for i in draft.path(node)[1:]])

    if sampling.lossy:
        return _typical(node_logits, draft, sampling)
    if sampling.greedy:
        if as_they_are:
            return _descend(_argmax(logits), draft)
        return _descend(lambda node: _argmax(node_logits(node)[None])(0), draft)
    depths = draft.topology.depths
    # The root is the token at position len - 1; what follows a node at depth d is the token at position len + d.
    return _descend(lambda node: sample(node_logits(node), sampling, len(row.tokens) + int(depths[node])), draft)


def first_token(logits: Tensor, row: Row) -> int:
    """The token after the prompt, from its last logits [V]: there is no draft yet."""
    scores = _scores(logits, row, ())
    if row.sampling.greedy or row.sampling.lossy:
        return _argmax(scores[None])(0)
    return sample(scores, row.sampling, len(row.tokens))


def _scores(logits: Tensor, row: Row, path: Sequence[int]) -> Tensor:
    """Logits [V] after the text of a row and the drafted tokens `path`, penalised, and -inf for what must not come.

    Raises MedusaError where the constraint allows nothing.
    """
    import torch

    sampling = row.sampling
    if sampling.adjusts:
        logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, {*row.tokens, *path}, sampling.repetition_penalty)
    if sampling.adjusts_output:
        logits = adjust(logits, [*row.tokens[row.prompt_tokens :], *path], sampling)
    # What follows the end of the text is nobody's, and a constraint need not know.
    ended = any(token in row.eos_token_ids for token in path)
    allowed = None if row.constraint is None or ended else row.constraint.allowed(path)
    if allowed is None:
        return logits
    if not allowed.any():
        raise MedusaError("the constraint allows no token here, not even one that ends the text")
    if logits.device.type == "cpu" and logits.dtype == torch.float32:  # in numpy, see `_argmax`
        return torch.from_numpy(np.where(allowed, logits.numpy(), np.float32(-math.inf)))
    return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -math.inf)


def logprobs_of(logits: Tensor, token: int, alternatives: int) -> TokenLogprobs:
    """By the model's own logits [V], before temperature, penalties and constraints."""
    scores = logits.detach().float().cpu().numpy().astype(np.float64)
    scores -= scores.max()
    scores -= math.log(np.exp(scores).sum())
    top: tuple[tuple[int, float], ...] = ()
    if count := min(alternatives, len(scores)):  # few are sorted, not the whole vocabulary
        best = np.flatnonzero(~(scores < np.partition(scores, -count)[-count]))
        best = best[np.argsort(-scores[best], kind="stable")][:count]
        top = tuple((int(i), float(scores[i])) for i in best)
    return TokenLogprobs(float(scores[token]), top)


def _argmax(logits: Tensor) -> Callable[[int], int]:
    """node -> argmax of its row of logits [N, V]. Raises MedusaError where that is no number, which it is if any is."""
    import torch

    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # Only the few rows that are reached, and by numpy: torch would wake its threads, which spin on for
        # milliseconds on the cores that the native engine needs.
        rows = logits.numpy()

        def best(node: int) -> int:
            at = int(rows[node].argmax())
            check_number(rows[node, at])
            return at

        return best
    tops, ids = (found.tolist() for found in logits.max(dim=-1))  # all nodes at once: one wait for the device

    def best_of_all(node: int) -> int:
        check_number(tops[node])
        return int(ids[node])

    return best_of_all


def _descend(choose: Callable[[int], int], draft: Draft) -> Accepted:
    """Follows the chosen token from node to node until the draft does not hold it."""
    path = [0]
    while True:
        token = choose(path[-1])
        child = draft.child(path[-1], token)
        if child is None:
            return Accepted(tuple(path), token)
        path.append(child)


def _typical(node_logits: Callable[[int], Tensor], draft: Draft, sampling: Sampling) -> Accepted:
    """Child x of an accepted node v is accepted when p(x) > min(epsilon, delta * exp(-H(p))), p the model's
    distribution at v after temperature and filters, H its entropy in nats. The longest accepted path wins, then the
    one of greater probability; the token after it is the argmax."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(draft.parents[1:], start=1):
        children.setdefault(parent, []).append(node)
    accepted = {0: (0, 0.0)}  # node -> (depth, log-probability of its path)
    for node in range(len(draft)):  # parents come first
        if node not in accepted or node not in children:
            continue
        ids, scores = candidates(node_logits(node), sampling)
        # In numpy: torch would wake its threads for a row this long, and they spin on (see `_argmax`).
        shifted = scores.astype(np.float64) - np.float64(scores.max())
        weights = np.exp(shifted)
        total = float(weights.sum())
        likely = weights > 0  # 0 log 0 is 0
        entropy = math.log(total) - float(np.dot(weights[likely], shifted[likely])) / total
        threshold = min(sampling.epsilon, sampling.delta * math.exp(-entropy))
        depth, log_p = accepted[node]
        for child in children[node]:
            at = draft.tokens[child] if ids is None else int(np.searchsorted(ids, draft.tokens[child]))
            if ids is not None and (at == len(ids) or ids[at] != draft.tokens[child]):
                continue  # the filters have dropped it
            if weights[at] / total > threshold:
                accepted[child] = (depth + 1, log_p + float(shifted[at]) - math.log(total))
    last = max(accepted, key=lambda node: (*accepted[node], -node))
    return Accepted(draft.path(last), _argmax(node_logits(last)[None])(0))
