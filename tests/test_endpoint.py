"""Distilling from an OpenAI-compatible endpoint: the real client, over the network, against a small server."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from medusa.cli import main
from medusa.errors import MedusaError
from medusa.training.distill import DistillSettings, Prompt
from medusa.training.endpoint import distill_remotely
from medusa.training.openings import FIRST, LATER, PROGRAMMING
from tiny_models import CHAT_TEMPLATE, make_tokenizer

pytest.importorskip("openai")
SETTINGS = DistillSettings(tokens=400, max_answer_tokens=60)


@dataclass
class Server:
    """Says something that follows from what it is asked. `refuse` is a status for every other request, and `refused` a
    text whose requests are bad ones; `ends` is how a user's turn ends."""

    url: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refuse: int = 0
    refused: str = "\0"
    ends: str = ", please?"
    thoughts: str = ""

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        seed = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if path.endswith("/chat/completions"):
            cut = int(seed[0], 16) < 3
            if "mute" in body["messages"][-1]["content"]:
                return {"choices": []}
            said = "naughty" if "naughty" in body["messages"][-1]["content"] else "no other"
            message = {"role": "assistant", "content": f"The answer is {seed[:12]} and {said}."}
            if self.thoughts:
                message["reasoning_content"] = self.thoughts
            return {"choices": [{"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}]}
        assert path.endswith("/completions")
        if body["prompt"].endswith("\n"):  # after a colon
            assert "\n" not in body["stop"]
            return {"choices": [{"index": 0, "text": f"line {seed[:5]}\nand another one", "finish_reason": "stop"}]}
        opened = body["prompt"].rpartition("<|start|>user: ")[2]
        assert opened in (*FIRST, *PROGRAMMING, *LATER)
        assert "\n" in body["stop"]
        return {"choices": [{"index": 0, "text": f" {seed[:10]}{self.ends}", "finish_reason": "stop"}]}


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((self.path, body))
            status = state.refuse if state.refuse and len(state.asked) % 2 else 200
            status = 400 if state.refused in json.dumps(body) else status
            reply = (
                {"error": {"message": "not today, nor in 4096 years" if status == 400 else "not today"}}
                if status != 200
                else state.reply(self.path, body)
            )
            reply |= {"id": "1", "object": "completion", "created": 1, "model": body["model"]}
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def local_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model's directory holds nothing but its tokenizer."""
    monkeypatch.setattr("medusa.models.zoo.load_tokenizer", lambda source: make_tokenizer())


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_model_behind_an_endpoint_asks_and_answers(server: Server, tmp_path: Path) -> None:
    written = distill_remotely(server.url, "org/big", tmp_path / "a.jsonl", SETTINGS, served_model="big", parallel=5)
    rows = rows_of(tmp_path / "a.jsonl")
    assert written.tokens >= 400
    assert all(body["model"] == "big" for _, body in server.asked)
    assert any(len(row["labels"]) > 1 for row in rows)
    tokenizer = make_tokenizer()
    for row in rows:
        users = [m["content"] for m in row["messages"] if m["role"] == "user"]
        assert all(user.startswith(LATER if turn else (*FIRST, *PROGRAMMING)) for turn, user in enumerate(users))
        assert row["model"] == "org/big"
        assert row["settings"]["backend"] == "endpoint"
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        for i, (start, end) in enumerate(row["labels"]):
            text = tokenizer.decode(row["token_ids"][start:end])
            if i == len(said) - 1 and not text.endswith("<|end|>"):
                assert said[i] == text  # cut short: nothing says that it ends
            else:
                assert text == said[i] + "<|end|>"
    # The same settings give the same rows, however many requests are under way.
    distill_remotely(server.url, "org/big", tmp_path / "b.jsonl", SETTINGS, served_model="big", parallel=1)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_prompts_are_answered_turn_by_turn(server: Server, tmp_path: Path) -> None:
    prompts = [Prompt(("Hello there?", "And then?")), Prompt(("Something else?",))]
    written = distill_remotely(
        server.url, "org/big", tmp_path / "a.jsonl", SETTINGS, served_model="org/big", prompts=prompts
    )
    assert written.rows == 2
    assert all(path.endswith("/chat/completions") for path, _ in server.asked)
    assert rows_of(tmp_path / "a.jsonl")[0]["messages"][0]["content"] == "Hello there?"


def test_an_endpoint_that_stumbles_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.refuse = 503
    written = distill_remotely(server.url, "m", tmp_path / "a.jsonl", SETTINGS, served_model="m", parallel=1)
    assert written.tokens >= 400


def test_an_endpoint_that_refuses_is_named(server: Server, tmp_path: Path) -> None:
    server.refuse = 401
    with pytest.raises(MedusaError, match=r"refuses: .*not today"):
        distill_remotely(server.url, "m", tmp_path / "a.jsonl", SETTINGS, served_model="m", parallel=1)


def test_nobody_at_the_endpoint_is_one_clear_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa.remote.RETRIES", 0)
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--out", str(tmp_path / "a.jsonl"), "--endpoint", "http://127.0.0.1:9/v1", "--model", "org/m"])
    assert ended.value.code == 1
    assert "cannot reach http://127.0.0.1:9/v1: is the server running" in capfd.readouterr().err


def test_an_announced_text_is_asked_for(server: Server, tmp_path: Path) -> None:
    server.ends = " says:"
    distill_remotely(server.url, "m", tmp_path / "a.jsonl", SETTINGS, served_model="m", parallel=4)
    said = [row["messages"][0]["content"] for row in rows_of(tmp_path / "a.jsonl")]
    assert all(re.search(r" says:\nline .*\nand another one$", text) for text in said)


REFUSING = CHAT_TEMPLATE.replace(
    "<|start|>{{", "{% if 'naughty' in m['content'] %}{{ raise_exception('naughty') }}{% endif %}<|start|>{{"
)


def test_a_conversation_that_cannot_be_used_is_dropped_and_the_run_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template does not take what was said, or the endpoint not what is asked."""
    monkeypatch.setattr("medusa.models.zoo.load_tokenizer", lambda source: make_tokenizer(REFUSING))
    server.refused = "far too long"
    prompts = [Prompt((f"Is it {word}?",)) for word in ("nice", "naughty", "far too long", "good", "mute")]
    written = distill_remotely(server.url, "m", tmp_path / "a.jsonl", SETTINGS, served_model="m", prompts=prompts)
    assert [row["number"] for row in rows_of(tmp_path / "a.jsonl")] == [0, 3]
    assert sorted(written.dropped.values()) == [1, 1, 1]
    assert written.dropped["the endpoint replied without an answer"] == 1
    assert written.dropped["the chat template of m refuses it: naughty"] == 1
    assert any(re.match(r"refused by the endpoint: .*not today, nor in N years", reason) for reason in written.dropped)


def test_answers_without_their_thoughts_are_not_learned_from(server: Server, tmp_path: Path) -> None:
    server.thoughts = "Hm, what is it?"
    prompts = [Prompt(("Is it nice?",))]
    written = distill_remotely(server.url, "m", tmp_path / "a.jsonl", SETTINGS, served_model="m", prompts=prompts)
    assert rows_of(tmp_path / "a.jsonl") == []
    assert list(written.dropped) == ["the endpoint takes thoughts out of the answer: turn its reasoning parser off"]


def test_a_run_of_conversations_that_cannot_be_used_ends(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa.models.zoo.load_tokenizer", lambda source: make_tokenizer(REFUSING))
    server.ends = " naughty?"
    with pytest.raises(
        MedusaError, match=r"of the last 200 conversations 200 were dropped \(200 the chat template of m"
    ):
        distill_remotely(server.url, "m", tmp_path / "a.jsonl", SETTINGS, served_model="m", parallel=4)
