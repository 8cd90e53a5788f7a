"""Reading weights that others wrote: safetensors, and pickles of which nothing is executed.

Tensors are read one by one where the file allows it: a checkpoint may hold a whole model. What they are called is for
the formats (`layouts.py`); this file knows only names, and that each comes once.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medusa.errors import MedusaError, first_sentence

PICKLES = (".pt", ".bin", ".pth")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Tensors(Mapping[str, Tensor]):
    """Names -> tensors, read when asked for. `files` are those that hold them."""

    readers: Mapping[str, Callable[[], Tensor]]
    files: tuple[Path, ...]

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def open_tensors(files: list[Path]) -> Tensors:
    """The tensors of some files. Raises MedusaError: a file is missing, damaged, not what its name says, or holds
    more than tensors; a tensor comes twice."""
    readers: dict[str, Callable[[], Tensor]] = {}
    for path in files:
        if not path.is_file():
            raise MedusaError(f"{path} is missing")
        with path.open("rb") as file:
            start = file.read(len(_LFS))
        if start == _LFS:
            raise MedusaError(f"{path} is only a pointer of Git LFS: get the file itself with git lfs pull")
        found = _pickled(path) if path.suffix in PICKLES else _safetensors(path)
        if twice := sorted(readers.keys() & found.keys()):
            raise MedusaError(f"{twice[0]} comes twice, also in {path}: keep one of the files")
        readers |= found
    return Tensors(readers, tuple(files))


def shards(index: Path) -> list[Path]:
    """The files that an index (`model.safetensors.index.json`) lists. Raises MedusaError."""
    data = read_json(index)
    names = data.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise MedusaError(f"{index} has no weight_map of files: get the file again")
    if outside := sorted(name for name in names.values() if Path(name).name != name):
        raise MedusaError(f"{index} names {outside[0]}, which does not lie beside it")
    return [index.parent / name for name in sorted(set(names.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises MedusaError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MedusaError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise MedusaError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise MedusaError(f"{path} is not a JSON object")
    return data


def _safetensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        _check_names(path)
        # The library's handle is for a `with`, which would unmap the file: it lives as long as the readers.
        file: Any = safe_open(path, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]
        names = list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise MedusaError(
            f"{path} is truncated or not a safetensors file ({first_sentence(error)}): get it again"
        ) from None

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: file.get_tensor(name)

    return {name: reader(name) for name in names}


def _check_names(path: Path) -> None:
    """Raises MedusaError for a name that the header has twice: the library would take the last without a word."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("the header is cut short")
        header = file.read(size)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
        if count > 1:
            raise MedusaError(f"{path} holds {name} twice")
        return dict(pairs)

    json.loads(header, object_pairs_hook=once)


def _pickled(path: Path) -> dict[str, Callable[[], Tensor]]:
    """The tensors of a pickle. `weights_only` reads tensors and plain containers; whatever else a pickle asks for is
    refused before it is run."""
    try:
        with warnings.catch_warnings():  # about protocols and archives that are refused anyway
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = str(error).rpartition("WeightsUnpickler error: ")[2]
        if not re.search(r"\bglobal\b|\breduce\b|\bREDUCE\b|\bGLOBAL\b", detail):
            raise MedusaError(
                f"{path} is damaged or no pickle as PyTorch writes them; nothing of it was executed: get it again"
            ) from None
        raise MedusaError(
            f"{path} asks for code to be run, which a file of weights has no need of; nothing of it was executed: "
            "get the weights as safetensors"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # the bytes are anyone's, and what torch raises for them is of many kinds
        raise MedusaError(
            f"{path} is truncated or not a file of PyTorch ({first_sentence(error)}): get it again"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise MedusaError(f"{path} holds no tensors by name")
    if other := sorted(name for name, tensor in data.items() if not isinstance(tensor, Tensor)):
        raise MedusaError(f"{path} holds {other[0]}, which is no tensor")

    def reader(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    return {name: reader(tensor) for name, tensor in data.items()}
