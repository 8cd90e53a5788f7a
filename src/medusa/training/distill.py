"""Training text that the model writes itself: invented user turns, its answers, several turns deep.

Conversation n is a function of the settings, the seed and n alone, and rows are written in the order of n: a run that
was killed and continues ends with the same file as one that was not. So it is on the native engine, to the bit, and in
float32. On the transformers backend in bfloat16 the width of a pass changes how sums are rounded, and near-ties fall
differently: there a conversation also depends on which others ran beside it, and a run that continues ends with another
file, as good as the first. The same holds for an endpoint, as far as its engine does so.

What heads learn best is what will be decoded, so answers end where the model ends them; those that fall into a loop are
cut once the loop is plain (see `LoopWatch`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medusa.decoding.draft import NoDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.errors import MedusaError, UsageError
from medusa.settings import DistillSettings
from medusa.text.chat_template import encode_plain
from medusa.text.turns import Turns
from medusa.training import openings
from medusa.training.conversations import Example
from medusa.training.speaker import Speaker, line_ends
from medusa.training.talk import Talk, Transcript, talk_in_slots
from medusa.training.text_file import OPENINGS, REPEATED, TextFile, fault_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from medusa.api import LanguageModel
    from medusa.training.stored_features import FeatureStore

JUDGED = 200  # conversations, by the last of which a run is judged
HOPELESS = 0.95  # share of them


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
    # Of the conversations of this run that have ended, those that wait for an earlier number included: tokens that the
    # model wrote, and tokens of answers that are kept.
    ended_spent: int = 0
    ended_kept: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.spent / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By what this run has kept of the tokens it wrote; None until two thirds are of conversations that have
        ended, for the first to end are short ones. Those under way count, as so much of their tokens will be kept."""
        if not self.ended_kept or 3 * self.ended_spent < 2 * self.spent:
            return None
        kept = self.spent * self.ended_kept / self.ended_spent
        return max(0.0, self.seconds * ((self.wanted - self.before) / kept - 1))

    def summary(self) -> str:
        return f"{self.rows} conversations, {self.tokens} tokens of answers" + (
            f"; dropped: {counts(self.dropped)}" if self.dropped else ""
        )


def counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def distill(
    lm: LanguageModel,
    out: Path,
    settings: DistillSettings,
    *,
    prompts: Sequence[Prompt] | None = None,
    on_progress: Callable[[Written], None] = lambda written: None,
    seconds: float | None = None,
    features: FeatureStore | None = None,
) -> Written:
    """Writes conversations of `lm` to `out` until there are `settings.tokens` tokens of answers, or no prompt is left.

    Args:
        lm: the model, with as many slots as conversations are to run side by side; it decodes plainly.
        out: a JSONL file; one that an earlier run with the same settings left is continued.
        prompts: what users say; None lets the model invent it.
        on_progress: called after each pass and each row.
        seconds: after which it ends with what there is; None: no limit.
        features: where to put the features by which the model chose its answers, of which heads learn. They are those
            that reading the text would give on backends whose numbers do not depend on who shares a pass (`same_bits`);
            only these can keep them.

    Raises:
        UsageError: settings that do not go with the model, or with the file there is.
        MedusaError: the file is not one of distilled text; or nearly all conversations are dropped.
    """
    speaker = Speaker(lm.tokenizer, frozenset(lm.eos_token_ids), settings, lm.backend.max_length)
    from medusa.training.device_talk import runs_on_device, talk_on_device  # needs torch, which an endpoint does not

    device = runs_on_device(lm.backend)
    if features is not None and not lm.backend.same_bits:
        raise UsageError(f"the {lm.backend.name} backend cannot keep features: others would share their passes")

    def finished(start: int, on_tokens: Callable[[int], None]) -> Iterator[tuple[int, Transcript]]:
        talks = _talks(speaker, start, prompts)
        if device is not None:
            return talk_on_device(device, talks, on_tokens)
        plainly = ReferenceStepper(lm.backend, NoDrafter(), 1)
        return talk_in_slots(plainly, talks, on_tokens, features=features is not None)

    def keep_features(transcript: Transcript) -> None:
        if features is not None:
            features.add(*_example_of(transcript), lm.backend.max_length)

    header = row_header(lm.name, lm.tokenizer, settings, prompts, lm.runs_on())
    try:
        return write_in_order(
            *(TextFile(out, header), settings.tokens, finished, on_progress),
            endless=prompts is None,
            seconds=seconds,
            on_row=keep_features,
        )
    finally:
        if features is not None:
            features.flush()


def _example_of(transcript: Transcript) -> tuple[Example, Tensor]:
    """A conversation as it is read from its file, and the features of its rows: one for each token of its answers."""
    import torch

    features = [transcript.features[start][: end - start] for start, end in transcript.labels]
    return Example(tuple(transcript.token_ids), tuple(transcript.labels), ""), torch.cat(features)


def row_header(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: DistillSettings,
    prompts: Sequence[Prompt] | None,
    runs_on: Mapping[str, object],
) -> dict[str, Any]:
    """What every row says of how it came about."""
    users = {}
    if prompts is not None:
        users["prompts"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    elif tokenizer.chat_template:
        users[OPENINGS] = openings.digest()
    return {"model": model, "seed": settings.seed, "settings": {**settings.shape(), **runs_on, **users}}


def write_in_order(
    file: TextFile,
    wanted: int,
    finished: Callable[[int, Callable[[int], None]], Iterator[tuple[int, Transcript]]],
    on_progress: Callable[[Written], None],
    *,
    endless: bool,
    seconds: float | None = None,
    on_row: Callable[[Transcript], None] = lambda transcript: None,
) -> Written:
    """Writes conversations by number until there are `wanted` tokens of answers, or no more conversations. When
    `seconds` have gone by, those that have ended are written and those under way are left out, numbers and all.

    `finished` is called with the first number and what to call with tokens spent; it gives conversations in the
    order in which they end. `endless` says that it always gives another one. `on_row` is called once a row is written.

    Raises:
        UsageError: the file was begun in another way.
        MedusaError: nearly all conversations are dropped.
    """
    written = Written(file.rows, file.tokens, wanted, before=file.tokens)
    if file.older and file.tokens < wanted:
        file.close()
        raise UsageError(
            f"{file.path} was begun by an older version of Medusa, which invented questions in another way: "
            "name a new file or directory"
        )
    judge = Judge(endless)
    started = time.perf_counter()

    def on_tokens(count: int) -> None:
        written.spent += count
        written.seconds = time.perf_counter() - started
        on_progress(written)

    waiting: dict[int, Transcript] = {}
    number = file.next_number
    talks = finished(number, on_tokens)
    try:
        while file.tokens < wanted:
            over = seconds is not None and time.perf_counter() - started >= seconds
            if over and waiting:
                number = min(waiting)
            elif over:
                break
            if number not in waiting:
                ended = next(talks, None)
                if ended is None:
                    break
                ended_number, transcript = ended
                waiting[ended_number] = transcript
                written.ended_spent += transcript.spent
                written.ended_kept += 0 if fault_of(transcript) else transcript.answer_tokens
                continue
            transcript = waiting.pop(number)
            reason = file.add(number, transcript)
            if reason:
                written.dropped[reason] += 1
                written.ended_kept -= 0 if fault_of(transcript) else transcript.answer_tokens  # it is a repetition
            else:
                on_row(transcript)
            number += 1
            written.rows, written.tokens = file.rows, file.tokens
            on_progress(written)
            judge.add(reason)
    finally:
        talks.close()  # type: ignore[attr-defined]
        file.close()
    return written


@dataclass(slots=True)
class Judge:
    """Ends a run in which nearly all conversations are dropped, for it would hardly come to an end, or waste its time.
    A prompt that comes twice is no reason: these come to an end."""

    endless: bool
    _last: deque[str] = field(default_factory=lambda: deque(maxlen=JUDGED))

    def add(self, reason: str) -> None:
        """Takes why a conversation was dropped, or "". Raises MedusaError."""
        if reason == REPEATED and not self.endless:
            return
        self._last.append(reason)
        dropped = Counter(filter(None, self._last))
        if len(self._last) == JUDGED and dropped.total() > HOPELESS * JUDGED:
            mend = "give prompts (--prompts FILE)" if self.endless else "mend the prompts"
            raise MedusaError(
                f"of the last {JUDGED} conversations {dropped.total()} were dropped ({counts(dropped)}): {mend}"
            )


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
                yield number, speaker.plain(number, encode_plain(tokenizer, "\n\n".join(prompt.users)))
    elif prompts is None:
        turns, lines = Turns.of(tokenizer), line_ends(tokenizer)
        for number in itertools.count(start):
            yield number, speaker.invented(number, turns, lines)
    else:
        shapes: dict[str | None, Turns] = {}
        for number, prompt in enumerate(prompts[start:], start):
            if prompt.system not in shapes:
                shapes[prompt.system] = Turns.of(tokenizer, prompt.system)
            yield number, speaker.given(number, shapes[prompt.system], prompt.system, prompt.users)
