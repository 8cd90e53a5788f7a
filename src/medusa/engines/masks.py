"""Which tokens a node of a draft attends to: additive masks, as transformers passes them through to its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa.errors import MedusaError

Masks = Tensor | dict[str, Tensor]  # additive [B, 1, N, used]: of the one kind of attention, or by the kind


class MaskMaker:
    """Masks for each kind of attention that the model mixes."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.window: int | None = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds:
            kinds = {"sliding_attention"} if self.window else {"full_attention"}
        if "sliding_attention" not in kinds:
            self.window = None
        elif not self.window:
            raise MedusaError(
                f"the configuration of this {config.model_type} model has layers of sliding attention, but no "
                "sliding_window: mend its config.json"
            )
        self.kinds = kinds

    def make(
        self, lengths: Sequence[int], depths: np.ndarray, visible: np.ndarray, used: int, device: torch.device
    ) -> Masks:
        """Masks of N nodes a row after texts of `lengths`: depths [B, N], and visible [B, N, N] among the nodes."""
        batch, count, _ = visible.shape
        allowed = np.zeros((batch, count, used), dtype=np.bool_)
        for b, length in enumerate(lengths):
            allowed[b, :, :length] = True
            allowed[b, :, length : length + count] = visible[b]
        near = None
        if self.window is not None:
            keys = np.broadcast_to(np.arange(used), (batch, used)).copy()  # position of the token at each place
            queries = np.asarray(lengths)[:, None] + depths  # [B, N]
            for b, length in enumerate(lengths):
                keys[b, length : length + count] = queries[b]
            near = torch.from_numpy(queries[:, :, None] - keys[:, None] < self.window)
        return self._additive(torch.from_numpy(allowed), near, device)

    def make_on_device(self, lengths: Tensor, depths: Tensor, ancestors: Tensor, used: int) -> Masks:
        """The same of tensors alone: lengths [B], depths [B, N], and one ancestor mask [N, N] for all rows."""
        count = len(ancestors)
        places = torch.arange(used, device=lengths.device)
        offsets = places - lengths[:, None]  # [B, used]: below 0 the text, then the nodes
        nodes = offsets.clamp(0, count - 1)
        drafted = (offsets >= 0) & (offsets < count)
        own = ancestors[:, nodes].transpose(0, 1) & drafted[:, None]  # [B, N, used]
        allowed = own | (offsets < 0)[:, None]
        near = None
        if self.window is not None:
            keys = torch.where(drafted, lengths[:, None] + depths.gather(1, nodes), places)
            queries = lengths[:, None] + depths  # [B, N]
            near = queries[:, :, None] - keys[:, None] < self.window
        return self._additive(allowed, near, lengths.device)

    def _additive(self, allowed: Tensor, near: Tensor | None, device: torch.device) -> Masks:
        """Of what a node may see [B, N, used], and of what lies within the window."""
        zero = torch.zeros((), dtype=self.dtype, device=allowed.device)
        masks = {}
        for kind in self.kinds:
            seen = allowed if near is None or kind == "full_attention" else allowed & near
            masks[kind] = zero.masked_fill(~seen, torch.finfo(self.dtype).min).unsqueeze(1).to(device)
        return masks if len(masks) > 1 else next(iter(masks.values()))
