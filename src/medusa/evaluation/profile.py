"""The time of one forward pass over N tokens, beside the limit that reading the weights sets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa.errors import UsageError
from medusa.models.backend import PlainTree
from medusa.models.native_backend import NativeBackend, native_module

if TYPE_CHECKING:
    from medusa.models.backend import Backend

SIZES = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
CONTEXT = 200


@dataclass(frozen=True, slots=True)
class Profile:
    """`seconds[N]` is the median time of a pass over a tree of N tokens after `context` others.

    `bytes` are the weights that a pass reads, `bandwidth` what the machine reads from memory in a second;
    both None on a backend other than the native one, which does not count them.
    """

    context: int
    seconds: dict[int, float]
    bytes: int | None
    bandwidth: float | None

    @property
    def limit_seconds(self) -> float | None:
        """No pass can be faster than its weights are read."""
        return self.bytes / self.bandwidth if self.bytes and self.bandwidth else None


def profile(
    backend: Backend, *, sizes: Sequence[int] = SIZES, context: int = CONTEXT, repeats: int = 15, slot: int = 0
) -> Profile:
    """Measures passes over binary trees; the sizes take turns, so that a drift of the machine hits all alike.

    Raises:
        UsageError: the slot is in use, or the context has no room.
    """
    if backend.length(slot):
        raise UsageError(f"slot {slot} is in use: finish what is being decoded there first")
    deepest = max(sizes).bit_length()
    if context + deepest > backend.max_length:
        raise UsageError(f"a profile needs {context + deepest} positions, but a slot holds {backend.max_length}")
    trees = {size: _binary_tree(size, backend.vocab_size) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    limits = []
    native = backend if isinstance(backend, NativeBackend) else None
    try:
        backend.prefill(slot, [(7 * i + 3) % backend.vocab_size for i in range(context)])
        for size in sizes:  # warm-up
            backend.verify([slot], [trees[size]])
        for turn in range(repeats):
            for size in sizes:
                started = time.perf_counter()
                logits, _ = backend.verify([slot], [trees[size]])
                float(logits[0, 0, 0])  # a device other than the CPU may still be at it
                times[size].append(time.perf_counter() - started)
            if native is not None and turn % 5 == 0:
                limits.append(_bandwidth(native))
    finally:
        backend.release(slot)
    return Profile(
        context=context,
        seconds={size: statistics.median(times[size]) for size in sizes},
        bytes=native.engine.weight_bytes if native is not None else None,
        bandwidth=statistics.median(limits) if limits else None,
    )


def _bandwidth(backend: NativeBackend) -> float:
    module = native_module()
    assert module is not None, "a native backend is running"
    return float(module.read_bandwidth(backend.engine.threads))


def _binary_tree(size: int, vocab_size: int) -> PlainTree:
    return PlainTree(
        tuple((11 * i + 5) % vocab_size for i in range(size)),
        tuple((i - 1) // 2 for i in range(size)),  # the root's parent is -1
    )
