"""The form of /v1/responses: one message of text, whole or as events."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from medusa.serve.errors import ApiError
from medusa.serve.forms import Event
from medusa.serve.jobs import Answers, Front, new_id
from medusa.serve.tally import Tally

if TYPE_CHECKING:
    from medusa.completion import Chunk
    from medusa.serve.schema import ResponsesRequest


class ResponsesForm:
    """See `forms.Form`."""

    def __init__(self, front: Front, answers: Answers, asked: ResponsesRequest) -> None:
        self.tally = Tally(answers, front.lm.tokenizer)
        self._detail = asked.detail
        self._number = 0
        self._item = new_id("msg")
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
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": None,
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
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
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", None))
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def piece(self, index: int, chunk: Chunk) -> Iterable[Event]:
        told = self.tally.step(chunk, self._detail)
        if chunk.text or told:
            yield self._event("response.output_text.delta", **self._place, delta=chunk.text, logprobs=[], **told)

    def closing(self) -> Iterable[Event]:
        text, status = self.tally.choices[0].text, self._status
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._message(status, text))
        yield self._event(f"response.{status}", response=self.whole())

    def broken(self, error: ApiError) -> Iterable[Event]:
        told = {"code": error.code or "server_error", "message": error.message}
        yield self._event("response.failed", response={**self._response("failed"), "error": told})

    def whole(self) -> Event:
        status = self._status
        usage = self.tally.usage()
        return {
            **self._response(status),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._message(status, self.tally.choices[0].text)],
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

    @property
    def _place(self) -> Event:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **more: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def _response(self, status: str) -> Event:
        return {**self._head, "status": status, "output": [], "usage": None}

    def _message(self, status: str, text: str | None) -> Event:
        content = [] if text is None else [_part(text)]
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
