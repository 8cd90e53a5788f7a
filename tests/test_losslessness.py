"""The promise, on real (tiny) transformers models: whatever heads, tree, prompt and batch, the text is the model's own.

The loop alone is tested on a toy model in test_loop.py, the cache and the masks in test_transformers_backend.py; here
all parts work together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medusa.decoding.reference as reference
from medusa.decoding.accept import Accepted
from medusa.decoding.draft import Draft, Drafter, NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import decode
from medusa.decoding.stepper import Request, Row
from medusa.decoding.tree import Tree
from medusa.engines.transformers import TransformersBackend
from medusa.heads.config import HeadsConfig
from medusa.heads.module import Heads
from tiny_models import agrees, make_model

VOCAB = 24  # so small that even random heads are right now and then
SLOTS = 3
NEW_TOKENS = 24


@cache
def backend_of(family: str) -> TransformersBackend:
    model = make_model(family, vocab_size=VOCAB)
    return TransformersBackend(model, num_slots=SLOTS, feature_layers=(1,))


@st.composite
def heads_drafters(draw: st.DrawFn, backend: TransformersBackend) -> HeadsDrafter:
    """Random heads of any kind, with a random fixed tree or a dynamic one."""
    config = HeadsConfig(
        hidden_size=backend.hidden_size,
        vocab_size=VOCAB,
        kind=draw(st.sampled_from(["residual", "sequential", "recurrent"])),
        num_heads=3,
        mlp_width=draw(st.sampled_from([0, 8])),
        tie_lm_head=draw(st.booleans()),
        draft_vocab=draw(st.sampled_from([0, 9])),
        feature_layers=(1,),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randperm(VOCAB, generator=generator)[: config.draft_vocab].sort().values
    heads = Heads(config, backend.base_weights(), ids if config.draft_vocab else None)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    trees = [None, Tree.cartesian(2, 2, 1), Tree.from_paths([[0], [0, 0], [1], [2], [2, 1], [0, 0, 3]])]
    return HeadsDrafter(heads, draw(st.sampled_from(trees)))


def plain(backend: TransformersBackend, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    steps = decode(ReferenceStepper(backend, NoDrafter(), 1), prompt, sampling, max_new_tokens=NEW_TOKENS)
    return [token for step in steps for token in step.tokens]


def batch(
    backend: TransformersBackend, drafter: Drafter, nodes: int, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[list[list[int]], int]:
    """Decodes all prompts side by side, in slots from the last to the first; returns the texts and the steps."""
    decoder = ReferenceStepper(backend, drafter, nodes)
    rows = [
        decoder.start(SLOTS - 1 - i, Request(prompt, sampling, max_new_tokens=NEW_TOKENS))[0]
        for i, prompt in enumerate(prompts)
    ]
    steps = 0
    try:
        while running := [row for row in rows if row.finish_reason is None]:
            decoder.step(running)
            steps += 1
    finally:
        for row in rows:
            decoder.finish(row)
    return [row.tokens[row.prompt_tokens :] for row in rows], steps


samplings = st.one_of(
    st.just(Sampling()),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.7, 1.5]),
        top_p=st.sampled_from([1.0, 0.8]),
        top_k=st.sampled_from([0, 7]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 2**32),
    ),
)
prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=SLOTS)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@settings(max_examples=25)
@given(data=st.data(), prompts=prompts, sampling=samplings, nodes=st.integers(1, 14))
def test_any_heads_tree_and_batch_give_the_text_of_plain_decoding(
    family: str, data: st.DataObject, prompts: list[list[int]], sampling: Sampling, nodes: int
) -> None:
    backend = backend_of(family)
    heads = data.draw(heads_drafters(backend))
    drafter = data.draw(st.sampled_from([heads, UnionDrafter(heads, NgramDrafter())]))
    texts, _ = batch(backend, drafter, nodes, prompts, sampling)
    for prompt, text in zip(prompts, texts, strict=True):
        expected = plain(backend, prompt, sampling)
        if sampling == Sampling():
            assert agrees(backend.model, prompt, text, expected)
        else:
            assert text == expected


def test_drafts_are_accepted_in_these_tests() -> None:
    """Else the identity above would say nothing."""
    backend = backend_of("llama")
    heads = Heads(HeadsConfig(hidden_size=backend.hidden_size, vocab_size=VOCAB), backend.base_weights())
    drafter = UnionDrafter(HeadsDrafter(heads), NgramDrafter())
    generator = random.Random(0)
    texts = [[generator.randrange(VOCAB) for _ in range(12)] for _ in range(SLOTS)]
    _, steps = batch(backend, drafter, 14, texts, Sampling())
    assert steps < NEW_TOKENS - 1


def test_an_acceptance_that_trusts_the_drafter_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: keep the first child whatever the model says, and the texts differ."""

    def trusting(logits: torch.Tensor, draft: Draft, row: Row) -> Accepted:
        path = (0, 1) if len(draft) > 1 else (0,)
        return Accepted(path, int(logits[path[-1]].argmax()))

    backend = backend_of("llama")
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
    expected = plain(backend, prompt, Sampling())
    monkeypatch.setattr(reference, "accept", trusting)
    (text,), _ = batch(backend, NgramDrafter(), 6, [prompt], Sampling())
    assert not agrees(backend.model, prompt, text, expected)
