"""The seams of a chat template: what stands before a user's turn, and between a turn and its answer.

Distilling continues a text token by token, so it needs the template in pieces. A template that rewrites earlier
turns has no such pieces after the first answer: its conversations then have one turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa.errors import UsageError
from medusa.text.chat_template import ANSWER, QUESTION, REFUSALS, render_with_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEXT = "\u241fnext\u241f"


@dataclass(frozen=True, slots=True)
class Turns:
    """`before_user` opens the conversation, `before_answer` follows a user's turn, `before_next` follows an answer and
    opens the next turn; None where the template has no such seam. The two seams begin with whatever ends a turn.
    `strips` says whether the template takes white space off the start and the end of a user's turn."""

    before_user: str
    before_answer: str
    before_next: str | None
    strips: tuple[bool, bool] = (False, False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> Turns:
        """Cuts the tokenizer's chat template at marked contents; `system` is part of `before_user`.

        Raises:
            UsageError: there is no template, or it does not take a plain user turn.
        """
        if not tokenizer.chat_template:
            raise UsageError("the model has no chat template")

        def shown(user: str, *later: dict[str, str]) -> str:
            first = [{"role": "system", "content": system}] if system else []
            return render_with_system(tokenizer, [*first, {"role": "user", "content": user}, *later], answer=True)[1]

        try:
            question = shown(QUESTION)
            padded = shown(f" \n{QUESTION}\n ")
        except REFUSALS as error:
            raise UsageError(f"the chat template refuses a plain user turn: {error}") from None
        before_user, _, before_answer = question.partition(QUESTION)
        if not before_answer:
            raise UsageError("the chat template does not show the user's turn as it is, or nothing after it")
        strips = padded.startswith(before_user + QUESTION), padded.endswith(QUESTION + before_answer)
        alone = cls(before_user, before_answer, None, strips)
        try:
            whole = shown(QUESTION, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": _NEXT})
        except REFUSALS:  # it takes one turn only
            return alone
        head, _, rest = whole.partition(ANSWER)
        seam, marked, tail = rest.partition(_NEXT)
        # Some templates write a space before an answer (Mistral); the model writes it itself.
        if not marked or not head.startswith(question) or head[len(question) :].strip() or tail != before_answer:
            return alone
        return cls(before_user, before_answer, seam, strips)

    def shown(self, user: str) -> str:
        """A user's turn as the template shows it."""
        start, end = self.strips
        user = user.lstrip() if start else user
        return user.rstrip() if end else user
