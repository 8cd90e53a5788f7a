"""The weights of a GGUF file, read where they lie, under the names and with the values of a converted checkpoint.

The engine unpacks and packs one layer after another out of the mapped file, so no second copy is ever made. Formats
that it does not read are unpacked here, a tensor at a time.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medusa.engines.native import native_module, tensor_names
from medusa.errors import MedusaError

if TYPE_CHECKING:
    from medusa.engines.native_config import NativeConfig

# Architectures whose tensors are known: are the rows of q and k in pairs, as llama.cpp's converter lays out those of
# Llama models?
PAIRED = {"llama": True, "qwen2": False, "qwen3": False}
_ROWS = 4096  # unpacked in one go
_FORGET_SECONDS = 0.02


def names_in_file(architecture: str, config: NativeConfig) -> dict[str, str]:
    """The tensors of a model: a checkpoint's name -> the file's."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], len(config.layers))
    return {
        name: f"{names.get_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}" for name in tensor_names(config)
    }


def shapes_in_file(architecture: str, config: NativeConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model: the file's name -> shape."""
    c, queries, keys = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {
        "q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": c.hidden_size, "gate_proj": c.intermediate_size,
        "up_proj": c.intermediate_size, "down_proj": c.hidden_size, "embed_tokens": c.vocab_size,
        "lm_head": c.vocab_size, "q_norm": c.head_dim, "k_norm": c.head_dim,
    }  # fmt: skip
    columns = {"o_proj": queries, "down_proj": c.intermediate_size}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, held in names_in_file(architecture, config).items():
        *_, module, kind = name.split(".")
        size = rows.get(module, c.hidden_size)  # the norms of a layer are as wide as the hidden state
        is_vector = kind == "bias" or module.endswith("norm")
        shapes[held] = (size,) if is_vector else (size, columns.get(module, c.hidden_size))
    return shapes


class GgufWeights(Mapping[str, Any]):
    """name -> weight: a `medusa_native.Packed` in the file, or a bfloat16 tensor.

    Raises:
        MedusaError: the file is damaged, or lacks a tensor.
    """

    def __init__(self, path: Path, config: NativeConfig) -> None:
        from medusa.models.gguf_reader import open_reader

        reader = open_reader(path, texts=False)
        architecture = str(reader.metadata["general.architecture"])
        self._map: Any = reader.data
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._names = names_in_file(architecture, config)
        if missing := sorted(set(self._names.values()) - self._tensors.keys()):
            raise incomplete(path, missing)
        module = native_module()
        self._packed = getattr(module, "Packed", None)  # an earlier build has none, and all is unpacked here
        self._kinds: Iterable[str] = getattr(module, "PACKED_KINDS", ())
        heads = {"q_proj.weight": config.heads, "k_proj.weight": config.kv_heads}
        self._heads = heads if PAIRED[architecture] else {}

    def __getitem__(self, name: str) -> Any:
        tensor = self._tensors[self._names[name]]
        data, kind = np.asarray(tensor.data), tensor.tensor_type
        for part, heads in self._heads.items():
            if name.endswith(part):  # from pairs to halves; each row is whole in itself, packed or not
                data = np.ascontiguousarray(data.reshape(heads, -1, 2, data.shape[1]).swapaxes(1, 2)).reshape(
                    data.shape
                )
        if self._packed is not None and kind.name in self._kinds and data.ndim == 2:
            return self._packed(data, kind.name, int(tensor.shape[0]))
        return _unpacked(data, kind, tuple(int(size) for size in reversed(tensor.shape)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Meanwhile, what has been read is given back to the system every few milliseconds: its own cache still has it
        where it is read again, and the process does not hold a file and what is packed of it at once."""
        done = threading.Event()

        def forget() -> None:
            while not done.wait(_FORGET_SECONDS):
                self._forget()

        thread = threading.Thread(target=forget, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._forget()

    def _forget(self) -> None:
        # Not on every system; without it the pages stay, as a cache that the system may drop.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._map._mmap.madvise(mmap.MADV_DONTNEED)


def _unpacked(data: np.ndarray, kind: Any, shape: tuple[int, ...]) -> Tensor:
    """Weights in bfloat16, a few rows at a time."""
    from gguf.quants import dequantize

    if data.ndim == 1:  # whose numbers are not those of its bytes
        return _unpacked(data[None], kind, (1, *shape))[0]
    out = torch.empty(shape, dtype=torch.bfloat16)
    for first in range(0, len(data), _ROWS):
        try:
            rows = np.array(dequantize(data[first : first + _ROWS], kind), dtype=np.float32)
        except NotImplementedError:
            raise MedusaError(f"there are weights of the type {kind.name}, which nothing here unpacks") from None
        out[first : first + _ROWS] = torch.from_numpy(rows)
    return out


def incomplete(path: Path, missing: list[str]) -> MedusaError:
    others = f" and {len(missing) - 1} more are missing" if len(missing) > 1 else " is missing"
    return MedusaError(f"{path} is incomplete: {missing[0]}{others}; get the file again")
