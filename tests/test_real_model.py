"""SmolLM2-135M with its shipped heads: what the tiny random models cannot show."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import medusa
from medusa.decoding.draft import NgramDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.scheduler import decode
from medusa.engines.transformers import TransformersBackend
from medusa.heads.config import HeadsConfig
from medusa.heads.file import save_heads
from medusa.heads.module import BaseWeights, Heads
from medusa.models import zoo

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    'Translate into French: "The train leaves at seven."',
    "Repeat the word echo twenty times, separated by commas.",
)


@pytest.fixture(scope="module", params=["native", "transformers"])
def union(request: pytest.FixtureRequest) -> medusa.LanguageModel:
    if request.param == "native":
        pytest.importorskip("medusa_native")
    # Not auto: what it chooses rests on times, and a busy machine would change the number of steps.
    return medusa.load(backend=request.param, dtype="float32", nodes=8, progress=False)


@pytest.fixture(scope="module")
def network() -> PreTrainedModel:
    return zoo.load_model(zoo.resolve("smollm2-135m", progress=False), dtype=torch.float32)


def transformers_greedy(
    network: PreTrainedModel, model: medusa.LanguageModel, prompt: str, max_new_tokens: int
) -> list[int]:
    ids = torch.tensor([model.encode(prompt)])
    out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_plain_decoding_and_of_transformers(
    union: medusa.LanguageModel, network: PreTrainedModel, prompt: str
) -> None:
    ours = union.generate(prompt, max_new_tokens=48)
    assert ours.token_ids == union.generate(prompt, max_new_tokens=48, stepper=union.make_stepper("none")).token_ids
    assert list(ours.token_ids) == transformers_greedy(network, union, prompt, 48)


@pytest.mark.parametrize("tree", ["static", "dynamic"])
def test_heads_alone_give_the_same_text_in_fewer_steps(union: medusa.LanguageModel, tree: str) -> None:
    heads = union.generate(PROMPTS[1], max_new_tokens=48, stepper=union.make_stepper("heads", tree=tree))
    plain = union.generate(PROMPTS[1], max_new_tokens=48, stepper=union.make_stepper("none"))
    assert heads.token_ids == plain.token_ids
    assert heads.stats.steps < 0.8 * plain.stats.steps


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_the_native_engine_gives_the_text_of_plain_decoding_in_every_precision(dtype: str) -> None:
    pytest.importorskip("medusa_native")
    union = medusa.load(dtype=dtype, nodes=8, progress=False)
    assert union.backend.name == "native", "auto takes it where it can"
    plain = union.make_stepper("none")
    for options in ({}, {"temperature": 0.9, "seed": 7}):
        drafted = union.generate(PROMPTS[1], max_new_tokens=64, **options)
        assert drafted.token_ids == union.generate(PROMPTS[1], max_new_tokens=64, stepper=plain, **options).token_ids
        assert drafted.stats.steps < 0.9 * len(drafted.token_ids)


@pytest.mark.parametrize("seed", [1, 2])
def test_sampled_text_is_that_of_plain_sampling_with_the_same_seed(union: medusa.LanguageModel, seed: int) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 100, "min_p": 0.01, "seed": seed, "max_new_tokens": 40}
    ours = union.generate(PROMPTS[0], **options)
    assert ours.token_ids == union.generate(PROMPTS[0], stepper=union.make_stepper("none"), **options).token_ids
    assert ours.stats.steps < 39


def test_the_command_prints_its_line_of_json_and_the_text_of_the_library(union: medusa.LanguageModel) -> None:
    command = [sys.executable, "-m", "medusa.cli", "generate", PROMPTS[0], "--json"]
    command += ["--dtype", "float32", "--max-new-tokens", "24", "--nodes", "8", "--backend", union.backend.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    answer = json.loads(done.stdout.splitlines()[-1])
    expected = union.generate(PROMPTS[0], max_new_tokens=24)
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert (answer["num_new_tokens"], answer["steps"]) == (24, expected.stats.steps)
    assert set(answer) == {
        "text", "token_ids", "num_new_tokens", "steps", "tokens_per_step", "decode_seconds", "tokens_per_second",
        "ttft_seconds", "finish_reason",
    }  # fmt: skip


def test_heads_of_another_model_are_refused_by_the_command(tmp_path: Path) -> None:
    small = BaseWeights(torch.zeros(50, 8), torch.zeros(50, 8))
    save_heads(Heads(HeadsConfig(hidden_size=8, vocab_size=50), small), tmp_path / "heads")
    command = [sys.executable, "-m", "medusa.cli", "generate", "hi", "--heads", str(tmp_path / "heads")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "--heads none" in done.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from within torch.compile
def test_compiled_layers_give_the_same_text(union: medusa.LanguageModel, network: PreTrainedModel) -> None:
    backend = TransformersBackend(copy.deepcopy(network), compile=True)
    prompt = union.encode(PROMPTS[0])
    steps = decode(ReferenceStepper(backend, NgramDrafter(), 4), prompt, max_new_tokens=24)
    expected = union.generate(PROMPTS[0], max_new_tokens=24).token_ids
    assert tuple(token for step in steps for token in step.tokens) == expected
