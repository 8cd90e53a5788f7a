"""What heads learn from: the frozen model's features at each labelled position, with the tokens that follow.

A row is a position t whose next token (the root of a draft) belongs to an answer. It holds the features of t, and
stands in a run of consecutive rows, so that row r + k holds token t+1+k, which head k must guess, and the features from
which the model itself predicts that token. Nothing here knows of heads.

    text        Hi  .  <end>  assistant:  Hello  there  !  <end>
    rows                          0         1      2    3
    root                        Hello     there    !   <end>      head 1 of row 0 must say "there", head 2 "!"

`FeatureCache` computes all rows once and keeps them on disk; `LiveFeatures` computes them anew in each epoch; on a GPU
they stay there, see device_features.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medusa.engines.protocol import Backend
from medusa.errors import MedusaError
from medusa.files import replacing
from medusa.training.data import Example

SHARD_ROWS = 65_536
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


def read_rows(backend: Backend, example: Example, slot: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of one text: features [P, F*H] in bfloat16, roots [P], and the length of the run after each row [P]."""
    positions, roots, left = labelled_rows(example, backend.max_length)
    if not len(positions):
        return torch.empty(0, 0, dtype=torch.bfloat16), roots, left
    try:
        _, every = backend.extend(slot, example.token_ids[: int(positions[-1]) + 1], every=True)
        features = every.to("cpu", torch.bfloat16)
    finally:
        backend.release(slot)
    return features[positions], roots, left


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


class FeatureCache:
    """Rows of all examples, in shards of bfloat16 that are memory-mapped: a training set may be larger than memory.

    A directory holds `shard-00000.safetensors`, ...; each appears whole, and one that is there is not computed again.
    """

    def __init__(self, directory: Path, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        shards = sorted(directory.glob("shard-*.safetensors"))
        self._tables = [_read_shard(path) for path in shards]
        self.num_rows = sum(len(table) for table in self._tables)
        self._starts = torch.tensor([0, *(len(table) for table in self._tables)]).cumsum(0)

    @classmethod
    def build(
        cls,
        directory: Path,
        backend: Backend,
        examples: Sequence[Example],
        facts: dict[str, Any],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> FeatureCache:
        """Computes what is missing. `facts` say what the features depend on besides the examples (model, number
        format, layers): a cache made from anything else is thrown away. `on_progress` takes (examples done, all)."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for example in examples:
            digest.update(repr((example.token_ids, example.spans)).encode())
        key = directory / "key"
        if not key.is_file() or key.read_text() != digest.hexdigest():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            key.write_text(digest.hexdigest())
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        rows = shard = 0
        path = directory / "shard-00000.safetensors"
        for done, example in enumerate(examples, start=1):
            if not path.exists():
                parts.append(read_rows(backend, example))
            rows += count_rows(example, backend.max_length)
            on_progress(done, len(examples))
            if rows >= SHARD_ROWS or done == len(examples):
                if parts:
                    _write_shard(path, joined(parts))
                parts, rows, shard = [], 0, shard + 1
                path = directory / f"shard-{shard:05}.safetensors"
        return cls(directory, backend.hidden_size)

    def batches(
        self, heads: int, size: int, *, seed: int, epoch: int, start: int = 0, finals: bool = False
    ) -> Iterator[Batch]:
        for rows in whole_batches(shuffled(self.num_rows, seed, epoch), size, start):
            yield self._take(rows, heads, finals)

    def in_order(self, heads: int, size: int) -> Iterator[Batch]:
        for rows in torch.arange(self.num_rows).split(size):
            yield self._take(rows, heads, finals=False)

    def _take(self, rows: Tensor, heads: int, finals: bool) -> Batch:
        shard = torch.bucketize(rows, self._starts, right=True) - 1
        return _concatenated(
            [
                self._tables[i].take(rows[shard == i] - self._starts[i], heads, self._hidden_size, finals)
                for i in shard.unique().tolist()
            ]
        )


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
            left.append(table.take(mixed, heads, self._backend.hidden_size, finals))
            rows = _concatenated(left)
            whole = len(rows.tokens) // size * size
            for begin in range(0, whole, size):
                yield _sliced(rows, begin, begin + size)
            left = [_sliced(rows, whole, len(rows.tokens))]

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


def _concatenated(batches: Sequence[Batch]) -> Batch:
    states = [batch.finals for batch in batches if batch.finals is not None]
    return Batch(
        torch.cat([batch.features for batch in batches]),
        torch.cat([batch.tokens for batch in batches]),
        torch.cat(states) if states else None,
    )


def _sliced(batch: Batch, start: int, end: int) -> Batch:
    finals = None if batch.finals is None else batch.finals[start:end]
    return Batch(batch.features[start:end], batch.tokens[start:end], finals)


def whole_batches(order: Tensor, size: int, start: int) -> Iterator[Tensor]:
    """The rows of `order` in batches of `size`, from number `start` on; what is left over is left out."""
    for first in range(start * size, len(order) - size + 1, size):
        yield order[first : first + size]


def shuffled(count: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """0 .. count - 1 in the order of an epoch, which is another one on another device."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator, device=device)


def _write_shard(path: Path, table: Table) -> None:
    try:
        with replacing(path) as scratch:
            save_file({"features": table.features, "roots": table.roots, "ends": table.ends}, scratch)
    except (OSError, SafetensorError) as error:
        size = table.features.numel() * 2 / 1e6
        raise MedusaError(
            f"cannot write {path} ({size:.0f} MB): {error}; make room, or set training.cache_features=false"
        ) from None


def _read_shard(path: Path) -> Table:
    try:
        with safe_open(path, framework="pt") as file:
            return Table(file.get_tensor("features"), file.get_tensor("roots"), file.get_tensor("ends"))
    except (SafetensorError, OSError) as error:
        raise MedusaError(f"{path} is damaged ({error}): delete its directory and run again") from None
