"""Servers with the OpenAI interface: to write training text, to compare with, to judge answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from medusa.errors import MedusaError

if TYPE_CHECKING:
    from openai import OpenAI

RETRIES = 5
TIMEOUT_SECONDS = 600.0


@contextmanager
def openai_client(url: str) -> Iterator[OpenAI]:
    """A client of the API at `url`, mostly ending in /v1; the key is $OPENAI_API_KEY, if there is one.

    Raises:
        MedusaError: the package openai is not installed; or, from within, the server cannot be reached, or refuses.
    """
    try:
        import openai
    except ModuleNotFoundError:
        raise MedusaError("a server is asked with the package openai: pip install openai") from None
    key = os.environ.get("OPENAI_API_KEY") or "none"
    try:
        with openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT_SECONDS) as client:
            yield client
    except openai.APIConnectionError:
        raise MedusaError(f"cannot reach {url}: is the server running, and is this the address?") from None
    except openai.APIError as error:
        raise MedusaError(f"{url} refuses: {error.message}") from None


def lacks_thoughts(message: object) -> bool:
    """Whether a server has taken thoughts out of a message, or a piece of one, and put them beside it."""
    return any(getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
