"""Training text that the model writes itself: invented user turns, its answers, several turns deep.

Conversation n is a function of the settings, the seed and n alone, and rows are written in the order of n: a run that
was killed and goes on ends with the same file as one that was not. Conversations run side by side, one in each slot of
the backend, by plain decoding; a slot goes on with its text, so that no turn is computed twice.

What heads learn best is what will be decoded, so answers end where the model ends them; those that fall into a loop are
cut once the loop is plain (see `LoopWatch`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medusa.decoding.draft import NoDrafter, Row
from medusa.decoding.loop import Decoder
from medusa.decoding.sampling import Sampling
from medusa.errors import MedusaError, UsageError
from medusa.training.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medusa.generation import LanguageModel

SHORTEST_USER = 10  # characters of an invented user turn
SHORTEST_ANSWER = 8  # tokens of a conversation's answers


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """What is written. `tokens` is how many tokens of answers; the others shape each conversation."""

    tokens: int = 200_000
    seed: int = 0
    turns: int = 3  # a conversation has 1 to this many user turns
    max_user_tokens: int = 96
    max_answer_tokens: int = 320
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7)  # of answers; conversation n takes them in turn
    user_temperature: float = 1.0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("tokens", self.tokens >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("turns", self.turns >= 1, "at least 1"),
            ("max_user_tokens", self.max_user_tokens >= 1, "at least 1"),
            ("max_answer_tokens", self.max_answer_tokens >= 1, "at least 1"),
            ("temperatures", bool(self.temperatures), "one temperature or more"),
        ):
            if not good:
                raise UsageError(f"{name} must be {rule}, not {getattr(self, name)}")
        for temperature in (*self.temperatures, self.user_temperature):
            Sampling(temperature=temperature, top_p=self.top_p)

    def shape(self) -> dict[str, Any]:
        """The settings that a row depends on: all but how many there are to be."""
        return {name: value for name, value in json.loads(json.dumps(asdict(self))).items() if name != "tokens"}


class LoopWatch:
    """Tells when a text has fallen into a loop: nearly all of its last `window` 4-grams have occurred in it before."""

    def __init__(self, window: int = 64, share: float = 0.85) -> None:
        self._window, self._share = window, share
        self._last: deque[int] = deque(maxlen=4)
        self._seen: set[tuple[int, ...]] = set()
        self._repeats: deque[bool] = deque(maxlen=window)

    def push(self, token: int) -> bool:
        """Adds a token; whether the text loops."""
        self._last.append(token)
        if len(self._last) == 4:
            gram = tuple(self._last)
            self._repeats.append(gram in self._seen)
            self._seen.add(gram)
        return len(self._repeats) == self._window and sum(self._repeats) >= self._share * self._window


# --- conversations side by side -------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What a conversation asks for: tokens to add to its text, and how to go on from there until one of `ends`."""

    tokens: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int]
    drop_last: bool = False  # the last token of the text is taken back first


class Said(NamedTuple):
    """What the model said, the token that ended it included."""

    tokens: list[int]
    finish_reason: str  # "stop", "length" or "loop"


Talk = Generator[Turn, Said, "Talked"]


def talk_in_slots(
    decoder: Decoder, talks: Iterable[tuple[int, Talk]], spent: Callable[[int], None] = lambda tokens: None
) -> Iterator[tuple[int, Talked]]:
    """Runs numbered conversations, as many at once as there are slots; gives what each returns, as they end.

    `spent` is told after each pass how many tokens it gave.
    """
    queue = iter(talks)
    free = list(range(decoder.backend.num_slots))[::-1]
    running: dict[int, tuple[int, Talk, Row, LoopWatch]] = {}
    ended: list[tuple[int, Talked]] = []

    def go_on(slot: int, number: int, talk: Talk, said: Said | None, before: Row | None) -> None:
        """Starts the conversation's next turn; one that is over at once is followed by the next."""
        while True:
            try:
                turn = next(talk) if said is None else talk.send(said)
            except StopIteration as end:
                decoder.backend.release(slot)
                free.append(slot)
                ended.append((number, end.value))
                return
            options: dict[str, Any] = {"max_new_tokens": turn.max_new_tokens, "eos_token_ids": turn.ends}
            if before is None:
                row, step = decoder.start(slot, turn.tokens, turn.sampling, **options)
            else:
                if turn.drop_last:
                    before.tokens.pop()
                row, step = decoder.resume(before, turn.tokens, turn.sampling, **options)
            if row.finish_reason is None:
                watch = LoopWatch()
                watch.push(step.tokens[0])
                running[slot] = number, talk, row, watch
                return
            said, before = Said(list(step.tokens), row.finish_reason), row

    try:
        while True:
            while free and (item := next(queue, None)) is not None:
                go_on(free.pop(), *item, None, None)
            yield from ended
            ended.clear()
            if not running:
                return
            steps = decoder.step([row for _, _, row, _ in running.values()])
            spent(sum(len(step.tokens) for step in steps))
            for (slot, (number, talk, row, watch)), step in zip(list(running.items()), steps, strict=True):
                looped = sum(watch.push(token) for token in step.tokens) > 0  # all are pushed
                if row.finish_reason is not None or looped:
                    del running[slot]
                    said = Said(row.tokens[row.prompt_tokens :], row.finish_reason or "loop")
                    go_on(slot, number, talk, said, row)
    finally:
        for slot in running:
            decoder.backend.release(slot)


# --- what is talked about -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Talked:
    """A conversation as it grew. `labels` are the answers' tokens, [start, end). `fault` says why it is not kept."""

    temperature: float
    messages: list[dict[str, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    labels: list[tuple[int, int]] = field(default_factory=list)
    fault: str = ""

    @property
    def answer_tokens(self) -> int:
        return sum(end - start for start, end in self.labels)


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
            if len(talked.token_ids) + len(seam) + limits.max_user_tokens + len(before_answer) >= self.room - 8:
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
            if len(talked.token_ids) + len(tokens) + 8 >= self.room:
                talked.fault = "" if turn else "too long"
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
        limit = min(self.settings.max_answer_tokens, self.room - len(opening) - 8)
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


# --- the file -------------------------------------------------------------------------------------------------------


class TextFile:
    """The JSONL of a run, which only grows, one whole row at a time. Opening it takes up what an earlier run left."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Raises UsageError when the file was made with other settings, MedusaError when it is not such a file."""
        self.path = path
        self.header = dict(header)  # what every row says of how it came about
        self.rows = 0
        self.tokens = 0  # of answers
        self.next_number = 0
        self._seen: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._take_up()
        self._file = path.open("a", encoding="utf-8")

    def _take_up(self) -> None:
        whole = 0  # bytes up to the end of the last whole row
        with self.path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # the run was killed while writing
                try:
                    row = json.loads(line)
                    header = {name: row[name] for name in self.header}
                    number, labels = int(row["number"]), row["labels"]
                    tokens = sum(end - start for start, end in labels)
                except (ValueError, KeyError, TypeError):
                    raise MedusaError(
                        f"{self.path}, line {line_number}, is not a row of distilled text: name a new file"
                    ) from None
                if header != self.header:
                    name = next(name for name in self.header if header[name] != self.header[name])
                    raise UsageError(
                        f"{self.path} was made with {name} {_short(header[name])}, not {_short(self.header[name])}: "
                        "go on with the same settings, or name a new file"
                    )
                whole += len(line)
                self._count(row, number, tokens)
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)

    def add(self, number: int, talked: Talked) -> str:
        """Writes a conversation, unless there is a reason not to, which is returned. Numbers must ascend."""
        if talked.fault:
            return talked.fault
        if talked.answer_tokens < SHORTEST_ANSWER:
            return "too short"
        row = {
            "number": number,
            **self.header,
            "temperature": talked.temperature,
            "messages": talked.messages,
            "token_ids": talked.token_ids,
            "labels": talked.labels,
        }
        if self._seen & _keys(row):
            return "repeated"
        # One write of a whole line: what is cut short by a kill is one row, which the next run drops.
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise MedusaError(
                f"cannot write {self.path}: {error.strerror}; make room and run the same command again"
            ) from None
        self._count(row, number, talked.answer_tokens)
        return ""

    def _count(self, row: Mapping[str, Any], number: int, tokens: int) -> None:
        self._seen |= _keys(row)
        self.rows += 1
        self.tokens += tokens
        self.next_number = number + 1

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a row that found no room, which has been reported
            self._file.close()


def _keys(row: Mapping[str, Any]) -> set[str]:
    """What two conversations must not share: the first question, or all that was said."""
    said = [f"{message['role']} {' '.join(message['content'].lower().split())}" for message in row["messages"]]
    whole = said if said else [repr(row["token_ids"])]
    parts = ["\n".join(whole), *(said[:1] if len(said) > 1 and said[0].startswith("user") else [])]
    return {hashlib.sha256(part.encode("utf-8", "replace")).hexdigest()[:24] for part in parts}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Written:
    """Where a run stands. `spent` counts all tokens that the model wrote in this run, kept or not."""

    rows: int = 0
    tokens: int = 0  # of answers, those of earlier runs included
    wanted: int = 0
    spent: int = 0
    seconds: float = 0.0
    before: int = 0  # of `tokens`, what earlier runs wrote
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> conversations

    @property
    def tokens_per_second(self) -> float:
        return self.spent / self.seconds if self.seconds else 0.0

    @property
    def kept_per_second(self) -> float:
        return (self.tokens - self.before) / self.seconds if self.seconds else 0.0

    def summary(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"{self.rows} conversations, {self.tokens} tokens of answers" + (
            f"; dropped: {dropped}" if dropped else ""
        )


def distill(
    lm: LanguageModel,
    out: Path,
    settings: DistillSettings,
    *,
    prompts: Sequence[Prompt] | None = None,
    tell: Callable[[Written], None] = lambda written: None,
) -> Written:
    """Writes conversations of `lm` to `out` until there are `settings.tokens` tokens of answers, or no prompt is left.

    Args:
        lm: the model, with as many slots as conversations are to run side by side; it decodes plainly.
        out: a JSONL file; one that an earlier run with the same settings left is gone on with.
        prompts: what users say; None lets the model invent it.
        tell: called after each pass and each row.

    Raises:
        UsageError: settings that do not go with the model, or with the file there is.
        MedusaError: the file is not one of distilled text.
    """
    speaker = Speaker(lm.tokenizer, frozenset(lm.eos_token_ids), settings, lm.backend.max_length)
    decoder = Decoder(lm.backend, NoDrafter(), 1)

    def finished(start: int, spent: Callable[[int], None]) -> Iterator[tuple[int, Talked]]:
        return talk_in_slots(decoder, _talks(speaker, start, prompts), spent)

    header = row_header(lm.name, settings, prompts, lm.runs_on())
    return write_in_order(TextFile(out, header), settings.tokens, finished, tell)


def row_header(
    model: str, settings: DistillSettings, prompts: Sequence[Prompt] | None, runs_on: Mapping[str, object]
) -> dict[str, Any]:
    """What every row says of how it came about."""
    asked = {} if prompts is None else {"prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]}
    return {"model": model, "seed": settings.seed, "settings": {**settings.shape(), **runs_on, **asked}}


def write_in_order(
    file: TextFile,
    wanted: int,
    finished: Callable[[int, Callable[[int], None]], Iterator[tuple[int, Talked]]],
    tell: Callable[[Written], None],
) -> Written:
    """Writes conversations by number until there are `wanted` tokens of answers, or no more conversations.

    `finished` is called with the first number and with what is to hear of tokens spent; it gives conversations in the
    order in which they end.
    """
    written = Written(file.rows, file.tokens, wanted, before=file.tokens)
    started = time.perf_counter()

    def spent(tokens: int) -> None:
        written.spent += tokens
        written.seconds = time.perf_counter() - started
        tell(written)

    waiting: dict[int, Talked] = {}
    number = file.next_number
    talks = finished(number, spent)
    try:
        while file.tokens < wanted:
            if number not in waiting:
                ended = next(talks, None)
                if ended is None:
                    break
                waiting[ended[0]] = ended[1]
                continue
            if reason := file.add(number, waiting.pop(number)):
                written.dropped[reason] += 1
            number += 1
            written.rows, written.tokens = file.rows, file.tokens
            tell(written)
    finally:
        talks.close()  # type: ignore[attr-defined]
        file.close()
    return written


class Prompt(NamedTuple):
    """What a user says, turn by turn, in one conversation."""

    users: tuple[str, ...]
    system: str | None = None


def _talks(speaker: Speaker, start: int, prompts: Sequence[Prompt] | None) -> Iterator[tuple[int, Talk]]:
    """The conversations from number `start` on."""
    tokenizer = speaker.tokenizer
    if not tokenizer.chat_template:
        if prompts is None:
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            if first is None:
                raise UsageError("the model has neither a chat template nor a first token: give prompts")
            for number in itertools.count(start):
                yield number, speaker.plain(number, [first])
        else:
            for number, prompt in enumerate(prompts[start:], start):
                yield number, speaker.plain(number, list(tokenizer("\n\n".join(prompt.users))["input_ids"]))
    elif prompts is None:
        turns = Turns.of(tokenizer)
        for number in itertools.count(start):
            yield number, speaker.invented(number, turns)
    else:
        shapes: dict[str | None, Turns] = {}
        for number, prompt in enumerate(prompts[start:], start):
            if prompt.system not in shapes:
                shapes[prompt.system] = Turns.of(tokenizer, prompt.system)
            yield number, speaker.given(number, shapes[prompt.system], prompt.system, prompt.users)
