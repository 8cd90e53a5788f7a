"""vLLM's part of scripts/vllm-check: a job in JSON -> token ids, seconds and acceptance counters in JSON.

    python vllm_engine.py JOB RESULT

It runs in vLLM's own environment, where Medusa is not installed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# One process, no calls home. What the user has set stays.
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Answers greedily, one prompt at a time, after one that warms up. With `heads`, Medusa drafts in vLLM."""
    import vllm

    options: dict[str, Any] = {}
    if job["heads"] is not None:
        options["speculative_config"] = {
            "method": "medusa",
            "model": job["heads"],
            "num_speculative_tokens": job["guesses"],
        }
    llm = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_length"],
        max_num_seqs=1,
        enforce_eager=True,  # else it compiles with Triton, which the CPU wheel does not bring
        enable_prefix_caching=False,
        disable_log_stats=False,  # its counters
        **options,
    )
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"])

    def answer(prompt: list[int]) -> Any:
        (output,) = llm.generate({"prompt_token_ids": prompt}, greedy, use_tqdm=False)
        return output

    answer(job["prompts"][0])
    before, answers = counters(llm.get_metrics()), []
    for prompt in job["prompts"]:
        output = answer(prompt)
        times = output.metrics
        seconds = times.last_token_ts - times.first_token_ts  # without the prefill
        answers.append({"token_ids": list(output.outputs[0].token_ids), "seconds": seconds})
    after = counters(llm.get_metrics())
    return {"version": vllm.__version__, "answers": answers, **since(before, after)}


def counters(metrics: list[Any]) -> dict[str, Any]:
    """Drafts so far, and how many of their guesses were accepted at each place of the chain."""
    found: dict[str, Any] = {"drafts": 0, "accepted": []}
    for metric in metrics:
        if metric.name == "vllm:spec_decode_num_drafts":
            found["drafts"] += int(metric.value)
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            found["accepted"] = [int(value) for value in metric.values]
    return found


def since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was counted between the two."""
    earlier = before["accepted"] or [0] * len(after["accepted"])
    return {
        "drafts": after["drafts"] - before["drafts"],
        "accepted": [b - a for a, b in zip(earlier, after["accepted"], strict=True)],
    }


def main() -> None:
    job, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(run(json.loads(job.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main()
