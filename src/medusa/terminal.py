"""What commands show on a terminal: colours, notices, answers as they come, how fast they were.

Answers go to stdout and the rest to stderr.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from medusa.completion import Chunk, Completion, Stats

DIM, RESET = "\x1b[2m", "\x1b[0m"
DRAFT_COLOURS = {"heads": "\x1b[32m", "ngram": "\x1b[36m"}  # green, cyan; "model" stays plain
OUT_OF_MEMORY = "not enough memory; take a smaller --model, a shorter prompt or fewer --max-new-tokens"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def wants_colour(stream: TextIO) -> bool:
    """A terminal gets colour, a pipe does not; NO_COLOR and FORCE_COLOR, when not empty, decide otherwise."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def notice(text: str) -> None:
    """Print a line beside the answers: dim, on stderr."""
    if wants_colour(sys.stderr):
        text = f"{DIM}{text}{RESET}"
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Printer:
    """Writes chunks to stdout as they come; `show_drafts` colours accepted drafts by their source."""

    show_drafts: bool = False

    def __call__(self, chunk: Chunk) -> None:
        out = sys.stdout
        pieces = [(chunk.text, "model")]
        if self.show_drafts and wants_colour(out):
            pieces = list(chunk.spans)
        for text, source in pieces:
            if out.isatty():
                text = _CONTROL.sub("", text)  # a model must not be able to drive the terminal
            colour = DRAFT_COLOURS.get(source) if text else None
            out.write(f"{colour}{text}{RESET}" if colour else text)
        out.flush()

    def legend(self) -> None:
        """One line that says what the colours mean, if drafts are shown."""
        if not self.show_drafts:
            return
        if not wants_colour(sys.stdout):
            notice("--show-drafts needs a terminal; FORCE_COLOR=1 colours a pipe too.")
            return
        meanings = {"heads": "green: drafted by the heads", "ngram": "cyan: drafted by n-gram lookup"}
        if wants_colour(sys.stderr):
            meanings = {source: f"{DRAFT_COLOURS[source]}{text}{RESET}" for source, text in meanings.items()}
        print(", ".join([*meanings.values(), "plain: decided by the model"]), file=sys.stderr, flush=True)


def collect(chunks: Iterable[Chunk], show: Callable[[Chunk], None]) -> Completion:
    """Show each chunk as it comes; return them as one answer. Ctrl-C ends the answer, not the program."""
    from medusa.completion import Completion

    shown: list[Chunk] = []
    try:
        for chunk in chunks:
            shown.append(chunk)
            show(chunk)
    except KeyboardInterrupt:
        if shown:
            shown[-1] = replace(shown[-1], finish_reason=None)
    finally:
        # An abandoned generator would hold the engine's slot until it is collected.
        close = getattr(chunks, "close", None)
        if close is not None:
            close()
    return Completion.of(shown)


def show_nothing(_: Chunk) -> None:
    """For `collect`, where the answer is not for people."""


def stats_line(stats: Stats) -> str:
    """Say in one line how a decoding went: tokens, steps, speed, time to the first token."""
    return (
        f"{count(stats.new_tokens, 'token')} in {count(stats.steps, 'step')} = "
        f"{stats.tokens_per_step:.1f} tokens per step, {short_number(stats.tokens_per_second)} tokens/s, "
        f"first token after {stats.ttft_seconds:.1f} s"
    )


def totals(stats: Iterable[Stats]) -> tuple[int, int, float]:
    """(tokens from steps, steps, seconds) of several answers together."""
    known = list(stats)
    return (
        sum(answer.decoded_tokens for answer in known),
        sum(answer.steps for answer in known),
        sum(answer.decode_seconds for answer in known),
    )


def short_number(value: float) -> str:
    """Two digits or more: 41.23 -> "41", 4.123 -> "4.1"."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def count(number: int, noun: str) -> str:
    """1 -> "1 step", 2 -> "2 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_out_of_memory(error: BaseException) -> bool:
    """Python's MemoryError, or torch's (on the CPU a plain RuntimeError with a message of the allocator)."""
    if isinstance(error, MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in message or "can't allocate memory" in message)
