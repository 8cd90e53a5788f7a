"""What strangers and accidents do to a server: broken requests, clients that leave, TERM and KILL.

    python benchmarks/serve_faults.py [bodies] [leaving] [term] [kill]

The first thing that is not as it should be ends it.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from serve_client import CutError, Reply, free_port, post, serving

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
USER = [{"role": "user", "content": "Hello"}]
NUMBERS = [
    "-1",
    "-0.0",
    "1e999",
    "-1e999",
    "NaN",
    "1" + "0" * 400,
    "-" + "9" * 5000,
    "2.5",
    "true",
    '"1"',
    "[]",
    "{}",
    "9e18",
    "null",
]
FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "logprobs"),
    *("top_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stream", "model"),
    *("epsilon", "delta", "acceptance", "drafter", "messages", "tools", "tool_choice", "response_format", "medusa"),
)


def broken() -> list[tuple[str, str, bytes]]:
    """Route, what it is, body."""
    whole = json.dumps({"messages": USER}).encode()
    found: list[tuple[str, str, bytes]] = []
    for route in ROUTES:
        found += [
            (route, "nothing", b""),
            (route, "cut JSON", whole[:-3]),
            (route, "no object", b"[1]"),
            (route, "bytes", bytes(range(256))),
            (route, "invalid UTF-8", b'{"messages":[{"role":"user","content":"\xff\xfe\xc0"}]}'),
            (
                route,
                "half a character",
                b'{"prompt":"\\ud800","input":"\\udfff","messages":[{"role":"user","content":"\\ud83d"}]}',
            ),
            (route, "NUL", b'{"prompt":"a\\u0000b","max_tokens":1}'),
            (route, "10 MB", b'{"prompt":"' + b"a" * 10_000_000 + b'"}'),
            (route, "1.9 MB", b'{"prompt":"' + b"word " * 380_000 + b'"}'),
            (route, "deep lists", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
            (route, "deep objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
            (route, "a key twice", b'{"prompt":"a","prompt":"b","max_tokens":1}'),
        ]
    chat = ROUTES[0]
    for name in FIELDS:
        for number in NUMBERS:
            body = f'{{"messages":[{{"role":"user","content":"Hi"}}],"max_tokens":2,"{name}":{number}}}'
            found.append((chat, f"{name}: {number[:12]}", body.encode()))
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    for schema in (
        deep,
        {"$ref": "#"},
        {"type": "object", "properties": {"a" * 70_000: {}}},
        {"enum": []},
        {"pattern": "(a"},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        found.append(
            (chat, "schema", json.dumps({"messages": USER, "max_tokens": 2, "response_format": form}).encode())
        )
    return found


async def bodies(port: int) -> None:
    seen: Counter[int] = Counter()
    for route, what, body in broken():
        try:
            reply = await post(port, route, body, 120)
        except CutError as error:
            raise SystemExit(f"{route}, {what}: {error}") from None
        seen[reply.status] += 1
        if reply.status >= 500 or (reply.status >= 400 and "message" not in reply.json["error"]):
            raise SystemExit(f"{route}, {what}: {reply.status} {reply.body[:300]!r}")
    good = await post(port, ROUTES[0], {"messages": USER, "max_tokens": 3})
    assert good.status == 200, good.body
    print("broken requests:", dict(seen))


async def leaving(port: int, count: int = 200) -> None:
    """Each goes away at a random time, some while they still send."""
    chance = random.Random(0)

    async def one(body: bytes, after: float, sent: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        data = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        writer.write(data[: int(len(data) * sent)])
        with suppress(asyncio.TimeoutError, ConnectionError):
            await asyncio.wait_for(reader.read(2**20), after)
        writer.transport.abort() if chance.random() < 0.5 else writer.close()

    async def some(number: int) -> None:
        for _ in range(number):
            asked = {
                "messages": USER,
                "stream": chance.random() < 0.5,
                "n": chance.choice([1, 1, 3]),
                "max_tokens": 300,
            }
            sent = 1.0 if chance.random() < 0.8 else chance.random()
            await one(json.dumps(asked).encode(), chance.expovariate(2), sent)

    await asyncio.gather(*(some(count // 20) for _ in range(20)))
    good = await post(port, ROUTES[0], {"messages": USER, "max_tokens": 3}, 60)
    assert good.status == 200, good.body


def gauges(text: str) -> dict[str, float]:
    lines = [line.split() for line in text.splitlines() if line.startswith("medusa_requests_")]
    return {line[0]: float(line[1]) for line in lines if line[0].endswith(("running", "waiting"))}


async def under_load(port: int, act: Any) -> Counter[str]:
    """16 clients ask on; then something happens. How their answers ended."""
    ends: Counter[str] = Counter()
    happened = asyncio.Event()

    async def client(number: int) -> None:
        while True:
            body = {"messages": USER, "max_tokens": 60, "stream": number % 2 == 0, "seed": number}
            early = not happened.is_set()
            try:
                reply: Reply = await post(port, ROUTES[0], body)
            except CutError:
                ends["cut, asked before" if early else "cut, asked after"] += 1
                return
            except OSError:
                ends["nobody listened"] += 1
                return
            if reply.status != 200:
                ends[f"status {reply.status}"] += 1
                return
            whole = reply.done if reply.events else bool(reply.json["choices"][0]["finish_reason"])
            ends["whole" if whole else "LOST"] += 1

    working = asyncio.gather(*(client(number) for number in range(16)))
    await asyncio.sleep(5)
    happened.set()
    act()
    await working
    return ends


def main() -> None:
    wanted = sys.argv[1:] or ["bodies", "leaving", "term", "kill"]
    if {"bodies", "leaving"} & set(wanted):
        with serving() as server:
            if "bodies" in wanted:
                asyncio.run(bodies(server.port))
            if "leaving" in wanted:
                asyncio.run(leaving(server.port))
                end = time.monotonic() + 20
                while any(gauges(server.get("/metrics")).values()):
                    assert time.monotonic() < end, gauges(server.get("/metrics"))
                    time.sleep(0.1)
                print("200 clients left: nothing runs or waits")
    if "term" in wanted:
        with serving() as server:
            process = server.process
            assert process is not None
            ends = asyncio.run(under_load(server.port, lambda: process.send_signal(signal.SIGTERM)))
            print("TERM under load:", dict(ends), "exit", process.wait(60))
            assert not ends["LOST"]
            assert not ends["cut, asked before"]
            assert process.returncode == 0
    if "kill" in wanted:
        port = free_port()
        with serving(port=port) as server:
            process = server.process
            assert process is not None
            print("KILL under load:", dict(asyncio.run(under_load(port, process.kill))))
            process.wait()
            begun = time.monotonic()
            with serving(port=port) as again:
                good = asyncio.run(post(again.port, ROUTES[0], {"messages": USER, "max_tokens": 3}))
                assert good.status == 200
                print(f"started again on the same port: ready after {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
