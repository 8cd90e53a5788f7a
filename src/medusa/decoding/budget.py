"""How many nodes a step verifies: as many as pay, by what the drafters expect and what a pass costs on this machine.

A draft of N nodes is expected to give E(N) = 1 + the sum of its probabilities, best nodes first, in t(N) seconds; the
N with the most tokens per second is verified. Where nothing pays, that is N = 1: plain decoding. Drafters judge
themselves (see `draft.py`), so their probabilities are taken as they are; times come from a measurement made before
(`models/profile.py`), never from a clock while decoding: the same text is drafted the same way again.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from medusa.decoding.draft import Draft, Drafter, Row
from medusa.errors import UsageError

LONGEST = 64  # nodes up to which times are tabulated; a straight line from there
MOST = 24  # nodes asked of drafters
HIGHEST_BAR = 0.5  # nodes that are likelier are too few to look for, which takes time too
USUAL_TOKENS = 2.0  # that the time of a plain pass gives with drafts
FEWEST_ASKED = 9  # the root and one chain of the n-gram drafter, whatever a node costs


@dataclass(frozen=True, slots=True)
class PassTimes:
    """`seconds[N - 1]` is the time of a pass over N tokens; it never falls. `draft_seconds` is what the drafters that
    cost time (heads) take for a draft; 0 where there are none. Only ratios matter, so any unit will do."""

    seconds: tuple[float, ...]
    draft_seconds: float = 0.0

    def __post_init__(self) -> None:
        falls = any(b < a for a, b in zip(self.seconds, self.seconds[1:], strict=False))
        if len(self.seconds) < 2 or falls or not self.seconds[0] > 0 or not self.draft_seconds >= 0:
            raise UsageError("times of passes must be positive and not fall, for 1 token and more")

    @classmethod
    def measured(cls, seconds: Mapping[int, float], draft_seconds: float = 0.0) -> PassTimes:
        """Straight lines between the sizes that were measured, of which 1 is one, and on past the last. A time below
        that of fewer tokens is noise, and raised to it."""
        sizes = sorted(seconds)
        times: list[float] = []
        for n in range(1, LONGEST + 1):
            right = min(max(1, sum(size < n for size in sizes)), len(sizes) - 1)
            a, b = sizes[max(0, right - 1)], sizes[right]
            slope = (seconds[b] - seconds[a]) / (b - a) if b > a else 0.0
            times.append(max(seconds[a] + slope * (n - a), *times[-1:], 0.0))
        return cls(tuple(times), draft_seconds)

    @classmethod
    def typical(cls) -> PassTimes:
        """Where nothing was measured: the native engine in bfloat16 on the machine of docs/decisions.md."""
        return cls.measured({1: 1.0, 4: 1.06, 8: 1.2, 12: 1.6, 16: 2.2, 32: 4.4}, draft_seconds=0.15)

    def __call__(self, nodes: int) -> float:
        if nodes <= len(self.seconds):
            return self.seconds[nodes - 1]
        last, before = self.seconds[-1], self.seconds[-2]
        return last + (nodes - len(self.seconds)) * (last - before)

    @property
    def most(self) -> int:
        """How many nodes to ask of drafters, 9 to 24: up to where one more costs a tenth of a pass over one token.

        What is asked for and not verified was drafted in vain. The i-th best node of a tree is right about once in
        2 (i - 1) steps, so nodes past that point pay only in the few steps that are all but certain.
        """
        costly = (n for n in range(FEWEST_ASKED + 1, MOST + 1) if self(n) - self(n - 1) > 0.1 * self(1))
        return next(costly, MOST + 1) - 1

    def free_drafts(self) -> PassTimes:
        """The same for drafters that cost no time."""
        return replace(self, draft_seconds=0.0)


@dataclass(frozen=True, slots=True)
class Share:
    """What a step verifies: nodes and expected tokens of each row, and the seconds it should take."""

    nodes: tuple[int, ...]
    tokens: tuple[float, ...]
    seconds: float

    @property
    def rate(self) -> float:
        return sum(self.tokens) / self.seconds


@dataclass(slots=True)
class Asking:
    """Whether a drafter that costs time is worth asking, by what asking gained lately (in tokens, the time that it
    costs taken off at the rate of not asking). When it loses it is left alone for 4 steps; then one step tries again,
    and each further loss doubles the pause, up to 32 steps."""

    gain: float = 0.5  # decayed sum; it starts with the benefit of the doubt
    pause: int = 0
    waiting: int = 0

    def due(self) -> bool:
        if self.waiting:
            self.waiting -= 1
            return False
        return True

    def learn(self, gain: float) -> None:
        self.gain = max(0.9 * self.gain + gain, -1.0)  # bounded, so that a few good trials make up for a bad past
        if self.gain >= 0:
            self.pause = 0
        else:
            self.pause = 4 if gain > 0 else min(2 * self.pause or 4, 32)
        self.waiting = self.pause


@dataclass(slots=True)
class Askings:
    """Of one row. What heads add depends most on whether anything else drafts, so the two cases are kept apart."""

    alone: Asking = field(default_factory=Asking)
    beside: Asking = field(default_factory=Asking)


class NodeBudget:
    """Chooses what each step verifies.

    Rows of a batch share one pass: the next node goes to whichever row has the likeliest one left, and so it does
    between the drafters of a union, which are in one tree. Drafters that cost time are asked only where that pays.
    """

    def __init__(self, times: PassTimes) -> None:
        self.times = times
        self.most = times.most
        self.price = USUAL_TOKENS * times.draft_seconds / times(1)  # of a whole draft, in tokens

    @property
    def expected(self) -> int:
        """Nodes of a step where the i-th best node is right once in 2 (i - 1) steps, as in ordinary texts."""
        draft = Draft(
            (0,) * self.most,
            (-1, *[0] * (self.most - 1)),
            (1.0, *(0.5 / i for i in range(1, self.most))),
            ("",) * self.most,
        )
        return self.share([draft], self.times.draft_seconds).nodes[0]

    def share(self, drafts: Sequence[Draft], draft_seconds: float) -> Share:
        """The number of nodes of each draft (see `Draft.pruned`) with the most expected tokens per second."""
        children: list[list[list[int]]] = [[[] for _ in draft.parents] for draft in drafts]
        for draft, lists in zip(drafts, children, strict=True):
            for node, parent in enumerate(draft.parents[1:], start=1):
                lists[parent].append(node)
        counts = [1] * len(drafts)
        tokens = [1.0] * len(drafts)
        total, expected = len(drafts), float(len(drafts))
        best = expected / (self.times(total) + draft_seconds)
        share = tuple(counts), tuple(tokens)
        frontier = [
            (-draft.probabilities[node], b, node)
            for b, draft in enumerate(drafts)
            for node in children[b][0]
        ]  # fmt: skip
        heapq.heapify(frontier)
        while frontier:
            falling, b, node = heapq.heappop(frontier)
            counts[b] += 1
            tokens[b] -= falling
            total, expected = total + 1, expected - falling
            rate = expected / (self.times(total) + draft_seconds)
            if rate > best:
                best, share = rate, (tuple(counts), tuple(tokens))
            for child in children[b][node]:
                heapq.heappush(frontier, (-drafts[b].probabilities[child], b, child))
        return Share(*share, self.times(sum(share[0])) + draft_seconds)

    def bar(self, rows: int) -> float:
        """How likely a node must be to pay in a pass over so many rows, each of which gives a token anyway."""
        return rows * (self.times(rows + 1) - self.times(rows)) / self.times(rows)

    def propose(self, drafter: Drafter, rows: Sequence[Row]) -> list[Draft]:
        """Asks the drafters and prunes what they propose. Where hardly any node could pay, nobody is asked: so many
        rows fill a pass by themselves."""
        if self.bar(len(rows)) > HIGHEST_BAR:
            return [Draft((row.tokens[-1],)) for row in rows]
        cost = self.times.draft_seconds
        if not cost:
            drafts = self._drafts(drafter, rows, frugal=False)
            return self._pruned(drafts, self.share(drafts, 0.0))
        drafts = self._drafts(drafter, rows, frugal=True)
        share = self.share(drafts, 0.0)
        asked: list[tuple[int, Asking]] = []
        for b, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            askings: Askings = row.notes.setdefault(self, Askings())
            asking = askings.beside if len(draft) > 1 else askings.alone
            if row.room > 0 and asking.due():
                asked.append((b, asking))
        if asked:
            without = share
            for (b, _), draft in zip(
                asked, self._drafts(drafter, [rows[b] for b, _ in asked], frugal=False), strict=True
            ):
                drafts[b] = draft
            share = self.share(drafts, cost * len(asked))  # few rows fill a pass of heads
            price = without.rate * (share.seconds - without.seconds) / len(asked)
            for b, asking in asked:
                asking.learn(share.tokens[b] - without.tokens[b] - price)
        return self._pruned(drafts, share)

    def _drafts(self, drafter: Drafter, rows: Sequence[Row], *, frugal: bool) -> list[Draft]:
        for row in rows:
            row.frugal, row.price = frugal, self.price
        drafts = drafter.propose(rows, self.most)
        return [draft.pruned(nodes=self.most, depth=row.room) for draft, row in zip(drafts, rows, strict=True)]

    def _pruned(self, drafts: Sequence[Draft], share: Share) -> list[Draft]:
        return [draft.pruned(nodes=n, depth=n) for draft, n in zip(drafts, share.nodes, strict=True)]
