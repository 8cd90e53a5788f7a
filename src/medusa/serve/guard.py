"""What stands before every route: names, keys, sizes and the log. Nothing that it refuses reaches a handler."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from medusa.errors import MedusaError, UsageError
from medusa.serve.errors import ApiError, bad
from medusa.serve.metrics import Metrics
from medusa.serve.settings import ServerSettings

log = logging.getLogger("medusa.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/health", "/ready", "/metrics", "/openapi.json"})  # no key: no texts go in or out
OPEN_BELOW = "/page/"  # nor there: the files of the page
BODY_SECONDS = 30.0  # for a request's body to arrive
ENVIRONMENT_KEY = "MEDUSA_API_KEY"


class Json(JSONResponse):
    """In ASCII: what a client sent may hold half characters, and stands in errors."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def error_response(error: ApiError) -> Json:
    return Json(error.body(), error.status, headers=error.headers)


class Keys:
    """The keys that clients may use; only their hashes are kept."""

    def __init__(self, keys: list[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    @classmethod
    def read(cls, file: str | None) -> Keys:
        """From a file, a key a line, or else the environment. Raises UsageError for a file without keys, MedusaError
        for one that cannot be read."""
        if file is None:
            key = os.environ.get(ENVIRONMENT_KEY, "").strip()
            return cls([key] if key else [])
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise MedusaError(f"cannot read the keys in {file}: {reason}") from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise UsageError(f"{file} holds no key: write one on a line")
        return cls(keys)

    def client(self, header: str) -> str | None:
        """A name for who sent this Authorization header; None: it holds no key of ours. All keys are compared, each
        in constant time."""
        scheme, _, key = header.partition(" ")
        sent = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        good = [hmac.compare_digest(sent, known) for known in self._hashes]
        return f"key-{sent.hex()[:8]}" if any(good) and scheme.lower() == "bearer" else None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks; requests of one client take turns with those of others."""

    client: str
    request: str  # its id


class Guard:
    """The outermost part of the application."""

    def __init__(self, app: App, settings: ServerSettings, keys: Keys, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        hosts = settings.allowed_hosts
        if not hosts and settings.local:  # else any page could reach us by a name that it makes point here
            hosts = ("localhost", "127.0.0.1", "::1", settings.host)
        self._hosts = frozenset(host.lower().strip("[]") for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        request = headers.get("x-request-id", "")
        request = request if re.fullmatch(r"[\w.-]{1,64}", request, re.ASCII) else f"req-{secrets.token_hex(8)}"
        begun, status, whole = time.perf_counter(), 499, False  # 499 stays where the client has gone

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", request.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            client = self._admit(scope, headers)
            scope.setdefault("state", {})["caller"] = Caller(client, request)
            body = await self._body(headers, receive)
            await self._app(scope, _again(body, receive), answer)
        except ApiError as error:
            await error_response(error)(scope, receive, answer)
        except Exception as error:
            log.error("a request failed", exc_info=error, extra={"request": request})
            status = 500 if status == 499 else status
            if not whole:  # the connection is cut, so that nobody takes for whole what is not
                raise
        finally:
            self._metrics.responses.labels(str(status)).inc()
            told = {"request": request, "method": scope["method"], "path": scope["path"][:200], "status": status}
            log.info("request", extra={**told, "seconds": round(time.perf_counter() - begun, 4)})

    def _admit(self, scope: Scope, headers: dict[str, str]) -> str:
        """The client's name. Raises ApiError for one that may not ask."""
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            raise bad(f"the host {host[:100]} is not served here: see --allowed-host", "host", "unknown_host")
        origin = headers.get("origin")
        if origin is not None and _site(origin) != host.lower():
            raise ApiError(403, "pages of other sites may not ask this server", "origin", "cross_origin")
        peer = (scope.get("client") or ("",))[0]
        path = scope["path"]
        if not self._keys or path in OPEN or path.startswith(OPEN_BELOW):
            return str(peer)
        client = self._keys.client(headers.get("authorization", ""))
        if client is None:
            said = "send a key of this server: Authorization: Bearer KEY"
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return client

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body. Raises ApiError for one that is too long, or takes too long."""
        most = self._settings.max_body
        long = ApiError(413, f"the request is longer than {most} bytes", code="request_too_large")
        if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")[:20]) > most:
            raise long
        parts: list[bytes] = []

        async def read() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(499, "the client has gone")
                parts.append(message.get("body", b""))
                if sum(map(len, parts)) > most:
                    raise long
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:  # two errors in Python 3.10
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} seconds") from None
        return b"".join(parts)


def _site(origin: str) -> str | None:
    """The host of an Origin header, and its port where that is named; None of what has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _name(host: str) -> str:
    """A Host header without its port."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what comes after it."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
