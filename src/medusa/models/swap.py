"""A directory that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def swapped_in(directory: Path) -> Iterator[Path]:
    """Yields an empty directory beside `directory`, to be filled, which takes its place unless an exception is raised.

    What is there already is replaced, with all that lies in it.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        if directory.exists():
            directory.replace(old)
        new.replace(directory)
    finally:
        if old.exists() and not directory.exists():  # interrupted between the two
            old.replace(directory)
        shutil.rmtree(scratch, ignore_errors=True)
