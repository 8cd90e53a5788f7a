"""What a slot of the native engine holds: texts in pieces, copied, cut short, interrupted and released; bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import fill, path_nodes
from medusa.engines.native import NativeBackend
from medusa.engines.native_config import native_config
from test_native_kernels import backend_of, bits, every_isa, every_precision, models, texts, trees
from test_transformers_backend import Nodes
from tiny_models import make_model

medusa_native = pytest.importorskip("medusa_native")

cuts = st.lists(st.integers(0, 99), max_size=6)


def pieces(text: Sequence[int], at: Sequence[int]) -> list[Sequence[int]]:
    return [text[a:b] for a, b in pairwise(sorted({0, len(text), *(cut % len(text) for cut in at)}))]


@every_isa
@every_precision
@settings(max_examples=8)
@given(model=models, text=texts, at=cuts, every=st.lists(st.booleans(), min_size=7, max_size=7), probe=trees(6))
def test_a_text_in_any_pieces_has_the_bits_of_one(
    isa: str, precision: str, model: str, text: list[int], at: list[int], every: list[bool], probe: Nodes
) -> None:
    backend = backend_of(model, isa, precision)
    logits, features = (part.clone() for part in fill(backend, 0, text, every=True))
    after = bits(backend.verify([0], [probe]))
    backend.release(1)
    end = 0
    for piece, whole in zip(pieces(text, at), every, strict=False):
        last, found = backend.extend(1, piece, whole)
        start, end = end, end + len(piece)
        assert torch.equal(found, features[start:end] if whole else features[end - 1])
    assert backend.length(1) == len(text)
    assert torch.equal(last, logits)
    assert torch.equal(bits(backend.verify([1], [probe])), after)


@every_isa
@every_precision
@settings(max_examples=8)
@given(
    model=models,
    text=texts,
    other=texts,
    tree=trees(8),
    node=st.integers(0, 7),
    length=st.integers(0, 99),
    probe=trees(),
)
def test_what_follows_a_copy_has_the_bits_that_follow_the_text(
    isa: str,
    precision: str,
    model: str,
    text: list[int],
    other: list[int],
    tree: Nodes,
    node: int,
    length: int,
    probe: Nodes,
) -> None:
    """Whatever the other slot held, wherever the text is cut, and while the source still has a tree to keep."""
    backend = backend_of(model, isa, precision)
    length = 1 + length % len(text)
    fill(backend, 0, text[:length])
    expected = bits(backend.verify([0], [probe]))
    fill(backend, 0, text)
    fill(backend, 2, other)
    backend.verify([0, 2], [tree, tree])
    backend.copy(0, 2, length)
    path = path_nodes(tree.parents, node % len(tree.tokens))
    backend.keep([0], [path])
    assert [backend.length(slot) for slot in (0, 2)] == [len(text) + len(path), length]
    assert torch.equal(bits(backend.verify([2], [probe])), expected)
    backend.copy(0, 0, length)  # cut short
    assert torch.equal(bits(backend.verify([0], [probe])), expected)
    read = [bits(backend.extend(slot, [1, 2, 3])) for slot in (0, 2)]
    assert torch.equal(*read)


class Interrupted:
    """An engine that is interrupted after some calls of `extend`."""

    def __init__(self, engine: Any, calls: int) -> None:
        self.engine, self.calls = engine, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def extend(self, *arguments: Any) -> Any:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        return self.engine.extend(*arguments)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_text_that_is_interrupted_leaves_the_one_that_was_there(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    backend, calm = (NativeBackend(native_config(model.config), model.state_dict(), dtype="float32") for _ in range(2))
    for one in (backend, calm):
        monkeypatch.setattr(one, "_chunk", 8)
        one.extend(0, list(range(10)))
    with monkeypatch.context() as patch:
        patch.setattr(backend, "engine", Interrupted(backend.engine, calls))
        with pytest.raises(KeyboardInterrupt):
            backend.extend(0, list(range(30)))
    assert backend.length(0) == 10
    assert torch.equal(backend.extend(0, [5, 6])[0], calm.extend(0, [5, 6])[0])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take pages back when they like")
def test_a_released_slot_keeps_the_memory_of_1024_positions_and_gives_the_rest_back() -> None:
    assert medusa_native.KEPT == 1024
    shape: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    model = make_model(max_position_embeddings=4096, **shape)
    backend = NativeBackend(native_config(model.config), model.state_dict(), dtype="float32", num_slots=2, threads=1)
    position = 4 * 2 * 2 * 8 * 128  # bytes: layers, keys and values, heads
    resident = psutil.Process().memory_info

    fill(backend, 0, [1] * 1024)
    backend.release(0)
    before = resident().rss
    fill(backend, 0, [1] * 1024)  # at hand
    assert resident().rss - before < 256 * position
    backend.extend(0, [1] * 2048)
    backend.copy(0, 1, 3072)
    held = resident().rss - before
    assert held > (2048 + 3072 - 256) * position
    backend.release(1)
    backend.release(0)
    # Of the second slot 1,024 stay, too; pages of 2 MiB hold 64 positions.
    assert 768 * position < resident().rss - before < (1024 + 512) * position
