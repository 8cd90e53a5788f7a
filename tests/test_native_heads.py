"""Heads on the native engine beside their torch twin: the same guesses in float32, near ones in fewer bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medusa.engines.native import NativeBackend
from medusa.engines.native_config import native_config
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads, HeadsState
from tiny_models import VOCAB, make_model, stirred

pytest.importorskip("medusa_native")

from medusa.engines.native_heads import NativeHeads

KINDS: dict[str, dict[str, Any]] = {
    "residual": {"kind": "residual"},
    "residual of two layers": {"kind": "residual", "num_layers": 2},
    "residual with LM heads of its own": {"kind": "residual", "tie_lm_head": False},
    "residual, own LM heads, draft vocabulary": {"kind": "residual", "tie_lm_head": False, "draft_vocab": 50},
    "gated": {"kind": "residual", "mlp_width": 24},
    "sequential": {"kind": "sequential"},
    "sequential of two gated layers": {"kind": "sequential", "num_layers": 2, "mlp_width": 40},
    "recurrent": {"kind": "recurrent"},
    "recurrent, gated, middle layers, draft vocabulary": {
        "kind": "recurrent",
        "mlp_width": 24,
        "feature_layers": (1, 2),
        "draft_vocab": 70,
    },
}
LEVELS, BRANCH = 3, 6


def backend() -> NativeBackend:
    model = make_model("llama")
    return NativeBackend(native_config(model.config), model.state_dict(), dtype="float32", feature_layers=(1, 2))


def make_heads(engine: NativeBackend, kind: str) -> Heads:
    config = HeadsConfig(hidden_size=engine.hidden_size, vocab_size=VOCAB, num_heads=LEVELS, **KINDS[kind])
    ids = torch.arange(VOCAB - 1, -1, -2)[: config.draft_vocab] if config.draft_vocab else None
    if ids is not None and len(ids) < config.draft_vocab:
        ids = torch.arange(config.draft_vocab)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = Heads(config, engine.base_weights(), ids)
    return stirred(heads, seed=3)


def both(
    engine: NativeBackend, heads: Heads, precision: str, batch: int = 2
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Log-probabilities [B, M, V'] of the torch heads, then log-probabilities and ids of the native ones, for each
    level; both go on with the tokens that torch finds likeliest."""
    runner = NativeHeads(engine, heads, precision)
    features = torch.randn(batch, heads.config.feature_size, generator=torch.Generator().manual_seed(1))
    ours, theirs = runner.begin(features), heads.begin(features)
    tokens = torch.tensor([[i] for i in range(batch)])
    parents = torch.zeros_like(tokens)
    found = []
    for k in range(1, LEVELS + 1):
        log_p, ids, ours = runner.guess(k, ours, parents, tokens, BRANCH)
        logits, theirs = heads.level(k, theirs, parents, tokens)
        full = torch.full((*logits.shape[:2], VOCAB), -torch.inf)
        places = torch.arange(VOCAB) if heads.draft_ids is None else heads.draft_ids
        full[..., places] = torch.log_softmax(logits.float(), dim=-1)
        found.append((full, log_p, ids))
        width = tokens.shape[1]
        wide = full.expand(batch, width, VOCAB)
        best = wide.topk(2, dim=-1).indices  # two children for each node
        parents = torch.arange(width).repeat_interleave(2).expand(batch, -1).contiguous()
        tokens = best.flatten(1)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_in_float32_are_those_of_the_torch_heads(kind: str) -> None:
    engine = backend()
    for full, log_p, ids in both(engine, make_heads(engine, kind), "float32"):
        assert torch.allclose(log_p, full.topk(BRANCH, dim=-1).values, atol=1e-4)
        assert torch.allclose(log_p, full.gather(-1, ids), atol=1e-4)
        assert all(len(set(row)) == BRANCH for row in ids.flatten(0, 1).tolist())


@pytest.mark.parametrize(("precision", "near"), [("bfloat16", 0.1), ("int8", 0.3), ("int4", 2.0)])
def test_guesses_in_fewer_bits_are_near_those_of_the_torch_heads(precision: str, near: float) -> None:
    engine = backend()
    heads = make_heads(engine, "recurrent, gated, middle layers, draft vocabulary")
    worst = max(float((log_p - full.gather(-1, i)).abs().max()) for full, log_p, i in both(engine, heads, precision))
    assert 1e-5 < worst < near


def test_a_batch_gives_each_row_what_it_gets_alone() -> None:
    engine = backend()
    heads = make_heads(engine, "recurrent")
    together, alone = both(engine, heads, "int8", batch=2), both(engine, heads, "int8", batch=1)
    for (_, log_p, ids), (_, log_p_alone, ids_alone) in zip(together, alone, strict=True):
        assert torch.equal(log_p[:1], log_p_alone)
        assert torch.equal(ids[:1], ids_alone)


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    engine = backend()
    runner = NativeHeads(engine, make_heads(engine, "recurrent"))
    state = runner.begin(torch.zeros(1, runner.config.feature_size))
    one = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="features"):
        runner.begin(torch.zeros(1, 7))
    for level, states, parents, tokens, count in (
        (0, state, one, one, 3),
        (LEVELS + 1, state, one, one, 3),
        (1, state, one + 1, one, 3),
        (1, state, one, one + VOCAB, 3),
        (1, state, one, one, VOCAB + 1),
        (1, HeadsState(state.base, state.nodes[..., :5]), one, one, 3),
    ):
        with pytest.raises(ValueError, match="heads"):
            runner.guess(level, states, parents, tokens, count)
    assert runner.guess(1, state, one, one, 3)[1].shape == (1, 1, 3)
