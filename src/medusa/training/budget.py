"""`medusa train --budget 2h`: tokens, epochs and deadlines that fit a time.

Speeds are measured, so they may be wrong, and a machine may become busy: so the writing and the training have deadlines
of their own (text.seconds, training.seconds), and the training takes what time is left when it begins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from medusa.errors import UsageError
from medusa.training.config import TrainConfig
from medusa.training.data import Example
from medusa.training.estimate import (
    END,
    KEPT,
    READ,
    TEXT_BYTES,
    Place,
    Speeds,
    duration,
    expected_gain,
    free_disk,
    parameters,
    work_of,
)

CHOSEN = ("text.tokens", "text.seconds", "training.max_steps", "training.seconds")  # what a budget decides
LEAST_TOKENS = 2_000  # of which heads learn anything
MOST_EPOCHS = 3  # of which we know what they bring
DISK = 0.9  # share of what is free


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a run may take, from its start. `epochs`: those asked for, None lets it choose."""

    seconds: float
    epochs: int | None = None

    def check(self, config: TrainConfig, resume: bool, processes: int) -> None:
        """Raises UsageError for a run that it cannot be for."""
        if resume:
            raise UsageError("--resume goes on with what --budget chose, which run.yaml holds: leave out --budget")
        if config.train_base == "lora":
            raise UsageError(
                "--budget does not know how long Medusa-2 takes: train the heads with it, then go on with --resume "
                "--train-base lora"
            )
        if processes > 1:
            raise UsageError("--budget measures one process: give --tokens, or start one process alone")


def parse(text: str) -> float:
    """Seconds of 2h, 90m, 1h30m, 45s or 1.5h. Raises UsageError."""
    number = r"(\d+(?:\.\d+)?)"
    parts = "".join(rf"(?:{number}{unit})?" for unit in "hms")
    found = re.fullmatch(parts, "".join(text.lower().split()))
    seconds = sum(float(n) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True) if n) if found else 0
    if not seconds:
        raise UsageError(f"--budget takes a time such as 2h, 90m, 1h30m or 45s, not {text!r}")
    return seconds


def check_chosen(given: Iterable[str]) -> None:
    """Raises UsageError where a call gives what a budget chooses. `given` are dotted names."""
    options = {"text.tokens": "--tokens", "training.max_steps": "--max-steps"}
    if name := next((name for name in given if name in CHOSEN), ""):
        raise UsageError(f"--budget chooses {name} itself: leave out {options.get(name, name)}, or --budget")


def fitted(budget: Budget, config: TrainConfig, place: Place, speeds: Speeds, spent: float, lost: int) -> TrainConfig:
    """The run with as many tokens and epochs as fit, where the model writes the text.

    Args:
        spent: seconds that are gone.
        lost: tokens that are written for nothing (see `Work`).

    Raises:
        UsageError: nothing fits; it says how much time would.
    """
    left = budget.seconds - spent - END - lost / speeds.written
    held_out = config.text.held_out
    row = 2 * place.shape.feature_size * (1.0 if config.training.cache_features else held_out)
    room = DISK * free_disk(place.out) - 20 * parameters(place.shape)
    most = math.inf if place.on_gpu else room / (row + TEXT_BYTES)
    best: tuple[float, int, int] | None = None
    for epochs in (budget.epochs,) if budget.epochs else range(1, MOST_EPOCHS + 1):
        cost = _per_token(config, speeds, epochs, place)
        tokens = int(min(left / cost, most))
        if tokens >= LEAST_TOKENS:
            best = max(best or (0.0, 0, 0), (_worth(tokens, epochs), tokens, epochs))
    if best is None:
        least = budget.seconds - left + LEAST_TOKENS * _per_token(config, speeds, budget.epochs or 1, place)
        enough = 1.1 * least if least < 80 else 60 * math.ceil(1.1 * least / 60)
        raise UsageError(
            f"--budget {duration(budget.seconds)} is too little here: at least {duration(enough)}, for "
            f"{LEAST_TOKENS:,} tokens"
        )
    _, tokens, epochs = best
    tokens -= tokens % 10 ** (len(str(tokens)) - 3)  # three digits
    text = replace(config.text, tokens=tokens, seconds=_rounded((tokens / KEPT + lost) / speeds.written))
    per_epoch = tokens * (1 - held_out) * speeds.step / config.training.batch_size + tokens * held_out / speeds.judged
    training = replace(config.training, epochs=epochs, max_steps=None, seconds=_rounded(epochs * per_epoch))
    return config.model_copy(update={"text": text, "training": training})


def fitted_to_text(
    budget: Budget, config: TrainConfig, place: Place, speeds: Speeds, spent: float, texts: Sequence[Sequence[Example]]
) -> TrainConfig:
    """The same where the text is there: how many epochs, and how long. Raises UsageError."""
    one = config.model_copy(update={"training": replace(config.training, epochs=1, max_steps=None)})
    seconds = work_of(one, place, texts).seconds(speeds)
    reading = seconds.get("read", 0.0)
    left = budget.seconds - spent - END
    if config.training.cache_features or place.on_gpu:
        left, epoch = left - reading, seconds.get("train", 0.0)
    else:
        epoch = seconds.get("train", 0.0) + reading
    if left < 0.1 * budget.seconds:
        raise UsageError(
            f"--budget {duration(budget.seconds)} is too little for this text: reading its hidden states takes "
            f"{duration(reading)}; take less text, or more time"
        )
    epochs = budget.epochs or max(1, min(MOST_EPOCHS, int(left / max(1e-9, epoch))))
    training = replace(one.training, epochs=epochs, seconds=_rounded(left))
    return config.model_copy(update={"training": training})


def with_what_is_left(budget: Budget, config: TrainConfig, spent: float, held_out: int, speeds: Speeds) -> TrainConfig:
    """Once the hidden states are there: the training takes the time that is left, but what the end needs."""
    left = budget.seconds - spent - END - 2 * held_out / speeds.judged
    return config.model_copy(update={"training": replace(config.training, seconds=_rounded(left))})


def choice(config: TrainConfig, budget: Budget) -> str:
    """What was chosen, for people."""
    epochs = f"{config.training.epochs} epoch{'s' if config.training.epochs > 1 else ''}"
    ends = f"the training after {duration(config.training.seconds or 0)}"
    if config.text.data:
        return f"--budget {duration(budget.seconds)}: {epochs}; {ends} at the latest"
    return (
        f"--budget {duration(budget.seconds)}: {config.text.tokens:,} tokens, {epochs}; the writing ends after "
        f"{duration(config.text.seconds or 0)} at the latest, {ends}"
    )


def _per_token(config: TrainConfig, speeds: Speeds, epochs: int, place: Place) -> float:
    """Seconds that one more token takes, from writing it to learning from it."""
    held_out = config.text.held_out
    if place.keeps:
        often = 0.0
    else:
        often = 1.0 if config.training.cache_features or place.on_gpu else held_out + (1 - held_out) * epochs
    step = speeds.step / config.training.batch_size
    judged = (epochs + 2) * held_out / speeds.judged
    return 1 / (KEPT * speeds.written) + READ * often / speeds.read + (1 - held_out) * epochs * step + judged


def _worth(tokens: int, epochs: int) -> float:
    """By which to choose. Past the measured points more tokens still help, as much as between them."""
    slope = (expected_gain(1_620_000, 1) - expected_gain(207_000, 1)) / math.log(1_620_000 / 207_000)
    return slope * math.log(tokens) + expected_gain(tokens, epochs) - expected_gain(tokens, 1)


def _rounded(seconds: float) -> float:
    return max(1.0, round(seconds, 1))
