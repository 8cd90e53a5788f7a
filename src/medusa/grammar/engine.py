"""A JSON schema, or a grammar -> what keeps a text within it, token by token.

    grammars = Grammars(tokenizer, vocab_size, eos_token_ids)
    grammar = grammars.json_schema({"type": "object", ...})      # compiled once, for any number of texts
    lm.stream(prompt, constraint=grammar)

The work is llguidance's: it parses by Earley's algorithm and tells in some ten microseconds which tokens may follow.
JSON is on one line, with `": "` and `", "` as `json.dumps` writes them: with white space at will a small model may
write nothing else for ever, and all that is punctuation is forced, so that it costs no pass of its own.

Its native engine is imported when the first grammar is compiled.
"""

from __future__ import annotations

import functools
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa.errors import MedusaError, UsageError
from medusa.grammar.schema import json_rule

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

KEPT = 64  # compiled grammars
LONGEST_MESSAGE = 300


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the last of them. May be used from any thread.

    Args:
        vocab_size: of the model: there may be more logits than the tokenizer has tokens.
        ends: tokens that end a text: allowed where the grammar is complete, and only there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = tuple(dict.fromkeys(ends))
        self._inside: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Grammar] = OrderedDict()  # least recently used first

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Grammar:
        """What a JSON schema (draft 2020-12) allows.

        Raises:
            UsageError: it is no schema, has a keyword that is not supported, or allows nothing.
            MedusaError: llguidance is not installed, or does not know the tokenizer.
        """
        return self.lark(f"start: {json_rule(schema)}")

    def lark(self, text: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark. Raises what `json_schema` raises."""
        with self._lock:
            if (grammar := self._kept.get(text)) is not None:
                self._kept.move_to_end(text)
                return grammar
            inside = self._inside or self._read_tokenizer()
        grammar = Grammar(_compile(inside, text), self._vocab_size, self._ends)
        with self._lock:
            self._kept[text] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    @functools.cached_property
    def shown_tokens(self) -> dict[str, int]:
        """Tokens that stand for a text which is shown, but which the engine does not take for that text: a grammar must
        name them. It holds all that look like <this> for tokens of no text."""
        with self._lock:
            inside = self._inside or self._read_tokenizer()
        added = self._tokenizer.added_tokens_decoder.items()
        hidden = {*self._tokenizer.all_special_ids, *self._ends, *(i for i, token in added if token.special)}
        return {token.content: i for i, token in added if i not in hidden and inside.is_special_token(i)}

    def _read_tokenizer(self) -> LLTokenizer:
        """Takes a quarter of a second for 49,152 tokens."""
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise MedusaError("grammars need llguidance: pip install 'medusa-decode[serve]'") from None
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise MedusaError("grammars need a tokenizer of the tokenizers library, which this model has not")
        try:
            told = fast.to_str()
            self._inside = LLTokenizer(told, n_vocab=self._vocab_size, eos_token=list(self._ends) or None)
        except Exception as error:  # noqa: BLE001  # whatever a library in Rust makes of a strange tokenizer
            raise MedusaError(f"the grammar engine does not know this model's tokenizer: {_short(error)}") from None
        return self._inside


def _compile(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text), log_level=0, limits=limits)
    if matcher.is_error():
        raise UsageError(_short(matcher.get_error()))
    trial = matcher.deep_copy()
    some = any(trial.compute_bitmask())
    if trial.is_error():
        raise UsageError(_short(trial.get_error()))
    if not some:
        raise UsageError("it allows no text at all")
    return matcher


def _short(error: object) -> str:
    """What the library says, on one line and without the grammar that it quotes: of it clients know nothing."""
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", str(error))
    text = re.split(r"\n\s*\d+ \| |<non-verbose/>", text, maxsplit=1)[0]
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."


class Grammar:
    """A compiled grammar. See `stepper.Grammar`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = ends

    def begin(self) -> Follower:
        return Follower(self._matcher.deep_copy(), self._vocab_size, self._ends)


class Follower:
    """Follows one text. See `stepper.Constraint` and `constrain.Walk`.

    What it is asked about beyond the text stays entered until it is asked about something else, for acceptance asks
    along a path, node after node.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = ends
        self._ahead: list[int] = []  # beyond the text, in the matcher
        self._over = False  # a token that ends the text has come

    def allowed(self, path: Sequence[int]) -> np.ndarray | None:
        if self._over or any(token in self._ends for token in path):
            return None
        self._go(path)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        allowed[list(self._ends)] = self._matcher.is_accepting()
        if not allowed.any():
            raise UsageError("the grammar cannot be followed further: it has no end that can be reached from here")
        return allowed

    def keep(self, tokens: Sequence[int]) -> None:
        if self._over:  # who goes on after the end is free
            return
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        self._over = end is not None
        self._go(tokens[:end])
        self._ahead = []

    def enter(self, token: int) -> bool:
        if self._over:
            return False
        if token in self._ends:
            if not self._matcher.is_accepting():
                return False
            self._over = True
        elif not self._matcher.try_consume_tokens([token]):
            self._check()
            return False
        self._ahead.append(token)
        return True

    def leave(self, count: int = 1) -> None:
        gone = self._ahead[len(self._ahead) - count :]
        del self._ahead[len(self._ahead) - count :]
        if any(token in self._ends for token in gone):
            self._over = False
            count -= 1
        if count:
            self._matcher.rollback(count)
            self._check()

    def forced(self) -> Sequence[int]:
        if self._over:
            return ()
        forced: list[int] = self._matcher.compute_ff_tokens()
        if len(self._ends) == 1:
            taken = self._matcher.try_consume_tokens(forced) if forced else 0
            forced = forced[:taken]
            if self._matcher.is_stopped():
                forced = [*forced, *self._ends]
            if taken:
                self._matcher.rollback(taken)
        self._check()
        return forced

    def _go(self, path: Sequence[int]) -> None:
        """Stands after the text and a path."""
        shared = 0
        while shared < min(len(path), len(self._ahead)) and path[shared] == self._ahead[shared]:
            shared += 1
        if len(self._ahead) > shared:
            self._matcher.rollback(len(self._ahead) - shared)
        new = list(path[shared:])
        if new:
            self._matcher.consume_tokens(new)
            self._check()
        self._ahead = list(path)

    def _check(self) -> None:
        """The matcher never leaves an error. Tokens are allowed before they come: what is left are the limits of its
        work, and those are for whoever made the grammar."""
        if self._matcher.is_error():
            raise UsageError(f"the grammar cannot be followed further: {_short(self._matcher.get_error())}")
