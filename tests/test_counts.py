"""The guard of speed that cannot flake: counts on the real model, never seconds.

A step that gets fewer tokens, makes another pass or copies its logits is found here; how long it takes, in benchmarks.
"""

from __future__ import annotations

import statistics
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

import medusa
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.scheduler import decode

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]
pytest.importorskip("medusa_native")

PROMPTS = (
    "Explain in three sentences how a bicycle stays upright.",
    "Write a Python function that counts the vowels in a string.",
    "Give me a packing list for a weekend in the mountains.",
    "Who wrote Faust, and what is it about?",
    'Translate into Spanish: "The library closes at six."',
    "A train travels 180 km in 2 hours. What is its average speed? Show your work.",
)
TOKENS, NODES = 64, 16
# Tokens per step over the six texts in float32, with the shipped heads.
RECORDED = {"heads": 2.496, "union": 2.676, "ngram": 1.232}


@pytest.fixture(scope="module")
def union() -> medusa.LanguageModel:
    return medusa.load(dtype="float32", backend="native", nodes=NODES, progress=False)


class Counting:
    """A backend or heads that counts what is asked of it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return found(*args, **kwargs)

        return counted


@pytest.mark.parametrize("drafter", RECORDED)
def test_tokens_per_step_are_those_recorded(union: medusa.LanguageModel, drafter: str) -> None:
    stepper = union.make_stepper(drafter)
    stats = [union.generate(prompt, max_new_tokens=TOKENS, stepper=stepper).stats for prompt in PROMPTS]
    found = sum(one.decoded_tokens for one in stats) / sum(one.steps for one in stats)
    assert found == pytest.approx(RECORDED[drafter], rel=0.02)


def test_a_step_is_one_pass_and_a_draft_one_look_at_each_level(union: medusa.LanguageModel) -> None:
    backend, heads = Counting(union.backend), Counting(union.heads)
    drafter = union.make_stepper("heads").drafter
    drafter.heads = heads  # type: ignore[attr-defined]
    stepper = ReferenceStepper(backend, drafter, NODES)  # type: ignore[arg-type]
    steps = list(decode(stepper, union.encode(PROMPTS[0]), max_new_tokens=TOKENS))
    passes = len(steps) - 1
    assert backend.calls["extend"] == backend.calls["release"] == 1
    assert backend.calls["verify"] == backend.calls["keep"] == passes
    assert heads.calls["begin"] <= passes
    assert heads.calls["guess"] <= passes * union.heads.config.num_heads  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "rows"), [({}, 1), ({"temperature": 0.8, "seed": 1}, 8)], ids=["greedy", "sampled"]
)
def test_a_step_holds_on_to_little_and_copies_no_logits(
    union: medusa.LanguageModel, options: dict[str, Any], rows: int
) -> None:
    """Beside what the engine holds there are `rows` of logits at most: sampling works on one of the 16 at a time."""
    stream: Iterator[Any] = union.stream(PROMPTS[0], max_new_tokens=200, ignore_eos=True, **options)
    for _ in range(10):
        next(stream)
    row_bytes = 4 * union.backend.vocab_size
    kept, peaks = [], []
    tracemalloc.start()
    try:
        for _ in range(20):
            before = tracemalloc.take_snapshot()
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            next(stream)
            peaks.append(tracemalloc.get_traced_memory()[1] - held)
            after = tracemalloc.take_snapshot()
            kept.append(sum(change.count_diff for change in after.compare_to(before, "filename")))
    finally:
        tracemalloc.stop()
        stream.close()  # type: ignore[attr-defined]
    assert statistics.median(kept) < 80, "blocks of memory that a step leaves behind"
    assert statistics.median(peaks) < rows * row_bytes
