"""Training text from a model that another engine serves: any OpenAI-compatible endpoint.

The chat interface gives answers. For the model to invent what users say, it must be made to write a user's turn, which
only the older text interface (`/completions`) can; engines such as vLLM and llama.cpp have both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.models import zoo
from medusa.remote import openai_client
from medusa.training.data import Conversation, encode
from medusa.training.distill import DistillSettings, Prompt, Written, row_header, write_in_order
from medusa.training.speaker import SHORTEST_USER, Speaker
from medusa.training.talk import LoopWatch, Talked
from medusa.training.text_file import TextFile
from medusa.training.turns import Turns

if TYPE_CHECKING:
    from openai import OpenAI


def distill_remotely(
    url: str,
    model: str,
    out: Path,
    settings: DistillSettings,
    *,
    served_model: str,
    prompts: Sequence[Prompt] | None = None,
    parallel: int = 8,
    tell: Callable[[Written], None] = lambda written: None,
) -> Written:
    """Writes conversations to `out`, as `distill` does, asking `url` for each turn.

    Args:
        url: of the API, mostly ending in /v1. The key comes from $OPENAI_API_KEY, if it needs one.
        model: whose tokenizer and chat template the rows follow; `served_model` is its name at the endpoint.
        parallel: conversations under way at once.

    Raises:
        MedusaError: the endpoint cannot be reached, or refuses. What was written stays, and is gone on with.
    """
    tokenizer = zoo.load_tokenizer(zoo.resolve(model))
    turns = Turns.of(tokenizer)
    speaker = Speaker(tokenizer, frozenset(), settings, room=0)

    def finished(start: int, spent: Callable[[int], None]) -> Iterator[tuple[int, Talked]]:
        numbers = iter(range(start, 2**63 if prompts is None else len(prompts)))
        with ThreadPoolExecutor(parallel) as pool:
            running: dict[Future[Talked], int] = {}
            try:
                while True:
                    while len(running) < parallel and (number := next(numbers, None)) is not None:
                        given = None if prompts is None else prompts[number]
                        running[pool.submit(remote.talk, number, given)] = number
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        number, talked = running.pop(future), future.result()
                        spent(talked.answer_tokens)
                        yield number, talked
            finally:
                for future in running:
                    future.cancel()

    header = row_header(model, settings, prompts, {"backend": "endpoint", "dtype": None})
    with openai_client(url) as client:
        remote = Remote(client, served_model, speaker, turns)
        return write_in_order(TextFile(out, header), settings.tokens, finished, tell)


@dataclass(frozen=True, slots=True)
class Remote:
    """One conversation at a time with the model behind `client`; called from many threads."""

    client: OpenAI
    served_model: str
    speaker: Speaker
    turns: Turns

    def talk(self, number: int, prompt: Prompt | None) -> Talked:
        """A whole conversation: of the given turns, or of invented ones."""
        speaker, settings = self.speaker, self.speaker.settings
        talked = Talked(speaker.answering(number, 0).temperature)
        count = 1 + speaker.seed(number, 0, "turns") % settings.turns if prompt is None else len(prompt.users)
        if prompt is not None and prompt.system:
            talked.messages.append({"role": "system", "content": prompt.system})
        whole = True
        for turn in range(count):
            user = self._invent(talked, number, turn) if prompt is None else prompt.users[turn]
            if len(user.strip()) < SHORTEST_USER and prompt is None:
                talked.fault = "" if turn else "no question"
                break
            talked.messages.append({"role": "user", "content": user})
            answer, whole = self._answer(talked, number, turn)
            talked.messages.append({"role": "assistant", "content": answer})
            if not whole:
                break
        if not talked.fault:
            self._encode(talked, whole)
        return talked

    def _invent(self, talked: Talked, number: int, turn: int) -> str:
        """The next user turn, by the text interface; empty where the model does not come to an end."""
        settings = self.speaker.settings
        text = self.turns.before_user
        if talked.messages:
            if self.turns.before_next is None:
                return ""
            contents = [message["content"] for message in talked.messages]
            seams = [self.turns.before_answer, self.turns.before_next] * len(contents)
            text += "".join(piece for pair in zip(contents, seams, strict=False) for piece in pair)
        choice = self.client.completions.create(
            model=self.served_model,
            prompt=text,
            max_tokens=settings.max_user_tokens,
            temperature=settings.user_temperature,
            top_p=settings.top_p,
            seed=self.speaker.seed(number, turn, "user") % 2**31,
            stop=[self.turns.before_answer.strip()],
        ).choices[0]
        return choice.text if choice.finish_reason == "stop" else ""

    def _answer(self, talked: Talked, number: int, turn: int) -> tuple[str, bool]:
        """The answer, and whether the model came to its end."""
        sampling = self.speaker.answering(number, turn)
        messages: Any = talked.messages
        choice = self.client.chat.completions.create(
            model=self.served_model,
            messages=messages,
            max_tokens=self.speaker.settings.max_answer_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=None if sampling.seed is None else sampling.seed % 2**31,
        ).choices[0]
        return choice.message.content or "", choice.finish_reason == "stop"

    def _encode(self, talked: Talked, whole: bool) -> None:
        """Tokens and labels; an answer that was cut short or loops ends where it did, and the text with it."""
        example = encode(Conversation(tuple(talked.messages), ""), self.speaker.tokenizer, self.served_model)
        ids, spans = list(example.token_ids), list(example.spans)
        for i, (start, end) in enumerate(spans):
            if i == len(spans) - 1 and not whole:
                end -= 1  # the template ends every turn, but the model did not
            watch = LoopWatch()
            loop = next((at for at in range(start, end) if watch.push(ids[at])), None)
            if loop is not None:
                end = loop + 1
            spans[i] = start, end
            if loop is not None:
                del spans[i + 1 :]
                break
        talked.labels = [(start, end) for start, end in spans if end > start]
        talked.token_ids = ids[: talked.labels[-1][1]] if talked.labels else []
