"""Everything that decides a training run, in one YAML file: `run.yaml` is written beside the result and accepted back.

Unknown keys are errors, values are checked where they are read, and `section.key=value` overrides one value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medusa.errors import UsageError

DEFAULT_TOKENS = 300_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextConfig(_Section):
    """Where the training text comes from: `data`, or what the model writes (see training/distill.py)."""

    data: tuple[str, ...] = ()  # files or Hub data sets of conversations or documents
    prompts: str | None = None  # a file of prompts that the model answers; without one it invents them
    # Of answers, where the model writes the text; None: 300,000, or as many as `training.max_steps` can read.
    tokens: Annotated[int, Field(ge=1)] | None = None
    turns: Annotated[int, Field(ge=1)] = 3
    max_user_tokens: Annotated[int, Field(ge=1)] = 96
    max_answer_tokens: Annotated[int, Field(ge=1)] = 320
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7)
    user_temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.05  # share of the conversations that measure the heads
    max_length: Annotated[int, Field(ge=16)] = 2048  # a longer conversation is cut
    seconds: Annotated[float, Field(gt=0)] | None = None  # of writing, after which it ends with what there is


class EngineConfig(_Section):
    """What runs the frozen model; see `medusa.load`. A quantised model gives heads for that model as it will run."""

    backend: Literal["auto", "native", "transformers"] = "auto"
    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "bfloat16"
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    slots: Annotated[int, Field(ge=1)] | None = None  # conversations written side by side; None: 24, 1,024 on a GPU


class HeadsOptions(_Section):
    """The module; None takes what suits the model (see `HeadsConfig`)."""

    kind: Literal["residual", "sequential", "recurrent"] = "recurrent"
    num_heads: Annotated[int, Field(ge=1, le=16)] = 4
    num_layers: Annotated[int, Field(ge=1)] = 1
    tie_lm_head: bool = True
    draft_vocab: Annotated[int, Field(ge=0)] | None = None  # 0: the whole vocabulary; None: at most 8,192
    mlp_width: Annotated[int, Field(ge=0)] | None = None  # None: twice the hidden size
    feature_layers: tuple[int, ...] | None = None  # None: a third and two thirds of the way up


class OptimiserConfig(_Section):
    """The training itself; see training/trainer.py."""

    epochs: Annotated[int, Field(ge=1)] = 3
    max_steps: Annotated[int, Field(ge=1)] | None = None  # ends earlier
    # Ends earlier, too, and the learning rate falls to zero by then: what a run learns then depends on its speed.
    seconds: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 512  # positions in a step, over all processes
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the steps
    clip: Annotated[float, Field(gt=0)] = 1.0  # greatest norm of the gradient
    lambda_: Annotated[float, Field(gt=0, le=1)] = Field(default=0.8, alias="lambda")  # head k weighs lambda ** k
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of KL to the model's own distribution in the loss
    # auto: bfloat16 where the machine has instructions for it, else float32; see training/precision.py. run.yaml keeps
    # "auto", so that the run may go on on another machine; the config of the heads tells what it was.
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    cache_features: bool = True  # compute hidden states once and keep them on disk, or anew in each epoch
    eval_every: Annotated[int, Field(ge=1)] | None = None  # steps; None: each epoch
    patience: Annotated[int, Field(ge=0)] = 0  # evaluations without gain that end the training; 0: off
    save_every: Annotated[int, Field(ge=1)] = 200  # steps between checkpoints
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class LoraConfig(_Section):
    """Training the base too, by adapters, once the heads stand (Medusa-2; see training/lora.py)."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    epochs: Annotated[int, Field(gt=0)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8  # conversations in a step
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4  # of the adapters
    heads_learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    heads_weight: Annotated[float, Field(ge=0)] = 0.2  # of the heads' loss beside the model's own
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the steps in which that weight and the rates rise
    base_loss: Literal["kl", "ce"] = "kl"  # to the frozen model, or the cross-entropy of the text
    merge: bool = True  # save the whole model with the adapters merged in, or the adapter alone


class TrainConfig(_Section):
    model: str = "smollm2-135m"
    out: str | None = None  # directory of the run; None: medusa-<model>
    train_base: Literal["none", "lora"] = "none"
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    text: TextConfig = TextConfig()
    engine: EngineConfig = EngineConfig()
    heads: HeadsOptions = HeadsOptions()
    training: OptimiserConfig = OptimiserConfig()
    lora: LoraConfig = LoraConfig()

    def resolved(self) -> TrainConfig:
        """The same with the number of tokens spelt out."""
        if self.text.tokens is not None:
            return self
        tokens, training = DEFAULT_TOKENS, self.training
        if training.max_steps is not None:
            read = training.max_steps * training.batch_size
            tokens = min(tokens, math.ceil(1.05 * read / (1 - self.text.held_out)))
        return self.model_copy(update={"text": self.text.model_copy(update={"tokens": tokens})})

    def dump(self) -> str:
        """The run as YAML, every value spelt out."""
        text = yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
        return f"# medusa train --config run.yaml\n{text}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def load_config(path: Path | None, overrides: Mapping[str, Any], assignments: Sequence[str] = ()) -> TrainConfig:
    """The run that a file, options and `section.key=value` assignments describe; later ones win.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: dotted name -> value; None leaves what is there.
        assignments: as typed on the command line; the value is read as YAML.

    Raises:
        UsageError: no such file, not YAML, an unknown key or a bad value.
    """
    data: Any = {}
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
        if first["type"] == "extra_forbidden":
            raise UsageError(f"unknown setting {name}; run.yaml of any run lists all there are") from None
        raise UsageError(f"{name}: {_lower(first['msg'])}, not {first['input']!r}") from None


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        if not isinstance(data.get(section, {}), dict):
            raise UsageError(f"{section} is not a section of settings")
        data = data.setdefault(section, {})
    data[key] = value


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
