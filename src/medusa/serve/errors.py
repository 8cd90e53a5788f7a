"""Why a client gets no answer, and what it is told, in the shape that OpenAI gives errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from medusa.errors import UsageError
from medusa.settings import Sampling, typed_fields


class QueueFullError(Exception):
    """As many jobs wait as may."""


class ClosingError(Exception):
    """The server is about to end and takes no more."""


class DeadlineError(Exception):
    """The answer took longer than it may."""


@dataclass(eq=False)
class ApiError(Exception):
    """`param` names the field of the request that is wrong, where one is."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be understood, or asks for what is not there."""
    return ApiError(400, message, param, code)


def refused(error: UsageError) -> ApiError:
    """A setting that is not good: requests have our names for them, and the message begins with one."""
    message = str(error)
    first = re.match(r"\w+", message)
    return bad(message, first[0] if first and first[0] in typed_fields(Sampling) else None)


def failed() -> ApiError:
    """An answer that could not be decoded. What went wrong is in the log, not for strangers."""
    return ApiError(500, "the answer could not be decoded: the server's log says why", code="internal_error")
