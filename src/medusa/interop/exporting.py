"""Our heads -> what other engines load, exactly as they lay it out; or a refusal that says why, and the way out.

vLLM, TGI and TensorRT-LLM take one directory: the names of the original project, an LM head for each head. With
`shared_lm_head` the LM head comes once (vLLM) or not at all (TGI), which is a directory for that engine alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa.errors import MedusaError, UsageError
from medusa.files import swapped_in
from medusa.heads import file as heads_file
from medusa.heads.config import HeadsConfig, check_shape, check_vocabulary
from medusa.interop import card, fasterdecoding, hf, vllm
from medusa.interop.base import Base, find_base
from medusa.interop.choices import CHOICES_FILE, format_choices
from medusa.models import zoo
from medusa.settings import Target

ENGINES = {
    "vllm": "vLLM",
    "tgi": "TGI",
    "tensorrt-llm": "TensorRT-LLM",
    "fasterdecoding": "the original Medusa",
}
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and for whom."""

    directory: Path
    to: str
    serves: tuple[str, ...]  # the values of `to` that this directory is for
    files: tuple[str, ...]
    num_heads: int
    num_layers: int
    lm_heads: str
    dtype: str
    size_bytes: int
    notes: tuple[str, ...]

    def facts(self) -> dict[str, object]:
        return {**asdict(self), "directory": str(self.directory)}


def export_heads(
    heads: str | Path,
    to: Target,
    out: str | Path,
    *,
    model: str | None = None,
    shared_lm_head: bool = False,
    force: bool = False,
) -> Exported:
    """Writes heads for another engine; the directory appears whole or not at all.

    Args:
        heads: a directory of heads, or the name of shipped ones.
        model: the model they belong to; else the one that they name.
        shared_lm_head: for vllm and tgi, and heads that end in the model's own LM head: it is not copied for each.
        force: replace an export that is there.

    Raises:
        UsageError: a bad argument, or heads that the engine cannot run. MedusaError: damaged heads, or no such model.
    """
    if to not in (*ENGINES, "hf"):
        raise UsageError(f"unknown engine {to}: use one of {', '.join((*ENGINES, 'hf'))}")
    directory, out = _find(str(heads)), Path(out).expanduser()
    _check_out(out, directory, force)
    config = heads_file.read_config(directory)
    ours = heads_file.read_tensors(directory, config)
    if config.weights == "int8":  # the card says so
        ours = {name: tensor.to(torch.bfloat16) for name, tensor in ours.items()}
    _check_kind(config, to, shared_lm_head)
    base = find_base(model) if model is not None else None
    if base is not None:
        _check_base(config, base)
    if to == "hf":
        files, settings = hf.files(directory), None
    else:
        settings, files = _layout(config, ours, to, shared_lm_head, base)
    tied = config.tie_lm_head
    once = "the model's own" if to in ("tgi", "hf") else "the model's own, once in the file"
    copied = "the model's own, copied for each head" if tied else "one for each head"
    facts = card.Facts(
        to=to,
        base_model=base.name if base is not None else config.base_model,
        config=config,
        lm_heads=once if tied and (shared_lm_head or to == "hf") else copied,
        shared=shared_lm_head,
    )
    notes = card.notes(facts)
    if Path(facts.base_model).expanduser().is_dir():
        notes = (
            *notes,
            f"the model is called {facts.base_model}, which is a directory here: before you share the "
            "export, give --model and its Hub id",
        )
    with swapped_in(out) as new:
        for name, content in files.items():
            _write(new / name, content)
        if settings is not None:
            (new / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        elif base is not None:
            heads_file.write_config(replace(config, base_model=base.name), new)
        if config.tree and to != "hf":
            (new / CHOICES_FILE).write_text(format_choices(config.tree) + "\n", encoding="utf-8")
        pictures = [path.name for path in sorted(directory.glob("*.svg")) if path.name in card.PICTURES]
        for name in pictures:
            shutil.copyfile(directory / name, new / name)
        (new / card.FILE).write_text(card.write(facts, pictures), encoding="utf-8")
        written = tuple(sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()))
        size = sum((new / name).stat().st_size for name in written)
    return Exported(
        directory=out,
        to=to,
        serves=(to,) if to in ("hf", "fasterdecoding") or shared_lm_head else ("vllm", "tgi", "tensorrt-llm"),
        files=written,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        lm_heads=facts.lm_heads,
        dtype="int8" if to == "hf" and config.weights == "int8" else _dtype(ours),
        size_bytes=size,
        notes=notes,
    )


def _find(heads: str) -> Path:
    """The directory of the heads called `heads`."""
    if heads in ("auto", "none"):
        raise UsageError("name the heads: a directory, or those shipped, such as smollm2-135m")
    found = zoo.find_heads(heads, zoo.ModelSource(heads, heads, None))
    assert found is not None
    return found


def _check_out(out: Path, heads: Path, force: bool) -> None:
    """Raises UsageError for what must not be replaced: anything without `force`, and with it all but an export."""
    if out.resolve() == heads.resolve() or out.resolve() in heads.resolve().parents:
        raise UsageError(f"{out} holds the heads themselves: give another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UsageError(f"{out} is there already: give another --out, or --force to replace an export")
    if not is_export(out):
        raise UsageError(f"{out} is there and is no export of Medusa: --force does not replace it; give another --out")


def is_export(directory: Path) -> bool:
    """Whether `export_heads` wrote what lies there."""
    marks = (fasterdecoding.SAFETENSORS, fasterdecoding.PICKLE, vllm.FILE, heads_file.WEIGHTS_FILE)
    text = directory / card.FILE
    told = text.is_file() and card.MARK in text.read_text(encoding="utf-8", errors="replace")
    return told and any((directory / mark).is_file() for mark in marks)


def _check_kind(config: HeadsConfig, to: str, shared_lm_head: bool) -> None:
    """Raises UsageError, with the reason and the way out, for heads that an engine cannot run."""
    if shared_lm_head and to not in ("vllm", "tgi"):
        raise UsageError(f"--shared-lm-head is for vllm and tgi: {ENGINES.get(to, to)} has no such layout")
    if to == "hf":
        return
    engine, reason = ENGINES[to], ""
    if config.kind != "residual":
        reason = f"it runs parallel heads only, and the guesses of these {config.kind} heads read the ones before"
    elif config.mlp_width:
        reason = f"its heads are linear layers with SiLU, and these are gated MLPs (mlp_width {config.mlp_width})"
    elif config.feature_layers:
        layers = ", ".join(map(str, config.feature_layers))
        reason = f"it gives heads the last hidden state alone, and these read layers {layers} too"
    elif config.draft_vocab:
        reason = f"its heads know every token, and these a draft vocabulary of {config.draft_vocab}"
    if reason:
        raise UsageError(f"{engine} cannot run these heads: {reason}; {way_out(config.base_model)}")
    if shared_lm_head and not config.tie_lm_head:
        raise UsageError("--shared-lm-head is for heads that end in the model's own LM head, and these have their own")
    if shared_lm_head and to == "tgi" and config.num_layers > 1:
        raise UsageError(
            f"TGI shares the LM head only among heads of one layer, and these have {config.num_layers}: leave out "
            "--shared-lm-head"
        )


def way_out(base_model: str) -> str:
    """How to get heads that every engine runs."""
    model = base_model if base_model and " " not in base_model else "MODEL"  # not "X as adapted by ..."
    return (
        f"train some that it can: medusa train --model {model} heads.kind=residual heads.mlp_width=0 "
        "heads.draft_vocab=0 'heads.feature_layers=[]', or, from the heads at hand, medusa train --kind residual "
        "--from HEADS, or take --to hf, which runs all heads"
    )


def _check_base(config: HeadsConfig, base: Base) -> None:
    """Raises MedusaError: the heads belong to another model."""
    check_shape(config, base.vocab_size, base.hidden_size)
    if config.vocab_hash:
        check_vocabulary(config, base.vocab_hash())


def _layout(
    config: HeadsConfig, ours: Mapping[str, Tensor], to: str, shared: bool, base: Base | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and the file of weights, by its name."""
    if to == "fasterdecoding":
        _check_layers(config, ours)
    if base is None and (not config.base_model or " " in config.base_model):  # "X as adapted by ..."
        says = config.base_model or "nothing"
        raise UsageError(f"the heads do not name their model in a way that engines know ({says}): give --model MODEL")
    name = config.base_model if base is None else base.name
    rows: list[Tensor] = []
    if not config.tie_lm_head:
        rows = [ours[f"lm_heads.{h}"] for h in range(config.num_heads)]
    elif not (shared and to == "tgi"):
        if base is None:
            base = find_base(name)
            _check_base(config, base)
        rows = [base.lm_head().to(next(iter(ours.values())).dtype)] * config.num_heads
    counts = (config.num_heads, config.num_layers)
    plain = fasterdecoding.config(name, *counts)
    if to == "fasterdecoding":
        tensors = fasterdecoding.tensors(ours, config.num_layers, rows)
        return plain, {fasterdecoding.PICKLE: tensors}
    if shared and to == "tgi":
        tensors = fasterdecoding.tensors(ours, config.num_layers, [])
        return {**plain, "version": "2"}, {fasterdecoding.SAFETENSORS: tensors}
    settings = vllm.config(name, *counts, config.hidden_size, config.vocab_size)
    if shared:
        return {**settings, "original_lm_head": True}, {vllm.FILE: vllm.tensors(ours, rows[0])}
    return settings, {fasterdecoding.SAFETENSORS: fasterdecoding.tensors(ours, config.num_layers, rows)}


def _check_layers(config: HeadsConfig, ours: Mapping[str, Tensor]) -> None:
    """Raises UsageError: the original project makes all layers of a head one module, and would keep the last."""
    for h in range(config.num_heads):
        for i in range(1, config.num_layers):
            for what in ("weight", "bias"):
                if not torch.equal(ours[f"blocks.{h}.{i}.linear.{what}"], ours[f"blocks.{h}.0.linear.{what}"]):
                    raise UsageError(
                        "the original Medusa uses one layer for all of a head's, and these heads have "
                        f"{config.num_layers} different ones: train heads.num_layers=1, or take --to vllm"
                    )


def _write(path: Path, content: Any) -> None:
    """A text, a file to be copied, or tensors by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif isinstance(content, Path):
            shutil.copyfile(content, path)
        elif path.suffix == ".pt":
            torch.save(dict(content), path)  # the one LM head of all heads lies in it once
        else:  # safetensors takes no two names for one memory
            save_file(
                {k: tensor.clone().contiguous() for k, tensor in content.items()}, path, metadata={"format": "pt"}
            )
    except (OSError, RuntimeError) as error:
        raise MedusaError(f"cannot write {path.name}: {error}; make room and run again") from None


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    return str(next(t.dtype for t in tensors.values() if t.is_floating_point())).removeprefix("torch.")
