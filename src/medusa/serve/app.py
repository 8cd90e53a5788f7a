"""The routes: what each interface reads, and which form its answers have."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response, StreamingResponse

import medusa
from medusa.serve.engine import Engine
from medusa.serve.errors import ApiError, bad, failed
from medusa.serve.forms import DONE, ChatForm, CompletionForm, Form, stream, whole
from medusa.serve.guard import App, Caller, Guard, Json, Keys, error_response
from medusa.serve.jobs import Answers, Front, Wanted
from medusa.serve.metrics import Metrics
from medusa.serve.responses import ResponsesForm
from medusa.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    SamplingFields,
    TokenizeRequest,
    turns_of,
)
from medusa.serve.settings import ServerSettings
from medusa.serve.shape import error_of_fields
from medusa.serve.site import add_page
from medusa.serve.structure import asked_in_chat, asked_of_response

log = logging.getLogger("medusa.serve")

T = TypeVar("T")

_TEXT = {"type": ["string", "null"]}
_FIELDS = {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT}
_SHAPE = {"type": "object", "properties": {"error": {"type": "object", "properties": _FIELDS}}, "required": ["error"]}
_ERROR = {"description": "An error in OpenAI's shape.", "content": {"application/json": {"schema": _SHAPE}}}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or its events.", "content": {"text/event-stream": {}}}
}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}


def create_app(lm: medusa.LanguageModel, settings: ServerSettings, keys: Keys) -> tuple[App, Engine]:
    """The application and its engine, which has begun to wait for jobs. The engine ends with the application."""
    metrics = Metrics()
    engine = Engine(lm, settings, metrics)
    front = Front(lm, engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="Medusa",
        version=medusa.__version__,
        summary="An OpenAI-compatible interface to one language model.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
        default_response_class=Json,
    )
    app.state.front = front
    _handle_errors(app)
    _add_answers(app, front)
    _add_models(app, front)
    _add_health(app, engine, metrics)
    add_page(app)
    return Guard(app, settings, keys, metrics), engine


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(Exception)  # the guard logs it
    async def ours(request: Request, error: Exception) -> Response:
        return error_response(failed())

    @app.exception_handler(RequestValidationError)
    async def fields(request: Request, error: RequestValidationError) -> Response:
        return error_response(error_of_fields(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = {404: "there is nothing at this address", 400: "the body is not JSON in UTF-8"}
        told = message.get(error.status_code, str(error.detail))
        return error_response(ApiError(error.status_code, told, headers=dict(error.headers or {})))


def _add_answers(app: FastAPI, front: Front) -> None:
    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        front.check_model(asked.model)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
        limits = [limit for limit in (asked.max_completion_tokens, asked.max_tokens) if limit is not None]
        form = asked_in_chat(asked)
        answering = await front.answering(form)
        messages = [m.plain() for m in asked.messages]
        prompt = await front.encode(messages, raw=False, param="messages", tools=form.tools)
        wanted = _wanted(
            front,
            asked,
            [prompt],
            max_tokens=min(limits, default=None),
            n=asked.n,
            stop=asked.stop,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            param="messages",
            answering=answering,
        )
        answers = _ask(front, wanted, request)
        return await _reply(request, ChatForm(front, answers, asked), answers, asked.stream, DONE)

    @app.post("/v1/completions", responses=STREAMED)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Goes on with texts."""
        front.check_model(asked.model)
        if asked.echo and asked.logprobs is not None:
            raise bad("echo does not go with logprobs: those of the prompt are not computed", "echo")
        given = _prompts(asked.prompt)
        front.check_choices(len(given), asked.n)  # before they are read
        prompts = [await _tokens(front, prompt) for prompt in given]
        wanted = _wanted(
            front,
            asked,
            prompts,
            max_tokens=asked.max_tokens,
            n=asked.n,
            stop=asked.stop,
            logprobs=asked.logprobs,
        )
        echoes = []
        if asked.echo:
            echoes = [p if isinstance(p, str) else _text(front, p) for p in given]
        answers = _ask(front, wanted, request)
        return await _reply(request, CompletionForm(front, answers, asked, echoes), answers, asked.stream, DONE)

    @app.post("/v1/responses", responses=STREAMED)
    async def responses(asked: ResponsesRequest, request: Request) -> Response:
        """Answers a text or a conversation; nothing is stored."""
        front.check_model(asked.model)
        form = asked_of_response(asked)
        answering = await front.answering(form)
        messages = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
        given = asked.input
        messages += [{"role": "user", "content": given}] if isinstance(given, str) else turns_of(given)
        prompt = await front.encode(messages, raw=False, param="input", tools=form.tools)
        limit = asked.max_output_tokens
        wanted = _wanted(front, asked, [prompt], max_tokens=limit, param="input", answering=answering)
        answers = _ask(front, wanted, request)
        return await _reply(request, ResponsesForm(front, answers, asked), answers, asked.stream, "")


def _add_models(app: FastAPI, front: Front) -> None:
    model = {
        "id": front.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "medusa",
        "max_model_len": front.lm.backend.max_length,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model there is."""
        return Json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        front.check_model(name)
        return Json(model)

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        """The tokens of a text, or of a conversation by the chat template."""
        front.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad("give either prompt or messages", "prompt")
        if asked.prompt is not None:
            tokens = await front.encode(asked.prompt, raw=True, param="prompt")
        else:
            tokens = await front.encode([m.plain() for m in asked.messages or ()], raw=False, param="messages")
        return Json({"tokens": tokens, "count": len(tokens), "max_model_len": front.lm.backend.max_length})

    @app.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """The text of tokens."""
        front.check_model(asked.model)
        front.check_tokens(asked.tokens, "tokens")
        return Json({"prompt": await asyncio.to_thread(_text, front, asked.tokens)})


def _add_health(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the server runs."""
        return Json({"status": "ok"})

    @app.get("/ready", responses={503: {"description": "Not now; the reason.", "content": {"application/json": {}}}})
    async def ready() -> Response:
        """Whether it answers: not while it ends, nor where the engine does not get on."""
        reason = engine.trouble()
        return Json({"status": "ready"}) if reason is None else Json({"status": "not ready", "reason": reason}, 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# --- what routes share --------------------------------------------------------------------------------------------


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """One prompt or many, each a text or tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad("the prompt is empty: give at least one", "prompt")
    return [prompt] if isinstance(prompt[0], int) else prompt


async def _tokens(front: Front, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return await front.encode(prompt, raw=True, param="prompt")
    front.check_tokens(prompt, "prompt")
    return prompt


def _text(front: Front, tokens: list[int]) -> str:
    return str(front.lm.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _wanted(front: Front, asked: SamplingFields, prompts: Sequence[Sequence[int]], **more: Any) -> Wanted:
    sampling = front.sampling(asked)
    return Wanted(prompts, sampling, drafter=asked.drafter or "", **more)


def _ask(front: Front, wanted: Wanted, request: Request) -> Answers:
    caller: Caller = request.state.caller
    if front.settings.log_texts:
        texts = [_text(front, list(prompt)) for prompt in wanted.prompts]
        log.info("prompt", extra={"request": caller.request, "texts": texts})
    return Answers(front, wanted, caller.client, caller.request)


async def _reply(request: Request, form: Form, answers: Answers, streamed: bool, last: str) -> Response:
    if streamed:
        return _EventStream(form, answers, last)
    try:
        return Json(await _while_there(request, whole(form, answers)))
    finally:
        answers.close()
        _log_answers(form, answers)


class _EventStream(StreamingResponse):
    """However it ends, nothing is decoded for it any more."""

    def __init__(self, form: Form, answers: Answers, last: str) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stream(form, answers, last), media_type="text/event-stream", headers=headers)
        self._form, self._answers = form, answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()
            _log_answers(self._form, self._answers)


def _log_answers(form: Form, answers: Answers) -> None:
    if answers.front.settings.log_texts:
        texts = [choice.text for choice in form.tally.choices]
        log.info("answer", extra={"request": answers.request, "texts": texts})


async def _while_there(request: Request, work: Awaitable[T]) -> T:
    """What the work gives; it is cancelled where the client goes away. Raises ApiError then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ApiError(499, "the client has gone")
    finally:
        doing.cancel()
        leaving.cancel()
