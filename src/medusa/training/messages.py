"""Messages of a row -> messages as chat templates take them.

    {"role": "system" | "developer" | "user", "content": text}
    {"role": "assistant", "content": text, "tool_calls"?: [call, ...]}
    {"role": "tool", "content": text, "name"?, "tool_call_id"?}
    call: {"id"?, "type": "function", "function": {"name", "arguments"}}

    OpenAI                                ShareGPT                             older OpenAI
    {"role": "user", "content"}           {"from": "human", "value"}
    {"role": "assistant", "tool_calls"}   {"from": "function_call", "value"}   {"role": "assistant", "function_call"}
    {"role": "tool", "content"}           {"from": "observation", "value"}     {"role": "function", "name", "content"}

Arguments are objects, also where the row has them as JSON text. All raise MalformedRow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from medusa.text.stream import is_text
from medusa.training.sources import MalformedRow, is_message, parse_json

Message = dict[str, Any]
Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",  # the assistant's, with the call for its content
}


def messages_of(fields: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """The messages in the field `name`: a list, or the JSON text of one."""
    items = list_of(fields, name, "the conversation must be a list of messages")
    if not items:
        raise MalformedRow("the conversation is empty")
    return tuple(_message(item) for item in items)


def tools_of(fields: Mapping[str, Any]) -> tuple[Tool, ...]:
    """The tools that a row offers the assistant: a list, or the JSON text of one."""
    name = one_of(fields, ("tools", "functions"))
    return () if name is None else tuple(_tool(item, name) for item in list_of(fields, name, "tools must be a list"))


def fields_of(item: object, what: str) -> dict[str, Any]:
    """Those that are not null."""
    if not isinstance(item, dict):
        raise MalformedRow(f"{what} must be an object with named fields, not {kind_of(item)}")
    return {name: value for name, value in item.items() if value is not None}


def kind_of(value: object) -> str:
    """What JSON calls it."""
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def present(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names that is a field."""
    return next((name for name in names if name in fields), None)


def one_of(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The one of the names that is a field; if there are several, they must say the same."""
    used = [name for name in names if name in fields]
    if any(fields[name] != fields[used[0]] for name in used[1:]):
        raise MalformedRow(f"{' and '.join(map(quoted, used))} differ")
    return used[0] if used else None


def quoted(name: str) -> str:
    return f'"{name}"'


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names))


def _names(fields: Mapping[str, Any]) -> str:
    return listed(sorted(fields)[:6]) or "nothing"


def text_of(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise MalformedRow(f'"{name}" must be text, not {kind_of(value)}')
    return _whole(value, name)


def _whole(text: str, name: str) -> str:
    if not is_text(text):
        raise MalformedRow(f'"{name}" holds half a character (a lone surrogate)')
    return text


def list_of(fields: Mapping[str, Any], name: str, rule: str) -> list[Any]:
    """The list in the field `name`, which may be its JSON text: a cell of a table holds nothing else."""
    value = _unpacked(fields[name])
    if not isinstance(value, list):
        raise MalformedRow(f'"{name}": {rule}, not {kind_of(value)}')
    return value


def is_conversation(value: object) -> bool:
    """Whether a value is a list of messages, or the JSON text of one, and not a text or a list of rows."""
    items = _unpacked(value)
    return isinstance(items, list) and bool(items) and all(map(is_message, items))


def _unpacked(value: object) -> object:
    """What a JSON text says; the value itself where it is none."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _message(item: object) -> Message:
    fields = fields_of(item, "a message")
    names = [text_of(fields, key) for key in ("role", "from") if key in fields]
    content, calls = one_of(fields, ("content", "value")), _tool_calls(fields)
    if content is not None and fields[content] == []:  # no parts
        content = None
    if not names or (content is None and not calls):
        missing = listed(("content", "value", "tool_calls") if names else ("role", "from"))
        raise MalformedRow(f"a message needs a role and a content, but has {_names(fields)} and none of {missing}")
    for name in ("reasoning_content", "reasoning", "thinking"):
        if fields.get(name):  # a template may show it, and may take it out again from earlier turns
            raise MalformedRow(f"a message has {quoted(name)}: put it into the content, as the model writes it")
    if fields.get("weight", 1) != 1:
        raise MalformedRow(f'a message has the "weight" {fields["weight"]}: all answers are learned from alike')
    role = _role(names)
    if role == "function_call" and content is not None and not calls:
        value = _unpacked(fields[content])
        calls = [_call(call, content) for call in (value if isinstance(value, list) and value else [value])]
        content, role = None, "assistant"
    if calls and role != "assistant":
        raise MalformedRow(f'"tool_calls" in a message of the role {names[0]!r}')
    message: Message = {"role": role, "content": "" if content is None else _content(fields, content)}
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: text_of(fields, key) for key in ("name", "tool_call_id") if key in fields}
    return message


def _role(names: Sequence[str]) -> str:
    """The role that all the names mean."""
    roles = [_ROLES.get(name.strip().lower()) for name in names]
    if roles[0] is None:
        raise MalformedRow(f"unknown role {names[0]!r}")
    if any(role != roles[0] for role in roles):
        raise MalformedRow('"role" and "from" differ')
    return roles[0]


def _content(fields: Mapping[str, Any], name: str) -> str:
    if not isinstance(fields[name], list):
        return text_of(fields, name)
    parts = [fields_of(part, "a part of a message") for part in fields[name]]
    if other := next((part for part in parts if part.get("type") != "text" or "text" not in part), None):
        raise MalformedRow(f"a message has a part that is not text but {other.get('type')!r}")
    return "".join(text_of(part, "text") for part in parts)


def _tool_calls(fields: Mapping[str, Any]) -> list[Message]:
    calls = list_of(fields, "tool_calls", "tool calls must be a list") if "tool_calls" in fields else []
    if "function_call" in fields:
        if calls:
            raise MalformedRow('a message has both "tool_calls" and "function_call"')
        return [_call(fields["function_call"], "function_call")]
    return [_call(call, "tool_calls") for call in calls]


def _call(item: object, where: str) -> Message:
    fields = fields_of(item, f'a tool call of "{where}"')
    if fields.get("type", "function") != "function":
        raise MalformedRow(f'a tool call has the "type" {fields["type"]!r}, not "function"')
    function = fields_of(fields["function"], 'the "function" of a tool call') if "function" in fields else fields
    if not {"name", "arguments"} <= function.keys():
        needs = 'needs a "function" with "name" and "arguments"'
        raise MalformedRow(f'a tool call of "{where}" {needs}, but has {_names(function)}')
    arguments = _unpacked(function["arguments"] or {})
    if not isinstance(arguments, dict):
        raise MalformedRow(f'the "arguments" of a tool call must be an object, not {kind_of(arguments)}')
    _whole(json.dumps(arguments, ensure_ascii=False), "arguments")
    name = text_of(function, "name")
    if not name.strip():
        raise MalformedRow('the "name" of a tool call is empty')
    identity = {"id": text_of(fields, "id")} if "id" in fields else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(item: object, where: str) -> Tool:
    function = fields_of(item, f'a tool of "{where}"')
    if "function" in function:
        if function.get("type", "function") != "function":
            raise MalformedRow(f'a tool of "{where}" has the "type" {function["type"]!r}, not "function"')
        function = fields_of(function["function"], f'the "function" of a tool of "{where}"')
    if "name" not in function:
        raise MalformedRow(f'a tool of "{where}" needs a "function" with a "name", but has {_names(function)}')
    text_of(function, "name")
    _whole(json.dumps(function, ensure_ascii=False, default=str), where)
    return {"type": "function", "function": function}
