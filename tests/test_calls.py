"""Calls of tools in a text: what a template shows, what the grammar of a form allows, and how calls are read back."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from chat_templates import CHATML, DEEPSEEK, GEMMA, LLAMA31, MISTRAL3, PLAIN, QWEN25, tokenizer_with
from medusa.grammar.calls import HERMES, LLAMA3, CallForm, Tool, read
from medusa.grammar.engine import Grammars
from medusa.grammar.templates import explained, form_of, knows_tools
from medusa.text.chat_template import render
from tiny_lm import END
from tiny_models import byte_ids

TOOLS = [
    Tool("f", "What it does.", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    Tool("get-it_2"),
]
TOKENIZER = tokenizer_with(QWEN25)
GRAMMARS = Grammars(TOKENIZER, len(TOKENIZER), [END])
ONE, TWO = ("f", {"a": 1}), ("get-it_2", {})


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "knows", "form"),
    [
        (QWEN25, True, HERMES),
        (LLAMA31, True, LLAMA3),
        (MISTRAL3, True, None),
        (DEEPSEEK, False, None),
        (CHATML, False, None),
        (PLAIN, False, None),
    ],
)
def test_a_template_shows_whether_it_knows_tools_and_how_calls_are_written(
    template: str, knows: bool, form: CallForm | None
) -> None:
    tokenizer = tokenizer_with(template)
    assert (knows_tools(tokenizer), form_of(tokenizer)) == (knows, form)


def test_a_template_without_tools_is_told_of_them_by_the_system() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Well.", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "A", "tool_call_id": "1"},
        {"role": "tool", "content": "B", "tool_call_id": "2"},
    ]
    system, user, said, answers = explained(tokenizer_with(CHATML), messages, TOOLS)
    assert system["content"].startswith("Be brief.\n\n")
    assert all(json.dumps(tool.told()) in system["content"] for tool in TOOLS)
    assert user == messages[1]
    assert said["content"] == f"Well.\n{HERMES.written('f', {'a': 1})}"
    blocks = "<tool_response>\nA\n</tool_response>\n<tool_response>\nB\n</tool_response>"
    assert answers == {"role": "user", "content": blocks}
    assert [m["role"] for m in explained(tokenizer_with(CHATML), messages[1:], ())] == ["user", "assistant", "user"]
    (folded,) = explained(tokenizer_with(GEMMA), messages[1:2], TOOLS)
    assert folded["role"] == "user", "this template takes no system"
    assert folded["content"].endswith("Hi")


# --- grammars ---------------------------------------------------------------------------------------------------------


def fits(form: CallForm, text: str | list[int], *, required: bool, many: bool) -> bool:
    grammar = form.grammar(TOOLS, required=required, many=many, tokens=GRAMMARS.shown_tokens)
    follower = GRAMMARS.lark(grammar).begin()
    tokens = TOKENIZER(text)["input_ids"] if isinstance(text, str) else text
    for token in tokens:
        allowed = follower.allowed([])
        assert allowed is not None
        if not allowed[token]:
            return False
        follower.keep([token])
    allowed = follower.allowed([])
    assert allowed is not None
    return bool(allowed[END])


one, two = HERMES.written(*ONE), HERMES.written(*TWO)


@pytest.mark.parametrize(
    ("text", "auto", "auto_many", "required", "required_many"),
    [
        ("", True, True, False, False),
        ("Hello {", True, True, False, False),
        ("a <tool_cal b", True, True, False, False),
        ("<think>\nhm</think>x", True, True, False, False),
        (one, True, True, True, True),
        (f"{one}\n{two}", False, True, False, True),
        (f"Well.\n{one}", True, True, False, False),
        (f"<think>hm</think>{one}\n{two}", False, True, False, False),
        (f"{one} and", False, False, False, False),
        (one[:-1], False, False, False, False),
        (HERMES.written("f", {}), False, False, False, False),
        (HERMES.written("g", {}), False, False, False, False),
        (HERMES.written("f", {"a": "x"}), False, False, False, False),
    ],
)
def test_what_the_grammar_of_hermes_allows(
    text: str, auto: bool, auto_many: bool, required: bool, required_many: bool
) -> None:
    found = [fits(HERMES, text, required=must, many=many) for must in (False, True) for many in (False, True)]
    assert found == [auto, auto_many, required, required_many]


@pytest.mark.parametrize(
    ("text", "auto", "required"),
    [
        ("", True, False),
        ("Hello {", True, False),
        ("{Hello", False, False),
        (LLAMA3.written(*ONE), True, True),
        (LLAMA3.written(*ONE) + "\n", False, False),
        (HERMES.written(*ONE), True, False),
        (LLAMA3.written("g", {}), False, False),
    ],
)
def test_what_the_grammar_of_llama_allows(text: str, auto: bool, required: bool) -> None:
    for many in (False, True):
        assert [fits(LLAMA3, text, required=must, many=many) for must in (False, True)] == [auto, required]


def test_a_marker_is_the_token_that_the_model_has_for_it_and_spelled_out_it_opens_a_call_too() -> None:
    grammar = GRAMMARS.lark(HERMES.grammar(TOOLS, required=True, many=False, tokens=GRAMMARS.shown_tokens))
    allowed = grammar.begin().allowed([])
    assert allowed is not None
    assert np.flatnonzero(allowed).tolist() == [TOKENIZER.convert_tokens_to_ids("<tool_call>")]
    spelled = byte_ids(b"<tool_call>")
    assert not fits(HERMES, [*spelled, *byte_ids(b" is a word")], required=False, many=False)
    assert fits(HERMES, [*spelled, *TOKENIZER(one)["input_ids"][1:]], required=False, many=False)


def test_a_form_needs_no_tokens_of_its_own() -> None:
    text = HERMES.grammar(TOOLS, required=False, many=True)
    follower = Grammars(TOKENIZER, len(TOKENIZER), [END]).lark(text).begin()
    follower.keep(byte_ids(f"Well. {one[: one.index('{')]}".encode()))
    assert TOKENIZER.decode(list(follower.forced())).startswith('{"name": "')


# --- reading ----------------------------------------------------------------------------------------------------------

strings = st.text(st.sampled_from('ab "\\{}[]<>/\né') | st.characters(codec="utf-8", exclude_categories=["Cc"]))
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(strings, st.integers(), st.booleans(), st.none(), st.just("</tool_call>"), st.just("\n</tool_call>")),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(strings, inside, max_size=3),
    max_leaves=6,
)
calls = st.tuples(st.sampled_from(["f", "get-it_2"]), st.dictionaries(strings, values, max_size=3))
said = st.sampled_from(["", "Well.", "Let me see: ", "{", "a < b\n\n", "<tool_", "<think>\nhm</think>\n", "x\n\n y"])


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


@given(st.sampled_from([HERMES, LLAMA3]), said, st.lists(calls, max_size=3), st.lists(st.integers(0, 400)))
def test_calls_are_read_back_however_the_text_is_cut(
    form: CallForm, before: str, wanted: list[tuple[str, Any]], cuts: list[int]
) -> None:
    if form is LLAMA3:
        wanted = wanted[:1]
        before = "" if wanted else before.lstrip("{")
    text = before + "\n".join(form.written(name, arguments) for name, arguments in wanted)
    reader = form.reader()
    found = [item for piece in pieces_of(text, cuts) for item in reader.push(piece)] + list(reader.end())
    told = "".join(piece for kind, piece in found if kind == "text")
    assert told == (before.rstrip() if wanted else before)
    whole_reader = form.reader()
    content, whole = read(whole_reader, text)
    assert content == told
    assert [(name, json.loads(arguments)) for name, arguments in whole] == wanted
    assert reader.calls == whole_reader.calls == len(wanted)
    assert reader.complete == whole_reader.complete == bool(wanted)
    streamed: list[tuple[str, str]] = []
    for kind, piece in found:
        if kind == "call":
            streamed.append((piece, ""))
        elif kind == "arguments":
            streamed[-1] = (streamed[-1][0], streamed[-1][1] + piece)
    assert streamed == whole


@given(st.sampled_from([HERMES, LLAMA3]), calls, st.integers(0, 200))
def test_a_call_that_is_cut_short_is_not_complete(form: CallForm, call: tuple[str, Any], size: int) -> None:
    text = form.written(*call)
    end = text.rindex("}")  # of the object: its arguments end before
    reader = form.reader()
    content, found = read(reader, text[: min(size, end - 1)])
    assert not reader.complete
    assert HERMES.opening.startswith(content), "what may have been a call"
    assert len(found) <= 1
    for name, arguments in found:
        assert name == call[0]
        assert json.dumps(call[1], ensure_ascii=False).startswith(arguments)


def test_the_template_writes_a_call_as_the_grammar_does() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    ]
    assert one in render(TOKENIZER, turns, tools=[tool.told() for tool in TOOLS])
