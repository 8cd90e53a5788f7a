"""What importing and exporting ask of the model that heads belong to: its shape, its tokenizer, its LM head's rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.engines.native import Checkpoint
from medusa.engines.native_config import UnsupportedError
from medusa.errors import MedusaError
from medusa.heads.config import vocabulary_hash
from medusa.models import zoo
from medusa.models.fetched import FETCHED


@dataclass(frozen=True, slots=True)
class Base:
    """A model by name, of which only what is asked for is read."""

    source: zoo.ModelSource
    hidden_size: int
    vocab_size: int
    tied: bool  # its LM head is its embeddings

    @property
    def name(self) -> str:
        """What others know it by."""
        return self.source.hub_id or self.source.name

    def vocab_hash(self) -> str:
        return vocabulary_hash(zoo.load_tokenizer(self.source).get_vocab())

    def lm_head(self) -> Tensor:
        """Rows [V, H] of the LM head as the checkpoint stores them. Raises MedusaError."""
        name = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        shape, source = (self.vocab_size, self.hidden_size), zoo.unpacked(self.source)
        try:
            checkpoint = Checkpoint(zoo.local_directory(source))
            if name in checkpoint and _is_plain(stored := checkpoint[name], shape):
                return stored
        except UnsupportedError:
            pass
        # Another family's names, or weights that are quantised: what transformers makes of them.
        model = zoo.load_model(source, dtype=torch.float32)
        end = model.get_output_embeddings()
        if end is None or end.weight.shape != shape:
            raise MedusaError(f"{self.source.name} has no LM head of {shape[0]} rows: Medusa heads need one")
        rows: Tensor = end.weight.detach()
        return rows


def _is_plain(rows: Tensor, shape: tuple[int, int]) -> bool:
    return rows.shape == shape and rows.is_floating_point() and rows.element_size() >= 2


def find_base(model: str) -> Base:
    """Raises UsageError or MedusaError: there is no such model, or it does not say its sizes."""
    known = {file.hub_id: name for files in (zoo.SHORT_NAMES, FETCHED) for name, file in files.items()}
    source = zoo.resolve(known.get(model, model), in_place=True)
    config = zoo.load_config(source).get_text_config()
    try:
        return Base(source, int(config.hidden_size), int(config.vocab_size), bool(config.tie_word_embeddings))
    except (AttributeError, TypeError, ValueError):
        raise MedusaError(
            f"{model} does not say its hidden size and vocabulary: heads cannot be matched to it"
        ) from None
