"""What the tensors of parallel heads are called, whoever wrote them, and how they are put together.

A `Layout` is an inverse pair: `parse` turns a name into the part of a head that it is, `spell` a part into its name.
The layouts themselves are in `fasterdecoding.py` and `vllm.py`. Nothing is guessed here: a name that is not
understood, a part that is missing or there twice, another shape, each is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from medusa.errors import MedusaError

MAX_HEADS = 16  # what HeadsConfig takes
SHARED = -1  # the head of an LM head that all heads share


class Part(NamedTuple):
    """One tensor of the heads: a block's weight [H, H] or bias [H], or an LM head's rows [V, H]."""

    what: Literal["weight", "bias", "lm_head"]
    head: int
    layer: int  # of an LM head: how many layers come before it, where its name tells that, else -1


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of one format. `prefix` comes before each of them."""

    name: str
    parse: Callable[[str], Part | None]
    spell: Callable[[Part], str]
    prefix: str = ""

    def part(self, name: str) -> Part | None:
        return self.parse(name.removeprefix(self.prefix)) if name.startswith(self.prefix) else None


@dataclass(frozen=True, slots=True)
class ForeignHeads:
    """Parallel heads as a file holds them."""

    layout: str
    files: tuple[Path, ...]
    blocks: tuple[tuple[tuple[Tensor, Tensor], ...], ...]  # [K][L] of weight [H, H] and bias [H]
    lm_heads: tuple[Tensor, ...]  # K times [V, H]; one, where they share it; none: they end in the model's own
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_heads(self) -> int:
        return len(self.blocks)

    @property
    def num_layers(self) -> int:
        return len(self.blocks[0])

    @property
    def hidden_size(self) -> int:
        return self.blocks[0][0][0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest one that holds them all exactly."""
        dtype = self.blocks[0][0][0].dtype
        for tensor in (*(t for head in self.blocks for layer in head for t in layer), *self.lm_heads):
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype


def assemble(
    layout: Layout, names: Iterable[str], tensors: Mapping[str, Tensor], where: str, *, biases: bool = True
) -> tuple[tuple[tuple[tuple[Tensor, Tensor], ...], ...], tuple[Tensor, ...], tuple[str, ...]]:
    """Blocks, LM heads and notes of the tensors called `names`; see `ForeignHeads`. `biases`: false where the format
    allows heads without any, which are then zeros.

    Raises:
        MedusaError: a name that is not of this layout, a part that is missing or comes twice, a wrong shape, a tensor
            that holds no finite floating-point numbers.
    """
    found: dict[Part, str] = {}
    for name in sorted(names):
        part = layout.part(name)
        if part is None:
            raise MedusaError(f"{where} holds {name}, which is no part of Medusa heads ({layout.name})")
        if part in found:
            raise MedusaError(f"{where} holds {name} and {found[part]}, which are the same tensor")
        found[part] = name
    blocks = {part for part in found if part.what != "lm_head"}
    ends = {part for part in found if part.what == "lm_head"}
    if not blocks:
        raise MedusaError(f"{where} holds no blocks of heads: {layout.prefix + layout.spell(Part('weight', 0, 0))} ...")
    num_heads = 1 + max(part.head for part in found)
    if num_heads > MAX_HEADS:
        name = next(name for part, name in found.items() if part.head == num_heads - 1)
        raise MedusaError(f"{where} holds {name}: there may be at most {MAX_HEADS} heads")
    num_layers = _num_layers(found, where)
    notes: tuple[str, ...] = ()
    tied = {part.layer for part in blocks} == {0} and num_layers > 1
    if tied:
        notes = (f"one layer stands for all {num_layers} of each head",)
    bare = not biases and all(part.what == "weight" for part in blocks)
    if bare:
        notes = (*notes, "the layers have no biases: zeros")

    def named(part: Part) -> str:
        name = found.get(part)
        if name is None:
            raise MedusaError(f"{where} is incomplete: {layout.prefix + layout.spell(part)} is missing")
        return name

    first = tensors[named(Part("weight", 0, 0))]
    size = first.shape[0] if first.ndim == 2 else -1

    def read(part: Part, *shape: int) -> Tensor:
        name = named(part)
        tensor = tensors[name]
        if tensor.shape != shape:
            raise MedusaError(f"{where}: {name} has the shape {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise MedusaError(f"{where}: {name} is {_dtype(tensor)}, expected float32, bfloat16 or float16")
        if not bool(torch.isfinite(tensor).all()):
            raise MedusaError(f"{where}: {name} has a weight that is not a finite number")
        return tensor

    def block(head: int, layer: int) -> tuple[Tensor, Tensor]:
        layer = 0 if tied else layer
        weight = read(Part("weight", head, layer), size, size)
        return weight, torch.zeros(size, dtype=weight.dtype) if bare else read(Part("bias", head, layer), size)

    for part in sorted(blocks):
        if part.layer >= num_layers:
            raise MedusaError(f"{where} holds {found[part]}, but the heads have {num_layers} layers")
    layers = tuple(tuple(block(head, layer) for layer in range(num_layers)) for head in range(num_heads))
    rows: tuple[Tensor, ...] = ()
    if ends:
        end = next(iter(ends)).layer
        heads = [SHARED] if {part.head for part in ends} == {SHARED} else list(range(num_heads))
        vocab = tensors[named(Part("lm_head", heads[0], end))].shape[0]
        rows = tuple(read(Part("lm_head", head, end), vocab, size) for head in heads)
        if heads != [SHARED] and Part("lm_head", SHARED, end) in found:
            raise MedusaError(f"{where} holds an LM head for all heads and one for each: keep the ones that are meant")
    return layers, rows, notes


def _num_layers(found: Mapping[Part, str], where: str) -> int:
    """How many layers the heads have: what comes before their LM heads, or else the highest number of a layer."""
    deepest = 1 + max(part.layer for part in found if part.what != "lm_head")
    ends = {part.layer: name for part, name in found.items() if part.what == "lm_head" and part.layer >= 0}
    if len(ends) > 1:
        one, other = list(ends.values())[:2]
        raise MedusaError(f"{where} holds {one} and {other}: heads of different depth cannot be told apart")
    return next(iter(ends), deepest)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
