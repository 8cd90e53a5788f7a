"""What the model says in a conversation, and what it is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa.decoding.sampling import Sampling
from medusa.training.talk import Said, Talk, Talked, Turn
from medusa.training.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medusa.training.distill import DistillSettings

SHORTEST_USER = 10  # characters of an invented user turn
SPARE = 8  # tokens that an answer finds room for, at the least
TOO_LONG = "too long"  # for the slots


@dataclass(frozen=True, slots=True)
class Speaker:
    """What all conversations share: the tokenizer, the seams of the template, the limits."""

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    settings: DistillSettings
    room: int  # tokens that a slot holds

    def seed(self, number: int, turn: int, who: str) -> int:
        text = f"{self.settings.seed}/{number}/{turn}/{who}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

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

    def invented(self, number: int, turns: Turns) -> Talk:
        """The model asks and answers."""
        limits = self.settings
        talked = Talked(self.answering(number, 0).temperature)
        count = 1 + self.seed(number, 0, "turns") % (limits.turns if turns.before_next is not None else 1)
        before_answer = self.encode(turns.before_answer)
        user_ends = self.eos_token_ids | {before_answer[0]}
        seam, drop = self.encode(turns.before_user), False
        for turn in range(count):
            if len(talked.token_ids) + len(seam) + limits.max_user_tokens + len(before_answer) >= self.room - SPARE:
                talked.fault = "" if turn else TOO_LONG
                break
            asking = Sampling(
                temperature=limits.user_temperature, top_p=limits.top_p, seed=self.seed(number, turn, "user")
            )
            said = yield Turn(seam, asking, limits.max_user_tokens, user_ends, drop)
            user = self.text(said.tokens)
            if said.finish_reason != "stop" or len(user.strip()) < SHORTEST_USER:
                talked.fault = "" if turn else "no question"
                break
            talked.token_ids += [*seam, *said.tokens]
            tokens, drop = self.joined(talked, before_answer)
            said = yield from self._answer(talked, number, turn, tokens, drop)
            talked.messages += [
                {"role": "user", "content": user},
                {"role": "assistant", "content": self.text(said.tokens)},
            ]
            if said.finish_reason != "stop" or turn + 1 == count:
                break
            assert turns.before_next is not None
            seam, drop = self.joined(talked, self.encode(turns.before_next))
        return talked

    def given(self, number: int, turns: Turns, system: str | None, users: Sequence[str]) -> Talk:
        """The model answers what it is asked, turn by turn."""
        talked = Talked(self.answering(number, 0).temperature)
        if system:
            talked.messages.append({"role": "system", "content": system})
        for turn, user in enumerate(users):
            if turn and turns.before_next is None:
                break
            opening = turns.before_next if turn else turns.before_user
            tokens, drop = self.encode(f"{opening}{user}{turns.before_answer}"), False
            if turn:
                tokens, drop = self.joined(talked, tokens)
            if len(talked.token_ids) + len(tokens) + SPARE >= self.room:
                talked.fault = "" if turn else TOO_LONG
                break
            said = yield from self._answer(talked, number, turn, tokens, drop)
            talked.messages += [
                {"role": "user", "content": user},
                {"role": "assistant", "content": self.text(said.tokens)},
            ]
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
        talked.token_ids = [*opening, *said.tokens]
        talked.labels.append((len(opening), len(talked.token_ids)))
        talked.messages.append({"role": "assistant", "content": self.text(said.tokens)})
        return talked

    def _answer(
        self, talked: Talked, number: int, turn: int, tokens: list[int], drop: bool
    ) -> Generator[Turn, Said, Said]:
        """Adds `tokens` and the model's answer to the text."""
        said = yield Turn(
            tokens, self.answering(number, turn), self.settings.max_answer_tokens, self.eos_token_ids, drop
        )
        talked.token_ids += tokens
        start = len(talked.token_ids)
        talked.token_ids += said.tokens
        talked.labels.append((start, len(talked.token_ids)))
        return said
