"""Which tokens a node of a draft attends to: additive masks, as transformers passes them through to its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa.errors import MedusaError


class MaskMaker:
    """Additive masks [B, 1, N, used], one for each kind of attention the model mixes."""

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
    ) -> Tensor | dict[str, Tensor]:
        batch, count, _ = visible.shape
        allowed = np.zeros((batch, count, used), dtype=np.bool_)
        for b, length in enumerate(lengths):
            allowed[b, :, :length] = True
            allowed[b, :, length : length + count] = visible[b]
        masks = {"full_attention": allowed}
        if self.window is not None:
            places = np.broadcast_to(np.arange(used), (batch, used)).copy()  # position of the token at each place
            queries = np.asarray(lengths)[:, None] + depths  # [B, N]
            for b, length in enumerate(lengths):
                places[b, length : length + count] = queries[b]
            masks["sliding_attention"] = allowed & (queries[:, :, None] - places[:, None, :] < self.window)
        made = {kind: self._additive(masks[kind], device) for kind in self.kinds}
        return made if len(made) > 1 else next(iter(made.values()))

    def make_on_device(
        self, lengths: Tensor, depths: Tensor, ancestors: Tensor, used: int
    ) -> Tensor | dict[str, Tensor]:
        """The same of tensors alone: lengths [B], depths [B, N], and one ancestor mask [N, N] for all rows."""
        count = len(ancestors)
        places = torch.arange(used, device=lengths.device)
        offsets = places - lengths[:, None]  # [B, used]: below 0 the text, then the nodes
        nodes = offsets.clamp(0, count - 1)
        drafted = (offsets >= 0) & (offsets < count)
        own = ancestors[:, nodes].transpose(0, 1) & drafted[:, None]  # [B, N, used]
        allowed = own | (offsets < 0)[:, None]
        masks = {"full_attention": allowed}
        if self.window is not None:
            keys = torch.where(drafted, lengths[:, None] + depths.gather(1, nodes), places)
            queries = lengths[:, None] + depths  # [B, N]
            masks["sliding_attention"] = allowed & (queries[:, :, None] - keys[:, None] < self.window)
        zero = torch.zeros((), dtype=self.dtype, device=lengths.device)
        made = {kind: zero.masked_fill(~masks[kind], torch.finfo(self.dtype).min).unsqueeze(1) for kind in self.kinds}
        return made if len(made) > 1 else next(iter(made.values()))

    def _additive(self, allowed: np.ndarray, device: torch.device) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.dtype)
        mask.masked_fill_(torch.from_numpy(~allowed), torch.finfo(self.dtype).min)
        return mask.unsqueeze(1).to(device)
