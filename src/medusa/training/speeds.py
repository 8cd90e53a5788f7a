"""How fast this machine writes, reads and learns, by a few seconds of each as a run does them.

Each part ends by the clock after a pass or a step or two, so that a large model does not take long either.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from medusa.api import LanguageModel
from medusa.engines.protocol import Backend, PlainTree
from medusa.engines.transformers import TransformersBackend
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads
from medusa.training.accuracy import ranks
from medusa.training.config import TrainConfig
from medusa.training.distill import Written, distill
from medusa.training.estimate import Speeds, Work
from medusa.training.features import Batch
from medusa.training.text import read_prompt_file
from medusa.training.trainer import NO_LIMIT, Progress, Trainer, keep_freed_memory

SECONDS = 2.5  # of each part, at least a pass or a step
MOST_SECONDS = 8.0  # until all conversations have begun
PASSES = 100  # of writing, at most
STEPS = 12  # of training, at most
READ_TOKENS = 512
JUDGED = 128  # positions


class _EnoughError(Exception):
    """Stops what is measured."""


def measure(
    config: TrainConfig,
    lm: LanguageModel,
    shape: HeadsConfig,
    work: Work,
    gpu: TransformersBackend | None,
    device: torch.device,
) -> Speeds:
    """Of those parts that there is work for. `shape` is that of the heads."""
    found = Speeds()
    if work.write:
        found = replace(found, written=writing(config, lm))
    if work.read:
        found = replace(found, read=reading(lm) if gpu is None else reading_on_gpu(gpu))
    if work.steps:
        step, judged = learning(config, lm, shape, device)
        found = replace(found, step=step, judged=judged)
    return found


def writing(config: TrainConfig, lm: LanguageModel) -> float:
    """Tokens that the model writes in a second, in as many conversations as a run has, once all of them have begun."""
    marks = [(time.perf_counter(), 0)]
    full = 0  # the first mark at which most conversations have got a token by one pass

    def watch(written: Written) -> None:
        nonlocal full
        if written.spent == marks[-1][1]:
            return  # a row was written
        marks.append((time.perf_counter(), written.spent))
        if not full and 2 * (written.spent - marks[-2][1]) >= lm.backend.num_slots:
            full = len(marks) - 1
        passes = len(marks) - 1 - full if full else 0
        if passes >= PASSES or (passes >= 2 and _past(marks[full], SECONDS)):
            raise _EnoughError
        if not full and _past(marks[1], MOST_SECONDS):  # a large model still reads how they begin
            raise _EnoughError

    prompts = None if config.text.prompts is None else read_prompt_file(config.text.prompts, lambda text: None)
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(_EnoughError):
        distill(lm, Path(scratch) / "text.jsonl", config.text.distilled(), prompts=prompts, on_progress=watch)
    if full and full < len(marks) - 1:
        first, last = marks[full], marks[-1]
        return (last[1] - first[1]) / max(1e-9, last[0] - first[0])
    return passes_alone(lm.backend)


def passes_alone(backend: Backend) -> float:
    """The same by passes over one more token of each of so many short texts, where conversations are slow to begin."""
    slots, text = range(backend.num_slots), [1] * min(16, backend.max_length - 2)
    trees = [PlainTree((1,), (-1,))] * len(slots)
    try:
        backend.extend(0, text)
        for slot in slots[1:]:
            backend.copy(0, slot, len(text))
        backend.verify(slots, trees)  # the first may take longer
        began, count = time.perf_counter(), 0
        while not count or (count < PASSES and time.perf_counter() - began < SECONDS):
            backend.verify(slots, trees)
            count += 1
        return count * len(slots) / (time.perf_counter() - began)
    finally:
        for slot in slots:
            backend.release(slot)


def _past(mark: tuple[float, int], seconds: float) -> bool:
    return time.perf_counter() - mark[0] > seconds


def reading(lm: LanguageModel) -> float:
    """Tokens of texts in a second, one text at a time."""
    backend = lm.backend
    count, started = min(64, backend.max_length), time.perf_counter()
    rate = seconds = 0.0
    while seconds < SECONDS:
        ids = [(7 * i + 3) % backend.vocab_size for i in range(count)]
        began = time.perf_counter()
        try:
            backend.extend(0, ids, every=True)
        finally:
            backend.release(0)
        now = time.perf_counter()
        rate, seconds = max(rate, count / (now - began)), now - started
        count = min(READ_TOKENS, backend.max_length, max(count, int(rate * SECONDS)))
        if seconds > SECONDS / 4 and count == min(READ_TOKENS, backend.max_length):
            break
    return rate


def reading_on_gpu(backend: TransformersBackend) -> float:
    """The same for many texts at once, as a GPU reads them."""
    rate = 0.0
    for rows in (1, 16, 32):  # the first ones warm up
        began = time.perf_counter()
        parts = backend.read_texts(
            torch.zeros(rows, min(READ_TOKENS, backend.max_length), dtype=torch.int64).to(backend.device)
        )
        float(parts[-1].float().sum())  # waits for the device
        rate = parts[-1][..., 0].numel() / (time.perf_counter() - began)
    return rate


class _RandomRows:
    """One batch of the right shape, again and again."""

    num_rows = NO_LIMIT

    def __init__(self, shape: HeadsConfig, ids: torch.Tensor, device: torch.device) -> None:
        self._shape, self._ids, self._device = shape, ids, device

    def batch(self, heads: int, size: int, finals: bool) -> Batch:
        generator = torch.Generator().manual_seed(0)
        tokens = self._ids[torch.randint(len(self._ids), (size, heads + 1), generator=generator)]
        features = torch.randn(size, self._shape.feature_size, generator=generator).bfloat16()
        states = features[:, None, -self._shape.hidden_size :].repeat(1, heads, 1) if finals else None
        return Batch(*(None if part is None else part.to(self._device) for part in (features, tokens, states)))  # type: ignore[arg-type]

    def batches(
        self, heads: int, size: int, *, seed: int, epoch: int, start: int = 0, finals: bool = False
    ) -> Iterator[Batch]:
        batch = self.batch(heads, size, finals)
        while True:
            yield batch

    def in_order(self, heads: int, size: int) -> Iterator[Batch]:
        yield self.batch(heads, size, finals=False)


def learning(config: TrainConfig, lm: LanguageModel, shape: HeadsConfig, device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and positions in a second of an evaluation, on random rows."""
    from accelerate import Accelerator

    base = lm.backend.base_weights()
    ids = torch.arange(shape.draft_vocab) if shape.draft_vocab else None
    heads = Heads(shape, base, ids)
    rows = _RandomRows(shape, torch.arange(shape.draft_vocab or shape.vocab_size), device)
    keep_freed_memory()
    marks: list[tuple[float, int]] = [(time.perf_counter(), 0)]

    def watch(progress: Progress) -> None:
        marks.append((time.perf_counter(), progress.step))
        if marks[-1][1] >= STEPS or marks[-1][0] - marks[0][0] > SECONDS:
            raise _EnoughError

    accelerator = Accelerator(cpu=device.type == "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            heads,
            base.lm_head if ids is None else base.lm_head[ids.to(base.lm_head.device)],
            rows,
            rows,
            replace(config.training, seconds=None, max_steps=None, eval_every=NO_LIMIT, save_every=NO_LIMIT),
            Path(scratch),
            accelerator=accelerator,
            facts={},
            on_progress=watch,
        )
        with contextlib.suppress(_EnoughError):
            trainer.run()
    accelerator.free_memory()
    first, last = marks[1 if len(marks) > 2 else 0], marks[-1]  # the first step takes longer
    size = min(JUDGED, config.training.batch_size)
    began = time.perf_counter()
    ranks(heads.eval(), rows.in_order(shape.num_heads, size))
    return (last[0] - first[0]) / (last[1] - first[1]), size / (time.perf_counter() - began)
