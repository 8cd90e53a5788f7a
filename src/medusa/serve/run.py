"""The running server: its socket, its signals and its log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from medusa.api import LanguageModel
from medusa.errors import MedusaError
from medusa.serve.app import create_app
from medusa.serve.engine import Engine
from medusa.serve.guard import Keys
from medusa.serve.settings import ServerSettings

UNREAD_SECONDS = 5  # for the last of an answer to be read, when the server ends
ABORT_SECONDS = 10.0  # for the step that is under way at the second signal


class Server(uvicorn.Server):
    """Ends gently at the first signal, when all that was accepted has been answered; at once at the second."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {sig: signal.signal(sig, self.handle_exit) for sig in signals}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        try:  # not here: the code that the signal has interrupted may hold the engine's lock
            asyncio.get_running_loop().call_soon_threadsafe(self._engine.refuse)
        except RuntimeError:  # no loop runs, and nobody asks
            self._engine.refuse()
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit:  # uvicorn would log how its tasks are cancelled, as an error
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end, which it is too where nothing can be answered any more."""
        if self._engine.died:
            self.config.timeout_graceful_shutdown = UNREAD_SECONDS
        return await super().on_tick(counter) or self._engine.died


def bind(settings: ServerSettings) -> socket.socket:
    """The address is ours from now on; nobody listens yet. Raises MedusaError where it cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise MedusaError(f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}") from None
    return bound


def serve(lm: LanguageModel, settings: ServerSettings, keys: Keys, bound: socket.socket) -> None:
    """Serves until a signal ends it. Raises MedusaError where the engine has died."""
    app, engine = create_app(lm, settings, keys)
    Server(configure(app, settings), engine).run(sockets=[bound])
    if not engine.abort(ABORT_SECONDS):  # Python cannot end in order while a thread computes
        os._exit(1)
    if engine.died:
        raise MedusaError("the engine has died: the log says of what; start the server again")


def configure(app: Any, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        # From the signal on: what has been answered by then and is not read will not be read.
        timeout_graceful_shutdown=None
        if math.isinf(settings.deadline)
        else math.ceil(settings.deadline) + UNREAD_SECONDS,
    )


class JsonLines(logging.Formatter):
    """One line of JSON for each record, with what `extra` tells."""

    _own = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        told |= {name: value for name, value in vars(record).items() if name not in self._own}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("medusa.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
