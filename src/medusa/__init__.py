"""Medusa: language models that answer faster, with the same words.

import medusa

model = medusa.load("smollm2-135m")
for chunk in model.stream("Why is the sky blue?"):
    print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medusa.errors import MedusaError, UsageError

if TYPE_CHECKING:
    from medusa.api import Chunk, Completion, LanguageModel, Stats, load
    from medusa.hf.generate import custom_generate
    from medusa.interop.exporting import export_heads
    from medusa.interop.importing import import_heads

__version__ = "0.1.0"
__all__ = [
    "Chunk",
    "Completion",
    "LanguageModel",
    "MedusaError",
    "Stats",
    "UsageError",
    "custom_generate",
    "export_heads",
    "import_heads",
    "load",
]

_HOMES = {
    "custom_generate": "medusa.hf.generate",
    "export_heads": "medusa.interop.exporting",
    "import_heads": "medusa.interop.importing",
}


def __getattr__(name: str) -> Any:
    """Loads the rest on first use: `import medusa` and `medusa --help` must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'medusa' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "medusa.api")), name)
