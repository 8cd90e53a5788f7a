"""What the user asks of the sampler, and the distribution that follows from it.

The order of the filters (penalty, temperature, top-k, top-p, min-p) is that of transformers' `generate`, so the
distribution is the same. Nothing here knows of drafts.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from medusa.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

ACCEPTANCE_RULES = ("exact", "typical")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    epsilon and delta are the thresholds of typical acceptance; `exact` is lossless and needs none.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    seed: int | None = None  # None: a new one for each request
    acceptance: Literal["exact", "typical"] = "exact"
    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("temperature", self.greedy or 1e-6 <= self.temperature < math.inf, "0 (greedy) or at least 1e-6"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 (off) and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2**64 - 1"),
            ("acceptance", self.acceptance in ACCEPTANCE_RULES, "exact or typical"),
            ("epsilon", 0 <= self.epsilon <= 1, "from 0 to 1"),
            ("delta", 0 <= self.delta < math.inf, "0 or more"),
        ):
            if not good:
                raise UsageError(f"{name} must be {rule}, not {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def seeded(self) -> Sampling:
        """The same, with a seed drawn from the system where none was given."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))


def penalise(logits: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Repetition penalty of one row: logits [V] of tokens already seen are divided (if positive) or multiplied."""
    import torch

    ids = torch.tensor(sorted(seen), device=logits.device)
    logits = logits.clone()
    score = logits[ids]
    logits[ids] = torch.where(score < 0, score * penalty, score / penalty)
    return logits


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens that may be sampled and their scores, from one row of logits [V] (already penalised).

    Returns:
        ids [C] and scores [C] = logits / temperature, whose softmax is the distribution.
    """
    import torch

    scores = logits.float() / sampling.temperature
    size = scores.shape[-1]
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return torch.arange(size, device=scores.device), scores
    # The full sort of a large vocabulary costs milliseconds; the top 1,024 nearly always hold all that is kept, and
    # where they do, the answer is the same. Top-p is renormalised over the top-k.
    limit = min(sampling.top_k or size, size)
    total = torch.logsumexp(torch.topk(scores, limit).values if sampling.top_k else scores, -1)
    for count in sorted({min(1024, limit), limit}):
        best, ids = torch.topk(scores, count)
        mass = torch.exp(best - total)
        keep = mass >= sampling.min_p * mass[0]
        if sampling.top_p < 1:  # a sum in single precision reaches 1 before its last terms
            keep &= mass.cumsum(-1) - mass < sampling.top_p  # the mass of all better tokens
        keep[0] = True
        if not bool(keep[-1]):  # what is dropped stays dropped further down
            break
    return ids[keep], best[keep]


def gumbel_noise(seed: int, position: int, size: int) -> np.ndarray:
    """Gumbel noise [size] that depends on (seed, position) alone.

    `position` is the absolute index of the token to be sampled, so any two decoders that reach it by the same text
    see the same noise, whatever they drafted. Philox is counter-based: no state is carried from token to token.
    """
    raw = np.random.Philox(key=np.array([seed, position], dtype=np.uint64)).random_raw(size)
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # exact, in (0, 1), both ends excluded
    return -np.log(-np.log(uniform))  # type: ignore[no-any-return]


def sample(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token from a row of logits [V]: argmax(log p + Gumbel noise), which is distributed as p (the Gumbel-max
    trick). `sampling.seed` must be set."""
    import torch

    assert sampling.seed is not None
    ids, scores = candidates(logits, sampling)
    if len(ids) == 1:
        return int(ids[0])
    # In double precision on the CPU, where the noise is made: not every device has it, and all shall draw alike.
    ids, scores = ids.cpu(), scores.cpu().double()
    noise = torch.from_numpy(gumbel_noise(sampling.seed, position, logits.shape[-1]))
    return int(ids[(scores + noise[ids]).argmax()])
