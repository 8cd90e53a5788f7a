"""The time of one forward pass over N tokens, beside the limit that reading the weights sets.

`profile` measures. `measured_profile` does so once for each machine and engine, and keeps the result in the cache:

    profiles/<key>.json    key: a digest of all that the times depend on, which the file repeats

A file that is damaged or of something else is measured anew; where none can be written, nothing is kept.

Other work on the machine makes passes and drafts slower, never faster. Three rules follow. A time is the lower quartile
of many. What was measured while others took more than a tenth of the machine is used and not kept. And what is kept is
measured anew where a pass or a draft is much faster now than it says: so times from bad company do not outlive it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medusa
from medusa.engines.native import NativeBackend, native_module
from medusa.engines.protocol import PlainTree
from medusa.errors import UsageError
from medusa.files import cache_dir, replacing

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.engines.protocol import Backend

SIZES = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
CONTEXT = 200
QUICK_SIZES = (1, 2, 4, 8, 12, 16, 24, 32)
QUICK_CONTEXT = 64
QUICK_SECONDS = 1.5
# What a longer text adds is measured by two sizes after one, where that is read in a moment. Where it is not, the model
# is large and its weights take the time.
FAR_CONTEXT = 1024
FAR_SIZE = 16  # the larger of the two sizes, at most; the other is 1
FAR_SECONDS = 0.75  # to read the text, and again to measure
BUSY = 0.1  # share of all cores that others may take
REFUTED = 1.5  # how much longer than it takes now a kept time may be
FORMAT = 2  # raise it when what is measured changes


@dataclass(frozen=True, slots=True)
class Profile:
    """`seconds[N]` is the time of a pass over a tree of N tokens after `context` others (the lower quartile of all
    turns), `far[N]` that of two sizes after `far_context` others, where those were measured.

    `bytes` are the weights that a pass reads, `bandwidth` what the machine reads from memory in a second;
    both None on a backend other than the native one, which does not count them. `draft_seconds` is the time of a draft,
    where that was to be measured.
    """

    context: int
    seconds: dict[int, float]
    bytes: int | None
    bandwidth: float | None
    draft_seconds: float | None = None
    far: dict[int, float] = field(default_factory=dict)
    far_context: int = 0

    @property
    def limit_seconds(self) -> float | None:
        """No pass can be faster than its weights are read."""
        return self.bytes / self.bandwidth if self.bytes and self.bandwidth else None


def profile(
    backend: Backend,
    *,
    sizes: Sequence[int] = SIZES,
    context: int = CONTEXT,
    repeats: int = 15,
    seconds: float = math.inf,
    draft: Callable[[Tensor], object] | None = None,
) -> Profile:
    """Measures passes over binary trees in slot 0; the sizes take turns, so that a drift of the machine hits all alike.

    Args:
        sizes: rising numbers of tokens.
        seconds: about how long it may take: past that, sizes after the fourth are left out, and repeats after the
            second.
        draft: takes features [F*H] and drafts. It is measured after each pass, which is where drafts are made: their
            weights have left the processor's caches by then.

    Raises:
        UsageError: the slot is in use, or the context has no room.
    """
    if backend.length(0):
        raise UsageError("slot 0 is in use: finish what is being decoded there first")
    deepest = max(sizes).bit_length()
    if context + deepest > backend.max_length:
        raise UsageError(f"a profile needs {context + deepest} positions, but a slot holds {backend.max_length}")
    trees = {size: _binary_tree(size, backend.vocab_size) for size in sizes}
    times: dict[int, list[float]] = {}
    drafting: list[float] = []
    limits = []
    native = backend if isinstance(backend, NativeBackend) else None
    end = time.perf_counter() + seconds
    try:
        _, features = backend.extend(0, [(7 * i + 3) % backend.vocab_size for i in range(context)])
        for size in sizes:  # warm-up
            if len(times) >= 4 and time.perf_counter() > end:
                break
            backend.verify([0], [trees[size]])
            times[size] = []
        if draft is not None:
            draft(features)
        for turn in range(repeats):
            if turn >= 2 and time.perf_counter() > end:
                break
            for size in times:
                started = time.perf_counter()
                logits, _ = backend.verify([0], [trees[size]])
                float(logits[0, 0, 0])  # a device other than the CPU may still be at it
                times[size].append(time.perf_counter() - started)
                if draft is not None:
                    started = time.perf_counter()
                    draft(features)
                    drafting.append(time.perf_counter() - started)
            if native is not None and seconds == math.inf and turn % 5 == 0:
                limits.append(_bandwidth(native))
    finally:
        backend.release(0)
    return Profile(
        context=context,
        seconds={size: _lower_quartile(taken) for size, taken in times.items()},
        bytes=native.engine.weight_bytes if native is not None else None,
        bandwidth=statistics.median(limits) if limits else None,
        draft_seconds=_lower_quartile(drafting) if drafting else None,
    )


def _lower_quartile(taken: Sequence[float]) -> float:
    """Not the median, which follows other work as soon as that hits every second turn; not the fastest, which hangs on
    one lucky turn."""
    return sorted(taken)[(len(taken) - 1) // 4]


def measured_profile(
    backend: Backend,
    facts: Mapping[str, object],
    *,
    draft: Callable[[Tensor], object] | None = None,
    refresh: bool = False,
    progress: bool = False,
) -> Profile | None:
    """The profile kept in the cache, or a quick one of about 3 seconds, which is then kept if the machine was quiet.

    Args:
        facts: what the times depend on and the backend does not say: dtype, device, threads, heads and the like.
        draft: see `profile`.
        refresh: measure, whatever is kept.
        progress: say on stderr that it is being measured.

    Returns:
        None where nothing is kept and nothing can be measured: slot 0 is in use, or it is too short.
    """
    key = _key_facts(backend, facts)
    path = profiles_dir() / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()[:32]}.json"
    kept = None if refresh else _read(path, key, drafting=draft is not None)
    context = min(QUICK_CONTEXT, backend.max_length - max(QUICK_SIZES).bit_length())
    if context < 1 or backend.length(0):
        return kept
    if kept is not None and not _refuted(kept, backend, draft):
        return kept
    if progress:
        print("measuring this machine once ...", file=sys.stderr, flush=True)
    before = _processor_times()
    measured = profile(backend, sizes=QUICK_SIZES, context=context, seconds=QUICK_SECONDS, draft=draft)
    measured = _with_far(measured, backend)
    if _share_of_others(before) <= BUSY:
        _write(path, key, measured)
    elif progress:
        print("other programs kept it busy: it will be measured again next time", file=sys.stderr, flush=True)
    return measured


def _with_far(near: Profile, backend: Backend) -> Profile:
    """The profile and two sizes after a longer text, if there is room and time for one."""
    largest = max(near.seconds)
    readable = int(FAR_SECONDS * largest / near.seconds[largest])  # tokens of a prompt take no longer than these
    few, many = 1, max(size for size in near.seconds if size <= FAR_SIZE)
    context = min(FAR_CONTEXT, readable, backend.max_length - many.bit_length())
    if context < 4 * QUICK_CONTEXT or few == many:  # what so few positions add is lost in the noise
        return near
    far = profile(backend, sizes=(few, many), context=context, seconds=FAR_SECONDS)
    return replace(near, far=far.seconds, far_context=far.context)


def _refuted(kept: Profile, backend: Backend, draft: Callable[[Tensor], object] | None) -> bool:
    """Whether a pass over one token, or a draft, is so much faster now that others must have been at work when it was
    measured."""
    now = profile(backend, sizes=(1,), context=min(8, kept.context), repeats=2, draft=draft)
    slow = REFUTED * now.seconds[1] < kept.seconds[1]
    if now.draft_seconds is not None and kept.draft_seconds is not None:
        slow = slow or REFUTED * now.draft_seconds < kept.draft_seconds
    return slow


def _share_of_others(before: tuple[float, float]) -> float:
    """How much of all cores other programs have taken since `before`; 0 where the system does not say."""
    every, others = (now - then for now, then in zip(_processor_times(), before, strict=True))
    return others / every if every > 0 else 0.0


def _processor_times() -> tuple[float, float]:
    """Seconds of all cores together, and those of them that others took (a host of this machine, too)."""
    import psutil

    try:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
    except (OSError, psutil.Error):
        return 0.0, 0.0
    # Guests are counted as users already.
    times = {name: taken for name, taken in every._asdict().items() if not name.startswith("guest")}
    total = sum(times.values())
    return total, total - times["idle"] - times.get("iowait", 0.0) - own.user - own.system


def profiles_dir() -> Path:
    """Where profiles are kept."""
    return cache_dir() / "profiles"


def _key_facts(backend: Backend, facts: Mapping[str, object]) -> dict[str, Any]:
    """All that the times depend on, as JSON has it."""
    import torch

    key = {
        **facts,
        "format": FORMAT,
        "machine": machine(),
        "backend": backend.name,
        "layers": backend.num_layers,
        "hidden_size": backend.hidden_size,
        "vocabulary": backend.vocab_size,
        "versions": [medusa.__version__, torch.__version__],
        "engine": _native_build() if backend.name == "native" else None,
    }
    as_json: dict[str, Any] = json.loads(_canonical(key))
    return as_json


def _native_build() -> list[object]:
    """Tells one build of the native engine from another: of the same version, one may be faster."""
    file = Path(str(native_module()._engine.__file__)).stat()  # type: ignore[union-attr]
    return [file.st_size, file.st_mtime_ns]


def _canonical(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True, default=str)


def machine() -> list[object]:
    """The processor's name and number of cores, and the GPU's name."""
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return [name, os.cpu_count(), gpu]


def _read(path: Path, key: Mapping[str, Any], *, drafting: bool) -> Profile | None:
    """The profile kept in `path`; None where it is missing, damaged, of something else, or lacks the drafting."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        ours = data["key"] == key
        draft = None if data["draft_seconds"] is None else float(data["draft_seconds"])
        seconds, far = ({int(n): float(taken) for n, taken in data[name].items()} for name in ("seconds", "far"))
        context, far_context = int(data["context"]), int(data["far_context"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not ours or len(seconds) < 2 or 1 not in seconds or min(seconds) < 1 or (drafting and draft is None):
        return None
    times = [*seconds.values(), *far.values(), *([] if draft is None else [draft])]
    if not all(math.isfinite(taken) and taken > 0 for taken in times):
        return None
    if far and (len(far) != 2 or not far.keys() <= seconds.keys() or far_context <= context):
        return None
    return Profile(context, seconds, None, None, draft, far, far_context)


def _write(path: Path, key: Mapping[str, Any], measured: Profile) -> None:
    """Whole or not at all; a cache that cannot be written keeps nothing."""
    data = {name: getattr(measured, name) for name in ("context", "seconds", "draft_seconds", "far_context", "far")}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as scratch:
            scratch.write_text(json.dumps({"key": key, **data}, indent=1) + "\n", encoding="utf-8")


def _bandwidth(backend: NativeBackend) -> float:
    module = native_module()
    assert module is not None, "a native backend is running"
    return float(module.read_bandwidth(backend.engine.threads))


def _binary_tree(size: int, vocab_size: int) -> PlainTree:
    return PlainTree(
        tuple((11 * i + 5) % vocab_size for i in range(size)),
        tuple((i - 1) // 2 for i in range(size)),  # the root's parent is -1
    )
