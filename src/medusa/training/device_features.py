"""Training rows on a GPU: read by the model in large batches of whole texts, and kept where heads learn from them.

Rows that do not find room there are read anew in each epoch, a part at a time; positions are then mixed within a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from medusa.engines.transformers import TransformersBackend
from medusa.training.data import Example
from medusa.training.features import Batch, LiveFeatures, Table, labelled_rows, shuffled, whole_batches

BATCH_TOKENS = 65_536  # of texts that are read at once, filled up to the longest
SHARE = 0.6  # of the free memory, that rows may take
READING = 0.2  # and what a pass that reads them


class DeviceFeatures(LiveFeatures):
    """Rows on the device of `backend`; they may take `max_bytes`, None: a share of what is free."""

    def __init__(self, backend: TransformersBackend, examples: Sequence[Example], max_bytes: int | None = None) -> None:
        super().__init__(backend, examples)
        self._model = backend
        row_bytes = 2 * backend.hidden_size * (1 + len(backend.feature_layers))
        self._most = max(1, (free_memory(backend.device) if max_bytes is None else max_bytes) // row_bytes)
        self._batch_tokens = tokens_at_once(backend)
        everything = list(range(len(examples)))
        self._table = self._read_anew(everything) if self.num_rows <= self._most else None

    @property
    def kept(self) -> bool:
        """Whether all rows are kept."""
        return self._table is not None

    def batches(
        self, heads: int, size: int, *, seed: int, epoch: int, start: int = 0, finals: bool = False
    ) -> Iterator[Batch]:
        if self._table is None:
            yield from super().batches(heads, size, seed=seed, epoch=epoch, start=start, finals=finals)
            return
        order = shuffled(self.num_rows, seed, epoch, self._model.device)
        for rows in whole_batches(order, size, start):
            yield self._table.take(rows, heads, self._model.hidden_size, finals)

    def _groups(self, order: list[int]) -> Iterator[list[int]]:
        """As many conversations as find room at once, which are all, and in order, where they are kept."""
        group: list[int] = []
        count = 0
        for i in order:
            if group and count + self._counts[i] > self._most:
                yield group
                group, count = [], 0
            group.append(i)
            count += self._counts[i]
        if group:
            yield group

    def _read(self, group: list[int]) -> Table:
        return self._read_anew(group) if self._table is None else self._table

    def _read_anew(self, group: list[int]) -> Table:
        return read_table(self._model, [self._examples[i] for i in group], self._batch_tokens)


def tokens_at_once(backend: TransformersBackend) -> int:
    """How many tokens a pass may read: transformers keeps the hidden states of all layers meanwhile."""
    if backend.device.type != "cuda":
        return BATCH_TOKENS
    config = backend.model.config.get_text_config()
    widest = getattr(config, "intermediate_size", None) or 4 * backend.hidden_size
    token_bytes = 2 * (backend.hidden_size * (backend.num_layers + 8) + 3 * int(widest))
    torch.cuda.empty_cache()
    return min(BATCH_TOKENS, int(READING * torch.cuda.mem_get_info(backend.device)[0]) // token_bytes)


def free_memory(device: torch.device) -> int:
    """Bytes that rows may take on a device."""
    if device.type != "cuda":
        import psutil

        return int(SHARE * psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    return int(SHARE * torch.cuda.mem_get_info(device)[0])


def read_table(backend: TransformersBackend, examples: Sequence[Example], batch_tokens: int = BATCH_TOKENS) -> Table:
    """The rows of texts, in their order, on the device of the model. Texts of like length are read together."""
    device = backend.device
    rows_of = [labelled_rows(example, backend.max_length) for example in examples]
    counts = [len(roots) for _, roots, _ in rows_of]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    width = backend.hidden_size * (1 + len(backend.feature_layers))
    features = torch.empty(starts[-1], width, dtype=torch.bfloat16, device=device)
    lengths = [int(positions[-1]) + 1 if len(positions) else 0 for positions, *_ in rows_of]
    for group in batched(lengths, batch_tokens):
        longest = lengths[group[-1]]
        tokens = torch.zeros(len(group), longest, dtype=torch.int64)
        for row, i in enumerate(group):
            tokens[row, : lengths[i]] = torch.tensor(examples[i].token_ids[: lengths[i]])
        places = torch.cat([rows_of[i][0] + row * longest for row, i in enumerate(group)]).to(device)
        parts = backend.read_texts(tokens.to(device))  # [B, T, H] each; what is filled up comes after all that counts
        values = torch.cat([part.flatten(0, 1).index_select(0, places).to(features) for part in parts], dim=-1)
        for i, rows in zip(group, values.split([counts[i] for i in group]), strict=True):
            features[starts[i] : starts[i] + counts[i]] = rows
    roots, left = (torch.cat([part[n] for part in rows_of]).to(device) for n in (1, 2))
    return Table(features, roots, torch.arange(len(roots), dtype=torch.int32, device=device) + left)


def batched(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of texts that are read together, the shortest first; those of no length are left out."""
    group: list[int] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[i] > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
