"""The detokeniser against decoding everything at once, and stop strings against `find` in the whole text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medusa.errors import UsageError
from medusa.text.stream import REPLACEMENT, Detokenizer, StopStrings
from tiny_models import SPECIAL, TOKENIZER_VOCAB, byte_ids, make_tokenizer

TOKENIZER = make_tokenizer()


def make_metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece: words start with a mark, bytes fall back to tokens like <0xE2>, and decoding
    strips the space at the start of a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "▁Δ", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


METASPACE = make_metaspace_tokenizer()


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


# --- detokeniser ------------------------------------------------------------------------------------------------------

any_token = st.integers(0, TOKENIZER_VOCAB - 1)
text_ids = st.text(max_size=12).map(lambda text: byte_ids(text.encode()))
garbage = st.binary(max_size=8).map(byte_ids)
# What a model writes when it loses its way: the same few bytes over and over.
stutter = st.tuples(st.binary(min_size=1, max_size=3), st.integers(1, 60)).map(lambda t: byte_ids(t[0] * t[1]))
half = st.sampled_from("é€😀").flatmap(lambda c: st.integers(1, 3).map(lambda n: byte_ids(c.encode()[:n])))
token_ids = st.one_of(
    st.lists(any_token, max_size=20),
    st.lists(st.one_of(text_ids, garbage, stutter, half, st.lists(any_token, max_size=3)), max_size=6).map(
        lambda parts: [i for part in parts for i in part]
    ),
)


def test_a_text_that_goes_on_from_another_keeps_the_space_between_them() -> None:
    before = METASPACE("a", add_special_tokens=False)["input_ids"]
    more = METASPACE("b a", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(METASPACE, [METASPACE.bos_token_id, *before])
    assert "".join([*map(detokenizer.push, more), detokenizer.flush()]) == " b a"
    assert "".join(pieces_of(METASPACE, more)) == "b a"
    # What came before may end in half a character: then nothing is known of it.
    half = Detokenizer(TOKENIZER, byte_ids("aé".encode()[:2]))
    assert "".join([*map(half.push, byte_ids(b"b")), half.flush()]) == "b"


@given(before=token_ids, ids=token_ids)
def test_what_came_before_is_no_part_of_a_text(before: list[int], ids: list[int]) -> None:
    whole = Detokenizer(TOKENIZER, before)
    said = "".join([*map(whole.push, ids), whole.flush()])
    assert said == "".join(pieces_of(TOKENIZER, ids))


def test_the_tiny_tokenizer_has_one_token_for_every_byte() -> None:
    text = "héllo €😀 \n and the"
    assert decoded(TOKENIZER, byte_ids(text.encode())) == text
    assert decoded(TOKENIZER, TOKENIZER(text)["input_ids"]) == text
    assert len(TOKENIZER(" the")["input_ids"]) == 1


@given(ids=token_ids)
@example(ids=byte_ids(b"\xe2" * 40 + "\u20ac".encode()))
@example(ids=byte_ids(b"\xe2\x82" * 40 + "😀".encode()))
@example(ids=byte_ids(b"\xff" * 31 + "😀".encode()))
@example(ids=byte_ids(b"\xf0\x9f\x98" * 30 + b"\x80 \xe2\x82\xac"))
@example(ids=byte_ids("a\ufffd\ufffdb".encode()))
@example(ids=byte_ids(b"\xe2\x82") + [0] * 40 + byte_ids(b"\xac"))
def test_pieces_join_to_the_decoded_whole_and_are_never_taken_back(ids: list[int]) -> None:
    assert "".join(pieces_of(TOKENIZER, ids)) == decoded(TOKENIZER, ids)


@given(text=st.text(max_size=40), cut=st.integers(0, 3))
def test_a_character_comes_out_whole_with_its_last_byte(text: str, cut: int) -> None:
    data = text.encode() + "😀".encode()[:cut]
    detokenizer, out, written = Detokenizer(TOKENIZER), "", b""
    for i, token in zip(data, byte_ids(data), strict=True):
        out += detokenizer.push(token)
        written += bytes([i])
        assert (text + REPLACEMENT).startswith(out)
        if REPLACEMENT not in text:
            assert out == written.decode(errors="ignore"), "as soon as the character is whole"
    out += detokenizer.flush()
    assert out == text + (REPLACEMENT if cut else "")


@given(ids=token_ids)
def test_what_is_out_is_always_the_start_of_the_whole(ids: list[int]) -> None:
    whole, out, detokenizer = decoded(TOKENIZER, ids), "", Detokenizer(TOKENIZER)
    for token in ids:
        out += detokenizer.push(token)
        assert whole.startswith(out)


def test_endless_garbage_is_printed_in_time_and_the_window_stays_short() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    out = ""
    for i, token in enumerate(byte_ids(b"\xff" * 1000), start=1):
        out += detokenizer.push(token)
        assert len(out) >= i - 70
        assert len(detokenizer._ids) < 140
    assert out + detokenizer.flush() == REPLACEMENT * 1000


def test_special_tokens_give_no_text_and_change_none() -> None:
    ids = [1, *byte_ids(b"caf\xc3"), 2, *byte_ids(b"\xa9"), 0, 1, 2, *byte_ids(b" x"), 2]
    assert "".join(pieces_of(TOKENIZER, ids)) == "café x"
    assert pieces_of(TOKENIZER, [0, 1, 2]) == [""] * 4
    assert set(SPECIAL) == set(TOKENIZER.all_special_tokens)


def test_flush_prints_half_a_character_once() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.push(byte_ids(b"a")[0]) == "a"
    assert detokenizer.push(byte_ids(b"\xe2")[0]) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


words = st.lists(st.sampled_from(["▁", "a", "b", "▁a", "▁b", "▁Δ", "é", "<s>", "</s>", "€", "😀"]), max_size=12)


@given(pieces=words)
@example(pieces=["a", "</s>", "▁b"])
@example(pieces=["</s>", "▁b", "▁a"])
@example(pieces=["▁", "▁", "▁a"])
@example(pieces=["▁a", "€", "▁b"])
def test_spaces_and_byte_tokens_of_sentencepiece_survive(pieces: list[str]) -> None:
    names = [n for p in pieces for n in ([p] if p not in "€😀" else [f"<0x{b:02X}>" for b in p.encode()])]
    ids = [METASPACE.convert_tokens_to_ids(name) for name in names]
    assert "".join(pieces_of(METASPACE, ids)) == decoded(METASPACE, ids)


# --- stop strings -----------------------------------------------------------------------------------------------------

letters = st.text(alphabet="ab\n", max_size=8)


def reference(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


@given(
    pieces=st.lists(st.tuples(letters, st.sampled_from(["model", "heads", "ngram"])), max_size=10),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_equal_find_in_the_whole_text_however_it_is_split(
    pieces: list[tuple[str, str]], stops: list[str]
) -> None:
    whole = "".join(text for text, _ in pieces)
    expected = reference_by_pieces(pieces, stops)
    sources = "".join(source[0] * len(text) for text, source in pieces)
    search, spans, hit_at = StopStrings(stops), [], None
    for i, (text, source) in enumerate(pieces):
        spans += search.push(text, source)
        if search.hit and hit_at is None:
            hit_at = i
    assert search.push("", "model") == []
    spans += search.flush()
    joined = "".join(text for text, _ in spans)
    assert joined == expected
    assert search.hit == any(stop in whole for stop in stops)
    assert all(text for text, _ in spans), "no empty spans"
    assert "".join(source[0] * len(text) for text, source in spans) == sources[: len(joined)], "spans keep their source"
    if hit_at is not None:
        before = "".join(text for text, _ in pieces[:hit_at])
        assert not any(stop in before for stop in stops), "it is found with the piece that completes it"


def reference_by_pieces(pieces: Sequence[tuple[str, str]], stops: Sequence[str]) -> str:
    """The search ends with the piece that completes a stop string; what comes later cannot change what was found."""
    text = ""
    for piece, _ in pieces:
        text += piece
        if any(stop in text for stop in stops):
            break
    return reference(text, stops)


@given(
    text=st.text(alphabet="ab", max_size=30),
    stop=st.text(alphabet="ab", min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_one_stop_string_gives_the_same_text_for_every_split(text: str, stop: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    search, out = StopStrings(stop), ""
    for a, b in itertools.pairwise(edges):
        out += "".join(piece for piece, _ in search.push(text[a:b], "model"))
        assert reference(text, [stop]).startswith(out), "nothing of the stop string is ever out"
    out += "".join(piece for piece, _ in search.flush())
    assert out == reference(text, [stop])


@given(pieces=st.lists(letters, max_size=8))
def test_without_stop_strings_every_piece_passes_at_once(pieces: list[str]) -> None:
    search = StopStrings()
    for piece in pieces:
        assert search.push(piece, "model") == ([(piece, "model")] if piece else [])
    assert search.flush() == []
    assert not search.hit


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    search = StopStrings(["\nUser:", "###"])
    assert search.push("hello\nUs", "heads") == [("hello", "heads")]
    assert search.push("ual #", "model") == [("\nUs", "heads"), ("ual ", "model")]
    assert search.push("#", "ngram") == []
    assert search.push("!\nUse", "model") == [("#", "model"), ("#", "ngram"), ("!", "model")]
    assert search.push("r: x", "model") == []
    assert search.hit
    assert search.push("more", "model") == []
    assert search.flush() == []


@pytest.mark.parametrize("stops", ["", [""], ["a", ""], [3], [None]])
def test_a_stop_string_that_is_empty_or_no_string_is_an_error(stops: object) -> None:
    with pytest.raises(UsageError, match="stop string"):
        StopStrings(stops)  # type: ignore[arg-type]
