"""Training text from a model that another engine serves: any OpenAI-compatible endpoint.

The chat interface gives answers. For the model to invent what users say, it must be made to write a user's turn, which
only the older text interface (`/completions`) can; engines such as vLLM and llama.cpp have both. How such a turn begins
and ends is told in speaker.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medusa.models import zoo
from medusa.remote import lacks_thoughts, openai_client
from medusa.settings import DistillSettings, Sampling
from medusa.text.turns import Turns
from medusa.training.data import Conversation, MalformedRow, encode
from medusa.training.distill import Prompt, Written, row_header, write_in_order
from medusa.training.speaker import NO_QUESTION, Speaker, is_question
from medusa.training.talk import LoopWatch, Transcript
from medusa.training.text_file import TextFile

if TYPE_CHECKING:
    from openai import OpenAI


T = TypeVar("T")


def distill_remotely(
    url: str,
    model: str,
    out: Path,
    settings: DistillSettings,
    *,
    served_model: str,
    prompts: Sequence[Prompt] | None = None,
    parallel: int = 8,
    on_progress: Callable[[Written], None] = lambda written: None,
) -> Written:
    """Writes conversations to `out`, as `distill` does, asking `url` for each turn.

    Args:
        url: of the API, mostly ending in /v1. The key comes from $OPENAI_API_KEY, if it needs one.
        model: whose tokenizer and chat template the rows follow; `served_model` is its name at the endpoint.
        parallel: conversations under way at once.

    Raises:
        MedusaError: the endpoint cannot be reached, or refuses; or nearly all conversations are dropped. What was
            written stays, and the next run continues it.
    """
    tokenizer = zoo.load_tokenizer(zoo.resolve(model, in_place=True))
    turns = Turns.of(tokenizer)
    speaker = Speaker(tokenizer, frozenset(), settings, slot_length=0)

    def finished(start: int, on_tokens: Callable[[int], None]) -> Iterator[tuple[int, Transcript]]:
        numbers = iter(range(start, 2**63 if prompts is None else len(prompts)))
        with ThreadPoolExecutor(parallel) as pool:
            running: dict[Future[Transcript], int] = {}
            try:
                while True:
                    while len(running) < parallel and (number := next(numbers, None)) is not None:
                        prompt = None if prompts is None else prompts[number]
                        running[pool.submit(remote.talk, number, prompt)] = number
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        number, transcript = running.pop(future), future.result()
                        on_tokens(transcript.spent)
                        yield number, transcript
            finally:
                for future in running:
                    future.cancel()

    header = row_header(model, tokenizer, settings, prompts, {"backend": "endpoint", "dtype": None})
    with openai_client(url) as client:
        remote = Remote(client, served_model, speaker, turns)
        return write_in_order(TextFile(out, header), settings.tokens, finished, on_progress, endless=prompts is None)


def _only(choices: Sequence[T] | None) -> T:
    """The answer of a reply. Raises MalformedRow where it has none."""
    if not choices:
        raise MalformedRow("the endpoint replied without an answer")
    return choices[0]


@dataclass(frozen=True, slots=True)
class Remote:
    """One conversation at a time with the model behind `client`; called from many threads."""

    client: OpenAI
    served_model: str
    speaker: Speaker
    turns: Turns

    def talk(self, number: int, prompt: Prompt | None) -> Transcript:
        """A whole conversation: of the given turns, or of invented ones. What cannot be used has a fault."""
        from openai import BadRequestError

        transcript = Transcript(self.speaker.answering(number, 0).temperature)
        try:
            whole = self._talk(transcript, number, prompt)
            if not transcript.fault:
                self._encode(transcript, whole)
        except BadRequestError as error:  # say, it is longer than the engine's context; other refusals end the run
            transcript.fault = (
                "refused by the endpoint: " + re.sub(r"\d+", "N", error.message)[:120]
            )  # counted by reason
        except MalformedRow as error:
            transcript.fault = str(error)
        transcript.spent = transcript.answer_tokens
        return transcript

    def _talk(self, transcript: Transcript, number: int, prompt: Prompt | None) -> bool:
        """Adds the messages; whether the last answer came to its end."""
        speaker, settings = self.speaker, self.speaker.settings
        count = 1 + speaker.seed(number, 0, "turns") % settings.turns if prompt is None else len(prompt.users)
        if prompt is not None and prompt.system:
            transcript.messages.append({"role": "system", "content": prompt.system})
        whole = True
        for turn in range(count):
            user = self._invent(transcript, number, turn) if prompt is None else prompt.users[turn]
            if user is None:
                transcript.fault = "" if turn else NO_QUESTION
                break
            transcript.messages.append({"role": "user", "content": user})
            answer, whole = self._answer(transcript, number, turn)
            transcript.messages.append({"role": "assistant", "content": answer})
            if not whole:
                break
        return whole

    def _invent(self, transcript: Transcript, number: int, turn: int) -> str | None:
        """The next user turn, by the text interface; None where the model does not come to an end."""
        text = self.turns.before_user
        if transcript.messages:
            if self.turns.before_next is None:
                return None
            contents = [message["content"] for message in transcript.messages]
            seams = [self.turns.before_answer, self.turns.before_next] * len(contents)
            text += "".join(piece for pair in zip(contents, seams, strict=False) for piece in pair)
        opening = self.speaker.opening(number, turn)
        options = self._options(self.speaker.asking(number, turn))
        limit, end = self.speaker.settings.max_user_tokens, self.turns.before_answer.strip()
        rest = self._completed(text + opening, limit, [end, "\n"], options)
        if rest is not None and rest.rstrip().endswith(":"):
            limit -= len(self.speaker.encode(rest)) + 1
            if limit > 0:
                line = f"{rest}\n"
                announced = self._completed(text + opening + line, limit, [end], options)
                rest = None if announced is None else line + announced
        return opening + rest.rstrip() if rest is not None and is_question(opening, rest) else None

    def _completed(self, text: str, limit: int, stop: list[str], options: dict[str, Any]) -> str | None:
        """How a user's turn continues after `text`; None where it does not end within `limit` tokens."""
        reply = self.client.completions.create(prompt=text, max_tokens=limit, stop=stop, **options)
        choice = _only(reply.choices)
        return str(choice.text) if choice.finish_reason == "stop" else None

    def _answer(self, transcript: Transcript, number: int, turn: int) -> tuple[str, bool]:
        """The answer, and whether the model came to its end."""
        messages: Any = transcript.messages
        limit, options = self.speaker.settings.max_answer_tokens, self._options(self.speaker.answering(number, turn))
        reply = self.client.chat.completions.create(messages=messages, max_tokens=limit, **options)
        choice = _only(reply.choices)
        if lacks_thoughts(choice.message):
            # Without its thoughts the answer is a text that the model does not write.
            raise MalformedRow("the endpoint takes thoughts out of the answer: turn its reasoning parser off")
        return choice.message.content or "", choice.finish_reason == "stop"

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        """What both interfaces are asked alike."""
        seed = None if sampling.seed is None else sampling.seed % 2**31
        model, temperature, top_p = self.served_model, sampling.temperature, sampling.top_p
        return {"model": model, "temperature": temperature, "top_p": top_p, "seed": seed}

    def _encode(self, transcript: Transcript, whole: bool) -> None:
        """Tokens and labels; an answer that was cut short or loops ends where it did, and the text with it."""
        example = encode(Conversation(tuple(transcript.messages), ""), self.speaker.tokenizer, self.served_model)
        ids, spans = list(example.token_ids), list(example.spans)
        for i, (start, end) in enumerate(spans):
            if i == len(spans) - 1 and not whole:
                end -= 1  # the template ends every turn, but the model did not
            watch = LoopWatch()
            loop = next((at for at in range(start, end) if watch.push(ids[at])), None)
            spans[i] = start, end if loop is None else loop + 1
            if loop is not None:
                del spans[i + 1 :]
                break
        transcript.labels = [(start, end) for start, end in spans if end > start]
        transcript.token_ids = ids[: transcript.labels[-1][1]] if transcript.labels else []
