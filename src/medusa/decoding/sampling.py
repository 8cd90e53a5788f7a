"""The distribution that follows from what the user asks of the sampler.

The order of the filters (penalty, temperature, top-k, top-p, min-p) is that of transformers' `generate`, so the
distribution is the same. Nothing here knows of drafts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medusa.errors import MedusaError, UsageError
from medusa.settings import Sampling as Sampling  # to be had here too

if TYPE_CHECKING:
    from torch import Tensor


GREEDY = Sampling()


def penalise(logits: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Repetition penalty of one row: logits [V] of tokens already seen are divided (if positive) or multiplied."""
    import torch

    ids = torch.tensor(sorted(seen), device=logits.device)
    logits = logits.clone()
    score = logits[ids]
    logits[ids] = torch.where(score < 0, score * penalty, score / penalty)
    return logits


def adjust(logits: Tensor, said: Sequence[int], sampling: Sampling) -> Tensor:
    """Presence and frequency penalties for the tokens that the model has said, and the bias, of one row [V] in
    float32; as OpenAI defines them."""
    import torch

    def add(changes: Iterable[tuple[int, float]]) -> None:
        ids, amounts = zip(*changes, strict=True)
        more = torch.tensor(amounts, dtype=logits.dtype, device=logits.device)
        logits.index_add_(0, torch.tensor(ids, device=logits.device), more)

    logits = logits.clone()
    if said and (sampling.presence_penalty or sampling.frequency_penalty):
        presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
        add((token, -(presence + times * frequency)) for token, times in Counter(said).items())
    if sampling.logit_bias:
        for token, _ in sampling.logit_bias:
            if not 0 <= token < len(logits):
                raise UsageError(f"logit_bias names the token {token}, but the vocabulary has {len(logits)}")
        add(sampling.logit_bias)
    return logits


def check_number(score: float) -> None:
    """Of what is greatest: among numbers that are none, one of them is. Raises MedusaError."""
    if score != score:
        raise MedusaError("the model's numbers are not finite here: its weights or this prompt are at fault")


def gumbel_noise(seed: int, position: int, size: int) -> np.ndarray:
    """Gumbel noise [size] that depends on (seed, position) alone.

    `position` is the absolute index of the token to be sampled, so any two decoders that reach it by the same text
    see the same noise, whatever they drafted. Philox is counter-based: no state is carried from token to token.
    """
    return _gumbel(_random_words(seed, position, size))


def rough_noise(seed: int, position: int, size: int, ids: np.ndarray | None = None) -> np.ndarray:
    """The same to a few thousandths, or that of `ids` [C] among it: for guesses, which are made for whole
    vocabularies. float32 and nothing but its basic operations, so that the native engine has the same bits."""
    words = _random_words(seed, position, size)
    words = words if ids is None else words[ids]
    away = ((~words >> np.uint64(40)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)  # 1 - u
    surprise = np.where(away < 2.0**-6, away + away * away * np.float32(0.5), -_rough_log(np.float32(1) - away))
    return -_rough_log(surprise)


def _rough_log(x: np.ndarray) -> np.ndarray:
    """From the exponent, and log(m) = 2 artanh((m - 1) / (m + 1)) of the fraction."""
    bits = x.view(np.int32)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).view(np.float32)
    t = (fraction - np.float32(1)) / (fraction + np.float32(1))
    s = t * t
    series = np.float32(1) + s * (np.float32(1 / 3) + s * (np.float32(0.2) + s * np.float32(1 / 7)))
    log: np.ndarray = ((bits >> 23) - 127).astype(np.float32) * np.float32(math.log(2)) + (t + t) * series
    return log


def sample(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token from a row of logits [V]: argmax(log p + Gumbel noise), which is distributed as p (the Gumbel-max
    trick). `sampling.seed` must be set.

    The noise is that of `gumbel_noise`, but of a large vocabulary nearly none of it is computed: see `_winner`.
    """
    assert sampling.seed is not None
    ids, scores = candidates(logits, sampling)
    if ids is None:
        return _winner(scores, _random_words(sampling.seed, position, len(scores)))
    if len(ids) == 1:
        return int(ids[0])
    return int(ids[_winner(scores, _random_words(sampling.seed, position, logits.shape[-1], ids))])


# --- filters: in numpy, which is quicker than torch on one row; on the CPU, so that all devices draw alike ------------


@np.errstate(invalid="ignore", over="ignore")  # infinite and huge scores
def candidates(logits: Tensor, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """Tokens that may be sampled and their scores, from one row of logits [V] (already penalised).

    Returns:
        ids [C], ascending, or None for all, and scores [C] = logits / temperature, whose softmax is the distribution.
        Where the last place of top-k or top-p falls among equals, the lower ids are kept.
    """
    # Not divided by torch, whose threads would spin on afterwards, on the cores that the native engine needs.
    scores: np.ndarray = logits.detach().float().cpu().numpy() / np.float32(sampling.temperature)
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return None, scores
    # To sort a large vocabulary costs a millisecond; the best 512 nearly always hold all that is kept, and where they
    # do, the answer is the same.
    for count in [sampling.top_k] if sampling.top_k else [512, 4096, len(scores)]:
        best = _best(scores, min(count, len(scores)))
        weights = _weights(best, best[0])
        keep = weights >= sampling.min_p
        if sampling.top_p < 1:  # at 1, rounding would drop the least likely
            total = (weights if sampling.top_k else _weights(scores, best[0])).sum()  # renormalised over the top-k
            better = weights.cumsum() - weights  # the mass of all better tokens
            keep &= better < sampling.top_p * float(total)
        keep[0] = True
        if not keep[-1]:  # what is dropped stays dropped further down
            break
    best = best[keep]
    ids = np.flatnonzero(~(scores < best[-1]))
    if surplus := len(ids) - len(best):  # equals of the last
        ids = np.delete(ids, np.flatnonzero(scores[ids] == best[-1])[-surplus:])
    return ids, scores[ids]


def _weights(scores: np.ndarray, top: np.float32) -> np.ndarray:
    """Probabilities, but for a factor. In double precision, so that what they decide does not depend on whose
    exponential this is: the native engine has its own."""
    weights: np.ndarray = np.exp(scores.astype(np.float64) - np.float64(top))
    return weights


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest of scores [V], in descending order."""
    # Deal the scores to 4 * count piles. At least `count` scores reach the count-th highest top of a pile, and not many
    # more do: few are left to sort.
    piles = min(4 * count, len(scores))
    tops = scores[: len(scores) // piles * piles].reshape(-1, piles).max(axis=0)
    floor = np.partition(tops, -count)[-count]
    return np.sort(scores[np.flatnonzero(~(scores < floor))])[: -count - 1 : -1]


# --- noise ------------------------------------------------------------------------------------------------------------


def _random_words(seed: int, position: int, size: int, ids: np.ndarray | None = None) -> np.ndarray:
    """The 64-bit words [size] that (seed, position) stands for, or those [C] of `ids` among them."""
    philox = np.random.Philox(key=np.array([seed, position], dtype=np.uint64))
    if ids is None or len(ids) * 700 > size:  # a skip, as below, takes as long as 700 words
        words: np.ndarray = philox.random_raw(size)
        return words if ids is None else words[ids]
    # The generator makes blocks of four words and can skip blocks. Word i is in block i // 4.
    words, block = np.empty(len(ids), np.uint64), 0
    for n, i in enumerate(ids.tolist()):
        philox.advance(i // 4 - block)  # back by one, if the last word was of the same block
        words[n] = philox.random_raw(4)[i % 4]
        block = i // 4 + 1
    return words


def _gumbel(words: np.ndarray) -> np.ndarray:
    """Gumbel noise -log(-log(u)) of random words, of which the upper 52 bits make u."""
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # exact, in (0, 1), both ends excluded
    return -np.log(-np.log(uniform))  # type: ignore[no-any-return]


def _winner(scores: np.ndarray, words: np.ndarray) -> int:
    """argmax of scores [C] + _gumbel(words [C]), the first of equals; the sum is computed for few.

    -log(u) >= 1 - u, so -log(-log(u)) <= -log(1 - u): an upper bound of the noise that takes one logarithm, may be
    taken in single precision, and is close where u is near 1, as it is for most winners. The token of the highest
    bound leads; only those whose bound reaches its true value can win. Mostly that is the leader alone.
    """
    away = (~words >> np.uint64(12)).view(np.int64).astype(np.float32) + np.float32(0.5)  # (1 - u) * 2**52
    bounds = scores - np.log(away)  # less 52 log(2)
    leader = int(bounds.argmax())
    truth = float(scores[leader]) + float(_gumbel(words[leader : leader + 1])[0])
    # 1e-4 is several times the error of a logarithm in single precision. The sum may round much more coarsely, but does
    # so on both sides, and rounding keeps the order.
    floor = np.float32(truth - 52 * math.log(2) - 1e-4)
    rivals = np.flatnonzero(~(bounds < floor))  # all, where the floor is not a number
    found = int(rivals[(scores[rivals] + _gumbel(words[rivals])).argmax()])
    check_number(scores[found])
    return found
