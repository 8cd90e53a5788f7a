"""From answers to figures: rates over all prompts, per category, with bootstrap intervals.

Rates are totals over totals, so a long answer weighs more than a short one. The prefill is left out. Of a method and
plain decoding on the same questions:

    tokens per step = decoded tokens / forward passes      overhead = seconds per pass / plain seconds per pass
    speed-up        = tokens per second / plain ones       = tokens per step / overhead
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from medusa.evaluation.methods import PHASES, PLAIN
from medusa.evaluation.quality import repetition

RESAMPLES = 2000
CONFIDENCE = 0.95
DEEPEST = 8


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


def answers(rows: Sequence[dict[str, Any]], method: str) -> list[list[dict[str, Any]]]:
    """The answers of a method, by question and turn, as `Measurement.as_json` has them."""
    return [[turn[method] for turn in row["turns"]] for row in rows]


def figures(rows: Sequence[dict[str, Any]], method: str) -> Figures:
    """What `rows` (of `bench.run_bench`) say of a method."""
    ours, plain = answers(rows, method), answers(rows, PLAIN)
    flat, base = list(chain.from_iterable(ours)), list(chain.from_iterable(plain))
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
    repeated = [repetition(answer["token_ids"]) for answer in flat if answer["token_ids"]]
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
        repetition=sum(repeated) / len(repeated) if repeated else None,
        ttft_seconds=_sum(flat, "ttft_seconds") / len(flat),
        new_tokens=int(_sum(flat, "new_tokens")),
        steps=None if steps is None else int(steps),
        peak_bytes=max(peaks, default=None),
        phases=phases,
        depths=_depths(flat),
        drafters=_drafters(flat),
    )


def interval(
    ours: Sequence[Sequence[dict[str, Any]]], plain: Sequence[Sequence[dict[str, Any]]]
) -> tuple[float, float]:
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
    drawn = np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))
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
    by_category: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    return by_category


def _sum(answers: Iterable[dict[str, Any]], name: str) -> float:
    return math.fsum(answer[name] for answer in answers)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    key = "text" if a["token_ids"] is None or b["token_ids"] is None else "token_ids"
    return bool(a[key] == b[key])


def _depths(answers: Sequence[dict[str, Any]]) -> tuple[tuple[int, int], ...]:
    return tuple(map(_summed, zip_longest(*(answer["depths"] for answer in answers), fillvalue=(0, 0))))


def _drafters(answers: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    names = sorted({name for answer in answers for name in answer["drafters"]})
    return {name: _summed(answer["drafters"].get(name, (0, 0)) for answer in answers) for name in names}


def _summed(pairs: Iterable[Sequence[int]]) -> tuple[int, int]:
    firsts, seconds = zip(*pairs, strict=True)
    return sum(firsts), sum(seconds)
