"""What a CUDA graph forbids, checked without a GPU: a step must ask the device nothing and bring nothing from the host.

The meta device computes shapes alone. To read a value of it is an error there, as it is while a graph is captured; and
what is copied to it can be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medusa.decoding.tree import Tree
from medusa.device.shape import FixedShape
from medusa.device.slots import Needs, Slots
from medusa.device.step import CHAIN, medusa_step
from medusa.engines.transformers import TransformersBackend
from medusa.engines.tree_attention import use_grouped_attention
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads
from tiny_models import FAMILIES, make_model

META = torch.device("meta")
VOCAB = 24


class NoTransfers(TorchDispatchMode):
    """Refuses operations whose arguments lie on the host and whose result does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        made = [a for a in torch.utils._pytree.tree_leaves(out) if isinstance(a, torch.Tensor)]
        # Numbers of no dimension go into a kernel as its argument.
        if any(a.device.type == "cpu" and a.ndim for a in given) and any(a.device.type == "meta" for a in made):
            raise AssertionError(f"{func} copies from the host")
        return out


def prepared(family: str, kind: str) -> Callable[[Needs], torch.Tensor]:
    """A step of two rows with everything on the meta device."""
    model = make_model(family, vocab_size=VOCAB)
    use_grouped_attention(model)
    backend = TransformersBackend(model, num_slots=4, feature_layers=(1,))
    config = HeadsConfig(
        hidden_size=backend.hidden_size,
        vocab_size=VOCAB,
        kind=kind,  # type: ignore[arg-type]
        num_heads=3,
        draft_vocab=9,
        feature_layers=(1,),
    )
    heads = Heads(config, backend.base_weights(), torch.arange(9))
    for module in (model, heads):
        module.to(META)
    backend.device = META  # where a model is does not change once it is loaded, but here
    for layer in backend.cache.slot_layers:
        layer.keys, layer.values = (None if t is None else t.to(META) for t in (layer.keys, layer.values))
    backend.reserve(512)
    shape = FixedShape(Tree.cartesian(2, 2, 1), 8, META)
    slots = Slots(4, VOCAB, 2 * backend.hidden_size, torch.float32, META)
    slots.seen = torch.zeros(4, VOCAB, dtype=torch.bool, device=META)
    sent = torch.zeros(2, CHAIN + 8, dtype=torch.int64, device=META)

    @torch.inference_mode()
    def run(needs: Needs) -> torch.Tensor:
        with NoTransfers():
            return medusa_step(backend, heads, shape, slots, sent, 256, needs)

    return run


NEEDS = (
    Needs(),
    Needs(exact=True),
    Needs(exact=True, filters=True, penalty=True),
    Needs(typical=True, filters=True),
)


@pytest.mark.parametrize("kind", ["residual", "sequential", "recurrent"])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_a_step_asks_the_device_nothing(kind: str, needs: Needs) -> None:
    out = prepared("llama", kind)(needs)
    assert out.device == META
    assert out.shape == (2, 2 + 11 + 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_nor_does_a_model_of_any_family(family: str) -> None:
    assert prepared(family, "recurrent")(Needs()).device == META


def test_a_step_that_asked_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa.device import step

    run = prepared("llama", "residual")
    monkeypatch.setattr(step, "draft", lambda heads, features, roots, *rest: roots.tolist())
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(Needs())
    monkeypatch.setattr(step, "draft", lambda *arguments: torch.zeros(2, 11, dtype=torch.int64).to(META))
    with pytest.raises(AssertionError, match="copies from the host"):
        run(Needs())
