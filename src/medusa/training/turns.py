"""The seams of a chat template: what stands before a user's turn, and between a turn and its answer.

Distilling goes on with a text token by token, so it needs the template in pieces. A template that rewrites earlier
turns has no such pieces after the first answer: its conversations then have one turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medusa.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER, _NEXT = "\u241fuser\u241f", "\u241fanswer\u241f", "\u241fnext\u241f"


@dataclass(frozen=True, slots=True)
class Turns:
    """`before_user` opens the conversation, `before_answer` follows a user's turn, `before_next` follows an answer and
    opens the next turn; None where the template has no such seam. The two seams begin with whatever ends a turn."""

    before_user: str
    before_answer: str
    before_next: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> Turns:
        """Cuts the tokenizer's chat template at marked contents; `system` is part of `before_user`.

        Raises:
            UsageError: there is no template, or it does not take a plain user turn.
        """
        if not tokenizer.chat_template:
            raise UsageError("the model has no chat template")
        question = render(tokenizer, _with_system(tokenizer, system, [{"role": "user", "content": _USER}]), answer=True)
        before_user, found, before_answer = question.partition(_USER)
        if not found:
            raise UsageError("the chat template does not show the user's turn as it is")
        whole = render(
            tokenizer,
            _with_system(
                tokenizer,
                system,
                [
                    {"role": "user", "content": _USER},
                    {"role": "assistant", "content": _ANSWER},
                    {"role": "user", "content": _NEXT},
                ],
            ),
            answer=True,
        )
        head, _, rest = whole.partition(_ANSWER)
        seam, found, tail = rest.partition(_NEXT)
        if not found or head != question or tail != before_answer:
            return cls(before_user, before_answer, None)
        return cls(before_user, before_answer, seam)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    answer: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of a conversation by the chat template, with the opening of an answer if `answer`."""
    text = tokenizer.apply_chat_template(
        [dict(m) for m in messages],
        tools=[dict(tool) for tool in tools] or None,
        tokenize=False,
        add_generation_prompt=answer,
    )
    assert isinstance(text, str)
    return text


def _with_system(
    tokenizer: PreTrainedTokenizerBase, system: str | None, messages: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Puts a system prompt first; into the user's first turn where the template knows no such role."""
    if not system:
        return messages
    import jinja2

    with_role = [{"role": "system", "content": system}, *messages]
    try:
        if system in render(tokenizer, with_role):
            return with_role
    except jinja2.TemplateError:
        pass
    first = {**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}
    return [first, *messages[1:]]
