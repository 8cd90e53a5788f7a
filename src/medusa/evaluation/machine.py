"""The machine that figures are from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa.api import LanguageModel
    from medusa.evaluation.questions import Question

SAME = ("processor", "gpu", "instruction_set", "threads", "versions")  # of the machine, in one run


def what_is_measured(lm: LanguageModel, questions: Sequence[Question]) -> dict[str, object]:
    """Digests of the heads and of each question."""
    facts: dict[str, object] = {}
    if heads := lm.describe().get("heads_path"):
        facts["heads"] = _digest((Path(str(heads)) / "heads.safetensors").read_bytes())
    for question in questions:
        facts[f"question {question.id}"] = _digest(json.dumps([question.category, question.turns]).encode())
    return facts


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def describe_machine(lm: LanguageModel) -> dict[str, object]:
    """Processor, memory, GPU, system, and how the engine uses them."""
    import psutil

    from medusa.engines.times import machine

    processor, cores, gpu = machine()
    facts = lm.describe()
    return {
        "processor": processor,
        "cores": cores,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu or None,
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": facts.get("instruction_set"),
        "threads": facts.get("threads"),
        "versions": facts["versions"],
    }
