"""The Gumbel noise of `decoding/sampling.py` on any device: numpy's Philox4x64-10, in whole numbers of torch.

torch has no unsigned 64-bit arithmetic on all devices. Products and sums wrap alike with a sign and without; only the
upper half of a product and shifts to the right need care. J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3
(SC 2011).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # what a round adds to the key
_LOW = 0xFFFFFFFF


def signed(value: int) -> int:
    """A whole number below 2**64 as the int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


def random_words(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """The 64-bit words that (seed, position) stands for in numpy's Philox: int64 [..., size].

    `seeds` and `positions` are int64 of one shape [...]; a seed of 2**63 or more is given as `signed`.
    """
    device = seeds.device
    blocks = torch.arange(1, (size + 3) // 4 + 1, device=device)  # the counter is raised before the first block
    # The four numbers of a counter in two pairs: the even ones are multiplied, the odd ones are not.
    even = torch.stack([blocks, torch.zeros_like(blocks)]).expand(*seeds.shape, 2, -1)  # [..., 2, blocks]
    odd = torch.zeros_like(even)
    key = torch.stack([seeds, positions], dim=-1).unsqueeze(-1)  # [..., 2, 1]
    multipliers, weyl = (_constants(numbers, device) for numbers in (_MULTIPLIERS, _WEYL))
    for number in range(ROUNDS):
        high, low = _product(multipliers, even)
        even = high.flip(-2) ^ odd ^ (key + number * weyl)
        odd = low.flip(-2)
    words = torch.stack([even[..., 0, :], odd[..., 0, :], even[..., 1, :], odd[..., 1, :]], dim=-1)
    return words.flatten(-2)[..., :size]


def gumbel_noise(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Float64 [..., size]: for each (seed, position) what `decoding.sampling.gumbel_noise` gives."""
    words = random_words(seeds, positions, size)
    uniform = (((words >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


@cache
def compiled_gumbel_noise() -> Callable[[Tensor, Tensor, int], Tensor]:
    """`gumbel_noise` as one kernel in place of two hundred. For GPUs: in C++, which torch compiles to on a CPU, the
    overflow of a product with a sign is undefined."""
    compiled: Callable[[Tensor, Tensor, int], Tensor] = torch.compile(gumbel_noise, dynamic=True)
    return compiled


def _constants(numbers: tuple[int, int], device: torch.device) -> Tensor:
    """[2, 1], made by fill kernels: a copy from the host could not be captured."""
    return torch.cat([torch.full((1, 1), signed(number), device=device) for number in numbers])


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of a product of unsigned numbers."""
    a_low, a_high = a & _LOW, _upper(a)
    b_low, b_high = b & _LOW, _upper(b)
    cross, other = a_low * b_high, a_high * b_low
    carry = _upper(a_low * b_low) + (cross & _LOW) + (other & _LOW)
    return a_high * b_high + _upper(cross) + _upper(other) + _upper(carry), a * b


def _upper(value: Tensor) -> Tensor:
    return (value >> 32) & _LOW
