"""Runs a function of static tensors: captured as a CUDA graph and replayed, or called as it is.

All that a captured function reads and writes must stay where it is. Its first call for a key runs it three times in
all: twice to warm up (libraries choose their kernels and memory then), once to be captured. `undo` takes back what the
warm-up changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from medusa.errors import shortened

WARM_UP = 2


class Captured:
    """One function for many keys; a graph for each.

    Attributes:
        bytes: of the device's memory that the graphs hold.
        refused: why nothing is captured any more, where a capture failed: some models wait for the device in a pass.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._on = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, tuple[Any, Tensor]] = {}
        self._pool: Any = None
        self._device = device
        self.bytes = 0
        self.refused = ""

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forgets all graphs: something that they read has moved."""
        self._graphs.clear()
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
                self._graphs[key] = self._capture(function, undo())
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._on, self.refused = False, shortened(error, 120)
                torch.cuda.synchronize()
                return function()
        graph, out = self._graphs[key]
        graph.replay()
        return out

    def _capture(self, function: Callable[[], Tensor], back: Callable[[], None]) -> tuple[Any, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function()
                    back()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_reserved(self._device)
        with torch.cuda.graph(graph, pool=self._pool):
            out = function()
        self.bytes += torch.cuda.memory_reserved(self._device) - before
        self._pool = self._pool or graph.pool()  # graphs run one after another, so that they may share memory
        return graph, out
