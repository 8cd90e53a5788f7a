"""Files and directories that are there whole or not at all; and where the cache is."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa.errors import MedusaError


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a name beside `path` to write to; that file takes its place unless an exception is raised, so that a kill
    leaves the old file or the new one. For a directory: `swapped_in`.

    The name is always the same, so that what a kill left behind is written over; where several processes may write the
    same file at once (`shared`), each has its own.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8] + '.' if shared else ''}partial")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text. Raises MedusaError."""
    try:
        with replacing(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MedusaError(f"cannot write {path}: {error.strerror}") from None


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
        _let_others_read(new)
        if directory.exists():
            directory.replace(old)
        new.replace(directory)
    finally:
        if old.exists() and not directory.exists():  # interrupted between the two
            old.replace(directory)
        shutil.rmtree(scratch, ignore_errors=True)


def _let_others_read(directory: Path) -> None:
    """Gives files the rights that new files have here: safetensors keeps its own for their owner alone."""
    probe = directory.with_name("probe")
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | usual)


def at_home(name: str) -> Path:
    """A path in which ~ stands for somebody's home; as it is where nobody is called so."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def cache_dir() -> Path:
    """The directory of converted models and measured times: $MEDUSA_CACHE, else `medusa` in the user's cache."""
    if chosen := os.environ.get("MEDUSA_CACHE"):
        return at_home(chosen)
    try:
        import platformdirs
    except ImportError:
        raise MedusaError(
            "the package platformdirs, which knows where caches go, is not installed: pip install platformdirs, or set "
            "MEDUSA_CACHE to a directory"
        ) from None
    return Path(platformdirs.user_cache_path("medusa", appauthor=False))
