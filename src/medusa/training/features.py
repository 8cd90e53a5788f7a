"""What heads learn from: the frozen model's features at each labelled position, with the tokens that follow.

A row is a position t whose next token (the root of a draft) belongs to an answer. It holds the features of t, and
stands in a run of consecutive rows, so that row r + k holds token t+1+k, which head k must guess, and the features from
which the model itself predicts that token. Nothing here knows of heads.

    text        Hi  .  <end>  assistant:  Hello  there  !  <end>
    rows                          0         1      2    3
    root                        Hello     there    !   <end>      head 1 of row 0 must say "there", head 2 "!"

`FeatureCache` (stored_features.py) has them on disk; `LiveFeatures` computes them anew in each epoch; on a GPU they
stay there, see device_features.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from medusa.engines.protocol import Backend
from medusa.training.data import Example

LIVE_EXAMPLES = 64  # conversations whose positions are mixed with each other
ABSENT = -1  # in the place of a token past the end of the answer


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows. `tokens[:, 0]` are the roots, `tokens[:, k]` what head k must guess (ABSENT past the answer's end);
    `finals[:, k - 1]` are the model's own features there, where they are asked for."""

    features: Tensor  # [B, F*H]
    tokens: Tensor  # [B, 1 + K]
    finals: Tensor | None  # [B, K, H]


class Rows(Protocol):
    """Training rows in batches whose order follows from a seed and an epoch."""

    num_rows: int

    def batches(
        self, heads: int, size: int, *, seed: int, epoch: int, start: int = 0, finals: bool = False
    ) -> Iterator[Batch]:
        """Whole batches of `size` rows, from number `start` on. `heads` is K."""
        ...


class MeasuredRows(Protocol):
    """Rows that measure heads."""

    def in_order(self, heads: int, size: int) -> Iterator[Batch]:
        """All rows once; the last batch may be smaller."""
        ...


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in memory or on disk: features [P, F*H], roots [P], and where the run of each row ends [P]."""

    features: Tensor
    roots: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.roots)

    def take(self, rows: Tensor, heads: int, hidden_size: int, finals: bool) -> Batch:
        """Those rows [B], in batch form. `heads` is K, `hidden_size` H."""
        after = rows[:, None] + torch.arange(heads + 1, device=rows.device)  # [B, 1 + K]
        absent = after >= self.ends[rows][:, None]
        after = after.clamp_max(len(self) - 1)
        tokens = self.roots[after].long().masked_fill(absent, ABSENT)
        states = _rows_of(self.features[:, -hidden_size:], after[:, 1:]) if finals else None
        return Batch(_rows_of(self.features, rows), tokens, states)


def _rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """Of a table [P, F] of any size: [..., F] for `rows` [...]."""
    return table.index_select(0, rows.flatten()).reshape(*rows.shape, -1)


def read_rows(backend: Backend, example: Example) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of one text: features [P, F*H] in bfloat16, roots [P], and the length of the run after each row [P]."""
    _, roots, left = labelled_rows(example, backend.max_length)
    return read_features(backend, example), roots, left


def read_features(backend: Backend, example: Example, slot: int = 0) -> Tensor:
    """Of the rows of one text, by one pass over it: [P, F*H] in bfloat16."""
    positions, _, _ = labelled_rows(example, backend.max_length)
    if not len(positions):
        return torch.empty(0, 0, dtype=torch.bfloat16)
    try:
        _, every = backend.extend(slot, example.token_ids[: int(positions[-1]) + 1], every=True)
        features = every.to("cpu", torch.bfloat16)
    finally:
        backend.release(slot)
    return features[positions]


def labelled_rows(example: Example, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows of one text are: their positions t [P], ascending, roots [P], and what is left of the run [P]."""
    ids = example.token_ids[:max_length]
    spans = [(max(1, start), min(end, len(ids))) for start, end in example.spans]
    spans = [(start, end) for start, end in spans if end > start]
    if not spans:
        empty = torch.empty(0, dtype=torch.int32)
        return empty.long(), empty, empty
    positions = torch.cat([torch.arange(start - 1, end - 1) for start, end in spans])
    left = torch.cat([torch.arange(end - start, 0, -1) for start, end in spans])
    return positions, torch.tensor(ids, dtype=torch.int32)[positions + 1], left.int()


def count_rows(example: Example, max_length: int) -> int:
    """How many rows `read_rows` gives."""
    return sum(max(0, min(end, max_length, len(example.token_ids)) - max(1, start)) for start, end in example.spans)


def longest_answer(examples: Sequence[Example], max_length: int) -> int:
    """In tokens that can be guessed from something. It takes K + 1 of them to measure K heads."""
    return max((count_rows(replace(e, spans=(span,)), max_length) for e in examples for span in e.spans), default=0)


def joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Table:
    """One table of the rows of several texts."""
    features, roots, left = (torch.cat([part[i] for part in parts if len(part[1])]) for i in range(3))
    return Table(features, roots, torch.arange(len(roots), dtype=torch.int32) + left)


class LiveFeatures:
    """Rows computed when they are needed: nothing on disk, and the model runs in every epoch.

    The positions of LIVE_EXAMPLES conversations are mixed with each other, not those of all.
    """

    def __init__(self, backend: Backend, examples: Sequence[Example]) -> None:
        self._backend = backend
        self._examples = examples
        self._counts = [count_rows(example, backend.max_length) for example in examples]
        self.num_rows = sum(self._counts)

    def batches(
        self, heads: int, size: int, *, seed: int, epoch: int, start: int = 0, finals: bool = False
    ) -> Iterator[Batch]:
        # The epoch is one stream of rows, of which batch i holds [i * size, (i + 1) * size).
        first, last = start * size, self.num_rows // size * size
        left: list[Batch] = []
        at = 0
        for group in self._groups(shuffled(len(self._examples), seed, epoch).tolist()):
            count = sum(self._counts[i] for i in group)
            at, before = at + count, at
            if at <= first or before >= last:
                continue
            table = self._read(group)
            mixed = shuffled(count, seed, epoch, table.roots.device)[max(0, first - before) : last - before]
            # A batch at a time: a copy of the whole table would take as much memory again.
            missing = size - sum(len(batch.tokens) for batch in left)
            while len(mixed):
                left.append(table.take(mixed[:missing], heads, self._backend.hidden_size, finals))
                mixed, missing = mixed[missing:], missing - len(mixed[:missing])
                if not missing:
                    yield concatenated(left)
                    left, missing = [], size
            del table  # before the next one is read

    def in_order(self, heads: int, size: int) -> Iterator[Batch]:
        """All rows once, as they stand in the texts; the last batch of what is read at once may be smaller."""
        for group in self._groups(list(range(len(self._examples)))):
            table = self._read(group)
            for rows in torch.arange(len(table), device=table.roots.device).split(size):
                yield table.take(rows, heads, self._backend.hidden_size, finals=False)

    def _groups(self, order: list[int]) -> Iterator[list[int]]:
        """Conversations whose positions are mixed with each other."""
        for start in range(0, len(order), LIVE_EXAMPLES):
            yield order[start : start + LIVE_EXAMPLES]

    def _read(self, group: list[int]) -> Table:
        return joined([read_rows(self._backend, self._examples[i]) for i in group])


def concatenated(batches: Sequence[Batch]) -> Batch:
    states = [batch.finals for batch in batches if batch.finals is not None]
    return Batch(
        torch.cat([batch.features for batch in batches]),
        torch.cat([batch.tokens for batch in batches]),
        torch.cat(states) if states else None,
    )


def whole_batches(order: Tensor, size: int, start: int) -> Iterator[Tensor]:
    """The rows of `order` in batches of `size`, from number `start` on; what is left over is left out."""
    for first in range(start * size, len(order) - size + 1, size):
        yield order[first : first + size]


def shuffled(count: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """0 .. count - 1 in the order of an epoch, which is another one on another device."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator, device=device)
