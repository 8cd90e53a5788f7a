"""Runs a function of static tensors: captured as a CUDA graph and replayed, or called as it is.

All that a captured function reads and writes must stay where it is. Its first call for a key runs it three times in
all: twice to warm up (libraries choose their kernels and memory then), once to be captured. `undo` takes back what the
warm-up changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medusa.errors import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 2


def changing_rope(model: PreTrainedModel) -> str:
    """Says which rotary positions are computed on the host as a text grows; "" where all stay."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(rope.get("rope_type", ""))} | {str(r.get("rope_type")) for r in rope.values() if isinstance(r, dict)}
    changing = ", ".join(sorted(kinds & {"dynamic", "longrope"}))
    return f"its rotary positions ({changing}) change with the length of a text" if changing else ""


def refusal(model: PreTrainedModel) -> str:
    """Why a pass of this model cannot be captured; "" where nothing is known against it."""
    if changing := changing_rope(model):
        return changing
    if getattr(model, "is_loaded_in_8bit", False):
        return "bitsandbytes' 8 bits look for outliers, and wait for the device"
    return ""


class Captured:
    """One function for many keys; a graph for each.

    Attributes:
        bytes: of the device's memory that the graphs hold.
        refused: why nothing is captured, or not any more: some models wait for the device in a pass. What is known of a
            model beforehand is better said then, since a capture that fails leaves torch's allocator in disorder.
    """

    def __init__(self, device: torch.device, enabled: bool = True, refused: str = "") -> None:
        self._on = enabled and device.type == "cuda" and not refused
        self._graphs: dict[Hashable, tuple[Any, Tensor]] = {}
        self._pool: Any = None
        self._stream: Any = None
        self._device = device
        self.bytes = 0
        self.refused = refused

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forgets all graphs: something that they read has moved."""
        self._graphs.clear()
        self._pool = None  # which ends with its last graph
        self.bytes = 0

    def run(self, key: Hashable, function: Callable[[], Tensor], undo: Callable[[], Callable[[], None]]) -> Tensor:
        """What `function` returns; of a captured one, a tensor that its next call overwrites.

        Args:
            key: tells apart what cannot share a graph: shapes, and whatever the function decides by.
            undo: called before a warm-up; what it returns is called after it.
        """
        if not self._on:
            return function()
        if key not in self._graphs:
            try:
                with torch.cuda.device(self._device):
                    self._graphs[key] = self._capture(function, undo())
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._on, self.refused = False, shortened(error, 120)
                torch.cuda.synchronize()
                return function()
        graph, out = self._graphs[key]
        with torch.cuda.device(self._device):
            graph.replay()
        return out

    def _capture(self, function: Callable[[], Tensor], back: Callable[[], None]) -> tuple[Any, Tensor]:
        # Warmed up on the stream that is captured: what libraries keep for a stream is not to lie in a graph's pool.
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function()
                    back()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # as a capture begins with; what it then takes is the graph's
        before = torch.cuda.memory_reserved(self._device)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            out = function()
        self.bytes += torch.cuda.memory_reserved(self._device) - before
        self._pool = self._pool or graph.pool()  # graphs run one after another, so that they may share memory
        return graph, out
