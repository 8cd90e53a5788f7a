"""What `scripts/gpu-check` finds, as a JSON file that is whole after every measurement, and as a short table.

    {"format": 1, "machine": {...}, "options": {...}, "parts": {"times": {"status": "done", "found": {...}}, ...}}

A part is "running" until it ends; what ends it is its status: done, failed (something raised an error or was not as it
must be), cut short (its time was up; what it had is there), or killed (from outside, past its hard limit).
"""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from medusa.errors import MedusaError, shortened
from medusa.files import write_whole

FORMAT = 1
WELL = ("done", "cut short", "left out")
TRACEBACK_LINES = 12

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be checked. `device` is where; `tiny` takes shapes of seconds on a CPU."""

    out: Path
    device: str = "cuda"
    tiny: bool = False
    model: str | None = None  # a GGUF file or a directory; None: the default model, where its file is installed
    heads: str = "auto"

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


class Report:
    """The file. One process writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"format": FORMAT, "parts": {}}
        if path.is_file():
            self.data = read(path)

    def save(self) -> None:
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")

    def part(self, name: str) -> dict[str, Any]:
        part: dict[str, Any] = self.data["parts"].setdefault(name, {})
        return part


def read(path: Path) -> dict[str, Any]:
    """A report. Raises MedusaError: it is damaged, or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MedusaError(f"cannot read the report {path} ({error}): give another file to --out") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise MedusaError(f"{path} is not a report of gpu-check: give another file to --out")
    return data


class Part:
    """One part of the check while it runs: what it finds is in the file at once."""

    def __init__(self, report: Report, name: str, seconds: float) -> None:
        self.report, self.name, self.seconds = report, name, seconds
        self._begun = time.perf_counter()
        self.data = report.part(name)
        self.data.clear()
        self.data.update(status="running", limit_seconds=seconds, seconds=0.0, found={}, errors=[], notes=[])
        report.save()

    @property
    def left(self) -> float:
        """Seconds until the part should end."""
        return self.seconds - (time.perf_counter() - self._begun)

    def set(self, key: str, value: Any) -> None:
        """Keeps a value under a path such as "7B/steps/64"."""
        *places, last = key.split("/")
        at = self.data["found"]
        for place in places:
            at = at.setdefault(place, {})
        at[last] = value
        self._save()

    def get(self, key: str) -> Any:
        """What is kept under a path; None where nothing is."""
        at: Any = self.data["found"]
        for place in key.split("/"):
            at = at.get(place) if isinstance(at, dict) else None
        return at

    def note(self, text: str) -> None:
        """Something a reader should know which is no fault."""
        if text not in self.data["notes"]:
            self.data["notes"].append(text)
        self._save()

    def expect(self, good: bool, text: str) -> None:
        """`text` says what is wrong where `good` is not so."""
        if not good:
            self.data["errors"].append({"where": self.name, "type": "expectation", "message": text, "traceback": []})
        self._save()

    def measure(self, key: str, call: Callable[[], T], *, needs: float = 0.0) -> T | None:
        """Keeps what `call` returns under `key`, if it is not None; for the rest see `attempt`."""
        value = self.attempt(key, call, needs=needs)
        if value is not None:
            self.set(key, value)
        return value

    def attempt(self, key: str, call: Callable[[], T], *, needs: float = 0.0) -> T | None:
        """What `call` returns. An error is kept and does not end the part. Where fewer than `needs` seconds are left
        the call is left out."""
        if self.left <= needs:
            self.data.setdefault("left_out", []).append(key)
            self._save()
            return None
        try:
            return call()
        except Exception as error:  # noqa: BLE001  # whatever fails is told, and the next measurement runs
            self.fail(key, error)
            return None

    def fail(self, where: str, error: BaseException) -> None:
        self.data["errors"].append(error_facts(where, error))
        self._save()

    def end(self) -> None:
        cut = "cut short" if self.data.get("left_out") else "done"
        self.data["status"] = "failed" if self.data["errors"] else cut
        self._save()

    def _save(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self._begun, 2)
        self.report.save()


def error_facts(where: str, error: BaseException) -> dict[str, Any]:
    """An error as it stands in the report."""
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__)).splitlines()
    return {
        "where": where,
        "type": type(error).__name__,
        "message": shortened(error, 500),
        "traceback": lines[-TRACEBACK_LINES:],
    }


def machine_facts(device: str) -> dict[str, Any]:
    """The device, its driver and the versions of what runs on it."""
    import torch
    import transformers

    import medusa

    facts: dict[str, Any] = {
        "device": device,
        "name": platform.processor() or platform.machine(),
        "memory_GB": None,
        "driver": None,
        "versions": {
            "medusa": medusa.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cuda": torch.version.cuda,
        },
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        facts.update(
            name=properties.name,
            memory_GB=round(properties.total_memory / 1e9, 1),
            multiprocessors=properties.multi_processor_count,
            driver=_driver(),
        )
    return facts


def _driver() -> str | None:
    import subprocess

    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return printed.split("\n")[0].strip() or None


def all_well(data: Mapping[str, Any]) -> bool:
    """Whether every part that was asked for ended as it should."""
    return all(part.get("status") in WELL for part in data["parts"].values())
