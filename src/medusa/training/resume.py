"""Which settings may change when a run continues: all but those that went into something that lies on disk already.

The text, the data of a step and the shapes of the weights stay what they were; how long, how fast and on what a run
learns may change.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from medusa.errors import UsageError, shortened
from medusa.training.config import TrainConfig, flat
from medusa.training.lora import CHECKPOINT as LORA_CHECKPOINT
from medusa.training.trainer import CHECKPOINT

RUN_FILE = "run.yaml"
TEXT_FILE = "text.jsonl"
# Settings, or whole sections of them, that are fixed once the file is there.
FIXED_BY = {
    TEXT_FILE: (
        *("engine.backend", "engine.dtype"),
        *(f"text.{name}" for name in ("prompts", "turns", "max_user_tokens", "max_answer_tokens", "temperatures")),
        *(f"text.{name}" for name in ("user_temperature", "top_p", "seed", "max_length")),
    ),
    CHECKPOINT: (
        "engine.dtype",  # hidden states are those of the model as it runs
        "text",
        "heads",
        *(f"training.{name}" for name in ("batch_size", "cache_features", "seed")),
    ),
    LORA_CHECKPOINT: (
        "train_base",
        # What Medusa-1 alone reads: its heads are what Medusa-2 has begun with.
        *(
            f"training.{name}"
            for name in ("epochs", "max_steps", "seconds", "learning_rate", "warmup", "eval_every", "patience")
        ),
        *(f"lora.{name}" for name in ("rank", "alpha", "batch_size")),
    ),
}


def fixed_settings(config: TrainConfig, *files: str) -> dict[str, object]:
    """Dotted name -> value of the settings that those files depend on."""
    fixed = [name for file in files for name in FIXED_BY[file]]
    values = flat(config.model_dump(mode="json", by_alias=True))
    return {name: value for name, value in values.items() if name in fixed or name.split(".")[0] in fixed}


def check_resumed(out: Path, before: TrainConfig, now: TrainConfig) -> None:
    """Raises UsageError where `now` changes what the run in `out`, begun with `before`, cannot change any more."""
    files = [file for file in FIXED_BY if (out / file).is_file()]
    was, wanted = fixed_settings(before, *files), fixed_settings(now, *files)
    if changed := [
        f"{name}={_shown(was[name])}, not {_shown(wanted[name])}" for name in was if was[name] != wanted[name]
    ]:
        raise UsageError(
            f"{out} holds a run with {' and '.join(changed)}: what may change from here on is {_free(now, was)}; "
            "leave the rest as it was, or name another --out"
        )


def _free(config: TrainConfig, fixed: Iterable[str]) -> str:
    """Names of the settings that are not fixed, a whole section by its own name."""
    sections: dict[str, tuple[list[str], list[str]]] = {}
    for name in flat(config.model_dump(by_alias=True)):
        if name not in ("model", "out"):
            sections.setdefault(name.split(".")[0], ([], []))[name in fixed].append(name)
    names = []
    for section, (free, held) in sections.items():
        if len(free) > len(held) > 0:
            names.append(f"{section} (but for {', '.join(name.split('.')[1] for name in held)})")
        else:
            names += free if held else [section]
    return ", ".join(names)


def _shown(value: object) -> str:
    return "null" if value is None else shortened(value)
