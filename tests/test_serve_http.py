# ruff: noqa: E402  # the server's packages are an extra: without them these tests are skipped
"""What stands before the routes, and a real server on the loopback address: keys, hosts, sizes, disconnects, signals,
and the official client."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

for package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(package)
openai = pytest.importorskip("openai")

from medusa.errors import MedusaError, UsageError
from medusa.serve.engine import Engine
from medusa.serve.guard import Keys
from medusa.serve.run import JsonLines
from medusa.serve.settings import ServerSettings
from serving import Client, listening, model, server, wait_for

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


# --- the guard --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[Client]:
    with server(keys=["key-1", "key-2"]) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer key-", "Basic key-1", "Bearer key-1x"])
def test_every_route_with_texts_asks_for_a_key(locked: Client, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    error = locked.post(path, {}, 401, **headers)["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_any_of_the_keys_opens_and_health_needs_none(locked: Client) -> None:
    for key in ("key-1", "key-2"):
        answer = locked.http.get("/v1/models", headers={"Authorization": f"bearer {key}"})
        assert answer.status_code == 200
    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert locked.http.get(path).status_code == 200
    for path in ("/v1/models", "/detokenize", "/v1/nothing", "/page", "/docs"):
        assert locked.http.get(path).status_code == 401


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nkey-1\n\n  key-2  \n")
    keys = Keys.read(str(file))
    assert keys
    assert [keys.client(f"Bearer {key}") is not None for key in ("key-1", "key-2", "# ours", "")] == [1, 1, 0, 0]
    monkeypatch.setenv("MEDUSA_API_KEY", "from-there")
    assert Keys.read(None).client("Bearer from-there")
    monkeypatch.delenv("MEDUSA_API_KEY")
    assert not Keys.read(None)
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="holds no key"):
        Keys.read(str(file))
    with pytest.raises(MedusaError, match="cannot read the keys"):
        Keys.read(str(tmp_path / "nowhere"))


def test_a_server_on_this_machine_is_called_by_its_own_names_alone() -> None:
    """Else a page could reach it by a name of its own that points here."""
    with server() as client:
        for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 400)):
            assert client.http.get("/v1/models", headers={"Host": host}).status_code == status
    with server(host="0.0.0.0", allowed_hosts=("llm.example",)) as client:
        for host, status in (("LLM.example:80", 200), ("localhost", 400)):
            assert client.http.get("/v1/models", headers={"Host": host}).status_code == status


def test_pages_of_other_sites_are_refused_and_told_nothing_of_cors() -> None:
    with server() as client:
        for origin, status in (
            ("http://localhost", 200),
            ("https://evil.example", 403),
            ("null", 403),
            ("http://[", 403),
        ):
            answer = client.http.get("/v1/models", headers={"Origin": origin})
            assert answer.status_code == status
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_long_body_is_refused_however_it_comes() -> None:
    with server(max_body=1000) as client:
        long = json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]}).encode()
        json_type = {"Content-Type": "application/json"}
        whole = client.http.post("/v1/chat/completions", content=long, headers=json_type)
        parts = client.http.post("/v1/chat/completions", content=iter([long[:600], long[600:]]), headers=json_type)
        for answer in (whole, parts):
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
        told = client.http.get("/v1/models", headers={"Content-Length": "9" * 5000})
        assert told.status_code == 413


def test_the_log_has_a_line_for_each_request_and_no_texts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medusa.serve")
    with server(keys=["key-1"]) as client:
        headers = {"Authorization": "Bearer key-1", "X-Request-Id": "mine-1"}
        answer = client.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 9}, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        bad = client.http.get("/health", headers={"X-Request-Id": 'a"\x7f b'})
        assert bad.headers["x-request-id"].startswith("req-")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.message == "request"]
    assert lines[0]["request"] == "mine-1"
    assert (lines[0]["method"], lines[0]["path"], lines[0]["status"]) == ("POST", "/v1/chat/completions", 200)
    everything = "".join(JsonLines().format(record) for record in caplog.records)
    assert "Hello" not in everything
    assert "key-1" not in everything
    assert answer.json()["choices"][0]["message"]["content"] not in everything


def test_texts_are_in_the_log_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medusa.serve")
    with server(log_texts=True) as client:
        said = client.chat(max_tokens=9)["choices"][0]["message"]["content"]
    texts = {record.message: record.texts for record in caplog.records if hasattr(record, "texts")}
    assert "Hello" in texts["prompt"][0]
    assert texts["answer"] == [said]


def test_an_error_of_ours_is_told_without_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    with server(lm) as client:
        monkeypatch.setattr(lm, "encode", lambda *_, **__: 1 / 0)
        error = client.chat(status=500)["error"]
        assert error["type"] == "server_error"
        assert "division" not in error["message"]
        monkeypatch.undo()
        assert client.chat(max_tokens=2)


def test_an_answer_that_breaks_on_the_way_ends_with_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model()
    monkeypatch.setattr(lm.stepper, "step", lambda rows: 1 / 0)
    with server(lm) as client:
        answer = client.http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
        last = answer.text.strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        answer = client.http.post("/v1/responses", json={"input": "Hello", "stream": True})
        last = answer.text.strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["response"]["error"]["code"] == "internal_error"
        assert client.chat(status=500)["error"]["code"] == "internal_error"


def test_a_server_that_ends_is_not_ready_and_says_when_to_come_back() -> None:
    with server() as client:
        assert client.http.get("/ready").json() == {"status": "ready"}
        client.engine.refuse()
        assert client.http.get("/ready").status_code == 503
        assert client.http.get("/health").status_code == 200
        answer = client.http.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", 1), ("::1", 1), ("localhost", 1), ("0.0.0.0", 0), ("x", 0)])
def test_which_addresses_are_this_machine_alone(host: str, local: int) -> None:
    assert ServerSettings(host=host).local == bool(local)


# --- on the loopback address ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[str, Engine]]:
    with listening(max_queue=4) as there:
        yield there


@pytest.fixture
def client(there: tuple[str, Engine]) -> Iterator[Any]:
    with openai.OpenAI(base_url=there[0], api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_the_official_client_chats_and_streams(client: Any) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=25, logprobs=True, top_logprobs=2, n=2, seed=3, temperature=1
    )
    assert {choice.finish_reason for choice in whole.choices} == {"stop", "length"}
    assert whole.choices[0].logprobs.content[0].top_logprobs[1].logprob < 0
    events = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=25, n=2, seed=3, temperature=1, stream=True,
            stream_options={"include_usage": True}, extra_body={"medusa": True, "drafter": "none"},
        )
    )  # fmt: skip
    for index in range(2):
        parts = [c.delta.content or "" for event in events for c in event.choices if c.index == index]
        assert "".join(parts) == whole.choices[index].message.content
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    assert events[-1].medusa["accepted"] == 0


def test_the_official_client_completes_responds_and_lists(client: Any) -> None:
    whole = client.completions.create(model="tiny", prompt=["Hello", "You"], max_tokens=9, echo=True)
    parts = client.completions.create(model="tiny", prompt="Hello", max_tokens=9, echo=True, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    asked: dict[str, Any] = {"model": "tiny", "input": "Hello", "temperature": 1, "extra_body": {"seed": 3}}
    answer = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == answer.output_text != ""
    assert kinds[-1] == "response.completed"
    assert [one.id for one in client.models.list()] == ["tiny"]


def test_the_official_client_understands_our_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[])
    assert refused.value.param == "tools"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


def test_a_full_queue_is_told_with_a_time_to_come_back(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="tiny", messages=MESSAGES, n=9, max_tokens=2)
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) > 0


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slot(there: tuple[str, Engine], streamed: bool) -> None:
    url, engine = there
    place = urlsplit(url)
    wait_for(lambda: engine.unfinished == 0)
    step, gate = engine.lm.stepper.step, threading.Event()
    passes: list[int] = []

    def slowly(rows: Any) -> Any:
        passes.append(len(rows))
        gate.wait(0.02)
        return step(rows)

    engine.lm.stepper.step = slowly  # type: ignore[method-assign]
    try:
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=20)
        body = json.dumps({"messages": MESSAGES, "stream": streamed, "n": 2})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: len(passes) > 2)
        assert engine.unfinished == 2
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait_for(lambda: engine.unfinished == 0)
        assert sum(passes) < 300, "two answers of 230 tokens have not been said to their ends"
    finally:
        gate.set()
        engine.lm.stepper.step = step  # type: ignore[method-assign]


def test_forty_clients_that_leave_at_random_leave_nothing_behind(there: tuple[str, Engine]) -> None:
    url, engine = there
    place = urlsplit(url)
    for number in range(40):
        with socket.create_connection((str(place.hostname), place.port), timeout=20) as connection:
            body = json.dumps({"messages": MESSAGES, "stream": number % 2 == 0}).encode()
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            sent = head.encode() + body
            connection.sendall(sent[: len(sent) * (number % 5 + 1) // 5])
            if number % 3:
                connection.settimeout(0.01)
                with suppress(TimeoutError):
                    connection.recv(100)
    wait_for(lambda: engine.unfinished == 0)
    assert engine.trouble() is None
    assert engine.slots.free == engine.lm.backend.num_slots


# --- signals, in a process of its own ---------------------------------------------------------------------------------

PROGRAM = """
    import sys, time
    from medusa.serve.guard import Keys
    from medusa.serve.run import bind, serve, log_to_stderr
    from medusa.serve.settings import ServerSettings
    from serving import model
    lm = model()
    step = lm.stepper.step
    def slowly(rows):
        time.sleep(0.02)
        return step(rows)
    lm.stepper.step = slowly
    log_to_stderr()
    settings = ServerSettings(port=int(sys.argv[1]), temperature=0.0)
    serve(lm, settings, Keys([]), bind(settings))
    print("ended", flush=True)
"""


@contextmanager
def _running(port: int) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(port)]
    running = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: running.poll() is not None or _listens(port), 60)
        yield running
    finally:
        running.kill()
        running.communicate()


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with _running(port) as running:
        yield running, port


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _asking(port: int, body: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    try:
        yield answer
    finally:
        answer.close()
        connection.close()


def test_a_first_signal_loses_no_answer(
    process: tuple[subprocess.Popen[str], int],
) -> None:
    running, port = process
    body = json.dumps({"messages": MESSAGES, "max_tokens": 40, "stream": True, "stop": ["@@"]})
    with _asking(port, body) as answer:
        answer.readline()
        running.send_signal(signal.SIGTERM)
        rest = answer.read().decode()
    assert rest.rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"length"' in rest
    out, err = running.communicate(timeout=30)
    assert running.returncode == 0, err
    assert out == "ended\n"


def test_a_second_signal_ends_at_once(process: tuple[subprocess.Popen[str], int]) -> None:
    running, port = process
    body = json.dumps({"messages": MESSAGES, "stream": True})
    with _asking(port, body) as answer:
        answer.readline()
        running.send_signal(signal.SIGTERM)
        wait_for(lambda: not _listens(port))
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=10)
    assert running.returncode == 0
    assert "Traceback" not in err


def test_a_server_that_was_killed_is_followed_by_one_on_its_port(process: tuple[subprocess.Popen[str], int]) -> None:
    running, port = process
    body = json.dumps({"messages": MESSAGES, "max_tokens": 4, "stream": True})
    with _asking(port, body) as answer:
        answer.readline()
        running.kill()
        running.wait()
        with _running(port), _asking(port, body) as again:  # while the old connection is not yet closed
            assert again.read().decode().rstrip().endswith("data: [DONE]")
