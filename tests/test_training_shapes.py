"""The shapes of rows and kinds of files: whatever the form, the same tokens are read and the same are learned."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import CHATML, DEEPSEEK, GEMMA, LLAMA3, LLAMA31, MARKED, MISTRAL3, QWEN25, tokenizer_with
from medusa.errors import MedusaError
from medusa.training.conversations import conversation_of, prompt_of
from medusa.training.data import (
    Conversation,
    Example,
    MalformedRow,
    Reader,
    encode,
    read_conversations,
    read_prompts,
)
from tiny_models import CHAT_TEMPLATE

Row = Any
TOKENIZERS = {
    template: tokenizer_with(template)
    for template in (CHATML, CHAT_TEMPLATE, QWEN25, LLAMA3, LLAMA31, MISTRAL3, GEMMA, DEEPSEEK)
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def write(path: Path, *rows: Row) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def read_one(tmp_path: Path, row: Row) -> Conversation:
    (read,) = read_conversations([write(tmp_path / "rows.jsonl", row)], pytest.fail)
    assert isinstance(read, Conversation)
    return read


def refusal(tmp_path: Path, row: Row, template: str = QWEN25) -> str:
    """Why the only row of a file cannot be used."""
    reader = Reader(TOKENIZERS[template], "tiny", 1000, lambda line: None)
    with pytest.raises(MedusaError) as caught:
        list(reader.examples([write(tmp_path / "rows.jsonl", row)]))
    _, found, reason = str(caught.value).partition("rows.jsonl, line 1: ")
    assert found
    return reason


def learned(tmp_path: Path, row: Row, template: str) -> tuple[str, list[str]]:
    """All the text of a row, and what of it is learned."""
    tokenizer = TOKENIZERS[template]
    example = encode(read_one(tmp_path, row), tokenizer, "tiny")
    return tokenizer.decode(example.token_ids), [tokenizer.decode(example.token_ids[a:b]) for a, b in example.spans]


def says(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def call(city: object = "Rome", *, identity: str | None = "abcdefghi", as_text: bool = False) -> dict[str, Any]:
    arguments: Any = {"city": city}
    function = {"name": "weather", "arguments": json.dumps(arguments) if as_text else arguments}
    return {**({"id": identity} if identity else {}), "type": "function", "function": function}


ASKED = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [call(as_text=True)]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"rain": 0}'},
    {"role": "assistant", "content": "No rain."},
]


# --- shapes -----------------------------------------------------------------------------------------------------------

HI = says(("user", "Hi"), ("assistant", "Hello!"))
MORE = says(("user", "And?"), ("assistant", "Bye."))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversation": HI, "model": "vicuna", "turn": 1}, HI),
        ({"conversation": [{**message, "language": "English"} for message in HI]}, HI),
        ({"data": ["Hi", "Hello!", "And?", "Bye."], "id": "0"}, [*HI, *MORE]),
        ({"data": ["Hi", "Hello!"], "system": "S"}, [*says(("system", "S")), *HI]),
        (HI, HI),
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], HI),
        ({"prompt": HI[:1], "completion": HI[1:]}, HI),
        ({"prompt": HI[:1], "completion": "Hello!"}, HI),
        ({"prompt": "Hi", "completion": HI[1:]}, HI),
        ({"messages": says(("User", "Hi"), ("Assistant", "Hello!"))}, HI),
        ({"conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello!"}]}, HI),
        ({"messages": [{"role": "user", "from": "human", "content": "Hi"}, HI[1]]}, HI),
        ({"conversations": HI, "system": "S"}, [*says(("system", "S")), *HI]),
        ({"messages": [*says(("system", "S")), *HI], "system": "S"}, [*says(("system", "S")), *HI]),
        ({"messages": json.dumps(HI)}, HI),
        ({"prompt": json.dumps(HI[:1]), "completion": json.dumps(HI[1:])}, HI),
        ({"prompt": "Hi", "completion": json.dumps(HI)}, says(("user", "Hi"), ("assistant", json.dumps(HI)))),
        ({"prompt": "Hi", "messages": HI, "chosen": HI, "rejected": HI}, HI),
        ({"messages": [HI[0], {**HI[1], "weight": 1, "reasoning_content": ""}]}, HI),
    ],
)
def test_a_row_of_today_is_read_as_its_messages(tmp_path: Path, row: Row, messages: list[dict[str, str]]) -> None:
    assert read_one(tmp_path, row) == Conversation(tuple(messages), f"{tmp_path}/rows.jsonl, line 1")


def test_earlier_turns_of_an_alpaca_row_are_read_and_not_learned_from(tmp_path: Path) -> None:
    row = {"instruction": "And?", "output": "Bye.", "history": [["Hi", "Hello!"]], "system": "S"}
    text, spans = learned(tmp_path, {"messages": [*says(("system", "S")), *HI, *MORE]}, CHATML)
    assert learned(tmp_path, row, CHATML) == (text, spans[1:])


@pytest.mark.parametrize("first_answer", ["Hello!", "Hello!\n"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL3, GEMMA])
def test_of_prompt_and_completion_only_the_completion_is_learned(
    tmp_path: Path, template: str, first_answer: str
) -> None:
    messages = [*says(("system", "S")), HI[0], *says(("assistant", first_answer)), *MORE]
    messages = messages if template != MISTRAL3 else messages[1:]
    text, spans = learned(tmp_path, {"messages": messages}, template)
    assert len(spans) == 2
    assert learned(tmp_path, {"prompt": messages[:-1], "completion": messages[-1:]}, template) == (text, spans[1:])
    assert learned(tmp_path, {"prompt": messages[:1], "completion": messages[1:]}, template) == (text, spans)


def test_of_prompt_and_completion_only_the_completion_is_learned_where_the_template_has_blocks(tmp_path: Path) -> None:
    for template in MARKED.values():
        TOKENIZERS.setdefault(template, tokenizer_with(template))
        row = {"prompt": [*HI, MORE[0]], "completion": MORE[1:]}
        assert learned(tmp_path, row, template)[1] == ["Bye.<|im_end|>"]
        assert len(learned(tmp_path, {"messages": [*HI, *MORE]}, template)[1]) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": HI[:1], "chosen": HI[1:], "rejected": HI[1:]}, '"chosen" is one answer of a preference row'),
        ({"rejected": HI}, '"rejected" is one answer of a preference row'),
        ({"prompt": HI[:1], "completion": HI[:1]}, 'no assistant speaks in "completion"'),
        ({"data": "Hi"}, '"data": what is said in turn must be a list of texts, not text'),
        ({"data": []}, '"data" is empty'),
        ({"data": ["Hi", 7]}, '"data" must be text, not a number'),
        ({"messages": [*says(("system", "S")), *HI], "system": "T"}, '"system" and the system message differ'),
        ({"messages": [{"role": "user", "from": "gpt", "content": "Hi"}]}, '"role" and "from" differ'),
        ({"messages": [{"role": "user", "content": "Hi", "value": "Ho"}]}, '"content" and "value" differ'),
        ({"messages": '{"role": "user"}'}, '"messages": the conversation must be a list of messages, not an object'),
        ({"messages": [*HI, {"role": "tool", "content": {"rain": 0}}]}, '"content" must be text, not an object'),
        ({"messages": [*HI, {"role": "tool", "content": None}]}, "a message needs a role and a content"),
        ({"messages": [{"role": "user", "content": "Hi", "tool_calls": [call()]}]}, "of the role 'user'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": 7}]},
            '"tool_calls": tool calls must be a list, not a number',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": []}]},
            'has "role", "tool_calls" and none of "content", "value"',
        ),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, 'a tool call of "tool_calls" must be an object'),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}]},
            "a tool call has the \"type\" 'custom'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            'needs a "function" with "name" and "arguments", but has "name"',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}]},
            '"arguments" of a tool',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": " ", "arguments": {}}]}]},
            '"name" of a tool call is',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]}]},
            '"arguments" holds half a character',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call()], "function_call": {}}]},
            'both "tool_calls" and "function_call"',
        ),
        (
            {"conversations": [{"from": "function_call", "value": "weather()"}]},
            'a tool call of "value" must be an object',
        ),
        ({"messages": HI, "tools": "weather"}, '"tools": tools must be a list, not text'),
        ({"messages": HI, "tools": [7]}, 'a tool of "tools" must be an object'),
        (
            {"messages": HI, "tools": [{"type": "function", "function": {}}]},
            'a tool of "tools" needs a "function" with a "name"',
        ),
        ({"messages": HI, "tools": [{"type": "retrieval", "function": {}}]}, "has the \"type\" 'retrieval'"),
        ({"messages": [HI[0], {**HI[1], "reasoning_content": "hm"}]}, 'a message has "reasoning_content"'),
        ({"messages": [HI[0], {**HI[1], "weight": 0}]}, 'a message has the "weight" 0'),
        ({"prompt": "Hi", "completion": "Ho", "label": False}, '"label" is false'),
        ({"prompt": "Hi", "completion": "Ho", "label": "False"}, '"label" is false'),
        ({"prompt": "Hi", "completion": "Ho", "label": 0}, '"label" is false'),
        ({"instruction": "Hi", "output": "Ho", "history": [["a"]]}, '"history" must be a list of [question, answer]'),
        ({"instruction": "Hi", "output": "Ho", "history": "a"}, '"history": earlier turns must be a list, not text'),
        ({"instruction": "Hi", "output": "Ho", "history": [["a", 7]]}, '"history" must be text, not a number'),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, row: Row, reason: str) -> None:
    assert reason in refusal(tmp_path, row)


def test_a_field_that_comes_twice_makes_a_row_malformed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "role": "assistant", "content": "Hi"}]}\n', "utf-8")
    with pytest.raises(MedusaError, match=r'line 1: not valid JSON \("role" comes twice\)'):
        list(read_conversations([str(path)], lambda line: None))


# --- tools ------------------------------------------------------------------------------------------------------------

SHAREGPT = [
    {"from": "human", "value": "Rain?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    {"from": "observation", "value": '{"rain": 0}'},
    {"from": "gpt", "value": "No rain."},
]
OLDER = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    {"role": "function", "name": "weather", "content": '{"rain": 0}'},
    {"role": "assistant", "content": "No rain."},
]


def test_tool_calls_and_what_tools_answer_are_kept(tmp_path: Path) -> None:
    read = read_one(tmp_path, {"messages": ASKED, "tools": [WEATHER]})
    assert read.messages == (
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call()]},
        {"role": "tool", "content": '{"rain": 0}', "name": "weather", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "No rain."},
    )
    assert read.tools == (WEATHER,)


@pytest.mark.parametrize("tools", [[WEATHER], [WEATHER["function"]], json.dumps([WEATHER])])
@pytest.mark.parametrize("messages", [ASKED, SHAREGPT, OLDER], ids=["openai", "sharegpt", "older openai"])
def test_tools_read_the_same_in_every_form(tmp_path: Path, messages: Row, tools: Row) -> None:
    text, spans = learned(tmp_path, {"conversations": messages, "tools": tools}, QWEN25)
    assert text == (
        f"<|im_start|>system\nBe kind.\n\n<tools>\n{json.dumps(WEATHER)}\n</tools><|im_end|>\n"
        "<|im_start|>user\nRain?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"rain": 0}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\nNo rain.<|im_end|>\n"
    )
    assert spans == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        "No rain.<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA31, ['{"name": "weather", "parameters": {"city": "Rome"}}<|eom_id|>', "No rain.<|eot_id|>"]),
        (
            MISTRAL3,
            [
                '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}, "id": "abcdefghi"]<|end|>',
                " No rain.<|end|>",
            ],
        ),
        (DEEPSEEK, ['<call>weather\n{"city": "Rome"}<|end|>', "No rain.<|end|>"]),
    ],
    ids=["llama3.1", "mistral", "deepseek"],
)
def test_a_tool_call_is_learned_with_its_end(tmp_path: Path, template: str, expected: list[str]) -> None:
    assert learned(tmp_path, {"messages": ASKED}, template)[1] == expected


def test_several_calls_and_answers_of_one_turn_are_learned_as_one(tmp_path: Path) -> None:
    messages = [
        ASKED[0],
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call("Rome"), call("Oslo")]},
        {"role": "tool", "content": "dry"},
        {"role": "tool", "content": "wet"},
        {"role": "assistant", "content": "Rome is dry."},
    ]
    text, (calls, answer) = learned(tmp_path, {"messages": messages}, QWEN25)
    assert calls.startswith("Let me see.\n<tool_call>\n")
    assert '"Rome"' in calls
    assert calls.endswith('"Oslo"}}\n</tool_call><|im_end|>')
    assert answer == "Rome is dry.<|im_end|>"
    assert "<tool_response>\ndry\n</tool_response>\n<tool_response>\nwet" in text


@pytest.mark.parametrize(
    ("row", "template", "reason"),
    [
        ({"messages": ASKED}, CHATML, "the chat template of tiny does not show a tool call"),
        ({"messages": ASKED}, LLAMA3, "does not show a tool call"),
        ({"messages": ASKED}, GEMMA, "does not show a tool call"),
        ({"messages": ASKED}, CHAT_TEMPLATE, "refuses it: only user and assistant may speak, not tool"),
        ({"messages": HI, "tools": [WEATHER]}, CHATML, "does not show the tools"),
        ({"messages": [ASKED[0], {**ASKED[1], "content": "Hm."}]}, LLAMA31, "not show what is said beside a tool call"),
        ({"messages": [ASKED[0], {**ASKED[1], "tool_calls": [call(), call()]}]}, LLAMA31, "refuses it: only single"),
        ({"conversations": SHAREGPT}, MISTRAL3, "refuses it: tool call ids are of 9 letters"),
        ({"messages": [*HI[:1], {"role": "tool", "content": "o"}, *HI[1:]]}, "no tools", "show what a tool answers"),
        ({"messages": ASKED}, "as Python", "does not show a tool call"),
    ],
)
def test_a_template_that_knows_no_tools_makes_the_row_malformed(
    tmp_path: Path, row: Row, template: str, reason: str
) -> None:
    # Each of these shows whatever an "o" may stand in, so that looking for the words themselves would not do.
    TOKENIZERS["no tools"] = tokenizer_with(CHATML.replace("messages %}", "messages if m['role'] != 'tool' %}"))
    as_python = "m.tool_calls[0]['function'] if m.tool_calls else m['content']"
    TOKENIZERS["as Python"] = tokenizer_with(CHATML.replace("m['content'] +", f"(({as_python}) | string) +"))
    assert reason in refusal(tmp_path, row, template)


def test_a_developer_is_the_system_where_the_template_knows_no_developers(tmp_path: Path) -> None:
    row = {"messages": [*says(("developer", "S")), *HI]}
    as_system = {"messages": [*says(("system", "S")), *HI]}
    for template in (CHATML, LLAMA3, GEMMA, QWEN25):
        assert learned(tmp_path, row, template) == learned(tmp_path, as_system, template)
    knowing = CHATML + "{# developer #}"
    TOKENIZERS[knowing] = tokenizer_with(knowing)
    assert "<|im_start|>developer\nS<|im_end|>" in learned(tmp_path, row, knowing)[0]


def test_tools_have_a_template_of_their_own_where_there_are_two(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN25}
    TOKENIZERS["two"] = tokenizer
    assert len(learned(tmp_path, {"messages": ASKED, "tools": [WEATHER]}, "two")[1]) == 2
    assert "does not show a tool call" in refusal(tmp_path, {"messages": ASKED}, "two")


def test_arrow_does_not_give_a_call_the_arguments_of_another(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    given = [{"a": 1, "b": 2}, {"city": "Rome"}]
    calls = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]} for arguments in given]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": [ASKED[0], one]} for one in calls]), path)
    read = list(read_conversations([str(path)], pytest.fail))
    functions = [one.messages[1]["tool_calls"][0]["function"] for one in read if isinstance(one, Conversation)]
    assert [function["arguments"] for function in functions] == given


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversation": [*HI, *MORE]}, [HI[0], MORE[0]]),
        ({"data": ["Hi", "Hello!", "And?"]}, [HI[0], MORE[0]]),
        ([*HI, *MORE], [HI[0], MORE[0]]),
        ({"prompt": [*HI, MORE[0]], "completion": MORE[1:]}, [HI[0], MORE[0]]),
        ({"prompt": HI[:1], "chosen": HI[1:], "rejected": HI[1:]}, HI[:1]),
        ({"messages": [*says(("developer", "S")), *HI]}, [*says(("system", "S")), HI[0]]),
        ({"messages": HI, "tools": []}, HI[:1]),
    ],
)
def test_prompts_are_read_in_the_shapes_of_today(tmp_path: Path, row: Row, messages: list[dict[str, str]]) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    assert list(read_prompts(path, pytest.fail)) == [Conversation(tuple(messages), f"{path}, line 1")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": ASKED}, "it uses tools, and a model that answers prompts has none"),
        ({"conversations": SHAREGPT}, "it uses tools"),
        ({"messages": HI, "tools": [WEATHER]}, "it uses tools"),
        ({"chosen": HI, "rejected": HI}, 'of a preference row: call what the user says "prompt"'),
        ({"data": [7]}, '"data" must be text, not a number'),
    ],
)
def test_a_row_that_is_no_prompt_says_why(tmp_path: Path, row: Row, reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(MedusaError, match=reason):
        list(read_prompts(path, lambda line: None))


# --- kinds of files ---------------------------------------------------------------------------------------------------


def where(path: Path) -> list[str]:
    return [one.where.rpartition("/")[2] for one in read_conversations([str(path)], pytest.fail)]


def test_a_packed_file_reads_as_the_file_in_it(tmp_path: Path) -> None:
    lines = f"{json.dumps({'messages': HI})}\n\n{json.dumps(HI)}\n".encode()
    for name in ("rows.jsonl.gz", "rows.ndjson.gz", "rows.JSON.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(lines))
        assert where(tmp_path / name) == [f"{name}, line 1", f"{name}, line 3"]
    (tmp_path / "rows.ndjson").write_bytes(lines)
    assert where(tmp_path / "rows.ndjson") == ["rows.ndjson, line 1", "rows.ndjson, line 3"]
    (tmp_path / "rows.txt.gz").write_bytes(gzip.compress(b"Once\n\nThe end"))
    assert where(tmp_path / "rows.txt.gz") == ["rows.txt.gz, line 1", "rows.txt.gz, line 3"]


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-12], lambda data: b"plain text", lambda data: data[:20] + b"\xff" * 20 + data[40:]]
)
def test_a_damaged_packed_file_cannot_be_read(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(spoil(gzip.compress(f"{json.dumps({'messages': HI})}\n".encode() * 3)))
    with pytest.raises(MedusaError, match=r"cannot read .*rows.jsonl.gz: "):
        list(read_conversations([str(path)], pytest.fail))


def test_a_json_file_may_hold_one_list_of_messages_or_many(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(HI), "utf-8")
    assert where(path) == ["rows.json, row 1"]
    path.write_text(json.dumps([HI, HI]), "utf-8")
    assert where(path) == ["rows.json, row 1", "rows.json, row 2"]
    path.write_text(json.dumps([{"role": "a wizard", "question": "Hi", "answer": "Hello!"}] * 2), "utf-8")
    assert where(path) == ["rows.json, row 1", "rows.json, row 2"]


def test_a_csv_file_has_a_header_and_places_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeff,instruction,output,input\r\n0,Hi,"Hel\nlo ""you"", é",\r\n\r\n1,Add,3,1 2\r\n'.encode())
    assert list(read_conversations([str(path)], pytest.fail)) == [
        Conversation(tuple(says(("user", "Hi"), ("assistant", 'Hel\nlo "you", é'))), f"{path}, line 2"),
        Conversation(tuple(says(("user", "Add\n\n1 2"), ("assistant", "3"))), f"{path}, line 5"),
    ]
    path.write_text("text\nOnce\n", "utf-8")
    assert where(path) == ["rows.csv, line 2"]
    path.write_text("text\n" + "a" * 200_000 + "\n", "utf-8")  # more than Python's own limit
    assert where(path) == ["rows.csv, line 2"]


def test_a_row_of_a_csv_file_may_be_malformed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    said: list[str] = []
    path.write_bytes(b"prompt,response\n" + b"Hi,Hello!\n" * 30 + b"Hi\ncaf\xe9,Yes\nHi,\n")
    assert len(list(read_conversations([str(path)], said.append))) == 30
    assert said == [
        f"{path}, line 32: has 1 cells, but the header names 2; skipped",
        f"{path}, line 33: not UTF-8 text; skipped",
        f'{path}, line 34: there is a prompt but no answer ("output", "response", "completion", "answer"); skipped',
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("prompt,response\n", "is empty"),
        ("prompt,prompt\nHi,Ho\n", 'has "prompt" twice'),
        ('prompt,response\nHi,"Hello\n', r"is not valid CSV: unexpected end of data \(line 2\)"),
        ('prompt,response\n"Hi"you,Hello\n', r"is not valid CSV: .* \(line 2\)"),
    ],
)
def test_a_csv_file_that_cannot_be_read_says_why(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(MedusaError, match=reason):
        list(read_conversations([str(path)], pytest.fail))


# --- any conversation, in any shape, in any kind of file --------------------------------------------------------------

contents = st.text(min_size=1, max_size=8).filter(lambda text: "<" not in text)
values = st.fixed_dictionaries({"city": contents}) | st.fixed_dictionaries({"days": st.integers(-9, 9)})


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns of user and assistant, who may ask tools first; in the form that OpenAI gives them."""
    messages = says(("system", draw(contents))) if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += says(("user", draw(contents)))
        if draw(st.booleans()):
            function = {"name": draw(st.sampled_from(["weather", "add"])), "arguments": json.dumps(draw(values))}
            messages.append(
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
            )
            messages += says(("tool", draw(contents)))
        messages += says(("assistant", draw(contents)))
    return messages


def shapes(messages: list[dict[str, Any]]) -> Iterator[Row]:
    """The same conversation in every shape that can hold it."""
    capital = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
    yield {"messages": messages}
    yield {"messages": json.dumps(messages)}
    yield {"conversation": [{**message, "role": capital[message["role"]]} for message in messages]}
    yield {"conversations": [*map(sharegpt, messages)]}
    yield {"items": [*map(sharegpt, messages)]}
    yield messages
    system = {"system": messages[0]["content"]} if messages[0]["role"] == "system" else {}
    rest = messages[len(system) :]
    yield {**system, "messages": rest}
    yield {"messages": [{**m, "content": m["content"] and [{"type": "text", "text": m["content"]}]} for m in messages]}
    if [message["role"] for message in rest] == ["user", "assistant"] * (len(rest) // 2):
        yield {**system, "data": [message["content"] for message in rest]}
        if len(rest) == 2:
            yield {**system, "prompt": rest[0]["content"], "response": rest[1]["content"]}
            yield {**system, "instruction": rest[0]["content"], "input": None, "output": rest[1]["content"]}
            yield {"prompt": messages[:-1], "completion": messages[-1:]}
    else:
        start = next(i for i, message in enumerate(messages) if message["role"] == "user") + 1
        yield {"prompt": messages[:start], "completion": messages[start:]}


def sharegpt(message: dict[str, Any]) -> dict[str, str]:
    if "tool_calls" in message:
        function = message["tool_calls"][0]["function"]
        value = {"name": function["name"], "arguments": json.loads(function["arguments"])}
        return {"from": "function_call", "value": json.dumps(value)}
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    return {"from": names[message["role"]], "value": message["content"]}


def write_kinds(folder: Path, row: Row) -> Iterator[Path]:
    """A file with this one row for every kind of file that can hold it."""
    line, array = json.dumps(row).encode(), json.dumps([row], indent=1).encode()
    files = {"rows.jsonl": line, "rows.ndjson": line, "rows.json": array, "line.json": line}
    if isinstance(row, dict):
        table = io.StringIO()
        cells = {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items() if cell}
        sheet = csv.DictWriter(table, list(cells))
        sheet.writeheader()
        sheet.writerow(cells)
        files["rows.csv"] = table.getvalue().encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        yield from (folder / name, folder / f"{name}.gz")
    if isinstance(row, dict):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "rows.parquet")
        yield folder / "rows.parquet"


def tokens(found: Iterator[Example]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    (example,) = found
    return example.token_ids, example.spans


@settings(max_examples=8)
@given(messages=conversations())
def test_every_shape_in_every_kind_of_file_teaches_the_same(messages: list[dict[str, Any]]) -> None:
    pytest.importorskip("pyarrow.parquet")
    reader = Reader(TOKENIZERS[QWEN25], "tiny", 1000, pytest.fail)
    with tempfile.TemporaryDirectory() as name:
        expected = tokens(reader.examples([write(Path(name) / "plain.jsonl", {"messages": messages})]))
        assert len(expected[1]) == sum(message["role"] == "assistant" for message in messages)
        for row in shapes(messages):
            for path in write_kinds(Path(name), row):
                assert tokens(reader.examples([str(path)])) == expected, (path.name, row)


# --- rows with a fault ------------------------------------------------------------------------------------------------

# Each speaker has a letter of its own, which no part of the templates holds in a row of three.
FAULTLESS: list[Row] = [
    {
        "messages": [
            *says(("system", "SSS"), ("user", "UUU"), ("assistant", "AAA"), ("user", "UUU")),
            {"role": "assistant", "content": None, "tool_calls": [call("AAA")]},
            {"role": "tool", "name": "TTT", "tool_call_id": "abcdefghi", "content": "TTT"},
            *says(("assistant", "AAA")),
        ],
        "tools": [WEATHER],
    },
    {
        "conversations": [
            {"from": "human", "value": "UUU"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "AAA"}}'},
            {"from": "observation", "value": "TTT"},
            {"from": "gpt", "value": "AAA"},
        ]
    },
    {"prompt": says(("user", "UUU"), ("assistant", "PPP"), ("user", "UUU")), "completion": says(("assistant", "AAA"))},
    {"prompt": "UUU", "response": "AAA", "system": "SSS"},
    {"data": ["UUU", "AAA", "UUU", "AAA"]},
    says(("user", "UUU"), ("assistant", "AAA")),
    {"text": "AAA"},
]
OTHERS: list[Row] = [None, 7, True, "ZZZ", [], ["ZZZ"], {"ZZZ": 1}, [{"role": "user"}], "\ud83d"]
# Without these a row is another one, which may be as good.
OPTIONAL = {"system", "tools", "name", "tool_call_id", "id", "type", "parameters", "city", "tool_calls", "arguments"}


def places(value: Row, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a named field, at any depth."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str):
            yield (*path, key)
        yield from places(inner, (*path, key))


def changed(row: Row, path: tuple[Any, ...], change: Callable[[dict[str, Any], str], None]) -> Row:
    row = json.loads(json.dumps(row))
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return row


def read(row: Row) -> Example:
    found = conversation_of(row, "here")
    return found if isinstance(found, Example) else encode(found, TOKENIZERS[QWEN25], "tiny")


def check(faultless: Example, faulty: Row, path: tuple[Any, ...]) -> None:
    """The faulty row says the same, or why it cannot be used; words of users, tools and systems are never learned."""
    with contextlib.suppress(MalformedRow):
        prompt_of(faulty, "here")
    try:
        found, reason = read(faulty), None
    except MalformedRow as error:
        found, reason = None, str(error)
    name, value = path[-1], faulty
    for key in path:
        value = value.get(key) if isinstance(value, dict) else value[key]
    if found is None:
        # A row that has no known field left cannot say which of them it should have had.
        names = {name, "role", *({"arguments", "tools"} & {*path})}
        assert any(name in str(reason) for name in names) or len(path) == 1 or "part" in str(reason), reason
        return
    learned = "".join(TOKENIZERS[QWEN25].decode(found.token_ids[start:end]) for start, end in found.spans)
    assert not any(letters in learned for letters in ("UUU", "SSS", "TTT", "PPP"))
    assert found == faultless or name in OPTIONAL or value in ("ZZZ", ["ZZZ"])


def without(fields: dict[str, Any], name: str) -> None:
    del fields[name]


@pytest.mark.parametrize("row", FAULTLESS)
def test_a_row_with_a_fault_says_the_same_or_why_not(row: Row) -> None:
    faultless = read(row)
    for path in places(row):
        check(faultless, changed(row, path, without), path)
        check(faultless, changed(row, path, lambda fields, name: fields.update({name: [fields[name]] * 2})), path)
        for other in OTHERS:
            check(faultless, changed(row, path, lambda fields, name, other=other: fields.update({name: other})), path)


NAMES = ["messages", "conversations", "role", "from", "content", "value", "tool_calls", "function_call", "function"]
NAMES += ["name", "arguments", "tools", "prompt", "completion", "response", "data", "system", "type", "text", "chosen"]
WORDS = ["user", "assistant", "tool", "function_call", "function", "text", "UUU", "[]", "{}", '[{"role": "user"}]']
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(row=anything | st.lists(anything, max_size=3).map(lambda items: {"messages": items, "tools": items}))
def test_any_json_at_all_is_read_or_malformed(row: Row) -> None:
    with contextlib.suppress(MalformedRow):
        read(row)
    with contextlib.suppress(MalformedRow):
        prompt_of(row, "here")


@pytest.mark.parametrize("depth", [100, 400, 700, 900])
def test_arguments_hundreds_of_brackets_deep_do_not_end_the_reading(tmp_path: Path, depth: int) -> None:
    arguments = '{"city": ' + "[" * depth + "]" * depth + "}"
    line = json.dumps({"messages": [ASKED[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": 0}]}]})
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(HI) + "\n") * 9 + line.replace('"arguments": 0', f'"arguments": {arguments}'), "utf-8")
    said: list[str] = []
    examples = list(Reader(TOKENIZERS[QWEN25], "tiny", 1000, said.append).examples([str(path)]))
    assert len(examples) + len(said) == 10
