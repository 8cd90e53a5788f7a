"""The chat when the context is full: what it says, and /drop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_lm
from chat_stub import StubModel, no_colour_settings, roles, run  # noqa: F401
from medusa.api import Chunk
from medusa.chat.history import Entry, save_history
from medusa.chat.session import Chat
from medusa.engines.transformers import TransformersBackend
from medusa.errors import ContextFullError


class SmallModel(StubModel):
    """A token for each character, in a context of 40; answers as the stub does."""

    backend = SimpleNamespace(max_length=40)

    def encode(self, prompt: list[dict[str, str]]) -> list[int]:
        return [1] * sum(len(message["content"]) for message in prompt)

    def stream(self, prompt: list[dict[str, str]], **settings: Any) -> Iterator[Chunk]:
        if len(self.encode(prompt)) >= self.backend.max_length:
            raise ContextFullError(len(self.encode(prompt)), self.backend.max_length)
        return super().stream(prompt, **settings)


def full_chat(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Chat, SmallModel]:
    """After three turns of 12 tokens."""
    model = SmallModel(["one-one"], ["two-two"], ["tri-tri"])
    chat = Chat(model, **options)
    assert run(monkeypatch, chat, "first", "secnd", "third") == (0, "one-one\ntwo-two\ntri-tri\n", "")
    return chat, model


@pytest.mark.parametrize("terminal", [False, True])
def test_a_full_context_is_told_with_its_size_and_both_ways_out_and_nothing_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    chat, _ = full_chat(monkeypatch)
    before = list(chat.history)
    code, _, err = run(monkeypatch, chat, "forth", terminal=terminal)
    assert "the conversation has 41 tokens and the context holds 40" in err
    assert "/drop" in err.splitlines()[-1]
    assert "/reset" in err.splitlines()[-1]
    assert code == (0 if terminal else 1)
    assert chat.history == before


def test_drop_forgets_the_oldest_turns_until_a_quarter_is_free_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, model = full_chat(monkeypatch, system="S")
    _, out, err = run(monkeypatch, chat, "forth", "/drop")
    assert err.splitlines()[-1] == "Forgot the oldest 1 turn; 2 turns left."
    assert out == "ok\n"
    said = [message["content"] for message in model.calls[-1][0]]
    assert said == ["S", "secnd", "two-two", "third", "tri-tri", "forth"]
    assert [message.content for message in chat.history] == [*said[1:], "ok"]


def test_a_long_question_that_fits_only_alone_is_answered_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, model = full_chat(monkeypatch)
    run(monkeypatch, chat, "x" * 35, "/drop")
    assert [message["content"] for message in model.calls[-1][0]] == ["x" * 35]
    assert roles(chat) == ["user", "assistant"]


def test_drop_forgets_nothing_for_a_question_that_does_not_fit_even_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, model = full_chat(monkeypatch)
    before = list(chat.history)
    code, out, err = run(monkeypatch, chat, "x" * 40, "/drop")
    assert (code, out) == (1, "")
    assert "the prompt has 40 tokens, which leaves no room in the context of 40: shorten it" in err
    assert chat.history == before
    assert len(model.calls) == 3


def test_a_first_question_that_does_not_fit_is_to_be_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(monkeypatch, Chat(SmallModel()), "x" * 50, "/drop")
    assert code == 1
    assert err.splitlines() == [
        "Error: the prompt has 50 tokens, which leaves no room in the context of 40: shorten it",
        "Error: there is no turn to forget",
    ]


@pytest.mark.parametrize("between", ["short", "/reset", "/load"])
def test_drop_without_a_question_that_waits_forgets_one_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, between: str
) -> None:
    chat, model = full_chat(monkeypatch)
    save_history(tmp_path / "talk.json", None, [Entry("user", "1"), Entry("assistant", "2")] * 2)
    line = f"/load {tmp_path / 'talk.json'}" if between == "/load" else between
    run(monkeypatch, chat, "x" * 10, line if between != "short" else "s", "/drop")
    calls = 4 if between == "short" else 3
    assert len(model.calls) == calls, "the question is not asked any more"
    assert len(chat.history) == {"short": 6, "/reset": 0, "/load": 2}[between]


def test_an_answer_that_the_context_cuts_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(StubModel):
        def stream(self, prompt: list[dict[str, str]], **settings: Any) -> Iterator[Chunk]:
            for chunk in super().stream(prompt, **settings):
                yield replace(chunk, finish_reason=chunk.finish_reason and "length")

    _, _, err = run(monkeypatch, Chat(Cut(["a"]), settings={"max_new_tokens": 9}), "1")
    assert err == "The answer filled the context: /drop forgets the oldest turn, /reset all.\n"
    _, _, err = run(monkeypatch, Chat(Cut(["a"]), settings={"max_new_tokens": 2}), "1")
    assert err == "The answer reached its limit of tokens (--max-new-tokens).\n"


def test_drop_makes_room_in_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm.make(backend=TransformersBackend(tiny_lm.writer(), max_length=128))
    chat = Chat(lm, settings={"max_new_tokens": 10})
    _, _, err = run(monkeypatch, chat, *["hello"] * 4, "/drop")
    assert "tokens and the context holds 128" in err
    assert "Forgot the oldest" in err
    assert chat.history[-2].content == "hello"
    assert len(lm.encode(chat.messages()[:-1])) <= 96
