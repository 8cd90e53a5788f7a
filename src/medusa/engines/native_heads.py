"""Medusa heads on the native engine: its threads and packed linear layers. They only guess, so they may be rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa.engines.native import NativeBackend, native_module
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Block, Heads, HeadsState, Tilt


class NativeHeads:
    """The heads `heads`, packed for the engine of `backend`; the torch module is not needed afterwards.

    `precision` is that of the weights: float32, bfloat16, int8 or int4.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, backend: NativeBackend, heads: Heads, precision: str = "int8") -> None:
        module = native_module()
        assert module is not None, "a native backend is running"
        config = heads.config
        self.config: HeadsConfig = config
        self.lm_head_rows = heads.lm_head_rows
        self._parameters = heads.num_parameters()
        self.engine_heads: Any = module.Heads(
            backend.engine,
            kind=config.kind,
            levels=config.num_heads,
            features=1 + len(config.feature_layers),
            precision=precision,
        )
        if config.feature_layers:
            self.engine_heads.load_projection(heads.project.weight.detach())
        blocks: Any = [[heads.block]] if config.kind == "recurrent" else heads.blocks
        for k, layers in enumerate(blocks, start=1):
            self.engine_heads.load_level(k, [_weights(block) for block in layers])
        self.draft_ids = heads.draft_ids
        ids = [] if heads.draft_ids is None else heads.draft_ids.tolist()
        if config.tie_lm_head:
            self.engine_heads.load_tied(ids)
        else:
            self.engine_heads.load_own([matrix.detach() for matrix in heads.lm_heads], ids)

    def num_parameters(self) -> int:
        return self._parameters

    def begin(self, features: Tensor) -> HeadsState:
        base = torch.from_numpy(self.engine_heads.begin(np.ascontiguousarray(features.numpy())))
        return HeadsState(base, base if self.config.kind == "recurrent" else base[..., :0])

    def guess(
        self, k: int, state: HeadsState, parents: Tensor, tokens: Tensor, count: int, tilt: Tilt | None = None
    ) -> tuple[Tensor, Tensor, HeadsState]:
        log_p, ids, nodes = self.engine_heads.level(
            k,
            state.base.numpy(),
            np.ascontiguousarray(state.nodes.numpy()),
            np.ascontiguousarray(parents.numpy(), dtype=np.int32),
            np.ascontiguousarray(tokens.numpy(), dtype=np.int32),
            count,
            None if tilt is None else tilt.factors.numpy(),
            None if tilt is None else tilt.noise.numpy(),
        )
        return torch.from_numpy(log_p), torch.from_numpy(ids).long(), HeadsState(state.base, torch.from_numpy(nodes))


def _weights(block: Block) -> dict[str, Tensor]:
    if block.gated:
        return {name: getattr(block, name).weight.detach() for name in ("gate", "up", "down")}
    return {"linear": block.linear.weight.detach(), "bias": block.linear.bias.detach()}
