"""Chat templates in pieces: what is read token by token is what the template writes, for the shapes that are about.

The templates here are of the shape of those of Qwen, Llama 3, Gemma, Mistral and Phi, on the tiny tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from medusa.errors import UsageError
from medusa.text.chat_template import render
from medusa.text.turns import Turns
from medusa.training.distill import DistillSettings
from medusa.training.speaker import NO_QUESTION, Speaker, line_ends
from medusa.training.talk import Reply, Talk, Transcript, Turn
from tiny_models import make_tokenizer

END, OTHER_END = 2, 0  # <|end|> and <|pad|>

# A system prompt of its own where none is given; nothing is stripped.
QWEN = """{%- if messages[0]['role'] != 'system' -%}
<|start|>system
Be of use.<|end|>
{% endif -%}
{%- for m in messages -%}
<|start|>{{ m['role'] }}
{{ m['content'] }}<|end|>
{% endfor -%}
{%- if add_generation_prompt %}<|start|>assistant
{% endif -%}"""

# The text begins with a token of its own, contents are stripped.
LLAMA = """{{- '<|pad|>' -}}
{%- for m in messages -%}
{{- '<|start|>' + m['role'] + '(head)\n\n' + m['content'] | trim + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant(head)\n\n' -}}{%- endif -%}"""

# No system role, strict turns, another name for the assistant, contents are stripped.
GEMMA = """{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('there is no system role') }}{%- endif -%}
{%- for m in messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('turns must alternate') }}{%- endif -%}
{{- '<|start|>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] | trim + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>model\n' -}}{%- endif -%}"""

# The system prompt stands in the last user turn; an answer begins with a space that its opening does not hold; a
# user's turn ends with a single token, and nothing opens the answer.
MISTRAL = """{%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] + '\n\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<|start|>' -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- '(INST) ' + (system if loop.last else '') + m['content'] + '<|pad|>' -}}
{%- else -%}{{- ' ' + m['content'] + '<|end|>' -}}{%- endif -%}
{%- endfor -%}"""

# Roles are marked by tokens, and a text without the opening of an answer ends with one more.
PHI = """{%- for m in messages -%}{{- '<|start|>' + m['role'] + '>\n' + m['content'] + '<|end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant>\n' -}}{%- else -%}{{- '<|pad|>' -}}{%- endif -%}"""

SHAPES = {"qwen": QWEN, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "phi": PHI}


def speaker(template: str, **settings: int) -> Speaker:
    ends = frozenset({END, OTHER_END})
    return Speaker(make_tokenizer(template), ends, DistillSettings(**settings), slot_length=2000)


def acted(speaker: Speaker, talk: Talk, lines: Sequence[str]) -> tuple[list[int], Transcript]:
    """Plays the model, which says one line after the other; the text as it is in the slot, and the conversation."""
    text: list[int] = []
    said = None
    left = iter(lines)
    while True:
        try:
            turn = next(talk) if said is None else talk.send(said)
        except StopIteration as end:
            return text, end.value
        if turn.drop_last:
            text.pop()
        text += turn.tokens
        tokens, reason = [], "length"
        for token in speaker.encode(next(left))[: turn.max_new_tokens]:
            tokens.append(token)
            if token in turn.ends:
                reason = "stop"
                break
        text += tokens
        said = Reply(tokens, reason)


def without(messages: Sequence[dict[str, str]], space: str) -> list[dict[str, str]]:
    """The messages, answers without the space that the template writes in front of them."""
    return [{**m, "content": m["content"].removeprefix(space if m["role"] == "assistant" else "")} for m in messages]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_reads_as_its_template_writes_it(shape: str) -> None:
    speak = speaker(SHAPES[shape])
    turns = Turns.of(speak.tokenizer)
    space = " " if shape == "mistral" else ""  # which the model writes
    talk = speak.given(0, turns, None, ["  What is it? \n", "And why?", "Who?"])
    text, talked = acted(speak, talk, [f"{space}A bell.<|end|>", f"{space}It rings.<|end|>", f"{space}I do."])
    assert text == talked.token_ids
    messages = without(talked.messages, space)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    for i, (start, _) in enumerate(talked.labels):
        before = render(speak.tokenizer, messages[: 2 * i + 1], answer=True)
        assert speak.tokenizer.decode(talked.token_ids[:start]) == before
        assert talked.token_ids[:start] == speak.encode(before)
    first, second, last = (speak.tokenizer.decode(talked.token_ids[start:end]) for start, end in talked.labels)
    assert (first, second, last) == (f"{space}A bell.<|end|>", f"{space}It rings.<|end|>", f"{space}I do.")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["<|end|>", "<|pad|>", "\n", "\n\nSure, here is", " \n"])
def test_an_invented_turn_ends_where_the_model_ends_it_or_with_its_line(shape: str, end: str) -> None:
    speak = speaker(SHAPES[shape], turns=3)
    turns, lines = Turns.of(speak.tokenizer), line_ends(speak.tokenizer)
    number = next(n for n in range(99) if speak.seed(n, 0, "turns") % 3 == 1)  # it has two user turns
    space = " " if shape == "mistral" else ""
    said = [f" and the bells?{end}", f"{space}They ring.<|end|>", f" and the thieves?{end}", f"{space}No."]
    text, talked = acted(speak, speak.invented(number, turns, lines), said)
    assert not talked.fault
    assert text == talked.token_ids
    asked = [m["content"] for m in talked.messages if m["role"] == "user"]
    assert [content.rstrip() for content in asked] == [
        f"{speak.opening(number, 0)} and the bells?",
        f"{speak.opening(number, 1)} and the thieves?",
    ]
    messages = without(talked.messages, space)
    if end != " \n":  # the text keeps that space, which some templates strip
        for i, (start, _) in enumerate(talked.labels):
            before = render(speak.tokenizer, messages[: 2 * i + 1], answer=True)
            assert speak.tokenizer.decode(talked.token_ids[:start]) == before


def test_after_a_colon_a_turn_goes_on_to_what_is_announced() -> None:
    speak = speaker(QWEN, turns=1)
    turns, lines = Turns.of(speak.tokenizer), line_ends(speak.tokenizer)
    said = [" this line of mine:\n", "\nall is\nwell<|end|>", "It is."]
    text, talked = acted(speak, speak.invented(0, turns, lines), said)
    assert text == talked.token_ids
    assert talked.messages[0]["content"] == f"{speak.opening(0, 0)} this line of mine:\n\nall is\nwell"
    # What never ends is no question; nor is one that is not even begun.
    for said in ([" this line of mine:\n", "\nall is well " * 30], ["\n"], [" ? !\n"], ["<|end|>"]):
        text, talked = acted(speak, speak.invented(0, turns, lines), said)
        assert talked.fault == NO_QUESTION


def test_a_conversation_without_a_next_question_ends_with_its_answer() -> None:
    """Its end included, also where the template would have ended it in another way."""
    speak = speaker(QWEN, turns=3)
    turns, lines = Turns.of(speak.tokenizer), line_ends(speak.tokenizer)
    number = next(n for n in range(99) if speak.seed(n, 0, "turns") % 3 == 2)
    _, talked = acted(speak, speak.invented(number, turns, lines), [" are bells?\n", "Round.<|pad|>", "\n"])
    assert not talked.fault
    ((start, end),) = talked.labels
    assert speak.tokenizer.decode(talked.token_ids[start:end]) == "Round.<|pad|>"
    assert end == len(talked.token_ids)
    assert [m["role"] for m in talked.messages] == ["user", "assistant"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_system_prompt_stands_where_the_template_puts_it(shape: str) -> None:
    speak = speaker(SHAPES[shape])
    turns = Turns.of(speak.tokenizer, " Be brief. ")
    _, talked = acted(speak, speak.given(0, turns, " Be brief. ", [" Why? ", "And?"]), ["So.<|end|>"] * 2)
    start = talked.labels[0][0]
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": " Why? "}]
    if shape == "gemma":
        messages = [{"role": "user", "content": " Be brief. \n\n Why? "}]
    read = speak.tokenizer.decode(talked.token_ids[:start])
    assert read == render(speak.tokenizer, messages, answer=True)
    assert read.count("Be brief.") == 1
    # Mistral's moves to the last turn, which rewrites those before it.
    assert len(talked.labels) == (1 if shape == "mistral" else 2)


def test_what_is_stripped_is_known() -> None:
    found = {shape: Turns.of(make_tokenizer(template)).strips for shape, template in SHAPES.items()}
    assert found == {shape: (shape in ("llama", "gemma"),) * 2 for shape in SHAPES}
    # The system prompt in front keeps the start of the turn from being stripped.
    assert Turns.of(make_tokenizer(GEMMA), "Be brief.").strips == (False, True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('never') }}", "refuses a plain user turn: never"),
        ("{{ messages[0]['role'] }}", "does not show the user's turn"),
        ("{{ messages[-1]['content'] }}", "or nothing after it"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Turns.of(make_tokenizer(template))


def test_a_template_of_one_turn_gives_conversations_of_one_turn() -> None:
    single = QWEN + "{%- if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif -%}"
    assert Turns.of(make_tokenizer(single)).before_next is None


def test_a_seam_is_read_as_in_the_middle_of_a_text() -> None:
    """Tokenizers of the older SentencePiece kind put a space before a text, but not before a part of one."""
    letters = sorted({*"▁\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!'[]/"})
    vocabulary = {token: i for i, token in enumerate(["<|pad|>", "<|start|>", "<|end|>", *letters, "▁▁"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "▁")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|start|>", "<|end|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>")
    fast.chat_template = (
        "<|start|>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    speak = Speaker(fast, frozenset({END}), DistillSettings(turns=1), slot_length=2000)
    turns, lines = Turns.of(fast), line_ends(fast)
    assert turns.before_next == "<|end|>[INST] "
    assert lines == {vocabulary["\n"]}
    read = fast("my bells\n", add_special_tokens=False)["input_ids"]
    talk = speak.invented(0, turns, lines)
    first = next(talk)
    second = talk.send(Reply(read, "stop"))
    assert isinstance(second, Turn)
    assert [*first.tokens, *read[:-1], *second.tokens] == speak.encode(
        f"<|start|>[INST] {speak.opening(0, 0)} my bells [/INST]"
    )
    with pytest.raises(StopIteration) as ended:
        talk.send(Reply(speak.encode("So.<|end|>"), "stop"))
    assert ended.value.value.messages[0]["content"] == f"{speak.opening(0, 0)} my bells"
