"""What the public Open Responses compliance tests ask, asked of a running server, and held against the published types.

    pip install openresponses-types
    python benchmarks/clients/open_responses.py 8000

The tests' own runner needs Bun and is in no package index: these are its cases by its names, in our words, checked by
the Python types that are generated from the same document. What does not apply must be refused by name.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import openresponses_types as types
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from serve_client import post

PLACE = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
TOOL = {"type": "function", "name": "get_weather", "description": "The weather of a place", "parameters": PLACE}
EVENTS: dict[str, type[BaseModel]] = {
    next(iter(kind.model_fields["type"].annotation)).value: kind  # an enumeration of one
    for name, kind in vars(types).items()
    if name.endswith("StreamingEvent") and "type" in kind.model_fields
}


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


async def ask(port: int, given: Any, **more: Any) -> dict[str, Any]:
    """The response, checked; of a stream, each event too. A small model may ramble: then another seed is asked."""
    for seed in range(20):
        body = {"model": "smollm2-135m", "input": given, "seed": seed, "max_output_tokens": 200, **more}
        reply = await post(port, "/v1/responses", body)
        assert reply.status == 200, reply.body
        found: dict[str, Any] = reply.events[-1]["response"] if more.get("stream") else reply.json
        if found["status"] == "completed":
            break
    for event in reply.events:
        EVENTS[event["type"]].model_validate(event)
    if more.get("stream"):
        kinds = [event["type"] for event in reply.events]
        assert kinds[:2] == ["response.created", "response.in_progress"], kinds
        assert [event["sequence_number"] for event in reply.events] == list(range(len(kinds)))
        if "tool_choice" in more:
            assert "response.function_call_arguments.delta" in kinds
            assert "response.function_call_arguments.done" in kinds
    types.ResponseResource.model_validate(found)
    assert found["status"] == "completed", found
    assert found["output"]
    return found


async def refused(port: int, **body: Any) -> str:
    reply = await post(port, "/v1/responses", {"model": "smollm2-135m", **body})
    assert reply.status == 400, reply.body
    return f"{reply.json['error']['param']}: {reply.json['error']['message']}"


async def main(port: int) -> None:
    await ask(port, [message("Say hello in three words.")])
    print("passed: basic-response")
    await ask(port, [message("Count from 1 to 5.")], stream=True)
    print("passed: streaming-response")
    await ask(port, [message("You are a pirate.", "system"), message("Say hello.")])
    print("passed: system-prompt")
    said = message("Hello Alice! How can I help you?", "assistant")
    await ask(port, [message("My name is Alice."), said, message("What is my name?")])
    print("passed: multi-turn")
    wanted = {"tools": [TOOL], "tool_choice": "required"}
    found = await ask(port, [message("How is the weather in San Francisco?")], **wanted)
    assert found["output"][-1]["type"] == "function_call"
    print("passed: tool-calling (tool_choice: required; a model of this size does not call by itself)")
    await ask(port, [message("How is the weather in San Francisco?")], **wanted, stream=True)
    print("passed: tool-calling-streaming (likewise)")
    named = {**wanted, "tool_choice": {"type": "function", "name": "get_weather"}}
    found = await ask(port, "How is the weather in San Francisco?", **named)
    call = next(item for item in found["output"] if item["type"] == "function_call")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "15 degrees"}
    await ask(port, [message("How is the weather?"), call, output], tools=[TOOL])
    print("passed: function-call-roundtrip")
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    file = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}
    for name, body in {
        "image-input": {"input": [message([picture])]},
        "file-input": {"input": [message([file])]},
        "previous-response-id": {"input": "And then?", "previous_response_id": "resp_1"},
        "file-search": {"input": "Search.", "tools": [{"type": "file_search", "vector_store_ids": ["1"]}]},
        "offline-web-search": {"input": "Search.", "tools": [{"type": "web_search"}]},
    }.items():
        print(f"does not apply, refused: {name} ({await refused(port, **body)})")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
