"""examples/serve/haproxy.cfg: which requests go to the same server, and what happens to those of one that dies.

The servers are stubs that say who they are. Needs HAProxy; benchmarks/serve_replicas.py tries it with real ones."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve_client import free_port
from serve_replicas import CONFIGURATION, configuration

PROGRAM = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
with_haproxy = pytest.mark.skipif(PROGRAM is None, reason="HAProxy is not installed")


class Stub:
    """A server that answers with its name; it can hang up instead, or say that it is ending."""

    def __init__(self, name: str) -> None:
        self.seen, self.hang_up, self.status = 0, False, 200
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200 if self.headers["Host"] == "localhost" else 400)

            def do_POST(self) -> None:
                stub.seen += 1
                self.rfile.read(int(self.headers["Content-Length"]))
                if stub.hang_up:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                else:
                    self.answer(stub.status)

            def answer(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:  # of connections that are cut on purpose
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.http.server_address[1])

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def balanced(directory: Path) -> Iterator[tuple[int, list[Stub]]]:
    """The port of a balancer, and its two servers."""
    assert PROGRAM is not None
    stubs = [Stub("one"), Stub("two")]
    port, file = free_port(), directory / "haproxy.cfg"
    file.write_text(configuration(port, [stub.port for stub in stubs]))
    process = subprocess.Popen([PROGRAM, "-q", "-f", str(file)])
    try:
        wait_for(lambda: {ask(port, {"prompt": str(i)}) for i in range(20)} == {"one", "two"})
        for stub in stubs:
            stub.seen = 0
        yield port, stubs
    finally:
        process.kill()
        process.wait(10)
        for stub in stubs:
            stub.close()


def wait_for(done: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def ask(port: int, body: Any, path: str = "/v1/chat/completions") -> str:
    """Who answers; "" where nobody does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
        answer = connection.getresponse()
        assert answer.status == 200, answer.status
        return answer.read().decode()
    except OSError:
        return ""
    finally:
        connection.close()


@pytest.fixture(scope="module")
def balancer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with balanced(tmp_path_factory.mktemp("balancer")) as (port, _):
        yield port


def said(*turns: str, system: str = "") -> list[dict[str, Any]]:
    """A conversation: user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@with_haproxy
def test_all_turns_of_a_chat_go_to_one_server_and_chats_to_both(balancer: int) -> None:
    for system in ("", "Be kind."):
        where = []
        for number in range(24):
            for shape in (list, parts):
                first = said(f'"Who" is\n{number} 中?', system=system)
                later = said(f'"Who" is\n{number} 中?', "Nobody.", "Why?" * number, system=system)
                asked = [ask(balancer, {"messages": shape(messages)}) for messages in (first, later)]
                # Streamed or not, with other settings before or after.
                asked.append(ask(balancer, {"stream": True, "messages": shape(later), "seed": number}))
                assert len(set(asked)) == 1, (number, system)
                where.append(asked[0])
        assert min(where.count("one"), where.count("two")) > 8, system


@with_haproxy
def test_every_interface_has_its_beginning(balancer: int) -> None:
    long = "Once upon a time there was a model that could not count. " * 6
    grows: list[list[dict[str, Any]]] = []
    for number in range(16):
        text = f"{number} {long}"
        grows.append([{"prompt": text}, {"prompt": text + "The end."}])
        grows.append([{"input": text}, {"input": said(text, "No.", "Why?")}, {"input": parts(said(text))}])
        grows.append([{"instructions": "Be kind.", "input": text}, {"instructions": "Be kind.", "input": said(text)}])
    where = [{ask(balancer, body, "/v1/responses") for body in bodies} for bodies in grows]
    assert all(len(servers) == 1 for servers in where)
    assert {server for servers in where for server in servers} == {"one", "two"}


@with_haproxy
def test_a_client_may_name_what_its_requests_share(balancer: int) -> None:
    for name in ("a", "b", "c", "d"):
        bodies = [{"messages": said(str(number)), "prompt_cache_key": name} for number in range(12)]
        assert len({ask(balancer, body) for body in bodies}) == 1


@with_haproxy
def test_what_holds_no_text_goes_by_the_address(balancer: int) -> None:
    bodies = [b"{ no JSON", b"", {"prompt": [1, 2]}, {"prompt": [3]}, {}, {"messages": []}]
    assert len({ask(balancer, body) for body in bodies}) == 1


@with_haproxy
def test_a_request_longer_than_the_balancer_holds_is_still_answered(balancer: int) -> None:
    first = {"messages": said("x" * 100, system="Be kind.")}
    long = {"messages": said("x" * 100, "y" * 1_500_000, "z", system="Be kind.")}
    assert ask(balancer, long) == ask(balancer, first)


@with_haproxy
@pytest.mark.parametrize("trouble", ["hangs up", "is ending", "is gone"])
def test_what_a_server_has_not_answered_is_answered_by_the_other(trouble: str, tmp_path: Path) -> None:
    with balanced(tmp_path) as (port, stubs):
        bodies = [{"messages": said(str(number))} for number in range(16)]
        assert {ask(port, body) for body in bodies} == {"one", "two"}
        seen = stubs[1].seen
        assert seen
        if trouble == "is gone":
            stubs[1].close()
        stubs[1].hang_up, stubs[1].status = trouble == "hangs up", 503
        assert [ask(port, body) for body in bodies] == ["one"] * 16
        assert (stubs[1].seen > seen) == (trouble != "is gone")


@with_haproxy
def test_a_server_that_comes_back_gets_its_own_chats_again(tmp_path: Path) -> None:
    with balanced(tmp_path) as (port, stubs):
        bodies = [{"messages": said(str(number))} for number in range(16)]
        before = [ask(port, body) for body in bodies]
        stubs[1].hang_up = True
        assert {ask(port, body) for body in bodies} == {"one"}
        stubs[1].hang_up = False
        wait_for(lambda: [ask(port, body) for body in bodies] == before)


def test_the_trial_follows_the_configuration_that_ships() -> None:
    text = configuration(1234, [5678, 9012], "roundrobin")
    assert all(new in text for new in ("127.0.0.1:1234", "127.0.0.1:5678", "127.0.0.1:9012", "balance roundrobin"))
    shipped = CONFIGURATION.read_text(encoding="utf-8").splitlines()
    assert len(set(text.splitlines()) - set(shipped)) == 5  # those four, and the name of who answered
