"""A server on a tiny model, in this process or on the loopback address, for the tests of `medusa serve`."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from medusa.api import LanguageModel
from medusa.engines.transformers import TransformersBackend
from medusa.serve.app import create_app
from medusa.serve.engine import Engine
from medusa.serve.guard import Keys
from medusa.serve.run import configure
from medusa.serve.settings import ServerSettings
from tiny_lm import make, writer


def model(slots: int = 4, **options: Any) -> LanguageModel:
    options.setdefault("drafter", "ngram")
    # Its own copy: the engine runs it on a thread of its own.
    options.setdefault("backend", TransformersBackend(copy.deepcopy(writer()), num_slots=slots))
    return make(nodes=6, **options)


@contextmanager
def server(lm: LanguageModel | None = None, keys: list[str] | None = None, **settings: Any) -> Iterator[Client]:
    """In this process: a client that calls the application."""
    settings.setdefault("temperature", 0.0)
    app, engine = create_app(lm or model(), ServerSettings(**settings), Keys(keys or []))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield Client(client, engine)


class Client:
    def __init__(self, http: TestClient, engine: Engine) -> None:
        self.http = http
        self.engine = engine

    def chat(self, text: str = "Hello", status: int = 200, **body: Any) -> Any:
        body.setdefault("messages", [{"role": "user", "content": text}])
        return self.post("/v1/chat/completions", body, status)

    def post(self, path: str, body: Any, status: int = 200, **headers: str) -> Any:
        content = json.dumps(body)  # in ASCII: some tests send half characters
        answer = self.http.post(path, content=content, headers={"Content-Type": "application/json", **headers})
        assert answer.status_code == status, answer.text
        return answer.json()

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        answer = self.http.post(path, json={"stream": True, **body})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        if path != "/v1/responses":
            assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def metric(self, name: str, **labels: str) -> float:
        """Of the page that Prometheus reads."""
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        start = f"medusa_{name}{{{shown}}} " if labels else f"medusa_{name} "
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.removeprefix(start)) for line in lines if line.startswith(start)), 0.0)


@contextmanager
def listening(
    lm: LanguageModel | None = None, keys: list[str] | None = None, **settings: Any
) -> Iterator[tuple[str, Engine]]:
    """On the loopback address: the URL of the API, and the engine."""
    chosen = ServerSettings(**{"port": 0, "temperature": 0.0, **settings})
    app, engine = create_app(lm or model(), chosen, Keys(keys or []))
    running = uvicorn.Server(configure(app, chosen))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_for(lambda: running.started)
    try:
        port = running.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1", engine
    finally:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_for(done: Callable[[], object], seconds: float = 20.0) -> None:
    """Until something that other threads do is done."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
