"""What a pass takes on this machine, by its tokens and by how long the texts are: what `budget.py` weighs drafts with.

The times come from a profile (`engines/times.py`). While decoding they are corrected by what steps really take, where
that cannot change a text: see `MachineTimes.learn`.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from medusa.errors import UsageError

LONGEST = 64  # nodes up to which times are tabulated; a straight line from there
MOST = 24  # nodes asked of drafters
FEWEST_ASKED = 9  # the root and one chain of the n-gram drafter, whatever a node costs
KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # sizes whose times are corrected; between them in a straight line
PACE = 0.02  # how far (in logarithms) one step moves the time of all sizes, and that of its own
FARTHEST = math.log(3)  # how far a size may move beside the others
EVERY = 8  # steps between two tables

Clock = Callable[[int], float]  # the time of a pass over so many tokens


@dataclass(frozen=True, slots=True)
class PassTimes:
    """`seconds[N - 1]` is the time of a pass over N tokens of one text, after `context` others; it never falls.
    `draft_seconds` is what the drafters that cost time (heads) take for a draft; 0 where there are none. Only ratios
    matter, so any unit will do.

    Longer texts take longer: each further position takes `row_seconds` once for a row (its keys and values are read)
    and `node_seconds` for each token of the pass (which attends to it). 0 where that was not measured.
    """

    seconds: tuple[float, ...]
    draft_seconds: float = 0.0
    context: int = 0
    row_seconds: float = 0.0
    node_seconds: float = 0.0
    more_draft_seconds: float | None = None  # of a draft for one row more in the same batch; None: as for the first

    def __post_init__(self) -> None:
        falls = any(b < a for a, b in zip(self.seconds, self.seconds[1:], strict=False))
        if len(self.seconds) < 2 or falls or not self.seconds[0] > 0 or not self.draft_seconds >= 0:
            raise UsageError("times of passes must be positive and not fall, for 1 token and more")
        if not (self.context >= 0 and self.row_seconds >= 0 and self.node_seconds >= 0):
            raise UsageError("the time of a further position cannot be negative")

    @classmethod
    def measured(
        cls,
        seconds: Mapping[int, float],
        draft_seconds: float = 0.0,
        *,
        context: int = 0,
        far: Mapping[int, float] | None = None,
        far_context: int = 0,
    ) -> PassTimes:
        """Straight lines between the sizes that were measured, of which 1 is one, and on past the last. A time below
        that of fewer tokens is noise, and raised to it.

        `far` holds the times of two sizes after a longer text. What they took more is a row's part and a part of each
        token: two unknowns. A part below zero is noise too.
        """
        sizes = sorted(seconds)
        times: list[float] = []
        for n in range(1, LONGEST + 1):
            right = min(max(1, sum(size < n for size in sizes)), len(sizes) - 1)
            a, b = sizes[max(0, right - 1)], sizes[right]
            slope = (seconds[b] - seconds[a]) / (b - a) if b > a else 0.0
            times.append(max(seconds[a] + slope * (n - a), *times[-1:], 0.0))
        row = node = 0.0
        if far:
            few, many = min(far), max(far)
            more = [(far[n] - times[n - 1]) / (far_context - context) for n in (few, many)]  # for each position
            node = max(0.0, min((more[1] - more[0]) / (many - few), more[1] / many))  # all of it at most
            row = max(0.0, more[0] - few * node)
        return cls(tuple(times), draft_seconds, context, row, node)

    @classmethod
    def typical(cls) -> PassTimes:
        """Where nothing was measured: the native engine in bfloat16 on the machine of docs/decisions.md."""
        return cls.measured({1: 1.0, 4: 1.06, 8: 1.2, 12: 1.6, 16: 2.2, 32: 4.4}, draft_seconds=0.15)

    def __call__(self, nodes: int) -> float:
        if nodes <= len(self.seconds):
            return self.seconds[nodes - 1]
        last, before = self.seconds[-1], self.seconds[-2]
        return last + (nodes - len(self.seconds)) * (last - before)

    def after(self, contexts: Sequence[int]) -> Clock:
        """The time of a pass over so many tokens in all, whose rows follow on texts of these lengths. The tokens are
        taken to attend to the mean of them, so that a node costs the same in each row."""
        total = sum(contexts)
        fixed = self.row_seconds * max(0, total - self.context)
        each = self.node_seconds * max(0.0, total / len(contexts) - self.context)
        return lambda tokens: self(tokens) + fixed + each * tokens

    @property
    def most(self) -> int:
        """How many nodes to ask of drafters, 9 to 24: up to where one more costs a tenth of a pass over one token.

        What is asked for and not verified was drafted in vain. The i-th best node of a tree is right about once in
        2 (i - 1) steps, so nodes past that point pay only in the few steps that are all but certain.
        """
        costly = (n for n in range(FEWEST_ASKED + 1, MOST + 1) if self(n) - self(n - 1) > 0.1 * self(1))
        return next(costly, MOST + 1) - 1

    def draft(self, rows: int) -> float:
        """The time of a draft for so many rows at once: their weights are read once."""
        more = self.draft_seconds if self.more_draft_seconds is None else self.more_draft_seconds
        return self.draft_seconds + (rows - 1) * more if rows else 0.0

    def free_drafts(self) -> PassTimes:
        """The same for drafters that cost no time."""
        return replace(self, draft_seconds=0.0, more_draft_seconds=None)


class Drift:
    """How much slower or faster passes are than a profile says, learnt from what they take: the median, approached by
    small steps of one length, so that a pause of the machine counts no more than any other pass.

    One factor for all sizes, and beside it one for each of `KNOTS`, which stays what it is where no such pass is seen.
    """

    def __init__(self) -> None:
        self._all: float | None = None  # logarithms
        self._knots = [0.0] * len(KNOTS)
        self._draft: float | None = None
        self._more: float | None = None  # of a draft for one row more

    def learn(self, tokens: int, expected: float, seconds: float) -> None:
        """A pass over so many tokens took `seconds`, and `expected` by the profile."""
        ratio = math.log(seconds / expected)
        if self._all is None:
            self._all = ratio
        off = ratio - self._all
        self._all += math.copysign(PACE, off)
        for knot, weight in _between(tokens):
            moved = self._knots[knot] + math.copysign(PACE, off - self._at(tokens)) * weight
            self._knots[knot] = min(max(moved, -FARTHEST), FARTHEST)

    def learn_draft(self, times: PassTimes, rows: int, seconds: float) -> None:
        """The same of a draft that takes time, for so many rows at once."""
        first = times.draft_seconds * math.exp(self._draft or 0.0)
        if rows == 1 or seconds < first:  # for one row it takes no longer than for several
            self._draft = _nearer(self._draft, math.log(seconds / times.draft_seconds))
        if rows > 1:
            more = max(seconds - first, 0.01 * seconds) / (rows - 1)
            self._more = _nearer(self._more, math.log(more / (times.draft(2) - times.draft(1))))

    def of(self, times: PassTimes) -> PassTimes:
        """The times as they are now."""
        whole = math.exp(self._all or 0.0)
        corrected: list[float] = []
        for n, seconds in enumerate(times.seconds, start=1):
            corrected.append(max(seconds * whole * math.exp(self._at(n)), *corrected[-1:], 0.0))
        draft = whole if self._draft is None else math.exp(self._draft)
        more = draft if self._more is None else math.exp(self._more)
        return replace(
            times,
            seconds=tuple(corrected),
            draft_seconds=times.draft_seconds * draft,
            more_draft_seconds=(times.draft(2) - times.draft(1)) * more,
            row_seconds=times.row_seconds * whole,
            node_seconds=times.node_seconds * whole,
        )

    def _at(self, tokens: int) -> float:
        return sum(self._knots[knot] * weight for knot, weight in _between(tokens))


def _nearer(known: float | None, seen: float) -> float:
    """What is known moves a step towards what is seen, which the first time it takes."""
    return seen if known is None else known + math.copysign(PACE, seen - known)


@functools.cache
def _between(tokens: int) -> tuple[tuple[int, float], ...]:
    """The knots beside a number of tokens, with their weights."""
    right = bisect_right(KNOTS, tokens)
    if right == len(KNOTS):
        return ((right - 1, 1.0),)
    share = (tokens - KNOTS[right - 1]) / (KNOTS[right] - KNOTS[right - 1])
    return ((right - 1, 1 - share), (right, share)) if share else ((right - 1, 1.0),)


class MachineTimes:
    """The times of this machine: one value for all who ask, measured when it is first asked for. Whoever holds this
    object has the new value after `refresh`, and what is learnt.

    Args:
        measure: from the cache, or anew where it is given True; None where it cannot be measured just now.
    """

    def __init__(self, measure: Callable[[bool], PassTimes | None]) -> None:
        self._measure = measure
        self._measured: PassTimes | None = None
        self._now: PassTimes | None = None
        self._drift = Drift()
        self._learnt = 0

    @property
    def measured(self) -> PassTimes:
        """As the profile has them: the same from call to call."""
        if self._measured is None:
            self._measured = self._measure(False) or PassTimes.typical()
        return self._measured

    def __call__(self) -> PassTimes:
        """As they are now."""
        if self._now is None:
            self._now = self._drift.of(self.measured) if self._learnt else self.measured
        return self._now

    def refresh(self) -> PassTimes:
        """Measured anew. Where that cannot be done, what was known stays."""
        if (measured := self._measure(True)) is not None:
            self._measured, self._now, self._drift, self._learnt = measured, None, Drift(), 0
        return self()

    def learn(self, tokens: int, contexts: Sequence[int], seconds: float) -> None:
        """A pass over `tokens` in all, of rows that follow on texts of these lengths, took so long. To be told only by
        who decodes texts that do not depend on the number of nodes: it then differs from run to run."""
        self._drift.learn(tokens, self.measured.after(contexts)(tokens), seconds)
        self._learnt += 1
        if self._learnt % EVERY == 0:
            self._now = None

    def learn_draft(self, rows: int, seconds: float) -> None:
        """The same of drafts that take time."""
        if self.measured.draft_seconds:
            self._drift.learn_draft(self.measured, rows, seconds)
