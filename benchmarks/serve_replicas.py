"""Two servers behind HAProxy, as examples/serve/haproxy.cfg has it: where chats go, and what a dying server costs.

    python benchmarks/serve_replicas.py                                   # the default model
    python benchmarks/serve_replicas.py --model DIR --clients 16 --requests 400

Needs HAProxy 2.6 or later. In turn, all greedy, all of it bounded in number:

1. Chats of three turns with one system prompt: is each chat answered by one replica, out of what it still holds? Other
   chats beside them, with replicas that take turns.
2. A client that leaves in the middle of a stream: does the replica stop?
3. Clients, half of whom stream, while a replica is killed (KILL) and started again; then once more while it is told to
   end (TERM). Each answer is compared with the one to the same question before; what fails is counted.
4. All first turns again: does each chat go where it went before?

Seconds are told and prove nothing. The last line is one line of JSON; the exit code is 1 where something was not as
docs/scaling.md says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_client import CutError, Reply, Running, free_port, post, serving

ROOT = Path(__file__).parent.parent
CONFIGURATION = ROOT / "examples" / "serve" / "haproxy.cfg"
PROMPTS = Path(__file__).with_name("prompts.txt")
SYSTEM = "You answer in short and simple sentences. You never make anything up. You are kind, and you like examples."
TURNS = ("", "Say it in other words.", "Give an example.")
PATH = "/v1/chat/completions"


def configuration(port: int, replicas: list[int], balance: str = "") -> str:
    """The one that ships, with ports of this trial and the name of the replica in each answer; with another way to
    choose one, where it is given."""
    text = CONFIGURATION.read_text(encoding="utf-8")
    changes = {"127.0.0.1:8000": f"127.0.0.1:{port}"}
    changes |= {f"127.0.0.1:{8001 + i}": f"127.0.0.1:{replica}" for i, replica in enumerate(replicas)}
    changes["    default_backend replicas\n"] = (
        "    http-response set-header X-Replica %s\n    default_backend replicas\n"
    )
    if balance:
        changes["balance hash var(txn.key)"] = f"balance {balance}"
    for old, new in changes.items():
        if text.count(old) != 1:
            raise SystemExit(f"{CONFIGURATION} no longer says {old!r} once: this script must follow it")
        text = text.replace(old, new)
    return text


@contextmanager
def balancing(replicas: list[int], balance: str = "") -> Iterator[int]:
    """HAProxy in a process of its own; the port it listens on."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise SystemExit("this trial needs HAProxy 2.6 or later, which is not there: install the package haproxy")
    with tempfile.TemporaryDirectory() as directory:
        port, file = free_port(), Path(directory) / "haproxy.cfg"
        file.write_text(configuration(port, replicas, balance), encoding="utf-8")
        process = subprocess.Popen([program, "-q", "-f", str(file)])
        try:
            asyncio.run(until_answered(port))
            yield port
        finally:
            process.terminate()
            process.wait(30)


async def until_answered(port: int, replica: str = "") -> None:
    """Until the balancer sends what is asked to a replica that answers; to this one, where it is named."""
    end = time.monotonic() + 120
    number = 0
    while time.monotonic() < end:
        number += 1
        with suppress(CutError, OSError, asyncio.TimeoutError):
            body = {"prompt": f"{number}", "max_tokens": 1, "temperature": 0}
            reply = await post(port, "/v1/completions", body, 60)
            if reply.status == 200 and replica in ("", reply.headers.get("x-replica")):
                return
        await asyncio.sleep(0.05)
    raise SystemExit(f"no answer from {replica or 'any replica'}")


@dataclass(frozen=True, slots=True)
class Told:
    """An answer: its text, who gave it, and how much of the prompt was held already."""

    text: str
    replica: str
    cached: int
    prompt: int


def told(reply: Reply) -> Told:
    """Raises CutError for an answer that is not whole."""
    if reply.status != 200:
        raise CutError(f"status {reply.status}: {reply.body[:200]!r}")
    if reply.events or reply.headers.get("content-type", "").startswith("text/event-stream"):
        if not reply.done:
            raise CutError("the stream ended without [DONE]")
        choices = [choice for event in reply.events for choice in event["choices"]]
        if not any(choice["finish_reason"] for choice in choices):
            raise CutError(f"the stream tells no end: {reply.events[-1]}")
        text, usage = "".join(choice["delta"].get("content") or "" for choice in choices), reply.events[-1]["usage"]
    else:
        text, usage = reply.json["choices"][0]["message"]["content"], reply.json["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Told(text, reply.headers["x-replica"], cached, usage["prompt_tokens"])


def question(messages: list[dict[str, str]], tokens: int, stream: bool) -> dict[str, Any]:
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, **streamed}


@dataclass
class Chat:
    """One conversation: what was asked in each turn, and what came."""

    asked: list[list[dict[str, str]]] = field(default_factory=list)
    answers: list[Told] = field(default_factory=list)


async def chats(port: int, count: int, tokens: int, first: int = 0) -> list[Chat]:
    """Conversations, each turn of all, in another order, before the next turn of any: so all are held at once."""
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    made = [Chat() for _ in range(count)]
    for turn in TURNS:
        order = list(enumerate(made, first))
        random.Random(turn).shuffle(order)
        for number, chat in order:
            before = [{"role": "system", "content": SYSTEM}]
            if chat.asked:
                before = [*chat.asked[-1], {"role": "assistant", "content": chat.answers[-1].text}]
            said = turn or f"{lines[number % len(lines)]} ({number})"
            chat.asked.append([*before, {"role": "user", "content": said}])
            chat.answers.append(told(await post(port, PATH, question(chat.asked[-1], tokens, number % 2 == 0))))
    return made


def of_chats(made: list[Chat]) -> dict[str, Any]:
    where = Counter(chat.answers[0].replica for chat in made)
    return {
        "chats": len(made),
        "chats_by_replica": dict(sorted(where.items())),
        "chats_on_one_replica": sum(len({answer.replica for answer in chat.answers}) == 1 for chat in made),
        "cached_of_prompt_by_turn": [
            round(sum(c.answers[turn].cached for c in made) / sum(c.answers[turn].prompt for c in made), 3)
            for turn in range(len(TURNS))
        ],
        "later_turns_from_the_cache": sum(
            now.cached >= before.prompt for c in made for before, now in zip(c.answers, c.answers[1:], strict=False)
        ),
        "later_turns": len(made) * (len(TURNS) - 1),
    }


def answers_under_way(server: Running) -> float:
    name = "medusa_requests_running "
    lines = server.get("/metrics").splitlines()
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


async def leave(port: int, replicas: list[Running]) -> dict[str, Any]:
    """Begins a stream, goes away, and sees who still decodes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(question([{"role": "user", "content": "Count up to a million."}], 2000, True)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await reader.readuntil(b'"content":"')

    def running() -> float:
        return sum(map(answers_under_way, replicas))

    async def until(count: int) -> float:
        end = time.monotonic() + 20
        while (now := await asyncio.to_thread(running)) != count and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return now

    before = await until(1)
    writer.close()
    after = await until(0)
    return {"running_before_leaving": before, "running_after": after}


class Load:
    """Clients that ask what was asked before, and compare."""

    def __init__(self, port: int, known: list[tuple[list[dict[str, str]], str]], tokens: int) -> None:
        self._port = port
        self._known = known
        self._tokens = tokens
        self.begun = 0
        self.counts: Counter[str] = Counter()
        self.replicas: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def client(self, last: int) -> None:
        while self.begun < last:
            number, self.begun = self.begun, self.begun + 1
            messages, text = self._known[number % len(self._known)]
            # Streamed by turns that are no multiple of the questions', so that each is asked in both ways.
            stream = (number + number // len(self._known)) % 2 == 0
            try:
                answer = told(await post(self._port, PATH, question(messages, self._tokens, stream)))
            except (CutError, OSError, asyncio.TimeoutError) as error:
                self.counts["failed, streamed" if stream else "failed, not streamed"] += 1
                self.errors[str(error)[:120] or repr(error)] += 1
                continue
            self.counts["whole"] += 1
            self.counts["other text"] += answer.text != text
            self.replicas[answer.replica] += 1

    @property
    def ended(self) -> int:
        return self.counts["whole"] + self.counts["failed, streamed"] + self.counts["failed, not streamed"]

    async def until(self, ended: int) -> None:
        while self.ended < ended:
            await asyncio.sleep(0.005)


async def under_load(load: Load, clients: int, requests: int, victim: Running, death: signal.Signals) -> dict[str, Any]:
    """A third of the requests, then the death, as soon as there is something to lose, then the rest."""
    assert victim.process is not None
    begun = time.monotonic()
    working = asyncio.gather(*(load.client(requests) for _ in range(clients)))
    await load.until(requests // 3)
    end = time.monotonic() + 10
    while (lost := await asyncio.to_thread(answers_under_way, victim)) < 2 and time.monotonic() < end:
        pass
    victim.process.send_signal(death)
    at, failed = load.begun, load.ended - load.counts["whole"]
    await working
    after = load.ended - load.counts["whole"] - failed
    await asyncio.to_thread(victim.process.wait, 60)
    return {
        "death": death.name,
        "clients": clients,
        "requests": requests,
        "asked_before_death": at,
        "under_way_there": lost,
        "failed_before": failed,
        "failed_after": after,
        **{name: load.counts[name] for name in ("whole", "other text", "failed, streamed", "failed, not streamed")},
        "by_replica": dict(sorted(load.replicas.items())),
        "exit_code": victim.process.returncode,
        "what": dict(load.errors),
        "seconds": round(time.monotonic() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--chats", type=int, default=12)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=120, help="with each death")
    parser.add_argument("--tokens", type=int, default=24, help="most of an answer")
    parser.add_argument("--slots", type=int, default=12, help="of a replica; as many chats can be held")
    chosen = parser.parse_args()
    options = ("--model", chosen.model, "--slots", str(chosen.slots), "--threads", "1")
    reports: list[dict[str, Any]] = []

    def report(what: dict[str, Any]) -> dict[str, Any]:
        print(what, flush=True)
        reports.append(what)
        return what

    with ExitStack() as stack:
        ports = [free_port(), free_port()]
        servers = [stack.enter_context(serving(*options, port=port)) for port in ports]
        port = stack.enter_context(balancing(ports))
        made = asyncio.run(chats(port, chosen.chats, chosen.tokens))
        routed = report(of_chats(made))
        with balancing(ports, "roundrobin") as other:
            report({"balance": "roundrobin", **of_chats(asyncio.run(chats(other, chosen.chats, chosen.tokens, 1000)))})
        wrong = routed["chats_on_one_replica"] < len(made) or len(routed["chats_by_replica"]) < 2
        wrong |= routed["later_turns_from_the_cache"] < routed["later_turns"]
        left = report(asyncio.run(leave(port, servers)))
        wrong |= left["running_before_leaving"] != 1 or left["running_after"] > 0
        known = [(asked, answer.text) for c in made for asked, answer in zip(c.asked, c.answers, strict=True)]
        for death in (signal.SIGKILL, signal.SIGTERM):
            load = Load(port, known, chosen.tokens)
            died = report(asyncio.run(under_load(load, chosen.clients, chosen.requests, servers[1], death)))
            wrong |= died["other text"] > 0 or died["failed, not streamed"] > 0
            # What was under way at the one that died, and streamed, is lost; nothing where it was told to end.
            wrong |= died["failed_after"] > (chosen.clients if death == signal.SIGKILL else 0)
            servers[1] = stack.enter_context(serving(*options, port=ports[1]))
            asyncio.run(until_answered(port, "two"))
        again = [asyncio.run(post(port, PATH, question(c.asked[0], chosen.tokens, False))) for c in made]
        same = [
            (now.replica, now.text) == (c.answers[0].replica, c.answers[0].text)
            for c, now in zip(made, map(told, again), strict=True)
        ]
        wrong |= report({"chats_where_they_were_before": sum(same), "of": len(same)})["of"] > sum(same)
    print(json.dumps(reports))
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
