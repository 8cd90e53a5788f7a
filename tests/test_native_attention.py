"""Attention over several spans of positions: the same bits however the work is divided, at every border; the numbers of
transformers; and enough pieces for many threads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import fill, path_nodes
from medusa.engines.native import NativeBackend
from medusa.engines.native_config import native_config
from test_transformers_backend import Nodes
from tiny_models import VOCAB, make_model, plain_logits

medusa_native = pytest.importorskip("medusa_native")

SPAN = medusa_native.SPAN
THREADS = (1, 2, 3, 5, 16)
SLOTS = 3
NEAR = 3e-5  # of the largest logit
every_isa = pytest.mark.parametrize("isa", medusa_native.usable_isas())
# All that attention sees of a precision is whether keys and values are kept in float32 or, as in the others, bfloat16.
every_cache = pytest.mark.parametrize("precision", ["float32", "bfloat16"])

# Full attention; windows below a span, of about one, and of more; windows in some layers only.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "heads of their own": ("llama", {"num_key_value_heads": 4, "head_dim": 20}),
    "narrow windows": ("mistral", {"sliding_window": 3, "num_key_value_heads": 1}),
    "windows of a span": ("mistral", {"sliding_window": SPAN}),
    "mixed windows": ("qwen2", {"sliding_window": SPAN + 70}),
}
every_model = pytest.mark.parametrize("name", MODELS)
# How long the text is: within the first span, and a tree that begins, or ends, or lies across the first two borders.
LENGTHS = (40, SPAN - 4, SPAN, 2 * SPAN - 1, 2 * SPAN + 1)
# The path to each leaf is 8 deep, 5 deep or 2 deep; ancestors lie scattered between the others.
TREE = Nodes(tuple(range(30, 44)), (-1, 0, 0, 1, 2, 3, 1, 5, 4, 7, 0, 9, 11, 8))


@cache
def model_of(name: str) -> Any:
    family, changes = MODELS[name]
    return make_model(family, num_hidden_layers=2, max_position_embeddings=4 * SPAN, **changes)


@cache
def backend_of(name: str, isa: str, precision: str = "float32", threads: int = 1, rank: int = 0) -> NativeBackend:
    """The backend of a model; another `rank` is another backend of the same weights."""
    model = model_of(name)
    options: dict[str, Any] = {"dtype": precision, "num_slots": SLOTS, "threads": threads, "isa": isa}
    return NativeBackend(native_config(model.config), model.state_dict(), **options)


def text_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(VOCAB) for _ in range(length)]


def bits(logits: Tensor) -> Tensor:
    """A copy, as the integers that the bits are."""
    return logits.clone().view(torch.int32)


def plainly(backend: NativeBackend, tokens: Sequence[int]) -> Tensor:
    """Bits [T, V] of tokens decoded one at a time after what slot 0 holds."""
    rows = []
    for token in tokens:
        rows.append(bits(backend.verify([0], [Nodes((token,), (-1,))])[0])[0, 0])
        backend.keep([0], [[0]])
    return torch.stack(rows)


@cache
def tree_bits(name: str, isa: str, precision: str, length: int) -> Tensor:
    """Bits [N, V] of the tree after a text, alone and on one thread."""
    backend = backend_of(name, isa, precision)
    fill(backend, 0, text_of(length))
    return bits(backend.verify([0], [TREE])[0])[0]


@every_isa
@every_cache
@every_model
def test_nodes_about_the_borders_of_spans_have_the_bits_of_chains_and_of_plain_decoding(
    name: str, isa: str, precision: str
) -> None:
    backend = backend_of(name, isa, precision, rank=1)
    for length in LENGTHS:
        found = tree_bits(name, isa, precision, length)
        for leaf in set(range(len(TREE.tokens))) - set(TREE.parents):
            path = path_nodes(TREE.parents, leaf)
            tokens = [TREE.tokens[i] for i in path]
            fill(backend, 0, text_of(length))
            chain = bits(backend.verify([0], [Nodes(tuple(tokens), tuple(range(-1, len(path) - 1)))])[0])[0]
            assert torch.equal(found[path], chain), length
            assert torch.equal(chain, plainly(backend, tokens)), length


@every_isa
@every_cache
@every_model
def test_any_number_of_threads_gives_the_same_bits_over_several_spans(name: str, isa: str, precision: str) -> None:
    for threads in THREADS:
        backend = backend_of(name, isa, precision, threads)
        assert backend.engine.threads == threads
        for length in LENGTHS:
            fill(backend, 0, text_of(length))
            found = bits(backend.verify([0], [TREE])[0])[0]
            assert torch.equal(found, tree_bits(name, isa, precision, length)), (threads, length)
            root = bits(backend.verify([0], [Nodes(TREE.tokens[:1], (-1,))])[0])[0]
            assert torch.equal(root, found[:1]), (threads, length)


@every_isa
@every_cache
@every_model
@pytest.mark.parametrize("threads", [1, 5])
def test_rows_of_a_batch_with_other_spans_have_the_bits_they_have_alone(
    name: str, isa: str, precision: str, threads: int
) -> None:
    backend = backend_of(name, isa, precision, threads)
    for lengths in ((LENGTHS[0], LENGTHS[3], LENGTHS[1]), (LENGTHS[4], LENGTHS[2])):
        slots = list(range(len(lengths)))[::-1]
        for slot, length in zip(slots, lengths, strict=True):
            fill(backend, slot, text_of(length))
        found = bits(backend.verify(slots, [TREE] * len(slots))[0])
        for row, length in zip(found, lengths, strict=True):
            assert torch.equal(row, tree_bits(name, isa, precision, length)), lengths


@every_isa
@every_cache
@every_model
@pytest.mark.parametrize("threads", [1, 5])
def test_a_prompt_in_pieces_and_kept_paths_give_the_bits_of_a_whole_prompt(
    name: str, isa: str, precision: str, threads: int
) -> None:
    backend = backend_of(name, isa, precision, threads)
    path = path_nodes(TREE.parents, 12)
    once = backend._chunk
    for length in LENGTHS:
        text = text_of(length)
        fill(backend, 1, [*text, *(TREE.tokens[i] for i in path)])
        expected = bits(backend.verify([1], [TREE])[0])[0]
        for chunk in (SPAN - 3, 50):
            backend._chunk = chunk
            try:
                fill(backend, 0, text)
            finally:
                backend._chunk = once
            assert torch.equal(bits(backend.verify([0], [TREE])[0])[0], tree_bits(name, isa, precision, length))
            backend.keep([0], [path])
            assert torch.equal(bits(backend.verify([0], [TREE])[0])[0], expected), (length, chunk)


@every_isa
@every_model
@pytest.mark.parametrize("threads", [1, 5])
def test_several_spans_give_the_numbers_of_transformers(name: str, isa: str, threads: int) -> None:
    backend = backend_of(name, isa, threads=threads)
    path = path_nodes(TREE.parents, 12)
    for length in (*LENGTHS, 4 * SPAN - len(path)):
        text = text_of(length)
        expected = reference(name, length)
        found = torch.cat([fill(backend, 0, text)[0][None].clone(), backend.verify([0], [TREE])[0][0, path]])
        assert float((found - expected).abs().max()) < NEAR * float(expected.abs().max()), length


@cache
def reference(name: str, length: int) -> Tensor:
    """Logits of the last token of a text, and of the path to node 12 of the tree after it."""
    path = path_nodes(TREE.parents, 12)
    return plain_logits(model_of(name), [*text_of(length), *(TREE.tokens[i] for i in path)])[length - 1 :]


# --- how the work is divided ------------------------------------------------------------------------------------------


def pieces_of(name: str, threads: int, length: int, nodes: int = 1) -> list[int]:
    backend = backend_of(name, "portable", threads=threads)
    fill(backend, 0, text_of(length))
    backend.verify([0], [Nodes((1,) * nodes, tuple(range(-1, nodes - 1)))])
    return list(backend.engine.attention_pieces)


def test_a_single_row_gives_many_threads_a_piece_for_each_head_and_span() -> None:
    # Two key-value heads; the new token is the last of the position before the border, or the first after it.
    assert pieces_of("llama", 5, SPAN - 1) == [2, 2]
    assert pieces_of("llama", 5, SPAN) == [4, 4]
    assert pieces_of("llama", 5, 3 * SPAN + 9) == [8, 8]
    assert pieces_of("llama", 2, 3 * SPAN + 9) == [8, 8]
    assert pieces_of("narrow windows", 5, 3 * SPAN + 9) == [1, 1]
    assert pieces_of("narrow windows", 5, 3 * SPAN + 1) == [2, 2], "a window across a border"
    assert pieces_of("mixed windows", 5, 3 * SPAN + 9) == [8, 6], "the second layer has a window of three spans"


def test_many_rows_and_single_threads_are_not_divided_further() -> None:
    assert pieces_of("llama", 1, 3 * SPAN + 9) == [2, 2]
    # Twelve nodes of two heads that share keys and values: four tiles of six queries for each of two key-value heads.
    assert pieces_of("llama", 2, 3 * SPAN + 9, nodes=12) == [8, 8]
    assert pieces_of("llama", 3, 3 * SPAN + 9, nodes=12) == [32, 32]
