"""The chat loop against a stub model: turns, commands, Ctrl-C, files."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from chat_stub import StubModel, Terminal, no_colour_settings, roles, run  # noqa: F401
from medusa.api import Chunk, Stats
from medusa.chat.history import Entry, load_history, save_history
from medusa.chat.session import Chat
from medusa.decoding.stepper import Step
from medusa.errors import MedusaError, UsageError
from medusa.terminal import Printer, collect, stats_line


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
    assert chat.history[1] == Entry("assistant", "Once", interrupted=True)
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
        save_history(path, None, [Entry("user", "1"), Entry("assistant", "2")])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="only there files have such modes")
def test_a_saved_conversation_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save_history(path, None, [Entry("user", "1"), Entry("assistant", "2")])
    assert path.stat().st_mode & 0o777 == 0o600


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
    names = ["~no-such-user/x.json", f"{tmp_path}/missing\0/x", "/", str(tmp_path), f"{loop}/x.json", "x" * 5000]
    _, _, err = run(monkeypatch, Chat(StubModel()), *(f"{do} {name}" for do in ("/save", "/load") for name in names))
    assert [line.split()[:2] for line in err.splitlines()] == [["Error:", "cannot"]] * 2 * len(names)


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
