# ruff: noqa: E402  # the server's packages are an extra: without them these tests are skipped
"""The interfaces of `medusa serve` on a tiny model, in this process: what is answered, and what is refused."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(package)

from pydantic import ValidationError

from medusa.api import LanguageModel
from medusa.cli import main
from medusa.decoding.stepper import TokenLogprobs
from medusa.serve import schema
from medusa.serve.logprobs import CompletionLogprobs, TokenTexts
from serving import Client, model, server
from tiny_models import byte_ids


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """The same model as the server's, for the library."""
    return model()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with server() as client:
        yield client


def said(events: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_chat_says_what_the_library_says(client: Client, lm: LanguageModel) -> None:
    expected = lm.generate("Hello", max_new_tokens=30)
    answer = client.chat(max_tokens=30)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected.stats.prompt_tokens
    assert usage["completion_tokens"] == expected.stats.new_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_joins_to_the_whole_answer_and_ends_with_its_usage(client: Client) -> None:
    whole = client.chat(max_tokens=30)
    messages = [{"role": "user", "content": "Hello"}]
    options = {"include_usage": True}
    events = client.stream("/v1/chat/completions", messages=messages, max_tokens=30, stream_options=options)
    assert said(events) == whole["choices"][0]["message"]["content"]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_without_stream_options_no_event_has_a_usage(client: Client) -> None:
    events = client.stream("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], max_tokens=3)
    assert all("usage" not in event for event in events)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 2**64 - 1, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 1},
        {"logit_bias": {"50": 100}},
        {"drafter": "none"},
    ],
)
def test_settings_mean_what_they_mean_in_the_library(
    client: Client, lm: LanguageModel, settings: dict[str, Any]
) -> None:
    options = {name: value for name, value in settings.items() if name != "drafter"}
    if "logit_bias" in options:
        options["logit_bias"] = tuple((int(token), bias) for token, bias in options["logit_bias"].items())
    expected = lm.generate("Hello", max_new_tokens=25, **options).text
    assert client.chat(max_tokens=25, **settings)["choices"][0]["message"]["content"] == expected


def test_the_choices_of_a_seed_are_those_of_the_seeds_after_it(client: Client) -> None:
    def choices(**options: Any) -> list[str]:
        found = client.chat(temperature=1.0, max_tokens=12, **options)["choices"]
        return [choice["message"]["content"] for choice in found]

    together = choices(seed=7, n=3)
    assert together == [text for seed in (7, 8, 9) for text in choices(seed=seed)]
    assert len(set(together)) == 3
    wrapped = choices(seed=2**64 - 1, n=2)
    assert wrapped[1:] == choices(seed=0)


def test_a_seed_that_was_drawn_is_told_and_gives_the_text_again(client: Client) -> None:
    first = client.chat(temperature=1.0, max_tokens=20, medusa=True)
    assert first["medusa"]["seed"] < 2**53, "JavaScript can say it"
    again = client.chat(temperature=1.0, max_tokens=20, seed=first["medusa"]["seed"])
    assert again["choices"] == first["choices"]


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(client: Client) -> None:
    text = client.chat(max_tokens=30)["choices"][0]["message"]["content"]
    for stop in (text[5:7], ["\n\n", text[5:7]]):
        (choice,) = client.chat(max_tokens=30, stop=stop)["choices"]
        assert choice["message"]["content"] == text[: text.index(text[5:7])]
        assert choice["finish_reason"] == "stop"


def test_the_smaller_of_two_limits_counts(client: Client) -> None:
    assert client.chat(max_tokens=9, max_completion_tokens=4)["usage"]["completion_tokens"] == 4


def test_without_a_limit_a_chat_ends_where_the_context_does(client: Client, lm: LanguageModel) -> None:
    usage = client.chat()["usage"]
    assert usage["total_tokens"] == lm.backend.max_length


def test_parts_of_a_message_are_joined_and_a_developer_speaks_as_the_system(client: Client) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert (
        client.chat(messages=[{"role": "user", "content": parts}], max_tokens=5)["choices"]
        == (client.chat(max_tokens=5)["choices"])
    )
    refused = client.chat(messages=[{"role": "developer", "content": "x"}], status=400)
    assert "not system" in refused["error"]["message"], "the tiny template takes no system message"


def test_logprobs_are_those_of_the_tokens_that_were_said(client: Client) -> None:
    answer = client.chat(max_tokens=8, logprobs=True, top_logprobs=3)
    (choice,) = answer["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == choice["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"], "greedy takes the likeliest"
    events = client.stream(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
    )
    streamed = [
        entry for event in events for c in event["choices"] for entry in (c["logprobs"] or {}).get("content", [])
    ]
    assert streamed == content
    plain = client.chat(max_tokens=8, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[]] * 8


def test_completions_take_texts_and_tokens_one_or_many(client: Client, lm: LanguageModel) -> None:
    def texts(prompt: Any, **options: Any) -> list[str]:
        answer = client.post("/v1/completions", {"prompt": prompt, "max_tokens": 6, **options})
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
        return [choice["text"] for choice in answer["choices"]]

    one, other = (lm.generate(text, raw=True, max_new_tokens=6).text for text in ("Hello", "You"))
    ids = [lm.encode(text, raw=True) for text in ("Hello", "You")]
    assert texts("Hello") == texts(ids[0]) == [one]
    assert texts(["Hello", "You"]) == texts(ids) == [one, other]
    assert texts(["Hello", "You"], n=2) == [one, one, other, other]
    assert texts(["Hello", "You"], echo=True) == ["Hello" + one, "You" + other]
    assert texts(ids, echo=True) == ["Hello" + one, "You" + other]
    events = client.stream("/v1/completions", prompt=["Hello", "You"], max_tokens=6, echo=True)
    assert [said(events, i) for i in range(2)] == ["Hello" + one, "You" + other]


def test_a_completion_has_sixteen_tokens_where_nothing_is_said(client: Client) -> None:
    answer = client.post("/v1/completions", {"prompt": "Hello"})
    assert answer["usage"]["completion_tokens"] == 16


def test_logprobs_of_a_completion_have_offsets_into_its_text(client: Client) -> None:
    body = {"prompt": "Hello", "max_tokens": 8, "logprobs": 2}
    (choice,) = client.post("/v1/completions", body)["choices"]
    shown = choice["logprobs"]
    assert "".join(shown["tokens"]) == choice["text"]
    assert [choice["text"][a : a + len(t)] for a, t in zip(shown["text_offset"], shown["tokens"], strict=True)] == (
        shown["tokens"]
    )
    assert all(len(top) == 2 for top in shown["top_logprobs"])
    events = client.stream("/v1/completions", **body)
    parts = [event["choices"][0]["logprobs"] for event in events]
    streamed = {name: [item for part in parts for item in part[name]] for name in shown}
    assert (streamed["tokens"], streamed["text_offset"]) == (shown["tokens"], shown["text_offset"])
    # The second answer reads less of its prompt anew; on this engine the width of a pass decides the last bits.
    assert streamed["token_logprobs"] == pytest.approx(shown["token_logprobs"], rel=1e-5)
    assert streamed["top_logprobs"] == [pytest.approx(top, rel=1e-5) for top in shown["top_logprobs"]]


def test_a_response_is_whole_or_a_sequence_of_events(client: Client, lm: LanguageModel) -> None:
    expected = lm.generate("Hello", max_new_tokens=9).text
    body = {"input": "Hello", "max_output_tokens": 9}
    answer = client.post("/v1/responses", body)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["content"][0]["text"] == expected
    events = client.stream("/v1/responses", **body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event["delta"] for event in events if "delta" in event) == expected
    last = events[-1]["response"]
    assert last["output"][0]["content"] == answer["output"][0]["content"]
    assert last["usage"]["output_tokens"] == answer["usage"]["output_tokens"] == 9


def test_a_response_reads_a_conversation(client: Client, lm: LanguageModel) -> None:
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yo"}]},
        {"role": "user", "content": "Hello"},
    ]
    plain = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yo"), ("user", "Hello"))]
    answer = client.post("/v1/responses", {"input": turns, "max_output_tokens": 5})
    assert answer["output"][0]["content"][0]["text"] == lm.generate(plain, max_new_tokens=5).text


def test_how_it_was_decoded_is_told_where_that_is_asked_for(client: Client, lm: LanguageModel) -> None:
    stats = lm.generate("Hello", max_new_tokens=60).stats
    answer = client.chat(max_tokens=60, medusa=True)
    told = answer["medusa"]
    assert told["steps"] == stats.steps
    assert told["tokens_per_step"] == pytest.approx(stats.tokens_per_step, abs=1e-4)
    assert told["accepted"] == told["by_drafter"]["ngram"] > 0
    assert sum(told["by_drafter"].values()) == 60
    assert "medusa" not in client.chat(max_tokens=3)
    events = client.stream(
        "/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], max_tokens=60, medusa="tree"
    )
    assert events[-1]["medusa"] == {**told, "seed": events[-1]["medusa"]["seed"]}
    steps = [event["medusa"] for event in events[:-1] if "medusa" in event]
    assert "".join(text for step in steps for text, _ in step["spans"]) == answer["choices"][0]["message"]["content"]
    assert sum(step["tokens"] for step in steps) == 60
    trees = [step["tree"] for step in steps if "tree" in step]
    assert len(trees) == stats.steps
    assert all(len(tree["tokens"]) == len(tree["parents"]) == len(tree["sources"]) for tree in trees)
    spans = client.stream(
        "/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], max_tokens=60, medusa="spans"
    )
    assert not any("tree" in event.get("medusa", {}) for event in spans)


def test_the_drafter_of_the_model_by_its_name_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """So requests that name it share their passes with those that do not."""
    lm = model()
    monkeypatch.setattr(lm, "make_stepper", lambda name: 1 / 0)
    with server(lm) as client:
        for name in ("ngram", "union"):  # of a model without heads
            assert client.chat(max_tokens=3, drafter=name)["choices"]
        assert client.chat(max_tokens=3, drafter="none", status=500)


def test_models_tokens_and_the_document(client: Client, lm: LanguageModel) -> None:
    listed = client.http.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["tiny"]
    assert client.http.get("/v1/models/tiny").json() == listed["data"][0]
    assert client.http.get("/v1/models/other/one").status_code == 404
    ids = lm.encode("Hello", raw=True)
    assert client.post("/tokenize", {"prompt": "Hello"})["tokens"] == ids
    assert client.post("/detokenize", {"tokens": ids}) == {"prompt": "Hello"}
    chat = client.post("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]})
    assert chat["tokens"] == lm.encode("Hello")
    assert chat["count"] == len(chat["tokens"])
    paths = client.http.get("/openapi.json").json()["paths"]
    whole = paths["/v1/chat/completions"]["post"]["responses"]
    assert set(whole["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"4XX", "5XX"} <= whole.keys()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"} <= paths.keys()


# --- refusals ---------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hello"}]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.custom"),
    ({"tool_choice": "none"}, "tool_choice"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    ({"functions": []}, "functions"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["audio"]}, "modalities.0"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"best_of": 2}, "best_of"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"unheard_of": 1}, "unheard_of"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"min_p": 1}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"acceptance": "loose"}, "acceptance"),
    ({"epsilon": 2}, "epsilon"),
    ({"delta": -1}, "delta"),
    ({"drafter": "magic"}, "drafter"),
    ({"drafter": "heads"}, "drafter"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 51}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 4}, "n"),
    ({"n": 10**30}, "n"),
    ({"stop": ""}, "stop.0"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 501}, "stop.0"),
    ({"stop": [1]}, "stop.0"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"medusa": "all"}, "medusa"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x" * 999}]}, "messages"),
]  # fmt: skip


@pytest.fixture(scope="module")
def strict() -> Iterator[Client]:
    with server(max_choices=3, max_tokens=50, max_body=20_000) as client:
        yield client


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda value: json.dumps(value)[:50])
def test_what_is_not_understood_is_refused_by_name(strict: Client, change: dict[str, Any], param: str) -> None:
    told = strict.chat(status=400, **{"messages": MESSAGES, **change})
    assert told.keys() == {"error"}
    error = told["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param.split(".")[0] in error["message"] or "prompt" in error["message"]


CALL = {"type": "function_call", "call_id": "c", "name": "f"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "best_of": 1}, "best_of"),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [10**9]}, "prompt"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, "n"),
        ("/v1/responses", {"input": "a", "previous_response_id": "resp-1"}, "previous_response_id"),
        ("/v1/responses", {"input": "a", "store": True}, "store"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.type"),
        ("/v1/responses", {"input": []}, "input"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/v1/responses", {"input": [{**CALL, "arguments": '{"a": "\\ud800"}'}]}, "input.0.arguments"),
    ],
    ids=str,
)
def test_so_do_the_other_interfaces(strict: Client, path: str, body: dict[str, Any], param: str) -> None:
    error = strict.post(path, body, 400)["error"]
    assert error["param"].partition(".")[0] == param.partition(".")[0]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (schema.ChatRequest, {"messages": [0] * 1000}),
        (schema.ChatRequest, {"messages": [{"role": "user", "content": [0] * 1000}]}),
        (schema.ChatRequest, {"messages": MESSAGES, "modalities": ["x"] * 1000}),
        (schema.ChatRequest, {"messages": MESSAGES, **{f"x{i}": 0 for i in range(1000)}}),
        (schema.ChatRequest, {"messages": MESSAGES, "metadata": {f"x{i}": 0 for i in range(1000)}}),
        (schema.ChatRequest, {"messages": MESSAGES, "logit_bias": {f"{i}": "x" for i in range(2000)}}),
        (schema.CompletionRequest, {"prompt": [None] * 1000}),
        (schema.CompletionRequest, {"prompt": [[None] * 1000] * 1000}),
        (schema.ResponsesRequest, {"input": [0] * 1000}),
        (schema.DetokenizeRequest, {"tokens": ["x"] * 1000}),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_body_with_many_faults_is_read_no_further_than_to_the_first_few(kind: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() < 10


def test_more_answers_than_may_be_are_refused_before_prompts_are_read(
    strict: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "encode", lambda *_, **__: 1 / 0)
    assert strict.post("/v1/completions", {"prompt": ["a"] * 4}, 400)["error"]["param"] == "n"


def test_a_bias_for_more_tokens_than_may_be_is_refused(strict: Client) -> None:
    error = strict.chat(status=400, messages=MESSAGES, logit_bias={str(i): 0.5 for i in range(1025)})["error"]
    assert error["param"] == "logit_bias"
    assert "at most 1024" in error["message"]


def test_tokens_that_are_parts_of_a_character_are_named_by_their_bytes(lm: LanguageModel) -> None:
    ids = byte_ids("aé€".encode())
    known = tuple(TokenLogprobs(-1.0, ((ids[1], -1.0), (ids[2], -2.0))) for _ in ids)
    step = SimpleNamespace(logprobs=known)
    chunks: Any = [SimpleNamespace(token_ids=ids, step=step)]
    shown = CompletionLogprobs(TokenTexts(lm.tokenizer, ()), 7).push(chunks)
    parts = ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert shown["tokens"] == ["a", *parts]
    assert shown["text_offset"] == [7, 8, 8, 9, 9, 9]
    assert shown["top_logprobs"][0] == {parts[0]: -1.0, parts[1]: -2.0}


def test_null_is_as_if_a_field_were_not_there(client: Client) -> None:
    nothing = dict.fromkeys(["tools", "stop", "temperature", "unheard_of", "logprobs", "stream_options"])
    assert client.chat(max_tokens=5, **nothing)["choices"] == client.chat(max_tokens=5)["choices"]


def test_labels_of_clients_change_nothing(client: Client) -> None:
    labels = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "x"}
    assert client.chat(max_tokens=5, **labels)["choices"] == client.chat(max_tokens=5)["choices"]


def test_another_model_is_not_here(client: Client) -> None:
    error = client.chat(status=404, model="gpt-4")["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert client.chat(model="tiny", max_tokens=2)["model"] == "tiny"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe{}", b"[" * 10_000, b"null", b'"x"', b"[1]", b"1" * 5000,
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
        b'{"a":' * 3000,
    ],
    ids=lambda body: body[:30].decode("latin-1"),
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_bad_request(strict: Client, body: bytes) -> None:
    answer = strict.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_only_json_is_read(client: Client) -> None:
    """A page of another site can send forms and plain text, but not JSON, without being asked."""
    body = json.dumps({"messages": MESSAGES})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = client.http.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert "application/json" in answer.json()["error"]["message"]


def test_an_unknown_address_and_an_unknown_method_have_errors_of_the_same_shape(client: Client) -> None:
    for answer, status in ((client.http.get("/v1/nothing"), 404), (client.http.get("/v1/completions"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_help_lists_what_a_server_may_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["serve", "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--host", "--port", "--slots", "--max-queue", "--api-key-file", "--allowed-host", "--model"):
        assert option in shown


def test_a_bad_setting_ends_the_command_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["serve", "--deadline", "-1"])
    assert done.value.code == 2
    assert "deadline must be above 0" in capsys.readouterr().err


def test_the_command_warns_where_strangers_can_ask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], lm: LanguageModel
) -> None:
    loaded: list[dict[str, Any]] = []
    served: list[Any] = []
    monkeypatch.setattr("medusa.cli.serve.load_model", lambda engine, **more: loaded.append(more) or lm)
    monkeypatch.setattr("medusa.serve.run.serve", lambda *given: served.append(given))
    monkeypatch.setattr("medusa.serve.run.log_to_stderr", lambda: None)
    keys = tmp_path / "keys"
    keys.write_text("key-1\n")
    warned = []
    options = ["--port", "0", "--slots", "3", "--context", "99", "--allowed-host", "a", "--allowed-host", "b"]
    for more in ([], ["--host", "0.0.0.0"], ["--host", "0.0.0.0", "--api-key-file", str(keys)]):
        with pytest.raises(SystemExit) as done:
            main(["serve", *options, *more])
        served[-1][3].close()
        assert not done.value.code
        warned.append("Warning" in capsys.readouterr().err)
    assert warned == [False, True, False]
    assert loaded == [{"num_slots": 3, "max_length": 99}] * 3
    assert served[0][1].allowed_hosts == ("a", "b")
    assert [bool(given[2]) for given in served] == [False, False, True]


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "medusa.serve.run", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "medusa.serve.run")
    with pytest.raises(SystemExit) as done:
        main(["serve"])
    assert done.value.code == 1
    assert "medusa-decode[serve]" in capsys.readouterr().err


def test_a_port_that_another_has_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit) as done:
        main(["serve", "--port", str(other.getsockname()[1])])
    assert done.value.code == 1
    assert "cannot listen on 127.0.0.1, port" in capsys.readouterr().err
