"""Fifty schemas of many kinds on SmolLM2-135M: what stops is what the schema allows."""

from __future__ import annotations

import json
from typing import Any

import pytest

import medusa
from medusa.errors import UsageError

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]

TEXT: dict[str, Any] = {"type": "string", "maxLength": 24}


def record(optional: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def array(items: Any, least: int = 0, most: int = 4) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": record(value={"type": "integer"}, children=array({"$ref": "#/$defs/node"}, most=2))},
}
CHAIN = {
    **record(("next",), value=TEXT, next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "text": {"type": "string", "maxLength": 40},
    "text of some length": {"type": "string", "minLength": 5, "maxLength": 9},
    "integer": {"type": "integer"},
    "integer from to": {"type": "integer", "minimum": -20, "maximum": 1234},
    "integer strictly between": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "number strictly": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.5},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "types": {"type": ["integer", "null", "boolean"]},
    "enum": {"enum": ["red", "green", "blue"]},
    "enum of kinds": {"enum": [1, "one", None, [1], {"one": 1}, 2.5, True]},
    "const text": {"const": "it must be so"},
    "const object": {"const": {"a": [1, 2, {"b": None}], "ü": "é"}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "pattern with choice": {"type": "string", "pattern": "^(cat|dog|bird)s?( and (cat|dog)s)?$"},
    "pattern not anchored": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date and time": {"type": "string", "format": "date-time"},
    "mail": {"type": "string", "format": "email"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "hostname": {"type": "string", "format": "hostname"},
    "duration": {"type": "string", "format": "duration"},
    "record": record(name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "optional": record(("middle", "title"), first=TEXT, middle=TEXT, title={"enum": ["Dr", "Mr", "Ms"]}),
    "all optional": record(("a", "b", "c"), a={"type": "integer"}, b={"type": "boolean"}, c={"type": "null"}),
    "nested": record(user=record(name=TEXT, address=record(city=TEXT, code={"type": "string", "pattern": "^\\d{5}$"}))),
    "deeply nested": record(a=record(b=record(c=record(d=record(e={"type": "boolean"}))))),
    "unicode keys": record(**{"größe": {"type": "integer"}, "名前": TEXT, "ключ": {"const": 2}, "😀": {"const": 1}}),
    "odd keys": record(**{'a "quoted" key': {"const": 1}, "back\\slash": {"const": 2}, "new\nline": TEXT, "": TEXT}),
    "any object": {"type": "object"},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "keys by pattern": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,4}$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "array": array(TEXT),
    "array of some length": array({"type": "integer", "minimum": 0, "maximum": 9}, 3, 3),
    "array of arrays": array(array({"type": "boolean"}, 1, 2), 1, 3),
    "tuple": {
        "type": "array",
        "prefixItems": [TEXT, {"type": "integer"}, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "array of records": array(record(id={"type": "integer"}, tags=array({"enum": ["new", "old"]})), 1, 3),
    "any of": {"anyOf": [{"type": "integer"}, TEXT, {"type": "null"}]},
    "any of records": {"anyOf": [record(cat={"const": 1}, lives={"type": "integer"}), record(dog={"type": "boolean"})]},
    "one of": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "boolean"}]},
    "one of records": {"oneOf": [record(circle={"type": "number"}), record(side={"type": "number"})]},
    "all of": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 50}]},
    "all of records": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": TEXT}, "required": ["b"]},
        ],
    },
    "references": {
        **record(home={"$ref": "#/$defs/place"}, work={"$ref": "#/$defs/place"}),
        "$defs": {"place": record(street=TEXT, number={"type": "integer", "minimum": 1, "maximum": 999})},
    },
    "a tree that refers to itself": TREE,
    "a chain that refers to itself": CHAIN,
}  # fmt: skip
NOT_SUPPORTED: dict[str, Any] = {
    "one of that overlap": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "not": {"not": {"type": "string"}},
    "unique items": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "conditions": {"if": {"type": "string"}, "then": {"minLength": 2}},
    "look-around": {"type": "string", "pattern": "^(?!x)y"},
}
PROMPT = "Write JSON that describes a person, a place or a thing. Answer with JSON only."


@pytest.fixture(scope="module")
def lm() -> medusa.LanguageModel:
    return medusa.load(nodes=16, num_slots=4, progress=False)


def test_of_fifty_schemas_no_invalid_document_ends_with_stop(lm: medusa.LanguageModel) -> None:
    assert len(SCHEMAS) == 50
    each = [
        {"constraint": lm.grammars.json_schema(schema), **({"temperature": 0.8, "seed": i} if i % 2 else {})}
        for i, schema in enumerate(SCHEMAS.values())
    ]
    answers = lm.generate_many([PROMPT] * len(each), each=each, max_new_tokens=96)
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    cut: list[str] = []  # ended by length: counted apart
    for (name, schema), answer in zip(SCHEMAS.items(), answers, strict=True):
        if answer.finish_reason != "stop":
            cut.append(name)
            continue
        validator = jsonschema.Draft202012Validator(schema, format_checker=formats)
        problems = [error.message for error in validator.iter_errors(json.loads(answer.text))]
        assert not problems, (name, answer.text, problems)
    assert len(cut) <= 10, cut


def test_what_is_not_supported_is_refused(lm: medusa.LanguageModel) -> None:
    for schema in NOT_SUPPORTED.values():
        with pytest.raises(UsageError):
            lm.grammars.json_schema(schema)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}])
@pytest.mark.parametrize("name", ["record", "array of records", "references"])
def test_a_grammar_gives_the_text_of_plain_decoding_in_fewer_steps(
    lm: medusa.LanguageModel, name: str, options: dict[str, Any]
) -> None:
    grammar = lm.grammars.json_schema(SCHEMAS[name])
    drafted = lm.generate(PROMPT, constraint=grammar, max_new_tokens=96, **options)
    plain = lm.generate(PROMPT, constraint=grammar, max_new_tokens=96, stepper=lm.make_stepper("none"), **options)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.steps < 0.7 * plain.stats.steps
