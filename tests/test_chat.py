"""The chat loop against a stub model: turns, commands, Ctrl-C, files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_lm
from medusa.chat import Chat, Printer, collect, stats_line
from medusa.chat_history import Message, load_history, save_history
from medusa.decoding.loop import Step
from medusa.errors import ContextFullError, MedusaError, UsageError
from medusa.generation import Chunk, Stats
from medusa.models.transformers_backend import TransformersBackend


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


def test_piped_lines_are_turns_and_only_answers_reach_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel(["Hello", " you"], ["Fine"])
    chat = Chat(model, system="Be brief.", settings={"temperature": 0.5})
    code, out, err = run(monkeypatch, chat, "hi", "", "how are you?")
    assert (code, out, err) == (0, "Hello you\nFine\n", "")
    assert model.calls[1] == (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hello you"},
            {"role": "user", "content": "how are you?"},
        ],
        {"temperature": 0.5},
    )


def test_a_terminal_gets_prompts_and_control_characters_of_the_model_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, out, err = run(monkeypatch, Chat(StubModel(["a\x1b[31m\tb\r\n"])), "hi", terminal=True)
    assert out == "> a[31m\tb\n\n> \n"
    assert "Chat with stub" in err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel(["Once", KeyboardInterrupt()], ["Yes"])
    chat = Chat(model)
    code, out, err = run(monkeypatch, chat, "tell", "go on")
    assert (code, out) == (0, "Once\nYes\n")
    assert "Interrupted" in err
    assert chat.history[1] == Message("assistant", "Once", interrupted=True)
    assert model.calls[1][0][1] == {"role": "assistant", "content": "Once"}
    assert model.closed == 2


def test_ctrl_c_before_the_first_word_drops_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(StubModel([KeyboardInterrupt()]))
    assert run(monkeypatch, chat, "tell")[0] == 0
    assert chat.history == []


def test_a_second_ctrl_c_at_the_prompt_leaves_and_the_first_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel()
    ctrl_c = KeyboardInterrupt()
    code, _, err = run(monkeypatch, Chat(model), ctrl_c, "hi", ctrl_c, ctrl_c, "never read")
    assert code == 0
    assert err.count("Press Ctrl-C again") == 2
    assert len(model.calls) == 1


def test_closing_the_stream_when_ctrl_c_comes_between_two_chunks() -> None:
    model = StubModel(["a", "b"])

    def show(_: Chunk) -> None:
        raise KeyboardInterrupt

    chunks = model.stream([])  # held here, so that only an explicit close ends it
    answer = collect(chunks, show)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("a", (1, 1), "interrupted")
    assert model.closed == 1


@pytest.mark.parametrize(
    "error",
    [MedusaError("too long"), UsageError("too long"), RuntimeError("can't allocate memory: 9 B")],
)
def test_an_error_is_one_line_and_its_turn_is_removed(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    chat = Chat(StubModel(["one"], ["half", error], ["three"]))
    code, out, err = run(monkeypatch, chat, "1", "2", "3")
    assert (code, out) == (1, "one\nhalf\nthree\n")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert [message.content for message in chat.history] == ["1", "one", "3", "three"]


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(StubModel([RuntimeError("shapes differ")]))
    with pytest.raises(RuntimeError, match="shapes"):
        run(monkeypatch, chat, "1")
    assert chat.history == []


def test_reset_keeps_the_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel()
    chat = Chat(model, system="S")
    run(monkeypatch, chat, "1", "/reset", "2")
    assert model.calls[1][0] == [{"role": "system", "content": "S"}, {"role": "user", "content": "2"}]


def test_regen_answers_the_same_question_with_another_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel(["a"], ["b"], ["c"])
    chat = Chat(model, settings={"temperature": 1.0, "seed": 7})
    run(monkeypatch, chat, "1", "/regen", "/regen")
    assert [message.content for message in chat.history] == ["1", "c"]
    assert [settings["seed"] for _, settings in model.calls] == [7, 8, 9]
    assert all(messages == [{"role": "user", "content": "1"}] for messages, _ in model.calls)


@pytest.mark.parametrize("trouble", [MedusaError("no"), KeyboardInterrupt()])
def test_a_regen_that_gives_nothing_keeps_the_answer_before(
    monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    chat = Chat(StubModel(["a"], [trouble]))
    _, _, err = run(monkeypatch, chat, "1", "/regen")
    assert [message.content for message in chat.history] == ["1", "a"]
    assert "temperature 0" in err


def test_regen_without_an_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(monkeypatch, Chat(StubModel()), "/regen")
    assert (code, err) == (1, "Error: there is no answer to give again yet\n")


def test_system_sets_and_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel()
    _, _, err = run(monkeypatch, Chat(model), "/system", "/system Be  kind", "/system", "hi")
    assert err.splitlines() == [
        "There is no system prompt.",
        "System prompt: Be  kind",
        "System prompt: Be  kind",
    ]
    assert model.calls[0][0][0] == {"role": "system", "content": "Be  kind"}


def test_stats_give_the_last_answer_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, err = run(monkeypatch, Chat(StubModel(["a"], ["a", "b"])), "/stats", "1", "2", "/stats")
    assert err.splitlines() == [
        "No answers yet.",
        "Last answer: 5 tokens in 2 steps = 2.0 tokens per step, 40 tokens/s, first token after 0.2 s",
        "All 2 answers: 6 tokens in 3 steps = 2.0 tokens per step, 30 tokens/s",
    ]


def test_help_exit_slashes_and_unknown_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel()
    code, _, err = run(monkeypatch, Chat(model), "/help", "/nope x", "//etc is?", "/exit", "never read")
    assert code == 1  # an unknown command in a script is a failure
    assert "/regen" in err
    assert "Error: there is no command /nope; /help lists them" in err
    assert [messages[-1]["content"] for messages, _ in model.calls] == ["/etc is?"]


def test_input_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(StubModel())
    assert "not UTF-8" in run(monkeypatch, chat, "a\udcff", "/system a\udcff")[2]
    assert (chat.history, chat.system) == ([], None)
    with pytest.raises(UsageError, match="UTF-8"):
        run(monkeypatch, chat, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"))


def test_save_and_load_round_trip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "talk with spaces.json"
    chat = Chat(StubModel(["né"], ["cut", KeyboardInterrupt()]), system="S")
    run(monkeypatch, chat, "1", "2", f"/save {path}")
    other = Chat(StubModel())
    code, _, err = run(monkeypatch, other, f"/load {path}")
    assert (code, err) == (0, f"Loaded 2 turns from {path}.\n")
    assert (other.system, other.history) == (chat.system, chat.history)
    assert other.history[3].interrupted
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no temporary file stays


def test_saving_is_atomic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("before")

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("json.dump", broken)
    with pytest.raises(OSError, match="No space"):
        save_history(path, None, [Message("user", "1"), Message("assistant", "2")])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_save_and_load_say_what_is_wrong_with_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "talk.json"
    _, _, err = run(monkeypatch, Chat(StubModel()), f"/save {missing}", f"/load {missing}", "/save", "/load")
    assert err.splitlines() == [
        f"Error: cannot write {missing}: No such file or directory",
        f"Error: cannot read {missing}: No such file or directory",
        "Error: /save needs the name of a file",
        "Error: /load needs the name of a file",
    ]


def test_odd_file_names_do_not_end_the_conversation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    names = ["~no-such-user/x.json", f"{tmp_path}/missing\0/x", str(tmp_path), f"{loop}/x.json", "x" * 5000]
    _, _, err = run(monkeypatch, Chat(StubModel()), *(f"{do} {name}" for do in ("/save", "/load") for name in names))
    assert [line.split()[:2] for line in err.splitlines()] == [["Error:", "cannot"]] * 2 * len(names)


# --- a full context ---------------------------------------------------------------------------------------------------


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
    save_history(tmp_path / "talk.json", None, [Message("user", "1"), Message("assistant", "2")] * 2)
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


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"3",
        b"{}",
        b'{"messages": 3}',
        *(
            json.dumps({"messages": messages}).encode()
            for messages in (
                [3],
                [{"role": "user"}],
                [{"role": "robot", "content": "x"}],
                [{"role": ["user"], "content": "x"}],
                [USER],
                [ASSISTANT, USER],
                [USER, ASSISTANT, {"role": "system", "content": "late"}, ASSISTANT],
                [USER, {"role": "assistant", "content": None}],
                [USER, {"role": "assistant", "content": "\ud800"}],
                [USER, {**ASSISTANT, "interrupted": "yes"}],
            )
        ),
    ],
)
def test_a_malformed_file_is_refused_and_the_history_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    chat = Chat(StubModel(), system="S")
    code, _, err = run(monkeypatch, chat, "1", f"/load {path}")
    assert code == 1
    assert err.startswith(f"Error: {path} is not a saved conversation")
    assert err.count("\n") == 1
    assert (chat.system, roles(chat)) == ("S", ["user", "assistant"])


def test_an_empty_conversation_is_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save_history(path, "S", [])
    assert load_history(path) == ("S", [])


DRAFTED = Chunk(
    "a b c",
    (("a ", "model"), ("b ", "heads"), ("c", "ngram")),
    (1, 2, 3),
    Stats(),
    None,
    Step((1, 2, 3), ("model", "heads", "ngram"), None),
)


@pytest.mark.parametrize(
    ("show_drafts", "terminal", "environment", "expected"),
    [
        (True, True, {}, "a \x1b[32mb \x1b[0m\x1b[36mc\x1b[0m"),
        (True, False, {}, "a b c"),
        (True, False, {"FORCE_COLOR": "1"}, "a \x1b[32mb \x1b[0m\x1b[36mc\x1b[0m"),
        (True, True, {"NO_COLOR": "1"}, "a b c"),
        (True, True, {"TERM": "dumb"}, "a b c"),
        (False, True, {}, "a b c"),
        (False, False, {"FORCE_COLOR": "1"}, "a b c"),
    ],
)
def test_drafts_are_coloured_only_where_asked_and_seen(
    monkeypatch: pytest.MonkeyPatch,
    show_drafts: bool,
    terminal: bool,
    environment: dict[str, str],
    expected: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    Printer(show_drafts)(DRAFTED)
    assert out.getvalue() == expected


def test_stats_line_reads_as_a_sentence() -> None:
    assert stats_line(Stats(5, 128, 51, ttft_seconds=0.2, decode_seconds=3.1)) == (
        "128 tokens in 51 steps = 2.5 tokens per step, 41 tokens/s, first token after 0.2 s"
    )
    assert stats_line(Stats(5, 1, 0, ttft_seconds=0.2)).startswith("1 token in 0 steps = 0.0 tokens per step")
