"""`model.generate(custom_generate=...)` on models that change: adapters, training, and what is kept between calls."""

from __future__ import annotations

import copy
import gc
import importlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import medusa
from medusa.engines.transformers import TransformersBackend
from medusa.errors import UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.file import save_heads
from medusa.heads.module import Heads
from tiny_models import make_model, scale_up, shared_model, stirred


def prompts(rows: int, size: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 160, (rows, size), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# --- adapters ---------------------------------------------------------------------------------------------------------


def wrapped(model: transformers.PreTrainedModel, config: peft.PeftConfig) -> peft.PeftModel:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks a model for what transformers calls by another name
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()


def adapted(config: peft.PeftConfig) -> peft.PeftModel:
    model = wrapped(make_model("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def test_a_model_with_lora_equals_its_own_generate_and_not_the_base_model() -> None:
    model = adapted(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "lm_head"], r=4))
    inputs = prompts(2)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    decode = medusa.custom_generate()
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=decode), expected)
    with model.disable_adapter():
        base = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, custom_generate=decode), base)
    assert not torch.equal(base, expected)
    with pytest.raises(UsageError, match="adapter_names"):
        model.generate(**inputs, **options, adapter_names=["default", "__base__"], custom_generate=decode)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    ],
)
def test_a_learned_prompt_is_refused_and_without_it_the_base_model_decodes(config: peft.PeftConfig) -> None:
    model = adapted(config)
    inputs = prompts(1)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    decode = medusa.custom_generate()
    with pytest.raises(UsageError, match="prompt tuning"):
        model.generate(**inputs, **options, custom_generate=decode)
    base = model.get_base_model()
    assert torch.equal(base.generate(**inputs, **options, custom_generate=decode), base.generate(**inputs, **options))


# --- what is kept between calls ---------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts self-checks and loadings of heads."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> None:
        module, _, function = name.rpartition(".")
        plain = getattr(importlib.import_module(module), function)

        def call(*args: Any, **options: Any) -> Any:
            counts[function] += 1
            return plain(*args, **options)

        monkeypatch.setattr(name, call)

    counted("medusa.engines.transformers.check_tree_attention")
    counted("medusa.heads.file.load_heads")
    return counts


def with_heads(model: Any, path: Path, seed: int = 5) -> Path:
    backend = TransformersBackend(model, self_check=False)
    config = HeadsConfig(hidden_size=32, vocab_size=backend.vocab_size, kind="sequential")
    save_heads(stirred(Heads(config, backend.base_weights()), seed), path)
    return path


def test_self_check_and_heads_are_made_once_for_a_model(tmp_path: Path, built: Counter[str]) -> None:
    decode = medusa.custom_generate(heads=with_heads(shared_model(), tmp_path / "heads"), nodes=6)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "custom_generate": decode}
    for _ in range(3):
        shared_model().generate(**prompts(1), **options)
    assert built == {"check_tree_attention": 1, "load_heads": 1}
    other = make_model("llama", seed=1)
    other.generate(**prompts(1), **options)
    other.generate(**prompts(1), **options)
    assert built == {"check_tree_attention": 2, "load_heads": 2}


def test_they_are_made_anew_when_what_they_depend_on_changes(tmp_path: Path, built: Counter[str]) -> None:
    model = make_model("llama")
    path = with_heads(model, tmp_path / "heads")
    decode = medusa.custom_generate(heads=path, nodes=6)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    def step() -> None:
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(0.1)

    changes: list[Callable[[], Any]] = [
        step,
        lambda: model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings())),
        lambda: with_heads(model, path, seed=6),
        lambda: wrapped(model, peft.LoraConfig(target_modules=["q_proj"])),
        lambda: model.set_attn_implementation("eager"),
        lambda: model.to(torch.bfloat16),
    ]
    for count, change in enumerate([lambda: None, *changes], 1):
        change()
        model.generate(**prompts(1), **options, custom_generate=decode)
        model.generate(**prompts(1), **options, custom_generate=decode)
        assert built == {"check_tree_attention": count, "load_heads": count}


def test_a_model_trained_between_two_calls_says_what_it_has_learned() -> None:
    model, inputs = make_model("llama"), prompts(1)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    decode = medusa.custom_generate()
    before = model.generate(**inputs, **options, custom_generate=decode)
    scale_up(model, seed=3)
    after = model.generate(**inputs, **options, custom_generate=decode)
    assert torch.equal(after, model.generate(**inputs, **options))
    assert not torch.equal(after, before)


def test_the_function_does_not_keep_a_model_alive(tmp_path: Path) -> None:
    model = make_model("llama")
    decode = medusa.custom_generate(heads=with_heads(model, tmp_path / "heads"), nodes=6)
    model.generate(**prompts(1), max_new_tokens=5, pad_token_id=0, custom_generate=decode)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
