"""The form of /v1/responses: a message, calls of functions, or both; whole or as events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medusa.serve.errors import ApiError
from medusa.serve.forms import Event
from medusa.serve.jobs import Answers, Front, new_id
from medusa.serve.tally import Tally

if TYPE_CHECKING:
    from medusa.completion import Chunk
    from medusa.serve.schema import ResponsesRequest


@dataclass(slots=True)
class Item:
    """One of what a response puts out: a message, or a call where it has a name."""

    place: int
    name: str | None = None
    text: str = ""  # of the message, or the arguments of the call
    status: str = "in_progress"
    id: str = ""
    call_id: str = ""

    def __post_init__(self) -> None:
        self.id = new_id("msg" if self.name is None else "fc")
        self.call_id = new_id("call")

    def told(self) -> Event:
        if self.name is not None:
            called = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
            return {"id": self.id, "type": "function_call", "status": self.status, **called}
        content = [] if self.status == "in_progress" else [_part(self.text)]
        return {"id": self.id, "type": "message", "status": self.status, "role": "assistant", "content": content}


class ResponsesForm:
    """See `forms.Form`."""

    def __init__(self, front: Front, answers: Answers, asked: ResponsesRequest) -> None:
        self.tally = Tally(answers, front.lm.tokenizer)
        self._detail = asked.detail
        self._number = 0
        self._items: list[Item] = []
        form = answers.wanted.answering.form
        self._reader = None if form is None else form.reader()
        sampling = answers.wanted.sampling
        self._head = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata or {},
            "model": front.name,
            "parallel_tool_calls": asked.parallel_tool_calls is not False and bool(asked.tools),
            "previous_response_id": None,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": None,
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": _format(asked)},
            "tool_choice": _choice(asked),
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_logprobs": 0,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "truncation": "disabled",
            "user": asked.user,
        }

    def opening(self) -> Iterable[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))
        if self._reader is None:
            yield from self._open()

    def piece(self, index: int, chunk: Chunk) -> Iterable[Event]:
        told = self.tally.step(chunk, self._detail)
        if self._reader is None:
            if chunk.text or told:
                yield from self._grow(chunk.text, told)
            return
        for found in self._reader.push(chunk.text):
            yield from self._found(*found, told)
            told = {} if found[0] != "call" else told
        if told:  # of what is held back
            yield self._event("response.in_progress", response=self._response("in_progress"), **told)

    def closing(self) -> Iterable[Event]:
        yield from self._end()
        yield self._event(f"response.{self._status}", response=self._whole())

    def whole(self) -> Event:
        text = self.tally.choices[0].text
        if self._reader is None:
            self._items = [Item(0, text=text)]
        else:
            for found in self._reader.push(text):
                list(self._found(*found, {}))
        list(self._end())
        return self._whole()

    def _found(self, kind: str, text: str, told: Event) -> Iterator[Event]:
        if kind == "call":
            yield from self._close("completed")
            yield from self._open(text)
            return
        if kind == "text" and not self._items:
            yield from self._open()
        yield from self._grow(text, told)

    def _end(self) -> Iterator[Event]:
        for found in self._reader.end() if self._reader is not None else ():
            yield from self._found(*found, {})
        if not self._items:
            yield from self._open()
        called = self._reader is not None and self._reader.complete
        yield from self._close("completed" if called else self._status)

    def _open(self, name: str | None = None) -> Iterator[Event]:
        item = Item(len(self._items), name)
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=item.place, item=item.told())
        if name is None:
            yield self._event("response.content_part.added", **_at(item), part=_part(""))

    def _grow(self, text: str, told: Event) -> Iterator[Event]:
        item = self._items[-1]
        item.text += text
        if item.name is None:
            yield self._event("response.output_text.delta", **_at(item), delta=text, logprobs=[], **told)
        else:
            yield self._event("response.function_call_arguments.delta", **_at(item), delta=text, **told)

    def _close(self, status: str) -> Iterator[Event]:
        """The item that is under way, if one is."""
        if not self._items or self._items[-1].status != "in_progress":
            return
        item = self._items[-1]
        item.status = status
        if item.name is None:
            yield self._event("response.output_text.done", **_at(item), text=item.text, logprobs=[])
            yield self._event("response.content_part.done", **_at(item), part=_part(item.text))
        else:
            done = {"name": item.name, "arguments": item.text}
            yield self._event("response.function_call_arguments.done", **_at(item), **done)
        yield self._event("response.output_item.done", output_index=item.place, item=item.told())

    def broken(self, error: ApiError) -> Iterable[Event]:
        told = {"code": error.code or "server_error", "message": error.message}
        yield self._event("response.failed", response={**self._response("failed"), "error": told})

    def _whole(self) -> Event:
        status = self._status
        usage = self.tally.usage()
        return {
            **self._response(status),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [item.told() for item in self._items],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            **self.tally.medusa(self._detail),
        }

    @property
    def _status(self) -> str:
        return "incomplete" if self.tally.choices[0].finish_reason == "length" else "completed"

    def _event(self, kind: str, **more: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def _response(self, status: str) -> Event:
        return {**self._head, "status": status, "output": [], "usage": None}


def _at(item: Item) -> Event:
    content = {"content_index": 0} if item.name is None else {}
    return {"item_id": item.id, "output_index": item.place, **content}


def _part(text: str) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _format(asked: ResponsesRequest) -> Event:
    given = asked.text.format if asked.text is not None else None
    if given is None or given.type != "json_schema":
        return {"type": "text" if given is None else given.type}
    return given.model_dump(by_alias=True)


def _choice(asked: ResponsesRequest) -> str | Event:
    if asked.tool_choice is None:
        return "auto" if asked.tools else "none"
    return asked.tool_choice if isinstance(asked.tool_choice, str) else asked.tool_choice.model_dump()
