"""How many nodes a step verifies: as many as pay, by what the drafters expect and what a pass costs on this machine.

A draft of N nodes is expected to give E(N) = 1 + the sum of its probabilities, best nodes first, in t(N) seconds; the
N with the most tokens per second is verified. Where nothing pays, that is N = 1: plain decoding. Drafters judge
themselves (see `draft.py`), so their probabilities are taken as they are. Times come from a measurement made before,
corrected by what steps take (`times.py`) where the text is the same for any N; where it is not (typical acceptance, and
backends on which the width of a pass changes how sums are rounded) the clock has no say, and a seed gives a text again.

Two things that t depends on beside N: how long the texts are that the rows follow on (`PassTimes.after`), and whether
the backend computes the nodes of a batch or, padded, as many for each row as the largest tree has (`places`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from medusa.decoding.draft import Draft, Drafter
from medusa.decoding.stepper import Row
from medusa.decoding.times import MOST, Clock, MachineTimes, PassTimes

HIGHEST_BAR = 0.5  # nodes that are likelier are too few to look for, which takes time too
USUAL_TOKENS = 2.0  # that the time of a plain pass gives with drafts


def places(counts: Sequence[int], padding: int) -> int:
    """How many tokens a pass over trees of these sizes computes (see `Backend.padding`)."""
    return len(counts) * padded(max(counts), padding) if padding else sum(counts)


def padded(nodes: int, padding: int) -> int:
    """How many places a tree of so many nodes takes; the root alone is never padded."""
    return nodes if nodes == 1 or not padding else -(-nodes // padding) * padding


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

    Args:
        times: what passes and drafts take, or who knows it: then the budget follows what is measured anew.
        free: the drafters cost no time.
        max_nodes, padding: of the backend.
    """

    def __init__(
        self, times: PassTimes | MachineTimes, *, free: bool = False, max_nodes: int = MOST, padding: int = 0
    ) -> None:
        self._times = times
        self._free = free
        self._max_nodes = max_nodes
        self._padding = padding
        self._contexts: Sequence[int] = []  # of the last step
        self._asked = 0  # rows of it for which drafters that cost time drafted
        _ = self.times  # measured now, where it must be: not in the middle of a text

    @property
    def times(self) -> PassTimes:
        return self._times() if isinstance(self._times, MachineTimes) else self._times

    @property
    def draft_seconds(self) -> float:
        """Of a draft for one row."""
        return self._cost(self.times, 1)

    @property
    def most(self) -> int:
        """How many nodes are asked of drafters."""
        return self.most_by(self.times)

    @property
    def expected(self) -> int:
        """Nodes of a step where the i-th best node is right once in 2 (i - 1) steps, as in ordinary texts."""
        most = self.most
        draft = Draft((0,) * most, (-1, *[0] * (most - 1)), (1.0, *(0.5 / i for i in range(1, most))), ("",) * most)
        return self.share([draft], self.draft_seconds).nodes[0]

    def share(self, drafts: Sequence[Draft], draft_seconds: float, clock: Clock | None = None) -> Share:
        """The number of nodes of each draft (see `Draft.pruned`) with the most expected tokens per second; without a
        clock (see `PassTimes.after`), by the times of short texts."""
        clock = clock or self.times
        counts, tokens = [1] * len(drafts), [1.0] * len(drafts)
        best = Share(tuple(counts), tuple(tokens), clock(len(drafts)) + draft_seconds)
        total, expected, rate = len(drafts), float(len(drafts)), best.rate  # kept up, not summed anew for each node
        for nodes in self._by_worth(drafts):
            for b, p in nodes:
                counts[b] += 1
                tokens[b] += p
                expected += p
            total += len(nodes)
            seconds = clock(places(counts, self._padding) if self._padding else total) + draft_seconds
            if expected > rate * seconds:
                best, rate = Share(tuple(counts), tuple(tokens), seconds), expected / seconds
        return best

    def _by_worth(self, drafts: Sequence[Draft]) -> list[list[tuple[int, float]]]:
        """(row, probability) of all nodes but the roots, likeliest first, parents before children: in groups that come
        in together. In a padded batch these are the second best of all rows, then the third best and so on: where
        one row takes so many nodes, those of the others cost nothing."""
        children: list[list[list[int]]] = [[[] for _ in draft.parents] for draft in drafts]
        for draft, lists in zip(drafts, children, strict=True):
            for node, parent in enumerate(draft.parents[1:], start=1):
                lists[parent].append(node)
        frontier = [
            (-draft.probabilities[node], b, node)
            for b, draft in enumerate(drafts)
            for node in children[b][0]
        ]  # fmt: skip
        heapq.heapify(frontier)
        groups: list[list[tuple[int, float]]] = []
        taken = [0] * len(drafts)
        while frontier:
            falling, b, node = heapq.heappop(frontier)
            group = taken[b] if self._padding else len(groups)
            if group == len(groups):
                groups.append([])
            groups[group].append((b, -falling))
            taken[b] += 1
            for child in children[b][node]:
                heapq.heappush(frontier, (-drafts[b].probabilities[child], b, child))
        return groups

    def bar(self, rows: int, clock: Clock | None = None) -> float:
        """How likely a node must be to pay in a pass over so many rows, each of which gives a token anyway. In a padded
        batch: the nodes of all rows, which come in together."""
        clock = clock or self.times
        if not self._padding:
            return rows * (clock(rows + 1) - clock(rows)) / clock(rows)
        width = padded(2, self._padding)
        return (clock(rows * width) / clock(rows) - 1) / (width - 1)

    def propose(self, drafter: Drafter, rows: Sequence[Row]) -> list[Draft]:
        """Asks the drafters and prunes what they propose. Where hardly any node could pay, nobody is asked: so many
        rows fill a pass by themselves."""
        contexts = [len(row.tokens) - 1 for row in rows]
        if self._padding:  # so are the texts
            contexts = [max(contexts)] * len(rows)
        self.drafted_for(contexts, 0)
        times = self.times_for(rows)
        clock = times.after(contexts)
        if self.bar(len(rows), clock) > HIGHEST_BAR:
            return [Draft((row.tokens[-1],)) for row in rows]
        if not self._cost(times, 1):
            drafts = self._drafts(drafter, rows, times, frugal=False)
            return self._pruned(drafts, self.share(drafts, 0.0, clock))
        drafts = self._drafts(drafter, rows, times, frugal=True)
        share = self.share(drafts, 0.0, clock)
        asked: list[tuple[int, Asking]] = []
        for b, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            askings: Askings = row.notes.setdefault(self, Askings())
            asking = askings.beside if len(draft) > 1 else askings.alone
            if row.room > 0 and asking.due():
                asked.append((b, asking))
        if asked:
            without = share
            self.drafted_for(contexts, len(asked))
            richer = self._drafts(drafter, [rows[b] for b, _ in asked], times, frugal=False)
            for (b, _), draft in zip(asked, richer, strict=True):
                drafts[b] = draft
            share = self.share(drafts, self._cost(times, len(asked)), clock)
            price = without.rate * (share.seconds - without.seconds) / len(asked)
            for b, asking in asked:
                asking.learn(share.tokens[b] - without.tokens[b] - price)
        return self._pruned(drafts, share)

    def drafted_for(self, contexts: Sequence[int], asked: int) -> None:
        """The next pass is over drafts for rows that follow on texts of these lengths; for so many of them, drafters
        that cost time drafted."""
        self._contexts, self._asked = contexts, asked

    def learn(self, drafts: Sequence[Draft], drafting: float, verifying: float) -> None:
        """Takes the seconds that the last step's drafting and pass took (see `MachineTimes.learn`)."""
        if isinstance(self._times, MachineTimes):
            tokens = places([len(draft) for draft in drafts], self._padding)
            self._times.learn(tokens, self._contexts, verifying)
            if self._asked:
                self._times.learn_draft(self._asked, drafting)

    def times_for(self, rows: Sequence[Row]) -> PassTimes:
        """The times as they are now, or as they were measured where a text depends on what is drafted."""
        lossy = any(row.sampling.lossy for row in rows)
        return self._times.measured if lossy and isinstance(self._times, MachineTimes) else self.times

    def most_by(self, times: PassTimes) -> int:
        """`most`, by these times."""
        return min(times.most, self._max_nodes)

    def _cost(self, times: PassTimes, rows: int) -> float:
        """Seconds of a draft for so many rows."""
        return 0.0 if self._free else times.draft(rows)

    def _drafts(self, drafter: Drafter, rows: Sequence[Row], times: PassTimes, *, frugal: bool) -> list[Draft]:
        plain = times.after([len(row.tokens) - 1 for row in rows])(len(rows))
        for row in rows:  # the price of a whole draft, in tokens of each row
            row.frugal, row.price = frugal, USUAL_TOKENS * self._cost(times, len(rows)) / plain
        most = self.most_by(times)
        drafts = drafter.propose(rows, most)
        return [draft.pruned(nodes=most, depth=row.room) for draft, row in zip(drafts, rows, strict=True)]

    def _pruned(self, drafts: Sequence[Draft], share: Share) -> list[Draft]:
        return [draft.pruned(nodes=n, depth=n) for draft, n in zip(drafts, share.nodes, strict=True)]
