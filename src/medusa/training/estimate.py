"""What a run will take here, told before it starts: time by the speeds of this machine, memory, disk, and what gain to
expect. Pure arithmetic; `speeds.py` measures, `budget.py` turns it round and fits a run to a time.

Tokens are those of answers that are kept, unless something else is said.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa.errors import MedusaError
from medusa.heads.config import HeadsConfig
from medusa.heads.module import BaseWeights, Heads
from medusa.training.config import TrainConfig
from medusa.training.data import Example
from medusa.training.features import count_rows
from medusa.training.resume import TEXT_FILE
from medusa.training.stored_features import FEATURES_DIR, rows_in
from medusa.training.text import cache_bytes
from medusa.training.trainer import CHECKPOINT

# What was measured of texts that smollm2-135m wrote (docs/decisions.md).
KEPT = 0.8  # share of the tokens that a model writes, questions and dropped ones among them
READ = 1.4  # tokens of a conversation, template and questions too, for one of an answer
LOST = 400  # tokens that are lost in each slot where the writing ends: long conversations are still under way
TEXT_BYTES = 20  # of text.jsonl, for a token of an answer
END = 15.0  # seconds: measuring the machine, pictures, files
# Tokens -> tokens per step of the best tree of 16 nodes after one epoch, and what twice the epochs add: 207k tokens
# gave 2.21 after one epoch and 2.44 after three, 1.62M 2.69 and (two) 2.75.
ONE_EPOCH = ((207_000, 2.21), (1_620_000, 2.69))
DOUBLED_EPOCHS = ((207_000, 0.145), (1_620_000, 0.06))
MEASURED_AT = "docs/decisions.md"


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of this machine with this model and these heads; infinite, or 0 seconds, where it was not asked for."""

    written: float = math.inf  # tokens/s that the model writes, kept or not
    read: float = math.inf  # tokens/s of whole texts
    step: float = 0.0  # seconds
    judged: float = math.inf  # positions/s, of an evaluation


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done."""

    write: int  # tokens
    read: int  # tokens of whole texts whose hidden states are to be read
    rows: int  # to learn from
    held_out: int  # rows
    steps: int
    epochs: int  # that these steps begin
    stored: int  # rows that still go to disk
    lost: int = 0  # tokens that the model writes for nothing, where the writing ends
    write_seconds: float = math.inf  # after which the writing ends
    train_seconds: float = math.inf

    @property
    def trivial(self) -> bool:
        return not (self.write or self.steps)

    def seconds(self, speeds: Speeds) -> dict[str, float]:
        """Stage -> how long it takes; those that are done are left out."""
        stages = {
            "write": min(self.write_seconds, (self.write / KEPT + self.lost) / speeds.written) if self.write else 0.0,
            "read": self.read / speeds.read,
            "train": min(self.train_seconds, self.steps * speeds.step + self.epochs * self.held_out / speeds.judged),
        }
        return {name: seconds for name, seconds in stages.items() if seconds}


@dataclass(frozen=True, slots=True)
class Place:
    """What the estimate knows of the model, the heads and the directory of the run."""

    out: Path
    shape: HeadsConfig
    slots: int
    max_length: int
    on_gpu: bool = False  # hidden states stay there
    keeps: bool = False  # what the model writes comes with its hidden states


def work_of(config: TrainConfig, place: Place, texts: Sequence[Sequence[Example]] = ()) -> Work:
    """What a run still has to do. `texts` are those learned from and held out, where they are there already."""
    out, training = place.out, config.training
    learning = (out / CHECKPOINT).is_file()  # so the text is whole, and the hidden states are read
    lost = write = before = 0
    if texts:
        rows, held_out = (sum(count_rows(example, place.max_length) for example in part) for part in texts)
        read = sum(len(example.token_ids) for part in texts for example in part)
    else:
        tokens = config.text.tokens or 0
        held_out = math.ceil(tokens * config.text.held_out)
        rows, read = tokens - held_out, math.ceil(READ * tokens)
        before = _tokens_in(out / TEXT_FILE)
        write = 0 if learning else max(0, tokens - before)
        if write and config.text.prompts is None:
            longest = config.text.turns * config.text.max_answer_tokens
            lost = place.slots * min(LOST, longest)
    batch = min(training.batch_size, max(1, rows))
    steps = min(training.epochs * (rows // batch), training.max_steps or 2**63)
    epochs = math.ceil(steps * batch / max(1, rows))
    begun = _last_step(out / "log.jsonl") if learning else 0
    stored = held_out + (rows if training.cache_features else 0)
    there = stored if learning else min(stored, rows_in(out / FEATURES_DIR))
    share = held_out / max(1, rows + held_out)
    if place.on_gpu:
        stored, times = 0, 1.0
    else:
        left = max(0, stored - there)
        unread = max(0, min(stored, before) - there) if place.keeps and not texts else left
        times = unread / max(1, stored)
        if not training.cache_features:
            times = times * share + (1 - share) * epochs * (1 - begun / max(1, steps))
        stored = left
    return Work(
        write=write,
        read=0 if begun >= steps else math.ceil(read * times),
        rows=rows,
        held_out=held_out,
        steps=max(0, steps - begun),
        epochs=epochs,
        stored=stored,
        lost=lost,
        write_seconds=config.text.seconds or math.inf,
        train_seconds=training.seconds or math.inf,
    )


# --- memory and disk ------------------------------------------------------------------------------------------------


def disk_bytes(work: Work, place: Place) -> int:
    """What the run will add to its directory: hidden states in bfloat16, text, checkpoint and heads."""
    features = work.stored * place.shape.feature_size * 2
    return features + TEXT_BYTES * work.write + 20 * parameters(place.shape)


def check_disk(work: Work, place: Place, cached: bool) -> None:
    """Raises MedusaError where there is no room for the hidden states."""
    needed, free = disk_bytes(work, place), free_disk(place.out)
    if needed <= free:
        return
    fewer = "take fewer --tokens" if work.write else "learn from less text"
    instead = ", or read them anew in each epoch (training.cache_features=false)" if cached else ""
    raise MedusaError(
        f"{place.out} will take {size(needed)}, most of it hidden states of {work.stored:,} tokens, and {size(free)} "
        f"are free there: make room or name another --out, {fewer}{instead}"
    )


def free_disk(out: Path) -> int:
    """Bytes, where a directory is or will be."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def memory_bytes(config: TrainConfig, place: Place, model: Any, device: str) -> int:
    """What comes on top of the loaded weights, at most: caches of the conversations that are written, then heads with
    gradients, optimiser, the best so far, and what a step keeps of its batch. `model` is the model's configuration."""
    shape, training = place.shape, config.training
    element = 4 if config.engine.dtype == "float32" else 2
    cache = cache_bytes(model, element) * place.slots * place.max_length
    logits: int = training.batch_size * (shape.draft_vocab or shape.vocab_size) * shape.num_heads
    # In half and whole precision, their logarithms, gradients of both; of a teacher too.
    step = logits * (16 + (14 if training.distillation else 0)) + 8 * training.batch_size * shape.feature_size
    learning = 20 * parameters(shape) + step
    return max(cache, learning) if device == "cuda" else cache + learning  # a GPU's caches are made small in between


def parameters(shape: HeadsConfig) -> int:
    """How many numbers heads of that shape learn."""
    with torch.device("meta"):
        rows = torch.empty(shape.vocab_size, shape.hidden_size)
        ids = torch.arange(shape.draft_vocab) if shape.draft_vocab else None
        return Heads(shape, BaseWeights(rows, rows), ids).num_parameters()


# --- the gain ---------------------------------------------------------------------------------------------------------


def interpolated(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Between two measured points by the logarithm of the tokens; outside of them the nearest."""
    (first, low), (last, high) = points
    share = math.log(tokens / first) / math.log(last / first)
    return low + (high - low) * min(1.0, max(0.0, share))


def expected_gain(tokens: float, epochs: float) -> float:
    """Tokens per step with 16 nodes, after so many epochs of so many tokens; see ONE_EPOCH."""
    per = interpolated(DOUBLED_EPOCHS, tokens)
    return interpolated(ONE_EPOCH, tokens) + per * math.log2(max(1.0, min(epochs, 3.0)))


def gain_told(work: Work, batch_size: int, kind: str) -> str:
    """What gain to expect, for people, with what is known of it."""
    seen = min(work.rows, work.steps * batch_size) or work.rows
    (least, _), (most, _) = ONE_EPOCH
    gain = expected_gain(seen, work.epochs)
    about = f"under {gain:.1f}" if seen < least else f"about {gain:.1f}" if seen <= most else "about 2.7"
    text = (
        f"Expect {about} tokens per step with 16 nodes, by recurrent heads of smollm2-135m on text of its own: 2.44 "
        f"after {least:,} tokens and 2.75 after {most:,}, of older questions; 2.74 after 8,500,000 of harder ones "
        f"({MEASURED_AT}). Other models and texts differ"
    )
    return text + ("; residual heads had 1.89 where recurrent ones had 2.24." if kind == "residual" else ".")


# --- words ------------------------------------------------------------------------------------------------------------


def told(work: Work, speeds: Speeds | None, memory: tuple[int, int], disk: tuple[int, int]) -> list[str]:
    """A table. `memory` and `disk` are bytes needed and free; `speeds` are None where they were not measured."""
    found = {} if speeds is None else work.seconds(speeds)
    rows = []
    if work.write:
        rows.append((f"write {work.write:,} tokens of answers", found.get("write")))
    if work.read:
        rows.append((f"read hidden states of {work.read:,} tokens", found.get("read")))
    if work.steps:
        rows.append((f"train {work.steps:,} steps", found.get("train")))
    if speeds is not None:
        rows.append(("in all", sum(found.values()) + END))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:{width}}  {'' if seconds is None else duration(seconds)}".rstrip() for name, seconds in rows]
    for name, (needed, free) in (("memory, up to", memory), ("disk", disk)):
        lines.append(f"  {name:{width}}  {size(needed)} ({size(free)} free)")
    how = "by a short measurement" if speeds is not None else "times are measured in one process alone"
    return [f"What this will take here ({how}):", *lines]


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{math.ceil(count / 1e6)} MB"


# --- what is there ----------------------------------------------------------------------------------------------------


def _tokens_in(path: Path) -> int:
    """Tokens of answers in a text that was begun; whether it is sound, others look."""
    count = 0
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    count += sum(end - start for start, end in json.loads(line)["labels"])
                except (ValueError, KeyError, TypeError):
                    break
    return count


def _last_step(path: Path) -> int:
    """Of the training of heads, as the log has it."""
    step = 0
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    step = max(step, 0 if "stage" in entry else int(entry["step"]))
                except (ValueError, KeyError, TypeError):
                    continue
    return step
