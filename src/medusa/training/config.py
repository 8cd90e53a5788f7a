"""Everything that decides a training run, in one YAML file: `run.yaml` is written beside the result and accepted back.

Unknown keys are errors, values are checked where they are read, and `section.key=value` overrides one value.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medusa.errors import UsageError
from medusa.settings import (
    DistillSettings,
    HeadsSettings,
    LoraSettings,
    ModelSettings,
    OptimiserSettings,
    TextSettings,
    TrainingEngine,
)


class TrainConfig(BaseModel):
    """A run. Its sections are dataclasses of medusa/settings.py, whose bounds pydantic checks too."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    model: str = ModelSettings().model
    out: str | None = None  # directory of the run; None: medusa-<model>
    train_base: Literal["none", "lora"] = "none"
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    text: TextSettings = TextSettings()
    engine: TrainingEngine = TrainingEngine()
    heads: HeadsSettings = HeadsSettings()
    training: OptimiserSettings = OptimiserSettings()
    lora: LoraSettings = LoraSettings()

    def resolved(self) -> TrainConfig:
        """The same with the number of tokens spelt out."""
        if self.text.tokens is not None:
            return self
        tokens, training = DistillSettings().tokens, self.training
        if training.max_steps is not None:
            read = training.max_steps * training.batch_size
            tokens = min(tokens, math.ceil(1.05 * read / (1 - self.text.held_out)))
        return self.model_copy(update={"text": replace(self.text, tokens=tokens)})

    def dump(self) -> str:
        """The run as YAML, every value spelt out."""
        text = yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
        return f"# medusa train --config run.yaml\n{text}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        flattened |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flattened


def load_config(
    path: Path | None,
    overrides: Mapping[str, Any],
    assignments: Sequence[str] = (),
    *,
    sections: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The run that a file, options and `section.key=value` assignments describe; later ones win.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: dotted name -> value; None leaves what is there.
        assignments: as typed on the command line; the value is read as YAML.
        sections: what the file would hold, where there is none.

    Raises:
        UsageError: no such file, not YAML, an unknown key or a bad value.
    """
    data: Any = copy.deepcopy(dict(sections or {}))
    if path is not None:
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(data, dict):
            raise UsageError(f"{path} must hold sections of settings")
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise UsageError(f"{assignment!r} is not a setting: write section.key=value")
        try:
            _set(data, name, yaml.safe_load(value))
        except yaml.YAMLError:
            raise UsageError(f"the value of {name} is not valid YAML: {value}") from None
    for name, value in overrides.items():
        if value is not None:
            _set(data, name, value)
    try:
        return TrainConfig.model_validate(data).resolved()
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise UsageError(f"unknown setting {name}; run.yaml of any run lists all there are") from None
        if first["type"] == "value_error":  # what a section says of itself
            raise UsageError(f"{name}.{first['ctx']['error']}") from None
        problem = first["msg"][:1].lower() + first["msg"][1:]
        raise UsageError(f"{name}: {problem}, not {first['input']!r}") from None


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        if not isinstance(data.get(section, {}), dict):
            raise UsageError(f"{section} is not a section of settings")
        data = data.setdefault(section, {})
    data[key] = value
