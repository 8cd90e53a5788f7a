"""Training rows on disk: features in chunks that are memory-mapped, so that a training set may be larger than memory.

A `FeatureStore` is a directory that only grows:

    key                         what the features depend on besides the texts
    chunk-00000.safetensors     the rows of some texts, one after the other; each chunk appears whole

Distilling adds the features that decoding has computed anyway; what is missing, after a kill or for other texts, is
read. A text is known by its tokens and spans, so it does not matter where it comes from, or what else is there.
`FeatureCache` are the rows of some of the texts, in their order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medusa.engines.protocol import Backend
from medusa.errors import MedusaError
from medusa.files import replacing, write_whole
from medusa.training.data import Example
from medusa.training.features import (
    Batch,
    Table,
    concatenated,
    count_rows,
    joined,
    labelled_rows,
    read_features,
    shuffled,
    whole_batches,
)

CHUNK_ROWS = 16_384  # what a kill may cost: some minutes of a large model
KEY = "key"
FEATURES_DIR = "features"  # of a run


class _Place(NamedTuple):
    """Where the rows of a text are."""

    chunk: int
    start: int
    rows: int


class FeatureStore:
    """Adds and finds the rows of texts in a directory."""

    def __init__(self, directory: Path, facts: Mapping[str, object] | None = None) -> None:
        """`facts` say what features depend on besides the text (model, number format, layers): what a store holds that
        was made from anything else is thrown away. None takes what is there."""
        self._directory = directory
        if facts is not None:
            _claim(directory, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
        self._places: dict[str, _Place] = {}
        self.tables: list[Table] = []
        self._new: list[tuple[str, tuple[Tensor, Tensor, Tensor]]] = []  # not on disk yet
        self._new_rows = 0
        for path in sorted(directory.glob("chunk-*.safetensors")):
            self._take_up(path)

    def __contains__(self, example: Example) -> bool:
        return key_of(example) in self._places

    def place(self, example: Example) -> _Place:
        """Raises MedusaError: the text is not there."""
        try:
            return self._places[key_of(example)]
        except KeyError:
            raise MedusaError(f"{self._directory} lacks a text ({example.where}): delete it and run again") from None

    def add(self, example: Example, features: Tensor, max_length: int) -> None:
        """The features [P, F*H] of the rows of a text, whose slot holds `max_length` tokens."""
        _, roots, left = labelled_rows(example, max_length)
        if len(features) != len(roots):
            raise ValueError(f"{len(features)} features for {len(roots)} rows")
        self._new.append((key_of(example), (features, roots, left)))
        self._new_rows += len(roots)
        if self._new_rows >= CHUNK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added, as a chunk. Raises MedusaError."""
        if not self._new_rows:  # texts without rows, which nobody asks for
            return
        path = self._directory / f"chunk-{len(self.tables):05}.safetensors"
        table = joined([rows for _, rows in self._new])
        listed = json.dumps([(key, len(roots)) for key, (_, roots, _) in self._new])
        try:
            with replacing(path) as scratch:
                save_file(
                    {"features": table.features, "roots": table.roots, "ends": table.ends}, scratch, {"texts": listed}
                )
        except (OSError, SafetensorError) as error:
            size = table.features.numel() * 2 / 1e6
            raise MedusaError(
                f"cannot write {path} ({size:.0f} MB): {error}; make room, or set training.cache_features=false"
            ) from None
        self._new, self._new_rows = [], 0
        self._take_up(path)

    def read_missing(
        self,
        backend: Backend,
        examples: Sequence[Example],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Reads the texts that are not there yet. `on_progress` takes (texts done, of how many)."""
        wanted = [example for example in examples if _has_rows(example) and example not in self]
        missing = list({key_of(example): example for example in wanted}.values())
        for done, example in enumerate(missing, start=1):
            self.add(example, read_features(backend, example), backend.max_length)
            on_progress(done, len(missing))
        self.flush()

    def _take_up(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                table = Table(*(file.get_tensor(name) for name in ("features", "roots", "ends")))
                start = 0
                for key, rows in json.loads((file.metadata() or {})["texts"]):
                    self._places[key] = _Place(len(self.tables), start, rows)
                    start += rows
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise MedusaError(f"{path} is damaged ({error}): delete its directory and run again") from None
        self.tables.append(table)


class FeatureCache:
    """The rows of texts that a store holds, in the order of the texts, whatever the order in the store."""

    def __init__(self, store: FeatureStore, examples: Sequence[Example], hidden_size: int) -> None:
        """Raises MedusaError: the store lacks one."""
        self._tables = store.tables
        self._hidden_size = hidden_size
        places = [store.place(example) for example in examples if _has_rows(example)]
        self._chunks = torch.tensor([place.chunk for place in places])
        self._starts = torch.tensor([0, *(place.rows for place in places)]).cumsum(0)
        self._shifts = torch.tensor([place.start for place in places]) - self._starts[:-1]
        self.num_rows = int(self._starts[-1])

    @classmethod
    def build(
        cls, directory: Path, backend: Backend, examples: Sequence[Example], facts: Mapping[str, object]
    ) -> FeatureCache:
        """Of texts in a store that is made, or completed, for them."""
        store = FeatureStore(directory, facts)
        store.read_missing(backend, examples)
        return cls(store, examples, backend.hidden_size)

    def batches(
        self, heads: int, size: int, *, seed: int, epoch: int, start: int = 0, finals: bool = False
    ) -> Iterator[Batch]:
        for rows in whole_batches(shuffled(self.num_rows, seed, epoch), size, start):
            yield self._take(rows, heads, finals)

    def in_order(self, heads: int, size: int) -> Iterator[Batch]:
        for rows in torch.arange(self.num_rows).split(size):
            yield self._take(rows, heads, finals=False)

    def _take(self, rows: Tensor, heads: int, finals: bool) -> Batch:
        text = torch.bucketize(rows, self._starts, right=True) - 1
        chunks, places = self._chunks[text], rows + self._shifts[text]
        # In the order asked for: which chunk a row is in must not decide in what order sums are taken.
        order = chunks.argsort(stable=True)
        parts = [
            self._tables[chunk].take(places[order[chunks[order] == chunk]], heads, self._hidden_size, finals)
            for chunk in chunks.unique().tolist()
        ]
        batch = concatenated(parts)
        back = order.argsort()
        return Batch(batch.features[back], batch.tokens[back], None if batch.finals is None else batch.finals[back])


def key_of(example: Example) -> str:
    """The same for texts with the same rows."""
    return hashlib.sha256(repr((example.token_ids, example.spans)).encode()).hexdigest()[:32]


def rows_in(directory: Path) -> int:
    """How many rows the store in a directory holds, as far as its files can be read."""
    count = 0
    for path in directory.glob("chunk-*.safetensors"):
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            count += file.get_slice("roots").get_shape()[0]
    return count


def _has_rows(example: Example) -> bool:
    return count_rows(example, len(example.token_ids)) > 0


def _claim(directory: Path, digest: str) -> None:
    """An empty store for these facts, unless it is one. Raises MedusaError for a directory of something else."""
    key = directory / KEY
    directory.mkdir(parents=True, exist_ok=True)
    if not key.is_file():
        if any(not path.name.startswith(".") for path in directory.iterdir()):  # but for what a kill left
            raise MedusaError(f"{directory} holds something else than hidden states: name another --out, or move it")
    elif key.read_text() == digest:
        return
    for path in directory.iterdir():
        if path != key:  # which goes last, so that what a kill leaves is still known as a store
            path.unlink()
    write_whole(key, digest)
