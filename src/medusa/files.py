"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from medusa.errors import MedusaError


def write_whole(path: Path, text: str) -> None:
    """Writes beside and renames, so that a kill leaves the old file or the new one. Raises MedusaError."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise MedusaError(f"cannot write {path}: {error.strerror}") from None
