"""Training on the device, the whole way in small: the model writes text, heads learn from it and are measured."""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check.model import default_model, has_model
from gpu_check.report import Options, Part

SLOTS = (256, 1024)  # conversations side by side


class Stages:
    """A Reporter (see training/text.py) that keeps how long each stage of a run took, and its last word."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last: dict[str, str] = {}
        self.said: list[str] = []
        self._title, self._begun = "", time.perf_counter()

    def stage(self, title: str) -> None:
        self.close()
        self._title = title

    def progress(self, done: int, total: int, text: str) -> None:
        self.last[self._title] = text

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        now = time.perf_counter()
        if self._title:
            self.seconds[self._title] = round(now - self._begun, 2)
        self._begun = now


def training_part(part: Part, options: Options) -> None:
    """A run of `medusa train` with some seconds for each stage, for every number of conversations side by side."""
    if not has_model(part, options):
        return
    sizes = (4,) if options.tiny else SLOTS
    for i, slots in enumerate(sizes):
        seconds = part.left / (len(sizes) - i)
        part.measure(f"{slots} rows", partial(_run, options, slots, seconds), needs=12.0)


def _run(options: Options, slots: int, seconds: float) -> dict[str, Any]:
    from medusa.training.config import load_config
    from medusa.training.run import train

    stages = Stages()
    limits: dict[str, Any] = {"text.seconds": 0.35 * seconds, "training.seconds": 0.2 * seconds}
    sizes: dict[str, Any] = {"text.tokens": 10**8, "text.max_length": 1024, "training.batch_size": 4096}
    if options.tiny:
        limits, sizes = {}, {"text.tokens": 300, "text.max_answer_tokens": 12, "training.batch_size": 16}
    with tempfile.TemporaryDirectory(prefix="medusa-training-") as scratch:
        settings = {
            "model": default_model(options),
            "out": scratch,
            "log": [],
            "engine.backend": "transformers",
            "engine.device": options.device,
            "engine.slots": slots,
            "training.distillation": 1.0,
            "training.epochs": 2,
            **limits,
            **sizes,
        }
        result = train(load_config(None, settings), reporter=stages)
        stages.close()
        lines = (Path(scratch) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    trained = json.loads(lines[-1])
    written = stages.seconds.get("Writing text", 0.0)
    return {
        "answer_tokens": result.tokens,
        "answer_tokens_per_second": round(result.tokens / written, 1) if written else None,
        "writing": stages.last.get("Writing text"),
        "positions_per_second": trained["positions_per_second"],
        "steps": result.steps,
        "stage_seconds": stages.seconds,
        "said": stages.said,
        "held_out": result.accuracy.facts(),
    }
