"""The machine that figures are from."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa.api import LanguageModel


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
