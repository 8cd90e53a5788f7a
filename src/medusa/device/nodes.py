"""How many nodes a step on the device has: of a few sizes the one with the most tokens a second.

All rows of a pass have the same tree, so the choice is one for the batch: expected tokens by what calibration says of
the trees and by how much of that came true lately, over what a step of that size takes on this device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

FADE = 0.97  # of what was observed, with each step
WEIGHT = 2.0  # the prior, that the calibration is right, counts like this many expected tokens


class NodesByTime:
    """Chooses a size for each pass, and learns from what came of it.

    Args:
        gains: nodes -> tokens expected beyond the one that plain decoding gives; 1 -> 0.
        seconds: (rows, nodes) -> what a step takes; asked once for each.
    """

    def __init__(self, gains: Mapping[int, float], seconds: Callable[[int, int], float]) -> None:
        self._gains = dict(gains)
        self._seconds = functools.cache(seconds)
        self._right = 0.0  # decayed count of tokens that were gained
        self._expected = 0.0  # and of those that the calibration expected

    def choose(self, rows: int) -> int:
        """For a pass of so many rows. Where nothing pays it is 1: plain decoding."""
        ratio = (self._right + WEIGHT) / (self._expected + WEIGHT)
        return max(self._gains, key=lambda n: ((1 + ratio * self._gains[n]) / self._seconds(rows, n), -n))

    def learn(self, nodes: int, gained: float) -> None:
        """After a step: how many tokens the mean row gained beyond one. While decoding is plain, what was observed
        fades, so that drafts are tried again in the end."""
        self._right = FADE * self._right + (gained if nodes > 1 else 0.0)
        self._expected = FADE * self._expected + self._gains[nodes]
