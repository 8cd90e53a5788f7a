"""What pydantic says of a body's fields -> one error in OpenAI's shape, which names the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from medusa.serve.errors import ApiError, bad

# Of what stands in lists.
_KINDS = ("system", "developer", "user", "assistant", "tool", "message", "function_call", "function_call_output")


def error_of_fields(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of the first field that is wrong. What stands in the body is not repeated."""
    # A field that may be of several kinds gives an error for each: the one that came furthest says most.
    errors = errors[:100]
    first = errors[0]
    alike = [error for error in errors if error["loc"][:2] == first["loc"][:2]]
    error = max(
        alike, key=lambda e: (len(_path(e["loc"])), e["type"] == "extra_forbidden", e["type"] == "literal_error")
    )
    kind, path = error["type"], _path(error["loc"])
    param = ".".join(path) or None
    if kind == "json_invalid":
        return bad("the body is not JSON in UTF-8", code="invalid_json")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        named = str(error["ctx"]["discriminator"])
        param = ".".join((*path, named.strip("'") if named.startswith("'") else "type"))
        expected = error["ctx"].get("expected_tags")
        return bad(f"{param} is missing" if expected is None else f"{param} must be one of {expected}", param)
    if kind == "extra_forbidden":
        return bad(f"{param} is not supported here", param, "unsupported_parameter")
    if param is None and kind in ("missing", "model_attributes_type", "model_type"):
        return bad("the body must be a JSON object, sent as application/json")
    if kind == "missing":
        return bad(f"{param} is missing", param, "missing_required_parameter")
    if len({_path(e["loc"]) for e in alike}) == 1 and len(alike) > 1:
        wanted = " or ".join(dict.fromkeys(_said(e) for e in alike))
        return bad(f"{param or 'the body'}: {wanted}", param)
    return bad(f"{param or 'the body'}: {_said(error)}", param)


def _said(error: Mapping[str, Any]) -> str:
    text = str(error["msg"])
    return text[:1].lower() + text[1:200]


def _path(loc: Sequence[object]) -> tuple[str, ...]:
    """The names and numbers that lead to a field, without those of the kinds that it may be of."""
    path: list[str] = []
    for before, part in pairwise(loc):
        text = str(part)[:60]
        if isinstance(before, int) and text in _KINDS:
            continue
        if isinstance(part, str) and ("[" in text or text in ("str", "int", "bool", "float") or text[:1].isupper()):
            continue
        if isinstance(part, str) and text.startswith("literal"):
            continue
        path.append(text.encode("ascii", "backslashreplace").decode())
    return tuple(path)
