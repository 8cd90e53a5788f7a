"""Greedy decoding of MT-bench first turns: transformers' generate, plain, n-gram, heads and union, in one run.

    python benchmarks/mt_bench.py question.jsonl --limit 80 --out report.jsonl

The methods take turns on each prompt, so that drift of the machine hits all alike. Every method runs on the same loaded
weights, but for transformers' generate beside the native engine; each prompt's result is appended to `--out`, and a run
that was cut short goes on where it stopped. The last line printed is one line of JSON. Tokens per second leave the
prefill out for all methods.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import medusa

METHODS = ("transformers", "none", "ngram", "heads", "union")


class FirstTokenTimer:
    """A streamer that notes when transformers' generate has its first token, so that prefill can be left out."""

    def __init__(self) -> None:
        self.seen = 0
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == 2:  # the first call brings the prompt
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def run_transformers(model: medusa.LanguageModel, prompt: str, max_new_tokens: int) -> dict[str, Any]:
    ids = model.encode(prompt)
    timer = FirstTokenTimer()
    network = model.backend.model  # type: ignore[attr-defined]  # of a transformers backend
    out = network.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=timer,
    )
    seconds = time.perf_counter() - timer.first
    tokens = out[0, len(ids) :].tolist()
    return {"tokens": tokens, "steps": len(tokens) - 1, "seconds": seconds}


def run_medusa(model: medusa.LanguageModel, prompt: str, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    done = model.generate(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=0)
    return {"tokens": list(done.token_ids), "steps": done.stats.steps, "seconds": done.stats.decode_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="MT-bench question.jsonl")
    parser.add_argument("--out", type=Path, default=Path("mt_bench_report.jsonl"))
    parser.add_argument("--limit", type=int, default=80, help="how many questions, spread over the categories")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--heads", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--nodes", default="auto", type=lambda text: text if text == "auto" else int(text))
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: exact sampling with seed 0")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    if args.temperature and "transformers" in args.methods:
        parser.error("transformers' generate is greedy here: leave it out of --methods")

    questions = [json.loads(line) for line in args.questions.open(encoding="utf-8")]
    stride = max(1, len(questions) // args.limit)
    questions = questions[::stride][: args.limit]
    model = medusa.load(
        args.model,
        heads=args.heads,
        dtype=args.dtype,
        backend=args.backend,
        nodes=args.nodes,
        threads=args.threads,
    )
    other = model
    if "transformers" in args.methods and model.backend.name != "transformers":
        # In bfloat16 where the engine holds fewer bits: transformers' int8 is slower.
        dtype = "float32" if args.dtype == "float32" else "bfloat16"
        other = medusa.load(args.model, heads="none", dtype=dtype, backend="transformers", threads=args.threads)
    engines = {name: model.with_drafter(name) for name in args.methods if name != "transformers"}

    def run(method: str, prompt: str, max_new_tokens: int) -> dict[str, Any]:
        if method == "transformers":
            return run_transformers(other, prompt, max_new_tokens)
        return run_medusa(engines[method], prompt, max_new_tokens, args.temperature)

    rows = [json.loads(line) for line in args.out.open()] if args.out.exists() else []
    done = {row["question_id"] for row in rows}
    for method in args.methods:
        run(method, "Say hello.", 16)  # warm-up
    for number, question in enumerate(questions):
        if question["question_id"] in done:
            continue
        order = args.methods[number % len(args.methods) :] + args.methods[: number % len(args.methods)]
        results = {method: run(method, question["turns"][0], args.max_new_tokens) for method in order}
        row = {"question_id": question["question_id"], "category": question["category"], "results": results}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(
            f"{number + 1}/{len(questions)} {question['category']}: "
            + ", ".join(f"{m} {len(r['tokens']) / r['seconds']:.1f} tokens/s" for m, r in sorted(results.items())),
            flush=True,
        )
    facts = model.describe()
    report(rows, args, {name: facts[name] for name in ("backend", "dtype", "nodes", "threads")})


def totals(rows: list[dict[str, Any]], method: str) -> tuple[int, int, float]:
    """(tokens from steps, steps, seconds) of a method over all prompts that took a step."""
    results = [row["results"][method] for row in rows if row["results"][method]["steps"]]
    return (
        sum(len(r["tokens"]) - 1 for r in results),
        sum(r["steps"] for r in results),
        sum(r["seconds"] for r in results),
    )


def report(rows: list[dict[str, Any]], args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Prints a table, one by category, and the JSON line. Rates are totals; speed-up and identity are against `none`,
    or the first method where that was left out."""
    against = "none" if "none" in args.methods else args.methods[0]

    def speedup(some: list[dict[str, Any]], method: str) -> float:
        (tokens, _, seconds), (base_tokens, _, base_seconds) = totals(some, method), totals(some, against)
        return (tokens / seconds) / (base_tokens / base_seconds)

    summary: dict[str, dict[str, float]] = {}
    for method in args.methods:
        tokens, steps, seconds = totals(rows, method)
        same = [row["results"][method]["tokens"] == row["results"][against]["tokens"] for row in rows]
        summary[method] = {
            "tokens_per_second": round(tokens / seconds, 1),
            "tokens_per_step": round(tokens / steps, 3),
            "milliseconds_per_step": round(1000 * seconds / steps, 1),
            "speedup": round(speedup(rows, method), 3),
            "identical": sum(same),
            "total": len(rows),
        }
    print(f"\n{'method':14}{'tokens/s':>10}{'tokens/step':>13}{'ms/step':>9}{'speed-up':>10}{'identical':>11}")
    for method, line in summary.items():
        print(
            f"{method:14}{line['tokens_per_second']:10.1f}{line['tokens_per_step']:13.2f}"
            f"{line['milliseconds_per_step']:9.1f}{line['speedup']:9.2f}x{line['identical']:7}/{len(rows)}"
        )
    print(f"\n{'category':14}" + "".join(f"{method:>21}" for method in args.methods) + "    tokens/step, speed-up")
    for category in dict.fromkeys(row["category"] for row in rows):
        some = [row for row in rows if row["category"] == category]
        cells = []
        for method in args.methods:
            tokens, steps, _ = totals(some, method)
            cells.append(f"{tokens / steps:12.2f}{speedup(some, method):8.2f}x")
        print(f"{category:14}" + "".join(cells))
    print(json.dumps({"methods": summary, "settings": settings | {"questions": len(rows)}}))


if __name__ == "__main__":
    main()
