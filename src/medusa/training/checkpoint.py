"""A checkpoint: one file that is there whole or not at all, and that knows which run it belongs to."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medusa.errors import MedusaError, UsageError
from medusa.files import replacing
from medusa.training.config import flat


def write_checkpoint(path: Path, facts: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Writes tensors and plain values. `facts` are what a run must agree on to continue from them. Raises MedusaError:
    no room, or no permission."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            torch.save({"facts": dict(facts), **content}, scratch)
    except (OSError, RuntimeError) as error:
        raise MedusaError(f"cannot write {path}: {error}; make room and go on with --resume") from None


@contextmanager
def taking_up(path: Path, facts: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """The parts of the content called `names`, on the CPU, for code that puts them in their places.

    Raises:
        UsageError: it belongs to a run of other settings.
        MedusaError: it is damaged, or does not fit in these places.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved_facts, content = flat(saved["facts"]), tuple(saved[name] for name in names)
    except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise MedusaError(f"{path} is damaged ({error}): delete it to begin again") from None
    for name, value in flat(facts).items():  # an older version has written more of them, or not this one
        if name in saved_facts and saved_facts[name] != value:
            other = f"another {name}" if name in ("text", "model") else f"{name}={saved_facts[name]}, not {value}"
            raise UsageError(
                f"{path} belongs to a run with {other}: go on with the run.yaml that it was begun with, or take "
                "another --out"
            )
    try:
        yield content
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MedusaError(f"{path} is of another version of Medusa ({reason}): delete it to begin again") from None
