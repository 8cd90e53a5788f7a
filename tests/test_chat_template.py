"""What the model reads, and the tokens that end a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import medusa
from medusa.text.chat_template import encode_plain, turn_ends
from tiny_lm import make
from tiny_models import SPECIAL, byte_ids, make_model, make_tokenizer

START, END = 1, 2


def appending(before: str = "<|start|>") -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token first and the end token last, as that of T5 or of some fine-tuned models."""
    tokenizer = make_tokenizer()
    ids = dict(zip(SPECIAL, range(3), strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A <|end|>".strip(), special_tokens=[("<|start|>", ids["<|start|>"]), ("<|end|>", END)]
    )
    assert tokenizer("ab")["input_ids"][-1] == END
    return tokenizer


def test_a_plain_text_does_not_end_with_the_token_that_the_tokenizer_appends() -> None:
    assert encode_plain(appending(), "ab") == [START, *byte_ids(b"ab")]
    assert encode_plain(appending(before=""), "ab") == byte_ids(b"ab")
    assert encode_plain(make_tokenizer(), "ab") == byte_ids(b"ab")
    assert encode_plain(appending(), "") == [START]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(SPECIAL), max_size=2), st.lists(st.sampled_from(SPECIAL), max_size=2), st.text("ab é"))
def test_whatever_a_tokenizer_adds_only_what_it_puts_first_is_read(
    before: list[str], after: list[str], text: str
) -> None:
    tokenizer = make_tokenizer()
    bare = tokenizer(text)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*before, "$A", *after]), special_tokens=[(token, i) for i, token in enumerate(SPECIAL)]
    )
    wanted = [SPECIAL.index(token) for token in before] + bare
    found = encode_plain(tokenizer, text)
    assert found == wanted if bare else found[:1] == [SPECIAL.index(token) for token in [*before, *after][:1]]


def test_an_end_token_that_the_user_wrote_stays() -> None:
    assert encode_plain(appending(), "ab<|end|>") == [START, *byte_ids(b"ab"), END]
    assert encode_plain(make_tokenizer(), "ab<|end|>") == [*byte_ids(b"ab"), END]


def test_raw_text_goes_on_where_the_tokenizer_would_end_it() -> None:
    plain, ended = (make(tokenizer=tokenizer) for tokenizer in (make_tokenizer(), appending(before="")))
    found = ended.generate("Once upon", raw=True, max_new_tokens=12)
    assert found.token_ids == plain.generate("Once upon", raw=True, max_new_tokens=12).token_ids


# --- ends of turns ----------------------------------------------------------------------------------------------------

TEMPLATES: dict[str, tuple[str, tuple[int, ...]]] = {
    "its own token": ("{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}", (END,)),
    "after white space": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n<|end|>\n{% endfor %}", (END,)),
    "text": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n###\n{% endfor %}", ()),
    "text before a token": ("{% for m in messages %}{{ m.content }} (over)<|end|>{% endfor %}", (END,)),
    "nothing": ("{% for m in messages %}{{ m.content }}{% endfor %}", ()),
    "one turn only": ("{{ raise_exception('no') if messages | length > 1 }}{{ messages[0].content }}<|end|>", ()),
    "it shows no answers": ("{{ messages[0].content }}<|end|>", ()),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_that_ends_a_turn_is_found_in_the_template(name: str) -> None:
    template, expected = TEMPLATES[name]
    assert turn_ends(make_tokenizer(template)) == expected


PIECES = st.text("ab \n:#", max_size=4)


@settings(max_examples=30)
@given(st.sampled_from(SPECIAL), PIECES, PIECES, PIECES, st.sampled_from(["", "<|start|>", "<|pad|>"]))
def test_the_first_token_of_its_own_after_an_answer_ends_it(
    end: str, opening: str, closing: str, rest: str, begin: str
) -> None:
    parts = [repr(begin), "m.role", repr(opening), "m.content", repr(closing), repr(end), repr(rest)]
    template = "{% for m in messages %}" + "".join(f"{{{{ {part} }}}}" for part in parts) + "{% endfor %}"
    assert turn_ends(make_tokenizer(template)) == (SPECIAL.index(end),)


def test_without_a_template_no_token_ends_a_turn() -> None:
    assert turn_ends(make_tokenizer(chat_template=None)) == ()


def saved(path: Path, tokenizer: PreTrainedTokenizerFast, eos: Any) -> Path:
    model = make_model("llama", vocab_size=300)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = eos
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_chat_ends_at_the_end_of_a_turn_that_no_configuration_names(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATES["its own token"][0])
    tokenizer.eos_token = "<|pad|>"
    for backend in ("transformers", "auto"):
        model = medusa.load(str(saved(tmp_path, tokenizer, [7])), backend=backend, heads="none", progress=False)
        assert model.eos_token_ids == (7, 0, END)
        assert model.describe()["ends_of_text"] == f"{tokenizer.decode([7])} (7), <|pad|> (0), <|end|> (2)"
