"""Heads on disk: a directory with `config.json` and `heads.safetensors`, written whole and read with care."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa.errors import MedusaError, UsageError
from medusa.files import replacing, swapped_in
from medusa.heads import int8
from medusa.heads.config import HeadsConfig, check_shape, check_vocabulary
from medusa.heads.module import BaseWeights, Heads

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "heads.safetensors"
FORMAT = 1


def save_heads(heads: Heads, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes `config.json` and `heads.safetensors`; the directory appears whole or not at all. Heads that are there
    already are replaced, with all that lies beside them.

    Raises:
        UsageError: `directory` holds something else, which replacing it would delete.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else torch.int32).contiguous()
        for name, tensor in heads.state_dict().items()
    }
    if heads.config.weights == "int8":
        whole = {name: tensor.detach().cpu() for name, tensor in heads.state_dict().items()}
        tensors |= int8.packed({name: whole[name] for name, tensor in tensors.items() if tensor.ndim == 2})
    save_tensors(tensors, heads.config, directory)


def save_tensors(tensors: Mapping[str, Tensor], config: HeadsConfig, directory: str | Path) -> None:
    """`save_heads` for tensors by name, on the CPU and as they shall lie in the file."""
    directory = Path(directory)
    foreign = directory.exists() and not (directory / WEIGHTS_FILE).is_file()
    if foreign and (directory.is_file() or any(directory.iterdir())):
        raise UsageError(f"{directory} is there and does not hold heads: save to a new directory")
    with swapped_in(directory) as new:
        save_file(dict(tensors), new / WEIGHTS_FILE, metadata={"format": "pt"})
        write_config(config, new)


def write_config(config: HeadsConfig, directory: Path) -> None:
    """Writes `config.json`, whole or not at all."""
    data = {"format": FORMAT, **asdict(config)}
    if data["weights"] == "bfloat16":  # the only ones that earlier versions know
        del data["weights"]
    text = json.dumps(data, indent=1)
    # A list of numbers, and a path of the tree with its probability, on one line each. (No string holds a line's end.)
    text = re.sub(r"\[\n[\d.e,\s-]+\]", lambda numbers: "".join(numbers.group().split()).replace(",", ", "), text)
    text = re.sub(r"\[\n\s+(\[[\d, ]+\]),\n\s+([\d.e-]+)\n\s+\]", r"[\1, \2]", text)
    with replacing(directory / CONFIG_FILE) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def read_config(directory: str | Path) -> HeadsConfig:
    """The `config.json` of saved heads. Raises MedusaError when it is missing or not ours."""
    path = Path(directory) / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MedusaError(f"no heads in {directory}: {CONFIG_FILE} is missing") from None
    except (OSError, ValueError) as error:
        raise MedusaError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise MedusaError(f"{path} does not describe Medusa heads of format {FORMAT}")
    try:
        return HeadsConfig.from_json(data)
    except (UsageError, TypeError, ValueError) as error:
        raise MedusaError(f"{path} is not valid: {error}") from None


def load_heads(
    directory: str | Path,
    base: BaseWeights,
    *,
    vocab_hash: str = "",
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Heads:
    """Reads saved heads onto the device of `base`, refusing what does not fit exactly.

    Raises:
        MedusaError: missing, truncated or foreign file; another hidden size, vocabulary or head count; a weight that
            is not finite.
    """
    directory = Path(directory)
    config = read_config(directory)
    check_vocabulary(config, vocab_hash)
    vocab_size, hidden_size = base.embedding.shape
    check_shape(config, vocab_size, hidden_size, num_layers)
    tensors = read_tensors(directory, config)
    heads = Heads(config, base, tensors.get("draft_ids") if config.draft_vocab else None)
    heads.load_state_dict(tensors)
    return heads.to(base.embedding.device, dtype).eval().requires_grad_(False)


def read_tensors(directory: str | Path, config: HeadsConfig) -> dict[str, Tensor]:
    """The weights of saved heads by name, exactly those of `config` and all of them finite: as they lie in the file,
    but for those in 8 bits, which are unpacked.

    Raises:
        MedusaError: a file that is missing, truncated or foreign, or that holds other tensors.
    """
    path = Path(directory) / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise MedusaError(f"no heads in {directory}: {WEIGHTS_FILE} is missing") from None
    except PermissionError:
        raise MedusaError(f"cannot read {path}: permission denied") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise MedusaError(f"{path} is truncated or not a safetensors file: {error}") from None
    draft_ids = tensors.get("draft_ids") if config.draft_vocab else None
    if config.draft_vocab:
        if draft_ids is None or draft_ids.shape != (config.draft_vocab,):
            raise MedusaError(f"{path} lacks the draft vocabulary of {config.draft_vocab} tokens that its config names")
        if draft_ids.min() < 0 or draft_ids.max() >= config.vocab_size:
            raise MedusaError(f"{path} has draft tokens outside the vocabulary of {config.vocab_size}")
    if config.weights == "int8":
        if (name := int8.other_matrix(tensors)) is not None:
            raise MedusaError(f"{path} does not match its config: {name} is not in 8 bits with a scale")
        tensors = int8.unpacked(tensors)
    with torch.device("meta"):  # shapes alone
        rows = torch.empty(config.vocab_size, config.hidden_size)
        skeleton = Heads(config, BaseWeights(rows, rows), None if draft_ids is None else draft_ids.to("meta"))
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != stored:
        name = min(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
        raise MedusaError(
            f"{path} does not match its config ({config.num_heads} heads, kind {config.kind}): {name} is "
            f"{stored.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MedusaError(f"{path} has a weight that is not a finite number in {name}: train the heads again")
    return tensors
