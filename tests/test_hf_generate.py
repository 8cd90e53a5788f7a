"""`model.generate(custom_generate=...)` against `model.generate`."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import medusa
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.file import save_heads
from medusa.heads.module import Heads
from tiny_lm import writer
from tiny_models import (
    FAMILIES,
    agrees,
    byte_ids,
    make_model,
    make_tokenizer,
    plain_logits,
    shared_model,
)


def prompts(rows: int, size: int = 12) -> dict[str, torch.Tensor]:
    """Random prompts; row i starts with 2 * i places of padding."""
    ids = torch.randint(3, 160, (rows, size), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for i in range(rows):
        ids[i, : 2 * i], mask[i, : 2 * i] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(family: str, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model = shared_model(family)
    options = {"do_sample": False, "pad_token_id": 0, **options}
    expected = model.generate(**inputs, **options)
    return model.generate(**inputs, **options, custom_generate=medusa.custom_generate()), expected


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_in_every_family(family: str) -> None:
    inputs = prompts(1)
    found, expected = both(family, inputs, max_new_tokens=20)
    assert found.shape == expected.shape
    assert torch.equal(found[:, :12], inputs["input_ids"])
    assert agrees(
        shared_model(family), *(x[0].tolist() for x in (inputs["input_ids"], found[:, 12:], expected[:, 12:]))
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_batch_with_left_padding_and_end_tokens_equals_generate(family: str) -> None:
    inputs = prompts(3)
    _, free = both(family, inputs, max_new_tokens=20)
    # An end token for the first row that the second does not say so soon: the rows end at different places.
    said = [row[12:].tolist() for row in free]
    ends = [next(t for t in said[0][2:] if t not in said[1][:12]), said[1][12]]
    found, expected = both(family, inputs, max_new_tokens=20, eos_token_id=ends, pad_token_id=159)
    assert torch.equal(found, expected)
    assert (expected[:, 12:] == 159).any(), "a row was filled up"


def test_a_batch_that_ends_early_is_as_short_as_generate_makes_it() -> None:
    inputs = prompts(2)
    _, free = both("llama", inputs, max_new_tokens=20)
    ends = [int(free[0, 12 + 2]), int(free[1, 12 + 5])]
    found, expected = both("llama", inputs, max_new_tokens=20, eos_token_id=ends)
    assert torch.equal(found, expected)
    assert expected.shape[1] < 32


def test_one_end_token_and_max_length_and_no_mask() -> None:
    model = shared_model("llama")
    ids = prompts(1)["input_ids"]
    _, free = both("llama", {"input_ids": ids}, max_new_tokens=20)
    for options in ({"max_length": 19}, {"max_length": 32, "eos_token_id": int(free[0, 20])}):
        found, expected = both("llama", {"input_ids": ids}, **options)
        assert torch.equal(found, expected)
    assert model.generation_config.eos_token_id is None, "the model's settings are as before"


def test_a_repetition_penalty_equals_generate() -> None:
    found, expected = both("gpt_neox", prompts(1), max_new_tokens=20, repetition_penalty=1.4)
    _, free = both("gpt_neox", prompts(1), max_new_tokens=20)
    assert torch.equal(found, expected)
    assert not torch.equal(expected, free)


def test_the_settings_of_a_generation_config_object_are_used() -> None:
    config = transformers.GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0)
    model, inputs = shared_model("llama"), prompts(1)
    found = model.generate(**inputs, generation_config=config, custom_generate=medusa.custom_generate())
    assert torch.equal(found, model.generate(**inputs, generation_config=config))


def test_heads_from_a_directory_change_nothing_but_the_speed(tmp_path: Path) -> None:
    model, inputs = shared_model("llama"), prompts(1)
    backend = TransformersBackend(model)
    config = HeadsConfig(hidden_size=32, vocab_size=backend.vocab_size, kind="sequential", feature_layers=(2,))
    save_heads(Heads(config, backend.base_weights()), tmp_path / "heads")
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 20}
    expected = model.generate(**inputs, **options)
    for drafter in ("union", "heads"):
        decode = medusa.custom_generate(heads=tmp_path / "heads", drafter=drafter, nodes=6)
        assert torch.equal(model.generate(**inputs, **options, custom_generate=decode), expected)
    with pytest.raises(MedusaError, match="missing"):
        model.generate(**inputs, **options, custom_generate=medusa.custom_generate(heads=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="needs heads"):
        model.generate(**inputs, **options, custom_generate=medusa.custom_generate(drafter="heads"))


def test_sampling_with_a_seed_reproduces_whatever_is_drafted() -> None:
    model, inputs = shared_model("llama"), prompts(2)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "max_new_tokens": 20}

    def say(**settings: Any) -> torch.Tensor:
        return model.generate(**inputs, **options, pad_token_id=0, custom_generate=medusa.custom_generate(**settings))

    first = say(seed=1)
    assert torch.equal(say(seed=1), first)
    assert torch.equal(say(seed=1, drafter="none"), first)
    assert not torch.equal(say(seed=2), first)
    twice = {name: value[:1].repeat(3, 1) for name, value in inputs.items()}
    alike = model.generate(**twice, **options, pad_token_id=0, custom_generate=medusa.custom_generate(seed=1))
    assert len({tuple(row) for row in alike.tolist()}) == 3  # rows that are asked alike are samples of their own
    assert alike[0].tolist() == first[0].tolist()
    torch.manual_seed(5)
    drawn = say()
    assert not torch.equal(say(), drawn)
    torch.manual_seed(5)
    assert torch.equal(say(), drawn)
    for row, size in zip(first.tolist(), (12, 10), strict=True):  # what top-k leaves out is never said
        text = row[12 - size :]
        logits = plain_logits(model, text)
        for i in range(size, len(text)):
            assert text[i] in logits[i - 1].topk(20).indices


def test_top_k_of_one_is_greedy_and_typical_acceptance_runs() -> None:
    model, inputs = shared_model("llama"), prompts(1)
    options: dict[str, Any] = {"pad_token_id": 0, "max_new_tokens": 15}
    greedy = model.generate(**inputs, **options, do_sample=False)
    decode = medusa.custom_generate(seed=0)
    assert torch.equal(model.generate(**inputs, **options, do_sample=True, top_k=1, custom_generate=decode), greedy)
    decode = medusa.custom_generate(seed=0, acceptance="typical", epsilon=0.2)
    assert model.generate(**inputs, **options, do_sample=True, custom_generate=decode).shape == greedy.shape


class Favourite(transformers.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 7] = 1e9
        return scores


class Enough(transformers.StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.ones(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_beams", {"num_beams": 2}),
        ("num_return_sequences", {"num_return_sequences": 2, "do_sample": True}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": 2}),
        ("bad_words_ids", {"bad_words_ids": [[5]]}),
        ("suppress_tokens", {"suppress_tokens": [5]}),
        ("begin_suppress_tokens", {"begin_suppress_tokens": [5]}),
        ("forced_eos_token_id", {"forced_eos_token_id": 5}),
        ("sequence_bias", {"sequence_bias": [[[5], 2.0]]}),
        ("guidance_scale", {"guidance_scale": 1.5}),
        ("typical_p", {"typical_p": 0.5, "do_sample": True}),
        ("epsilon_cutoff", {"epsilon_cutoff": 0.1, "do_sample": True}),
        ("eta_cutoff", {"eta_cutoff": 0.1, "do_sample": True}),
        ("min_length", {"min_length": 15, "eos_token_id": 5}),
        ("min_new_tokens", {"min_new_tokens": 5, "eos_token_id": 5}),
        ("return_dict_in_generate", {"return_dict_in_generate": True}),
        ("max_time", {"max_time": 0.5}),
        ("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 5}),
        ("Favourite", {"logits_processor": transformers.LogitsProcessorList([Favourite()])}),
        ("Enough", {"stopping_criteria": transformers.StoppingCriteriaList([Enough()])}),
        ("PrefixConstrained", {"prefix_allowed_tokens_fn": lambda batch, ids: [3, 4]}),
    ],
)
def test_a_setting_that_medusa_does_not_do_is_a_usage_error_that_names_it(name: str, options: dict[str, Any]) -> None:
    settings = {"max_new_tokens": 10, "pad_token_id": 0, "do_sample": False, **options}
    with pytest.raises(UsageError, match=name) as error:
        shared_model("llama").generate(**prompts(1), **settings, custom_generate=medusa.custom_generate())
    assert "\n" not in str(error.value)


def test_a_bad_setting_of_medusa_is_a_usage_error() -> None:
    for settings in ({"drafter": "x"}, {"nodes": 0}, {"nodes": 400}, {"acceptance": "x"}, {"seed": -1}):
        decode = medusa.custom_generate(**settings)  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            shared_model("llama").generate(
                **prompts(1), max_new_tokens=5, do_sample=False, pad_token_id=0, custom_generate=decode
            )


# --- streamers --------------------------------------------------------------------------------------------------------


class Recorder(transformers.generation.streamers.BaseStreamer):
    """Every call, in order."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("place", ["generate", "custom_generate"])
def test_a_streamer_is_given_what_generate_gives_it(place: str) -> None:
    model, ids = shared_model("llama"), prompts(1)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    expected, found = Recorder(), Recorder()
    model.generate(ids, **options, streamer=expected)
    if place == "generate":
        model.generate(ids, **options, streamer=found, custom_generate=medusa.custom_generate())
    else:
        model.generate(ids, **options, custom_generate=medusa.custom_generate(streamer=found))
    assert found.calls == expected.calls
    assert len(expected.calls) == 1 + 12 + 1


def test_a_text_iterator_gives_the_text_of_generate_and_ends() -> None:
    model, tokenizer = writer(), make_tokenizer()
    ids = torch.tensor([byte_ids(b"Once upon")])
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    pieces = []
    for decode in (None, medusa.custom_generate()):
        # With a time limit, so that a reader who would wait for ever is an error.
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=0.01)
        model.generate(ids, **options, streamer=streamer, custom_generate=decode)
        pieces.append(list(streamer))
    assert pieces[1] == pieces[0]
    assert len("".join(pieces[0])) > 10


def test_a_streamer_given_by_position_is_found() -> None:
    found = Recorder()
    config = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=0)
    decode = medusa.custom_generate()
    shared_model().generate(
        prompts(1)["input_ids"], config, None, None, None, None, None, found, custom_generate=decode
    )
    assert len(found.calls) == 1 + 3 + 1


@pytest.mark.parametrize("place", ["generate", "custom_generate"])
def test_after_an_error_the_streamer_is_ended(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(streamer: Recorder, **options: Any) -> None:
        given = {"streamer": streamer}
        inner, outer = (given, {}) if place == "custom_generate" else ({}, given)
        decode = medusa.custom_generate(**inner)
        ids = prompts(1)["input_ids"]
        shared_model().generate(ids, pad_token_id=0, max_new_tokens=12, **options, **outer, custom_generate=decode)

    streamer = Recorder()
    with pytest.raises(UsageError, match="no_repeat_ngram_size"):
        generate(streamer, no_repeat_ngram_size=2)
    assert streamer.calls[-1] == "end"

    def broken(*_: object) -> None:
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr("medusa.decoding.reference.ReferenceStepper.step", broken)
    streamer = Recorder()
    with pytest.raises(RuntimeError, match="fire"):
        generate(streamer)
    assert len(streamer.calls) == 3, "the prompt, the first token, the end"
    assert streamer.calls[-1] == "end"


def test_a_streamer_for_a_batch_or_two_streamers_are_refused_and_ended() -> None:
    first, second = Recorder(), Recorder()
    options: dict[str, Any] = {"pad_token_id": 0, "max_new_tokens": 5, "streamer": first}
    with pytest.raises(UsageError, match=r"a streamer takes one text, not 2"):
        shared_model().generate(**prompts(2), **options, custom_generate=medusa.custom_generate())
    with pytest.raises(UsageError, match="two streamers"):
        shared_model().generate(**prompts(1), **options, custom_generate=medusa.custom_generate(streamer=second))
    assert first.calls.count("end") == 2
    assert second.calls == ["end"]


# --- stop strings -----------------------------------------------------------------------------------------------------


def written(rows: list[bytes]) -> tuple[dict[str, Any], list[str]]:
    """Left-padded prompts for the writer, and what it writes after each."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + byte_ids(row) for row in rows]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids).ne(0).long()}
    out = writer().generate(**inputs, max_new_tokens=24, do_sample=False)
    return inputs, make_tokenizer().batch_decode(out[:, longest:])


def stopped(inputs: dict[str, Any], decode: Any, **options: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 24, "do_sample": False, "tokenizer": make_tokenizer(), **options}
    out = writer().generate(**inputs, **settings, custom_generate=decode)
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("rows", [[b"Once upon"], [b"Once upon", b"a time", b"!"]])
@pytest.mark.parametrize("ends", [None, 2])
def test_stop_strings_give_the_ids_of_generate(rows: list[bytes], ends: int | None) -> None:
    inputs, texts = written(rows)
    for stops in ([texts[0][3:6]], texts[-1][7:10], [texts[0][3:5], texts[-1][9:12]], ["not there"]):
        options = {"stop_strings": stops, "eos_token_id": ends}
        expected = stopped(inputs, None, **options)
        assert torch.equal(stopped(inputs, medusa.custom_generate(), **options), expected)
        if stops != ["not there"] and len(rows) == 1:
            assert expected.shape[1] < inputs["input_ids"].shape[1] + 24, "the text was stopped"


def test_a_stop_string_that_begins_in_the_prompt_stops_as_in_generate() -> None:
    inputs, texts = written([b"Once upon"])
    options = {"stop_strings": ["n" + texts[0][:1]]}
    expected = stopped(inputs, None, **options)
    assert torch.equal(stopped(inputs, medusa.custom_generate(), **options), expected)
    assert expected.shape[1] == len("Once upon") + 1


def test_stop_strings_stop_a_stream_too() -> None:
    inputs, texts = written([b"Once upon"])
    expected, found = Recorder(), Recorder()
    options = {"stop_strings": [texts[0][3:6]]}
    stopped(inputs, None, streamer=expected, **options)
    stopped(inputs, medusa.custom_generate(), streamer=found, **options)
    assert found.calls == expected.calls


def test_other_ways_to_give_stop_strings() -> None:
    inputs, texts = written([b"Once upon"])
    stops = [texts[0][3:6]]
    expected = stopped(inputs, None, stop_strings=stops)
    decode = medusa.custom_generate(tokenizer=make_tokenizer())
    assert torch.equal(stopped(inputs, decode, stop_strings=stops, tokenizer=None), expected)
    criterion = transformers.StopStringCriteria(make_tokenizer(), stops)
    criteria = transformers.StoppingCriteriaList([criterion])
    assert torch.equal(stopped(inputs, medusa.custom_generate(), stopping_criteria=criteria, tokenizer=None), expected)
    with pytest.raises(UsageError, match="stop_strings need the model's tokenizer"):
        stopped(inputs, medusa.custom_generate(), stop_strings=stops, tokenizer=None)
    for bad in ([], "", ["a", ""]):
        with pytest.raises(UsageError, match="stop_strings must"):
            stopped(inputs, medusa.custom_generate(), stop_strings=bad)


def test_times_are_measured_once_for_each_state_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa.decoding.times import PassTimes

    measured: list[object] = []

    def pretend(backend: object, heads: object, facts: dict[str, object]) -> PassTimes:
        measured.append(facts["dtype"])
        return PassTimes.typical()

    monkeypatch.setattr("medusa.hf.generate.measured_times", pretend)
    model, decode = make_model("llama"), medusa.custom_generate()
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "custom_generate": decode}
    model.generate(**prompts(1), **options)
    model.generate(**prompts(1), **options)
    model.to(torch.bfloat16)
    model.generate(**prompts(1), **options)
    assert measured == ["torch.float32", "torch.bfloat16"]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "what is remembered of a model does not keep it"
