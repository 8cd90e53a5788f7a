"""Distilling from an OpenAI-compatible endpoint: the real client, over the network, against a small server."""

from __future__ import annotations

import hashlib
import json
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
from tiny_models import make_tokenizer

pytest.importorskip("openai")
SETTINGS = DistillSettings(tokens=400, max_answer_tokens=60)


@dataclass
class Server:
    """Says something that follows from what it is asked. `refuse` is a status for every other request."""

    url: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refuse: int = 0

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        seed = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if path.endswith("/chat/completions"):
            cut = int(seed[0], 16) < 3
            message = {"role": "assistant", "content": f"The answer is {seed[:12]} and no other."}
            return {"choices": [{"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}]}
        assert path.endswith("/completions")
        assert body["prompt"].endswith("<|start|>user: ")
        return {"choices": [{"index": 0, "text": f"What is {seed[:10]}, please?", "finish_reason": "stop"}]}


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((self.path, body))
            status = state.refuse if state.refuse and len(state.asked) % 2 else 200
            reply = {"error": {"message": "not today"}} if status != 200 else state.reply(self.path, body)
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
