"""Each setting of transformers' `generate`, one at a time: the same text as `generate` alone, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import medusa
from medusa.errors import UsageError
from tiny_models import make_tokenizer, shared_model

SIZE = 12
SAMPLE = {"do_sample": True}
BEST = {"do_sample": True, "top_k": 1}  # sampling that leaves one token, so that texts can be compared


def prompt() -> torch.Tensor:
    return torch.randint(3, 160, (1, SIZE), generator=torch.Generator().manual_seed(1))


def outcome(decode: Callable[..., Any] | None, options: dict[str, Any], family: str = "llama") -> Any:
    """The ids that generate gives, or the exception."""
    settings = {"max_new_tokens": 10, "pad_token_id": 0, "input_ids": prompt(), **options}
    given = {name: value() if callable(value) and name in MADE else value for name, value in settings.items()}
    try:
        return shared_model(family).generate(**given, custom_generate=decode)
    except Exception as error:  # noqa: BLE001
        return error


def same_or_refused(name: str, options: dict[str, Any], family: str = "llama") -> str:
    """What became of an item: "same", "refused" by Medusa or "error" of transformers itself; never another text."""
    expected = outcome(None, options, family)
    found = outcome(medusa.custom_generate(), options, family)
    if isinstance(found, UsageError):
        assert name.lower() in str(found).lower()
        assert "\n" not in str(found)
        return "refused"
    if isinstance(found, Exception):
        assert isinstance(expected, Exception) or name in ("stop_strings", "token_healing"), found
        return "error"
    assert torch.equal(found, expected)
    return "same"


# Each field off its default. Fields that only count in sampling come with a setting that leaves one token.
FIELDS: dict[str, list[dict[str, Any]]] = {
    "max_length": [{"max_length": 15, "max_new_tokens": None}, {"max_length": 300, "max_new_tokens": None}],
    "max_new_tokens": [{"max_new_tokens": 3}],
    "min_length": [{"min_length": 15, "eos_token_id": 5}],
    "min_new_tokens": [{"min_new_tokens": 5, "eos_token_id": 5}],
    "early_stopping": [{"early_stopping": True}],
    "max_time": [{"max_time": 1e-9}],
    "stop_strings": [{"stop_strings": "e", "tokenizer": make_tokenizer()}],
    "do_sample": [BEST],
    "num_beams": [{"num_beams": 2}],
    "use_mtp": [{"use_mtp": True}],
    "use_cache": [{"use_cache": False}],
    "cache_implementation": [{"cache_implementation": kind} for kind in ("dynamic", "static", "quantized")],
    "cache_config": [{"cache_config": {"nbits": 4}}],
    "max_cache_len": [{"max_cache_len": 40, "cache_implementation": "static"}],
    "temperature": [{**SAMPLE, "temperature": 1e-5}, {"temperature": 0.5}],
    "top_k": [BEST, {"top_k": 1}],
    "top_p": [{**SAMPLE, "top_p": 1e-6}, {"top_p": 0.5}],
    "min_p": [{**SAMPLE, "min_p": 0.999}, {"min_p": 0.5}],
    "top_h": [{**SAMPLE, "top_h": 0.01}],
    "typical_p": [{**BEST, "typical_p": 0.5}],
    "epsilon_cutoff": [{**BEST, "epsilon_cutoff": 0.1}],
    "eta_cutoff": [{**BEST, "eta_cutoff": 0.1}],
    "repetition_penalty": [{"repetition_penalty": 1.5}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.5}],
    "length_penalty": [{"length_penalty": 2.0}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 1}],
    "bad_words_ids": [{"bad_words_ids": [[5]]}],
    "renormalize_logits": [{"renormalize_logits": True}],
    "forced_bos_token_id": [{"forced_bos_token_id": 5}],
    "forced_eos_token_id": [{"forced_eos_token_id": 5}],
    "remove_invalid_values": [{"remove_invalid_values": True}],
    "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 5}],
    "suppress_tokens": [{"suppress_tokens": [5]}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": [5]}],
    "sequence_bias": [{"sequence_bias": [[[5], 2.0]]}],
    "token_healing": [{"token_healing": True, "tokenizer": make_tokenizer()}],
    "guidance_scale": [{"guidance_scale": 1.5}],
    "watermarking_config": [{"watermarking_config": transformers.WatermarkingConfig()}],
    "num_return_sequences": [{**BEST, "num_return_sequences": 2}],
    "output_attentions": [{"output_attentions": True}],
    "output_hidden_states": [{"output_hidden_states": True}],
    "output_scores": [{"output_scores": True}],
    "output_logits": [{"output_logits": True}],
    "return_dict_in_generate": [{"return_dict_in_generate": True}],
    "pad_token_id": [{"pad_token_id": 9}],
    "bos_token_id": [{"bos_token_id": 9}],
    "eos_token_id": [{"eos_token_id": list(range(3, 80))}, {"eos_token_id": torch.tensor(5)}],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 1}],
    "decoder_start_token_id": [{"decoder_start_token_id": 9}],
    "is_assistant": [{"is_assistant": True}],
    "num_assistant_tokens": [{"num_assistant_tokens": 3}],
    "num_assistant_tokens_schedule": [{"num_assistant_tokens_schedule": "heuristic"}],
    "assistant_confidence_threshold": [{"assistant_confidence_threshold": 0.9}],
    "prompt_lookup_num_tokens": [{"prompt_lookup_num_tokens": 3}],
    "max_matching_ngram_size": [{"max_matching_ngram_size": 3}],
    "assistant_early_exit": [{"assistant_early_exit": 1}],
    "assistant_lookbehind": [{"assistant_lookbehind": 3}],
    "target_lookbehind": [{"target_lookbehind": 3}],
    "assistant_ensemble_weight": [{"assistant_ensemble_weight": 0.5}],
    "speculation_type": [{"speculation_type": "dflash"}],
    "compile_config": [{"compile_config": transformers.CompileConfig()}],
    "disable_compile": [{"disable_compile": True}],
    "low_memory": [{"low_memory": True}],
    "penalty_alpha": [{"penalty_alpha": 0.6, "top_k": 4}],
    "dola_layers": [{"dola_layers": "low"}],
    "diversity_penalty": [{"diversity_penalty": 0.5}],
    "num_beam_groups": [{"num_beam_groups": 2}],
    "constraints": [{"constraints": [object()]}],
    "force_words_ids": [{"force_words_ids": [[5]]}],
    "prefill_chunk_size": [{"prefill_chunk_size": 4}],
}
NOT_SETTINGS = {"transformers_version", "continuous_batching_config"}  # a label; deprecated, warns when it is set


SUPPORTED = {
    "max_length", "max_new_tokens", "early_stopping", "stop_strings", "do_sample", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "length_penalty", "renormalize_logits", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "compile_config", "disable_compile",
    "low_memory", "diversity_penalty", "prefill_chunk_size",
}  # fmt: skip


def test_every_field_of_a_generation_config_is_tried() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - NOT_SETTINGS == set(FIELDS), "a new version of transformers has other fields: add them"


@pytest.mark.parametrize(("name", "options"), [(name, options) for name, tries in FIELDS.items() for options in tries])
def test_a_field_off_its_default_gives_the_same_text_or_is_refused_by_name(name: str, options: dict[str, Any]) -> None:
    became = same_or_refused(name, options)
    if name not in SUPPORTED:
        assert became != "same"
    elif options is FIELDS[name][0]:
        assert became == "same"


def test_a_text_longer_than_the_context_is_refused_and_one_that_fills_it_is_not() -> None:
    assert same_or_refused("max_new_tokens", {"max_new_tokens": 256 - SIZE}) == "same"
    assert same_or_refused("max_new_tokens", {"max_new_tokens": 257 - SIZE}) == "refused"


def test_a_field_that_transformers_does_not_know_is_ignored_as_it_is_there() -> None:
    config = GenerationConfig(max_new_tokens=10, pad_token_id=0, chat_format="chatml")
    found, expected = (
        shared_model().generate(prompt(), generation_config=config, custom_generate=decode)
        for decode in (medusa.custom_generate(), None)
    )
    assert torch.equal(found, expected)


# --- other arguments --------------------------------------------------------------------------------------------------

MADE = ("past_key_values", "logits_processor", "stopping_criteria")  # made anew for each call


def embedded() -> torch.Tensor:
    with torch.no_grad():
        embedding = shared_model().get_input_embeddings()(prompt().flip(1))
    assert isinstance(embedding, torch.Tensor)
    return embedding


def filled() -> transformers.DynamicCache:
    cache = transformers.DynamicCache()
    with torch.no_grad():
        shared_model()(input_ids=prompt()[:, :5], past_key_values=cache)
    return cache


HOLE, RIGHT = torch.ones(1, SIZE, dtype=torch.long), torch.ones(1, SIZE, dtype=torch.long)
HOLE[0, 4], RIGHT[0, -2:] = 0, 0
COUNT = torch.arange(SIZE)[None]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("inputs_embeds", {"inputs_embeds": embedded()}),
        ("inputs_embeds", {"inputs_embeds": embedded(), "input_ids": None}),
        ("past_key_values", {"past_key_values": filled}),
        ("past_key_values", {"past_key_values": transformers.DynamicCache}),
        ("position_ids", {"position_ids": COUNT + 5}),
        ("position_ids", {"position_ids": COUNT * 2}),
        ("position_ids", {"position_ids": COUNT[..., :-1]}),
        ("logits_to_keep", {"logits_to_keep": torch.tensor([3])}),
        ("attention_mask", {"attention_mask": HOLE}),
        ("attention_mask", {"attention_mask": RIGHT}),
        ("attention_mask", {"attention_mask": HOLE * 2}),
        ("is_causal", {"is_causal": False}),
        ("output_router_logits", {"output_router_logits": True}),
        ("assistant_model", {"assistant_model": shared_model("qwen2")}),
        ("negative_prompt_ids", {"negative_prompt_ids": prompt()}),
        ("negative_prompt_attention_mask", {"negative_prompt_attention_mask": RIGHT}),
        ("synced_gpus", {"synced_gpus": True}),
        ("labels", {"labels": prompt()}),
        ("PrefixConstrained", {"prefix_allowed_tokens_fn": lambda batch, ids: [3, 4]}),
        # the caller's own steps, of kinds that generate itself makes
        ("TopKLogitsWarper", {"logits_processor": lambda: [TopKLogitsWarper(3)], **SAMPLE}),
        ("TemperatureLogitsWarper", {"logits_processor": lambda: [TemperatureLogitsWarper(0.1)], **BEST}),
        ("TopPLogitsWarper", {"logits_processor": lambda: [TopPLogitsWarper(0.1, min_tokens_to_keep=3)]}),
        ("MinPLogitsWarper", {"logits_processor": lambda: [MinPLogitsWarper(0.1, filter_value=0.0)]}),
        (
            "prompt_ignore_length",
            {"logits_processor": lambda: [RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=4)]},
        ),
    ],
)
def test_an_argument_that_medusa_does_not_do_is_refused_by_name(name: str, options: dict[str, Any]) -> None:
    if "logits_processor" in options:
        made = options["logits_processor"]
        options = {**options, "logits_processor": lambda: LogitsProcessorList(made())}
    if name == "TemperatureLogitsWarper":  # twice: the caller's and generate's own
        options = {**options, "temperature": 0.5}
    assert same_or_refused(name, options) == "refused"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("position_ids", {"position_ids": COUNT}),
        ("attention_mask", {"attention_mask": torch.ones(1, SIZE, dtype=torch.long)}),
        ("logits_to_keep", {"logits_to_keep": 3}),
        ("token_type_ids", {"token_type_ids": None}),
        ("synced_gpus", {"synced_gpus": False}),
        (
            "repetition_penalty",
            {"logits_processor": lambda: LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])},
        ),
        ("TopKLogitsWarper", {"logits_processor": lambda: LogitsProcessorList([TopKLogitsWarper(3)])}),
        ("max_length", {"stopping_criteria": lambda: StoppingCriteriaList([MaxLengthCriteria(15)])}),
        ("max_length", {"stopping_criteria": lambda: StoppingCriteriaList([MaxLengthCriteria(5)])}),
        ("eos", {"stopping_criteria": lambda: StoppingCriteriaList([EosTokenCriteria(list(range(3, 80)))])}),
    ],
)
def test_an_argument_that_is_harmless_or_done_gives_the_same_text(name: str, options: dict[str, Any]) -> None:
    assert same_or_refused(name, options) == "same"


def test_token_type_ids_are_refused_where_a_model_takes_them() -> None:
    for value in (0, 1):
        options = {"token_type_ids": torch.full((1, SIZE), value)}
        assert same_or_refused("token_type_ids", options, family="gpt2") == "refused"


def test_a_repetition_penalty_leaves_padding_out_in_a_batch_too() -> None:
    ids = torch.cat([prompt(), prompt().flip(1)])
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    options = {"input_ids": ids, "attention_mask": mask, "repetition_penalty": 1.5}
    assert same_or_refused("repetition_penalty", options) == "same"
