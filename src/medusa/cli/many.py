"""Many prompts in one call: lines of JSON in, lines of JSON out (`medusa generate --jsonl`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from medusa.errors import UsageError
from medusa.settings import AnswerSettings, choices, typed_fields, values
from medusa.text.stream import check_whole

if TYPE_CHECKING:
    from medusa.api import Message

AT_ONCE = 8  # texts, where --slots does not say

Wanted = tuple["str | list[Message]", dict[str, Any]]  # a prompt and the arguments of `LanguageModel.stream` for it


def read_lines(text: str, source: str, defaults: AnswerSettings, stop: Sequence[str], raw: bool) -> list[Wanted]:
    """What each line asks for: {"prompt": text} or {"messages": [{"role", "content"}, ...]}, and beside it any setting
    of an answer, "stop" (a text or a list) and "raw", which go before those of the command line.

    Raises:
        UsageError: a line that is no such object, a name that is not known, a bad value.
    """
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_wanted(json.loads(line), defaults, stop, raw))
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, UsageError) else "not a JSON object"
            raise UsageError(f"{source}, line {number}: {reason}") from None
    if not found:
        raise UsageError(f"{source} holds no line with a prompt")
    return found


def _wanted(line: object, defaults: AnswerSettings, stop: Sequence[str], raw: bool) -> Wanted:
    if not isinstance(line, dict):
        raise UsageError("not a JSON object")
    settings = typed_fields(AnswerSettings)
    if unknown := next((name for name in line if name not in {*settings, "prompt", "messages", "stop", "raw"}), None):
        raise UsageError(f'unknown name "{unknown}": known are prompt, messages, stop, raw, {", ".join(settings)}')
    if ("prompt" in line) == ("messages" in line):
        raise UsageError('give either "prompt" or "messages"')
    for name, value in line.items():
        if name in settings and not _is_of(value, settings[name][1]):
            raise UsageError(f"{name} must not be {json.dumps(value)}")
    options = values(AnswerSettings(**values(defaults) | {name: line[name] for name in line if name in settings}))
    options |= {"stop": line.get("stop", [*stop]), "raw": line.get("raw", raw)}
    stops = options["stop"] if isinstance(options["stop"], list) else [options["stop"]]
    if not all(isinstance(one, str) for one in stops) or not isinstance(options["raw"], bool):
        raise UsageError('"stop" must be a text or a list of texts, and "raw" true or false')
    prompt: Any = line.get("prompt", line.get("messages"))
    if "prompt" in line and not isinstance(prompt, str):
        raise UsageError('"prompt" must be a text')
    if "messages" in line and not (isinstance(prompt, list) and all(map(_is_message, prompt))):
        raise UsageError('"messages" must be a list of objects with the texts "role" and "content"')
    texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]
    check_whole((*texts, *stops), "it")
    return prompt, options


def _is_message(item: object) -> bool:
    if not isinstance(item, dict) or item.keys() != {"role", "content"}:
        return False
    return all(isinstance(value, str) for value in item.values())


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value of JSON is of a setting's type."""
    if known := choices(hint):
        return value in known
    kinds = get_args(hint) or (hint,)
    return type(value) in kinds or (float in kinds and type(value) is int)
