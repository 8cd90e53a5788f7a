"""A server in a process of its own, and as little of HTTP as asking it takes: the client shares the server's cores."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class CutError(Exception):
    """The connection ended before the answer did."""


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # when each event came
    done: bool = False  # the stream said so

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def post(port: int, path: str, body: Any, seconds: float = 600.0) -> Reply:
    """Raises CutError for an answer that is not whole, OSError where nobody listens, TimeoutError."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await asyncio.wait_for(_post(port, path, content), seconds)


async def _post(port: int, path: str, content: bytes) -> Reply:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        reply = await _head(reader)
        async for piece in _pieces(reader, reply.headers):
            reply.body += piece
            if reply.headers.get("content-type", "").startswith("text/event-stream"):
                _take_events(reply)
        return reply
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise CutError(repr(error)) from None
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _head(reader: asyncio.StreamReader) -> Reply:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    named = [line.partition(":") for line in lines[1:] if line]
    return Reply(int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in named})


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


def _take_events(reply: Reply) -> None:
    *whole, reply.body = reply.body.split(b"\n\n")
    for event in whole:
        for line in event.splitlines():
            if line == b"data: [DONE]":
                reply.done = True
            elif line.startswith(b"data: "):
                reply.events.append(json.loads(line[6:]))
                reply.times.append(time.perf_counter())


@dataclass(frozen=True, slots=True)
class Running:
    port: int
    process: subprocess.Popen[bytes] | None = None  # None: it was there already

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return str(answer.read().decode())

    def rss_mb(self) -> float:
        assert self.process is not None
        pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(*options: str, port: int = 0, command: tuple[str, ...] = (), ready: str = "/ready") -> Iterator[Running]:
    """`medusa serve` with these options, or another server's command; it is ended by TERM."""
    port = port or free_port()
    command = command or (sys.executable, "-m", "medusa.cli", "serve")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port), *options], stdout=log, stderr=log)
        running = Running(port, process)
        try:
            end = time.monotonic() + 300
            while True:
                with suppress(OSError):
                    running.get(ready)
                    break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.1)
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
