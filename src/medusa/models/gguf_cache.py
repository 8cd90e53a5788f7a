"""GGUF files in a cache: what is read of them once, and those that have to be unpacked.

The cache, where processes may come, go and be killed at any time:

    described/<stem>-<digest>/  tokenizer and configuration of a file whose weights are read in place
    models/<stem>-<digest>/     a finished conversion; medusa.json, written last, lists its file sizes
    models/.<stem>-<digest>-*/  the one under way, which becomes the above in one stroke; one that was killed is swept
    models.lock                 held by the process that converts; the others wait, and find its result
    digests/<key>               sha256 of a GGUF file, by path, size and mtime: hashed only once
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from medusa.errors import MedusaError, first_sentence
from medusa.files import cache_dir, replacing, swapped_in
from medusa.models.quiet import quiet

# Raise one when what is written changes: older ones are then made anew.
CACHE_FORMAT = 2
DESCRIPTION_FORMAT = 1
MANIFEST = "medusa.json"
REMINDER_SECONDS = 20.0
WAITING = "waiting for another conversion"  # until the first step


def check_gguf(path: Path) -> None:
    """Raises MedusaError for a file that cannot be read, or of another format."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise MedusaError(f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise MedusaError(f"{path} is not a GGUF file (it does not start with GGUF); get the file again")


def converted(gguf: Path, names: Mapping[str, str], progress: bool) -> Path:
    """The directory of `gguf` as bf16 safetensors with its tokenizer; made if it is not there yet.

    `names` are those of known files, by their sha256; another is called as its file is.
    """
    return _made("models", gguf, names, CACHE_FORMAT, _reporting(gguf, progress))


def described(gguf: Path, names: Mapping[str, str], progress: bool) -> Path | None:
    """The directory of the tokenizer and configuration of `gguf`, for the native engine, which reads the weights in the
    file; made if it is not there yet. None: such a file has to be converted."""
    reading = _pulsing(gguf, "Reading") if progress and sys.stderr.isatty() else contextlib.nullcontext(_silently)
    try:
        return _made("described", gguf, names, DESCRIPTION_FORMAT, reading)
    except MedusaError as error:
        from medusa.models.gguf import NotInPlaceError

        if isinstance(error, NotInPlaceError):
            return None
        raise


def _silently(step: str) -> None:
    """Says nothing: it takes but seconds."""


def _made(
    folder: str,
    gguf: Path,
    names: Mapping[str, str],
    version: int,
    reporting: contextlib.AbstractContextManager[Callable[[str], None]],
) -> Path:
    """What is kept of `gguf` in `folder` of the cache; made if it is not there yet."""
    sha256 = digest(gguf)
    stem = re.sub(r"[^\w.-]", "_", gguf.stem)[:80]
    final = cache_dir() / folder / f"{stem}-{sha256[:12]}"
    if _is_complete(final, version):
        return final
    if importlib.util.find_spec("gguf") is None:
        raise MedusaError("reading GGUF files needs the gguf package; run: pip install 'medusa-decode[demo]'")

    from filelock import FileLock

    from medusa.models.gguf import convert, describe

    make = convert if folder == "models" else describe
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with reporting as on_step, FileLock(cache_dir() / f"{folder}.lock"):
            if _is_complete(final, version):
                return final
            for leftover in final.parent.glob(".*"):  # of a process that was killed: this one has the lock
                shutil.rmtree(leftover, ignore_errors=True)
            with swapped_in(final) as work:
                with quiet():
                    make(gguf, work, names.get(sha256, gguf.stem), on_step)
                _write_manifest(work, version)
    except MedusaError:
        raise
    except ImportError as error:
        installed = importlib.metadata.version("transformers")
        raise MedusaError(
            f"transformers {installed} is too old to read GGUF files ({error.name} lacks what is needed): "
            "pip install 'transformers>=5.20'"
        ) from error
    except OSError as error:
        # transformers raises OSErrors of its own about the file; only those of the system have an errno.
        if error.errno is None:
            raise MedusaError(f"cannot convert {gguf}: {first_sentence(error)}") from error
        raise MedusaError(
            f"cannot write the converted model to {final.parent}: {error.strerror}; "
            "set MEDUSA_CACHE to a directory with room"
        ) from error
    except Exception as error:
        raise MedusaError(f"cannot convert {gguf}: {first_sentence(error)}") from error
    return final


@contextlib.contextmanager
def _reporting(gguf: Path, progress: bool) -> Iterator[Callable[[str], None]]:
    """Shows on stderr how a conversion is coming along: a bar on a terminal, else one line, and another every 20
    seconds. Yields on_step(step)."""
    if not progress:
        yield lambda step: None
        return
    if not sys.stderr.isatty():
        print(f"Converting {gguf.name}, once; this takes a while ...", file=sys.stderr, flush=True)
        with _reminder(gguf) as on_step:
            yield on_step
        return

    with _pulsing(gguf, "Converting") as on_step:
        yield on_step


@contextlib.contextmanager
def _pulsing(gguf: Path, verb: str) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal. Yields on_step(step)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(verb + " {task.fields[file]}, once:"), BarColumn(), TimeElapsedColumn())
    # file=: the console must keep to the real stderr while the conversion redirects it.
    console = Console(file=sys.stderr)
    step_column = TextColumn("{task.description}")
    with Progress(*columns, step_column, console=console, transient=True, redirect_stderr=False) as bar:
        task = bar.add_task(WAITING, total=None, file=gguf.name)  # the steps' lengths are unknown: it pulses
        yield lambda step: bar.update(task, description=step)


@contextlib.contextmanager
def _reminder(gguf: Path) -> Iterator[Callable[[str], None]]:
    """A line every 20 seconds, where nothing else shows that the conversion is under way. Yields on_step(step)."""
    done, begun, stderr = threading.Event(), time.monotonic(), sys.stderr  # the conversion redirects sys.stderr
    steps = [WAITING]

    def remind() -> None:
        while not done.wait(REMINDER_SECONDS):
            seconds = round(time.monotonic() - begun)
            print(f"Converting {gguf.name}: {steps[-1]}, after {seconds} seconds ...", file=stderr, flush=True)

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield steps.append
    finally:
        done.set()
        thread.join()


def digest(gguf: Path) -> str:
    """The sha256 of a file, remembered by its path, size and mtime."""
    try:
        stat = gguf.stat()
        identity = f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
        note = cache_dir() / "digests" / hashlib.sha256(identity.encode()).hexdigest()[:32]
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.fullmatch(r"[0-9a-f]{64}", known := note.read_text(encoding="ascii")):
                return known
        hasher = hashlib.sha256()
        with gguf.open("rb") as file:
            while block := file.read(1 << 22):
                hasher.update(block)
    except OSError as error:
        raise MedusaError(f"cannot read {gguf}: {error.strerror}") from error
    with contextlib.suppress(OSError):  # only a saving of time: an unwritable cache is reported by converted
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note, shared=True) as scratch:
            scratch.write_text(hasher.hexdigest(), encoding="ascii")
    return hasher.hexdigest()


def _write_manifest(directory: Path, version: int) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    manifest = json.dumps({"format": version, "sizes": sizes}, indent=2)
    (directory / MANIFEST).write_text(manifest + "\n", encoding="utf-8")


def _is_complete(directory: Path, version: int = CACHE_FORMAT) -> bool:
    """Whether each file that the manifest lists is there in full."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest["format"] == version and all(
            (directory / name).stat().st_size == size for name, size in manifest["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
