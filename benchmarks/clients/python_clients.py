"""LangChain's ChatOpenAI and the command `llm` against a running server; the first thing that is wrong ends it.

pip install langchain-openai llm
python benchmarks/clients/python_clients.py http://127.0.0.1:8000/v1 [langchain] [llm]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

MODEL = "smollm2-135m"


def langchain(url: str) -> None:
    import openai
    from langchain_core.messages import ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, ConfigDict, Field

    class Thing(BaseModel):
        """A thing."""

        model_config = ConfigDict(extra="forbid")
        colour: Literal["red", "blue"]
        number: int = Field(ge=0, le=9)

    @tool
    def get_weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city."""
        return f"rain in {city}"

    def chat(**more: Any) -> ChatOpenAI:
        asked = {"model": MODEL, "base_url": url, "api_key": "none", "temperature": 0, "max_retries": 0, **more}
        return ChatOpenAI(max_tokens=60, **asked)

    answer = chat().invoke("Why is the sky blue?")
    assert answer.text
    assert answer.usage_metadata["output_tokens"] > 0
    streamed = list(chat(stream_usage=True).stream("Why is the sky blue?"))
    assert "".join(piece.text for piece in streamed) == answer.text
    assert any(piece.usage_metadata for piece in streamed)
    seeded = [chat(temperature=1, seed=7).invoke("Tell a story.").text for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert (
        chat(stop=[answer.text[10:14]]).invoke("Why is the sky blue?").text
        == answer.text[: answer.text.index(answer.text[10:14])]
    )
    logprobs = chat(logprobs=True, top_logprobs=2).invoke("Hello").response_metadata["logprobs"]
    assert len(logprobs["content"][0]["top_logprobs"]) == 2
    for method in ("json_schema", "function_calling"):
        for strict in (True, None):
            made = chat().with_structured_output(Thing, method=method, strict=strict).invoke("A red thing, number 3.")
            assert isinstance(made, Thing), method
    tools = chat().bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    called = tools.invoke("How is the weather in Oslo?")
    (call,) = called.tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["city"] in ("Rome", "Oslo")
    whole = None
    for piece in tools.stream("How is the weather in Oslo?"):
        whole = piece if whole is None else whole + piece
    assert whole.tool_calls[0]["args"] == call["args"]
    after = [
        ("user", "How is the weather?"),
        called,
        ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]),
    ]
    assert chat().bind_tools([get_weather]).invoke(after).text is not None
    responses = chat(use_responses_api=True)
    assert responses.invoke("Say hello.").text == "".join(piece.text for piece in responses.stream("Say hello."))
    status = None
    try:
        chat(model="gpt-9").invoke("Hello")
    except openai.NotFoundError as error:
        status = error.status_code
    assert status == 404


def llm(url: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        lines = ["model_id: medusa", f"model_name: {MODEL}", f"api_base: {url}", "supports_schema: true"]
        entry = "- " + "\n  ".join(lines) + "\n"
        Path(home, "extra-openai-models.yaml").write_text(entry, encoding="utf-8")
        environment = {**os.environ, "LLM_USER_PATH": home, "OPENAI_API_KEY": "none", "LLM_LOAD_PLUGINS": ""}

        def ask(*words: str) -> str:
            command = [sys.executable, "-m", "llm", *words]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        settings = ("-m", "medusa", "-o", "temperature", "0", "-o", "max_tokens", "40")
        streamed = ask("prompt", "Why is the sky blue?", *settings)
        assert streamed
        assert streamed == ask("prompt", "Why is the sky blue?", "--no-stream", *settings)
        assert ask("prompt", "And the grass?", "-c", "-o", "max_tokens", "20")
        person = ask(
            "prompt", "A person", "--schema", "age int", "--no-stream", "-m", "medusa", "-o", "temperature", "0"
        )
        assert '"age"' in person, person


if __name__ == "__main__":
    for check in (langchain, llm):
        if not sys.argv[2:] or check.__name__ in sys.argv[2:]:
            check(sys.argv[1])
            print("passed:", check.__name__)
