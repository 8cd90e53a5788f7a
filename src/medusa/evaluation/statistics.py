"""From answers to figures: rates over all prompts, per category, with bootstrap intervals.

Rates are totals over totals, so a long answer weighs more than a short one. The prefill is left out. Of a method and
plain decoding on the same questions:

    tokens per step = decoded tokens / forward passes      overhead = seconds per pass / plain seconds per pass
    speed-up        = tokens per second / plain ones       = tokens per step / overhead
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medusa.evaluation.methods import PHASES, PLAIN
from medusa.evaluation.quality import repetition

RESAMPLES = 2000
CONFIDENCE = 0.95
DEEPEST = 8

Answer = dict[str, Any]  # of `Measured.as_json`


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one method. Intervals hold 95% of bootstrap resamples of the questions. None: the method cannot know."""

    tokens_per_second: float
    tokens_per_second_with_prefill: float
    tokens_per_step: float | None
    milliseconds_per_step: float | None
    overhead: float | None
    speedup: float
    speedup_interval: tuple[float, float]
    identical: int  # answers equal to those of plain decoding
    total: int  # answers
    repetition: float | None  # share of tokens that end four in a row which stood in their answer before; mean
    ttft_seconds: float  # mean
    new_tokens: int
    steps: int | None
    peak_bytes: int | None
    phases: dict[str, float] | None  # milliseconds per step
    depths: tuple[tuple[int, int], ...]  # [d - 1]: steps drafted at least d deep, and accepted so
    drafters: dict[str, tuple[int, int]]  # nodes verified, nodes accepted

    @property
    def reached(self) -> tuple[float, ...]:
        """[d - 1]: share of steps that accepted at least d drafted tokens, to the DEEPEST that is shown."""
        return tuple(right / self.steps for _, right in self.depths[:DEEPEST]) if self.steps else ()

    @property
    def accepted(self) -> dict[str, float]:
        """Share of each drafter's nodes that were accepted."""
        return {name: right / nodes for name, (nodes, right) in self.drafters.items() if nodes}


def answers(rows: Sequence[dict[str, Any]], method: str) -> list[list[Answer]]:
    """The answers of a method, by question and turn."""
    return [[turn[method] for turn in row["turns"]] for row in rows]


def figures(rows: Sequence[dict[str, Any]], method: str) -> Figures:
    """What `rows` (of `bench.run_bench`) say of a method."""
    ours, plain = answers(rows, method), answers(rows, PLAIN)
    flat = [answer for turns in ours for answer in turns]
    base = [answer for turns in plain for answer in turns]
    tokens, seconds = _sum(flat, "decoded_tokens"), _sum(flat, "decode_seconds")
    rate = _ratio(tokens, seconds)
    plain_rate = _ratio(_sum(base, "decoded_tokens"), _sum(base, "decode_seconds"))
    speedup = _ratio(rate, plain_rate)
    steps = None if any(answer["steps"] is None for answer in flat) else _sum(flat, "steps")
    per_step = None if steps is None else _ratio(tokens, steps)
    step_seconds = None if steps is None else _ratio(seconds, steps)
    overhead = None
    if per_step is not None and step_seconds is not None:
        overhead = _ratio(step_seconds, _ratio(_sum(base, "decode_seconds"), _sum(base, "steps")))
        # Plain decoding gives one token in each step, so the two ways to the speed-up must agree.
        product = _ratio(per_step, overhead)
        if not (math.isnan(product) or math.isclose(product, speedup, rel_tol=1e-6)):
            raise AssertionError(f"{method}: speed-up {speedup}, but tokens per step / overhead = {product}")
    phases = None
    if steps and all(answer["phases"] is not None for answer in flat):
        phases = {name: 1e3 * sum(answer["phases"][name] for answer in flat) / steps for name in PHASES}
    peaks = [answer["peak_bytes"] for answer in flat if answer["peak_bytes"]]
    return Figures(
        tokens_per_second=rate,
        tokens_per_second_with_prefill=_ratio(_sum(flat, "new_tokens"), seconds + _sum(flat, "ttft_seconds")),
        tokens_per_step=per_step,
        milliseconds_per_step=None if step_seconds is None else 1e3 * step_seconds,
        overhead=overhead,
        speedup=speedup,
        speedup_interval=interval(ours, plain),
        identical=sum(_same(a, b) for a, b in zip(flat, base, strict=True)),
        total=len(flat),
        repetition=_repetition(flat),
        ttft_seconds=_sum(flat, "ttft_seconds") / len(flat),
        new_tokens=int(_sum(flat, "new_tokens")),
        steps=None if steps is None else int(steps),
        peak_bytes=max(peaks, default=None),
        phases=phases,
        depths=_depths(flat),
        drafters=_drafters(flat),
    )


def interval(ours: Sequence[Sequence[Answer]], plain: Sequence[Sequence[Answer]], seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of the speed-up; whole questions are drawn, since turns of one belong together.
    NaN for a single question, which says nothing of others."""
    if len(ours) < 2:
        return math.nan, math.nan
    table = np.array(
        [
            [_sum(a, "decoded_tokens"), _sum(a, "decode_seconds"), _sum(b, "decoded_tokens"), _sum(b, "decode_seconds")]
            for a, b in zip(ours, plain, strict=True)
        ]
    )  # [Q, 4]
    drawn = np.random.default_rng(seed).integers(len(table), size=(RESAMPLES, len(table)))
    tokens, seconds, base_tokens, base_seconds = table[drawn].sum(axis=1).T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (tokens / seconds) / (base_tokens / base_seconds)
    ratios = ratios[np.isfinite(ratios)]
    if not len(ratios):
        return math.nan, math.nan
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def categories(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by category, in the order of the questions."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["category"], []).append(row)
    return found


def _sum(some: Sequence[Answer], name: str) -> float:
    return math.fsum(answer[name] for answer in some)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _same(a: Answer, b: Answer) -> bool:
    if a["token_ids"] is None or b["token_ids"] is None:
        return bool(a["text"] == b["text"])
    return bool(a["token_ids"] == b["token_ids"])


def _repetition(flat: Sequence[Answer]) -> float | None:
    found = [repetition(answer["token_ids"]) for answer in flat if answer["token_ids"]]
    return sum(found) / len(found) if found else None


def _depths(flat: Sequence[Answer]) -> tuple[tuple[int, int], ...]:
    deepest = max((len(answer["depths"]) for answer in flat), default=0)
    return tuple(
        (
            sum(answer["depths"][d][0] for answer in flat if d < len(answer["depths"])),
            sum(answer["depths"][d][1] for answer in flat if d < len(answer["depths"])),
        )
        for d in range(deepest)
    )


def _drafters(flat: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    names = sorted({name for answer in flat for name in answer["drafters"]})
    pairs = {name: [answer["drafters"].get(name, [0, 0]) for answer in flat] for name in names}
    return {name: (sum(p[0] for p in some), sum(p[1] for p in some)) for name, some in pairs.items()}
