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


def render_with_system(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    answer: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[dict[str, Any]], str]:
    """The messages as the template takes them, and their text: a system message that the template refuses, or does not
    show, goes into the first user turn. Raises one of REFUSALS where the template takes neither."""
    whole = [dict(message) for message in messages]
    system = whole[0]["content"] if whole[0]["role"] in ("system", "developer") else None
    text, refusal = "", None
    try:
        text = render(tokenizer, whole, answer=answer, tools=tools)
    except REFUSALS as error:
        refusal = error
    user = next((i for i, message in enumerate(whole) if message["role"] == "user"), 0)
    if system is not None and user and (refusal is not None or system.strip() not in text):
        content = whole[user]["content"]
        joined = {"role": "user", "content": f"{system}\n\n{content}" if system.strip() else content}
        folded = [*whole[1:user], joined, *whole[user + 1 :]]
        try:
            return folded, render(tokenizer, folded, answer=answer, tools=tools)
        except REFUSALS as error:
            refusal = refusal and error
    if refusal is not None:
        raise refusal
    return whole, text


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is to be continued: with the token that some tokenizers put first, and without the one
    that some put last, which would end it."""
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
    try:
        text = render(tokenizer, [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}])
    except REFUSALS:
        return ()
    _, shown, tail = text.rpartition(ANSWER)
    ends = {token: i for token, i in added_tokens(tokenizer).items() if end_of_turn(tokenizer, tail).endswith(token)}
    return (ends[max(ends, key=len)],) if shown and ends else ()


@lru_cache(maxsize=256)  # of a template there are few tails, of a tokenizer there may be thousands of added tokens
def end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """The part of the template's text after an answer that the model writes: up to the first token of its own kind."""
    places = [(tail.find(token), -len(token)) for token in added_tokens(tokenizer) if token in tail]
    start, length = min(places, default=(0, -len(tail.rstrip())))
    return tail[: start - length]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that stand for no text of their own, and their ids."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    return {token: i for token, i in {**special, **added}.items() if token.strip()}
