"""What a run leaves for others to load, each directory whole or not at all: heads, an adapted model, adapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from medusa.errors import MedusaError
from medusa.files import swapped_in, write_whole
from medusa.heads.file import save_heads
from medusa.heads.module import Heads
from medusa.models.quiet import quiet
from medusa.training.accuracy import Accuracy
from medusa.training.calibrate import draw
from medusa.training.config import TrainConfig
from medusa.training.resume import RUN_FILE

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_DIR = "model"
ADAPTER_DIR = "adapter"


def write_heads(heads: Heads, accuracy: Accuracy, directory: Path, config: TrainConfig) -> None:
    """The heads with what made them and pictures of how good they are. Raises MedusaError where there is no room."""
    with _written(directory):
        save_heads(heads, directory)
        write_whole(directory / RUN_FILE, config.dump())
        draw(accuracy, directory)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes weights as safetensors, configuration and tokenizer. Raises MedusaError: no room, or no permission."""
    with _written(directory), swapped_in(directory) as new, quiet():
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


def save_adapter(model: PeftModel, base: str, directory: Path) -> None:
    """Writes the adapters in peft's format, with a README; `base` is the model's name as a user knows it. Raises
    MedusaError: no room, or no permission."""
    model.peft_config["default"].base_model_name_or_path = base
    with _written(directory), swapped_in(directory) as new:
        model.save_pretrained(str(new), save_embedding_layers=False)
        (new / "README.md").write_text(_README.format(base=base), encoding="utf-8")


@contextmanager
def _written(directory: Path) -> Iterator[None]:
    """For code that writes `directory`: errors in one sentence. What a killed run left beside it is removed first."""
    for left in directory.parent.glob(f".{directory.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MedusaError(f"cannot write {directory}: {error}; make room and go on with --resume") from None


_README = """\
# LoRA adapter of {base} (Medusa-2)

It was trained together with the Medusa heads in `../heads`, which read the hidden states of the adapted model.

RUN is the directory above this one.

- Merge it: `medusa train --out RUN --resume lora.merge=true` writes `RUN/model`; then
  `medusa generate "..." --model RUN/model --heads RUN/heads`.
- Load it with peft: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "RUN/adapter")`.
"""
