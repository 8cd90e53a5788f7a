"""A JSON schema -> a rule of a grammar; refused where the compiler of grammars would not do what the schema says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeGuard

from medusa.errors import UsageError
from medusa.text.stream import is_text

ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What a schema itself must not say to the compiler: to leave out what it does not know.
STRICT = {**ONE_LINE, "lenient": False, "coerce_one_of": False}
OLD_DRAFTS = ("draft-03", "draft-04")  # they have no const
MOST_MULTIPLE, MOST_ROUND_MULTIPLE = 20_000, 1_000_000  # take up to a second


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """A JSON schema as a piece of a grammar in Lark. Raises UsageError for what is no JSON, or has no bound."""
    _check_inside(schema)
    if isinstance(schema, Mapping) and any(old in str(schema.get("$schema")) for old in OLD_DRAFTS):
        raise UsageError("$schema: drafts before 6 are not supported")
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    try:
        written = json.dumps({**schema, "x-guidance": STRICT}, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"it is no JSON: {error}") from None
    if not is_text(written):
        raise UsageError("it holds half a character (a lone surrogate)")
    return f"%json {written}"


def _check_inside(schema: object) -> None:
    """What the compiler has no bound for, or would take for another number. A rule for multiples has as many states as
    the number has units, whatever limits it is given; where several rules meet, as many as their least common multiple.
    Powers of ten are nearly free."""
    together, whole, left = 1, 1, [schema]
    while left:
        value = left.pop()
        if isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, Mapping):
            left.extend(value.values())
            multiple = value.get("multipleOf")
            if _is_number(multiple) and math.isfinite(multiple) and multiple > 0:
                _, digits, zeros = Decimal(str(multiple)).normalize().as_tuple()
                units = int("".join(map(str, digits)))
                together = math.lcm(together, units)
                whole = math.lcm(whole, units * 10 ** max(0, int(zeros)))
                if together > MOST_MULTIPLE or whole > MOST_ROUND_MULTIPLE:
                    raise UsageError(
                        f"multipleOf: the common multiple of a schema may be at most {MOST_MULTIPLE}, or"
                        f" {MOST_ROUND_MULTIPLE} where it ends in zeros"
                    )
            if _loses_its_bound(value):
                raise UsageError(
                    "exclusiveMinimum or exclusiveMaximum: 0 is supported only where the other bound is 1 or more away"
                )
            if "json-schema.org" in str(value.get("$id")):
                raise UsageError("$id: a schema cannot stand for the one of schemas")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UsageError("a whole number must fit into 64 bits")


def _loses_its_bound(schema: Mapping[str, Any]) -> bool:
    """llguidance 1.9 takes 0 into a range of fractions from 0 on that leaves it out."""

    def bounds(*names: str) -> list[float]:
        return [bound for name in names if _is_number(bound := schema.get(name))]

    above, below = bounds("exclusiveMinimum"), bounds("exclusiveMaximum")
    return (0 in above and any(0 < bound < 1 for bound in bounds("maximum", "exclusiveMaximum"))) or (
        0 in below and any(-1 < bound < 0 for bound in bounds("minimum", "exclusiveMinimum"))
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
