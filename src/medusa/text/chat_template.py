"""Text and conversations -> what the model reads: the chat template, the tokens that end a turn in it, plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What templates raise where they do not take a conversation.
REFUSALS = (jinja2.TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RecursionError)
QUESTION, ANSWER = "\u241fquestion\u241f", "\u241fanswer\u241f"  # stand for texts, to find them in what is written


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    answer: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of a conversation by the chat template, with the opening of an answer if `answer`. Raises one of
    REFUSALS where the template does not take it."""
    text = tokenizer.apply_chat_template(
        [dict(m) for m in messages],
        tools=[dict(tool) for tool in tools] or None,
        tokenize=False,
        add_generation_prompt=answer,
    )
    assert isinstance(text, str)
    return text


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is to be gone on with: with the token that some tokenizers put first, and without the
    one that some put last, which would end it."""
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    added: list[int] = list(encoded["special_tokens_mask"])
    while len(ids) > 1 and added[len(ids) - 1]:
        ids.pop()
    return ids


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token that ends an answer in the chat template, if one that stands for no text does: one id, or none."""
    if not tokenizer.chat_template:
        return ()
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    try:
        _, shown, tail = render(tokenizer, [question, answer]).rpartition(ANSWER)
    except REFUSALS:
        return ()
    if not shown:
        return ()
    tokens = added_tokens(tokenizer)
    found = max((token for token in tokens if end_of_turn(tokenizer, tail).endswith(token)), key=len, default=None)
    return () if found is None else (tokens[found],)


@lru_cache(maxsize=256)  # of a template there are few tails, of a tokenizer there may be thousands of added tokens
def end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """The part of the template's text after an answer that the model writes: up to the first token of its own kind."""
    found = min(((tail.find(token), -len(token)) for token in added_tokens(tokenizer) if token in tail), default=None)
    return tail.rstrip() if found is None else tail[: found[0] - found[1]]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that stand for no text of their own, and their ids."""
    found = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    for token, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        found.setdefault(token, i)
    return {token: i for token, i in found.items() if token.strip()}
