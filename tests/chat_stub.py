"""A model that answers a chat from a script, and a chat fed with lines."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from medusa.api import Chunk, Stats
from medusa.chat.session import Chat
from medusa.decoding.stepper import Step


class StubModel:
    """Answers each turn with the next script: words to say, or an exception to raise at that point."""

    name = "stub"

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.calls: list[tuple[list[dict[str, str]], dict[str, Any]]] = []
        self.closed = 0

    def stream(self, prompt: list[dict[str, str]], **settings: Any) -> Iterator[Chunk]:
        self.calls.append((prompt, settings))
        script = self.scripts.pop(0) if self.scripts else ["ok"]
        try:
            for number, item in enumerate(script, 1):
                if not isinstance(item, str):
                    raise item
                reason = "stop" if number == len(script) else None
                stats = Stats(5, 2 * number + 1, number, 0.2, 0.1)
                step = Step((number, number), ("model", "model"), reason)
                yield Chunk(item, ((item, "model"),), step.tokens, stats, reason, step)
        finally:
            self.closed += 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(
    monkeypatch: pytest.MonkeyPatch, chat: Chat, *inputs: str | BaseException, terminal: bool = False
) -> tuple[int, str, str]:
    """Feed the loop what `input` gives (or raises), then the end; return (exit code, stdout, stderr)."""
    kind = Terminal if terminal else io.StringIO
    out, err = kind(), kind()
    monkeypatch.setattr("sys.stdin", kind())
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    pending = iter(inputs)

    def read(prompt: str = "") -> str:
        out.write(prompt)
        item = next(pending, EOFError())
        if isinstance(item, BaseException):
            raise item
        return item

    monkeypatch.setattr("builtins.input", read)
    code = chat.run()
    monkeypatch.undo()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def no_colour_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # its own, so that `run` can undo the other
        for name in ("NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm")
        yield


def roles(chat: Chat) -> list[str]:
    return [message.role for message in chat.history]
