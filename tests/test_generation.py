"""`LanguageModel` and `load` on a tiny model that writes ASCII and soon repeats itself, so that drafts are accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import medusa
from medusa.api import Chunk, LanguageModel
from medusa.decoding.budget import NodeBudget
from medusa.decoding.draft import Draft
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import Scheduler
from medusa.decoding.stepper import Request
from medusa.decoding.times import PassTimes
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads.config import vocabulary_hash
from medusa.heads.file import save_heads, write_config
from tiny_lm import END, make, random_heads, writer
from tiny_models import TOKENIZER_VOCAB, agrees, byte_ids, make_model, make_tokenizer

PROMPT = "Why?"


@pytest.fixture(name="model")
def model_fixture() -> LanguageModel:
    return make()


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def decoded(model: LanguageModel, ids: list[int]) -> str:
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


# --- stream and generate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["union", "heads", "ngram", "none"])
def test_every_drafter_says_what_generate_of_transformers_says(drafter: str) -> None:
    model = make(heads=True, drafter=drafter)
    ids = model.encode(PROMPT)
    expected = writer().generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), max_new_tokens=60,
        do_sample=False, pad_token_id=0,
    )[0, len(ids) :].tolist()  # fmt: skip
    done = model.generate(PROMPT, max_new_tokens=60)
    assert agrees(writer(), ids, list(done.token_ids), expected)
    assert done.text == decoded(model, list(done.token_ids))
    if drafter in ("union", "ngram"):
        assert done.stats.tokens_per_step > 2, "the text repeats, so drafts are accepted"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_chunks_join_to_the_completion(model: LanguageModel, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 50, "temperature": temperature, "seed": 1}
    chunks = list(model.stream(PROMPT, **options))
    done = model.generate(PROMPT, **options)
    assert "".join(chunk.text for chunk in chunks) == done.text
    assert tuple(tokens_of(chunks)) == done.token_ids
    assert chunks[-1].finish_reason == done.finish_reason == "length"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    for chunk in chunks:
        assert "".join(text for text, _ in chunk.spans) == chunk.text
        assert {source for _, source in chunk.spans} <= {"model", "ngram"}
        assert "\ufffd" not in chunk.text or temperature > 0
    if temperature == 0:
        assert {source for chunk in chunks for _, source in chunk.spans} == {"model", "ngram"}


def test_counts_and_times_run_along(model: LanguageModel) -> None:
    chunks = list(model.stream(PROMPT, max_new_tokens=40))
    total = 0
    for i, chunk in enumerate(chunks):
        total += len(chunk.token_ids)
        assert chunk.stats.prompt_tokens == len(model.encode(PROMPT))
        assert chunk.stats.new_tokens == total
        assert chunk.stats.steps == i
        assert chunk.stats.ttft_seconds == chunks[0].stats.ttft_seconds > 0
        assert (chunk.stats.decode_seconds > 0) is (i > 0)
    last = chunks[-1].stats
    assert last.new_tokens == 40
    assert last.tokens_per_step == pytest.approx(39 / last.steps)
    assert last.tokens_per_second == pytest.approx(39 / last.decode_seconds)
    assert chunks[0].stats.tokens_per_step == chunks[0].stats.tokens_per_second == 0.0


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9, 31])
@pytest.mark.parametrize("drafter", ["union", "none"])
def test_max_new_tokens_is_exact(model: LanguageModel, limit: int, drafter: str) -> None:
    done = model.generate(PROMPT, max_new_tokens=limit, stepper=model.make_stepper(drafter))
    assert len(done.token_ids) == done.stats.new_tokens == limit
    assert done.finish_reason == "length"


def test_a_text_ends_where_the_context_ends() -> None:
    model = make(backend=TransformersBackend(writer(), max_length=60))
    done = model.generate(PROMPT, max_new_tokens=1000)
    assert done.stats.prompt_tokens + done.stats.new_tokens == 60
    assert done.finish_reason == "length"


# --- stop strings -----------------------------------------------------------------------------------------------------


@cache
def shared() -> LanguageModel:
    return make()


def plain(model: LanguageModel) -> tuple[str, list[int]]:
    """Text and tokens of plain decoding."""
    done = model.generate(PROMPT, max_new_tokens=60, stepper=model.make_stepper("none"))
    return done.text, list(done.token_ids)


@cache
def shared_plain() -> tuple[str, list[int]]:
    return plain(shared())


@pytest.mark.parametrize("drafter", ["union", "none"])
@settings(max_examples=12)
@given(data=st.data())
def test_a_stop_string_anywhere_ends_text_and_tokens(drafter: str, data: st.DataObject) -> None:
    model = shared()
    text, ids = shared_plain()
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 8))]
    used = next(n for n in range(1, len(ids) + 1) if stop in decoded(model, ids[:n]))
    done = model.generate(
        PROMPT, max_new_tokens=60, stop=["never said, surely", stop], stepper=model.make_stepper(drafter)
    )
    assert done.text == text[: text.index(stop)]
    assert list(done.token_ids) == ids[:used], "the last token is the one that completed the stop string"
    assert done.finish_reason == "stop"
    assert done.stats.new_tokens == used
    assert model.backend.length(0) == 0


def test_a_stop_string_is_found_across_chunks_and_inside_an_accepted_path(model: LanguageModel) -> None:
    chunks = list(model.stream(PROMPT, max_new_tokens=60))
    text = "".join(chunk.text for chunk in chunks)
    edges = [sum(len(c.text) for c in chunks[:i]) for i in range(1, len(chunks))]
    long = next(i for i, chunk in enumerate(chunks) if len(chunk.token_ids) > 4)
    across = text[edges[0] - 1 : edges[0] + 2]
    found = list(model.stream(PROMPT, max_new_tokens=60, stop=across))
    assert "".join(chunk.text for chunk in found) == text[: text.index(across)]
    inside = text[: edges[long - 1] + 2]  # ends at the second token of a long path
    found = list(model.stream(PROMPT, max_new_tokens=60, stop=inside))
    assert found[-1].finish_reason == "stop"
    assert "".join(chunk.text for chunk in found) == ""
    assert tokens_of(found) == tokens_of(chunks)[: len(inside)], "one token for each letter"
    assert len(found[-1].token_ids) == 2


def test_what_was_held_back_for_a_stop_string_comes_out_at_the_end(model: LanguageModel) -> None:
    text, _ = plain(model)
    done = model.generate(PROMPT, max_new_tokens=60, stop=text[-3:] + "\x00")
    assert done.text == text
    assert done.finish_reason == "length"


# --- the end of the text ----------------------------------------------------------------------------------------------


def ending_model(token: int) -> PreTrainedModel:
    """Says <|end|> where the writer would say `token`."""
    model = make_model("llama", vocab_size=TOKENIZER_VOCAB)
    model.load_state_dict(writer().state_dict())
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[END] = head[token] * 1.05
    return model


def test_the_end_token_ends_the_text_unless_ignored() -> None:
    _, ids = plain(make())
    at = max(ids.index(token) for token in set(ids))  # late
    assert at > 2
    network = ending_model(ids[at])
    for drafter in ("union", "none"):
        model = make(backend=TransformersBackend(network), drafter=drafter)
        done = model.generate(PROMPT, max_new_tokens=60)
        assert done.finish_reason == "stop"
        assert done.token_ids == (*ids[:at], END)
        assert done.text == decoded(model, ids[:at])
        ignoring = model.generate(PROMPT, max_new_tokens=60, ignore_eos=True)
        assert ignoring.finish_reason == "length"
        assert len(ignoring.token_ids) == 60
        assert ignoring.token_ids[: at + 1] == done.token_ids
        assert "<|end|>" not in ignoring.text


def test_an_end_token_with_a_text_of_its_own_is_not_part_of_the_text() -> None:
    text, ids = plain(make())
    at = max(ids.index(token) for token in set(ids))
    done = make(eos_token_ids=[ids[at]]).generate(PROMPT, max_new_tokens=60)
    assert list(done.token_ids) == ids[: at + 1]
    assert done.text == text[:at]
    assert done.finish_reason == "stop"


# --- the life of a stream ---------------------------------------------------------------------------------------------


def test_closing_a_stream_early_frees_the_slot_and_the_model_works_on(model: LanguageModel) -> None:
    expected = model.generate(PROMPT, max_new_tokens=30)
    stream = model.stream("something else entirely", max_new_tokens=100)
    next(stream)
    next(stream)
    assert model.backend.length(0) > 0
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    assert model.backend.length(0) == 0
    again = model.generate(PROMPT, max_new_tokens=30)
    assert (again.text, again.token_ids) == (expected.text, expected.token_ids)


def test_a_second_stream_is_refused_while_the_first_is_open(model: LanguageModel) -> None:
    expected = model.generate(PROMPT, max_new_tokens=10)
    first = model.stream(PROMPT, max_new_tokens=10)
    chunks = [next(first)]
    with pytest.raises(UsageError, match="slot 0 is in use"):
        model.generate("something else")
    chunks += first
    assert "".join(chunk.text for chunk in chunks) == expected.text


def test_who_has_slots_of_his_own_is_refused_and_empties_nothing(model: LanguageModel) -> None:
    expected = model.generate(PROMPT, max_new_tokens=10)
    first = model.stream(PROMPT, max_new_tokens=10)
    chunks = [next(first)]
    for piece in (None, 1):
        scheduler = Scheduler(model.stepper, piece=piece)
        scheduler.submit(Request([5, 6, 7]))
        with pytest.raises(UsageError, match="slot 0 is in use"):
            scheduler.step()
    chunks += first
    assert "".join(chunk.text for chunk in chunks) == expected.text


def test_an_interrupted_prefill_frees_the_slot(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate(PROMPT, max_new_tokens=10)
    extend = model.backend.extend

    def interrupted(slot: int, token_ids: Sequence[int]) -> None:
        extend(slot, token_ids)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.backend, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT)
    monkeypatch.undo()
    assert model.generate(PROMPT, max_new_tokens=10).text == expected.text


def test_a_stream_that_is_dropped_or_never_started_leaves_no_trace(model: LanguageModel) -> None:
    for chunk in model.stream(PROMPT, max_new_tokens=100):
        assert chunk.finish_reason is None
        break
    model.stream(PROMPT)
    assert model.backend.length(0) == 0


def test_an_error_in_a_step_frees_the_slot(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model.stream(PROMPT)
    next(stream)

    def breaks(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.backend, "verify", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)
    assert model.backend.length(0) == 0


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_again_and_with_any_drafter() -> None:
    model = make(heads=True)
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.7, "top_p": 0.95, "top_k": 40}
    first = model.generate(PROMPT, seed=3, **options)
    for drafter in ("union", "heads", "ngram", "none"):
        assert (
            model.generate(PROMPT, seed=3, stepper=model.make_stepper(drafter, nodes=7), **options).token_ids
            == first.token_ids
        )
    assert model.generate(PROMPT, seed=4, **options).token_ids != first.token_ids
    assert (
        model.generate(PROMPT, temperature=2.0, max_new_tokens=30).token_ids
        != model.generate(PROMPT, temperature=2.0, max_new_tokens=30).token_ids
    ), "without a seed every answer is another"


def test_a_repetition_penalty_gives_the_same_text_with_any_drafter(model: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "repetition_penalty": 1.3}
    expected = model.generate(PROMPT, stepper=model.make_stepper("none"), **options)
    assert model.generate(PROMPT, **options).token_ids == expected.token_ids
    assert expected.token_ids != model.generate(PROMPT, max_new_tokens=40).token_ids


def test_typical_acceptance_runs_and_stops_exactly(model: LanguageModel) -> None:
    done = model.generate(PROMPT, max_new_tokens=33, temperature=0.7, acceptance="typical", seed=0)
    assert len(done.token_ids) == 33


# --- make_stepper -----------------------------------------------------------------------------------------------------


def test_another_stepper_leaves_the_model_as_it_was() -> None:
    model = make(heads=True, nodes=9)
    other = model.make_stepper("none", nodes=3)
    assert (model.stepper.drafter.name, model.stepper.nodes) == ("union", 9)
    assert (other.drafter.name, other.nodes) == ("none", 3)
    assert other.backend is model.backend
    assert model.make_stepper("ngram").nodes == 9


def test_nodes_are_chosen_by_times_that_are_asked_for_only_where_they_are_needed() -> None:
    asked: list[bool] = []
    found = iter([PassTimes.measured({1: 1.0, 16: 1.3, 32: 9.0}, draft_seconds=0.1), PassTimes.typical()])

    def times(refresh: bool) -> PassTimes:
        asked.append(refresh)
        return next(found)  # at each measurement another

    auto = make(heads=True, drafter="none", times=times)
    plain = auto.stepper
    assert (auto.describe()["nodes"], asked) == ("auto", [])
    auto.stepper = auto.make_stepper("union")
    assert auto.nodes == "auto"
    assert re.fullmatch(r"auto \(up to 16; \d+ expected\)", str(auto.describe()["nodes"]))
    assert asked == [False]
    assert auto.pass_times(refresh=True) == PassTimes.typical()
    assert asked == [False, True]
    for other in (auto.stepper, auto.make_stepper("union"), auto.make_stepper("ngram")):  # made before and after
        assert isinstance(other.nodes, NodeBudget)
        assert other.nodes.times == auto.pass_times() == PassTimes.typical()
    assert asked == [False, True], "one value for all"
    options: dict[str, Any] = {"max_new_tokens": 40}
    assert auto.generate(PROMPT, **options).token_ids == auto.generate(PROMPT, stepper=plain, **options).token_ids


@pytest.mark.parametrize("nodes", [0, -1, 1.5, "many", "7", True, None])
def test_nodes_are_auto_or_a_number(model: LanguageModel, nodes: Any) -> None:
    with pytest.raises(UsageError, match="nodes must be auto or a whole number from 1"):
        make(nodes=nodes)


@pytest.mark.parametrize("drafter", ["union", "heads", "ngram", "none"])
def test_more_nodes_than_the_backend_takes_are_refused_before_a_text_is_begun(drafter: str) -> None:
    assert make(heads=True, drafter=drafter, nodes=256).generate(PROMPT, max_new_tokens=3).stats.new_tokens == 3
    with pytest.raises(UsageError, match="nodes may be at most 256, not 257"):
        make(heads=True, drafter=drafter, nodes=257)
    small = TransformersBackend(writer())
    small.max_nodes = 5
    with pytest.raises(UsageError, match="nodes may be at most 5 on the transformers backend, not 6"):
        make(heads=True, drafter=drafter, nodes=6, backend=small)
    model = make(heads=True, drafter=drafter, backend=small)
    with pytest.raises(UsageError, match="at most 5"):
        model.make_stepper(drafter, nodes=6)
    assert all(chunk.step.drafted <= 5 for chunk in model.stream(PROMPT, max_new_tokens=20))


def test_a_budget_knows_how_the_backend_computes_a_batch() -> None:
    backend = TransformersBackend(writer())
    backend.padding = 4
    budget = make(backend=backend).stepper.nodes
    assert isinstance(budget, NodeBudget)
    chain = Draft((1,) * 5, (-1, 0, 1, 2, 3), (1.0, 0.9, 0.8, 0.7, 0.6), ("",) * 5)
    rows = [chain, Draft((1,))]
    assert budget.share(rows, 0.0).seconds in [budget.times(2 * n) for n in (1, 4, 8)]
    assert TransformersBackend(writer()).padding == 1


def test_an_impossible_drafter_is_an_error(model: LanguageModel) -> None:
    for wrong, message in (("medusa", "unknown drafter medusa"), ("heads", "needs heads")):
        with pytest.raises(UsageError, match=message):
            model.make_stepper(wrong)
    with pytest.raises(UsageError, match="nodes"):
        model.make_stepper("none", nodes=0)
    assert model.stepper.drafter.name == "ngram", "union without heads"


# --- encode -----------------------------------------------------------------------------------------------------------


def test_a_string_is_a_user_turn_and_raw_text_is_not(model: LanguageModel) -> None:
    templated = "<|start|>user: Hi<|end|><|start|>assistant: "
    ids = model.encode("Hi")
    assert model.tokenizer.decode(ids) == templated
    assert model.encode([{"role": "user", "content": "Hi"}]) == ids
    assert model.encode("Hi", raw=True) == byte_ids(b"Hi")
    history = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    assert model.tokenizer.decode(model.encode(history)) == (
        "<|start|>user: A<|end|><|start|>assistant: B<|end|><|start|>user: C<|end|><|start|>assistant: "
    )


def test_without_a_template_a_string_is_plain_and_messages_are_an_error() -> None:
    model = make(tokenizer=make_tokenizer(chat_template=None))
    assert model.encode("Hi") == model.encode("Hi", raw=True) == byte_ids(b"Hi")
    with pytest.raises(UsageError, match="tiny has no chat template"):
        model.encode([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("prompt", "raw", "message"),
    [
        ("", False, "empty"),
        ("", True, "empty"),
        ([], False, "empty"),
        ([{"role": "user", "content": "Hi"}], True, "raw"),
        ([{"role": "system", "content": "Be brief"}], False, "only user and assistant may speak, not system"),
        ([{"content": "Hi"}], False, "refuses"),
        (["Hi"], False, "refuses"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_a_usage_error(
    model: LanguageModel, prompt: Any, raw: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        model.encode(prompt, raw=raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
        ("acceptance", "always"),
        ("epsilon", 1.5),
        ("delta", -1.0),
        ("stop", ""),
        ("stop", ["a", ""]),
    ],
)
def test_a_bad_argument_is_a_usage_error_at_once(model: LanguageModel, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=option) as error:
        model.stream(PROMPT, **{option: value})  # before the first chunk is asked for
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=option):
        model.generate(PROMPT, **{option: value})


def test_a_prompt_that_leaves_no_room_is_a_usage_error_at_once(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="256"):
        model.stream("x" * 300)
    with pytest.raises(UsageError, match="256"):
        model.stream("x" * 256, raw=True)
    assert model.generate("x" * 255, raw=True).stats.new_tokens == 1


# --- describe and load ------------------------------------------------------------------------------------------------


def test_describe_is_json_with_what_is_loaded() -> None:
    facts: Any = json.loads(json.dumps(make(heads=True, nodes=5, facts={"dtype": "float32"}).describe()))
    assert facts["model"] == "tiny"
    assert facts["dtype"] == "float32"
    assert facts["vocabulary"] == TOKENIZER_VOCAB
    assert (facts["hidden_size"], facts["layers"], facts["context"], facts["nodes"]) == (32, 3, 256, 5)
    assert facts["heads"]["kind"] == "recurrent"
    assert facts["heads"]["parameters"] > 0
    assert facts["drafter"] == "union"
    assert facts["versions"]["medusa"] == medusa.__version__
    assert json.loads(json.dumps(make().describe()))["heads"] is None


@pytest.fixture(name="saved", scope="module")
def saved_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and its tokenizer; the end token is <|end|>."""
    directory = tmp_path_factory.mktemp("model")
    _, ids = plain(make())
    model = ending_model(ids[max(ids.index(token) for token in set(ids))])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = END
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_load_takes_a_directory_in_every_precision(saved: Path, dtype: str) -> None:
    model = medusa.load(str(saved), heads="none", dtype=dtype, progress=False)
    done = model.generate(PROMPT, max_new_tokens=60)
    if dtype != "int8":  # whose rounding may lead elsewhere
        assert done.finish_reason == "stop", "the end token comes from the model's own settings"
    assert done.text
    facts: Any = json.loads(json.dumps(model.describe()))
    assert facts["dtype"] == dtype
    assert facts["parameters"] == sum(p.numel() for p in writer().parameters())
    assert model.generate(PROMPT, max_new_tokens=60, stepper=model.make_stepper("none")).token_ids == done.token_ids


def test_load_measures_the_machine_once_and_only_for_a_drafter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medusa.engines import times as profile

    measure, measured = profile.profile, []
    monkeypatch.setattr(
        profile,
        "profile",
        lambda *args, sizes, **options: (measured.append(sizes), measure(*args, sizes=sizes, **options))[1],
    )
    medusa.load(str(saved), heads="none", drafter="none")
    medusa.load(str(saved), heads="none", nodes=3)
    assert measured == []
    model = medusa.load(str(saved), heads="none")
    assert "measuring this machine once ..." in capsys.readouterr().err
    assert str(model.describe()["nodes"]).startswith("auto (up to ")
    medusa.load(str(saved), heads="none")
    assert measured == [profile.QUICK_SIZES, (1,)], "measured, and the second time looked at with one token"
    assert "measuring" not in capsys.readouterr().err


def test_times_measured_anew_are_those_of_a_loaded_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([PassTimes((1.0, 2.0)), PassTimes((3.0, 4.0))])
    monkeypatch.setattr("medusa.api.measured_times", lambda *_, **__: next(found))
    model = medusa.load(str(saved), heads="none", progress=False)
    assert model.pass_times()(1) == 1.0
    assert model.pass_times(refresh=True)(1) == 3.0
    for other in (model.stepper, model.make_stepper("union")):
        assert isinstance(other.nodes, NodeBudget)
        assert other.nodes.times(1) == model.pass_times()(1) == 3.0


def test_load_takes_saved_heads_and_refuses_those_of_another_tokenizer(saved: Path, tmp_path: Path) -> None:
    digest = vocabulary_hash(make_tokenizer().get_vocab())
    save_heads(random_heads(writer(), feature_layers=(1,), vocab_hash=digest), tmp_path / "heads")
    model = medusa.load(str(saved), heads=str(tmp_path / "heads"), dtype="float32", progress=False)
    assert model.heads is not None
    assert model.stepper.drafter.name == "union"
    plain_model = medusa.load(str(saved), heads="none", drafter="none", dtype="float32", progress=False)
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
    assert model.generate(PROMPT, **options).text == plain_model.generate(PROMPT, **options).text
    save_heads(random_heads(writer(), vocab_hash="of another"), tmp_path / "other")
    with pytest.raises(MedusaError, match="tokenizer"):
        medusa.load(str(saved), heads=str(tmp_path / "other"), progress=False)
    save_heads(random_heads(writer(), feature_layers=(3,)), tmp_path / "deep")
    with pytest.raises(MedusaError):
        medusa.load(str(saved), heads=str(tmp_path / "deep"), progress=False)


@pytest.fixture(name="unpacked")
def unpacked_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read: whoever tries fails."""

    def reads(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("medusa.engines.native.NativeBackend.__init__", reads)
    monkeypatch.setattr("medusa.models.zoo.load_model", reads)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("backend", ["native", "transformers"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_hash": "of another"}, "whose tokenizer is another"),
        ({"vocab_size": 7}, r"vocabulary and hidden size \(7, 32\), not"),
        ({"hidden_size": 16}, r"hidden size \(\d+, 16\), not"),
        ({"feature_layers": (1, 3)}, "read layer 3, but the model has 3"),
        ({}, "the weights were read"),
    ],
)
def test_heads_of_another_model_are_refused_before_weights_are_read(
    saved: Path, tmp_path: Path, backend: str, changes: dict[str, Any], message: str
) -> None:
    if backend == "native":
        pytest.importorskip("medusa_native")
    heads = random_heads(writer())
    save_heads(heads, tmp_path / "heads")
    write_config(replace(heads.config, **changes), tmp_path / "heads")
    with pytest.raises((MedusaError, AssertionError), match=message) as error:
        medusa.load(str(saved), heads=str(tmp_path / "heads"), backend=backend, progress=False)
    assert isinstance(error.value, MedusaError) is bool(changes)


@pytest.mark.usefixtures("unpacked")
def test_too_many_nodes_are_refused_before_weights_are_read(saved: Path) -> None:
    with pytest.raises(UsageError, match="at most 256, not 257"):
        medusa.load(str(saved), heads="none", nodes=257, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "medusa"}, "drafter medusa"),
        ({"backend": "cuda"}, "backend cuda"),
        ({"dtype": "float8"}, "dtype float8"),
        ({"tree": "tall"}, "tree tall"),
        ({"threads": 0}, "threads"),
        ({"nodes": 0}, "nodes"),
        ({"nodes": 400}, "at most 256, not 400"),
        ({"num_slots": 0}, "num_slots"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 10**6}, "max_length"),
        ({"heads": "none", "drafter": "heads"}, "no heads"),
    ],
)
def test_a_bad_argument_of_load_is_a_usage_error(saved: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        medusa.load(str(saved), **{"heads": "none", "progress": False, **options})
    assert "\n" not in str(error.value)


# --- many prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_many_prompts_give_the_texts_of_each_alone_in_their_order(slots: int) -> None:
    prompts = ["What is it?", "Tell me more.", "Why?", PROMPT, "And then?"]
    each = [
        {"max_new_tokens": 25},
        {"temperature": 0.8, "seed": 5},
        {"stop": "e"},
        {"sampling": Sampling(repetition_penalty=1.4)},
        {"raw": True, "max_new_tokens": 3},
    ]
    alone = make(heads=True, nodes=6)
    expected = [alone.generate(p, **{"max_new_tokens": 12, **own}) for p, own in zip(prompts, each, strict=True)]
    many = make(heads=True, nodes=6, backend=TransformersBackend(writer(), num_slots=slots))
    found = many.generate_many(prompts, each=each, max_new_tokens=12)
    for one, right in zip(found, expected, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (right.text, right.token_ids, right.finish_reason)
        assert one.stats.steps == right.stats.steps
    assert many.slots.free == slots
    assert all(many.backend.length(slot) == 0 for slot in range(slots))


def test_many_prompts_run_side_by_side() -> None:
    many = make(backend=TransformersBackend(writer(), num_slots=2))
    order = [
        i for i, _ in many.stream_many(["one", "two", "three"], max_new_tokens=6, stepper=many.make_stepper("none"))
    ]
    assert order[:6] == [0, 1, 0, 1, 0, 1]
    assert order.count(2) == 6


def test_options_of_another_number_than_the_prompts_are_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="each must hold as many sets of options as there are prompts, 2"):
        model.generate_many(["a", "b"], each=[{}])
    assert model.generate_many([]) == []


def test_a_bad_prompt_among_many_is_refused_before_the_first_is_answered(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        model.stream_many(["good", ""])


def test_a_bar_shows_how_many_have_been_answered(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.generate_many(["one", "two"], max_new_tokens=2)
    assert capsys.readouterr().err == ""
    model.generate_many(["one", "two"], max_new_tokens=2, progress=True)
    assert "100%" in capsys.readouterr().err


# --- what a slot keeps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["union", "none"])
def test_a_conversation_continues_from_what_its_slot_holds(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the text of one that is read anew at each turn."""
    keeping, forgetting = (make(heads=True, drafter=drafter) for _ in range(2))
    keeping.slots.kept = keeping.backend.max_length
    read: list[list[int]] = [[], []]
    for lengths, one in zip(read, (keeping, forgetting), strict=True):

        def extend(slot: int, ids: Sequence[int], lengths: list[int] = lengths, then: Any = one.backend.extend) -> Any:
            lengths.append(len(ids))
            return then(slot, ids)

        monkeypatch.setattr(one.backend, "extend", extend)
    messages: list[dict[str, str]] = []
    for question in ("What is it?", "Tell me more.", "And then?"):
        messages.append({"role": "user", "content": question})
        first, second = (one.generate(messages, max_new_tokens=12) for one in (keeping, forgetting))
        assert first.token_ids == second.token_ids
        messages.append({"role": "assistant", "content": first.text})
    assert read[0][0] == read[1][0]
    assert all(now < anew / 2 for now, anew in zip(read[0][1:], read[1][1:], strict=True))
    keeping.generate([{"role": "user", "content": "Anew."}], max_new_tokens=12)
    assert keeping.backend.length(0) < 60, "what no longer fits is cut off"


def test_what_the_stepper_of_a_device_does_not_run_is_given_to_the_reference() -> None:
    from medusa.device.stepper import DeviceStepper

    model = make(drafter="ngram", nodes=4)
    expected = model.generate(PROMPT, max_new_tokens=20, frequency_penalty=0.5)
    backend: Any = model.backend
    model.stepper = DeviceStepper(backend, model.stepper.drafter, 4)
    with pytest.raises(UsageError, match="use the reference"):
        model.generate(PROMPT, frequency_penalty=0.5, stepper=model.stepper)
    assert model.generate(PROMPT, max_new_tokens=20, frequency_penalty=0.5).token_ids == expected.token_ids
    assert all(chunk.step.logprobs for chunk in model.stream(PROMPT, max_new_tokens=5, logprobs=1))
    assert model.generate(PROMPT, max_new_tokens=20).token_ids == make().generate(PROMPT, max_new_tokens=20).token_ids
