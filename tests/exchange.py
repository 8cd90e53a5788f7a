"""A tiny model on disk, tiny heads for it, and checkpoints of other projects as they would have written them."""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa.api import LanguageModel
from medusa.engines.transformers import TransformersBackend
from medusa.heads.config import vocabulary_hash
from medusa.heads.file import load_heads, read_config, read_tensors, save_heads
from tiny_lm import END, random_heads, writer
from tiny_models import TOKENIZER_VOCAB, make_tokenizer

H, V = 32, TOKENIZER_VOCAB
TREE = (((0,), 0.5), ((1,), 0.25), ((0, 0), 0.3))
_ROOM = TemporaryDirectory(prefix="medusa-exchange-")
atexit.register(_ROOM.cleanup)


@cache
def base() -> Path:
    """The directory of the tiny model that all heads here belong to."""
    directory = Path(_ROOM.name) / "tiny-base"
    writer().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def heads_in(directory: Path, *, dtype: torch.dtype = torch.float32, same_layers: bool = False, **changes: Any) -> Path:
    """Saves heads for the tiny model; residual ones unless `changes` say another kind."""
    settings = {
        "kind": "residual",
        "num_heads": 2,
        "base_model": str(base()),
        "vocab_hash": vocabulary_hash(make_tokenizer().get_vocab()),
        **changes,
    }
    heads = random_heads(writer(), **settings)
    if same_layers:
        for layers in heads.blocks:
            for layer in list(layers)[1:]:
                layer.load_state_dict(layers[0].state_dict())
    save_heads(heads, directory, dtype)
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return read_tensors(directory, read_config(directory))


def said_with(directory: Path) -> tuple[str, int]:
    """A text by the tiny model with these heads, and in how many steps."""
    backend = TransformersBackend(writer())
    heads = load_heads(directory, backend.base_weights())
    lm = LanguageModel("tiny", make_tokenizer(), backend, heads=heads, drafter="heads", nodes=8, eos_token_ids=[END])
    answer = lm.generate("The sky", max_new_tokens=24)
    return answer.text, answer.stats.steps


def inventory(directory: Path) -> dict[str, Any]:
    """What an engine sees of a directory: its files, config, and the tensors' names, shapes and dtypes."""
    found: dict[str, Any] = {
        "files": sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    }
    found["config"] = json.loads((directory / "config.json").read_text())
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.pt"), *directory.glob("*.bin")]):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, weights_only=True)
        found[path.name] = {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in sorted(tensors.items())
        }
    return found


# --- as others write them ---------------------------------------------------------------------------------------------


def residual(heads: int = 2, layers: int = 1, lm_heads: bool = True, seed: int = 3, size: int = H) -> dict[str, Tensor]:
    """Tensors by the original project's names."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for h in range(heads):
        for i in range(layers):
            made[f"{h}.{i}.linear.weight"] = 0.1 * torch.randn(size, size, generator=generator)
            made[f"{h}.{i}.linear.bias"] = 0.1 * torch.randn(size, generator=generator)
        if lm_heads:
            made[f"{h}.{layers}.weight"] = torch.randn(V, size, generator=generator)
    return made


def original(directory: Path, tensors: Mapping[str, Tensor], *, name: str = "medusa_lm_head.pt", **config: Any) -> Path:
    """A directory of FasterDecoding v0.1."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"base_model_name_or_path": str(base()), "medusa_num_heads": 2, "medusa_num_layers": 1, **config}
    (directory / "config.json").write_text(json.dumps(settings))
    write(directory / name, tensors)
    return directory


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(dict(tensors), path)
    else:
        torch.save(dict(tensors), path)
