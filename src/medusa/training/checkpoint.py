"""A checkpoint: one file that is there whole or not at all, and that knows which run it belongs to."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medusa.errors import MedusaError, UsageError
from medusa.files import replacing


def write_checkpoint(path: Path, facts: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Writes tensors and plain values. `facts` are what a run must agree on to go on from them.

    Raises:
        MedusaError: no room, or no permission.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            torch.save({"facts": dict(facts), **content}, scratch)
    except (OSError, RuntimeError) as error:
        raise MedusaError(f"cannot write {path}: {error}; make room and go on with --resume") from None


def read_checkpoint(path: Path, facts: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    """The parts of the content called `names`, on the CPU.

    Raises:
        UsageError: it belongs to a run of other settings. MedusaError: it is damaged.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found, content = saved["facts"], tuple(saved[name] for name in names)
    except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise MedusaError(f"{path} is damaged ({error}): delete it to begin again") from None
    if found != facts:
        name = next((name for name in facts if found.get(name) != facts[name]), "Medusa")
        raise UsageError(
            f"{path} belongs to a run with another {name}: go on with the run.yaml beside it, or take another --out"
        )
    return content
