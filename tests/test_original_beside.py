"""benchmarks/original_beside.py without the original project: what it is given, and how steps are counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import medusa
import original_beside
from exchange import base, heads_in
from medusa.api import LanguageModel
from medusa.decoding.heads_drafter import HeadsDrafter
from medusa.decoding.tree import Tree
from medusa.engines.transformers import TransformersBackend
from medusa.heads.file import load_heads
from tiny_lm import END, writer
from tiny_models import make_tokenizer


def test_a_config_gets_the_names_of_old_transformers() -> None:
    new = {"hidden_size": 8, "dtype": "bfloat16", "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    old = original_beside.old_config(new)
    assert (old["rope_theta"], old["torch_dtype"], old["hidden_size"]) == (5.0, "bfloat16", 8)
    assert original_beside.old_config({"rope_theta": 7.0})["rope_theta"] == 7.0


def test_rotary_embeddings_that_the_original_does_not_compute_are_refused() -> None:
    with pytest.raises(ValueError, match="of the type yarn"):
        original_beside.old_config({"rope_parameters": {"rope_type": "yarn"}})


def test_the_original_gets_heads_that_name_a_model_it_can_load(tmp_path: Path) -> None:
    exported = medusa.export_heads(heads_in(tmp_path / "heads"), "fasterdecoding", tmp_path / "export")
    (tmp_path / "room").mkdir()
    heads = original_beside.their_directories(tmp_path / "room", base(), exported.directory)
    config = json.loads((heads / "config.json").read_text())
    named = Path(config["base_model_name_or_path"])
    assert config["medusa_num_heads"] == 2
    assert "rope_theta" in json.loads((named / "config.json").read_text())
    assert (named / "model.safetensors").samefile(base() / "model.safetensors")
    assert torch.load(heads / "medusa_lm_head.pt").keys() >= {"0.0.linear.weight", "1.1.weight"}


def test_the_watch_notes_what_each_step_accepts_from_the_prefill_on() -> None:
    lengths = iter([torch.tensor(2), torch.tensor(0), torch.tensor(1)])
    module = SimpleNamespace(
        initialize_medusa=lambda *args: ("medusa", "logits"),
        evaluate_posterior=lambda *args, **rules: (7, next(lengths)),
    )
    watch = original_beside.Watch(module)
    for expected in ([2, 0], [1]):
        assert module.initialize_medusa("ids") == ("medusa", "logits")
        assert watch.begun > 0
        for length in expected:
            assert module.evaluate_posterior("logits", fast=True) == (7, length)
        assert watch.accepted == expected


def test_our_steps_are_counted_as_theirs_are() -> None:
    """Each step gives the guesses it accepts and one token of the model's."""
    tree = Tree.from_paths({(0,): 0.5, (1,): 0.2, (0, 0): 0.3})
    backend = TransformersBackend(writer())
    heads = load_heads(heads_in_room(), backend.base_weights())
    lm = LanguageModel("tiny", make_tokenizer(), backend, heads=heads, drafter="none", eos_token_ids=[END])
    (answer,) = original_beside.our_answers(lm, ["The sky"], 24, lm.make_stepper(HeadsDrafter(heads, tree), nodes=4))
    assert answer["prompt"] == lm.encode("The sky")
    gained = 1 + sum(accepted + 1 for accepted in answer["accepted"])
    assert 0 <= gained - len(answer["token_ids"]) <= tree.depth, "the limit may cut what the last step gives"
    assert original_beside.speed([{**answer, "seconds": 2.0}])["tokens/s"] == (gained - 1) / 2


def heads_in_room() -> Path:
    return heads_in(base().parent / "heads-beside")


def test_texts_are_compared_as_far_as_both_go() -> None:
    assert original_beside.first_difference([1, 2, 3], [1, 2]) is None
    assert original_beside.first_difference([1, 2, 3], [1, 4]) == 1
