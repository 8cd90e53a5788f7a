"""How answers are written: whole, or as a stream of events. One form for each interface; chats and completions here,
responses in responses.py."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from medusa.grammar.calls import read
from medusa.serve.errors import ApiError, failed
from medusa.serve.jobs import Answers, Front, new_id
from medusa.serve.logprobs import CompletionLogprobs, TokenTexts
from medusa.serve.tally import Tally

if TYPE_CHECKING:
    from medusa.completion import Chunk
    from medusa.serve.schema import ChatRequest, CompletionRequest

Event = dict[str, Any]


class Form(Protocol):
    """Of one request's answers."""

    tally: Tally

    def opening(self) -> Iterable[Event]: ...

    def piece(self, index: int, chunk: Chunk) -> Iterable[Event]:
        """What is said of a chunk, which the tally has counted."""
        ...

    def closing(self) -> Iterable[Event]: ...

    def broken(self, error: ApiError) -> Iterable[Event]: ...

    def whole(self) -> Event: ...


async def whole(form: Form, answers: Answers) -> Event:
    """The answers, when the last has ended. Raises ApiError."""
    try:
        async for item in answers.chunks():
            if item is not None:
                form.tally.push(*item)
    finally:
        answers.close()
    return form.whole()


async def stream(form: Form, answers: Answers, last: str) -> AsyncIterator[str]:
    """Server-sent events; what goes wrong on the way is one of them."""
    try:
        for event in form.opening():
            yield written(event)
        async for item in answers.chunks():
            if item is None:
                yield ": still here\n\n"
                continue
            form.tally.push(*item)
            for event in form.piece(*item):
                yield written(event)
        for event in form.closing():
            yield written(event)
        yield last
    except ApiError as error:
        for event in form.broken(error):
            yield written(event)
    except Exception:
        for event in form.broken(failed()):
            yield written(event)
        raise
    finally:
        answers.close()


def written(event: Event) -> str:
    """In ASCII, so that no reader can take a character for the end of a line."""
    name = f"event: {event['type']}\n" if "sequence_number" in event else ""
    return f"{name}data: {json.dumps(event, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"


class _Choices:
    """What chats and completions share."""

    kind = ""
    id_kind = ""

    def __init__(self, front: Front, answers: Answers, asked: ChatRequest | CompletionRequest) -> None:
        self.tally = Tally(answers, front.lm.tokenizer)
        self._texts = TokenTexts(front.lm.tokenizer, front.lm.eos_token_ids)
        self._detail = asked.detail
        self._usage = asked.stream_options is not None and asked.stream_options.include_usage
        self._head = {
            "id": new_id(self.id_kind),
            "created": int(time.time()),
            "model": front.name,
            "system_fingerprint": fingerprint(front),
        }

    def _event(self, choices: list[Event], **more: Any) -> Event:
        usage = {"usage": None} if self._usage else {}
        return {**self._head, "object": self.kind, "choices": choices, **usage, **more}

    def closing(self) -> Iterable[Event]:
        if self._usage:
            yield self._event([], usage=self.tally.usage(), **self.tally.medusa(self._detail))
        elif self._detail:
            yield self._event([], **self.tally.medusa(self._detail))

    def broken(self, error: ApiError) -> Iterable[Event]:
        yield error.body()


class ChatForm(_Choices):
    """/v1/chat/completions"""

    kind = "chat.completion.chunk"
    id_kind = "chatcmpl"

    def __init__(self, front: Front, answers: Answers, asked: ChatRequest) -> None:
        super().__init__(front, answers, asked)
        self._logprobs = asked.logprobs
        form = answers.wanted.answering.form
        self._readers = None if form is None else [form.reader() for _ in self.tally.choices]

    def opening(self) -> Iterable[Event]:
        for index in range(len(self.tally.choices)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, index: int, chunk: Chunk) -> Iterable[Event]:
        shown = self._texts.chat([chunk]) if self._logprobs else None
        told = self.tally.step(chunk, self._detail)
        deltas = self._deltas(index, chunk)
        if not deltas and ((shown and shown["content"]) or told):
            deltas = [{} if self._readers else {"content": ""}]
        for delta in deltas:  # what is told of the tokens is told once
            yield self._chunk(index, delta, shown, **told)
            shown, told = None, {}
        if chunk.finish_reason is not None:
            yield self._chunk(index, {}, finish_reason=self._reason(index, chunk.finish_reason))

    def _deltas(self, index: int, chunk: Chunk) -> list[Event]:
        if self._readers is None:
            return [{"content": chunk.text}] if chunk.text else []
        reader = self._readers[index]
        found = [*reader.push(chunk.text), *(reader.end() if chunk.finish_reason is not None else ())]
        begun = reader.calls - sum(kind == "call" for kind, _ in found)
        deltas: list[Event] = []
        for kind, text in found:
            if kind == "text":
                deltas.append({"content": text})
                continue
            begun += kind == "call"
            called = {"name": text, "arguments": ""} if kind == "call" else {"arguments": text}
            head = {"id": new_id("call"), "type": "function"} if kind == "call" else {}
            deltas.append({"tool_calls": [{"index": begun - 1, **head, "function": called}]})
        return deltas

    def _reason(self, index: int, reason: str | None) -> str | None:
        called = self._readers is not None and self._readers[index].complete and reason == "stop"
        return "tool_calls" if called else reason

    def _chunk(
        self, index: int, delta: Event, logprobs: Event | None = None, finish_reason: str | None = None, **more: Any
    ) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._event([choice], **more)

    def whole(self) -> Event:
        choices = [
            {
                "index": index,
                "message": self._message(index, choice.text),
                "logprobs": self._texts.chat(choice.chunks) if self._logprobs else None,
                "finish_reason": self._reason(index, choice.finish_reason),
            }
            for index, choice in enumerate(self.tally.choices)
        ]
        head = {**self._head, "object": "chat.completion", "choices": choices, "usage": self.tally.usage()}
        return {**head, **self.tally.medusa(self._detail)}

    def _message(self, index: int, text: str) -> Event:
        if self._readers is None:
            return {"role": "assistant", "content": text, "refusal": None}
        said, calls = read(self._readers[index], text)
        told: Event = {"role": "assistant", "content": None if calls and not said else said, "refusal": None}
        if calls:
            functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
            told["tool_calls"] = [{"id": new_id("call"), "type": "function", "function": f} for f in functions]
        return told


class CompletionForm(_Choices):
    """/v1/completions. `echoes` are the texts of the prompts, where they are to stand before the answers."""

    kind = "text_completion"
    id_kind = "cmpl"

    def __init__(self, front: Front, answers: Answers, asked: CompletionRequest, echoes: list[str]) -> None:
        super().__init__(front, answers, asked)
        self._echoes = echoes
        self._n = asked.n
        offsets = [len(echoes[i // asked.n]) if echoes else 0 for i in range(len(self.tally.choices))]
        self._shown = [CompletionLogprobs(self._texts, offset) for offset in offsets if asked.logprobs is not None]

    def opening(self) -> Iterable[Event]:
        for index in range(len(self.tally.choices)):
            if self._echoes:
                yield self._event([self._choice(index, self._echoes[index // self._n], None, None)])

    def piece(self, index: int, chunk: Chunk) -> Iterable[Event]:
        shown = self._shown[index].push([chunk]) if self._shown else None
        told = self.tally.step(chunk, self._detail)
        if chunk.text or chunk.finish_reason is not None or (shown and shown["tokens"]) or told:
            yield self._event([self._choice(index, chunk.text, shown, chunk.finish_reason)], **told)

    def _choice(self, index: int, text: str, logprobs: Event | None, finish_reason: str | None) -> Event:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self) -> Event:
        choices = []
        for index, choice in enumerate(self.tally.choices):
            echo = self._echoes[index // self._n] if self._echoes else ""
            shown = self._shown[index].push(choice.chunks) if self._shown else None
            choices.append(self._choice(index, echo + choice.text, shown, choice.finish_reason))
        head = {**self._head, "object": "text_completion", "choices": choices, "usage": self.tally.usage()}
        return {**head, **self.tally.medusa(self._detail)}


def fingerprint(front: Front) -> str:
    """The same where the same seed gives the same text."""
    import medusa

    runs_on = front.lm.runs_on()
    return f"medusa-{medusa.__version__}-{runs_on['backend']}-{runs_on['dtype']}"
