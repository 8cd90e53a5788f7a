"""From tokens to text, piece by piece: the incremental detokeniser and the search for stop strings.

Both hold back what is not certain yet: half a character, or what may turn out to be the start of a stop string.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from medusa.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are no character, or not yet one
CONTEXT = 4  # tokens before a text, which tell how it begins
LONGEST_HOLD = 32  # tokens; a character needs at most four, so beyond this the bytes are garbage and are printed


def is_text(text: str) -> bool:
    """False for half characters (lone surrogates), which come from bytes that are not UTF-8."""
    return text.isprintable() or not any("\ud800" <= character <= "\udfff" for character in text)


def check_whole(texts: Iterable[str], what: str) -> None:
    """Raises UsageError where a text holds half characters; `what` it is called."""
    if not all(map(is_text, texts)):
        raise UsageError(f"{what} holds half characters (lone surrogates), which no tokenizer takes")


class Detokenizer:
    """Turns token ids into text one at a time. The pieces join to what decoding all ids at once gives.

    A token is decoded together with the tokens before it, because spaces and characters may span tokens; special
    tokens give no text.

    Args:
        before: the tokens that this text goes on from, which give none of it: some decoders drop the space before the
            first word, and this one is not the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        self._ids: list[int] = []  # a window: [context already printed | not yet printed]
        self._context = 0  # how many ids of the window are context
        self._printed = ""  # text of the window that is out already
        known = [token for token in before[-CONTEXT:] if token not in self._special]
        if known and not (text := self._decode(known)).endswith(REPLACEMENT):
            self._ids, self._context, self._printed = known, len(known), text

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if token_id in self._special:  # not into the window: as context it would hide the space before a word
            return ""
        self._ids.append(token_id)
        text, out = self._decode(self._ids), len(self._ids)
        if text.endswith(REPLACEMENT):
            if len(self._ids) - self._context < LONGEST_HOLD:
                return self._emit(text.rstrip(REPLACEMENT))
            out = self._border(text)
        piece = self._emit(text if out == len(self._ids) else self._decode(self._ids[:out]))
        # What was new becomes the context of what follows.
        self._ids = self._ids[self._context :]
        self._context = out - self._context
        self._printed = self._decode(self._ids[: self._context])
        return piece

    def flush(self) -> str:
        """What is still held back when the text ends."""
        return self._emit(self._decode(self._ids))

    def _border(self, text: str) -> int:
        """How many ids of a window full of garbage can go out. Its end may still be the start of a character, of at
        most three tokens: the border is where the two sides decode on their own to what they do together."""
        size = len(self._ids)
        for out in range(size - 1, size - 4, -1):
            if self._decode(self._ids[:out]) + self._decode(self._ids[out:]) == text:
                return out
        return size

    def _emit(self, text: str) -> str:
        piece = text[len(self._printed) :]
        if piece:
            self._printed = text
        return piece

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopStrings:
    """Passes text through until one of `stops` appears, across any borders of the pieces; pieces keep their source."""

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if any(not isinstance(stop, str) or not stop for stop in self.stops):
            raise UsageError("a stop string must have at least one character")
        self.hit = False
        self._held: deque[tuple[str, str]] = deque()

    def push(self, text: str, source: str) -> list[tuple[str, str]]:
        """Adds a piece and returns the pieces that are certain. After `hit` nothing more comes out; the stop string
        itself is not part of the text."""
        if self.hit or not text:
            return []
        self._held.append((text, source))
        held = "".join(piece for piece, _ in self._held)
        places = [place for stop in self.stops if (place := held.find(stop)) >= 0]
        if places:
            self.hit = True
            return self._take(min(places))
        return self._take(len(held) - self._possible_start(held))

    def flush(self) -> list[tuple[str, str]]:
        """What was held back, when the text ends without a stop string."""
        return [] if self.hit else self._take(sum(len(piece) for piece, _ in self._held))

    def _possible_start(self, held: str) -> int:
        """Length of the longest end of `held` that begins a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for size in range(min(longest, len(held)), 0, -1):
            if any(stop.startswith(held[-size:]) for stop in self.stops):
                return size
        return 0

    def _take(self, size: int) -> list[tuple[str, str]]:
        taken = []
        while size > 0:
            text, source = self._held.popleft()
            if len(text) > size:
                self._held.appendleft((text[size:], source))
                text = text[:size]
            taken.append((text, source))
            size -= len(text)
        return taken
