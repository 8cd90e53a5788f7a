"""`medusa generate --jsonl`: lines of JSON in, lines of JSON out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from medusa.api import LanguageModel
from medusa.cli import main
from medusa.cli.generate import _answer_all
from medusa.cli.many import read_lines
from medusa.completion import in_order
from medusa.engines.transformers import TransformersBackend
from medusa.errors import UsageError
from medusa.settings import AnswerSettings
from tiny_lm import make, writer

LINES = [
    {"prompt": "Why?"},
    {"messages": [{"role": "user", "content": "What is it?"}], "max_new_tokens": 3},
    {"prompt": "Tell me.", "temperature": 1, "seed": 4, "stop": "e"},
    {"prompt": "As it is", "raw": True, "stop": []},
]
DEFAULTS = AnswerSettings(max_new_tokens=12, repetition_penalty=1.2)


def code_of(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def as_text(*lines: Any) -> str:
    return "\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"


def test_a_line_takes_what_it_does_not_say_from_the_command_line() -> None:
    wanted = read_lines(as_text(*LINES), "f", DEFAULTS, ["END"], raw=False)
    assert [prompt for prompt, _ in wanted] == ["Why?", LINES[1]["messages"], "Tell me.", "As it is"]
    options = [own for _, own in wanted]
    assert [own["max_new_tokens"] for own in options] == [12, 3, 12, 12]
    assert {own["repetition_penalty"] for own in options} == {1.2}
    assert [own["stop"] for own in options] == [["END"], ["END"], "e", []]
    assert [own["raw"] for own in options] == [False, False, False, True]
    assert (options[2]["temperature"], options[2]["seed"]) == (1, 4)


REFUSED: dict[str, str] = {
    "{": "not a JSON object",
    "[1]": "not a JSON object",
    '{"prompt": "a", "max_tokens": 3}': 'unknown name "max_tokens": known are prompt, messages, stop, raw, ',
    "{}": 'give either "prompt" or "messages"',
    '{"prompt": "a", "messages": []}': 'give either "prompt" or "messages"',
    '{"prompt": 3}': '"prompt" must be a text',
    '{"prompt": "cut \\ud83d"}': "half characters",
    '{"messages": [{"role": "user", "content": "cut \\ud83d"}]}': "half characters",
    '{"prompt": "a", "stop": "\\ud83d"}': "half characters",
    '{"messages": [{"role": "user"}]}': '"messages" must be a list of objects with the texts "role" and "content"',
    '{"prompt": "a", "temperature": -1}': "temperature must be 0",
    '{"prompt": "a", "temperature": "hot"}': 'temperature must not be "hot"',
    '{"prompt": "a", "top_k": 1.5}': "top_k must not be 1.5",
    '{"prompt": "a", "top_k": true}': "top_k must not be true",
    '{"prompt": "a", "acceptance": "some"}': 'acceptance must not be "some"',
    '{"prompt": "a", "stop": [1]}': '"stop" must be a text or a list of texts',
    '{"prompt": "a", "raw": 1}': '"raw" true or false',
    '{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens must be at least 1",
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_a_bad_line_is_refused_with_its_place(line: str) -> None:
    with pytest.raises(UsageError) as error:
        read_lines(as_text({"prompt": "good"}, line), "asked.jsonl", DEFAULTS, (), raw=False)
    assert str(error.value).startswith("asked.jsonl, line 3: ")
    assert REFUSED[line] in str(error.value)


def test_a_line_ends_with_its_line_feed_alone() -> None:
    text = '{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}\n'
    assert [prompt for prompt, _ in read_lines(text, "f", DEFAULTS, (), raw=False)] == ["a\u2028b\u0085c", "d"]


def test_half_characters_in_a_prompt_are_refused_in_python_too() -> None:
    lm = make(drafter="none")
    for prompt in ("cut \ud83d", [{"role": "user", "content": "cut \ud83d"}]):
        with pytest.raises(UsageError, match="half characters"):
            lm.encode(prompt)


def test_answers_go_where_stdout_does_while_a_bar_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is on a terminal, the answers go into a file."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lm = make(backend=TransformersBackend(writer(), num_slots=2), drafter="none")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    _answer_all(lm, [("a", {"max_new_tokens": 3}), ("b", {"max_new_tokens": 3})])
    lines = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [len(json.loads(line)["token_ids"]) for line in lines] == [3, 3]
    assert "Answering" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    _answer_all(lm, [("a", {"max_new_tokens": 3})])
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_no_line_is_an_error() -> None:
    with pytest.raises(UsageError, match="holds no line with a prompt"):
        read_lines("\n\n", "f", DEFAULTS, (), raw=False)


def test_answers_come_in_the_order_of_their_prompts_as_soon_as_they_can() -> None:
    lm = make(backend=TransformersBackend(writer(), num_slots=3), drafter="none")
    limits = [5, 2, 9]
    ended: list[int] = []
    chunks = lm.stream_many(["a", "b", "c"], each=[{"max_new_tokens": n} for n in limits])
    found = []
    for answer in in_order(chunks, 3, lambda: ended.append(1)):
        found.append((len(answer.token_ids), len(ended)))
    assert found == [(5, 2), (2, 2), (9, 3)]


def test_the_command_answers_a_file_of_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slots: list[int] = []

    def load(engine: Any, num_slots: int = 1) -> LanguageModel:
        slots.append(num_slots)
        return make(backend=TransformersBackend(writer(), num_slots=num_slots))

    monkeypatch.setattr("medusa.cli.generate.load_model", load)
    path = tmp_path / "asked.jsonl"
    path.write_text(as_text(*LINES))
    assert code_of("generate", "--jsonl", "--prompt-file", str(path), "--max-new-tokens", "12") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == [
        make().generate(
            line.get("prompt", line.get("messages")),
            **{"max_new_tokens": 12, **{k: v for k, v in line.items() if k not in ("prompt", "messages")}},
        ).text
        for line in LINES
    ]  # fmt: skip
    assert code_of("generate", "--jsonl", "--prompt-file", str(path), "--slots", "2") == 0
    assert slots == [4, 2]


@pytest.mark.parametrize(
    ("options", "message"), [(["--jsonl", "--show-drafts"], "--show-drafts"), (["--slots", "2"], "add --jsonl")]
)
def test_options_that_do_not_go_together(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("generate", '{"prompt": "a"}', *options) == 2
    assert message in capsys.readouterr().err
