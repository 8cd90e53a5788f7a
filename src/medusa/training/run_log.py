"""What a run tells while it trains: lines of log.jsonl, trackers (TensorBoard, W&B), and whoever watches."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.errors import MedusaError, UsageError
from medusa.training.accuracy import describe
from medusa.training.config import TrainConfig
from medusa.training.lora import LoraProgress
from medusa.training.text import Reporter
from medusa.training.trainer import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator


class RunLog:
    """One process writes the file; accelerate sees to it that one writes to the trackers."""

    def __init__(self, accelerator: Accelerator, path: Path, config: TrainConfig, reporter: Reporter) -> None:
        self._accelerator, self._reporter = accelerator, reporter
        accelerator.init_trackers("medusa", config=_flat(config.model_dump(mode="json", by_alias=True)))
        if trackers(config.log) != list(config.log):
            reporter.say("tensorboard is not installed: the log is log.jsonl alone")
        self._batch_size = config.training.batch_size
        self._path = path
        self._file = path.open("a", encoding="utf-8") if accelerator.is_main_process else None
        if self._file is not None and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # after a line that was cut short by a kill

    def heads(self, progress: Progress) -> None:
        """A step of Medusa-1."""
        losses, shown = _losses(progress)
        speed = progress.positions_per_second
        facts = {**losses, "learning_rate": progress.learning_rate, "positions_per_second": speed}
        accuracy = progress.accuracy.facts() if progress.accuracy is not None else {}
        self._accelerator.log({**facts, **_flat(accuracy)}, step=progress.step)
        self._write({"step": progress.step, **_rounded(facts), **accuracy})
        text = f"loss {shown}, {speed:.0f} positions/s"
        if speed:
            seconds = (progress.steps - progress.step) * self._batch_size / speed
            text += f", {math.ceil(seconds / 60)} min left"
        self._reporter.progress(progress.step, progress.steps, text)
        if progress.accuracy is not None:
            self._reporter.say(f"step {progress.step}: {describe(progress.accuracy)}")

    def lora(self, progress: LoraProgress) -> None:
        """A step of Medusa-2."""
        losses, shown = _losses(progress)
        facts = {"base_loss": progress.base_loss, "heads_weight": progress.heads_weight, **losses}
        facts |= {"learning_rate": progress.learning_rate, "tokens_per_second": progress.tokens_per_second}
        self._accelerator.log(_flat(facts, "lora/"), step=progress.step)
        self._write({"stage": "lora", "step": progress.step, **_rounded(facts)})
        text = f"loss {progress.base_loss:.3f}, heads {shown}, {progress.tokens_per_second:.0f} tokens/s"
        self._reporter.progress(progress.step, progress.steps, text)

    def close(self) -> None:
        """Trackers write what they hold; processes still share their group."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a line that found no room, which has been reported
                self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            print(json.dumps(line, allow_nan=False), file=self._file, flush=True)
        except OSError as error:
            raise MedusaError(
                f"cannot write {self._path}: {error.strerror}; make room and go on with --resume"
            ) from None


def trackers(names: Sequence[str]) -> list[str]:
    """Those that are installed. TensorBoard, the default, is done without; raises UsageError for any other."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if others := [name for name in missing if name != "tensorboard"]:
        raise UsageError(f"log: {others[0]} is not installed: pip install {others[0]}, or leave it out")
    return [name for name in names if name not in missing]


def _losses(progress: Progress | LoraProgress) -> tuple[dict[str, float], str]:
    """The heads' losses, by name and as people read them."""
    named = {f"loss_{k}": loss for k, loss in enumerate(progress.losses, start=1)}
    return named, " ".join(f"{loss:.2f}" for loss in progress.losses)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings or figures under slashed names, as trackers take them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (list, tuple)) and all(isinstance(v, float) for v in value) and value:
            flat |= {f"{prefix}{name}/{i}": v for i, v in enumerate(value, start=1)}
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}
