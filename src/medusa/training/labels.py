r"""Conversations -> tokens, with those marked that the model is to write.

<|im_start|>user\n Hi <|im_end|>\n <|im_start|>assistant\n Hello ! <|im_end|>\n
                                                           ~~~~~~~~~~~~~~~~~~      a span
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from medusa.errors import MedusaError, UsageError
from medusa.text.chat_template import ANSWER, REFUSALS, added_tokens, end_of_turn, render
from medusa.training.conversations import Conversation, Example
from medusa.training.messages import Message, Tool
from medusa.training.sources import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, slots=True)
class _Template:
    """The chat template of the model called `name`, and the tools that it is to offer."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    tools: tuple[Tool, ...] = ()

    @property
    def source(self) -> str:
        return self.tokenizer.get_chat_template(tools=[*self.tools] or None)

    def write(self, messages: Sequence[Message]) -> str:
        """The text of a conversation. Raises MalformedRow where the template refuses it."""
        try:
            return render(self.tokenizer, messages, tools=self.tools)
        except REFUSALS as error:
            raise MalformedRow(f"the chat template of {self.name} refuses it: {error}") from None

    def part(self, messages: Sequence[Message], *, answer: bool = False) -> str | None:
        """A part of a conversation, or None where the template refuses it."""
        try:
            return render(self.tokenizer, messages, answer=answer, tools=self.tools) if messages else None
        except REFUSALS:
            return None


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, name: str) -> Example:
    """The conversation as the model called `name` reads it, by its chat template, with what it is to write labelled.

    Labelled is what follows the template's opening of an answer, up to the end-of-turn token and with it: the model
    writes all of that itself, tool calls too. A token across a border belongs where its first character is. Messages
    after the last answer are left out. A system message that the template refuses, or does not show, goes into the
    first user turn; a developer's is a system message where the template does not speak of developers.

    A template may rewrite earlier turns, say to take their reasoning out. Such a turn is not labelled, because the
    text before it and in it is not what the model saw and wrote: of a conversation with Qwen 3 the last turn counts.
    Where the template opens an answer in a way that it does not write down itself (DeepSeek R1 opens a thought),
    the content and the end are labelled. A template with {% generation %} blocks says by them which turns count.

    Of a document every token is labelled but those that the tokenizer puts first, or else the first.

    Raises:
        UsageError: a conversation, but no chat template.
        MalformedRow: the template refuses the conversation, or leaves out tools, their calls or what they answer.
        MedusaError: the tokenizer does not say where in the text its tokens are.
    """
    if conversation.text is not None:
        return _encode_document(conversation.text, tokenizer, conversation.where)
    if not tokenizer.chat_template:
        raise UsageError(f'{name} has no chat template: give plain text rows ({{"text": ...}})')
    if not tokenizer.is_fast:
        raise MedusaError(f"the tokenizer of {name} does not say where its tokens are: let the model write the text")
    messages = list(conversation.messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if answers:
        messages = messages[: answers[-1] + 1]
    learned = max(0, len(messages) - conversation.given)  # so many of the last; the first two may yet become one
    template = _Template(tokenizer, name, conversation.tools)
    messages, text = _rendered(messages, template)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if not encoded["input_ids"]:
        raise MalformedRow(f"the chat template of {name} writes nothing")
    spans: list[tuple[int, int]] = []
    if answers:
        find = _marked_answers if _GENERATION.search(template.source) else _answers
        spans = find(messages, max(0, len(messages) - learned), text, template)
    return Example(tuple(encoded["input_ids"]), _token_spans(spans, encoded["offset_mapping"]), conversation.where)


def _encode_document(text: str, tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if not ids:
        raise MalformedRow("no tokens come of the text")
    start = next((i for i, added in enumerate(special) if not added), len(ids))
    start = max(1, start)  # nothing foretells the first token
    return Example(tuple(ids), ((start, len(ids)),) if start < len(ids) else (), where)


def _rendered(messages: list[Message], template: _Template) -> tuple[list[Message], str]:
    """The messages as the template takes them, and what it makes of them. Raises MalformedRow."""
    problem: MalformedRow | None = None
    for form in _forms(messages, template):
        try:
            taken, text = _with_system(form, template)
            _check_tools_are_shown(taken, template)
        except MalformedRow as error:
            problem = problem or error
        else:
            return taken, text
    assert problem is not None
    raise problem


def _forms(messages: list[Message], template: _Template) -> Iterator[list[Message]]:
    """The same conversation in all the forms that templates are written for, the commonest first."""
    roles = ["developer", "system"] if "developer" in template.source else ["system"]
    if all(message["role"] != "developer" for message in messages):
        roles = roles[-1:]
    calls = any("tool_calls" in message for message in messages)
    for role in roles:
        for without_content in (False, True) if calls else (False,):
            for arguments_as_text in (False, True) if calls else (False,):
                yield [
                    {**message, "role": role}
                    if message["role"] == "developer"
                    else _with_calls(message, without_content, arguments_as_text)
                    for message in messages
                ]


def _with_calls(message: Message, without_content: bool, arguments_as_text: bool) -> Message:
    """An assistant's message whose tool calls are written so, any other as it is."""
    if "tool_calls" not in message:
        return message
    message = {**message}
    if without_content and not message["content"]:
        del message["content"]
    if arguments_as_text:
        message["tool_calls"] = [
            _called(call, call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False))
            for call in message["tool_calls"]
        ]
    return message


def _called(call: Message, name: str, arguments: dict[str, str] | str) -> Message:
    return {**call, "function": {"name": name, "arguments": arguments}}


def _with_system(messages: list[Message], template: _Template) -> tuple[list[Message], str]:
    """The messages, the system message in the first user turn where the template has none; and their text."""
    system = messages[0]["content"] if messages[0]["role"] in ("system", "developer") else None
    try:
        text, refusal = template.write(messages), None
    except MalformedRow as error:
        text, refusal = "", error
    if refusal is None and (system or "").strip() in text:
        return messages, text
    user = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    if system is not None and user:
        content = messages[user]["content"]
        joined = {"role": "user", "content": f"{system}\n\n{content}" if system.strip() else content}
        folded = [*messages[1:user], joined, *messages[user + 1 :]]
        try:
            return folded, template.write(folded)
        except MalformedRow as error:
            refusal = refusal and error
    if refusal is not None:
        raise refusal
    return messages, text


def _check_tools_are_shown(messages: list[Message], template: _Template) -> None:
    """Raises MalformedRow where the template leaves out what tools are there, or what they are asked, or answer.

    It is tried with marks in their places: that an answer of "7" is somewhere in the text would say nothing.
    """
    marks: dict[str, str] = {}  # mark -> what it stands for

    def mark(what: str) -> str:
        new = f"medusa{len(marks)}mark"
        marks[new] = what
        return new

    def marked(message: Message) -> Message:
        if message["role"] == "tool":
            return {**message, "content": mark("what a tool answers")}
        if "tool_calls" not in message:
            return message
        calls = []
        for call in message["tool_calls"]:
            name, arguments = mark("a tool call"), {mark(arguments_shown): mark(arguments_shown)}
            as_text = isinstance(call["function"]["arguments"], str)
            calls.append(_called(call, name, json.dumps(arguments) if as_text else arguments))
        said = {"content": mark("what is said beside a tool call")} if message.get("content") else {}
        return {**message, **said, "tool_calls": calls}

    arguments_shown = "the arguments of a tool call"
    trial = [marked(message) for message in messages]
    tools = tuple({**tool, "function": {**tool["function"], "name": mark("the tools")}} for tool in template.tools)
    if not marks:
        return
    text = replace(template, tools=tools).write(trial)
    for found, what in marks.items():
        # A call written as Python does it, {'city': 'Paris'}, is not what a model writes: the template was not made for
        # objects there.
        as_python = what != "the tools" and (f"{{'{found}':" in text or f"'name': '{found}'" in text)
        if found not in text or as_python:
            raise MalformedRow(f"the chat template of {template.name} does not show {what}")


def _answers(messages: list[Message], given: int, text: str, template: _Template) -> list[tuple[int, int]]:
    r"""Where in the text the answers are, in characters, ends of turns included; of the first `given` messages none.

    head      ...<|im_start|>assistant\n                     what the template writes before an answer
    opening   ...<|im_start|>assistant\n                     the prompt at which the model begins to write it
    written   ...<|im_start|>assistant\nHello!<|im_end|>\n   the text once it has written it
    tail                                      <|im_end|>\n   what the template writes after any answer
    """
    spans = []
    for i, message in enumerate(messages):
        if i < given or message["role"] != "assistant":
            continue
        before = messages[:i]
        written = template.part(messages[: i + 1])
        shown = template.part([*before, {"role": "assistant", "content": ANSWER}])
        if written is None or shown is None:
            continue
        head, found, tail = shown.rpartition(ANSWER)
        if not found:
            continue
        end = _end_of_turn_in(written, tail, template.tokenizer, calls="tool_calls" in message)
        opening = template.part(before, answer=True)
        if opening is None or not written.startswith(opening):
            opening = head
        if written.startswith(opening) and len(opening) < end and text.startswith(written[:end]):
            spans.append((len(opening), end))
    return spans


def _end_of_turn_in(written: str, tail: str, tokenizer: PreTrainedTokenizerBase, *, calls: bool) -> int:
    """Where the last turn of `written` ends, or 0 where that is not plain."""
    if written.endswith(tail):
        return len(written) - len(tail) + len(end_of_turn(tokenizer, tail))
    # Llama 3.1 ends a call by a token of its own, for it is not the end of what the assistant does.
    stripped = written.rstrip()
    return len(stripped) if calls and any(stripped.endswith(token) for token in added_tokens(tokenizer)) else 0


def _marked_answers(messages: list[Message], given: int, text: str, template: _Template) -> list[tuple[int, int]]:
    """The {% generation %} blocks, in characters. Templates differ in what they put into them beside the answer: the
    opening of the turn is taken out, the end-of-turn token taken in, and the line's end after it taken out."""
    # What `return_assistant_tokens_mask` comes from, which loses blocks that begin within a token.
    from transformers.utils import chat_template_utils

    render_with_blocks: Any = chat_template_utils.render_jinja_template
    rendered, blocks = render_with_blocks(
        conversations=[messages],
        tools=[*template.tools] or None,
        chat_template=template.source,
        return_assistant_tokens_mask=True,
        **template.tokenizer.special_tokens_map,
    )
    if rendered != [text]:
        raise MalformedRow("the chat template does not write the same text twice")
    before = messages[:-1]
    shown = template.part([*before, {"role": "assistant", "content": ANSWER}]) or ""
    closing = end_of_turn(template.tokenizer, shown.rpartition(ANSWER)[2])
    opening = (template.part(before, answer=True) or "").removeprefix(template.part(before) or "")
    spans: list[tuple[int, int]] = []
    for start, end in blocks[0]:
        opens = bool(opening) and text.startswith(opening, start, end)
        if spans and spans[-1][1] == start and not opens:  # another block of the same answer
            spans[-1] = spans[-1][0], end
        else:
            spans.append((start + len(opening) if opens else start, end))
    # Where the given messages end in the text; none is learned from where that is not plain.
    prompts = (template.part(messages[:given], answer=answer) for answer in (True, False))
    least = next((len(prompt) for prompt in prompts if prompt and text.startswith(prompt)), len(text)) if given else 0
    return [(start, _end_of_answer(text, start, end, closing)) for start, end in spans if start >= least]


def _end_of_answer(text: str, start: int, end: int, end_of_turn: str) -> int:
    """Where the answer in [start, end) ends: after its end-of-turn token, which may be within, or come next."""
    stripped = start + len(text[start:end].rstrip())
    if end_of_turn and text.endswith(end_of_turn, start, stripped):
        return stripped
    return end + len(end_of_turn) if text.startswith(end_of_turn, end) else end


def _token_spans(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans of characters -> spans of the tokens that begin in them."""
    starts: list[int] = []
    covered = 0
    for start, end in offsets:
        # Byte-level tokenizers leave a token's leading space out of its offsets; the token begins at that space.
        starts.append(max(starts[-1] if starts else 0, min(start, covered)))
        covered = max(covered, end)
    found = ((bisect_left(starts, start), bisect_left(starts, end)) for start, end in spans)
    return tuple((start, end) for start, end in found if start < end)
