"""What a step needs of each slot, on the device: roots, features, how its row samples. Lengths are the backend's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.decoding.stepper import Row
from medusa.device.noise import signed

_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "epsilon", "delta")


@dataclass(frozen=True, slots=True)
class Needs:
    """Which rules any row of a batch asks for. What none needs is not computed."""

    exact: bool = False
    typical: bool = False
    filters: bool = False
    penalty: bool = False

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Needs:
        samplings = [row.sampling for row in rows]
        warm = [sampling for sampling in samplings if not sampling.greedy]
        return cls(
            exact=any(sampling.acceptance == "exact" for sampling in warm),
            typical=any(sampling.acceptance == "typical" for sampling in warm),
            filters=any(sampling.top_k or sampling.top_p < 1 or sampling.min_p for sampling in warm),
            penalty=any(sampling.repetition_penalty != 1 for sampling in samplings),
        )


class Slots:
    """State of S slots. Row b of a pass is slot b.

    Attributes:
        roots: [S] the token after those in the KV cache, which is decided and not in it.
        features: [S, F*H] of the last token in the cache.
        seeds: [S]; exact, typical: [S], which rule the row asks for (neither: greedy).
        seen: [S, V] the tokens of the text, for the repetition penalty; empty until a row asks for one.
    """

    def __init__(
        self, count: int, vocab_size: int, feature_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.roots = torch.zeros(count, dtype=torch.int64, device=device)
        self.features = torch.zeros(count, feature_size, dtype=dtype, device=device)
        self.seeds = torch.zeros(count, dtype=torch.int64, device=device)
        self.exact = torch.zeros(count, dtype=torch.bool, device=device)
        self.typical = torch.zeros(count, dtype=torch.bool, device=device)
        self.seen = torch.zeros(count, 0, dtype=torch.bool, device=device)
        self._numbers = torch.ones(count, len(_NUMBERS), dtype=torch.float64, device=device)
        self._vocab_size = vocab_size

    def setting(self, name: str, batch: int) -> Tensor:
        """A setting of the first rows, float64 [B, 1, 1]."""
        return self._numbers[:batch, _NUMBERS.index(name), None, None]

    def begin(self, row: Row) -> None:
        """A row starts in its slot: all but the last of its tokens are in the cache. `row.features` are those of the
        last one that is."""
        slot, sampling = row.slot, row.sampling
        self.roots[slot] = row.tokens[-1]
        self.features[slot] = row.features
        self.seeds[slot] = signed(sampling.seed or 0)
        self.exact[slot] = not sampling.greedy and sampling.acceptance == "exact"
        self.typical[slot] = not sampling.greedy and sampling.acceptance == "typical"
        numbers = [float(getattr(sampling, name)) for name in _NUMBERS]
        numbers[0] = numbers[0] or 1.0  # a greedy row's scores are not used, but divided
        self._numbers[slot] = torch.tensor(numbers, dtype=torch.float64)
        if sampling.repetition_penalty != 1:
            if not self.seen.shape[1]:
                self.seen = self.seen.new_zeros(len(self.roots), self._vocab_size)
            self.seen[slot] = False
            self.seen[slot, torch.tensor(row.tokens, device=self.seen.device)] = True

    def saved(self) -> Callable[[], None]:
        """Remembers what a step changes; what it returns puts that back."""
        changing = self.roots, self.features, self.seen
        copies = [tensor.clone() for tensor in changing]

        def restore() -> None:
            for tensor, copy in zip(changing, copies, strict=True):
                tensor.copy_(copy)

        return restore
