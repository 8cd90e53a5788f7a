"""A toy language model, a backend that checks its protocol, drafters that never, always and sometimes agree, and slow
obvious references. Nothing here is fast or clever: the tests lean on it."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from medusa.decoding.draft import MODEL, Draft
from medusa.decoding.sampling import Sampling, sample
from medusa.decoding.stepper import Row
from medusa.engines.protocol import Backend

# --- random trees -----------------------------------------------------------------------------------------------------


@st.composite
def tree_parents(draw: st.DrawFn, max_nodes: int = 12) -> tuple[int, ...]:
    """Parent pointers of any tree: a root, and nodes that come after their parent."""
    size = draw(st.integers(1, max_nodes))
    return (-1, *(draw(st.integers(0, node - 1)) for node in range(1, size)))


@st.composite
def drafts(
    draw: st.DrawFn,
    *,
    vocab: int = 5,
    max_nodes: int = 12,
    root: int | None = None,
    falling: bool = False,
    source: str = "toy",
    distinct: bool = False,
) -> Draft:
    """Any draft. `falling`: probabilities fall along paths; `distinct`: no two siblings hold the same token."""
    parents = draw(tree_parents(max_nodes))
    tokens = [draw(st.integers(0, vocab - 1)) if root is None else root]
    probabilities = [1.0]
    keep = [0]
    taken: set[tuple[int, int]] = set()
    place = {0: 0}
    for node, parent in enumerate(parents[1:], start=1):
        token, p = draw(st.integers(0, vocab - 1)), draw(st.floats(0, 1))
        if parent not in place or (distinct and (parent, token) in taken):
            continue
        taken.add((parent, token))
        place[node] = len(tokens)
        keep.append(node)
        tokens.append(token)
        probabilities.append(p * probabilities[place[parent]] if falling else p)
    kept = tuple(place[parents[node]] if node else -1 for node in keep)
    return Draft(tuple(tokens), kept, tuple(probabilities), (MODEL, *([source] * (len(keep) - 1))))


def path_nodes(parents: Sequence[int], node: int) -> list[int]:
    """Nodes from the root to `node`, by walking up."""
    found = [node]
    while parents[found[0]] >= 0:
        found.insert(0, parents[found[0]])
    return found


def token_paths(draft: Draft) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    return [
        tuple(draft.tokens[i] for i in path_nodes(draft.parents, node)) for node in range(len(draft.tokens))
    ]  # fmt: skip


def make_row(tokens: Sequence[int], sampling: Sampling | None = None, features: Tensor | None = None) -> Row:
    """A row as the loop would hold it after `tokens`."""
    return Row(
        slot=0,
        tokens=list(tokens),
        prompt_tokens=1,
        max_new_tokens=10**6,
        eos_token_ids=frozenset(),
        sampling=sampling or Sampling(),
        features=torch.zeros(1) if features is None else features,
    )


# --- distributions, literally -----------------------------------------------------------------------------------------


def slow_penalised(logits: Sequence[float], seen: Iterable[int], penalty: float) -> list[float]:
    """Repetition penalty, one token at a time."""
    seen = set(seen)
    return [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)]


def slow_probabilities(logits: Sequence[float], sampling: Sampling) -> tuple[list[float], float]:
    """Softmax after temperature, top-k, top-p and min-p in that order, and how near the nearest filter decision was:
    below 1e-5 the single-precision code may rightly decide otherwise."""
    p = _softmax([x / sampling.temperature for x in logits])
    margin = math.inf
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if 0 < sampling.top_k < len(p):
        margin = min(margin, p[order[sampling.top_k - 1]] - p[order[sampling.top_k]])
        order = order[: sampling.top_k]
    p = _only(p, order)
    if sampling.top_p < 1:
        kept, before = [], 0.0
        for i in order:
            if kept:
                margin = min(margin, abs(before - sampling.top_p))
            if before < sampling.top_p or not kept:
                kept.append(i)
            elif p[i] == p[kept[-1]]:
                margin = 0.0  # the cut falls between equals
            before += p[i]
        order = kept
    p = _only(p, order)
    if sampling.min_p > 0:
        best = max(p)
        margin = min(margin, *(abs(p[i] - sampling.min_p * best) for i in order))
        order = [i for i in order if p[i] >= sampling.min_p * best]
    return _only(p, order), margin


def _softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(x - top) for x in scores]
    return [w / sum(weights) for w in weights]


def _only(p: Sequence[float], kept: Iterable[int]) -> list[float]:
    kept = set(kept)
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def chi_square_p(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """The p-value of Pearson's chi-square test; cells that expect fewer than 5 are pooled."""
    total = sum(counts)
    assert abs(sum(probabilities) - 1) < 1e-6
    assert all(p > 0 or c == 0 for c, p in zip(counts, probabilities, strict=True)), "an impossible outcome"
    cells = [(c, total * p) for c, p in zip(counts, probabilities, strict=True)]
    large = [cell for cell in cells if cell[1] >= 5]
    small = [cell for cell in cells if cell[1] < 5]
    if pooled := sum(e for _, e in small):
        large.append((sum(c for c, _ in small), pooled))
    statistic = sum((c - e) ** 2 / e for c, e in large)
    half = torch.tensor([(len(large) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


# --- a toy model and its backend --------------------------------------------------------------------------------------


@dataclass
class ToyModel:
    """Logits that depend on the whole prefix (or on its last `order` tokens) and on nothing else."""

    vocab: int = 8
    seed: int = 0
    scale: float = 1.5
    order: int | None = None
    known: dict[tuple[int, ...], list[float]] = field(default_factory=dict, repr=False)

    def __call__(self, prefix: Sequence[int]) -> list[float]:
        prefix = tuple(prefix) if self.order is None else tuple(prefix)[-self.order :]
        if prefix not in self.known:
            rng = np.random.default_rng(zlib.crc32(repr((self.seed, prefix)).encode()))
            # Rounded to single precision, so that a list of floats and a tensor hold the same numbers.
            self.known[prefix] = np.float32(rng.normal(size=self.vocab) * self.scale).tolist()
        return self.known[prefix]

    def features(self, prefix: Sequence[int]) -> list[float]:
        """What a head would read: here, a fingerprint of the prefix."""
        return [float(len(prefix)), float(zlib.crc32(repr(tuple(prefix)).encode()) % 2**20)]

    def best(self, prefix: Sequence[int]) -> int:
        logits = self(prefix)
        return logits.index(max(logits))


class ToyBackend:
    """A `Backend` over a ToyModel that asserts everything the protocol asks of its user."""

    name = "toy"
    hidden_size = 2
    num_layers = 1
    max_nodes = 256
    same_bits = True
    padding = 0

    def __init__(self, model: ToyModel, *, num_slots: int = 1, max_length: int = 64) -> None:
        self.model, self.num_slots, self.max_length, self.vocab_size = model, num_slots, max_length, model.vocab
        self.text: dict[int, list[int]] = {}
        self.waiting: tuple[list[int], list[Any]] | None = None  # of a verify, until its keep
        self.forwards = 0
        self.largest = 0  # nodes of the largest tree so far

    def extend(self, slot: int, token_ids: Sequence[int], every: bool = False) -> tuple[Tensor, Tensor]:
        assert 0 <= slot < self.num_slots
        assert self.waiting is None, "keep must follow verify"
        assert 0 < len(token_ids) <= self.max_length - self.length(slot)
        assert all(0 <= token < self.vocab_size for token in token_ids)
        held = self.length(slot)
        text = self.text.setdefault(slot, [])
        text.extend(token_ids)
        ends = range(held + 1 if every else len(text), len(text) + 1)
        features = torch.tensor([self.model.features(text[:end]) for end in ends])
        return torch.tensor(self.model(text)), features if every else features[0]

    def copy(self, source: int, target: int, length: int) -> None:
        assert 0 <= target < self.num_slots
        assert 0 < length <= self.length(source)
        assert self.waiting is None or target not in self.waiting[0], "keep must follow verify"
        self.text[target] = self.text[source][:length]

    def verify(self, slots: Sequence[int], drafts: Sequence[Any]) -> tuple[Tensor, Tensor]:
        assert self.waiting is None, "keep must follow verify"
        assert len(slots) == len(drafts) > 0
        assert len(set(slots)) == len(slots)
        assert all(slot in self.text for slot in slots), "verify needs a slot with a text"
        self.forwards += 1
        size = max(len(draft.tokens) for draft in drafts)
        self.largest = max(self.largest, size)
        # Past the end of a smaller tree there is rubbish, which nobody may read.
        logits = torch.full((len(slots), size, self.vocab_size), math.nan)
        features = torch.full((len(slots), size, self.hidden_size), math.nan)
        for b, (slot, draft) in enumerate(zip(slots, drafts, strict=True)):
            assert len(draft.tokens) == len(draft.parents)
            assert draft.parents[0] == -1
            assert all(0 <= parent < node for node, parent in enumerate(draft.parents[1:], start=1))
            assert all(0 <= token < self.vocab_size for token in draft.tokens)
            for node in range(len(draft.tokens)):
                path = path_nodes(draft.parents, node)
                assert self.length(slot) + len(path) <= self.max_length, "the draft reaches past the context"
                prefix = [*self.text[slot], *(draft.tokens[i] for i in path)]
                logits[b, node] = torch.tensor(self.model(prefix))
                features[b, node] = torch.tensor(self.model.features(prefix))
        self.waiting = (list(slots), list(drafts))
        return logits, features

    def keep(self, slots: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        assert self.waiting is not None, "keep without verify"
        assert list(slots) == self.waiting[0]
        for slot, draft, path in zip(slots, self.waiting[1], paths, strict=True):
            assert path[0] == 0
            for above, node in itertools.pairwise(path):
                assert draft.parents[node] == above, "a path goes from parent to child"
            self.text[slot].extend(draft.tokens[node] for node in path)
        self.waiting = None

    def release(self, slot: int) -> None:
        assert slot in self.text, "released twice"
        del self.text[slot]

    def length(self, slot: int) -> int:
        return len(self.text.get(slot, ()))

    def base_weights(self) -> Any:
        raise AssertionError("the loop has no business with weights")


def fill(
    backend: Backend, slot: int, token_ids: Sequence[int], every: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The text of a slot becomes `token_ids`, whatever it held: as `Backend.extend` of an empty one."""
    if backend.length(slot):
        backend.release(slot)
    return backend.extend(slot, token_ids, every)


def plain_decode(
    model: ToyModel,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos: Iterable[int] = (),
    max_length: int = 64,
) -> tuple[list[int], str]:
    """Decoding as the textbook has it: one token, then the next. Returns the new tokens and the finish reason."""
    tokens, eos = list(prompt), set(eos)
    while True:
        logits = slow_penalised(model(tokens), tokens, sampling.repetition_penalty)
        for token in set(tokens[len(prompt) :]):
            count = tokens[len(prompt) :].count(token)
            logits[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
        for token, bias in sampling.logit_bias:
            logits[token] += bias
        if sampling.greedy:
            tokens.append(logits.index(max(logits)))
        else:
            tokens.append(sample(torch.tensor(logits), sampling, len(tokens)))
        if tokens[-1] in eos:
            return tokens[len(prompt) :], "stop"
        if len(tokens) - len(prompt) == max_new_tokens or len(tokens) == max_length:
            return tokens[len(prompt) :], "length"


# --- drafters ---------------------------------------------------------------------------------------------------------


class ChainDrafter:
    """Proposes one chain of `depth` tokens: each is what `guess` says of the text so far."""

    name = "chain"

    def __init__(self, guess: Callable[[list[int]], int], depth: int) -> None:
        self.guess, self.depth = guess, depth

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        return [self._propose(row, min(self.depth, nodes - 1)) for row in rows]

    def _propose(self, row: Row, depth: int) -> Draft:
        text = list(row.tokens)
        for _ in range(depth):
            text.append(self.guess(text))
        return Draft(
            tuple(text[len(row.tokens) - 1 :]),
            tuple(range(-1, depth)),
            tuple(0.9**i for i in range(depth + 1)),
            (MODEL, *([self.name] * depth)),
        )


def never_agrees(model: ToyModel, depth: int) -> ChainDrafter:
    """Proposes what the model likes least."""
    return ChainDrafter(lambda text: int(np.argmin(model(text))), depth)


def always_agrees(model: ToyModel, depth: int) -> ChainDrafter:
    """Proposes what greedy decoding says."""
    return ChainDrafter(model.best, depth)


class RandomTreeDrafter:
    """Any tree, of any shape, with any probabilities; a share `right` of its tokens is what greedy decoding says."""

    name = "random"

    def __init__(self, model: ToyModel, seed: int, right: float, max_nodes: int = 14) -> None:
        self.model, self.random, self.right, self.max_nodes = model, random.Random(seed), right, max_nodes

    def propose(self, rows: Sequence[Row], nodes: int) -> list[Draft]:
        return [self._propose(row) for row in rows]

    def _propose(self, row: Row) -> Draft:
        assert row.finish_reason is None, "a finished row is not drafted for"
        assert row.features.tolist() == self.model.features(row.tokens[:-1]), "features of the last accepted token"
        tokens, parents, prefixes = [row.tokens[-1]], [-1], [list(row.tokens)]
        for node in range(1, self.random.randint(1, self.max_nodes)):
            # Half of the nodes go on from the newest, so that deep trees are as common as wide ones.
            parent = node - 1 if self.random.random() < 0.5 else self.random.randrange(node)
            agrees = self.random.random() < self.right
            token = self.model.best(prefixes[parent]) if agrees else self.random.randrange(self.model.vocab)
            tokens.append(token)
            parents.append(parent)
            prefixes.append([*prefixes[parent], token])
        count = len(tokens) - 1
        return Draft(
            tuple(tokens),
            tuple(parents),
            (1.0, *(self.random.random() for _ in range(count))),
            (MODEL, *([self.name] * count)),
        )
