"""Rows -> conversations. The shapes of rows, told apart row by row (a field that is null counts as absent):

    {"token_ids", "labels", ...}          what distilling wrote: already tokens
    {"messages": [{"role", "content"}]}   OpenAI; content may be a list of text parts; tools: see `messages.py`
    {"conversations": [{"from", "value"}]}  ShareGPT; also called "items", or "conversation" (LMSYS, WildChat)
    [{"role", "content"}]                 the messages alone
    {"prompt": [...], "completion": [...]}  TRL, lists of messages; nothing in the prompt is learned from
    {"instruction", "input"?, "output"}   Alpaca; any of _QUESTIONS goes with any of _ANSWERS; "history" holds earlier
                                          turns, [question, answer] each, which are read and not learned from
    {"text"}                              a plain document, every token of which is learned from
    {"data": [text, text, ...]}           UltraChat, user and assistant in turn

A message of either form may stand in any list of messages; a list may be given as its JSON text. With all but the first
and "text" go "system" and "tools". {"chosen", "rejected"} alone is refused: heads learn what one model would write, and
the row does not say which of the two that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa.training.messages import (
    Message,
    Tool,
    fields_of,
    is_conversation,
    list_of,
    listed,
    messages_of,
    present,
    text_of,
    tools_of,
)
from medusa.training.sources import MalformedRow, Place

_TURNS = ("messages", "conversations", "conversation", "items")
_QUESTIONS = ("instruction", "prompt", "question")
_ANSWERS = ("output", "response", "completion", "answer")
_PREFERENCES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages (see `messages.py`), or a plain document without any.

    Only the assistant's messages are learned from, and of the first `given` not even those. `tools` are offered to it.
    """

    messages: tuple[Message, ...]
    where: Place
    text: str | None = None
    tools: tuple[Tool, ...] = ()
    given: int = 0

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("a conversation holds either messages or a text")


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens to read, and the spans [start, end) of them to learn from: ascending, disjoint, none empty.

    No spans at all is right where nobody answers.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    where: Place

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError("there are no tokens")
        if (least := min(self.token_ids)) < 0:
            raise ValueError(f"{least} is not a token")
        before = 0
        for start, end in self.spans:
            if start < before or end <= start:
                raise ValueError(f"the span [{start}, {end}) is empty, or begins before the one before it ends")
            before = end
        if before > len(self.token_ids):
            raise ValueError(f"a span ends at {before}, but there are {len(self.token_ids)} tokens")


def conversation_of(row: object, where: Place, vocab_size: int | None = None) -> Conversation | Example:
    """What a row holds to learn from. Raises MalformedRow."""
    fields = _row(row)
    if "token_ids" in fields:
        return _distilled(fields, where, vocab_size)
    given = 0
    question, answer = present(fields, _QUESTIONS), present(fields, _ANSWERS)
    if name := present(fields, _TURNS):
        messages = _with_system(fields, messages_of(fields, name))
    elif question and answer:
        if str(fields.get("label")).strip().lower() in ("false", "0"):  # TRL's rows for KTO; in a CSV file it is text
            raise MalformedRow('"label" is false: it is an answer that the model is not to give')
        prompt = _question(fields, question)
        messages = (*prompt, *_answer(fields, answer))
        given = len(prompt) if any(message["role"] == "assistant" for message in prompt) else 0
    elif name := present(fields, _PREFERENCES):
        raise MalformedRow(f'"{name}" is one answer of a preference row: call the answer to learn from "completion"')
    elif "text" in fields:
        text = text_of(fields, "text")
        if not text.strip():
            raise MalformedRow('"text" is empty')
        return Conversation((), where, text)
    elif "data" in fields:
        messages = _with_system(fields, _in_turn(fields))
    elif question:
        raise MalformedRow(f"there is a {question} but no answer ({listed(_ANSWERS)})")
    else:
        raise _unknown(fields)
    return Conversation(messages, where, tools=tools_of(fields), given=given)


def prompt_of(row: object, where: Place) -> Conversation:
    """What a row asks: its system message and what users say. Raises MalformedRow."""
    fields = _row(row)
    if name := present(fields, _TURNS):
        messages = _with_system(fields, messages_of(fields, name))
    elif question := present(fields, _QUESTIONS):
        messages = _question(fields, question)
    elif name := present(fields, _PREFERENCES):
        raise MalformedRow(f'"{name}" is one answer of a preference row: call what the user says "prompt"')
    elif "text" in fields:
        raise MalformedRow('"text" is a document, not a question; call it "prompt"')
    elif "data" in fields:
        messages = _with_system(fields, _in_turn(fields))
    else:
        raise _unknown(fields)
    if tools_of(fields) or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        raise MalformedRow("it uses tools, and a model that answers prompts has none")
    prompt = tuple(
        {**message, "role": "system"} if message["role"] == "developer" else message
        for message in messages
        if message["role"] != "assistant"
    )
    users = [message["content"] for message in prompt if message["role"] == "user"]
    if not users:
        raise MalformedRow("no user says anything")
    if not all(user.strip() for user in users):
        raise MalformedRow("a user turn is empty")
    if any(message["role"] == "system" for message in prompt[1:]):
        raise MalformedRow("a system message must be the first")
    return Conversation(prompt, where)


def _row(row: object) -> dict[str, Any]:
    return {"messages": row} if isinstance(row, list) and row else fields_of(row, "a row")


def _unknown(fields: Mapping[str, Any]) -> MalformedRow:
    names = f"only {listed(sorted(fields)[:6])}" if fields else "nothing"
    return MalformedRow(f'no "messages", "conversations", "prompt" with "response", or "text", but {names}')


def _question(fields: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """The system message, if there is one, and the question with what it is about; or TRL's messages."""
    if name == "prompt" and _holds_messages(fields, name):
        return _with_system(fields, messages_of(fields, name))
    parts = [text_of(fields, name), *(text_of(fields, extra) for extra in ("input", "context") if fields.get(extra))]
    return _with_system(fields, (*_history(fields), {"role": "user", "content": "\n\n".join(parts)}))


def _history(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    """Turns before the question, [question, answer] each, as Alpaca rows with several turns have them."""
    turns: list[Message] = []
    for pair in list_of(fields, "history", "earlier turns must be a list") if fields.get("history") else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise MalformedRow('"history" must be a list of [question, answer]')
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text_of({"history": text}, "history")})
    return tuple(turns)


def _answer(fields: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    if name != "completion" or not _holds_messages(fields, name):
        return ({"role": "assistant", "content": text_of(fields, name)},)
    messages = messages_of(fields, name)
    if all(message["role"] != "assistant" for message in messages):
        raise MalformedRow('no assistant speaks in "completion"')
    return messages


def _holds_messages(fields: Mapping[str, Any], name: str) -> bool:
    """Whether TRL's prompt or completion is a list of messages; its JSON text is one only if the other is one too, for
    an answer may well be JSON."""
    others = (is_conversation(fields.get(other)) for other in ("prompt", "completion"))
    return isinstance(fields[name], list) or all(others)


def _with_system(fields: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the system message that is a field of its own."""
    name = next((name for name in ("system", "system_prompt") if fields.get(name)), None)
    if name is None:
        return messages
    system = {"role": "system", "content": text_of(fields, name)}
    if messages[0]["role"] not in ("system", "developer"):
        return (system, *messages)
    if messages[0]["content"] != system["content"]:
        raise MalformedRow(f'"{name}" and the system message differ')
    return messages


def _in_turn(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    texts = list_of(fields, "data", "what is said in turn must be a list of texts")
    if not texts:
        raise MalformedRow('"data" is empty')
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text_of({"data": text}, "data")} for i, text in enumerate(texts))


def _distilled(fields: Mapping[str, Any], where: Place, vocab_size: int | None) -> Example:
    ids, labels = fields["token_ids"], fields.get("labels")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise MalformedRow('"token_ids" must be a list of integers')
    if not isinstance(labels, list) or not all(
        isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span) for span in labels
    ):
        raise MalformedRow('"labels" must be a list of [start, end]')
    if vocab_size is not None and ids and max(ids) >= vocab_size:
        raise MalformedRow(f"token {max(ids)} is not one of the model's {vocab_size}")
    try:
        return Example(tuple(ids), tuple((start, end) for start, end in labels), where)
    except ValueError as error:
        raise MalformedRow(str(error)) from None
