"""Medusa heads: small modules on the frozen model's last hidden state, one for each future position.

Head k = 1..K reads the features of the last accepted token t (the input of the LM head, optionally joined by hidden
states of middle layers) and predicts token t+1+k; the token t+1 is the model's own and already known: the root.

Three kinds share one interface, `begin` then `level` by `level`:

- `residual`: h + SiLU(W h + b), then an LM head (https://arxiv.org/abs/2401.10774, section 2.1.1).
- `sequential`: the block of head k also reads the embeddings of the k tokens before the one it predicts
  (https://arxiv.org/abs/2402.05109).
- `recurrent`: one block shared over the levels; it turns (state, h, embedding of the last token) into the next state.

With `mlp_width` every block is a gated MLP in place of the single layer. What a head does not do: verify, or choose
a tree; see `decoding/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medusa.errors import UsageError
from medusa.heads.config import HeadsConfig, check_shape


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """What heads borrow from the frozen model: token embeddings [V, H] and LM head rows [V, H]."""

    embedding: Tensor
    lm_head: Tensor


class Block(nn.Module):
    """[..., in] -> [..., H]: one SiLU layer, or a gated MLP. Its output is zero at the start, so that a new head
    begins as the model's own LM head."""

    def __init__(self, in_size: int, hidden_size: int, mlp_width: int) -> None:
        super().__init__()
        if mlp_width:
            self.gate = nn.Linear(in_size, mlp_width, bias=False)
            self.up = nn.Linear(in_size, mlp_width, bias=False)
            self.down = nn.Linear(mlp_width, hidden_size, bias=False)
            nn.init.zeros_(self.down.weight)
        else:
            self.linear = nn.Linear(in_size, hidden_size)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        self.gated = mlp_width > 0

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        else:
            out = F.silu(self.linear(x))
        return out


@dataclass(frozen=True, slots=True)
class HeadsState:
    """Where drafting stands: `base` [B, 1, H], and for the nodes of the last level what their children need,
    `nodes` [B, M, ...]: the recurrent state, or the embeddings of the path so far."""

    base: Tensor
    nodes: Tensor


class Tilt(NamedTuple):
    """What turns the logits of text b into others: `factors[b]` * logits + `noise[b]`. float32, [B] and [B, V']."""

    factors: Tensor
    noise: Tensor


class HeadsRunner(Protocol):
    """What drafting asks of heads, wherever they run."""

    config: HeadsConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def lm_head_rows(self) -> int:
        """V': how many tokens a head can propose."""
        ...

    @property
    def draft_ids(self) -> Tensor | None:
        """The tokens [V'] that a head can propose; None: all, in order."""
        ...

    def num_parameters(self) -> int: ...

    def begin(self, features: Tensor) -> HeadsState:
        """features [B, F*H] of the last accepted token -> the state from which level 1 is drafted."""
        ...

    def guess(
        self, k: int, state: HeadsState, parents: Tensor, tokens: Tensor, count: int, tilt: Tilt | None = None
    ) -> tuple[Tensor, Tensor, HeadsState]:
        """The `count` likeliest tokens after each node, by logits that are tilted where that is asked for; other
        arguments as in `Heads.level`.

        Returns:
            log-probabilities and token ids [B, M, count], best first, M = 1 where they are the same for every node.
            The state for level k + 1.
        """
        ...


class Heads(nn.Module):
    """K heads over one model. `base` is borrowed: neither trained nor saved."""

    embedding: Tensor  # [V, H]
    lm_head: Tensor  # [V', H], where it is tied
    draft_ids: Tensor | None  # [V']

    def __init__(self, config: HeadsConfig, base: BaseWeights, draft_ids: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        check_shape(config, *base.embedding.shape)
        if (draft_ids is None) != (config.draft_vocab == 0):
            raise UsageError("heads: draft_ids are needed exactly when draft_vocab is not 0")
        self.register_buffer("draft_ids", None if draft_ids is None else draft_ids.to(torch.int64))
        if config.feature_layers:
            self.project = nn.Linear(config.feature_size, size, bias=False)
            nn.init.zeros_(self.project.weight)
            nn.init.eye_(self.project.weight.detach()[:, -size:])
        if config.kind == "recurrent":
            self.block = Block(3 * size, size, config.mlp_width)
        else:
            self.blocks = nn.ModuleList()
            for k in range(1, config.num_heads + 1):
                first = size * (1 + k) if config.kind == "sequential" else size
                sizes = [first, *[size] * (config.num_layers - 1)]
                self.blocks.append(nn.ModuleList(Block(in_size, size, config.mlp_width) for in_size in sizes))
        rows = base.lm_head if draft_ids is None else base.lm_head[draft_ids.to(base.lm_head.device)]
        self.register_buffer("embedding", base.embedding.detach(), persistent=False)
        if config.tie_lm_head:
            self.register_buffer("lm_head", rows.detach(), persistent=False)
        else:
            own = [nn.Parameter(rows.detach().clone().float()) for _ in range(config.num_heads)]
            self.lm_heads = nn.ParameterList(own)

    def begin(self, features: Tensor) -> HeadsState:
        """features [B, F*H] of the last accepted token -> the state from which level 1 is drafted."""
        size = self.config.hidden_size
        base = features[:, -size:]
        if self.config.feature_layers:
            middle = features[:, :-size].reshape(len(features), -1, size)  # [B, F-1, H]
            middle = F.rms_norm(middle, (size,))  # middle layers are not normalised by the model
            base = self.project(torch.cat([middle.flatten(1), base], dim=-1))
        base = base.unsqueeze(1)
        return HeadsState(base, base if self.config.kind == "recurrent" else base[..., :0])

    def level(self, k: int, state: HeadsState, parents: Tensor, tokens: Tensor) -> tuple[Tensor, HeadsState]:
        """What may follow each of M tokens, by head k.

        Args:
            k: the level, from 1; level 1 follows the root.
            state: of the level before.
            parents: [B, M] for each token, the index of its parent among the level before (0 at level 1).
            tokens: [B, M] token ids; at level 1 the root.

        Returns:
            logits [B, M, V'] over the draft vocabulary, or [B, 1, V'] where they are the same for every node.
            The state for level k + 1.
        """
        base = state.base
        if self.config.kind == "residual":
            return self._logits(k, self._run(k, base, base)), state
        embedded = F.embedding(tokens, self.embedding).to(base.dtype)  # [B, M, H]
        index = parents.unsqueeze(-1).expand(-1, -1, state.nodes.shape[-1])
        nodes = state.nodes.expand(-1, max(1, state.nodes.shape[1]), -1).gather(1, index)  # [B, M, ...]
        base = base.expand(-1, tokens.shape[1], -1)
        if self.config.kind == "recurrent":
            nodes = nodes + self.block(torch.cat([nodes, base, embedded], dim=-1))
            hidden = nodes
        else:
            nodes = torch.cat([nodes, embedded], dim=-1)
            hidden = self._run(k, base, torch.cat([base, nodes], dim=-1))
        return self._logits(k, hidden), HeadsState(state.base, nodes)

    def guess(
        self, k: int, state: HeadsState, parents: Tensor, tokens: Tensor, count: int, tilt: Tilt | None = None
    ) -> tuple[Tensor, Tensor, HeadsState]:
        """See `HeadsRunner`."""
        logits, state = self.level(k, state, parents, tokens)
        logits = logits.float()
        if tilt is not None:
            logits = logits * tilt.factors[:, None, None] + tilt.noise[:, None]
        log_p, ids = torch.log_softmax(logits, dim=-1).topk(count, dim=-1)
        return log_p, self.to_token_ids(ids), state

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def forward(self, features: Tensor, tokens: Tensor) -> list[Tensor]:
        """Teacher-forced logits for training: features [T, F*H] and the K tokens after each, tokens [T, K]
        (t+1..t+K) -> K tensors [T, V'], the k-th for token t+1+k."""
        state, logits = self.begin(features), []
        parents = torch.zeros_like(tokens[:, :1])
        for k in range(1, self.config.num_heads + 1):
            out, state = self.level(k, state, parents, tokens[:, k - 1 : k])
            logits.append(out.squeeze(1))
        return logits

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def lm_head_rows(self) -> int:
        """V': how many tokens a head can propose."""
        return self.config.draft_vocab or self.config.vocab_size

    def to_token_ids(self, ids: Tensor) -> Tensor:
        """Ids of the draft vocabulary -> token ids of the model."""
        return ids if self.draft_ids is None else self.draft_ids[ids]

    def _run(self, k: int, base: Tensor, first: Tensor) -> Tensor:
        """The layers of head k: the first reads `first` and adds to `base`, each other one adds to its own input."""
        layers = list(cast("nn.ModuleList", self.blocks[k - 1]))
        hidden: Tensor = base + layers[0](first)
        for layer in layers[1:]:
            hidden = hidden + layer(hidden)
        return hidden

    def _logits(self, k: int, hidden: Tensor) -> Tensor:
        rows = self.lm_head if self.config.tie_lm_head else self.lm_heads[k - 1]
        return F.linear(hidden, rows.to(hidden.dtype))
