"""Shows that an answer of the server is the same bits whoever else is answered. Not a timing.

    python benchmarks/serve_bits.py [--requests 200] [--model NAME]

Random requests (greedy and seeded, JSON by a schema, tools, several answers, stop strings, log-probabilities, second
turns) are answered alone by a server that keeps nothing, and then again in other orders: with and without drafts, alone
and with 15 others, with a cold and a warm prefix cache, streamed and whole. Each must be the same text, calls, reason
to end and log-probabilities, to the last digit. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from serve_client import Reply, Running, post, serving

PROMPTS = Path(__file__).with_name("prompts.txt")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo", "Paris"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather now", "parameters": CITY}}


def requests(count: int, chance: random.Random) -> list[dict[str, Any]]:
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    made = []
    for _ in range(count):
        messages = [{"role": "user", "content": chance.choice(lines)}]
        if chance.random() < 0.3:
            messages.insert(0, {"role": "system", "content": "You are a friend who answers briefly, and kindly."})
        if chance.random() < 0.3:
            said = {"role": "assistant", "content": "That is a good question. Let me think about it."}
            messages += [said, {"role": "user", "content": chance.choice(["Go on.", "Why?", "Say it again."])}]
        body: dict[str, Any] = {"messages": messages, "max_tokens": chance.randint(4, 32), "temperature": 0}
        if chance.random() < 0.6:
            body |= {"temperature": chance.choice([0.5, 1, 1.5]), "seed": chance.randrange(2**53)}
            body |= chance.choice([{}, {}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"repetition_penalty": 1.2}])
        body |= chance.choice([{}, {}, {}, {"frequency_penalty": 0.5}, {"stop": ["the", "."]}])
        kind = chance.random()
        if kind < 0.15:
            body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}}
        elif kind < 0.3:
            body |= {"tools": [TOOL], "tool_choice": chance.choice(["auto", "required"])}
        if chance.random() < 0.2:
            body["n"] = 2
        if chance.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": 2}
        made.append(body)
    return made


def said(reply: Reply) -> list[Any]:
    """Text, calls, reason to end and log-probabilities of each choice, however they came."""
    if reply.status != 200:
        raise SystemExit(f"status {reply.status}: {reply.body.decode()[:500]}")
    if not reply.events:
        found = []
        for choice in reply.json["choices"]:
            calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
            content = (choice["logprobs"] or {}).get("content")
            found.append([choice["message"]["content"] or "", calls, choice["finish_reason"], content or []])
        return found
    choices: dict[int, list[Any]] = {}
    for event in reply.events:
        for choice in event["choices"]:
            its = choices.setdefault(choice["index"], ["", [], None, []])
            delta = choice["delta"]
            its[0] += delta.get("content") or ""
            for call in delta.get("tool_calls", []):
                if "name" in call["function"]:
                    its[1].append({"name": call["function"]["name"], "arguments": ""})
                its[1][call["index"]]["arguments"] += call["function"]["arguments"]
            its[2] = choice["finish_reason"] or its[2]
            its[3] += (choice["logprobs"] or {}).get("content") or []
    return [choices[index] for index in sorted(choices)]


async def answers(port: int, bodies: list[dict[str, Any]], beside: int, drafters: list[str], seed: int) -> list[Any]:
    """In random order, so many at once, each streamed or not and with one of the drafters by chance."""
    chance = random.Random(seed)
    order = chance.sample(range(len(bodies)), len(bodies))
    found: list[Any] = [None] * len(bodies)

    async def work() -> None:
        while order:
            index = order.pop()
            body = {**bodies[index], "stream": chance.random() < 0.5}
            if drafter := chance.choice(drafters):
                body["drafter"] = drafter
            found[index] = said(await post(port, "/v1/chat/completions", body))

    await asyncio.gather(*(work() for _ in range(beside)))
    return found


def differing(name: str, bodies: list[dict[str, Any]], expected: list[Any], found: list[Any]) -> int:
    wrong = [index for index in range(len(bodies)) if expected[index] != found[index]]
    print(f"{name}: {len(bodies) - len(wrong)} of {len(bodies)} the same", flush=True)
    for index in wrong[:3]:
        print(f"  {json.dumps(bodies[index])}\n  {expected[index]}\n  {found[index]}", flush=True)
    return len(wrong)


def hits(server: Running) -> float:
    lines = server.get("/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("medusa_prefix_cache_hits_total"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="default: the server's")
    chosen = parser.parse_args()
    model = ["--model", chosen.model] if chosen.model else []
    bodies = requests(chosen.requests, random.Random(chosen.seed))
    wrong: dict[str, int] = {}
    expected: list[Any] = []
    rounds = [
        ("cold", ["--cached-tokens", "0", "--slots", "16"], [
            ("alone, with drafts", 1, [""]),
            ("alone, without drafts", 1, ["none"]),
            ("with 15 others, with drafts", 16, [""]),
            ("with 15 others, each with another drafter", 16, ["", "none", "ngram"]),
        ]),
        ("warm", ["--slots", "8"], [
            ("with 15 others, with drafts", 16, [""]),
            ("alone, with drafts", 1, [""]),
            ("with 15 others, without drafts", 16, ["none"]),
        ]),
    ]  # fmt: skip
    begun = time.monotonic()
    warm_hits = 0.0
    for cache, options, passes in rounds:
        with serving(*model, *options) as server:
            for number, (name, beside, drafters) in enumerate(passes):
                found = asyncio.run(answers(server.port, bodies, beside, drafters, chosen.seed + number + len(wrong)))
                expected = expected or found
                wrong[f"{cache}, {name}"] = differing(f"{cache}, {name}", bodies, expected, found)
            warm_hits = hits(server)
    report = {"requests": len(bodies), "differ": wrong, "prefix_cache_hits": warm_hits}
    print(json.dumps({**report, "seconds": round(time.monotonic() - begun)}))
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
