"""A base whose layers do not all lie on one device: here one of them on a disk, as `--device auto` spreads what is
larger than the memory of one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError
from tiny_lm import make, writer
from tiny_models import byte_ids

PLACES = {
    **{f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1")},
    "model.layers.2": "disk",
}


def spread(directory: Path, lm_head: str = "cpu") -> TransformersBackend:
    model = copy.deepcopy(writer())
    places = {**PLACES, "lm_head": lm_head}
    parts = dispatch_model(model, places, main_device="cpu", offload_dir=str(directory))
    assert {parameter.is_meta for parameter in parts.parameters()} == {True, False}
    return TransformersBackend(parts, num_slots=2)


def test_a_spread_base_has_the_hidden_states_that_heads_learn_from(tmp_path: Path) -> None:
    tokens = byte_ids(b"It does not lie in one place.")
    whole, parts = TransformersBackend(writer()), spread(tmp_path)
    for mine, theirs in zip(whole.extend(0, tokens, every=True), parts.extend(0, tokens, every=True), strict=True):
        assert torch.equal(mine, theirs)


def test_a_spread_base_decodes_with_heads_as_a_whole_one(tmp_path: Path) -> None:
    whole, parts = make(heads=True, nodes=6), make(heads=True, nodes=6, backend=spread(tmp_path))
    expected, found = (lm.generate("Where is it?", max_new_tokens=24) for lm in (whole, parts))
    assert found.token_ids == expected.token_ids
    assert found.stats.steps == expected.stats.steps < 24


def test_heads_need_the_lm_head_of_a_spread_base_in_memory(tmp_path: Path) -> None:
    with pytest.raises(MedusaError, match="they are offloaded: use --heads none"):
        spread(tmp_path, lm_head="disk").base_weights()
