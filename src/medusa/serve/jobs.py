"""What a request asks for -> jobs of the engine -> their chunks, as they come."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from medusa.completion import Chunk
from medusa.errors import ContextFullError, UsageError
from medusa.serve.engine import Engine, Job
from medusa.serve.errors import ApiError, ClosingError, DeadlineError, QueueFullError, bad, failed, refused
from medusa.serve.schema import SamplingFields
from medusa.serve.structure import ANY, Answering, Asked, Structure
from medusa.settings import Sampling, typed_fields
from medusa.text.stream import StopStrings

if TYPE_CHECKING:
    from medusa.api import LanguageModel
    from medusa.grammar.calls import Tool
    from medusa.serve.settings import ServerSettings

RETRY_SECONDS = 2
SEED_BITS = 53  # of seeds that are drawn: those who read JSON into floating-point numbers can send them back
PING_SECONDS = 15.0  # of silence, after which a stream says that it is there
_SAMPLING = [name for name in typed_fields(Sampling) if name != "logit_bias"]  # as requests name them too


@dataclass(frozen=True, slots=True)
class Wanted:
    """Some answers to each of some prompts."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    max_tokens: int | None = None
    n: int = 1
    stop: Sequence[str] = ()
    logprobs: int | None = None
    drafter: str = ""
    param: str = "prompt"  # the field that the prompts came from
    answering: Answering = ANY


class Front:
    """What handlers know of the model: its tokenizer, its name, and the engine that runs it."""

    def __init__(self, lm: LanguageModel, engine: Engine, settings: ServerSettings) -> None:
        self.lm = lm
        self.engine = engine
        self.settings = settings
        self.name = settings.served_name or lm.name
        self._structure = Structure(lm, settings)
        self._reading = threading.Lock()  # a tokenizer is not made for many threads

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise ApiError(404, f"the model {model[:100]} is not here: this is {self.name}", "model", "model_not_found")

    async def encode(
        self, prompt: str | Sequence[dict[str, Any]], *, raw: bool, param: str, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Token ids, made on a thread of its own: a long text takes long. Raises ApiError."""

        def read() -> list[int]:
            with self._reading:
                if isinstance(prompt, str):
                    return self.lm.encode(prompt, raw=raw)
                messages, told = self._structure.prompt(prompt, tools)
                return self.lm.encode(messages, raw=raw, tools=told)

        try:
            return await asyncio.to_thread(read)
        except UsageError as error:
            raise bad(str(error), param) from None

    async def answering(self, asked: Asked) -> Answering:
        """The grammar of answers, where there is one, compiled on a thread of its own. Raises ApiError."""
        if asked.schema is None and not asked.tools:
            return ANY

        def compiled() -> Answering:
            with self._reading:
                form = self._structure.form if asked.tools else None
            return self._structure.answering(asked, form)

        return await asyncio.to_thread(compiled)

    def sampling(self, asked: SamplingFields) -> Sampling:
        """With a seed, drawn now where none was given. Raises ApiError."""
        given = {name: value for name in _SAMPLING if (value := getattr(asked, name)) is not None}
        given.setdefault("seed", secrets.randbits(SEED_BITS))
        given.setdefault("temperature", self.settings.temperature)
        try:
            return Sampling(**given, logit_bias=self._bias(asked.logit_bias or {}))
        except UsageError as error:
            raise refused(error) from None

    def _bias(self, given: dict[str, float]) -> tuple[tuple[int, float], ...]:
        vocabulary = self.lm.backend.vocab_size
        for token in given:
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocabulary):
                raise bad(f"logit_bias: {token[:40]} is no token from 0 to {vocabulary - 1}", "logit_bias")
        return tuple(sorted((int(token), bias) for token, bias in given.items()))

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        vocabulary = self.lm.backend.vocab_size
        if not all(0 <= token < vocabulary for token in tokens):
            raise bad(f"{param}: tokens must be from 0 to {vocabulary - 1}", param)

    def check_choices(self, prompts: int, n: int) -> None:
        """Raises ApiError where more answers are wanted than a request may ask for."""
        if (count := prompts * n) > self.settings.max_choices:
            raise bad(f"n: {count} answers are asked for, but at most {self.settings.max_choices} may be", "n")

    def jobs(self, wanted: Wanted, client: str, name: str, tell: Callable[[int, Chunk | Exception], None]) -> list[Job]:
        """One for each answer, those to one prompt side by side. Raises ApiError."""
        limit, backend = self.settings.max_tokens, self.lm.backend
        if wanted.drafter == "heads" and self.lm.heads is None:
            raise bad("drafter: this model has no heads", "drafter")
        self.check_choices(len(wanted.prompts), wanted.n)
        if limit is not None and wanted.max_tokens is not None and wanted.max_tokens > limit:
            raise bad(f"max_tokens may be at most {limit} here, not {wanted.max_tokens}", "max_tokens")
        # By its own name the model's drafter is the model's drafter still: such requests share their passes.
        drafter = "ngram" if wanted.drafter == "union" and self.lm.heads is None else wanted.drafter
        drafter = "" if drafter == self.lm.stepper.drafter.name else drafter
        most = min(wanted.max_tokens or limit or backend.max_length, backend.max_length)
        jobs: list[Job] = []
        for prompt in wanted.prompts:
            leader: Job | None = None
            for choice in range(wanted.n):
                assert wanted.sampling.seed is not None
                sampling = replace(wanted.sampling, seed=(wanted.sampling.seed + choice) % 2**64)
                stops = StopStrings(tuple(wanted.stop))
                grammar = wanted.answering.grammar
                try:
                    request, text = self.lm.prepare(
                        tuple(prompt),
                        sampling,
                        most,
                        stops,
                        constraint=grammar,
                        logprobs=wanted.logprobs,
                        goes_on=wanted.param == "prompt",
                    )
                except ContextFullError as error:
                    raise bad(str(error), wanted.param, "context_length_exceeded") from None
                except UsageError as error:
                    raise bad(str(error), wanted.param) from None
                job = Job(request, text, partial(tell, len(jobs)), drafter, client, name, leader)
                leader = leader or job
                jobs.append(job)
        return jobs


class Answers:
    """The answers to one request, under way. Who leaves the context ends those that have not ended."""

    def __init__(self, front: Front, wanted: Wanted, client: str = "", request: str = "") -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Chunk | Exception]] = asyncio.Queue()
        self._engine = front.engine
        self.front = front
        self.wanted = wanted
        self.request = request
        self.jobs = front.jobs(wanted, client, request, self._tell)
        try:
            self._engine.submit(self.jobs)
        except QueueFullError:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise ApiError(429, "too many answers wait: try again soon", code="queue_full", headers=headers) from None
        except ClosingError:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise ApiError(503, "the server is ending", code="shutting_down", headers=headers) from None

    def _tell(self, index: int, event: Chunk | Exception) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk] | None]:
        """Which answer, and its chunk, until the last has ended; None where nothing has come for a while. Raises
        ApiError where one fails."""
        left = len(self.jobs)
        while left:
            try:
                index, event = await asyncio.wait_for(self._events.get(), PING_SECONDS)
            except asyncio.TimeoutError:  # two errors in Python 3.10
                yield None
                continue
            if isinstance(event, DeadlineError):
                raise ApiError(504, "the answer took longer than this server allows", code="deadline_exceeded")
            if isinstance(event, UsageError):
                raise bad(str(event))
            if isinstance(event, Exception):
                raise failed()
            left -= event.finish_reason is not None
            yield index, event

    def close(self) -> None:
        for job in self.jobs:
            if not job.ended:
                self._engine.cancel(job)

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once."""
        return sum(len(job.request.prompt) for job in self.jobs[:: self.wanted.n])

    @property
    def reused_tokens(self) -> int:
        return sum(job.reused for job in self.jobs[:: self.wanted.n])


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
