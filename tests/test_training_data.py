"""Training text: every shape of row, what is malformed, and which tokens of a conversation are learned from."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from chat_templates import (
    CHATML,
    GEMMA,
    HEADER,
    LLAMA3,
    MARKED,
    MISTRAL,
    PHI3,
    PLAIN,
    QWEN3,
    R1,
    marked,
    tokenizer_with,
)
from medusa.errors import MedusaError, UsageError
from medusa.training.data import (
    Conversation,
    Example,
    MalformedRow,
    Reader,
    encode,
    encode_rows,
    read_conversations,
    read_prompts,
)
from medusa.training.text import split
from tiny_models import make_tokenizer

CHATML_TOKENIZER = tokenizer_with(CHATML)
# "<|" could begin a marker, and "<think>" is a token of its own only by chance.
contents = st.text(max_size=12).filter(lambda text: "<" not in text)


def talk(*turns: str, system: str | None = None) -> Conversation:
    """Turns of user and assistant by turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    opening = [] if system is None else [{"role": "system", "content": system}]
    return Conversation((*opening, *messages), "here")


def labelled(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each span; between them there is what else the template writes."""
    example = encode(conversation, tokenizer, "tiny")
    return [tokenizer.decode(example.token_ids[start:end]) for start, end in example.spans]


def whole(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(encode(conversation, tokenizer, "tiny").token_ids)


# --- what is labelled -------------------------------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_chat_template() -> None:
    example = encode(talk("Hi", "Hello!", system="S"), CHATML_TOKENIZER, "tiny")
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert list(example.token_ids) == CHATML_TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert example.where == "here"
    (span,) = example.spans
    assert span == (len(example.token_ids) - 8, len(example.token_ids) - 1)  # six letters and <|im_end|>; "\n" is left


TWO = talk("Hi", "Hello! ", "How are\nyou?", "Fine.\n\nThe end")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Hello! <|im_end|>", "Fine.\n\nThe end<|im_end|>"]),
        (LLAMA3, ["Hello!<|eot_id|>", "Fine.\n\nThe end<|eot_id|>"]),
        (MISTRAL, [" Hello! <|end|>", " Fine.\n\nThe end<|end|>"]),
        (GEMMA, ["Hello!<end_of_turn>", "Fine.\n\nThe end<end_of_turn>"]),
        (PHI3, ["Hello! <|end|>", "Fine.\n\nThe end<|end|>"]),
        (QWEN3, ["<think>\n\n</think>\n\nFine.\n\nThe end<|im_end|>"]),
        (R1, ["Hello! <|end|>", "Fine.\n\nThe end<|end|>"]),
        (PLAIN, [" Hello! ", " Fine.\n\nThe end"]),
        *((template, ["Hello! <|im_end|>", "Fine.\n\nThe end<|im_end|>"]) for template in MARKED.values()),
    ],
    ids=["chatml", "llama3", "mistral", "gemma", "phi3", "qwen3", "r1", "plain", *MARKED],
)
def test_an_answer_is_labelled_with_the_token_that_ends_it(template: str, expected: list[str]) -> None:
    assert labelled(TWO, tokenizer_with(template)) == expected


def test_a_thought_is_labelled_where_it_is_shown() -> None:
    conversation = talk("Hi", "<think>Polite.</think>Hello!", "And?", "<think>\nShort.\n</think>\n\nBye")
    tokenizer = tokenizer_with(QWEN3)
    assert labelled(conversation, tokenizer) == ["<think>\nShort.\n</think>\n\nBye<|im_end|>"]
    assert "<|im_start|>assistant\nHello!<|im_end|>" in whole(conversation, tokenizer)
    assert labelled(conversation, tokenizer_with(R1)) == ["Hello!<|end|>", "\n\nBye<|end|>"]


def rows(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[str]]]:
    """The text of each row, and of each of its spans."""
    return [
        (tokenizer.decode(row.token_ids), [tokenizer.decode(row.token_ids[start:end]) for start, end in row.spans])
        for row in encode_rows(conversation, tokenizer, "tiny")
    ]


def test_a_turn_that_the_template_rewrites_later_is_learned_in_a_row_of_its_own() -> None:
    conversation = talk(
        "Hi", "<think>Polite.</think>Hello!", "And?", "Well.", "So?", "<think>\nShort.\n</think>\n\nBye"
    )
    tokenizer = tokenizer_with(QWEN3)
    hi = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    later = hi + "Hello!<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert rows(conversation, tokenizer)[1:] == [
        (later + "<think>\n\n</think>\n\nWell.<|im_end|>", ["<think>\n\n</think>\n\nWell.<|im_end|>"]),
        (hi + "<think>\nPolite.\n</think>\n\nHello!<|im_end|>", ["<think>\nPolite.\n</think>\n\nHello!<|im_end|>"]),
    ]
    assert rows(conversation, tokenizer)[0][1] == ["<think>\nShort.\n</think>\n\nBye<|im_end|>"]
    for template in (CHATML, LLAMA3, MISTRAL, GEMMA, PHI3, R1, PLAIN, *MARKED.values()):
        assert len(rows(conversation, tokenizer_with(template))) == 1


def test_turns_that_a_row_shows_as_they_were_written_share_it() -> None:
    # A thought is shown in all that is said after the last question.
    after_question = (
        "{% set roles = messages | map(attribute='role') | list %}"
        "{% set question = (roles | length) - 1 - (roles | reverse | list).index('user') %}"
    ) + QWEN3.replace("loop.last", "loop.index0 > question")
    messages = [
        *talk("Hi", "One", "And?").messages,
        *({"role": "assistant", "content": text} for text in ("Two", "Three")),
    ]
    (_, last), (_, first) = rows(Conversation((*messages,), "here"), tokenizer_with(after_question))
    assert last == [f"<think>\n\n</think>\n\n{text}<|im_end|>" for text in ("Two", "Three")]
    assert first == ["<think>\n\n</think>\n\nOne<|im_end|>"]


def test_given_turns_have_no_row_of_their_own() -> None:
    given = dataclasses.replace(talk("Hi", "One", "And?", "Two"), given=3)
    assert [spans for _, spans in rows(given, tokenizer_with(QWEN3))] == [["<think>\n\n</think>\n\nTwo<|im_end|>"]]


@given(turns=st.lists(contents, min_size=2, max_size=7), name=st.sampled_from(["chatml", "llama3", "qwen3", "r1"]))
def test_all_turns_are_learned_once_whatever_the_template_does_with_earlier_ones(turns: list[str], name: str) -> None:
    tokenizer = tokenizer_with({"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "r1": R1}[name])
    spans = [span for _, spans in rows(talk(*turns), tokenizer) for span in spans]
    answers = [span.removeprefix("<think>\n\n</think>\n\n").rpartition("<|")[0].strip() for span in spans]
    assert sorted(answers) == sorted(turn.strip() for turn in turns[1::2])


def test_words_of_the_user_that_the_assistant_repeats_are_not_labelled() -> None:
    example = encode(talk("Echo", "Echo", "Echo", "Echo"), CHATML_TOKENIZER, "tiny")
    assert labelled(talk("Echo", "Echo", "Echo", "Echo"), CHATML_TOKENIZER) == ["Echo<|im_end|>"] * 2
    for start, _ in example.spans:
        assert CHATML_TOKENIZER.decode(example.token_ids[:start]).endswith("<|im_start|>assistant\n")


def test_messages_after_the_last_answer_are_left_out() -> None:
    assert whole(talk("Hi", "Hello!", "And?"), CHATML_TOKENIZER) == whole(talk("Hi", "Hello!"), CHATML_TOKENIZER)
    assert labelled(talk("Hi", "Hello!", "And?"), tokenizer_with(QWEN3)) == [
        "<think>\n\n</think>\n\nHello!<|im_end|>",
    ]  # fmt: skip


def test_a_conversation_without_an_answer_has_no_labels() -> None:
    assert encode(talk("Hi"), CHATML_TOKENIZER, "tiny").spans == ()


def test_an_empty_answer_is_its_end_alone() -> None:
    assert labelled(talk("Hi", ""), CHATML_TOKENIZER) == ["<|im_end|>"]


def test_an_assistant_may_begin_and_may_speak_twice() -> None:
    messages = tuple({"role": "assistant", "content": text} for text in ("One", "Two"))
    assert labelled(Conversation(messages, "here"), CHATML_TOKENIZER) == ["One<|im_end|>", "Two<|im_end|>"]


def test_a_system_message_goes_into_the_first_user_turn_where_the_template_refuses_it() -> None:
    conversation = talk("Hi", "Hello!", system="Be brief.")
    assert whole(conversation, tokenizer_with(GEMMA)) == (
        "<|start|><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    )
    assert labelled(conversation, tokenizer_with(GEMMA)) == ["Hello!<end_of_turn>"]
    assert whole(conversation, tokenizer_with(MISTRAL)) == "<|start|>[INST] Be brief.\n\nHi [/INST] Hello!<|end|>"
    assert whole(talk("Hi", "Yes", system=" "), tokenizer_with(MISTRAL)) == "<|start|>[INST] Hi [/INST] Yes<|end|>"


def test_a_system_message_goes_into_the_first_user_turn_where_the_template_drops_it() -> None:
    dropping = "{% for m in messages if m['role'] != 'system' %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    assert whole(talk("Hi", "Hello!", system="Be brief."), tokenizer_with(dropping)) == (
        "<|user|>Be brief.\n\nHi<|end|><|user|>Hello!<|end|>"
    )


def test_a_template_that_refuses_a_conversation_makes_it_malformed() -> None:
    messages = tuple({"role": "user", "content": text} for text in ("One", "Two"))
    with pytest.raises(MalformedRow, match="the chat template of tiny refuses it: roles must alternate"):
        encode(Conversation(messages, "here"), tokenizer_with(MISTRAL), "tiny")
    with pytest.raises(MalformedRow, match="refuses it: roles must alternate"):
        encode(Conversation(({"role": "system", "content": "S"}, *messages), "here"), tokenizer_with(MISTRAL), "tiny")


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_across_the_border_belongs_where_it_begins(trim: bool) -> None:
    tokenizer = make_tokenizer()  # "<|start|>assistant: " and "the" meet in the token " the"
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    assert labelled(talk("Hi", "the cat"), tokenizer) == [" cat<|end|>"]
    assert labelled(talk("Hi", "a cat"), tokenizer) == ["a cat<|end|>"]
    mistral = tokenizer_with(MISTRAL)  # here the space is the model's to write
    mistral.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    assert labelled(talk("Hi", "the é cat", "é", "é"), mistral) == [" the é cat<|end|>", " é<|end|>"]


def test_a_block_that_begins_within_a_space_does_not_lose_the_next() -> None:
    tokenizer = tokenizer_with(
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}"
        "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert labelled(talk("Hi", "the", "Hi", "and"), tokenizer) == [" the<|end|>", " and<|end|>"]


def test_generation_blocks_say_which_turns_count() -> None:
    answer = HEADER + "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    only_last = marked(
        "{% if loop.last %}" + answer + "{% else %}" + HEADER + "{{ m['content'] }}<|im_end|>{% endif %}"
    )
    assert labelled(TWO, tokenizer_with(only_last)) == ["Fine.\n\nThe end<|im_end|>"]
    rewriting = marked(answer.replace("m['content']", "(m['content'] if loop.last else m['content'] | trim)"))
    assert labelled(TWO, tokenizer_with(rewriting)) == ["Hello!<|im_end|>", "Fine.\n\nThe end<|im_end|>"]


def test_a_turn_whose_end_is_not_plain_has_no_labels_rather_than_wrong_ones() -> None:
    fickle = CHATML.replace("'<|im_end|>' + '\n' }}", "'<|im_end|>' + ('\n\n' if '?' in m['content'] else '\n') }}")
    assert labelled(talk("Hi", "Yes?", "Hi", "Yes"), tokenizer_with(fickle)) == ["Yes<|im_end|>"]
    assert labelled(talk("Hi", "Yes"), tokenizer_with("{{ messages[0]['content'] }}<|im_end|>")) == []


def test_an_answer_may_hold_what_stands_for_one() -> None:
    assert labelled(talk("\u241fanswer\u241f", "\u241fanswer\u241f", "Hi", "Yes"), CHATML_TOKENIZER) == [
        "\u241fanswer\u241f<|im_end|>",
        "Yes<|im_end|>",
    ]


def test_a_model_without_a_chat_template_takes_documents_only() -> None:
    tokenizer = tokenizer_with(None)
    with pytest.raises(UsageError, match=r'tiny has no chat template: give plain text rows \({"text": ...}\)'):
        encode(talk("Hi", "Hello!"), tokenizer, "tiny")
    assert labelled(Conversation((), "here", "Once upon"), tokenizer) == ["nce upon"]  # nothing comes before "O"


def test_of_a_document_all_is_labelled_but_what_the_tokenizer_puts_first() -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    example = encode(Conversation((), "here", "<|end|> Once"), tokenizer, "tiny")
    assert tokenizer.decode(example.token_ids) == "<|start|><|end|> Once"
    assert example.spans == ((1, 7),)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> <|user|> $A <|end|>",
        special_tokens=[("<|start|>", 1), ("<|user|>", tokenizer.convert_tokens_to_ids("<|user|>")), ("<|end|>", 2)],
    )
    assert labelled(Conversation((), "here", "Once"), tokenizer) == ["Once<|end|>"]
    # ... and a conversation has only what its template writes.
    assert not whole(talk("Hi", "Hello!"), tokenizer).startswith("<|start|>")


def test_a_document_of_one_token_teaches_nothing() -> None:
    assert encode(Conversation((), "here", "O"), CHATML_TOKENIZER, "tiny").spans == ()


@given(turns=st.lists(contents, min_size=1, max_size=7), system=st.none() | contents)
def test_under_chatml_the_labels_read_as_the_answers(turns: list[str], system: str | None) -> None:
    expected = [turn + "<|im_end|>" for turn in turns[1::2]]
    assert labelled(talk(*turns, system=system), CHATML_TOKENIZER) == expected


@given(turns=st.lists(contents, min_size=2, max_size=6), name=st.sampled_from([*MARKED]))
def test_generation_blocks_and_seams_label_the_same(turns: list[str], name: str) -> None:
    conversation = talk(*turns)
    assert labelled(conversation, tokenizer_with(MARKED[name])) == labelled(conversation, CHATML_TOKENIZER)


# --- rows -------------------------------------------------------------------------------------------------------------


def write_lines(path: Path, *rows: object) -> str:
    """A JSONL file; a string is a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def read_one(tmp_path: Path, row: object) -> Conversation | Example:
    (read,) = read_conversations([write_lines(tmp_path / "rows.jsonl", row)], pytest.fail)
    return read


def says(*turns: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


HI = says(("user", "Hi"), ("assistant", "Hello!"))
HI_ROW = {"prompt": "Hi", "response": "Hello!"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [*HI], "id": 7}, HI),
        ({"messages": [{"role": "user", "content": "Hi", "name": None, "weight": 1}]}, HI[:1]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
            HI[:1],
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}, HI),
        ({"items": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello!"}]}, HI),
        ({"conversations": [{"from": "system", "value": "S"}, {"from": "bing", "value": "B"}]}, None),
        ({"conversations": [{"role": "user", "content": "Hi"}, {"from": "assistant", "value": "Hello!"}]}, HI),
        ({"instruction": "Hi", "output": "Hello!"}, HI),
        ({"instruction": "Hi", "input": "", "output": "Hello!", "text": "### Hi"}, HI),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, says(("user", "Add\n\n1 2"), ("assistant", "3"))),
        (
            {"instruction": "Hi", "input": None, "output": "Hello!", "system": "S"},
            (*says(("system", "S")), *HI),
        ),
        ({"prompt": "Hi", "response": "Hello!"}, HI),
        ({"prompt": "Hi", "completion": "Hello!"}, HI),
        ({"prompt": "Hi", "answer": "Hello!"}, HI),
        ({"question": "Hi", "answer": "Hello!"}, HI),
        ({"system_prompt": "", "question": "Hi", "response": "Hello!"}, HI),
        ({"prompt": "Hi", "messages": [*HI]}, HI),
    ],
)
def test_every_shape_of_a_row_is_read(tmp_path: Path, row: object, messages: tuple[dict[str, str], ...] | None) -> None:
    expected = says(("system", "S"), ("assistant", "B")) if messages is None else messages
    assert read_one(tmp_path, row) == Conversation(expected, f"{tmp_path}/rows.jsonl, line 1")


def test_a_text_is_a_document(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"text": "Once\n\nupon", "prompt": None}) == Conversation(
        (), f"{tmp_path}/rows.jsonl, line 1", "Once\n\nupon"
    )


def test_a_distilled_row_is_an_example_already(tmp_path: Path) -> None:
    row = {"number": 3, "model": "tiny", "messages": [*HI], "token_ids": [1, 2, 3, 4, 5], "labels": [[2, 4], [4, 5]]}
    assert read_one(tmp_path, row) == Example((1, 2, 3, 4, 5), ((2, 4), (4, 5)), f"{tmp_path}/rows.jsonl, line 1")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": [', "not valid JSON (Expecting value at column 15)"),
        ("Hi", "not valid JSON (Expecting value at column 1)"),
        ('{"prompt": ' + "[" * 100_000, "not valid JSON (maximum recursion depth"),
        ("7", "a row must be an object with named fields, not a number"),
        ("[]", "a row must be an object with named fields, not a list"),
        ({}, "but nothing"),
        ({"inputs": "Hi", "targets": 1}, 'but only "inputs", "targets"'),
        ({"prompt": "Hi"}, 'there is a prompt but no answer ("output", "response", "completion", "answer")'),
        ({"prompt": "Hi", "response": None}, "there is a prompt but no answer"),
        ({"prompt": ["Hi"], "response": "Hello!"}, "a message must be an object with named fields, not text"),
        ({"question": ["Hi"], "response": "Hello!"}, '"question" must be text, not a list'),
        ({"question": "Hi", "answer": 7}, '"answer" must be text, not a number'),
        ({"text": ["Hi"]}, '"text" must be text, not a list'),
        ({"text": " \n"}, '"text" is empty'),
        ({"text": "half \ud83d"}, '"text" holds half a character'),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "Hi"}, "the conversation must be a list of messages, not text"),
        ({"messages": ["Hi"]}, "a message must be an object with named fields, not text"),
        ({"messages": [{"role": "user"}]}, 'a message needs a role and a content, but has "role"'),
        ({"messages": [{"role": "user", "content": None}]}, "a message needs a role and a content"),
        ({"messages": [{"role": "user", "content": 7}]}, '"content" must be text, not a number'),
        ({"messages": [{"role": "user", "content": "\udc80"}]}, '"content" holds half a character'),
        ({"messages": [{"role": "narrator", "content": "7"}]}, "unknown role 'narrator'"),
        ({"messages": [{"role": 7, "content": "7"}]}, '"role" must be text, not a number'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "a message has a part that is not text but 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "a part of a message must be an object with"),
        ({"token_ids": [1, 2]}, '"labels" must be a list of [start, end]'),
        ({"token_ids": [1, 2], "labels": [[0, 1, 2]]}, '"labels" must be a list of [start, end]'),
        ({"token_ids": [1, 2], "labels": [[0, "1"]]}, '"labels" must be a list of [start, end]'),
        ({"token_ids": [1, 2.0], "labels": []}, '"token_ids" must be a list of integers'),
        ({"token_ids": [1, True], "labels": []}, '"token_ids" must be a list of integers'),
        ({"token_ids": [], "labels": []}, "there are no tokens"),
        ({"token_ids": [1, -2], "labels": []}, "-2 is not a token"),
        ({"token_ids": [1, 50], "labels": []}, "token 50 is not one of the model's 50"),
        ({"token_ids": [1, 2], "labels": [[1, 3]]}, "a span ends at 3, but there are 2 tokens"),
        ({"token_ids": [1, 2], "labels": [[1, 1]]}, "the span [1, 1) is empty"),
        ({"token_ids": [1, 2], "labels": [[-1, 1]]}, "the span [-1, 1) is empty, or begins before"),
        ({"token_ids": [1, 2, 3], "labels": [[0, 2], [1, 3]]}, "the span [1, 3) is empty, or begins before"),
    ],
)
def test_a_malformed_row_is_reported_with_its_line_and_skipped(tmp_path: Path, row: object, reason: str) -> None:
    said: list[str] = []
    path = write_lines(tmp_path / "rows.jsonl", *[HI_ROW] * 9, "", row)
    read = list(read_conversations([path], said.append, vocab_size=50))
    assert len(read) == 9
    (line,) = said
    assert line.startswith(f"{path}, line 11: ")
    assert reason in line
    assert line.endswith("; skipped")


def test_bytes_that_are_not_utf8_are_a_malformed_row(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "rows.jsonl"
    good = json.dumps(HI_ROW).encode() + b"\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + good * 9 + b'{"text": "caf\xe9"}\n')
    assert len(list(read_conversations([str(path)], said.append))) == 9
    assert said == [f"{path}, line 10: not UTF-8 text; skipped"]


def test_a_last_line_cut_short_is_malformed_and_one_without_its_end_is_not(tmp_path: Path) -> None:
    said: list[str] = []
    line = json.dumps(HI_ROW)
    path = tmp_path / "rows.jsonl"
    path.write_text((line + "\n") * 10 + line, "utf-8")
    assert len(list(read_conversations([str(path)], said.append))) == 11
    assert said == []
    path.write_text((line + "\n") * 10 + line[:-3], "utf-8")
    assert len(list(read_conversations([str(path)], said.append))) == 10
    assert len(said) == 1
    assert f"{path}, line 11: not valid JSON" in said[0]


def test_a_tenth_of_malformed_rows_is_borne_and_more_is_not(tmp_path: Path) -> None:
    said: list[str] = []
    path = write_lines(tmp_path / "rows.jsonl", *[HI_ROW] * 9, "bad")
    assert len(list(read_conversations([path], said.append))) == 9
    path = write_lines(tmp_path / "rows.jsonl", *[HI_ROW] * 8, "bad", *[HI_ROW] * 8, "bad")
    read = []
    with pytest.raises(MedusaError, match=r"2 of 18 rows of .*rows.jsonl are malformed; the first is .*, line 9: not"):
        read.extend(read_conversations([path], said.append))


def test_a_large_source_of_the_wrong_kind_is_noticed_early(tmp_path: Path) -> None:
    said: list[str] = []
    path = write_lines(tmp_path / "rows.jsonl", *[HI_ROW] * 80, *["bad"] * 20, *[HI_ROW] * 900)
    with pytest.raises(MedusaError, match="20 of 100 rows of"):
        list(read_conversations([path], said.append))


def test_only_the_first_malformed_rows_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    said: list[str] = []
    path = write_lines(tmp_path / "rows.jsonl", *[HI_ROW] * 200, *["bad"] * 12)
    assert len(list(read_conversations([path], said.append))) == 200
    assert len(said) == 11
    assert said[9].startswith(f"{path}, line 210: ")
    assert said[10] == f"{path}: 2 more malformed rows; skipped"


def test_a_bad_source_is_not_hidden_by_a_large_good_one(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", *[HI_ROW] * 100)
    bad = write_lines(tmp_path / "bad.jsonl", HI_ROW, "bad")
    with pytest.raises(MedusaError, match=r"1 of 2 rows of .*bad.jsonl"):
        list(read_conversations([good, bad], [].append))


# --- sources ----------------------------------------------------------------------------------------------------------


def wheres(read: Sequence[Conversation | Example]) -> list[str]:
    return [one.where.rpartition("/")[2] for one in read]


def test_a_json_file_is_an_array_or_one_row_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([HI_ROW, HI_ROW], indent=2), "utf-8")
    assert wheres(list(read_conversations([str(path)], pytest.fail))) == ["rows.json, row 1", "rows.json, row 2"]
    path.write_text(json.dumps({"messages": HI}, indent=2), "utf-8-sig")
    assert wheres(list(read_conversations([str(path)], pytest.fail))) == ["rows.json, row 1"]
    write_lines(path, HI_ROW, "", HI_ROW)
    assert wheres(list(read_conversations([str(path)], pytest.fail))) == ["rows.json, line 1", "rows.json, line 3"]


def test_a_damaged_array_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([HI_ROW, HI_ROW])[:-5], "utf-8")
    with pytest.raises(MedusaError, match=r"rows.json is not valid JSON: .*line 1 column"):
        list(read_conversations([str(path)], pytest.fail))


def test_a_text_file_has_a_document_a_paragraph_and_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\nOnce upon\r\n  a time\n \n\n\nThe end: é".encode())
    read = list(read_conversations([str(path)], pytest.fail))
    assert wheres(read) == ["text.txt, line 2", "text.txt, line 7"]
    assert [one.text for one in read if isinstance(one, Conversation)] == ["Once upon\n  a time", "The end: é"]
    asked = list(read_prompts(str(path), pytest.fail))
    assert wheres(asked) == ["text.txt, line 2", "text.txt, line 3", "text.txt, line 7"]
    assert [one.messages for one in asked] == [says(("user", t)) for t in ("Once upon", "a time", "The end: é")]


def test_a_line_of_text_that_is_not_utf8_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"Hi\n\n" * 9 + b"Two lines\ncaf\xe9\n")
    said: list[str] = []
    assert len(list(read_conversations([str(path)], said.append))) == 9
    assert len(list(read_prompts(str(path), said.append))) == 10
    assert said == [f"{path}, line {line}: not UTF-8 text; skipped" for line in (19, 20)]


def test_parquet_gives_what_json_gives(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = [
        {"messages": [*HI], "prompt": None, "response": None, "token_ids": None, "labels": None},
        {"messages": None, "prompt": "Hi", "response": "Hello!", "token_ids": None, "labels": None},
        {"messages": None, "prompt": None, "response": None, "token_ids": [1, 2, 3], "labels": [[1, 3]]},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    where = f"{path}, row"
    assert list(read_conversations([str(path)], pytest.fail)) == [
        Conversation(HI, f"{where} 1"),
        Conversation(HI, f"{where} 2"),
        Example((1, 2, 3), ((1, 3),), f"{where} 3"),
    ]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(MedusaError, match=r"rows\.parquet is not a valid parquet file: "):
        list(read_conversations([str(path)], pytest.fail))


def test_a_data_set_of_the_hub_is_read_by_its_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        if split == "none":
            raise ValueError('Unknown split "none".\nMore of it.')
        return [HI_ROW, HI_ROW]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    read = list(read_conversations(["someone/chats", "someone/chats:test_sft"], pytest.fail))
    assert asked == [("someone/chats", "train"), ("someone/chats", "test_sft")]
    assert [one.where for one in read][1:3] == ["someone/chats, row 2", "someone/chats:test_sft, row 1"]
    with pytest.raises(MedusaError, match=r'^cannot load the data set someone/chats:none: Unknown split "none"\.$'):
        list(read_conversations(["someone/chats:none"], pytest.fail))


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").touch()
    for source in ("someone/chats", str(tmp_path / "rows.parquet")):
        with pytest.raises(MedusaError, match=r"needs more libraries: pip install 'medusa-decode\[train\]'"):
            list(read_conversations([source], pytest.fail))


def test_what_is_no_source_is_a_usage_error_before_anything_is_read(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", HI_ROW)
    (tmp_path / "notes.md").touch()
    for source, message in [
        (f"{tmp_path}/missing.jsonl", "there is no file .*missing.jsonl"),
        (str(tmp_path), "is a directory"),
        (f"{tmp_path}/notes.md", "cannot be read: name a file"),
        ("ultrachat", "cannot be read: name a file"),
        ("a/b/c", "cannot be read: name a file"),
    ]:
        with pytest.raises(UsageError, match=message):
            next(read_conversations([good, source], pytest.fail))


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.txt", "\n")])
def test_an_empty_source_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(MedusaError, match=f"{name} is empty"):
        list(read_conversations([str(tmp_path / name)], pytest.fail))


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Hi"}, HI[:1]),
        ({"question": "Hi", "answer": "Hello!"}, HI[:1]),
        (
            {"instruction": "Add", "input": "1 2", "system": "S"},
            says(("system", "S"), ("user", "Add\n\n1 2")),
        ),
        (
            {"messages": [*says(("system", "S")), *HI, *says(("user", "And?"), ("assistant", "No."))]},
            says(("system", "S"), ("user", "Hi"), ("user", "And?")),
        ),
        ({"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Hi"}]}, HI[:1]),
        ({"token_ids": [1], "labels": [], "messages": [*HI]}, HI[:1]),
    ],
)
def test_prompts_are_what_users_say(tmp_path: Path, row: object, messages: tuple[dict[str, str], ...]) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", row)
    assert list(read_prompts(path, pytest.fail)) == [Conversation(messages, f"{path}, line 1")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "Once"}, '"text" is a document, not a question; call it "prompt"'),
        ({"prompt": " "}, "a user turn is empty"),
        ({"messages": [*HI[1:]]}, "no user says anything"),
        ({"messages": [*HI, *says(("system", "S"))]}, "a system message must be the first"),
        ({"response": "Hello!"}, 'but only "response"'),
    ],
)
def test_a_row_that_asks_nothing_is_malformed(tmp_path: Path, row: object, reason: str) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", row)
    with pytest.raises(MedusaError) as caught:
        list(read_prompts(path, lambda line: None))
    assert f"1 of 1 rows of {path} are malformed; the first is {path}, line 1: " in str(caught.value)
    assert reason in str(caught.value)


# --- the reader -------------------------------------------------------------------------------------------------------


def test_the_reader_gives_examples_of_every_kind_of_row(tmp_path: Path) -> None:
    said: list[str] = []
    reader = Reader(CHATML_TOKENIZER, "tiny", len(CHATML_TOKENIZER), said.append)
    distilled = {"token_ids": [1, 2, 3], "labels": [[1, 3]], "model": "tiny"}
    rows = write_lines(tmp_path / "rows.jsonl", HI_ROW, {"messages": [*HI[:1]]}, distilled, {"text": "Once"})
    examples = list(reader.examples([rows]))
    assert [example.where for example in examples] == [f"{rows}, line {line}" for line in range(1, 5)]
    assert [len(example.spans) for example in examples] == [1, 0, 1, 1]
    assert said == []


def test_all_turns_are_read_and_a_conversation_stays_on_one_side_of_the_split(tmp_path: Path) -> None:
    reader = Reader(tokenizer_with(QWEN3), "tiny", 1000, pytest.fail)
    long = {"messages": [*HI, *HI, *HI]}
    path = write_lines(tmp_path / "rows.jsonl", HI_ROW, long, long, HI_ROW, long)
    examples = list(reader.examples([path]))
    assert [len(example.spans) for example in examples] == [1] * 11
    assert [wheres(part) for part in split(examples, 0.5)] == [
        [f"rows.jsonl, line {line}" for line in lines] for lines in ((2, 2, 2, 4), (1, 3, 3, 3, 5, 5, 5))
    ]


def test_a_row_that_the_template_refuses_counts_as_malformed(tmp_path: Path) -> None:
    said: list[str] = []
    reader = Reader(tokenizer_with(MISTRAL), "tiny", 1000, said.append)
    refused = {"messages": [*HI[:1], *HI[:1]]}
    path = write_lines(tmp_path / "rows.jsonl", *[HI_ROW] * 9, refused)
    assert len(list(reader.examples([path]))) == 9
    assert said == [
        f"{path}, line 10: the chat template of tiny refuses it: roles must alternate user/assistant; skipped"
    ]
    path = write_lines(tmp_path / "rows.jsonl", *[HI_ROW] * 8, refused)
    with pytest.raises(MedusaError, match="1 of 9 rows"):
        list(reader.examples([path]))


def test_text_that_another_model_wrote_is_pointed_out_once(tmp_path: Path) -> None:
    said: list[str] = []
    reader = Reader(CHATML_TOKENIZER, "tiny", 1000, said.append)
    row = {"token_ids": [1, 2, 3], "labels": [[1, 3]], "model": "huge"}
    path = write_lines(tmp_path / "rows.jsonl", row, row)
    assert len(list(reader.examples([path, path]))) == 4
    assert said == [f"{path}, line 1: written by huge, not by tiny; are its tokens the same?"]


def test_the_reader_stops_at_a_conversation_where_there_is_no_chat_template(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "Once"}, HI_ROW)
    examples = Reader(tokenizer_with(None), "tiny", 1000, pytest.fail).examples([path])
    assert next(examples).spans == ((1, 4),)
    with pytest.raises(UsageError, match="tiny has no chat template"):
        next(examples)


def test_what_crosses_borders_is_checked_where_it_is_built() -> None:
    with pytest.raises(ValueError, match="either messages or a text"):
        Conversation((), "here")
    with pytest.raises(ValueError, match="either messages or a text"):
        Conversation(HI, "here", "text")
    with pytest.raises(ValueError, match="a span ends at 4"):
        Example((1, 2, 3), ((1, 4),), "here")
