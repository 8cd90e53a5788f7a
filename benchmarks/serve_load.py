"""Clients that chat as fast as they are answered: counts, throughput, latencies and the server's memory.

    python benchmarks/serve_load.py --clients 64 --seconds 120            # starts a server of its own
    python benchmarks/serve_load.py --clients 1 4 16 --port 8080          # one that runs
    python benchmarks/serve_load.py --clients 1 4 16 --drafters "" none   # in turn, on one server
    python benchmarks/serve_load.py --second-turn                         # of a chat of 2,000 tokens

Half of the answers are streamed. An answer is whole where it says how it ended and its stream says that it did; status
429 is waited out as Retry-After says. The client shares the server's cores. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serve_client import CutError, Reply, Running, post, serving

PROMPTS = Path(__file__).with_name("prompts.txt")
TEXT = Path(__file__).with_name("text.txt")


class Seen:
    """What the clients of one run have seen."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.tokens = 0
        self.first: list[float] = []
        self.whole: list[float] = []

    def take(self, reply: Reply, begun: float) -> None:
        if reply.status != 200:
            self.counts["refused with 429" if reply.status == 429 else "errors"] += 1
            if reply.status != 429:
                self.errors[f"{reply.status} {reply.body[:200]!r}"] += 1
            return
        if reply.events:
            reasons = [choice["finish_reason"] for event in reply.events for choice in event["choices"]]
            good = reply.done and any(reasons) and reply.events[-1].get("usage")
            usage = reply.events[-1].get("usage") or {}
            for event, at in zip(reply.events, reply.times, strict=True):
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    self.first.append(at - begun)
                    break
        else:
            good, usage = reply.json["choices"][0]["finish_reason"], reply.json["usage"]
        self.counts["whole" if good else "incomplete"] += 1
        self.tokens += usage.get("completion_tokens", 0)
        self.whole.append(time.perf_counter() - begun)


def percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{share}": round(cuts[share - 1], 3) for share in (50, 90, 99)}


async def client(
    port: int, seen: Seen, chance: random.Random, end: float, chosen: argparse.Namespace, drafter: str
) -> None:
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    while time.perf_counter() < end:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": chance.choice(lines)}],
            "max_tokens": chance.randint(16, chosen.max_tokens),
            **chance.choice(
                [{"temperature": 0}, {"temperature": 0 if chosen.greedy else 1, "seed": chance.getrandbits(32)}]
            ),
        }
        if chance.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if drafter:
            body["drafter"] = drafter
        begun = time.perf_counter()
        try:
            reply = await post(port, "/v1/chat/completions", body)
        except (CutError, OSError, asyncio.TimeoutError) as error:
            seen.counts["incomplete"] += 1
            seen.errors[repr(error)] += 1
            await asyncio.sleep(0.1)
            continue
        seen.take(reply, begun)
        if reply.status == 429:
            await asyncio.sleep(float(reply.headers["retry-after"]) * (0.5 + chance.random()))


async def load(server: Running, clients: int, chosen: argparse.Namespace, drafter: str) -> dict[str, Any]:
    seen, rss = Seen(), []
    begun = time.perf_counter()
    end = begun + chosen.seconds
    chances = [random.Random(f"{chosen.seed} {number}") for number in range(clients)]
    working = asyncio.gather(*(client(server.port, seen, chance, end, chosen, drafter) for chance in chances))
    while not working.done():
        if chosen.rss_every and server.process is not None:
            rss.append(round(server.rss_mb(), 1))
        await asyncio.wait([working], timeout=chosen.rss_every or None)
    await working
    seconds = time.perf_counter() - begun
    report = {
        "clients": clients,
        "drafter": drafter,
        "seconds": round(seconds, 1),
        **seen.counts,
        "tokens_per_second": round(seen.tokens / seconds, 1),
        "first_token_seconds": percentiles(seen.first),
        "answer_seconds": percentiles(seen.whole),
        "rss_mb": rss,
        "what": dict(seen.errors.most_common(5)),
    }
    print({key: value for key, value in report.items() if key != "rss_mb"}, flush=True)
    return report


async def second_turn(server: Running, repeats: int) -> dict[str, Any]:
    """Times to the first token of chats of 2,000 tokens: read whole, and as the next turn of one that was answered."""
    text = TEXT.read_text(encoding="utf-8")
    cold, warm, cached = [], [], []
    for number in range(repeats):
        messages = [{"role": "user", "content": f"{number}. {text[number * 997 :][:8500]} What is this about?"}]
        for times in (cold, warm):
            body = {"messages": messages, "max_tokens": 24, "temperature": 0, "stream": True}
            begun = time.perf_counter()
            reply = await post(server.port, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
            assert reply.status == 200, reply.body
            said = [
                (e["choices"][0]["delta"].get("content"), t)
                for e, t in zip(reply.events, reply.times, strict=True)
                if e["choices"]
            ]
            times.append(next(at for content, at in said if content) - begun)
            messages.append({"role": "assistant", "content": "".join(content or "" for content, _ in said)})
            messages.append({"role": "user", "content": "Say it in other words."})
            usage = reply.events[-1]["usage"]
        cached.append((usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]))
    report = {"cold": statistics.median(cold), "second_turn": statistics.median(warm)}
    return {**report, "ratio": round(report["second_turn"] / report["cold"], 3), "cached_of_prompt": cached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[64])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--drafters", nargs="+", default=[""], help='"": the server\'s')
    parser.add_argument("--turns", type=int, default=1, help="how often all of it is done, in turn")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--greedy", action="store_true", help="no sampling: for servers that draw otherwise")
    parser.add_argument("--port", type=int, nargs="+", default=[], help="servers that run, asked in turn")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rss-every", type=float, default=5, help="seconds; 0: never")
    parser.add_argument("--second-turn", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    reports: list[Any] = []
    with ExitStack() as stack:
        servers = [Running(port, None) for port in chosen.port]
        servers = servers or [stack.enter_context(serving("--slots", str(chosen.slots)))]
        if chosen.second_turn:
            reports.append(asyncio.run(second_turn(servers[0], 5)))
        else:
            for _ in range(chosen.turns):
                for clients in chosen.clients:
                    for server in servers:
                        for drafter in chosen.drafters:
                            report = asyncio.run(load(server, clients, chosen, drafter))
                            reports.append({"port": server.port, **report})
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
