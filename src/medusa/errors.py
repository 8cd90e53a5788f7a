"""The errors a caller is meant to see: each message is one sentence that says what to do."""

from __future__ import annotations

import re


class MedusaError(Exception):
    """Something outside the call is wrong (a file, a model, the machine). The command line exits with 1."""


class UsageError(MedusaError, ValueError):
    """An argument is wrong. The command line exits with 2."""


class ContextFullError(UsageError):
    """A prompt of `tokens` tokens leaves no room for an answer in a context of `context`."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens, which leaves no room in the context of {context}: shorten it"
        )
        self.tokens = tokens
        self.context = context


def shortened(value: object, most: int = 60) -> str:
    """A value as it stands in a message: on one line, and cut where it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def first_sentence(error: BaseException) -> str:
    """The start of an error's message, on one line; the whole is in the chained exception."""
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = re.split(r"(?<=[.!?;])\s", text, maxsplit=1)[0].rstrip(".;")
    return sentence if len(sentence) <= 200 else sentence[:200] + "..."
