"""Checkpoints of other projects -> heads that run here.

`read` tells what a checkpoint holds, whatever the model; `import_heads` checks that against a model and saves it. Both
are strict: what they return stands in the file, all of it was understood, and nothing of it was executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.file import WEIGHTS_FILE, save_tensors
from medusa.interop import fasterdecoding, vllm
from medusa.interop.base import find_base
from medusa.interop.choices import CHOICES_FILE, parse_choices, read_choices, with_probabilities
from medusa.interop.layouts import SHARED, ForeignHeads, Layout, assemble
from medusa.interop.tensors import PICKLES, Tensors, open_tensors, read_json, shards

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class Imported:
    """A report: what was read, what it was made to, and what differs from what the checkpoint says of itself."""

    heads: Path
    layout: str
    files: tuple[str, ...]
    num_heads: int
    num_layers: int
    lm_heads: str  # whose they are
    dtype: str
    hidden_size: int
    vocab_size: int
    tree_nodes: int  # the root counts; 0: no tree
    base_model: str
    notes: tuple[str, ...]

    def facts(self) -> dict[str, object]:
        return {**asdict(self), "heads": str(self.heads)}


def import_heads(
    path: str | Path,
    model: str | None = None,
    out: str | Path | None = None,
    *,
    tree: str | None = None,
    force: bool = False,
) -> Imported:
    """Reads heads that another project trained and saves them as ours.

    Args:
        path: a directory, or a file of weights beside its `config.json`.
        model: the model they belong to; of a whole model with heads it is that one.
        out: where the heads are saved; else NAME-heads here, by the checkpoint's name.
        tree: a file of `medusa_choices`, `FILE:NAME` where it holds several; else the checkpoint's, if it has one.
        force: replace heads that are there.

    Raises:
        UsageError: a bad argument. MedusaError: the checkpoint is damaged, is not understood, or is another model's.
    """
    path = Path(path).expanduser()
    directory = Path(
        f"{(path if path.is_dir() else path.with_suffix('')).resolve().name}-heads" if out is None else out
    )
    directory = directory.expanduser()
    if (directory / WEIGHTS_FILE).is_file() and not force:
        raise UsageError(f"{directory} holds heads already: give another --out, or --force to replace them")
    found = read(path)
    whole = found.layout == fasterdecoding.WHOLE.name
    if model is None and not whole:
        named = found.config.get("base_model_name_or_path")
        raise UsageError(
            "say which model the heads belong to: --model MODEL" + (f", {named} says their config" if named else "")
        )
    base = find_base(model or str(path if path.is_dir() else path.parent))
    _check_sizes(found, base.hidden_size, base.vocab_size, base.source.name)
    paths = _tree_of(path, found.config, tree)
    too_deep = max(map(len, paths), default=0)
    if too_deep > found.num_heads:
        raise UsageError(
            f"the tree is {too_deep} levels deep, but there are {found.num_heads} heads: give another --tree"
        )
    notes, whose = [*found.notes], "the model's own"
    rows = found.lm_heads
    if rows:
        own = base.lm_head().to(rows[0].dtype)
        if all(bool((head == own).all()) for head in rows):
            notes.append("the LM heads in the file are copies of the model's own, which is used instead")
            rows = ()
        else:
            whose = "one for all" if len(rows) < found.num_heads else "one for each"
    if whole and model is not None:
        notes.append("heads of a whole model read its own hidden states: they fit the model they lie in best")
    if paths and tree is None:
        notes.append("the tree comes with the checkpoint")
    config = HeadsConfig(
        kind="residual",
        num_heads=found.num_heads,
        num_layers=found.num_layers,
        hidden_size=base.hidden_size,
        vocab_size=base.vocab_size,
        tie_lm_head=not rows,
        base_model=base.name,
        vocab_hash=base.vocab_hash(),
        tree=with_probabilities(paths),
        training={"imported": {"layout": found.layout, "files": [file.name for file in found.files]}},
    )
    save_tensors(_ours(found, rows), config, directory)
    return Imported(
        heads=directory,
        layout=found.layout,
        files=tuple(file.name for file in found.files),
        num_heads=found.num_heads,
        num_layers=found.num_layers,
        lm_heads=whose,
        dtype=str(found.dtype).removeprefix("torch."),
        hidden_size=base.hidden_size,
        vocab_size=base.vocab_size,
        tree_nodes=len(paths) + 1 if paths else 0,
        base_model=base.name,
        notes=tuple(notes),
    )


def read(path: str | Path) -> ForeignHeads:
    """The heads in a directory or a file, of whichever layout they are. Raises MedusaError: it is missing or damaged,
    or holds anything that is not understood."""
    path = Path(path).expanduser()
    files, notes = _files(path)
    beside = (path if path.is_dir() else path.parent) / CONFIG_FILE
    config = read_json(beside) if beside.is_file() else {}
    tensors = open_tensors(files)
    where = str(files[0] if len(files) == 1 else path)
    layout, names = _recognise(tensors, config, where)
    native = layout is vllm.LAYOUT
    if native and config.get("original_lm_head") and not {"lm_head.weight", "lm_heads.1.weight"} & tensors.keys():
        tensors = _renamed(tensors, "lm_heads.0.weight", "lm_head.weight")  # vLLM takes it under either name
        names = list(tensors)
    blocks, rows, more = assemble(
        layout, names, tensors, where, biases=not native or bool(config.get("medusa_fc_bias"))
    )
    if native and not rows:
        raise MedusaError(f"{where} is incomplete: lm_heads.0.weight is missing")
    if layout is fasterdecoding.LAYOUT and not rows:
        layout = fasterdecoding.VERSION_2
    found = ForeignHeads(layout.name, tuple(files), blocks, rows, config, (*notes, *more))
    _check_config(found, beside)
    return replace(found, notes=(*found.notes, *_differing_counts(found)))


def _files(path: Path) -> tuple[list[Path], list[str]]:
    """The files of weights in a directory, or the one that is named, and what is to be said of the choice."""
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLES):
            raise UsageError(f"{path} is no file of weights: give a .safetensors or .pt file, or its directory")
        return [path], []
    if not path.is_dir():
        raise MedusaError(f"there is no {path}: give a directory or a file of weights")
    for name in (fasterdecoding.SAFETENSORS, fasterdecoding.PICKLE):
        if (path / name).is_file():
            both = name == fasterdecoding.SAFETENSORS and (path / fasterdecoding.PICKLE).is_file()
            return [path / name], [f"{fasterdecoding.PICKLE} beside it was not read"] if both else []
    if (path / WEIGHTS_FILE).is_file():
        raise UsageError(f"{path} holds heads of Medusa already: use them with --heads {path}")
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (path / f"{stem}{ending}").is_file():
            return [path / f"{stem}{ending}"], []
        if (path / f"{stem}{ending}.index.json").is_file():
            return shards(path / f"{stem}{ending}.index.json"), []
    if len(only := sorted([*path.glob("*.safetensors"), *path.glob("*.pt")])) == 1:
        return only, []
    more = f"several files of weights ({', '.join(file.name for file in only)}): name the one" if only else "no weights"
    raise MedusaError(f"{path} holds {more}")


def _recognise(tensors: Tensors, config: Mapping[str, Any], where: str) -> tuple[Layout, list[str]]:
    """The layout of a checkpoint, and the names of what must be heads: all but the base model of a whole one."""
    names = list(tensors)
    if any(name.startswith(fasterdecoding.WHOLE_PREFIX) for name in names):
        return fasterdecoding.WHOLE, [n for n in names if not n.startswith(fasterdecoding.BASE_PREFIXES)]
    if "token_map" in names or config.get("truncated_vocab_size") not in (None, config.get("vocab_size")):
        raise MedusaError(f"{where} has a draft vocabulary of vLLM (token_map), which cannot be imported")
    for layout in (vllm.LAYOUT, fasterdecoding.LAYOUT):
        if any((part := layout.part(name)) is not None and part.head != SHARED for name in names):
            return layout, names
    example = f", only others such as {min(names)}" if names else ""
    raise MedusaError(
        f"{where} holds no Medusa heads{example}: known are the layouts of FasterDecoding, TGI, TensorRT-LLM and vLLM"
    )


def _renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return replace(tensors, readers={new if name == old else name: read for name, read in tensors.readers.items()})


def _check_config(found: ForeignHeads, where: Path) -> None:
    """Raises MedusaError where a config names other sizes than the tensors have: one of the two is another model's."""
    sizes = {"hidden_size": found.hidden_size}
    if found.lm_heads:
        sizes["vocab_size"] = found.lm_heads[0].shape[0]
    for name, size in sizes.items():
        said = found.config.get(name)
        if said is not None and said != size:
            raise MedusaError(f"{where} says {name} {said}, but the tensors have {size}: they do not belong together")


def _differing_counts(found: ForeignHeads) -> list[str]:
    """Published configs name fewer heads than their files hold: the tensors are right."""
    notes = []
    for name, other, count in (
        ("medusa_num_heads", "num_heads", found.num_heads),
        ("medusa_num_layers", "num_hidden_layers", found.num_layers),
    ):
        said = found.config.get(name, found.config.get(other) if found.config.get("model_type") == "medusa" else None)
        if said is not None and said != count:
            notes.append(f"the config says {name} {said}, the tensors are {count}")
    dropped = found.layout == vllm.LAYOUT.name and not found.config.get("medusa_fc_bias")
    if dropped and any(bool(bias.any()) for head in found.blocks for _, bias in head):
        notes.append("vLLM drops the biases in this file, for its config lacks medusa_fc_bias: they are kept here")
    return notes


def _check_sizes(found: ForeignHeads, hidden_size: int, vocab_size: int, model: str) -> None:
    if found.hidden_size != hidden_size:
        raise MedusaError(
            f"the heads have hidden size {found.hidden_size}, {model} has {hidden_size}: they belong to another model"
        )
    if found.lm_heads and found.lm_heads[0].shape[0] != vocab_size:
        rows = found.lm_heads[0].shape[0]
        raise MedusaError(f"the heads know {rows} tokens, {model} has {vocab_size}: they belong to another model")


def _tree_of(path: Path, config: Mapping[str, Any], tree: str | None) -> list[tuple[int, ...]]:
    """The rank paths that are asked for, or that come with the checkpoint; none is no tree."""
    if tree is not None:
        file, colon, name = tree.rpartition(":")
        named = bool(colon) and not Path(tree).is_file()
        return read_choices(Path(file if named else tree).expanduser(), name if named else None)
    beside = (path if path.is_dir() else path.parent) / CHOICES_FILE
    if beside.is_file():
        return read_choices(beside)
    if (value := config.get("medusa_choices")) is not None:
        return parse_choices(value, f"medusa_choices of {CONFIG_FILE}")
    return []


def _ours(found: ForeignHeads, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tensors by our names, each a copy of its own, in the one dtype that holds them all exactly."""
    dtype = found.dtype
    ours: dict[str, Tensor] = {}
    for h, head in enumerate(found.blocks):
        for i, (weight, bias) in enumerate(head):
            ours[f"blocks.{h}.{i}.linear.weight"], ours[f"blocks.{h}.{i}.linear.bias"] = weight, bias
    if rows:
        ours |= {f"lm_heads.{h}": rows[min(h, len(rows) - 1)] for h in range(found.num_heads)}
    return {name: tensor.to(dtype).clone().contiguous() for name, tensor in ours.items()}
