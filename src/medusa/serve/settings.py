"""The settings of `medusa serve`, declared as those in medusa/settings.py."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from medusa.settings import check, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where the server listens, and what it grants to whom."""

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 is all of this machine's.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    slots: int = setting(4, "Answers decoded at once.", ge=1)
    max_queue: int = setting(64, "Answers that may wait for a slot; more are refused with status 429.", ge=0)
    api_key_file: str | None = setting(
        None, "File with a key on each line, one of which clients must send.", unset="$MEDUSA_API_KEY", metavar="FILE"
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Name that clients may call this server by; may be repeated.",
        unset="any; on a loopback address that and localhost",
        option="allowed_host",
        metavar="NAME",
    )
    served_name: str | None = setting(None, "What the API calls the model.", unset="the model's name")
    temperature: float = setting(1.0, "Of requests that name none; 0 is greedy.", ge=0, le=1000)
    context: int | None = setting(None, "Positions of a slot.", unset="the model's context, at most 32,768", ge=16)
    max_tokens: int | None = setting(None, "Most tokens of an answer.", unset="what the context holds", ge=1)
    max_choices: int = setting(16, "Most answers to one request (prompts times n).", ge=1)
    max_schema: int = setting(64_000, "Most bytes of JSON schemas in a request, those of its tools included.", ge=1)
    max_schema_depth: int = setting(40, "Most levels of objects and lists in a JSON schema.", ge=1)
    max_body: int = setting(2_000_000, "Most bytes of a request.", ge=1)
    cached_tokens: int = setting(
        16384, "Tokens of ended texts that free slots hold, so that a chat's next turn is read from there.", ge=0
    )
    piece: int = setting(256, "Tokens of prompts that are read between two passes of running answers.", ge=1)
    deadline: float = setting(600.0, "Seconds after which an answer that has not ended is given up.", gt=0)
    stall: float = setting(60.0, "Seconds without a step, while there is work, after which /ready says no.", gt=0)
    log_texts: bool = setting(False, "Write prompts and answers into the log.")

    def __post_init__(self) -> None:
        check(self)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
