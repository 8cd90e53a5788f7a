"""Models whose GGUF files `scripts/get-model` brings into the cache: for benchmarks and training without the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medusa.files import cache_dir


@dataclass(frozen=True, slots=True)
class Fetched:
    """A GGUF file, known by its content."""

    hub_id: str  # where the same model lives on the Hub; taken when the file is not there
    sha256: str


FETCHED: dict[str, Fetched] = {
    "qwen2.5-coder-0.5b": Fetched(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",  # Apache-2.0
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Fetched(
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",  # Apache-2.0
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def fetched_file(fetched: Fetched) -> Path:
    """Where the file is, or will be."""
    name = next(name for name, known in FETCHED.items() if known == fetched)
    return cache_dir() / "files" / f"{name}.gguf"
