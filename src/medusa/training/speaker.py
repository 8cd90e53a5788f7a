"""What the model says in a conversation, and what it is asked.

A user's turn that the model invents begins with a few words that are given (see openings.py). It ends where the model
ends it, or with its first line: many models have only learned to end answers, and would write one next. After a colon
the turn continues, to what the line announces, until the model ends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa.decoding.sampling import Sampling
from medusa.text.turns import Turns
from medusa.training.openings import opening
from medusa.training.talk import Reply, Talk, Transcript, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medusa.settings import DistillSettings

SHORTEST_USER = 10  # characters of an invented user turn
SPARE = 8  # tokens that an answer finds room for, at the least
TOO_LONG = "too long"  # for the slots
NO_QUESTION = "no question"


def is_question(opening: str, rest: str) -> bool:
    """Whether a user's turn says anything beyond the words that it was given to begin with."""
    return len((opening + rest).strip()) >= SHORTEST_USER and any(map(str.isalnum, rest))


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
    slot_length: int  # tokens that a slot holds

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
        return self._sampling(self.settings.user_temperature, self.seed(number, turn, "user"))

    def answering(self, number: int, turn: int) -> Sampling:
        temperatures = self.settings.temperatures
        return self._sampling(temperatures[number % len(temperatures)], self.seed(number, turn, "answer"))

    def _sampling(self, temperature: float, seed: int) -> Sampling:
        return Sampling(temperature=temperature, top_p=self.settings.top_p if temperature else 1.0, seed=seed)

    def joined(self, transcript: Transcript, seam: list[int]) -> tuple[list[int], bool]:
        """How `seam` follows the text, whose last token the model wrote to end its turn: what to add, and whether the
        last token is dropped because the template ends the turn in another way."""
        if not transcript.token_ids:
            return seam, False
        if transcript.token_ids[-1] == seam[0]:
            return seam[1:], False
        if transcript.token_ids[-1] in self.eos_token_ids:
            transcript.token_ids.pop()
            if transcript.labels and transcript.labels[-1][1] > len(transcript.token_ids):
                start, end = transcript.labels.pop()
                if start < end - 1:  # else the model answered by its end alone
                    transcript.labels.append((start, end - 1))
            return seam, True
        return seam, False

    def invented(self, number: int, turns: Turns, lines: frozenset[int]) -> Talk:
        """The model asks and answers. `lines` are the tokens that end a line."""
        transcript = Transcript(self.answering(number, 0).temperature)
        most = self.settings.turns if turns.before_next is not None else 1
        for turn in range(1 + self.seed(number, 0, "turns") % most):
            before = list(transcript.token_ids), list(transcript.labels)
            seam = yield from self._ask(transcript, number, turn, turns, lines)
            if isinstance(seam, str):  # what was said before is kept as it was
                transcript.token_ids, transcript.labels = before
                transcript.fault = "" if turn else seam
                break
            if not (yield from self._answer(transcript, self._answer_turn(number, turn, *seam))):
                break
        return transcript

    def given(self, number: int, turns: Turns, system: str | None, users: Sequence[str]) -> Talk:
        """The model answers what it is asked, turn by turn."""
        transcript = Transcript(self.answering(number, 0).temperature)
        if system:
            transcript.messages.append({"role": "system", "content": system})
        for turn, user in enumerate(users):
            if turn and turns.before_next is None:
                break
            before = turns.before_next if turn else turns.before_user
            tokens, drop = self.joined(transcript, self.encode(f"{before}{turns.shown(user)}{turns.before_answer}"))
            if len(transcript.token_ids) + len(tokens) + SPARE >= self.slot_length:
                transcript.fault = "" if turn else TOO_LONG
                break
            transcript.messages.append({"role": "user", "content": user})
            if not (yield from self._answer(transcript, self._answer_turn(number, turn, tokens, drop))):
                break
        return transcript

    def plain(self, number: int, opening: Sequence[int]) -> Talk:
        """A text without turns, for models without a chat template."""
        transcript = Transcript(self.settings.user_temperature)
        sampling = self._sampling(self.settings.user_temperature, self.seed(number, 0, "text"))
        limit = min(self.settings.max_answer_tokens, self.slot_length - len(opening) - SPARE)
        if limit < 1 or not opening:
            transcript.fault = TOO_LONG if opening else "empty prompt"
            return transcript
        yield from self._answer(transcript, Turn(opening, sampling, limit, self.eos_token_ids))
        return transcript

    def _ask(
        self, transcript: Transcript, number: int, turn: int, turns: Turns, lines: frozenset[int]
    ) -> Generator[Turn, Reply, tuple[list[int], bool] | str]:
        """Adds a user's turn that the model writes, but for what ends it; returns the seam to the answer, and whether
        the last token is dropped (see `joined`). A string says why there is no such turn; the text is then undefined.
        """
        opening = self.opening(number, turn)
        before_answer = self.seam(turns.before_answer)
        before = turns.before_next if turn else turns.before_user
        tokens, drop = self.joined(transcript, self.encode(f"{before}{opening}"))
        limit = self.settings.max_user_tokens
        if len(transcript.token_ids) + len(tokens) + limit + len(before_answer) + SPARE >= self.slot_length:
            return TOO_LONG

        ends = self.eos_token_ids | {before_answer[0]}
        sampling = self.asking(number, turn)
        reply = yield Turn(tokens, sampling, limit, ends | lines, drop)
        transcript.spent += len(reply.tokens)
        written = reply.tokens
        announces = written[-1] in lines - ends and self.text(written, tokens).rstrip().endswith(":")
        if announces and len(written) < limit:
            reply = yield Turn([], sampling, limit - len(written), ends)
            transcript.spent += len(reply.tokens)
            written = [*written, *reply.tokens]
        if reply.finish_reason != "stop":
            return NO_QUESTION

        transcript.token_ids += tokens
        start = len(transcript.token_ids)
        transcript.token_ids += written
        rest = ""
        if written[-1] in ends:
            seam, drop = self.joined(transcript, before_answer)
        else:  # what the token holds beside the end of the line belongs to the turn
            rest = self.text([transcript.token_ids.pop()]).partition("\n")[0].rstrip()
            seam, drop = self.seam(rest + turns.before_answer), True
        user = self.text(transcript.token_ids[start:], transcript.token_ids[:start]) + rest
        if not is_question(opening, user):
            return NO_QUESTION
        transcript.messages.append({"role": "user", "content": opening + user})
        return seam, drop

    def _answer_turn(self, number: int, turn: int, tokens: list[int], drop: bool) -> Turn:
        sampling, limit = self.answering(number, turn), self.settings.max_answer_tokens
        return Turn(tokens, sampling, limit, self.eos_token_ids, drop)

    def _answer(self, transcript: Transcript, turn: Turn) -> Generator[Turn, Reply, bool]:
        """Adds the turn's tokens and the model's answer to the text; whether the model ended it."""
        reply = yield turn
        transcript.spent += len(reply.tokens)
        transcript.token_ids += turn.tokens
        start = len(transcript.token_ids)
        transcript.token_ids += reply.tokens
        transcript.labels.append((start, len(transcript.token_ids)))
        if reply.features is not None:
            transcript.features[start] = reply.features
        transcript.messages.append({"role": "assistant", "content": self.text(reply.tokens)})
        return reply.finish_reason == "stop"
