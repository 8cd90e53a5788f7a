"""One generation step by step: the tree that was verified, what of it was accepted, and who had proposed it."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from medusa.decoding.draft import MODEL
from medusa.terminal import DIM, DRAFT_COLOURS, RESET, count, stats_line
from medusa.text.stream import REPLACEMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medusa.api import Chunk, Stats
    from medusa.decoding.stepper import Step

_BOLD = "\x1b[1m"
_BRACKETS = {"heads": "[]", "ngram": "{}"}  # where there is no colour
_OTHER_BRACKETS = "<>"  # of a drafter that is not ours
SHARE = "the estimate of its drafter that the whole path is right"
LONGEST_LABEL = 32  # characters of one token


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a verified tree. Node 0 is the root, which was decided a step earlier."""

    token: int
    text: str
    parent: int
    depth: int
    probability: float  # the drafter's estimate that the whole path to this node is right
    source: str
    accepted: bool

    @property
    def label(self) -> str:
        return visible(self.text, self.token)


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the text: who proposed it, or "model"."""

    token: int
    text: str
    source: str

    @property
    def label(self) -> str:
        return visible(self.text, self.token)


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One forward pass. `tokens` are what the text gained: the accepted nodes below the root and the model's own next
    token, or fewer of them where the text ended."""

    number: int  # from 1
    nodes: tuple[Node, ...]
    path: tuple[int, ...]  # accepted nodes, from the root on
    tokens: tuple[Token, ...]
    ms: dict[str, float]  # of each phase; "text" is the rest, "total" the sum

    @property
    def own(self) -> Token | None:
        """The token that the model itself decided, if the text did not end before it."""
        return self.tokens[-1] if self.tokens and self.tokens[-1].source == MODEL else None

    @property
    def accepted(self) -> dict[str, int]:
        """How many nodes of each drafter were accepted."""
        return _by_source(self.nodes[i].source for i in self.path[1:])

    def summary(self, *, phases: bool = True) -> str:
        """One line: nodes, what was accepted, tokens gained, time, and with `phases` where the time went."""
        accepted, own = len(self.path) - 1, self.own
        by = ", ".join(f"{source} {n}" for source, n in self.accepted.items())
        gained = accepted + (own is not None)
        parts = ", ".join(f"{name} {ms:.1f}" for name, ms in self.ms.items() if name != "total")
        return (
            f"step {self.number}: {count(len(self.nodes), 'node')}, {accepted} accepted"
            + (f" ({by})" if by else "")
            + (" + 1 from the model" if own else "")
            + f" = {count(gained, 'token')}"
            + (f", {len(self.tokens)} used because the text ends" if len(self.tokens) < gained else "")
            + f", {self.ms['total']:.1f} ms"
            + (f" ({parts})" if phases else "")
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """A generation. `first` is the token that the prefill gave, `spans` the text in pieces with their source."""

    first: Token | None
    steps: tuple[TracedStep, ...]
    spans: tuple[tuple[str, str], ...]
    stats: Stats | None  # None where not even the first token came
    finish_reason: str | None  # None where the text was interrupted

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)

    @property
    def tokens_per_step(self) -> float:
        return self.stats.tokens_per_step if self.stats else 0.0

    def by_depth(self) -> dict[str, list[tuple[int, int]]]:
        """For each drafter and depth, from 1: (accepted nodes, all nodes)."""
        nodes = [node for step in self.steps for node in step.nodes[1:]]
        depths = range(1, max((node.depth for node in nodes), default=0) + 1)
        accepted = Counter((node.source, node.depth) for node in nodes if node.accepted)
        drafted = Counter((node.source, node.depth) for node in nodes)
        sources = _by_source(node.source for node in nodes)
        return {source: [(accepted[source, d], drafted[source, d]) for d in depths] for source in sources}

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "first": asdict(self.first) if self.first else None,
            "steps": [asdict(step) for step in self.steps],
            "tokens_per_step": round(self.tokens_per_step, 3),
            "text": self.text,
            "finish_reason": self.finish_reason or "interrupted",
        }


# --- from chunks ------------------------------------------------------------------------------------------------------


def trace(chunks: Iterable[Chunk], tokenizer: PreTrainedTokenizerBase) -> Trace:
    """Follows a stream of `LanguageModel.stream` to its end."""
    text_of = token_texts(tokenizer)
    first: Token | None = None
    steps: list[TracedStep] = []
    spans: list[tuple[str, str]] = []
    stats: Stats | None = None
    reason: str | None = None
    for chunk in chunks:
        tokens = tuple(
            Token(token, text_of(token), source)
            for token, source in zip(chunk.token_ids, chunk.step.sources, strict=False)  # a stop string cuts the first
        )
        if chunk.step.draft is None:  # the prefill
            first = tokens[0]
        else:
            seconds = chunk.stats.decode_seconds - (stats.decode_seconds if stats else 0.0)
            steps.append(_traced(len(steps) + 1, chunk.step, tokens, seconds, text_of))
        spans += chunk.spans
        stats, reason = chunk.stats, chunk.finish_reason
    return Trace(first, tuple(steps), tuple(spans), stats, reason)


def _traced(
    number: int, step: Step, tokens: tuple[Token, ...], seconds: float, text_of: Callable[[int], str]
) -> TracedStep:
    draft = step.draft
    assert draft is not None
    depths = [int(depth) for depth in draft.topology.depths]
    accepted = set(step.path)
    nodes = tuple(
        Node(
            token, text_of(token), draft.parents[i], depths[i], draft.probabilities[i], draft.sources[i], i in accepted
        )
        for i, token in enumerate(draft.tokens)
    )
    ms = {name: 1e3 * value for name, value in step.phases._asdict().items()}
    ms["text"] = max(0.0, 1e3 * seconds - sum(ms.values()))
    ms["total"] = sum(ms.values())
    return TracedStep(number, nodes, step.path, tokens, {name: round(value, 3) for name, value in ms.items()})


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """A function from a token to its text, as it is within a sentence: the space before a word is there."""

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # Some tokenizers drop the space that begins a text, so each token is read after a letter.
    anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    before = decode(anchor)

    @functools.cache
    def text_of(token: int) -> str:
        text = decode([*anchor, token])
        return text[len(before) :] if text.startswith(before) else decode([token])

    return text_of


def visible(text: str, token: int | None = None) -> str:
    """A token's text in one line that shows its spaces and cannot drive a terminal. A part of a character has no text
    of its own: the number of its token tells it from others."""
    if not text or REPLACEMENT in text:
        return f"{text or 'empty'}#{token}" if token is not None else text
    shown = text.replace("\\", "\\\\").replace(" ", "\u00b7")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return shown if len(shown) <= LONGEST_LABEL else f"{shown[: LONGEST_LABEL - 1]}\u2026"


def children(step: TracedStep) -> list[list[int]]:
    """The children of each node, the likeliest first."""
    below: list[list[int]] = [[] for _ in step.nodes]
    for i, node in enumerate(step.nodes[1:], start=1):
        below[node.parent].append(i)
    return [sorted(nodes, key=lambda i: -step.nodes[i].probability) for nodes in below]


def _by_source(sources: Iterable[str]) -> dict[str, int]:
    """Counts, our drafters first."""
    counts = Counter(sources)
    order = [*DRAFT_COLOURS, *sorted(counts.keys() - DRAFT_COLOURS.keys())]
    return {source: counts[source] for source in order if source in counts}


# --- as text ----------------------------------------------------------------------------------------------------------


def lines(traced: Trace, *, steps: int = 6, colour: bool = False) -> Iterator[str]:
    """The first `steps` steps (0 is all) as trees, and a summary of the whole text."""
    shown = traced.steps[: steps or None]
    if traced.first is not None and traced.stats is not None:
        read = count(traced.stats.prompt_tokens, "token")
        yield f"prompt: {read} read, first token {traced.first.label}, {1e3 * traced.stats.ttft_seconds:.1f} ms"
        yield f"\u2713 accepted, \u00d7 rejected, \u2192 decided by the model; % is {SHARE}"
        yield ""
    for step in shown:
        yield from _tree_lines(step, colour)
        yield step.summary()
        yield ""
    if len(shown) < len(traced.steps):
        yield f"{count(len(traced.steps) - len(shown), 'more step')} not shown; --steps 0 shows all"
        yield ""
    yield from _summary_lines(traced, colour)


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{RESET}" if colour and code and text else text


def _tree_lines(step: TracedStep, colour: bool) -> Iterator[str]:
    from rich.cells import cell_len

    below = children(step)
    rows: list[tuple[str, str, str, str, str]] = []  # branch, mark and token, per cent, who, colour

    def add(node: int, indent: str) -> None:
        own = step.own if node == step.path[-1] else None
        for child in below[node]:
            last = child == below[node][-1] and own is None
            drafted = step.nodes[child]
            mark = "\u2713" if drafted.accepted else "\u00d7"
            code = _BOLD + DRAFT_COLOURS.get(drafted.source, "") if drafted.accepted else DIM
            share = f"{100 * drafted.probability:.1f} %"
            branch = "\u2514\u2500 " if last else "\u251c\u2500 "
            rows.append((indent + branch, f"{mark} {drafted.label}", share, drafted.source, code))
            add(child, indent + ("   " if last else "\u2502  "))
        if own is not None:
            rows.append((f"{indent}\u2514\u2500 ", f"\u2192 {own.label}", "", MODEL, _BOLD))

    yield step.nodes[0].label
    add(0, "")
    width = max((cell_len(branch + token) for branch, token, *_ in rows), default=0)
    for branch, token, share, who, code in rows:
        space = " " * (width - cell_len(branch + token))
        yield branch + _paint(f"{token}{space}  {share:>7}  {who}", code, colour)


def _summary_lines(traced: Trace, colour: bool) -> Iterator[str]:
    marks = ", ".join(_span(source, source, colour) for source in DRAFT_COLOURS)
    yield f"text by who proposed it ({marks}, plain: the model):"
    yield "".join(_span(text, source, colour) for text, source in _joined(traced.spans))
    yield ""
    if traced.stats is not None:
        yield stats_line(traced.stats)
    table = traced.by_depth()
    if not table:
        return
    yield "accepted of drafted nodes, by depth:"
    depths = max(map(len, table.values()))
    cells = [["", *(str(depth) for depth in range(1, depths + 1)), "all"]]
    for source, pairs in table.items():
        total = sum(accepted for accepted, _ in pairs), sum(drafted for _, drafted in pairs)
        cells.append([source, *(f"{accepted}/{drafted}" if drafted else "-" for accepted, drafted in [*pairs, total])])
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    for name, *shares in cells:
        source = _paint(f"{name:<{first}}", DRAFT_COLOURS.get(name, ""), colour)
        yield "  ".join(["", source, *(f"{share:>{width}}" for share, width in zip(shares, widths, strict=True))])


def _joined(spans: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one source as one piece."""
    runs = itertools.groupby((span for span in spans if span[0]), key=lambda span: span[1])
    return [("".join(text for text, _ in run), source) for source, run in runs]


def _span(text: str, source: str, colour: bool) -> str:
    text = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    if source == MODEL:
        return text
    if colour:
        return _paint(text, DRAFT_COLOURS.get(source, _BOLD), colour)
    pair = _BRACKETS.get(source, _OTHER_BRACKETS)
    return f"{pair[0]}{text}{pair[1]}"
