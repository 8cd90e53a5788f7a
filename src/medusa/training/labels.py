r"""Conversations -> tokens, with those marked that the model is to write.

<|im_start|>user\n Hi <|im_end|>\n <|im_start|>assistant\n Hello ! <|im_end|>\n
                                                           ~~~~~~~~~~~~~~~~~~      a span
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from medusa.errors import MedusaError, UsageError
from medusa.text.chat_template import ANSWER, REFUSALS, added_tokens, end_of_turn, render, render_with_system
from medusa.training.conversations import Conversation, Example
from medusa.training.messages import Message, Tool
from medusa.training.sources import MalformedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = {"role": "assistant", "content": ANSWER}
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

    def write(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """The messages, the system message in the first user turn where the template has none; and their text. Raises
        MalformedRow where the template refuses them."""
        try:
            return render_with_system(self.tokenizer, messages, tools=self.tools)
        except REFUSALS as error:
            raise MalformedRow(f"the chat template of {self.name} refuses it: {error}") from None

    def part(self, messages: Sequence[Message], *, answer: bool = False) -> str | None:
        """The text of a part of a conversation, or None where the template refuses it."""
        try:
            return render(self.tokenizer, messages, answer=answer, tools=self.tools) if messages else None
        except REFUSALS:
            return None

    def row(self, text: str, spans: Sequence[tuple[int, int]], where: str) -> Example:
        """`spans` are in characters of `text`."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if not encoded["input_ids"]:
            raise MalformedRow(f"the chat template of {self.name} writes nothing")
        return Example(tuple(encoded["input_ids"]), _token_spans(spans, encoded["offset_mapping"]), where)


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, name: str) -> Example:
    """The whole conversation as one row: the first of `encode_rows`."""
    return next(encode_rows(conversation, tokenizer, name))


def encode_rows(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[Example]:
    """The conversation as the model called `name` reads it, by its chat template, with what it is to write labelled.

    Labelled is what follows the template's opening of an answer, up to the end-of-turn token and with it: the model
    writes all of that itself, tool calls too. A token across a border belongs where its first character is. Messages
    after the last answer are left out. A system message that the template refuses, or does not show, goes into the
    first user turn; a developer's is a system message where the template does not speak of developers.

    The first row is the whole conversation. A template may rewrite earlier turns, say to take their reasoning out: the
    text before such a turn and in it is then not what the model saw and wrote. It is learned from in a row of its own,
    which ends with it. Where the template opens an answer in a way that it does not write down itself (DeepSeek R1
    opens a thought), the content and the end are labelled. A template with {% generation %} blocks says by them which
    turns count, and there is one row.

    Of a document every token is labelled but those that the tokenizer puts first, or else the first.

    Raises:
        UsageError: a conversation, but no chat template.
        MalformedRow: the template refuses the conversation, or leaves out tools, their calls or what they answer.
        MedusaError: the tokenizer does not say where in the text its tokens are.
    """
    if conversation.text is not None:
        yield _encode_document(conversation.text, tokenizer, conversation.where)
        return
    if not tokenizer.chat_template:
        raise UsageError(f'{name} has no chat template: give plain text rows ({{"text": ...}})')
    if not tokenizer.is_fast:
        raise MedusaError(f"the tokenizer of {name} does not say where its tokens are: let the model write the text")
    ends = [i for i, message in enumerate(conversation.messages, start=1) if message["role"] == "assistant"]
    messages = list(conversation.messages[: ends[-1] if ends else None])
    learned = max(0, len(messages) - conversation.given)  # so many of the last; the first two may yet become one
    template = _Template(tokenizer, name, conversation.tools)
    messages, text = _rendered(messages, template)
    given = max(0, len(messages) - learned)
    if _GENERATION.search(template.source):
        yield template.row(text, _marked_answers(messages, given, text, template), conversation.where)
        return
    left = _answers(messages, given, template)
    while True:
        shown = [answer for answer in left if text.startswith(answer.text)]
        yield template.row(text, [(answer.start, len(answer.text)) for answer in shown], conversation.where)
        left = [answer for answer in left if answer not in shown]
        if not left:
            return
        text = left[-1].text


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
            accepted, text = template.write(form)
            _check_tools_are_shown(accepted, template)
        except MalformedRow as error:
            problem = problem or error
        else:
            return accepted, text
    assert problem is not None
    raise problem


def _forms(messages: list[Message], template: _Template) -> list[list[Message]]:
    """The same conversation in all the forms that templates are written for, the commonest first: a developer may be
    the system, a call may have no content, and its arguments may be text."""
    roles = ("developer", "system") if "developer" in template.source else ("system",)
    forms: list[list[Message]] = []
    for role, without_content, as_text in itertools.product(roles, (False, True), (False, True)):
        form = [
            {**message, "role": role}
            if message["role"] == "developer"
            else _with_calls(message, without_content, as_text)
            for message in messages
        ]
        if form not in forms:
            forms.append(form)
    return forms


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
    """The same call of another function."""
    return {**call, "function": {"name": name, "arguments": arguments}}


def _check_tools_are_shown(messages: list[Message], template: _Template) -> None:
    """Raises MalformedRow where the template leaves out what tools are there, or what they are asked, or answer.

    It is tried with marks in their places: that an answer of "7" is somewhere in the text would say nothing.
    """
    marks: list[str] = []  # what each stands for

    def mark(what: str) -> str:
        marks.append(what)
        return f"medusa{len(marks)}mark"

    def marked(message: Message) -> Message:
        if message["role"] == "tool":
            return {**message, "content": mark("what a tool answers")}
        message = {**message}
        if "tool_calls" in message and message.get("content"):
            message["content"] = mark("what is said beside a tool call")
        calls = []
        for call in message.get("tool_calls", ()):
            name, key, value = map(mark, ("a tool call", *["the arguments of a tool call"] * 2))
            as_text = isinstance(call["function"]["arguments"], str)
            calls.append(_called(call, name, json.dumps({key: value}) if as_text else {key: value}))
        return {**message, "tool_calls": calls} if calls else message

    trial = [marked(message) for message in messages]
    tools = tuple({**tool, "function": {**tool["function"], "name": mark("the tools")}} for tool in template.tools)
    if not marks:
        return
    _, text = replace(template, tools=tools).write(trial)
    for number, what in enumerate(marks, start=1):
        name = f"medusa{number}mark"
        # A call written as Python does it, {'city': 'Paris'}, is not what a model writes: the template was not made for
        # objects there.
        as_python = what != "the tools" and (f"{{'{name}':" in text or f"'name': '{name}'" in text)
        if name not in text or as_python:
            raise MalformedRow(f"the chat template of {template.name} does not show {what}")


class _Answer(NamedTuple):
    """The text of a conversation up to the end of an answer, and where in it the answer starts."""

    text: str
    start: int


def _answers(messages: list[Message], given: int, template: _Template) -> list[_Answer]:
    r"""What the model saw and wrote, answer for answer, the ends of turns included; of the first `given` messages none.

    head      ...<|im_start|>assistant\n                     what the template writes before an answer
    opening   ...<|im_start|>assistant\n                     the prompt at which the model begins to write it
    written   ...<|im_start|>assistant\nHello!<|im_end|>\n   the text once it has written it
    tail                                      <|im_end|>\n   what the template writes after any answer
    """
    answers = []
    for i, message in enumerate(messages):
        if i < given or message["role"] != "assistant":
            continue
        before = messages[:i]
        written = template.part(messages[: i + 1])
        head, mark, tail = (template.part([*before, _MARKED]) or "").rpartition(ANSWER)
        if written is None or not mark:
            continue
        end = _end_of_turn_in(written, tail, template.tokenizer, calls="tool_calls" in message)
        opening = template.part(before, answer=True)
        if opening is None or not written.startswith(opening):
            opening = head
        if written.startswith(opening) and len(opening) < end:
            answers.append(_Answer(written[:end], len(opening)))
    return answers


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
    closing = end_of_turn(template.tokenizer, (template.part([*before, _MARKED]) or "").rpartition(ANSWER)[2])
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
    in_tokens = ((bisect_left(starts, start), bisect_left(starts, end)) for start, end in spans)
    return tuple((start, end) for start, end in in_tokens if start < end)
