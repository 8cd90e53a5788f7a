"""The text of a run: what the model writes or a data set holds, read, cut and split."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from medusa.engines.protocol import MAX_NODES, Backend
from medusa.errors import MedusaError
from medusa.settings import OptimiserSettings, TextSettings
from medusa.training.data import Example, Reader, read_prompts
from medusa.training.device_features import SHARE, free_memory
from medusa.training.distill import Prompt, Written, distill
from medusa.training.features import count_rows
from medusa.training.stored_features import FeatureStore

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from medusa.api import LanguageModel


class Reporter(Protocol):
    """Where a run says how far it is."""

    def stage(self, title: str) -> None:
        """A part of the run begins."""
        ...

    def progress(self, done: int, total: int, text: str) -> None: ...

    def say(self, text: str) -> None: ...


class Silent:
    """Says nothing: for all processes but one."""

    def stage(self, title: str) -> None: ...

    def progress(self, done: int, total: int, text: str) -> None: ...

    def say(self, text: str) -> None: ...


SLOTS, GPU_SLOTS = 24, 1024  # where nothing is asked for


def slots_that_fit(
    shape: Any, slots: int | None, length: int, device: str = "cpu", dtype: str = "bfloat16"
) -> tuple[int, int]:
    """How many slots of how many positions to ask for: at most those wanted, positions within the context, and no more
    slots than their KV cache finds room for in a third of the free memory, or in more than half of a GPU's. `shape` is
    a model's configuration."""
    gpu = device.startswith("cuda") and torch.cuda.is_available()
    slots = slots or (GPU_SLOTS if gpu else SLOTS)
    context = getattr(shape, "max_position_embeddings", None) or length
    length = min(length, context)
    bytes_per_place = cache_bytes(shape)
    if gpu:
        room = free_memory(torch.device(device)) - SHARE * weight_bytes(shape, dtype)  # which are not there yet
        fitting = int(room // (bytes_per_place * (length + MAX_NODES)))
    else:
        import psutil

        fitting = int(psutil.virtual_memory().available / 3 // (bytes_per_place * length))
    return max(1, min(slots, fitting)), length


def weight_bytes(shape: PreTrainedConfig, dtype: str) -> int:
    """What the weights of a model of this configuration take. Of few bits are those of the layers alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    width, whole = {"float32": (4, 4), "int8": (1.1, 2), "int4": (0.6, 2)}.get(dtype, (2, 2))  # with their scales
    total = sum(parameter.numel() for parameter in model.parameters())
    ends = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    outer = sum(weight.numel() for weight in ends)
    return int(width * (total - outer) + whole * outer)


def cache_bytes(shape: Any, element: int = 2) -> int:
    """What the KV cache takes for one position, with numbers of so many bytes. `shape` is a model's configuration."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * element * int(shape.num_hidden_layers * heads * size)


def keeps_features(config: OptimiserSettings, backend: Backend) -> bool:
    """Whether hidden states are kept while the model writes: only where others in the same pass do not change them."""
    return config.cache_features and backend.same_bits


def write_text(
    config: TextSettings, lm: LanguageModel, out: Path, reporter: Reporter, features: FeatureStore | None = None
) -> None:
    """The model's own text, to the file `out`, and to `features` what decoding has computed of it."""
    reporter.stage("Writing text")
    prompts = None if config.prompts is None else read_prompt_file(config.prompts, reporter.say)
    written = distill(
        *(lm, out, config.distilled()),
        prompts=prompts,
        on_progress=shown_by(reporter),
        seconds=config.seconds,
        features=features,
    )
    reporter.say(written.summary())


def read_text(sources: Sequence[str], lm: LanguageModel, limit: int, report: Callable[[str], None]) -> list[Example]:
    """All that can be learned from, in order, each text cut to `limit` tokens. Raises MedusaError for too little."""
    reader = Reader(lm.tokenizer, lm.name, lm.backend.vocab_size, report)
    limit = min(limit, lm.backend.max_length)
    conversations = [
        [cut(row, limit) for row in rows if count_rows(row, limit)]
        for rows in by_conversation(reader.examples(sources))
    ]
    if silent := conversations.count([]):
        report(f"{silent} conversations have nothing to learn from (no answer) and are skipped")
    if len(conversations) - silent < 2:
        raise MedusaError("training needs at least two conversations with an answer: one of them measures the heads")
    return [*chain.from_iterable(conversations)]


def by_conversation(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The rows of a conversation, which have the same place, together."""
    return (list(rows) for _, rows in groupby(examples, key=attrgetter("where")))


def cut(example: Example, limit: int) -> Example:
    """The first `limit` tokens."""
    spans = tuple((start, min(end, limit)) for start, end in example.spans if start < limit)
    return replace(example, token_ids=example.token_ids[:limit], spans=spans)


def split(examples: Sequence[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """What is learned from, and every n-th conversation to measure with."""
    every = max(2, round(1 / held_out))
    conversations = list(by_conversation(examples))
    measured = [row for rows in conversations[::every] for row in rows]
    del conversations[::every]
    return [row for rows in conversations for row in rows], measured


def text_digest(examples: Sequence[Example]) -> str:
    """Of the tokens and labels learned from and measured with, whatever file they were in."""
    lines = sorted(json.dumps([example.token_ids, example.spans]) for example in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shown_by(reporter: Reporter) -> Callable[[Written], None]:
    """What shows on a reporter how far distilling is."""

    def show(written: Written) -> None:
        text = f"{written.rows} conversations, {written.tokens_per_second:.0f} tokens/s"
        if (left := written.seconds_left) is not None:
            text += f", {math.ceil(left / 60)} min left"
        reporter.progress(min(written.tokens, written.wanted), written.wanted, text)

    return show


def read_prompt_file(path: str, report: Callable[[str], None]) -> list[Prompt]:
    """What users say, from a file of prompts or conversations."""
    return [
        Prompt(
            tuple(message["content"] for message in conversation.messages if message["role"] == "user"),
            next((message["content"] for message in conversation.messages if message["role"] == "system"), None),
        )
        for conversation in read_prompts(path, report)
    ]


def frequent_tokens(examples: Sequence[Example], vocab: int, count: int, always: Sequence[int]) -> Tensor:
    """The `count` tokens that answers hold most often, ascending; those in `always` are among them."""
    tokens = [torch.tensor(e.token_ids[start:end]) for e in examples for start, end in e.spans]
    frequency = torch.bincount(torch.cat(tokens), minlength=vocab)
    frequency[list(always)] = int(frequency.max()) + 1
    return frequency.argsort(descending=True, stable=True)[:count].sort().values
