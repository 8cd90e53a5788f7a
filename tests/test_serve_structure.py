# ruff: noqa: E402  # the server's packages are an extra: without them these tests are skipped
"""JSON, schemas and tools over the server's interfaces, on tiny models whose chat templates know tools, or none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest

for package in ("fastapi", "prometheus_client", "uvicorn", "llguidance"):
    pytest.importorskip(package)

from pydantic import BaseModel, Field

from chat_templates import CHATML, LLAMA31, MISTRAL3, QWEN25, tokenizer_with
from medusa.api import LanguageModel
from medusa.engines.transformers import TransformersBackend
from serving import Client, listening, model, server
from tiny_lm import END
from tiny_models import make_model

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
WEATHER = {
    "name": "get_weather",
    "description": "How it is outside.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
TIME = {"name": "get_time"}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, TIME)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def speaking(template: str, **options: Any) -> LanguageModel:
    """A tiny model with room for tools in its prompt."""
    tokenizer = tokenizer_with(template)
    network = make_model("llama", vocab_size=len(tokenizer) + 3, max_position_embeddings=2048)
    backend = TransformersBackend(network, num_slots=4)
    return model(backend=backend, tokenizer=tokenizer, eos_token_ids=[END], **options)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with server() as client:
        yield client


@pytest.fixture(scope="module")
def hermes() -> Iterator[Client]:
    with server(speaking(QWEN25)) as client:
        yield client


@pytest.fixture(scope="module")
def llama() -> Iterator[Client]:
    with server(speaking(LLAMA31)) as client:
        yield client


@pytest.fixture(scope="module")
def toolless() -> Iterator[Client]:
    with server(speaking(CHATML)) as client:
        yield client


def valid(text: str, schema: Any) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(text), schema)
    return True


def joined(events: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message and the reason of a choice, as clients put them together."""
    content, calls, reason = "", {}, None
    for event in events:
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            content += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
            for call in choice["delta"].get("tool_calls", ()):
                if call["index"] not in calls:
                    assert call["index"] == len(calls)
                    assert call["id"]
                    assert call["type"] == "function"
                    assert call["function"]["name"]
                    calls[call["index"]] = {"name": call["function"]["name"], "arguments": ""}
                else:
                    assert call.keys() == {"index", "function"}
                    assert call["function"].keys() == {"arguments"}
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return {"content": content, "calls": list(calls.values()), "reason": reason}


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 7}])
def test_an_answer_is_what_the_schema_allows_and_what_the_library_says(client: Client, options: dict[str, Any]) -> None:
    lm = model()
    expected = lm.generate("Hello", constraint=lm.grammars.json_schema(SCHEMA), max_new_tokens=99, **options)
    answer = client.chat(response_format=FORMAT, max_tokens=99, medusa=True, **options)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert valid(expected.text, SCHEMA)
    assert answer["medusa"]["by_drafter"]["grammar"] > 10
    plain = client.chat(response_format=FORMAT, max_tokens=99, drafter="none", medusa=True, **options)
    assert plain["choices"] == answer["choices"]
    assert "grammar" not in plain["medusa"]["by_drafter"]


def test_strict_or_not_a_schema_is_held_to(client: Client) -> None:
    texts = set()
    for strict in (True, False):
        given = {"type": "json_schema", "json_schema": {**FORMAT["json_schema"], "strict": strict, "description": "x"}}
        texts.add(client.chat(response_format=given, max_tokens=99)["choices"][0]["message"]["content"])
    assert len(texts) == 1
    assert valid(texts.pop(), SCHEMA)


def test_a_json_object_begins_as_one(client: Client) -> None:
    content = client.chat(response_format={"type": "json_object"}, max_tokens=30)["choices"][0]["message"]["content"]
    assert content.startswith("{")
    assert (
        client.chat(response_format={"type": "text"}, max_tokens=5)["choices"] == (client.chat(max_tokens=5)["choices"])
    )


def test_answers_with_grammars_of_their_own_share_passes_with_those_that_have_none(client: Client) -> None:
    alone = [client.chat(text, max_tokens=60, **more)["choices"] for text, more in MIXED]
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        text, more = MIXED[i]
        found[i] = client.chat(text, max_tokens=60, **more)["choices"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(MIXED))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(MIXED))] == alone


MIXED: list[tuple[str, dict[str, Any]]] = [
    ("Hello", {"response_format": FORMAT}),
    ("Hello", {}),
    ("You", {"response_format": FORMAT, "temperature": 1.0, "seed": 3, "n": 2}),
    ("Hello", {"temperature": 1.0, "seed": 3}),
]


def test_after_a_failed_pass_a_grammar_begins_anew_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    step, calls = lm.stepper.step, []

    def failing(rows: Any) -> Any:
        calls.append(len(rows))
        if len(rows) > 1 and calls.count(len(rows)) == 2:
            raise MemoryError
        return step(rows)

    with server(lm) as client:
        whole = client.chat(response_format=FORMAT, max_tokens=99, temperature=1.0, seed=7, n=3)["choices"]
        monkeypatch.setattr(lm.stepper, "step", failing)
        again = client.chat(response_format=FORMAT, max_tokens=99, temperature=1.0, seed=7, n=3)["choices"]
    assert 1 in calls, "some went on by themselves"
    assert again == whole


def test_a_response_has_a_format_too(client: Client) -> None:
    given = {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}
    answer = client.post("/v1/responses", {"input": "Hello", "text": {"format": given}})
    assert answer["status"] == "completed"
    assert valid(answer["output"][0]["content"][0]["text"], SCHEMA)
    assert answer["text"]["format"] == {**given, "description": None}
    loose = client.post(
        "/v1/responses", {"input": "Hello", "text": {"format": {"type": "json_object"}}, "max_output_tokens": 9}
    )
    assert loose["output"][0]["content"][0]["text"].startswith("{")
    assert loose["text"]["format"] == {"type": "json_object"}


# --- refusals ---------------------------------------------------------------------------------------------------------


def schema_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def tool_of(**function: Any) -> dict[str, Any]:
    return {"tools": [TOOLS[0], {"type": "function", "function": {"name": "f", **function}}]}


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(8):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
AT = "response_format.json_schema.schema"
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (schema_of({"type": "strin"}), AT, "strin"),
    (schema_of({"type": "array", "uniqueItems": True}), AT, "uniqueItems"),
    (schema_of({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}), AT, "uniqueItems"),
    (schema_of({"$ref": "http://127.0.0.1/x"}), AT, "retriev"),
    (schema_of({"type": "string", "pattern": "("}), AT, "regex"),
    (schema_of({"enum": []}), AT, "empty"),
    (schema_of({"enum": ["x" * 3000]}), AT, "2000 bytes"),
    (schema_of(DEEP), AT, "12 levels"),
    (schema_of([]), AT, "dictionary"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}}, "response_format", "goes with"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "not supported"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", "needs tools"),
    ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", ""),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice", "no tool"),
    ({"tools": TOOLS, "response_format": FORMAT}, "response_format", "do not go together"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools.1.function.name", "two tools"),
    (tool_of(parameters={"type": "string"}), "tools.1.function.parameters", "object"),
    (tool_of(parameters={"type": "object", "not": {}}), "tools.1.function.parameters", "not"),
    (tool_of(parameters={"type": "object", "const": "x" * 2000}), "tools.1.function.parameters", "2000 bytes"),
    (tool_of(name="with space"), "tools.1.function.name", ""),
    ({"tools": TOOLS * 65}, "tools", ""),
    ({"messages": [{"role": "assistant"}]}, "messages.0", "needs content or tool_calls"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]}]},
        "messages.0.tool_calls.0.function.arguments", "JSON object",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def strict() -> Iterator[Client]:
    with server(speaking(QWEN25), max_schema=2000, max_schema_depth=12) as client:
        yield client


@pytest.mark.parametrize(("change", "param", "said"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_what_is_not_understood_is_refused_by_name(
    strict: Client, change: dict[str, Any], param: str, said: str
) -> None:
    error = strict.chat(status=400, **change)["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]
    assert strict.engine.unfinished == 0, "nothing was decoded"


def test_a_template_whose_calls_are_of_another_form_refuses_tools() -> None:
    with server(speaking(MISTRAL3)) as client:
        error = client.chat(tools=TOOLS, status=400)["error"]
        assert error["param"] == "tools"
        assert "form" in error["message"]
        assert client.chat(tools=TOOLS, tool_choice="none", max_tokens=3)["choices"]


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize("name", ["hermes", "llama", "toolless"])
def test_a_named_tool_is_called_with_arguments_that_its_schema_allows(
    request: pytest.FixtureRequest, name: str, options: dict[str, Any]
) -> None:
    client: Client = request.getfixturevalue(name)
    body = {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 200, **options}
    answer = client.chat(medusa=True, **body)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call-")
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert valid(call["function"]["arguments"], WEATHER["parameters"])
    assert answer["medusa"]["by_drafter"]["grammar"] > 20
    events = client.stream("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], **body)
    assert joined(events) == {"content": "", "calls": [call["function"]], "reason": "tool_calls"}
    firsts = [event for event in events if event["choices"][0]["delta"].get("tool_calls")]
    assert firsts[0]["choices"][0]["delta"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}
    plain = client.chat(drafter="none", **body)
    assert [c["function"] for c in plain["choices"][0]["message"]["tool_calls"]] == [call["function"]]


def test_required_calls_some_tool_or_several_one_after_the_other(hermes: Client, llama: Client) -> None:
    counts = set()
    for seed in range(8):
        body = {"tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "seed": seed, "max_tokens": 300}
        answer = hermes.chat(logit_bias={str(END): -4}, **body)["choices"][0]
        calls = [call["function"] for call in answer["message"]["tool_calls"]]
        complete = calls if answer["finish_reason"] == "tool_calls" else calls[:-1]
        assert all(valid(c["arguments"], WEATHER["parameters"]) for c in complete if c["name"] == "get_weather")
        assert all(json.loads(call["arguments"]) == {} for call in complete if call["name"] == "get_time")
        counts.add(len(calls))
        events = hermes.stream(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "Hello"}],
            logit_bias={str(END): -4},
            **body,
        )
        assert joined(events)["calls"] == calls
        for one in (hermes.chat(parallel_tool_calls=False, **body), llama.chat(**body)):
            assert len(one["choices"][0]["message"]["tool_calls"]) == 1
            assert one["choices"][0]["finish_reason"] == "tool_calls"
    assert max(counts) > 1, "several calls occur"


def test_with_auto_the_model_may_say_what_it_likes(hermes: Client, llama: Client) -> None:
    for client in (hermes, llama):
        answer = client.chat(tools=TOOLS, max_tokens=20)["choices"][0]
        assert answer["message"]["content"]
        assert "tool_calls" not in answer["message"]
        assert answer["finish_reason"] == "length"
        body = {"messages": [{"role": "user", "content": "Hello"}], "tools": TOOLS, "max_tokens": 20}
        events = client.stream("/v1/chat/completions", **body)
        assert joined(events) == {"content": answer["message"]["content"], "calls": [], "reason": "length"}


def test_with_auto_a_call_that_was_begun_is_ended_as_one(hermes: Client) -> None:
    opening = tokenizer_with(None).convert_tokens_to_ids("<tool_call>")
    body = {"tools": TOOLS, "max_tokens": 120, "temperature": 1.0, "seed": 1, "logit_bias": {str(opening): 12}}
    answer = hermes.chat(**body)["choices"][0]
    assert answer["finish_reason"] in ("tool_calls", "length")
    assert answer["message"]["tool_calls"]
    events = hermes.stream("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], **body)
    found = joined(events)
    assert found["calls"] == [call["function"] for call in answer["message"]["tool_calls"]]
    assert found["content"] == (answer["message"]["content"] or "")


def test_a_call_that_is_cut_short_is_told_as_far_as_it_came(hermes: Client) -> None:
    body = {"tools": TOOLS, "tool_choice": NAMED}
    whole = hermes.chat(max_tokens=200, **body)
    tokens = whole["usage"]["completion_tokens"]
    arguments = whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    cut = hermes.chat(max_tokens=tokens - 8, **body)["choices"][0]
    assert cut["finish_reason"] == "length"
    told = cut["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments.startswith(told)
    nothing = hermes.chat(max_tokens=3, **body)["choices"][0]
    assert "tool_calls" not in nothing["message"]


def test_a_stop_string_within_a_call_ends_the_answer_without_one(hermes: Client) -> None:
    body = {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 200, "stop": '"days'}
    cut = hermes.chat(**body)["choices"][0]
    assert cut["finish_reason"] == "stop", "not tool_calls: there is none to make"
    events = hermes.stream("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], **body)
    assert joined(events)["reason"] == "stop"


def test_none_says_what_is_said_without_tools(hermes: Client) -> None:
    without = hermes.chat(max_tokens=9)["choices"]
    assert hermes.chat(tools=TOOLS, tool_choice="none", max_tokens=9)["choices"] == without
    assert hermes.chat(tools=TOOLS, tool_choice="none", response_format=FORMAT, max_tokens=200)["choices"]


TURNS = [
    {"role": "user", "content": "How is it in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sunny"}]},
]


@pytest.mark.parametrize("name", ["hermes", "llama", "toolless"])
def test_what_tools_said_is_in_the_prompt(request: pytest.FixtureRequest, name: str) -> None:
    client: Client = request.getfixturevalue(name)
    tokens = client.post("/tokenize", {"messages": TURNS})["tokens"]
    text = client.post("/detokenize", {"tokens": tokens})["prompt"]
    written = {
        "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        "llama": '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eom_id|>',
        "toolless": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    }
    assert written[name] in text
    assert ("<tool_response>\nsunny\n</tool_response>" if name != "llama" else '"sunny"') in text
    answer = client.chat(messages=TURNS, tools=TOOLS, max_tokens=5)
    more = answer["usage"]["prompt_tokens"]
    assert more > len(tokens) + len("get_weather get_time"), "and what there is to call"


def test_logprobs_and_spans_are_told_once_for_each_token_of_a_call(hermes: Client) -> None:
    body = {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 200, "logprobs": True, "medusa": "spans"}
    answer = hermes.chat(**body)
    content = answer["choices"][0]["logprobs"]["content"]
    events = hermes.stream("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], **body)
    streamed = [e for event in events for c in event["choices"] for e in (c["logprobs"] or {}).get("content", [])]
    assert streamed == content
    steps = [event["medusa"] for event in events[:-1] if "medusa" in event]
    assert sum(step["tokens"] for step in steps) == answer["usage"]["completion_tokens"]


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=4)


class Person(BaseModel):
    name: str = Field(max_length=5)
    pets: list[Pet] = Field(max_length=2)
    boss: Pet | None


def test_the_official_client_gets_schemas_tools_and_streams_of_them() -> None:
    openai = pytest.importorskip("openai")
    with listening(speaking(QWEN25)) as (url, _), openai.OpenAI(base_url=url, api_key="none") as official:
        chat = official.chat.completions
        user: Any = [{"role": "user", "content": "Hello"}]
        answer = chat.create(model="tiny", messages=user, response_format=FORMAT, max_tokens=200)
        assert valid(answer.choices[0].message.content, SCHEMA)
        parsed = chat.parse(model="tiny", messages=user, response_format=Person, max_tokens=200)
        assert parsed.choices[0].message.parsed == Person.model_validate_json(parsed.choices[0].message.content)
        made = chat.create(model="tiny", messages=user, tools=TOOLS, tool_choice=NAMED, max_tokens=200)
        (call,) = made.choices[0].message.tool_calls
        assert valid(call.function.arguments, WEATHER["parameters"])
        with chat.stream(model="tiny", messages=user, tools=TOOLS, tool_choice=NAMED, max_tokens=200) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
        assert final.choices[0].finish_reason == "tool_calls"
        turns = [*user, made.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        assert chat.create(model="tiny", messages=turns, tools=TOOLS, max_tokens=5).choices


# --- responses --------------------------------------------------------------------------------------------------------

FLAT = [{"type": "function", **function} for function in (WEATHER, TIME)]
FLAT_NAMED = {"type": "function", "name": "get_weather"}


def test_a_response_calls_functions_whole_or_as_events(hermes: Client) -> None:
    body = {"input": "Hello", "tools": FLAT, "tool_choice": FLAT_NAMED, "max_output_tokens": 200}
    answer = hermes.post("/v1/responses", body)
    assert answer["status"] == "completed"
    (item,) = answer["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "get_weather", "completed")
    assert valid(item["arguments"], WEATHER["parameters"])
    assert answer["tool_choice"] == FLAT_NAMED
    assert answer["tools"][0]["name"] == "get_weather"
    events = hermes.stream("/v1/responses", **body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in events if "delta" in event) == item["arguments"]
    last = events[-1]["response"]["output"][0]
    assert {**last, "id": item["id"], "call_id": item["call_id"]} == item
    assert {event["item_id"] for event in events if "item_id" in event} == {last["id"]}


def test_a_response_may_say_something_and_then_call(hermes: Client) -> None:
    opening = tokenizer_with(None).convert_tokens_to_ids("<tool_call>")
    body = {"input": "Hello", "tools": FLAT, "max_output_tokens": 200, "temperature": 1.0, "medusa": "spans"}
    kinds = set()
    for seed in range(8):
        asked = {**body, "seed": seed, "logit_bias": {str(opening): 4, str(END): -2}}
        answer = hermes.post("/v1/responses", asked)
        events = hermes.stream("/v1/responses", **asked)
        alike = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in answer["output"]]
        last = events[-1]["response"]
        assert [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in last["output"]] == alike
        assert last["status"] == answer["status"]
        steps = [event["medusa"]["tokens"] for event in events[:-1] if "medusa" in event]
        assert sum(steps) == answer["usage"]["output_tokens"]
        added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert added == [item["id"] for item in done]
        assert done == last["output"]
        kinds.add(tuple(item["type"] for item in answer["output"])[:2])
    assert ("message", "function_call") in kinds


def test_a_response_without_room_for_a_call_is_incomplete(hermes: Client) -> None:
    body = {"input": "Hello", "tools": FLAT, "tool_choice": FLAT_NAMED}
    for most, kind in ((3, "message"), (50, "function_call")):
        answer = hermes.post("/v1/responses", {**body, "max_output_tokens": most})
        assert answer["status"] == "incomplete"
        assert [(item["type"], item["status"]) for item in answer["output"]] == [(kind, "incomplete")]


def test_what_functions_put_out_is_read_as_in_a_chat(hermes: Client) -> None:
    items = [
        {"role": "user", "content": "How is it in Rome?"},
        {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "a", "output": "sunny"},
    ]
    answer = hermes.post("/v1/responses", {"input": items, "tools": FLAT, "max_output_tokens": 9})
    chat = hermes.chat(messages=TURNS, tools=TOOLS, max_tokens=9)
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "json_object", "name": "x"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": FLAT, "text": {"format": {"type": "json_object"}}}, "text"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "not": {}}}]},
         "tools.0.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"type": "reasoning"}]}, "input.0.type"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "x"}]}, "input.0.arguments"),
    ],
    ids=str,
)  # fmt: skip
def test_a_response_refuses_by_name_what_is_not_understood(hermes: Client, change: dict[str, Any], param: str) -> None:
    error = hermes.post("/v1/responses", {"input": "a", **change}, 400)["error"]
    assert error["param"] == param, error
    assert param.split(".")[-1] in error["message"] or "text" in error["message"]


def test_the_official_client_reads_calls_of_responses() -> None:
    openai = pytest.importorskip("openai")
    with listening(speaking(QWEN25)) as (url, _), openai.OpenAI(base_url=url, api_key="none") as official:
        options: Any = {"model": "tiny", "tools": FLAT, "tool_choice": FLAT_NAMED, "max_output_tokens": 200}
        first = official.responses.create(input="Hello", **options)
        (call,) = first.output
        assert valid(call.arguments, WEATHER["parameters"])
        with official.responses.stream(input="Hello", **options) as stream:
            final = stream.get_final_response()
        assert final.output[0].arguments == call.arguments
        given: Any = [
            {"role": "user", "content": "Hello"},
            call.model_dump(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ]
        assert official.responses.create(input=given, model="tiny", max_output_tokens=5).output_text
