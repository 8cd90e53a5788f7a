"""JSON and schemas as constraints, on a tiny tokenizer: what may follow, and that drafts change nothing."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from helpers import RandomTreeDrafter, ToyBackend, ToyModel, plain_decode
from medusa.api import LanguageModel
from medusa.decoding.draft import Drafter, NgramDrafter, NoDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.scheduler import Scheduler
from medusa.decoding.stepper import Request
from medusa.errors import MedusaError, UsageError
from medusa.grammar import engine
from medusa.grammar.engine import Grammar, Grammars
from tiny_lm import END, make
from tiny_models import TOKENIZER_VOCAB, make_tokenizer

VOCAB = TOKENIZER_VOCAB + 5  # models pad their logits
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@cache
def grammars() -> Grammars:
    return Grammars(make_tokenizer(), VOCAB, [END])


def ids(text: str) -> list[int]:
    return list(make_tokenizer()(text)["input_ids"])


def said(mask: np.ndarray | None) -> set[str]:
    assert mask is not None
    return {make_tokenizer().decode([int(token)]) for token in np.flatnonzero(mask)}


# --- what may follow --------------------------------------------------------------------------------------------------


def test_the_end_of_the_text_may_come_where_the_grammar_is_complete_and_only_there() -> None:
    text = ids('{"name": "Ann", "age": 33}')
    follower = grammars().json_schema(PERSON).begin()
    for place, token in enumerate(text):
        allowed = follower.allowed(text[:place])
        assert allowed is not None
        assert allowed.shape == (VOCAB,)
        assert allowed[token]
        assert not allowed[END]
    ended = follower.allowed(text)
    assert ended is not None
    assert np.flatnonzero(ended).tolist() == [END]
    assert follower.allowed([*text, END]) is None, "nobody reads what comes after the end"


def test_a_text_that_may_go_on_may_end_too() -> None:
    allowed = grammars().json_schema({"type": "integer", "minimum": 5, "maximum": 50}).begin().allowed(ids("7"))
    assert allowed is not None
    assert not allowed.any() or allowed[END]
    more = grammars().json_schema({"type": "integer"}).begin().allowed(ids("7"))
    assert said(more) == {*string.digits, "<|end|>"}


def test_what_was_kept_is_the_text_and_what_was_only_asked_about_is_not() -> None:
    follower = grammars().json_schema({"enum": ["abc", "abd", "xyz"]}).begin()
    assert said(follower.allowed(ids('"ab'))) == {"c", "d"}
    assert said(follower.allowed(ids('"'))) == {"a", "x"}
    follower.keep(ids('"x'))
    assert said(follower.allowed(ids("y"))) == {"z"}
    assert said(follower.allowed([])) == {"y"}
    assert not follower.enter(ids("z")[0])
    assert follower.enter(ids("y")[0])
    assert list(follower.forced()) == [*ids('z"'), END], "and then it ends"
    follower.leave()
    assert said(follower.allowed([])) == {"y"}


def test_the_end_can_be_walked_into_and_left() -> None:
    follower = grammars().json_schema({"const": 7}).begin()
    assert not follower.enter(END)
    assert follower.enter(ids("7")[0])
    assert follower.enter(END)
    assert not follower.enter(ids("7")[0])
    assert list(follower.forced()) == []
    follower.leave(2)
    assert said(follower.allowed([])) == {"7"}


def test_a_text_begins_anew_with_each_constraint() -> None:
    grammar = grammars().json_schema(PERSON)
    first = grammar.begin()
    first.keep(ids('{"name": "A'))
    assert said(grammar.begin().allowed([])) == {"{"}


def test_json_is_on_one_line() -> None:
    follower = grammars().json_object().begin()
    text = json.dumps({"a": [1, 2.5, None, True], "b": {"c": "d\n"}})
    follower.keep([*ids(text), END])
    for wrong in ('{ "a"', '{"a" :', '{"a":1', '{"a": 1,"', '{"a": 1 }', '{\n"'):
        with pytest.raises(MedusaError, match="cannot be followed"):
            grammars().json_object().begin().allowed(ids(wrong))


def test_a_grammar_that_is_too_much_work_is_the_error_of_who_made_it() -> None:
    many = {"type": "object", "properties": {f"p{i}": {"pattern": f"^[a-z]{{1,{i + 1}}}$"} for i in range(700)}}
    follower = grammars().json_schema(many).begin()
    with pytest.raises(UsageError, match="cannot be followed"):
        follower.keep(ids('{"p'))


def test_special_tokens_are_not_text() -> None:
    follower = grammars().json_schema({"type": "string"}).begin()
    allowed = follower.allowed(ids('"'))
    assert allowed is not None
    assert not allowed[:3].any()
    assert not allowed[TOKENIZER_VOCAB:].any(), "nor what the tokenizer has no token for"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "strin"}, "strin"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, "oneOf"),
        ({"$ref": "http://example.com/schema"}, "http://example.com/schema"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "multipleOf": 999983}, "multipleOf"),
        ({"allOf": [{"type": "integer", "multipleOf": 997}, {"items": [{"multipleOf": 99.1}]}]}, "multipleOf"),
        ({"type": "integer", "multipleOf": True}, ""),
        ({"maximum": 1000000000, "multipleOf": 1000000000}, "multipleOf"),
        ({"$id": "https://json-schema.org/draft/2020-12/schema", "multipleOf": 5}, "$id"),
        ({"enum": [1, 10**25]}, "64 bits"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.25}, "exclusiveMinimum"),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "exclusiveMaximum"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 1}, "$schema"),
        ({"const": float("nan")}, ""),
        ({"const": "\ud800"}, ""),
        ({"type": "integer", "multipleOf": float("inf")}, ""),
        ({"enum": []}, ""),
        (False, ""),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}, ""),
    ],
)
def test_a_schema_that_is_not_understood_or_allows_nothing_is_refused(schema: Any, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        grammars().json_schema(schema)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "%json" not in str(refused.value), "what we make of it is ours"


def test_multiples_of_round_numbers_cost_nothing() -> None:
    follower = grammars().json_schema({"type": "integer", "multipleOf": 1_000_000, "minimum": 1}).begin()
    follower.keep([*ids("3000000"), END])


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MedusaError, match=r"medusa-decode\[serve\]"):
        Grammars(make_tokenizer(), VOCAB, [END]).json_object()


def test_a_tokenizer_that_the_engine_does_not_know_is_refused() -> None:
    class Slow:
        pass

    with pytest.raises(MedusaError, match="tokenizer"):
        Grammars(Slow(), VOCAB, [END]).json_object()  # type: ignore[arg-type]


def test_grammars_are_compiled_once_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    ours = engine._compile
    monkeypatch.setattr(engine, "_compile", lambda inside, text: compiled.append(text) or ours(inside, text))
    monkeypatch.setattr(engine, "KEPT", 2)
    some = Grammars(make_tokenizer(), VOCAB, [END])
    one = some.json_schema({"const": 1})
    some.json_schema({"const": 2})
    assert some.json_schema({"const": 1}) is one
    some.json_schema({"const": 3})
    assert some.json_schema({"const": 1}) is one, "used last"
    assert len(compiled) == 3
    some.json_schema({"const": 2})
    assert len(compiled) == 4


# --- the same text, whatever was drafted ------------------------------------------------------------------------------

leaves: st.SearchStrategy[Any] = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 120},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {"type": "string", "format": "date"},
        {"enum": ["red", "green", "the end", 7, None]},
        {"const": {"é": [1, "and"]}},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    ]
)
names = st.sampled_from(["a", "the", "name", "é", "x y"])


def objects(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(names, inside, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties) or ["a"])).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required & properties.keys()),
                "additionalProperties": False,
            }
        )
    )


schemas = st.recursive(
    leaves,
    lambda inside: st.one_of(
        objects(inside),
        st.fixed_dictionaries({"type": st.just("array"), "items": inside, "maxItems": st.integers(1, 3)}),
        st.fixed_dictionaries({"anyOf": st.lists(inside, min_size=1, max_size=3)}),
    ),
    max_leaves=4,
)
samplings = st.one_of(
    st.just(Sampling()),
    st.builds(
        Sampling,
        temperature=st.just(1.0),
        top_p=st.sampled_from([0.9, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        seed=st.integers(0, 99),
    ),
)
PROMPT = [7, 8, 9]


class Masked(ToyModel):
    """A toy model with the grammar built in: for every token its whole text is read anew."""

    grammar: Grammar

    def __call__(self, tokens: Sequence[int]) -> list[float]:
        scores = super().__call__(tokens)
        try:
            allowed = self.grammar.begin().allowed(tokens[len(PROMPT) :])
        except MedusaError:  # a drafter asks about what must not come
            return scores
        if allowed is None:
            return scores
        return [score if may else float("-inf") for score, may in zip(scores, allowed, strict=True)]


def masked(grammar: Grammar) -> Masked:
    model = Masked(VOCAB, seed=1)
    model.grammar = grammar
    return model


@settings(max_examples=60)
@given(schemas, samplings, st.sampled_from(["none", "ngram", "random"]), st.integers(1, 14), st.integers(0, 2**32))
def test_a_text_is_that_of_plain_constrained_decoding_and_validates_where_it_stops(
    schema: Any, sampling: Sampling, name: str, nodes: int, seed: int
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    grammar = grammars().json_schema(schema)
    model = masked(grammar)
    expected, reason = plain_decode(model, PROMPT, sampling, max_new_tokens=40, eos=[END])
    drafters: dict[str, Drafter] = {
        "none": NoDrafter(),
        "ngram": NgramDrafter(),
        "random": RandomTreeDrafter(model, seed, right=0.6),
    }
    scheduler = Scheduler(ReferenceStepper(ToyBackend(ToyModel(VOCAB, seed=1)), drafters[name], nodes))
    task = scheduler.submit(Request(PROMPT, sampling, 40, frozenset([END]), constraint=grammar))
    while not scheduler.idle:
        scheduler.step()
    assert task.new_tokens == expected
    assert task.finish_reason == reason
    if reason == "stop":
        text = make_tokenizer().decode(task.new_tokens, skip_special_tokens=True)
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("heads", [False, True])
def test_a_whole_model_says_the_same_in_fewer_steps(heads: bool, options: dict[str, Any]) -> None:
    lm = make(heads=heads, nodes=12)
    grammar = lm.grammars.json_schema(PERSON)
    plain = lm.generate("Hi", constraint=grammar, max_new_tokens=60, stepper=lm.make_stepper("none"), **options)
    chunks = list(lm.stream("Hi", constraint=grammar, max_new_tokens=60, **options))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == plain.token_ids
    assert chunks[-1].finish_reason == plain.finish_reason == "stop"
    assert json.loads(plain.text).keys() == {"name", "age"}
    assert chunks[-1].stats.steps < plain.stats.steps / 2
    assert "grammar" in {source for chunk in chunks for _, source in chunk.spans}


def test_a_model_keeps_its_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    lm: LanguageModel = make()
    assert lm.grammars is lm.grammars
    assert lm.grammars.json_object() is lm.grammars.json_object()
