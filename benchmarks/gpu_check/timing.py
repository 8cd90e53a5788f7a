"""Times of work on a device, and how fast the device reads, copies and multiplies.

On CUDA the clock is the device's own (events). Nothing is timed on zeros: a device that computes with zeros draws less
power and so runs faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def spread(seconds: Sequence[float], unit: float = 1e3) -> dict[str, float]:
    """min, median and max of some times, in milliseconds where `unit` is 1e3."""
    shown = [unit * s for s in seconds]
    return {
        "min": round(min(shown), 4),
        "median": round(statistics.median(shown), 4),
        "max": round(max(shown), 4),
        "times": len(shown),
    }


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(
    call: Callable[[], object],
    device: str,
    *,
    repeats: int,
    warmup: int = 2,
    between: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds of each of `repeats` calls; `between` runs before each and is not timed."""
    for _ in range(warmup):
        call()
    wait(device)
    if not device.startswith("cuda"):
        seconds = []
        for _ in range(repeats):
            between()
            begun = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun)
        return seconds
    events = []
    for _ in range(repeats):
        between()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    wait(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def replayed(calls: Sequence[Callable[[], object]], device: str, *, repeats: int = 7) -> tuple[list[float], bool]:
    """Seconds of one of `calls`, run one after another, and whether they were replayed as a CUDA graph.

    Each call should read memory of its own: then with what is written in between (256 MB) no cache holds it already.
    """

    def run() -> None:
        for call in calls:
            call()

    graph = None
    arguments: dict[str, Any] = {"repeats": repeats}
    if device.startswith("cuda"):
        graph = _captured(run)
        arguments["between"] = torch.empty(256 << 20, dtype=torch.uint8, device=device).random_
    whole = timed(run if graph is None else graph.replay, device, **arguments)
    return [seconds / len(calls) for seconds in whole], graph is not None


def _captured(run: Callable[[], None]) -> Any:
    """`run` as a CUDA graph, or None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def device_rates(device: str, tiny: bool) -> dict[str, Any]:
    """Gigabytes a second of a copy (read and written), of a sum and of a product with one vector (read), and the rate
    of large products in bfloat16. `read_GB_per_second` is the greatest of the three: the limit that reading sets."""
    side = 256 if tiny else 32768  # 2 GiB in bfloat16
    repeats = 3 if tiny else 10
    weights = torch.empty(side, side, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    target = torch.empty_like(weights)
    vector = torch.randn(side, 1, dtype=torch.bfloat16, device=device)
    size = weights.numel() * weights.element_size()
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: target.copy_(weights), 2 * size),
        "sum": (lambda: weights.sum(), size),
        "product_with_a_vector": (lambda: weights @ vector, size),
    }
    rates: dict[str, Any] = {}
    for name, (call, moved) in runs.items():
        rates[f"{name}_GB_per_second"] = round(moved / 1e9 / statistics.median(timed(call, device, repeats=repeats)), 1)
    rates["read_GB_per_second"] = max(rates.values())
    side = 128 if tiny else 8192
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = statistics.median(timed(lambda: a @ b, device, repeats=repeats))
    rates["bfloat16_TFLOP_per_second"] = round(2 * side**3 / 1e12 / seconds, 3)
    return rates


def free_memory(device: str) -> None:
    """Gives back what nothing holds any more."""
    import gc

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def exact_float32() -> None:
    """float32 is float32: no TF32 in products."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
