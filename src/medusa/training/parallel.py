"""`medusa train --from HEADS`: parallel heads, as other engines run them, for the model of heads that they cannot run.

What is taken from those heads is where they come from: the model, how far they look, and the text they learned from, or
how it was written. What they say is not: they guess at the model, which is there itself. A parallel head must learn
what may stand k tokens on, whatever stands between; and the model's own distribution after the true tokens between
(`training.distillation`) is just that in the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig, check_shape, check_vocabulary
from medusa.heads.file import read_config
from medusa.interop.base import find_base
from medusa.models import zoo
from medusa.models.fetched import FETCHED
from medusa.training.config import TrainConfig, load_config
from medusa.training.export import MODEL_DIR
from medusa.training.resume import RUN_FILE, TEXT_FILE
from medusa.training.run import run_directory
from medusa.training.sources import file_of

# What every engine runs (see interop/exporting.py).
SHAPE = {"kind": "residual", "num_layers": 1, "mlp_width": 0, "draft_vocab": 0, "feature_layers": []}


def settings_from(heads: str, model: str | None, report: Callable[[str], None]) -> dict[str, Any]:
    """Settings that heads give, by their sections, for all that a call does not say itself. `model` is the one asked
    for, None: the one they belong to.

    Raises:
        UsageError: there are no such heads, or they do not tell their model. MedusaError: they are damaged.
    """
    directory, config = _found(heads)
    model = model or _model(directory, config)
    if not model:
        raise UsageError(f"the heads {heads} do not say what model they belong to: add --model")
    return {
        "model": model,
        "out": f"{run_directory(TrainConfig(model=model))}-{SHAPE['kind']}",  # beside the run that made those
        "heads": {**SHAPE, "num_heads": config.num_heads},
        "training": {"distillation": 1.0},
        "text": _text(directory, report),
    }


def check_fits(heads: str, wanted: TrainConfig) -> None:
    """Raises UsageError where the run that came of `settings_from` is not one that makes parallel heads for the model
    of those heads."""
    _, config = _found(heads)
    if wanted.heads.kind != "residual":
        raise UsageError(f"--from makes parallel heads: take --kind residual, not {wanted.heads.kind}")
    base = find_base(wanted.model)
    try:
        check_shape(config, base.vocab_size, base.hidden_size)
        check_vocabulary(config, base.vocab_hash() if config.vocab_hash else "")
    except MedusaError:
        raise UsageError(
            f"the heads {heads} belong to {config.base_model or 'another model'}, and {wanted.model} has another shape "
            "or tokenizer: leave out --model, or take heads of that model"
        ) from None


def _found(heads: str) -> tuple[Path, HeadsConfig]:
    if heads in ("auto", "none"):
        raise UsageError("--from names heads: a directory, or those shipped, such as smollm2-135m")
    directory = zoo.find_heads(heads, zoo.ModelSource(heads, heads, None))
    assert directory is not None
    return directory, read_config(directory)


def _model(directory: Path, config: HeadsConfig) -> str | None:
    """The name of the model that heads belong to, as `resolve` takes it; None where they do not say it."""
    known = {file.hub_id: name for files in (zoo.SHORT_NAMES, FETCHED) for name, file in files.items()}
    if " " not in config.base_model:
        return known.get(config.base_model, config.base_model) or None
    adapted = directory.parent / MODEL_DIR  # "X as adapted by Medusa-2 (../model)"
    return str(adapted) if adapted.is_dir() else None


def _text(directory: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """The text those heads learned from, where it is still there; else how it was written."""
    path = directory / RUN_FILE
    if not path.is_file():
        return {}
    text: dict[str, Any] = load_config(path, {}).model_dump(mode="json", by_alias=True)["text"]
    written = directory.parent / TEXT_FILE
    try:
        for name in text["data"]:
            file_of(name)
    except UsageError:
        report(f"{text['data'][0]}, which {directory} learned from, is not there: the model writes its text anew")
        text["data"] = []
    else:
        if not text["data"] and written.is_file():
            text["data"] = [str(written)]
    return {**text, "seconds": None}  # that run's own time
