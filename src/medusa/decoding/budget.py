"""How many nodes a step verifies: as many as pay, by what the drafters expect and what a pass costs on this machine.

A draft of N nodes is expected to give E(N) = 1 + the sum of its probabilities, best nodes first, in t(N) seconds; the
N with the most tokens per second is verified. Where nothing pays, that is N = 1: plain decoding. Drafters judge
themselves (see `draft.py`), so their probabilities are taken as they are; times come from a measurement made before
(`engines/times.py`), never from a clock while decoding: the same text is drafted the same way again.

Two things that t depends on beside N: how long the texts are that the rows follow on (`PassTimes.after`), and whether
the backend computes the nodes of a batch or, padded, as many for each row as the largest tree has (`places`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from medusa.decoding.draft import Draft, Drafter
from medusa.decoding.stepper import Row
from medusa.errors import UsageError

LONGEST = 64  # nodes up to which times are tabulated; a straight line from there
MOST = 24  # nodes asked of drafters
HIGHEST_BAR = 0.5  # nodes that are likelier are too few to look for, which takes time too
USUAL_TOKENS = 2.0  # that the time of a plain pass gives with drafts
FEWEST_ASKED = 9  # the root and one chain of the n-gram drafter, whatever a node costs

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

    def free_drafts(self) -> PassTimes:
        """The same for drafters that cost no time."""
        return replace(self, draft_seconds=0.0)


class MachineTimes:
    """The times of this machine: one value for all who ask, measured when it is first asked for. Whoever holds this
    object has the new value after `refresh`.

    Args:
        measure: from the cache, or anew where it is given True; None where it cannot be measured just now.
    """

    def __init__(self, measure: Callable[[bool], PassTimes | None]) -> None:
        self._measure = measure
        self._known: PassTimes | None = None

    def __call__(self) -> PassTimes:
        if self._known is None:
            self._known = self._measure(False) or PassTimes.typical()
        return self._known

    def refresh(self) -> PassTimes:
        """Measured anew. Where that cannot be done, what was known stays."""
        self._known = self._measure(True) or self()
        return self._known


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
        _ = self.times  # measured now, where it must be: not in the middle of a text

    @property
    def times(self) -> PassTimes:
        return self._times() if isinstance(self._times, MachineTimes) else self._times

    @property
    def draft_seconds(self) -> float:
        return 0.0 if self._free else self.times.draft_seconds

    @property
    def most(self) -> int:
        """How many nodes are asked of drafters."""
        return min(self.times.most, self._max_nodes)

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
        clock = self.times.after(contexts)
        if self.bar(len(rows), clock) > HIGHEST_BAR:
            return [Draft((row.tokens[-1],)) for row in rows]
        cost = self.draft_seconds
        if not cost:
            drafts = self._drafts(drafter, rows, frugal=False)
            return self._pruned(drafts, self.share(drafts, 0.0, clock))
        drafts = self._drafts(drafter, rows, frugal=True)
        share = self.share(drafts, 0.0, clock)
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
            share = self.share(drafts, cost * len(asked), clock)  # few rows fill a pass of heads
            price = without.rate * (share.seconds - without.seconds) / len(asked)
            for b, asking in asked:
                asking.learn(share.tokens[b] - without.tokens[b] - price)
        return self._pruned(drafts, share)

    def _drafts(self, drafter: Drafter, rows: Sequence[Row], *, frugal: bool) -> list[Draft]:
        for row in rows:
            plain = self.times.after([len(row.tokens) - 1])(1)
            row.frugal, row.price = frugal, USUAL_TOKENS * self.draft_seconds / plain  # of a whole draft, in tokens
        most = self.most
        drafts = drafter.propose(rows, most)
        return [draft.pruned(nodes=most, depth=row.room) for draft, row in zip(drafts, rows, strict=True)]

    def _pruned(self, drafts: Sequence[Draft], share: Share) -> list[Draft]:
        return [draft.pruned(nodes=n, depth=n) for draft, n in zip(drafts, share.nodes, strict=True)]
