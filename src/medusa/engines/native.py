"""The native CPU engine (`native/`) as a `Backend`: models of the Llama kind, from their safetensors.

Its promise: what is computed for a token does not depend on how many tokens, trees or rows share the pass, nor on the
number of threads. Greedy and seeded texts are therefore the same bits plainly and with any draft, in every precision.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medusa.engines.native_config import NativeConfig, UnsupportedError
from medusa.engines.protocol import TokenTree, check_feature_layers, check_max_length, check_room, check_slots
from medusa.errors import MedusaError, UsageError
from medusa.heads.module import BaseWeights

if TYPE_CHECKING:
    from types import ModuleType

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
ISA_VARIABLE = "MEDUSA_NATIVE_ISA"
ADAPTER = "adapter_config.json"
_UNPACKED_ROWS = 4096  # at a time
# Bytes for each weight, roughly: to tell before loading whether there is room.
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.05, "int4": 0.7}


def native_module() -> ModuleType | None:
    """The extension module, or None where it is not installed."""
    try:
        return importlib.import_module("medusa_native")
    except ModuleNotFoundError as error:
        if error.name != "medusa_native":
            raise
        return None


class NativeBackend:
    """Runs a checkpoint with `num_slots` slots.

    Args:
        config: of the model.
        tensors: name -> weight, float32, bfloat16 or float16, as in the checkpoint, or `medusa_native.Packed`. Each is
            read once, but for the embeddings and the LM head, which stay where they are.
        dtype: float32, bfloat16, int8 (groups of 64 weights) or int4 (groups of 32); see docs/native.md.
        max_length: positions per slot; None takes the model's context (at most 32,768).
        feature_layers: hidden states that the heads read beside the final one (see HeadsConfig).
        threads: None takes torch's number.
        isa: the instruction set; None takes $MEDUSA_NATIVE_ISA, or the best.
        on_progress: called with (done, total) as layers are packed.

    Raises:
        UsageError: a bad argument. UnsupportedError: the checkpoint is not what `config` says.
        MedusaError: a weight that is missing, of the wrong shape or not a finite number; or memory is short.
    """

    name = "native"
    padding = 0  # the engine computes what the trees hold

    def __init__(
        self,
        config: NativeConfig,
        tensors: Mapping[str, Any],
        *,
        dtype: str = "bfloat16",
        num_slots: int = 1,
        max_length: int | None = None,
        feature_layers: Sequence[int] = (),
        threads: int | None = None,
        isa: str | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        module = native_module()
        if module is None:
            raise MedusaError("the native engine is not installed: run pip install ./native, or use another backend")
        if dtype not in PRECISIONS:
            raise UsageError(f"unknown dtype {dtype}: use one of {', '.join(PRECISIONS)}")
        check_slots(num_slots)
        self.config = config
        self.num_slots = num_slots
        self.num_layers = len(config.layers)
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_length = check_max_length(max_length, config.context)
        check_feature_layers(feature_layers, self.num_layers)
        self.max_nodes: int = module.MAX_NODES
        self.same_bits = True
        self._chunk: int = module.CHUNK
        names = _Names(config, tensors)
        _check_memory(names.matrix_size(), dtype)
        with explained():
            self.engine: Any = module.Engine(
                hidden_size=config.hidden_size,
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                rotary_dim=2 * len(config.inverse_frequencies),
                intermediate_size=config.intermediate_size,
                vocab_size=config.vocab_size,
                max_length=self.max_length,
                slots=num_slots,
                epsilon=config.epsilon,
                attention_scale=config.attention_scale,
                rotary_scale=config.rotary_scale,
                inverse_frequencies=list(config.inverse_frequencies),
                gate=config.gate,
                precision=dtype,
                layers=list(config.layers),
                feature_layers=list(feature_layers),
                threads=torch.get_num_threads() if threads is None else threads,
                isa=isa or os.environ.get(ISA_VARIABLE, ""),
            )
            for i in range(self.num_layers):
                self.engine.load_layer(i, names.layer(i))
                on_progress(i + 1, self.num_layers + 1)
            self._embedding = _without_gaps(names.embedding)  # read at each step, where they lie
            self._lm_head = self._embedding if names.lm_head is names.embedding else _without_gaps(names.lm_head)
            self.engine.load_ends(self._embedding, names.final_norm, self._lm_head)
            on_progress(self.num_layers + 1, self.num_layers + 1)
        self._plain: BaseWeights | None = None  # until somebody asks
        self.parameters = names.parameters

    # --- the protocol -------------------------------------------------------------------------------------------

    def extend(self, slot: int, token_ids: Sequence[int], every: bool = False) -> tuple[Tensor, Tensor]:
        held = self.length(slot)
        check_room(token_ids, held, self.max_length)
        rows = []
        with explained():
            try:
                for start in range(0, len(token_ids), self._chunk):
                    chunk = list(token_ids[start : start + self._chunk])
                    last = start + len(chunk) == len(token_ids)
                    logits, features = self.engine.extend(slot, chunk, last, every)
                    if every or last:
                        rows.append(features[0].copy())
            except BaseException:  # also Ctrl-C in a long text: a part of it must not stay
                if self.engine.length(slot) > held:  # else nothing has changed, and what was verified can be kept
                    self.engine.copy(slot, slot, held)
                raise
        read = torch.from_numpy(np.concatenate(rows))
        return torch.from_numpy(logits)[0, 0], read if every else read[0]

    def verify(self, slots: Sequence[int], drafts: Sequence[TokenTree]) -> tuple[Tensor, Tensor]:
        with explained():
            logits, features = self.engine.verify(
                list(slots),
                [len(draft.tokens) for draft in drafts],
                [token for draft in drafts for token in draft.tokens],
                [parent for draft in drafts for parent in draft.parents],
            )
        return torch.from_numpy(logits), torch.from_numpy(features.copy())

    def keep(self, slots: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        with explained():
            self.engine.keep(list(slots), [list(path) for path in paths])

    def copy(self, source: int, target: int, length: int) -> None:
        with explained():
            self.engine.copy(source, target, length)

    def release(self, slot: int) -> None:
        """Empties a slot. It keeps the memory of its first 1,024 positions (`medusa_native.KEPT`), up to the end of a
        page of 2 MiB, and gives the rest back."""
        with explained():
            self.engine.release(slot)

    def length(self, slot: int) -> int:
        with explained():
            return int(self.engine.length(slot))

    def base_weights(self) -> BaseWeights:
        if self._plain is None:
            embedding = _unpacked(self._embedding)
            self._plain = BaseWeights(
                embedding, embedding if self._lm_head is self._embedding else _unpacked(self._lm_head)
            )
        return self._plain

    def hollow_weights(self) -> BaseWeights:
        """The shapes of `base_weights`, all zeros, which take no memory: for heads that the engine packs, with rows of
        its own weights."""
        zeros = torch.zeros((), dtype=torch.bfloat16).expand(self.vocab_size, self.hidden_size)
        return BaseWeights(zeros, zeros)


def _without_gaps(weight: Any) -> Any:
    return weight.detach().contiguous() if isinstance(weight, Tensor) else weight


@contextmanager
def explained() -> Iterator[None]:
    """What the engine refuses, as an error for the user."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise (MedusaError if "finite" in message or "expected" in message else UsageError)(message) from None
    except TypeError as error:  # from the bindings, with a page of signatures
        raise UsageError("a slot, token, parent, node or length is not a whole number of 32 bits") from error
    except MemoryError:
        raise MedusaError("there is not enough memory: take a smaller dtype, model, max_length or num_slots") from None


class _Names:
    """The tensors of a checkpoint under the names that the engine gives them."""

    def __init__(self, config: NativeConfig, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._config = config
        self._sizes: dict[str, int] = {}
        self.embedding = self._get("model.embed_tokens.weight")
        self.lm_head = self.embedding if config.tied else self._get("lm_head.weight")
        if config.tied and "lm_head.weight" in tensors and not _same(tensors["lm_head.weight"], self.embedding):
            # The file is right and the configuration wrong, say transformers and whoever trained the LM head.
            raise UnsupportedError("tie_word_embeddings is set, but the LM head differs from the embeddings")
        self.final_norm = self._get("model.norm.weight")
        self._parts = _parts(config)
        known = {*tensor_names(config), "lm_head.weight"}
        # Old checkpoints hold the frequencies of the rotary embedding.
        unknown = [name for name in tensors if name not in known and not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise UnsupportedError(f"the checkpoint holds {min(unknown)}, which the engine does not know")

    def matrix_size(self) -> int:
        """How many weights the packed matrices hold, by the configuration."""
        c = self._config
        per_layer = c.hidden_size * (2 * c.head_dim * (c.heads + c.kv_heads) + 3 * c.intermediate_size)
        return per_layer * len(c.layers) + c.vocab_size * c.hidden_size

    @property
    def parameters(self) -> int:
        """How many weights have been asked for, each counted once."""
        return sum(self._sizes.values())

    def layer(self, index: int) -> dict[str, Any]:
        return {name: self._get(f"model.layers.{index}.{part}") for name, part in self._parts.items()}

    def _get(self, name: str) -> Any:
        try:
            tensor = self._tensors[name]
        except KeyError:
            raise UnsupportedError(f"the weights are incomplete: {name} is missing") from None
        self._sizes[name] = math.prod(tensor.shape)
        return tensor


def tensor_names(config: NativeConfig) -> list[str]:
    """The tensors of a checkpoint that the engine reads."""
    layers = [f"model.layers.{i}.{part}" for i in range(len(config.layers)) for part in _parts(config).values()]
    ends = ["model.embed_tokens.weight", "model.norm.weight", *([] if config.tied else ["lm_head.weight"])]
    return [*layers, *ends]


def _parts(c: NativeConfig) -> dict[str, str]:
    """The tensors of a layer: the engine's name -> that of the checkpoint."""
    mlp = ("gate", "up", "down")
    modules = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {name: f"mlp.{name}_proj" for name in mlp}
    biased = (*("qkv" if c.attention_bias else ""), *("o" if c.output_bias else ""), *(mlp if c.mlp_bias else ()))
    parts = {name: f"{module}.weight" for name, module in modules.items()}
    parts |= {f"{name}_bias": f"{modules[name]}.bias" for name in biased}
    parts |= {f"{name}_norm": f"self_attn.{name}_norm.weight" for name in ("qk" if c.qk_norm else "")}
    return parts | {"input_norm": "input_layernorm.weight", "post_norm": "post_attention_layernorm.weight"}


def _unpacked(matrix: Any) -> Tensor:
    """A matrix as a tensor, unpacked where it lies packed in a file."""
    if isinstance(matrix, Tensor):
        return matrix
    rows, columns = matrix.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    for first in range(0, rows, _UNPACKED_ROWS):
        count = min(_UNPACKED_ROWS, rows - first)
        out[first : first + count] = torch.from_numpy(matrix.unpack(first, count))
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


class Checkpoint(Mapping[str, Tensor]):
    """The safetensors files of a directory, memory-mapped: a tensor is read when it is asked for. As transformers does,
    it takes model.safetensors where that is there, or else what model.safetensors.index.json lists.

    Raises:
        UnsupportedError: there are none, they come with an adapter, or the index does not say what the files hold.
        MedusaError: a file is missing, truncated or not a safetensors file.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if (directory / ADAPTER).is_file():
            raise UnsupportedError(f"{ADAPTER} lies beside the weights, and the engine applies no adapters")
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        self._files: dict[str, Any] = {}
        held: set[tuple[str, str]] = set()  # (tensor, file)
        listed = None
        try:
            if single.is_file():
                names = {single.name}
            elif index.is_file():
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
                names = {name for _, name in listed}
            else:
                raise UnsupportedError("the checkpoint is not in safetensors files")
            for name in sorted(names):
                path = directory / name
                if not path.is_file():
                    raise MedusaError(f"the weights are incomplete: {path} is missing")
                # The library's handle is for a `with`, which would unmap the file: it lives as long as this object.
                file: Any = safe_open(path, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]
                self._files |= dict.fromkeys(file.keys(), file)
                held |= {(tensor, name) for tensor in file.keys()}  # noqa: SIM118  # it is no mapping
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MedusaError(
                f"a weights file in {directory} is damaged or cut short ({error}): get the file again"
            ) from None
        if listed is not None and (other := sorted(held ^ set(listed))):
            tensor, name = other[0]
            where = "which its index does not list" if (tensor, name) in held else "says its index, but it is missing"
            raise UnsupportedError(f"{name} holds {tensor}, {where}")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _check_memory(parameters: int, dtype: str) -> None:
    import psutil

    needed = parameters * _BYTES[dtype]
    available = psutil.virtual_memory().available
    if needed > available:
        raise MedusaError(
            f"the weights take {needed / 1e9:.1f} GB in {dtype}, but {available / 1e9:.1f} GB of memory are free: "
            "take a smaller dtype or model"
        )
