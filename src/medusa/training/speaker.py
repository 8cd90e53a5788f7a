"""What the model says in a conversation, and what it is asked.

A user's turn that the model invents begins with a few words that are given (see openings.py). It ends where the model
ends it, or with its first line: many models have only learned to end answers, and would go on with one. After a colon
the turn goes on, to what the line announces, until the model ends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa.decoding.sampling import Sampling
from medusa.text.turns import Turns
from medusa.training.openings import opening
from medusa.training.talk import Said, Talk, Talked, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medusa.settings import DistillSettings

SHORTEST_USER = 10  # characters of an invented user turn
SPARE = 8  # tokens that an answer finds room for, at the least
TOO_LONG = "too long"  # for the slots
NO_QUESTION = "no question"


def is_question(given: str, said: str) -> bool:
    """Whether a user's turn says anything beyond the words that it was given to begin with."""
    return len((given + said).strip()) >= SHORTEST_USER and any(map(str.isalnum, said))


def line_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that hold the end of a line."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], skip_special_tokens=True)
    return frozenset(token for token, text in enumerate(texts) if "\n" in text)


@dataclass(frozen=True, slots=True)
class Speaker:
    """What all conversations share: the tokenizer, the limits."""

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    settings: DistillSettings
    room: int  # tokens that a slot holds

    def seed(self, number: int, turn: int, who: str) -> int:
        text = f"{self.settings.seed}/{number}/{turn}/{who}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def seam(self, text: str) -> list[int]:
        """The tokens of a text that follows another. Some tokenizers put a space before what they take for a start."""
        before, whole = self.encode("a"), self.encode(f"a{text}")
        return whole[len(before) :] if whole[: len(before)] == before else self.encode(text)

    def text(self, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
        """What tokens say. Some tokenizers leave out a space before the first; not so if it is told what is before."""
        text, before = (
            self.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in ([*after, *tokens], after)
        )
        assert isinstance(text, str)
        assert isinstance(before, str)
        return text[len(before) :]

    def opening(self, number: int, turn: int) -> str:
        """The first words of a user's turn that is invented."""
        return opening(self.seed(number, turn, "opening"), turn)

    def asking(self, number: int, turn: int) -> Sampling:
        settings = self.settings
        return Sampling(
            temperature=settings.user_temperature, top_p=settings.top_p, seed=self.seed(number, turn, "user")
        )

    def answering(self, number: int, turn: int) -> Sampling:
        temperatures = self.settings.temperatures
        temperature = temperatures[number % len(temperatures)]
        return Sampling(
            temperature=temperature,
            top_p=self.settings.top_p if temperature else 1.0,
            seed=self.seed(number, turn, "answer"),
        )

    def joined(self, talked: Talked, seam: list[int]) -> tuple[list[int], bool]:
        """How `seam` follows the text, whose last token the model wrote to end its turn: what to add, and whether the
        last token is dropped because the template ends the turn in another way."""
        if talked.token_ids[-1] == seam[0]:
            return seam[1:], False
        if talked.token_ids[-1] in self.eos_token_ids:
            talked.token_ids.pop()
            if talked.labels and talked.labels[-1][1] > len(talked.token_ids):
                start, end = talked.labels[-1]
                talked.labels[-1] = start, end - 1
            return seam, True
        return seam, False

    def invented(self, number: int, turns: Turns, lines: frozenset[int]) -> Talk:
        """The model asks and answers. `lines` are the tokens that end a line."""
        talked = Talked(self.answering(number, 0).temperature)
        most = self.settings.turns if turns.before_next is not None else 1
        for turn in range(1 + self.seed(number, 0, "turns") % most):
            before = list(talked.token_ids), list(talked.labels)
            asked = yield from self._ask(talked, number, turn, turns, lines)
            if isinstance(asked, str):  # what was said before is kept as it was
                talked.token_ids, talked.labels = before
                talked.fault = "" if turn else asked
                break
            said = yield from self._answer(talked, number, turn, *asked)
            if said.finish_reason != "stop":
                break
        return talked

    def given(self, number: int, turns: Turns, system: str | None, users: Sequence[str]) -> Talk:
        """The model answers what it is asked, turn by turn."""
        talked = Talked(self.answering(number, 0).temperature)
        if system:
            talked.messages.append({"role": "system", "content": system})
        for turn, user in enumerate(users):
            if turn and turns.before_next is None:
                break
            before = turns.before_next if turn else turns.before_user
            tokens, drop = self.encode(f"{before}{turns.shown(user)}{turns.before_answer}"), False
            if turn:
                tokens, drop = self.joined(talked, tokens)
            if len(talked.token_ids) + len(tokens) + SPARE >= self.room:
                talked.fault = "" if turn else TOO_LONG
                break
            talked.messages.append({"role": "user", "content": user})
            said = yield from self._answer(talked, number, turn, tokens, drop)
            if said.finish_reason != "stop":
                break
        return talked

    def plain(self, number: int, opening: Sequence[int]) -> Talk:
        """A text without turns, for models without a chat template."""
        talked = Talked(self.settings.user_temperature)
        sampling = Sampling(
            temperature=self.settings.user_temperature, top_p=self.settings.top_p, seed=self.seed(number, 0, "text")
        )
        limit = min(self.settings.max_answer_tokens, self.room - len(opening) - SPARE)
        if limit < 1 or not opening:
            talked.fault = TOO_LONG if opening else "empty prompt"
            return talked
        said = yield Turn(opening, sampling, limit, self.eos_token_ids)
        talked.spent += len(said.tokens)
        talked.token_ids = [*opening, *said.tokens]
        talked.labels.append((len(opening), len(talked.token_ids)))
        talked.messages.append({"role": "assistant", "content": self.text(said.tokens)})
        return talked

    def _ask(
        self, talked: Talked, number: int, turn: int, turns: Turns, lines: frozenset[int]
    ) -> Generator[Turn, Said, tuple[list[int], bool] | str]:
        """Adds a user's turn that the model writes, but for what ends it; returns the seam to the answer, and whether
        the last token is dropped (see `joined`). A string says why there is no such turn; the text is then undefined.
        """
        given = self.opening(number, turn)
        before_answer = self.seam(turns.before_answer)
        tokens, drop = self.encode(f"{turns.before_next if turn else turns.before_user}{given}"), False
        if turn:
            tokens, drop = self.joined(talked, tokens)
        room = self.settings.max_user_tokens
        if len(talked.token_ids) + len(tokens) + room + len(before_answer) + SPARE >= self.room:
            return TOO_LONG

        ends = self.eos_token_ids | {before_answer[0]}
        sampling = self.asking(number, turn)
        said = yield Turn(tokens, sampling, room, ends | lines, drop)
        talked.spent += len(said.tokens)
        written = said.tokens
        announces = written[-1] in lines - ends and self.text(written, tokens).rstrip().endswith(":")
        if announces and len(written) < room:
            said = yield Turn([], sampling, room - len(written), ends)
            talked.spent += len(said.tokens)
            written = [*written, *said.tokens]
        if said.finish_reason != "stop":
            return NO_QUESTION

        talked.token_ids += tokens
        start = len(talked.token_ids)
        talked.token_ids += written
        rest = ""
        if written[-1] in ends:
            seam, drop = self.joined(talked, before_answer)
        else:  # what the token holds beside the end of the line belongs to the turn
            rest = self.text([talked.token_ids.pop()]).partition("\n")[0].rstrip()
            seam, drop = self.seam(rest + turns.before_answer), True
        user = self.text(talked.token_ids[start:], talked.token_ids[:start]) + rest
        if not is_question(given, user):
            return NO_QUESTION
        talked.messages.append({"role": "user", "content": given + user})
        return seam, drop

    def _answer(
        self, talked: Talked, number: int, turn: int, tokens: list[int], drop: bool
    ) -> Generator[Turn, Said, Said]:
        """Adds `tokens` and the model's answer to the text."""
        said = yield Turn(
            tokens, self.answering(number, turn), self.settings.max_answer_tokens, self.eos_token_ids, drop
        )
        talked.spent += len(said.tokens)
        talked.token_ids += tokens
        start = len(talked.token_ids)
        talked.token_ids += said.tokens
        talked.labels.append((start, len(talked.token_ids)))
        talked.messages.append({"role": "assistant", "content": self.text(said.tokens)})
        return said
