"""Which form of calls a chat template shows its model, and what a template that knows no tools is given instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medusa.grammar.calls import HERMES, LLAMA3, CallForm, Tool
from medusa.text.chat_template import REFUSALS, render, render_with_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_NAME = "probe_of_tools"
_TOOL = Tool(_NAME, "A probe.", {"type": "object", "properties": {"probe_key": {"type": "string"}}})
_CALL: Message = {"type": "function", "id": "probe0000", "function": {"name": _NAME, "arguments": {"probe_key": "x"}}}
_USER: Message = {"role": "user", "content": "probe"}


def knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template shows the model its tools."""
    try:
        return _NAME in render(tokenizer, [_USER], answer=True, tools=[_TOOL.told()])
    except REFUSALS:
        return False


def form_of(tokenizer: PreTrainedTokenizerBase) -> CallForm | None:
    """The form in which the template writes a call; None: one that is not known here."""
    messages: list[Message] = [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    try:
        text = render(tokenizer, messages, tools=[_TOOL.told()])
    except REFUSALS:
        return None
    text = "".join(text.split())  # templates differ in white space
    for form in (HERMES, LLAMA3):  # Llama's is a part of no other's, for its key is its own
        if "".join(form.written(_NAME, {"probe_key": "x"}).split()) in text:
            return form
    return None


def explained(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[Message]:
    """A conversation for a template that knows no tools: what there is to call is told to the model by the system, in
    Hermes' form, calls are what the assistant said, and what tools said the user says. Raises one of REFUSALS where the
    template does not take that either."""
    plain: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if plain and plain[-1].get("answers"):
                plain[-1]["content"] += f"\n{content}"
            else:
                plain.append({"role": "user", "content": content, "answers": True})
            continue
        calls = [
            HERMES.written(call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]
        plain.append({"role": role, "content": "\n".join([*([content] if content else []), *calls])})
    plain = [{"role": message["role"], "content": message["content"]} for message in plain]
    if not tools:
        return plain
    if plain and plain[0]["role"] == "system":
        plain[0]["content"] += f"\n\n{_about(tools)}"
    else:
        plain.insert(0, {"role": "system", "content": _about(tools)})
    return render_with_system(tokenizer, plain, answer=True)[0]


def _about(tools: Sequence[Tool]) -> str:
    listed = "\n".join(json.dumps(tool.told(), ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to help with what the user asks. These are the functions, in <tools></tools>:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        "To call one, write its name and its arguments as JSON in <tool_call></tool_call>:\n"
        '<tool_call>\n{"name": <name of the function>, "arguments": <object of arguments>}\n</tool_call>'
    )
