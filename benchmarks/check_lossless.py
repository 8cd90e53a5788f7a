"""Shows on a real model that Medusa changes nothing, and what memory it takes. Not a timing.

    python benchmarks/check_lossless.py [--backend native --dtype bfloat16]     # 20 prompts of 128 tokens

1. Greedy output of the union drafter equals that of plain decoding and, in float32, that of transformers' own generate,
   token for token.
2. Sampled output of the union drafter equals that of plain decoding with the same seed, for 10 seeds.
3. Decoding 2,000 tokens grows the process by the KV cache and nothing else.

A mismatch is shown with the two top logits at that place: rounding can decide a tie, nothing else may.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

import medusa
from medusa.models import zoo


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that differs; None for equal lists."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def margin(network: PreTrainedModel, ids: list[int]) -> float:
    """Difference of the two top logits after `ids`, computed by the model alone."""
    with torch.inference_mode():
        best = network(input_ids=torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def compare(network: PreTrainedModel, name: str, prompt: list[int], a: list[int], b: list[int]) -> bool:
    at = first_difference(a, b)
    if at is None:
        return True
    gap = margin(network, prompt + a[:at])
    print(f"  {name}: differ at token {at}, the two top logits are {gap:.2g} apart", flush=True)
    return gap < 1e-4


def resident_bytes() -> int:
    """Memory the process holds now, where the system tells (Linux); else its peak."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--heads", default="auto")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.txt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    union = medusa.load(args.model, heads=args.heads, backend=args.backend, dtype=args.dtype)
    plain = union.make_stepper("none")
    network = zoo.load_model(zoo.resolve(args.model), dtype=torch.float32)
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()

    equal = steps = tokens = 0
    for prompt in prompts:
        ids = union.encode(prompt)
        ours = union.generate(prompt, max_new_tokens=args.max_new_tokens)
        alone = union.generate(prompt, max_new_tokens=args.max_new_tokens, stepper=plain)
        first = list(ours.token_ids)
        same = compare(network, "union and plain", ids, first, list(alone.token_ids))
        if args.dtype == "float32":
            neutral = {"do_sample": False, "repetition_penalty": 1.0}  # whatever the model's own configuration says
            theirs = network.generate(torch.tensor([ids]), max_new_tokens=args.max_new_tokens, **neutral)
            same &= compare(network, "union and transformers", ids, first, theirs[0, len(ids) :].tolist())
        equal += same
        steps += ours.stats.steps
        tokens += len(first) - 1
        print(f"{'equal' if same else 'DIFFERENT'}: {prompt[:60]}", flush=True)
    print(f"greedy: {equal}/{len(prompts)} prompts equal, {tokens / steps:.2f} tokens per step", flush=True)

    sampled = 0
    for seed in range(args.seeds):
        options = {"temperature": 0.8, "top_p": 0.95, "seed": seed, "max_new_tokens": args.max_new_tokens}
        prompt = prompts[seed % len(prompts)]
        a, b = union.generate(prompt, **options), union.generate(prompt, **options, stepper=plain)
        sampled += a.token_ids == b.token_ids
    print(f"sampling: {sampled}/{args.seeds} seeds equal", flush=True)

    config = network.config
    number = 2 if args.dtype == "bfloat16" or (union.backend.name == "native" and args.dtype != "float32") else 4
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * number
    union.generate(prompts[0], max_new_tokens=64, ignore_eos=True)
    before = resident_bytes()
    done = union.generate(prompts[0], max_new_tokens=2000, ignore_eos=True)
    grown = resident_bytes() - before
    print(
        f"memory: {len(done.token_ids)} tokens grew the process by {grown / 2**20:.0f} MiB; "
        f"their KV cache is {2000 * per_token / 2**20:.0f} MiB"
    )
    sys.exit(0 if equal == len(prompts) and sampled == args.seeds else 1)


if __name__ == "__main__":
    main()
