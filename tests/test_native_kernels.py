"""The native engine's numbers, for each instruction set and precision: the same bits however a text is computed, exact
where whole numbers make exactness possible, and near float32 where not.

What the backend does with them, and with bad input, is tested in test_native_backend.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import fill, path_nodes, tree_parents
from medusa.engines.native import PRECISIONS, NativeBackend
from medusa.engines.native_config import NativeConfig, native_config
from test_transformers_backend import Nodes
from tiny_models import VOCAB, WINDOW, make_model, plain_logits, shared_model

medusa_native = pytest.importorskip("medusa_native")

ISAS = medusa_native.usable_isas()
SLOTS = 4
LENGTH = 96
every_isa = pytest.mark.parametrize("isa", ISAS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)

# Full attention; windows shorter than a tree is deep; windows in some layers, and biases; heads whose size is not a
# multiple of 16, with an odd vocabulary; wide heads, each with keys of its own, and layers that need every panel size.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "narrow windows": ("mistral", {"sliding_window": 3, "num_key_value_heads": 1}),
    "mixed windows": ("qwen2", {}),
    "odd sizes": ("qwen3", {"hidden_size": 40, "head_dim": 10, "intermediate_size": 50, "vocab_size": 157}),
    "wide": ("llama", {"hidden_size": 72, "head_dim": 80, "num_key_value_heads": 4, "intermediate_size": 200}),
}
models = st.sampled_from(sorted(MODELS))
texts = st.lists(st.integers(0, 156), min_size=1, max_size=3 * WINDOW)


@cache
def backend_of(name: str, isa: str, precision: str, threads: int = 1, rank: int = 0) -> NativeBackend:
    """The backend of a model; another `rank` is another backend of the same weights."""
    family, changes = MODELS[name]
    model = make_model(family, **changes)
    return NativeBackend(
        native_config(model.config),
        model.state_dict(),
        dtype=precision,
        num_slots=SLOTS,
        max_length=LENGTH,
        feature_layers=(1,),
        threads=threads,
        isa=isa,
    )


def bits(results: tuple[Tensor, Tensor]) -> Tensor:
    """Logits and features side by side, as the integers that their bits are; a copy."""
    return torch.cat(results, dim=-1).view(torch.int32)


def plainly(backend: NativeBackend, text: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Bits [T, ...] of `tokens` decoded one at a time after `text`."""
    fill(backend, 0, text)
    rows = []
    for token in tokens:
        rows.append(bits(backend.verify([0], [Nodes((token,), (-1,))]))[0, 0])
        backend.keep([0], [[0]])
    return torch.stack(rows)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 14) -> Nodes:
    """Any tree, with any tokens."""
    parents = draw(tree_parents(max_nodes))
    return Nodes(tuple(draw(st.integers(0, 156)) for _ in parents), parents)


def test_the_instruction_sets_are_known_and_plain_cpp_is_always_there() -> None:
    assert ISAS[-1] == "portable"
    assert len(set(ISAS)) == len(ISAS)
    best_first = ["amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "neon", "portable"]
    assert [isa for isa in best_first if isa in ISAS] == ISAS


# --- the same bits ----------------------------------------------------------------------------------------------------


@every_isa
@every_precision
@settings(max_examples=10)
@given(model=models, text=texts, tree=trees())
def test_each_node_of_any_tree_has_the_bits_of_plain_decoding(
    isa: str, precision: str, model: str, text: list[int], tree: Nodes
) -> None:
    backend, plain = backend_of(model, isa, precision), backend_of(model, isa, precision, rank=1)
    fill(backend, 0, text)
    found = bits(backend.verify([0], [tree]))[0]
    for leaf in set(range(len(tree.tokens))) - set(tree.parents):
        path = path_nodes(tree.parents, leaf)
        assert torch.equal(found[path], plainly(plain, text, [tree.tokens[i] for i in path]))


@every_isa
@every_precision
@settings(max_examples=8)
@given(
    model=models,
    slots=st.permutations(range(SLOTS)),
    rows=st.lists(st.tuples(texts, trees(8)), min_size=2, max_size=SLOTS),
)
def test_each_row_of_any_ragged_batch_has_the_bits_it_has_alone(
    isa: str, precision: str, model: str, slots: list[int], rows: list[tuple[list[int], Nodes]]
) -> None:
    together, alone = backend_of(model, isa, precision), backend_of(model, isa, precision, rank=1)
    slots = slots[: len(rows)]
    for slot, (text, _) in zip(slots, rows, strict=True):
        fill(together, slot, text)
    found = bits(together.verify(slots, [tree for _, tree in rows]))
    for b, (text, tree) in enumerate(rows):
        fill(alone, 0, text)
        assert torch.equal(found[b, : len(tree.tokens)], bits(alone.verify([0], [tree]))[0])


@every_isa
@every_precision
@settings(max_examples=4)
@given(model=models, rows=st.lists(st.tuples(texts, trees(10)), min_size=2, max_size=2))
def test_any_number_of_threads_gives_the_same_bits(
    isa: str, precision: str, model: str, rows: list[tuple[list[int], Nodes]]
) -> None:
    found = []
    for threads in (1, 2, 3):
        backend = backend_of(model, isa, precision, threads)
        assert backend.engine.threads == threads
        prompts = [bits(fill(backend, slot, text)) for slot, (text, _) in enumerate(rows)]
        found.append([*prompts, bits(backend.verify([0, 1], [tree for _, tree in rows]))])
    sizes = [len(tree.tokens) for _, tree in rows]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:2], other[:2], strict=True))
        for b, size in enumerate(sizes):
            assert torch.equal(found[0][2][b, :size], other[2][b, :size])


@every_isa
@every_precision
@settings(max_examples=8)
@given(model=models, text=texts, chunk=st.integers(1, 10), probe=trees(6))
def test_a_prompt_in_pieces_of_any_size_or_token_by_token_has_the_same_bits(
    isa: str, precision: str, model: str, text: list[int], chunk: int, probe: Nodes
) -> None:
    whole, pieces = backend_of(model, isa, precision), backend_of(model, isa, precision, rank=1)
    last, after = bits(fill(whole, 0, text)), bits(whole.verify([0], [probe]))
    once, pieces._chunk = pieces._chunk, chunk
    try:
        assert torch.equal(bits(fill(pieces, 0, text)), last)
    finally:
        pieces._chunk = once
    assert torch.equal(bits(pieces.verify([0], [probe])), after)
    if len(text) > 1:
        assert torch.equal(plainly(pieces, text[:1], text[1:])[-1], last)
        assert torch.equal(bits(pieces.verify([0], [probe])), after)


@every_isa
@every_precision
@settings(max_examples=8)
@given(
    model=models,
    starts=st.lists(texts, min_size=2, max_size=2),
    rounds=st.lists(st.tuples(trees(9), trees(9), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=3),
    probe=trees(5),
)
def test_after_keeping_any_paths_each_slot_has_the_bits_of_a_fresh_prefill(
    isa: str,
    precision: str,
    model: str,
    starts: list[list[int]],
    rounds: list[tuple[Nodes, Nodes, int, int]],
    probe: Nodes,
) -> None:
    used, fresh = backend_of(model, isa, precision), backend_of(model, isa, precision, rank=1)
    held = [list(text) for text in starts]
    slots = [2, 0]
    for slot, text in zip(slots, held, strict=True):
        fill(used, slot, text)
    for first, second, *chosen in rounds:
        used.verify(slots, [first, second])
        paths = [
            path_nodes(tree.parents, node % len(tree.tokens))
            for tree, node in zip((first, second), chosen, strict=True)
        ]
        used.keep(slots, paths)
        for text, tree, path in zip(held, (first, second), paths, strict=True):
            text.extend(tree.tokens[i] for i in path)
    assert [used.length(slot) for slot in slots] == [len(text) for text in held]
    found = bits(used.verify(slots, [probe, probe]))
    for b, text in enumerate(held):
        fill(fresh, 0, text)
        assert torch.equal(found[b], bits(fresh.verify([0], [probe]))[0])


@every_isa
@every_precision
def test_the_most_nodes_of_a_tree_have_the_bits_of_plain_decoding(isa: str, precision: str) -> None:
    rng = random.Random(0)
    backend, plain = backend_of("narrow windows", isa, precision), backend_of("narrow windows", isa, precision, rank=1)
    text = [rng.randrange(VOCAB) for _ in range(20)]
    parents = (-1, *(max(rng.randrange(i), i - 40) for i in range(1, backend.max_nodes)))
    tree = Nodes(tuple(rng.randrange(VOCAB) for _ in parents), parents)
    fill(backend, 0, text)
    found = bits(backend.verify([0], [tree]))[0]
    for leaf in (255, 254, 100):
        path = path_nodes(parents, leaf)
        assert torch.equal(found[path], plainly(plain, text, [tree.tokens[i] for i in path]))


@every_isa
@every_precision
def test_a_prompt_of_several_chunks_has_the_bits_of_token_by_token(isa: str, precision: str) -> None:
    model = make_model("qwen2", num_hidden_layers=2, max_position_embeddings=1024)
    backend = NativeBackend(native_config(model.config), model.state_dict(), dtype=precision, isa=isa, threads=1)
    rng = random.Random(1)
    text = [rng.randrange(VOCAB) for _ in range(2 * medusa_native.CHUNK + 30)]
    expected = plainly(backend, text[:1], text[1:])[-1]
    assert torch.equal(bits(fill(backend, 0, text)), expected)


# --- exact where it can be --------------------------------------------------------------------------------------------

# Whole numbers survive every format: in each group of 32 or 64 inputs, input 0 and 1 are always zero and carry the
# extreme weights, which fix the scale of the group (and, in int4, its minimum) at 1; input 2 is always 127 or -127,
# which fixes the scale of the activations at 1. What is computed is then exact, and Python's integers say what it is.
WIDTH = 128  # of the hidden state, of all heads together and within the MLP: four groups of 32, two of 64
RULER = 32
TOKENS = 8


def two_layers(hidden_size: int, *, heads: int, **sizes: int) -> NativeConfig:
    """A model of two layers whose heads share one key-value head: no biases, norms that change nothing of note."""
    head_dim = hidden_size // heads
    return NativeConfig(
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=1,
        head_dim=head_dim,
        epsilon=1e-12,
        gate="silu",
        tied=False,
        qk_norm=False,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        inverse_frequencies=(1.0,) * (head_dim // 2),
        rotary_scale=1.0,
        layers=((True, 0), (True, 0)),
        **sizes,
    )


def ruled(rows: int, generator: torch.Generator, extremes: tuple[int, int], sparse: bool = False) -> Tensor:
    """Weights [rows, WIDTH] that every format holds exactly: from -4 to 4, and the extremes at inputs 0 and 1 of each
    group. `sparse`: three in a row beside them, so that sums stay small."""
    weights = torch.randint(-4, 5, (rows, WIDTH), generator=generator)
    if sparse:
        free = torch.tensor([i for i in range(WIDTH) if i % RULER > 3])
        places = torch.stack([free[torch.randperm(len(free), generator=generator)[:3]] for _ in range(rows)])
        weights *= torch.zeros_like(weights).scatter_(1, places, 1)
    weights[:, 0::RULER], weights[:, 1::RULER] = extremes
    return weights


def measured(weights: Tensor) -> Tensor:
    """Makes outputs 0 and 1 of each group zero, and output 2 the 127 of input 2: the next layer's rulers."""
    others = [i for i in range(WIDTH) if i % RULER > 1]
    for start in range(0, len(weights), RULER):
        for row in range(start, start + 3):
            weights[row, others] = 0
        weights[start + 2, 2] = 1
    return weights


class Exact:
    """A model of one layer (and a second that does nothing, so that the first one's output is a feature)."""

    def __init__(self, precision: str, isa: str, part: str) -> None:
        generator = torch.Generator().manual_seed(0)
        low_high = (-8, 7) if precision == "int4" else (-127, 127)
        signs = torch.randint(0, 2, (TOKENS, WIDTH), generator=generator) * 2 - 1
        signs[:, 2::RULER] = 1
        signs[:, 3] = 1
        # Of an embedding of -1 and 1 the root mean square is 1: the norms' weights are what comes out of them.
        norm = 4 * torch.randint(-2, 3, (WIDTH,), generator=generator)
        norm[0::RULER], norm[1::RULER], norm[2::RULER], norm[3] = 0, 0, 127, 16
        self.embedding, self.norm = signs, norm
        self.v = measured(ruled(RULER, generator, low_high, sparse=True))  # one key-value head
        self.o = ruled(WIDTH, generator, low_high)
        self.up = measured(ruled(WIDTH, generator, low_high, sparse=True))
        self.gate = ruled(WIDTH, generator, low_high)
        self.gate[:, [i for i in range(WIDTH) if i % RULER > 1]] = 0
        self.gate[:, 3] = 2  # 2 * 16 = 32, of which SiLU makes 32 to the last bit
        self.down = ruled(WIDTH, generator, low_high)
        self.lm_head = ruled(TOKENS, generator, (-127, 127))  # int8 also in int4
        zeros = torch.zeros(WIDTH, WIDTH, dtype=torch.int64)
        if part != "attention":
            self.o = zeros
        if part != "mlp":
            self.down = zeros
        ones = torch.ones(WIDTH, dtype=torch.int64)
        weights = {
            "model.embed_tokens.weight": signs,
            "model.norm.weight": norm,
            "lm_head.weight": self.lm_head,
        }
        names = ("q", "k", "v", "o", "gate", "up", "down")
        first = (zeros, zeros[:RULER], self.v, self.o, self.gate, self.up, self.down)
        second = (zeros, zeros[:RULER], zeros[:RULER], zeros, zeros, zeros, zeros)
        for layer, matrices in enumerate((first, second)):
            for name, matrix in zip(names, matrices, strict=True):
                where = "self_attn" if name in "qkvo" else "mlp"
                weights[f"model.layers.{layer}.{where}.{name}_proj.weight"] = matrix
            for name in ("input_layernorm", "post_attention_layernorm"):
                weights[f"model.layers.{layer}.{name}.weight"] = norm if layer == 0 else ones
        config = two_layers(WIDTH, heads=WIDTH // RULER, intermediate_size=WIDTH, vocab_size=TOKENS, context=32)
        tensors = {name: tensor.float() for name, tensor in weights.items()}
        self.backend = NativeBackend(config, tensors, dtype=precision, isa=isa, feature_layers=(1,), threads=1)

    def normed(self, token: int) -> Tensor:
        return self.embedding[token] * self.norm

    def value(self, token: int) -> Tensor:
        """What each head reads of a token when it sees no other."""
        return (self.v @ self.normed(token)).repeat(WIDTH // RULER)


@every_isa
@every_precision
def test_the_mlp_of_a_layer_is_exact_on_whole_numbers(isa: str, precision: str) -> None:
    model = Exact(precision, isa, "mlp")
    for token in range(TOKENS):
        gated = 32 * (model.up @ model.normed(token))
        assert gated.abs().max() == 32 * 127
        expected = model.embedding[token] + model.down @ gated
        _, features = fill(model.backend, 0, [token])
        assert torch.equal(features[:WIDTH], expected.float())


@every_isa
@every_precision
def test_attention_to_one_two_and_four_equal_keys_is_exact_on_whole_numbers(isa: str, precision: str) -> None:
    """With queries of zero each head takes the mean of what it sees: the text (token 5) and the path of the node."""
    model = Exact(precision, isa, "attention")

    def output(token: int, seen: Sequence[int]) -> Tensor:
        total = sum(model.value(other) for other in seen)
        assert isinstance(total, Tensor)
        assert (total % len(seen) == 0).all()
        return (model.embedding[token] + model.o @ (total // len(seen))).float()

    _, features = fill(model.backend, 0, [5])
    assert torch.equal(features[:WIDTH], output(5, [5]))
    #        1         nodes 3 and 5 see four tokens; node 4 comes between, on no path but its own
    #      / | \
    #     2  0  7
    #     3  6
    tree = Nodes((1, 2, 0, 3, 7, 6), (-1, 0, 0, 1, 0, 2))
    _, features = model.backend.verify([0], [tree])
    assert torch.equal(features[0, 0, :WIDTH], output(1, [5, 1]))
    assert torch.equal(features[0, 3, :WIDTH], output(3, [5, 1, 2, 3]))
    assert torch.equal(features[0, 5, :WIDTH], output(6, [5, 1, 0, 6]))


@every_isa
@every_precision
def test_the_lm_head_is_exact_on_whole_numbers(isa: str, precision: str) -> None:
    model = Exact(precision, isa, "lm_head")
    for token in range(TOKENS):
        logits, features = fill(model.backend, 0, [token])
        assert torch.equal(features, torch.cat([model.embedding[token], model.normed(token)]).float())
        assert torch.equal(logits, (model.lm_head @ model.normed(token)).float())


# --- near where it cannot ---------------------------------------------------------------------------------------------


def attended(values: Tensor, weights: Tensor, precision: str, isa: str) -> Tensor:
    """What the output projection `weights` [64, 64] makes of the value projection `values` [64, 64].

    Column j comes from token j, whose input is zero but for an 8 at place j.
    """
    size = 64
    config = two_layers(size, heads=1, intermediate_size=16, vocab_size=size, context=4)
    tensors = {"model.embed_tokens.weight": 8 * torch.eye(size), "lm_head.weight": torch.eye(size)}
    tensors["model.norm.weight"] = torch.ones(size)
    for layer in range(2):
        shapes = {"gate": (16, size), "up": (16, size), "down": (size, 16)} | dict.fromkeys("qkvo", (size, size))
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj.weight"] = (
                torch.zeros(shape)
            )
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(size)
    tensors["model.layers.0.self_attn.v_proj.weight"] = values
    tensors["model.layers.0.self_attn.o_proj.weight"] = weights
    backend = NativeBackend(config, tensors, dtype=precision, isa=isa, feature_layers=(1,), threads=1)
    columns = [fill(backend, 0, [token])[1][:size] for token in range(size)]
    return torch.stack(columns, dim=1) - 8 * torch.eye(size)


def packed(weights: Tensor, precision: str, isa: str) -> Tensor:
    """What the engine makes of weights [64, 64], read back through the output projection of the attention."""
    one = 15.0 if precision == "int4" else 127.0  # that each format holds exactly beside zeros
    return attended(one * torch.eye(64), weights, precision, isa) / (8 * one)


@every_isa
@every_precision
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_weights_and_activations_do_not_overflow(isa: str, precision: str, sign: int) -> None:
    values = torch.zeros(64, 64)
    values[:, 5] = sign * (15.0 if precision == "int4" else 127.0)  # token 5: all activations are as large as they get
    weights = torch.full((64, 64), 15.0 if precision == "int4" else 127.0)
    weights[:, ::32] = 0.0  # the minimum of int4
    weights[32:] = -weights[32:]
    found = attended(values, weights, precision, isa)[:, 5]
    expected = (weights @ (8 * values[:, 5])).expand(64)
    assert torch.allclose(found, expected, rtol=1e-2), (found[0], expected[0])


@pytest.mark.parametrize("kind", ["spread", "offset", "constant", "lonely", "zero"])
@every_precision
def test_weights_are_rounded_no_further_than_the_format_must(precision: str, kind: str) -> None:
    """int8: to the nearest of 255 steps between the largest weights of a group of 64. int4: in the mean no worse than
    to the nearest of 16 steps between the extremes of a group of 32."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(64, 64, generator=generator) * torch.logspace(-3, 3, 64)[:, None]
    if kind == "offset":
        weights = weights.abs() + 3 * torch.logspace(-3, 3, 64)[:, None]
    elif kind == "constant":
        weights = torch.logspace(-3, 3, 64)[:, None].expand(64, 64).clone()
    elif kind == "lonely":
        weights *= torch.eye(64)
    elif kind == "zero":
        weights = torch.zeros(64, 64)
    error = (packed(weights, precision, "portable") - weights).double()
    largest = weights.abs().amax(1, keepdim=True).double()
    read = 2e-6 * largest + 1e-6  # what reading back adds: the 8 of the embedding is in the same sum
    if precision == "float32":
        assert (error.abs() <= read).all()
    elif precision == "bfloat16":
        assert torch.allclose(weights + error, weights.bfloat16().double(), rtol=2e-6, atol=2e-6)
    elif precision == "int8":
        # Half a step; the step itself is rounded to 8 bits, so that the largest weights may lie past its 127 multiples.
        step, coarse = largest / 127, 2.0**-8
        past = weights.abs() - 127 * step * (1 - coarse)
        assert (error.abs() <= torch.maximum(step / 2 * (1 + coarse), past) + read).all()
    else:
        groups, errors = weights.double().unflatten(1, (2, 32)), error.unflatten(1, (2, 32))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = ((high - low) / 15).clamp_min(1e-30)
        plain = (((groups - low) / step).round() * step + low - groups).square().mean(2).sqrt()
        # Fifteen steps and the minimum are each rounded to 8 bits.
        assert (errors.square().mean(2).sqrt() <= plain * 1.02 + largest / 2**7 + read).all()


@cache
def text_of(family: str) -> tuple[int, ...]:
    rng = random.Random(2)
    return tuple(rng.randrange(VOCAB) for _ in range(41))


@cache
def logits_of(family: str, precision: str, isa: str) -> Tensor:
    """Logits [40, V] of a text from its second token on: the tree is a chain."""
    model, text = shared_model(family), text_of(family)
    backend = NativeBackend(native_config(model.config), model.state_dict(), dtype=precision, isa=isa, threads=1)
    fill(backend, 0, text[:1])
    return backend.verify([0], [Nodes(text[1:], tuple(range(-1, len(text) - 2)))])[0][0].clone()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


# These models are harsher than trained ones: their weights are scaled up, so that each layer amplifies what the last
# one rounded. The worst seen: 0.9995, 0.9957 and 0.80.
NEAR = {"float32": 1 - 1e-9, "bfloat16": 0.999, "int8": 0.99, "int4": 0.7}


@every_isa
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_each_precision_is_near_the_model_and_nearer_than_the_next(family: str, isa: str) -> None:
    expected = plain_logits(shared_model(family), list(text_of(family)))[1:]
    found = {precision: cosine(logits_of(family, precision, isa), expected) for precision in PRECISIONS}
    assert all(found[precision] > NEAR[precision] for precision in PRECISIONS), found
    assert found["float32"] > found["bfloat16"] > found["int8"] > found["int4"]


@every_precision
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_instruction_sets_agree_with_plain_cpp(isa: str, precision: str) -> None:
    """Not to the last bit, as sums of floats are taken in other orders, and what lies at an edge may then be rounded
    to the other side."""
    for family in ("llama", "qwen3"):
        found, expected = logits_of(family, precision, isa), logits_of(family, precision, "portable")
        assert cosine(found, expected) > (1 - 1e-9 if precision == "float32" else 0.9999)


@every_precision
@pytest.mark.skipif("avx_vnni" not in ISAS, reason="this machine or this build has no AVX-VNNI")
def test_avx_vnni_gives_the_bits_of_avx2(precision: str) -> None:
    """It multiplies bytes by another instruction, and sums of whole numbers have but one value."""
    for family in ("llama", "qwen3"):
        found, expected = (logits_of(family, precision, isa) for isa in ("avx_vnni", "avx2"))
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.skipif("amx" not in ISAS, reason="this machine or this build has no AMX")
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_amx_gives_the_bits_of_avx512_but_in_bfloat16(precision: str) -> None:
    """Its tiles hold sums of whole numbers; scales enter as they do there."""
    for family in ("llama", "qwen3"):
        found, expected = (logits_of(family, precision, isa) for isa in ("amx", "avx512_bf16"))
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@every_precision
def test_a_pass_reads_as_many_bytes_as_the_precision_says(precision: str) -> None:
    family, changes = MODELS["wide"]
    model = make_model(family, **changes)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    each = backend_of("wide", "portable", precision).engine.weight_bytes * 8 / weights
    least = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[precision]
    assert least <= each < 2 * least, "padding and scales"


@every_isa
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gates_of_any_size_are_those_of_the_model(isa: str, activation: str) -> None:
    """From 0 to thousands, where the exponential overflows or vanishes."""
    model = make_model("llama", hidden_act=activation)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(torch.logspace(-4, 3, len(layer.mlp.gate_proj.weight))[:, None])
    text = list(range(20, 40))
    expected = plain_logits(model, text)[-1]
    backend = NativeBackend(native_config(model.config), model.state_dict(), dtype="float32", isa=isa, threads=1)
    found, _ = fill(backend, 0, text)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
