"""The native engine by itself: time of a pass, agreement with transformers, perplexity of each precision, prefill.

    python benchmarks/native_engine.py [--skip times|quality|prefill ...]

Everything is a median or a ratio within one run. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import medusa
from medusa.engines.times import profile
from medusa.evaluation.quality import every_logits
from medusa.models import zoo

TEXT = Path(__file__).with_name("text.txt")
PRECISIONS = ("float32", "bfloat16", "int8", "int4")


def load(model: str, dtype: str, threads: int | None) -> medusa.LanguageModel:
    return medusa.load(model, heads="none", drafter="none", backend="native", dtype=dtype, threads=threads)


def step_times(model: str, threads: int | None) -> dict[str, Any]:
    """t(N) for each precision, beside what reading the weights takes."""
    report = {}
    for dtype in PRECISIONS:
        result = profile(load(model, dtype, threads).backend, repeats=41)
        one, limit = result.seconds[1], result.limit_seconds
        assert limit is not None
        assert result.bandwidth is not None
        print(f"{dtype}: limit {1e3 * limit:.2f} ms at {result.bandwidth / 1e9:.1f} GB/s")
        for size, seconds in result.seconds.items():
            print(
                f"  {size:3} tokens {1e3 * seconds:7.2f} ms {seconds / one:6.2f} of one {seconds / limit:6.2f} of limit"
            )
        report[dtype] = {
            "bandwidth_gb_per_second": round(result.bandwidth / 1e9, 1),
            "one_token_ms": round(1e3 * one, 2),
            "one_of_limit": round(one / limit, 2),
            "of_one": {size: round(seconds / one, 2) for size, seconds in result.seconds.items()},
        }
    return report


def native_logits(model: medusa.LanguageModel, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of a text, by pieces."""
    backend = model.backend
    first, _ = backend.extend(0, ids[:1])
    rows = [first[None].clone(), *(piece.clone() for piece in every_logits(backend, 0, ids[1:]))]
    backend.release(0)
    return torch.cat(rows)


def quality(model: str, threads: int | None, tokens: int) -> dict[str, Any]:
    """Against transformers in float32: largest difference of logits, same argmax, and perplexity."""
    source = zoo.resolve(model)
    tokenizer = zoo.load_tokenizer(source)
    ids = list(tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"])[:tokens]
    network = zoo.load_model(source, dtype=torch.float32)
    with torch.inference_mode():
        expected = network(torch.tensor([ids])).logits[0]

    def perplexity(logits: torch.Tensor) -> float:
        return math.exp(F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item())

    base = perplexity(expected)
    print(f"\n{len(ids)} tokens; transformers float32: perplexity {base:.3f}")
    report: dict[str, Any] = {"tokens": len(ids), "perplexity": round(base, 3)}
    for dtype in PRECISIONS:
        logits = native_logits(load(model, dtype, threads), ids)
        line = {
            "relative_difference": float((logits - expected).abs().max() / expected.abs().max()),
            "same_argmax": float((logits.argmax(-1) == expected.argmax(-1)).double().mean()),
            "perplexity_change": perplexity(logits) / base - 1,
        }
        report[dtype] = line
        print(
            f"{dtype:9} logits within {line['relative_difference']:.1e} of the largest, "
            f"argmax the same {line['same_argmax']:.2%}, perplexity {line['perplexity_change']:+.2%}"
        )
    return report


def prefill(model: str, threads: int | None, length: int = 512, repeats: int = 7) -> dict[str, Any]:
    """Seconds for a prompt of `length` tokens, native and transformers in turn, both in bfloat16."""
    native = load(model, "bfloat16", threads)
    other = medusa.load(model, heads="none", drafter="none", backend="transformers", threads=threads)
    ids = [(7 * i + 3) % native.backend.vocab_size for i in range(length)]
    seconds: dict[str, list[float]] = {"native": [], "transformers": []}
    for turn in range(repeats + 1):
        for name, lm in (("native", native), ("transformers", other)):
            started = time.perf_counter()
            lm.backend.extend(0, ids)
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
            lm.backend.release(0)
            time.sleep(0.05)  # threads of one engine that still spin are not to slow the other
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"\n{length} tokens of prompt: " + ", ".join(f"{name} {value:.3f} s" for name, value in medians.items()))
    return {name: round(value, 4) for name, value in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=2000, help="of benchmarks/text.txt")
    parser.add_argument("--skip", nargs="*", default=[], choices=("times", "quality", "prefill"))
    args = parser.parse_args()
    report: dict[str, Any] = {}
    if "times" not in args.skip:
        report["times"] = step_times(args.model, args.threads)
    if "quality" not in args.skip:
        report["quality"] = quality(args.model, args.threads, args.tokens)
    if "prefill" not in args.skip:
        report["prefill_seconds"] = prefill(args.model, args.threads)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
