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

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medusa.errors import MedusaError, UsageError
from medusa.files import replacing, swapped_in

KINDS = ("residual", "sequential", "recurrent")
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "heads.safetensors"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    """All that is needed to rebuild the module, and to know whether it fits a model."""

    hidden_size: int
    vocab_size: int
    kind: Literal["residual", "sequential", "recurrent"] = "residual"
    num_heads: int = 4
    num_layers: int = 1
    tie_lm_head: bool = True
    draft_vocab: int = 0  # how many tokens a head can propose; 0: all of them
    mlp_width: int = 0  # 0: one linear layer with SiLU; else a gated MLP of this width
    feature_layers: tuple[int, ...] = ()  # hidden states read beside the final one; i is the output of layer i
    base_model: str = ""
    vocab_hash: str = ""  # see `vocabulary_hash`
    tree: tuple[tuple[tuple[int, ...], float], ...] = ()  # (rank path, calibrated probability)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("kind", self.kind in KINDS, f"one of {', '.join(KINDS)}"),
            ("hidden_size", self.hidden_size > 0, "positive"),
            ("vocab_size", self.vocab_size > 0, "positive"),
            ("num_heads", 1 <= self.num_heads <= 16, "from 1 to 16"),
            ("num_layers", self.num_layers >= 1, "at least 1"),
            ("draft_vocab", 0 <= self.draft_vocab <= self.vocab_size, "from 0 to vocab_size"),
            ("mlp_width", self.mlp_width >= 0, "0 or more"),
            ("feature_layers", all(i > 0 for i in self.feature_layers), "layer numbers from 1"),
        ):
            if not good:
                raise UsageError(f"heads: {name} must be {rule}, not {getattr(self, name)}")
        if self.kind == "recurrent" and self.num_layers != 1:
            raise UsageError("heads: a recurrent block has num_layers 1")

    @property
    def feature_size(self) -> int:
        """Width of the features a backend must deliver: H for each feature layer, and H for the final one."""
        return self.hidden_size * (1 + len(self.feature_layers))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadsConfig:
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key != "format"}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"heads: unknown settings {', '.join(unknown)}")
        values["feature_layers"] = tuple(values.get("feature_layers", ()))
        values["tree"] = tuple((tuple(path), float(f)) for path, f in values.get("tree", ()))
        return cls(**values)


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

    def num_parameters(self) -> int: ...

    def begin(self, features: Tensor) -> HeadsState:
        """features [B, F*H] of the last accepted token -> the state from which level 1 is drafted."""
        ...

    def guess(
        self, k: int, state: HeadsState, parents: Tensor, tokens: Tensor, count: int
    ) -> tuple[Tensor, Tensor, HeadsState]:
        """The `count` likeliest tokens after each node; arguments as in `Heads.level`.

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
        if draft_ids is not None:
            self.register_buffer("draft_ids", draft_ids.to(torch.int64))
        else:
            self.draft_ids = None
        if config.feature_layers:
            self.project = nn.Linear(config.feature_size, size, bias=False)
            with torch.no_grad():
                self.project.weight.zero_()
                self.project.weight[:, -size:] = torch.eye(size)
        if config.kind == "recurrent":
            self.block = Block(3 * size, size, config.mlp_width)
        else:
            self.blocks = nn.ModuleList(
                nn.ModuleList(  # the layers of head k
                    Block(
                        size * (1 + (k if config.kind == "sequential" and layer == 0 else 0)),
                        size,
                        config.mlp_width,
                    )
                    for layer in range(config.num_layers)
                )
                for k in range(1, config.num_heads + 1)
            )
        rows = base.lm_head if draft_ids is None else base.lm_head[draft_ids.to(base.lm_head.device)]
        self.register_buffer("embedding", base.embedding.detach(), persistent=False)
        if config.tie_lm_head:
            self.register_buffer("lm_head", rows.detach(), persistent=False)
        else:
            self.lm_heads = nn.ParameterList(
                nn.Parameter(rows.detach().clone().float()) for _ in range(config.num_heads)
            )

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
        self, k: int, state: HeadsState, parents: Tensor, tokens: Tensor, count: int
    ) -> tuple[Tensor, Tensor, HeadsState]:
        """See `HeadsRunner`."""
        logits, state = self.level(k, state, parents, tokens)
        log_p, ids = torch.log_softmax(logits.float(), dim=-1).topk(count, dim=-1)
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


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """A short digest of token -> id, the same for every copy of a tokenizer."""
    text = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_heads(heads: Heads, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes `config.json` and `heads.safetensors`; the directory appears whole or not at all.

    Heads that are there already are replaced, with all that lies beside them.

    Raises:
        UsageError: `directory` holds something else, which replacing it would delete.
    """
    directory = Path(directory)
    exists = directory.exists()
    if exists and not (directory / WEIGHTS_FILE).is_file() and (directory.is_file() or any(directory.iterdir())):
        raise UsageError(f"{directory} is there and does not hold heads: save to a new directory")
    with swapped_in(directory) as new:
        tensors = {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else torch.int32).contiguous()
            for name, tensor in heads.state_dict().items()
        }
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        write_config(heads.config, new)


def write_config(config: HeadsConfig, directory: Path) -> None:
    """Writes `config.json`, whole or not at all."""
    text = json.dumps({"format": FORMAT, **asdict(config)}, indent=1)
    # A list of numbers, and a path of the tree with its probability, on one line each. (No string holds a line's end.)
    text = re.sub(r"\[\n[\d.e,\s-]+\]", lambda found: "".join(found.group().split()).replace(",", ", "), text)
    text = re.sub(r"\[\n\s+(\[[\d, ]+\]),\n\s+([\d.e-]+)\n\s+\]", r"[\1, \2]", text)
    with replacing(directory / CONFIG_FILE) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def read_config(directory: str | Path) -> HeadsConfig:
    """The `config.json` of saved heads. Raises MedusaError when it is missing or not ours."""
    path = Path(directory) / CONFIG_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MedusaError(f"no heads in {directory}: {CONFIG_FILE} is missing") from None
    except (OSError, ValueError) as error:
        raise MedusaError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise MedusaError(f"{path} does not describe Medusa heads of format {FORMAT}")
    try:
        return HeadsConfig.from_json(data)
    except (UsageError, TypeError, ValueError) as error:
        raise MedusaError(f"{path} is not valid: {error}") from None


def check_vocabulary(config: HeadsConfig, vocab_hash: str) -> None:
    """Raises MedusaError where both hashes are known and differ: the heads belong to another tokenizer."""
    if vocab_hash and config.vocab_hash and vocab_hash != config.vocab_hash:
        raise MedusaError(
            f"these heads were trained for {config.base_model or 'another model'}, whose tokenizer is another: "
            "use heads trained for this model, or --heads none"
        )


def check_shape(config: HeadsConfig, vocab_size: int, hidden_size: int, num_layers: int | None = None) -> None:
    """Raises MedusaError where the heads belong to a model of another shape."""
    expected, found = (config.vocab_size, config.hidden_size), (vocab_size, hidden_size)
    if expected != found:
        raise MedusaError(
            "these heads belong to a model with vocabulary and hidden size "
            f"{expected}, not {found}: use heads trained for this model, or --heads none"
        )
    if num_layers is not None and any(i >= num_layers for i in config.feature_layers):
        raise MedusaError(
            f"these heads read layer {max(config.feature_layers)}, but the model has {num_layers}: "
            "use heads trained for this model, or --heads none"
        )


def load_heads(
    directory: str | Path,
    base: BaseWeights,
    *,
    vocab_hash: str = "",
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Heads:
    """Reads saved heads onto the device of `base`, refusing what does not fit exactly.

    Raises:
        MedusaError: missing, truncated or foreign file; another hidden size, vocabulary or head count; a weight that
            is not finite.
    """
    directory = Path(directory)
    config = read_config(directory)
    check_vocabulary(config, vocab_hash)
    vocab_size, hidden_size = base.embedding.shape
    check_shape(config, vocab_size, hidden_size, num_layers)
    path = directory / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise MedusaError(f"no heads in {directory}: {WEIGHTS_FILE} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise MedusaError(f"{path} is truncated or not a safetensors file: {error}") from None
    if config.draft_vocab:
        ids = tensors.get("draft_ids")
        if ids is None or ids.shape != (config.draft_vocab,):
            raise MedusaError(f"{path} lacks the draft vocabulary of {config.draft_vocab} tokens that its config names")
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise MedusaError(f"{path} has draft tokens outside the vocabulary of {config.vocab_size}")
        draft_ids = ids
    else:
        draft_ids = None
    heads = Heads(config, base, draft_ids)
    expected = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = wrong[0]
        raise MedusaError(
            f"{path} does not match its config ({config.num_heads} heads, kind {config.kind}): {name} is "
            f"{found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MedusaError(f"{path} has a weight that is not a finite number in {name}: train the heads again")
    heads.load_state_dict(tensors)
    for parameter in heads.parameters():
        parameter.requires_grad_(False)
    return heads.to(base.embedding.device, dtype).eval()
