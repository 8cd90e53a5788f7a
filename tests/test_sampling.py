"""The sampler: its settings, its filters against transformers' own, its noise, and the frequencies it gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from helpers import chi_square_p, slow_penalised, slow_probabilities
from medusa.decoding.sampling import (
    Sampling,
    _random_words,
    _winner,
    adjust,
    candidates,
    gumbel_noise,
    penalise,
    rough_noise,
    sample,
)
from medusa.errors import MedusaError, UsageError

# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or at least 1e-6, not -0.1"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or more, not -1"),
        ({"top_p": 0}, r"top_p must be above 0 and at most 1 \(off\), not 0"),
        ({"top_p": 1.01}, "top_p must be"),
        ({"min_p": 1}, r"min_p must be at least 0 \(off\) and below 1, not 1"),
        ({"min_p": -0.1}, "min_p must be"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be above 0 \(1 is off\), not 0"),
        ({"seed": -1}, r"seed must be from 0 to 2\*\*64 - 1, not -1"),
        ({"seed": 2**64}, "seed must be"),
        ({"acceptance": "fast"}, "acceptance must be exact or typical, not fast"),
        ({"epsilon": 1.5}, "epsilon must be from 0 to 1, not 1.5"),
        ({"delta": -1}, "delta must be 0 or more, not -1"),
        ({"delta": math.nan}, "delta must be"),
    ],
)
def test_a_bad_setting_is_refused_with_its_rule(setting: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**setting)


def test_the_limits_themselves_are_good() -> None:
    Sampling(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, epsilon=0, delta=0)
    Sampling(temperature=100, top_k=10**9, top_p=1e-9, min_p=0.999, seed=2**64 - 1, epsilon=1, delta=1e9)


def test_the_default_is_greedy() -> None:
    assert Sampling().greedy
    assert not Sampling(temperature=0.01).greedy


def test_a_missing_seed_is_drawn_and_a_given_one_stays() -> None:
    assert Sampling(seed=7).seeded().seed == 7
    one, two = (Sampling(temperature=0.5).seeded() for _ in range(2))
    assert one.seed is not None
    assert one.seed != two.seed
    assert one.temperature == 0.5


# --- filters ----------------------------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1500},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.001},
    {"min_p": 0.05},
    {"min_p": 0.9},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 1200, "top_p": 0.95, "min_p": 0.01},
    {"top_p": 0.9, "min_p": 0.2},
]


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What `candidates` says, spread over the whole vocabulary."""
    ids, scores = kept(logits, sampling)
    assert len(set(ids.tolist())) == len(ids)
    return torch.zeros(len(logits)).index_put((ids,), torch.softmax(scores, dim=-1))


def kept(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """`candidates` as tensors, and all ids spelt out."""
    ids, scores = candidates(logits, sampling)
    return torch.arange(len(scores)) if ids is None else torch.from_numpy(ids), torch.from_numpy(scores)


# In 3,000 tokens of equal likelihood top-p keeps more than the first 1,024 that the fast path looks at; in steep
# logits it keeps a few.
@pytest.mark.parametrize(("size", "scale"), [(12, 2.0), (3000, 0.1), (3000, 3.0), (1024, 1.0), (1025, 1.0)])
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "none")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_the_distribution_is_that_of_transformers(
    size: int, scale: float, filters: dict[str, float], temperature: float
) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, generator=generator) * scale
    seen = torch.randint(0, size, (1, 40), generator=generator)
    sampling = Sampling(temperature=temperature, repetition_penalty=1.3, **filters)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(temperature)])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    expected = torch.softmax(processors(seen, logits[None].clone()), dim=-1)[0]
    found = distribution(penalise(logits, seen[0].tolist(), 1.3), sampling)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@given(
    st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=16),
    st.sampled_from([0.3, 1.0, 1.9]),
    st.integers(0, 17),
    st.sampled_from([1.0, 0.95, 0.7, 0.2]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_the_distribution_is_that_of_a_slow_reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected, margin = slow_probabilities(logits, sampling)
    assume(margin > 1e-5)
    assert distribution(torch.tensor(logits), sampling).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("filters", [{"top_k": 6}, {"min_p": 1e-12}, {"top_k": 6, "min_p": 1e-12}])
def test_top_p_of_1_drops_nothing_however_unlikely(filters: dict[str, float]) -> None:
    logits = torch.tensor([20.0, 1.0, 0.5, 0.0, -0.5, -1.0])  # all but the first vanish beside 1 in single precision
    ids, _ = kept(logits, Sampling(temperature=1.0, **filters))
    assert sorted(ids.tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.65}, {"top_k": 6, "top_p": 0.65}])
def test_of_equals_at_the_last_place_the_lower_ids_are_kept(filters: dict[str, float]) -> None:
    logits = torch.tensor([0.0, 1.0, -9.0, 0.0, 1.0, 0.0, -9.0, 0.0])
    ids, scores = kept(logits, Sampling(temperature=1.0, **filters))
    assert ids.tolist() == [0, 1, 4]
    assert torch.equal(scores, logits[ids])


def test_half_precision_logits_are_filtered_in_single_precision() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    sampling = Sampling(temperature=0.7, top_p=0.9)
    for half, single in zip(kept(logits, sampling), kept(logits.float(), sampling), strict=True):
        assert half.dtype == single.dtype
        assert torch.equal(half, single)


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=9), st.sets(st.integers(0, 8)), st.floats(0.5, 2))
def test_the_penalty_is_that_of_a_slow_reference(logits: list[float], seen: set[int], penalty: float) -> None:
    seen = {i for i in seen if i < len(logits)} or {0}
    before = torch.tensor(logits)
    after = penalise(before, seen, penalty)
    assert after.tolist() == pytest.approx(slow_penalised(logits, seen, penalty), rel=1e-6)
    assert before.tolist() == logits  # the logits given are not changed


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_position_only() -> None:
    first = gumbel_noise(5, 9, 100)
    state = torch.get_rng_state()
    gumbel_noise(5, 8, 10)
    gumbel_noise(6, 9, 1000)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(gumbel_noise(5, 9, 100), first)
    assert np.array_equal(gumbel_noise(5, 9, 40), first[:40])  # whatever the size of the vocabulary
    others = [gumbel_noise(*key, 100) for key in ((5, 8), (6, 9), (9, 5), (2**64 - 1, 9), (5 + 2**32, 9))]
    assert all(not np.isclose(other, first).any() for other in others)


def test_noise_of_a_seed_stays_what_it_was() -> None:
    assert gumbel_noise(0, 0, 3) == pytest.approx([-1.49545161, -0.35113712, -0.78590678], abs=1e-8)
    assert gumbel_noise(2**64 - 1, 12345, 10)[[0, 9]] == pytest.approx([1.69745208, 0.75995616], abs=1e-8)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 9999), min_size=1), st.booleans())
def test_words_of_a_few_tokens_are_those_of_the_whole_vocabulary(
    seed: int, position: int, ids: list[int], large: bool
) -> None:
    words = _random_words(seed, position, 10**6 if large else 10**4, np.array(ids))  # large: they are made one by one
    assert words.tolist() == _random_words(seed, position, 10**4)[ids].tolist()


def test_noise_is_gumbel_distributed() -> None:
    noise = np.concatenate([gumbel_noise(1, position, 1000) for position in range(100)])
    # exp(-exp(-x)) of Gumbel noise is uniform.
    counts = np.histogram(np.exp(-np.exp(-noise)), bins=20, range=(0, 1))[0].tolist()
    assert chi_square_p(counts, [1 / 20] * 20) > 1e-3
    assert (
        chi_square_p(np.histogram(np.exp(-np.exp(-noise * 1.05)), bins=20, range=(0, 1))[0].tolist(), [0.05] * 20)
        < 1e-6
    )


@pytest.mark.parametrize("raw", [0, 2**64 - 1])
def test_noise_is_finite_at_both_ends_of_the_generator(raw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Extreme:
        def __init__(self, key: np.ndarray) -> None: ...

        def random_raw(self, size: int) -> np.ndarray:
            return np.full(size, raw, dtype=np.uint64)

    monkeypatch.setattr("medusa.decoding.sampling.np.random.Philox", Extreme)
    assert np.isfinite(gumbel_noise(0, 0, 3)).all()


# --- the token: nothing that is left out may change it ----------------------------------------------------------------


def plain_noise(words: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52))


def plain_kept(scores: np.ndarray, sampling: Sampling) -> list[int]:
    """The filters on a full sort, of equals the lower id first."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scores - scores[order[0]])
    total = float((weights[order] if sampling.top_k else weights).sum())
    kept, better = [], 0.0
    for i, weight in zip(order.tolist(), weights[order].tolist(), strict=True):
        # The first is kept whatever the others are.
        if kept and (weight < np.float32(sampling.min_p) or (sampling.top_p < 1 and better >= sampling.top_p * total)):
            break
        kept.append(i)
        better += weight
    return kept


def plain_sample(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """argmax(scores + noise) with the noise of every token, as the definition has it."""
    assert sampling.seed is not None
    scores = (logits / sampling.temperature).numpy()
    philox = np.random.Philox(key=np.array([sampling.seed, position], dtype=np.uint64))
    keys = scores.astype(np.float64) + plain_noise(philox.random_raw(len(scores)))
    ids = sorted(plain_kept(scores, sampling))
    return ids[int(keys[ids].argmax())]


ROWS = {
    "normal": lambda rng, size: 3 * rng.normal(size=size),
    "flat": lambda rng, size: np.full(size, rng.normal()),
    "nearly flat": lambda rng, size: rng.normal(size=size) * 1e-3,
    "two steps": lambda rng, size: 5.0 * (rng.random(size) < 0.5),
    "peaked": lambda rng, size: rng.normal(size=size) + 30 * (np.arange(size) == rng.integers(size)),
    "wide": lambda rng, size: rng.normal(size=size) * 1e6,
    "far off": lambda rng, size: rng.normal(size=size) - 1e5,
    "ties": lambda rng, size: np.round(2 * rng.normal(size=size)),
    "masked": lambda rng, size: np.where(rng.random(size) < 0.9, -np.inf, rng.normal(size=size)),
    "one left": lambda rng, size: np.where(np.arange(size) == rng.integers(size), 0.0, -np.inf),
    "none left": lambda rng, size: np.full(size, -np.inf),
    "lowest": lambda rng, size: np.full(size, np.finfo(np.float32).min),
    "ends": lambda rng, size: rng.choice([-3e38, 0.0, 3e38], size=size),
}


def row_of(kind: str, size: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(ROWS[kind](np.random.default_rng(seed), size).astype(np.float32))


@pytest.mark.parametrize("kind", ROWS)
@given(
    size=st.sampled_from([2, 3, 40, 1000, 4097, 50_000]) | st.integers(2, 5000),
    temperature=st.sampled_from([1e-6, 1e-3, 0.1, 0.7, 1.0, 1.5, 30.0, 1e6]),
    filters=st.sampled_from([{}, {}, {}, *FILTERS]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_the_token_is_that_of_the_plain_formula(
    kind: str, size: int, temperature: float, filters: dict[str, float], seed: int, position: int
) -> None:
    logits = row_of(kind, size, seed % 1000)
    sampling = Sampling(temperature=temperature, seed=seed, **filters)
    with np.errstate(all="ignore"):
        expected = plain_sample(logits, sampling, position)
    assert sample(logits, sampling, position) == expected


@pytest.mark.parametrize("filters", [f for f in FILTERS if f], ids=str)
def test_the_kept_are_those_of_a_full_sort(filters: dict[str, float]) -> None:
    for kind in ("normal", "nearly flat", "two steps", "peaked", "ties"):
        for temperature in (0.3, 0.7, 1.5):
            logits, sampling = row_of(kind, 50_000, 0), Sampling(temperature=temperature, **filters)
            expected = sorted(plain_kept((logits / temperature).numpy(), sampling))
            assert kept(logits, sampling)[0].tolist() == expected


any_score = st.floats(width=32, allow_nan=False) | st.floats(-50, 50, width=32) | st.integers(-2, 2).map(float)
any_word = st.integers(0, 2**64 - 1) | st.integers(0, 8191) | st.integers(2**64 - 8192, 2**64 - 1)


@given(st.lists(st.tuples(any_score, any_word), min_size=1, max_size=40), st.sampled_from([0.0, 1e4, -1e6, 1e8, 1e12]))
def test_the_winner_is_that_of_the_plain_formula_for_any_scores_and_words(
    pairs: list[tuple[float, int]], offset: float
) -> None:
    scores = np.array([score for score, _ in pairs], dtype=np.float32) + np.float32(offset)
    words = np.array([word for _, word in pairs], dtype=np.uint64)
    assert _winner(scores, words) == (scores.astype(np.float64) + plain_noise(words)).argmax()


@pytest.mark.parametrize("kind", ["normal", "flat", "nearly flat", "two steps", "peaked", "ties"])
def test_noise_is_computed_for_few_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def gumbel(words: np.ndarray) -> np.ndarray:
        counts.append(len(words))
        return plain_noise(words)

    monkeypatch.setattr("medusa.decoding.sampling._gumbel", gumbel)
    for position in range(50):
        sample(row_of(kind, 50_000, position), Sampling(temperature=0.7, seed=1), position)
    assert sum(counts) / 50 < 10


def test_rough_noise_is_the_noise_to_a_few_thousandths_and_never_without_end() -> None:
    exact = np.concatenate([gumbel_noise(3, position, 50_000) for position in range(20)])
    rough = np.concatenate([rough_noise(3, position, 50_000) for position in range(20)])
    assert rough.dtype == np.float32
    assert np.isfinite(rough).all()
    usual = exact < 12  # above, the 24 bits of the rough one are few
    assert np.abs(rough - exact)[usual].max() < 0.01
    assert np.abs(rough - exact).max() < 1
    assert (rough_noise(3, 7, 50_000, np.array([4, 40_000])) == rough_noise(3, 7, 50_000)[[4, 40_000]]).all()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_score_without_end_is_drawn(filters: dict[str, float]) -> None:
    logits = row_of("normal", 2000, 0)
    logits[77] = math.inf
    assert sample(logits, Sampling(temperature=0.7, seed=1, **filters), 5) == 77


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_score_that_is_no_number_is_an_error_and_no_token(filters: dict[str, float]) -> None:
    logits = row_of("normal", 2000, 0)
    logits[77] = math.nan
    with pytest.raises(MedusaError, match="not finite"):
        sample(logits, Sampling(temperature=0.7, seed=1, **filters), 5)


# --- samples ----------------------------------------------------------------------------------------------------------

LOGITS = [1.5, -0.3, 0.8, 0.0, 2.0, -2.0, 0.4, 1.1, -1.0, 0.9, -0.6, 1.9]
SETTINGS = [
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.6, seed=3),
    Sampling(temperature=1.3, top_k=7, seed=3),
    Sampling(temperature=1.0, top_p=0.8, seed=3),
    Sampling(temperature=1.0, min_p=0.3, seed=3),
]


def frequencies(sampling: Sampling, by: str, count: int = 4000) -> list[int]:
    logits, counts = torch.tensor(LOGITS), [0] * len(LOGITS)
    for i in range(count):
        if by == "position":
            counts[sample(logits, sampling, i)] += 1
        else:
            counts[sample(logits, Sampling(temperature=sampling.temperature, top_k=sampling.top_k,
                                           top_p=sampling.top_p, min_p=sampling.min_p, seed=i), 17)] += 1  # fmt: skip
    return counts


@pytest.mark.parametrize("by", ["position", "seed"])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_samples_are_distributed_as_the_model_says(sampling: Sampling, by: str) -> None:
    expected, _ = slow_probabilities(LOGITS, sampling)
    assert chi_square_p(frequencies(sampling, by), expected) > 1e-3


@pytest.mark.parametrize("wrong", [0.8, 1.2])
def test_the_test_of_frequencies_notices_a_wrong_temperature(wrong: float) -> None:
    expected, _ = slow_probabilities(LOGITS, Sampling(temperature=1.0))
    assert chi_square_p(frequencies(Sampling(temperature=wrong, seed=3), "position"), expected) < 1e-6


def test_a_sample_is_never_a_token_that_was_filtered_out() -> None:
    logits = torch.tensor(LOGITS)
    assert {sample(logits, Sampling(temperature=5.0, top_k=2, seed=0), i) for i in range(200)} == {4, 11}
    assert {sample(logits, Sampling(temperature=5.0, top_k=1, seed=0), i) for i in range(50)} == {4}


# --- penalties of what was said, and bias -----------------------------------------------------------------------------


@given(
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.lists(st.integers(0, 3), max_size=9),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.lists(st.tuples(st.integers(0, 3), st.floats(-100, 100)), max_size=3),
)
def test_penalties_count_what_was_said_and_a_bias_is_added(
    logits: list[float], said: list[int], presence: float, frequency: float, bias: list[tuple[int, float]]
) -> None:
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency, logit_bias=tuple(bias))
    before = torch.tensor(logits)
    after = adjust(before, said, sampling)
    for token in range(4):
        expected = logits[token] - presence * (token in said) - frequency * said.count(token)
        expected += sum(value for other, value in bias if other == token)
        assert float(after[token]) == pytest.approx(expected, abs=1e-3)
    assert before.tolist() == torch.tensor(logits).tolist(), "the row is left as it was"


def test_a_bias_for_a_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="logit_bias names the token 9, but the vocabulary has 4"):
        adjust(torch.zeros(4), [], Sampling(logit_bias=((9, 1.0),)))


@pytest.mark.parametrize(
    "change",
    [{"presence_penalty": 2.5}, {"frequency_penalty": -3.0}, {"logit_bias": ((1, 101.0),)}, {"logit_bias": ((1,),)}],
)
def test_penalties_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        Sampling(**change)
