"""Log-probabilities of tokens, as chats and completions show them."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medusa.completion import Chunk

LOWEST = -9999.0  # JSON has no infinity; this is what OpenAI says


class TokenTexts:
    """The bytes that a token stands for: a character may be spread over several tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self.hidden = frozenset(hidden)  # tokens that end the text are not shown
        fast = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = fast is not None and "ByteLevel" in repr(fast.decoder)
        self._added = set(tokenizer.added_tokens_decoder)

    def bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if token not in self._added and isinstance(piece, str):
            table = _byte_of()
            if self._byte_level and all(letter in table for letter in piece):
                return bytes(table[letter] for letter in piece)
            if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
                return bytes([int(byte[1], 16)])
            if piece.startswith("\u2581"):  # SentencePiece writes spaces so, and decoding drops the first one
                return piece.replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    def chat(self, chunks: Iterable[Chunk]) -> dict[str, Any]:
        found = []
        for chunk in chunks:
            for token, known in zip(chunk.token_ids, chunk.step.logprobs or (), strict=False):
                if token not in self.hidden:
                    top = [self._entry(other, logprob) for other, logprob in known.top]
                    found.append({**self._entry(token, known.logprob), "top_logprobs": top})
        return {"content": found, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(data)}


class CompletionLogprobs:
    """Those of one answer in the form of completions, as its tokens come. `offset`: characters before the answer.

    A token that is a part of a character is named by its bytes, as "bytes:\\xf0\\x9f"; its offset is the character's.
    """

    def __init__(self, texts: TokenTexts, offset: int) -> None:
        self._texts = texts
        self._offset = offset
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def push(self, chunks: Iterable[Chunk]) -> dict[str, Any]:
        tokens: list[str] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for chunk in chunks:
            for token, known in zip(chunk.token_ids, chunk.step.logprobs or (), strict=False):
                if token not in self._texts.hidden:
                    data = self._texts.bytes_of(token)
                    tokens.append(_name(data))
                    logprobs.append(_number(known.logprob))
                    tops.append({_name(self._texts.bytes_of(other)): _number(value) for other, value in known.top})
                    offsets.append(self._offset)
                    self._offset += len(self._decoder.decode(data))
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _number(logprob: float) -> float:
    return max(logprob, LOWEST) if logprob == logprob else LOWEST


@cache
def _byte_of() -> dict[str, int]:
    """A byte that is a printable Latin-1 character stands for itself, any other for the next from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
