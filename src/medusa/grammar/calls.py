"""Calls of tools in a text: the forms that models write them in, the grammar of each form, and how it is read back.

    Hermes (Qwen and many others)                                       Llama 3
    text <tool_call>                                                    {"name": "f", "parameters": {...}}
    {"name": "f", "arguments": {...}}
    </tool_call>

A grammar leaves names and arguments no way to be wrong, so the reader need not guess: what begins as a call is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medusa.grammar.schema import json_rule

NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of an object."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_ARGUMENTS)

    def told(self) -> dict[str, Any]:
        """As chat templates take it."""
        about = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a call is written. What has no `opening` is a call where the text begins as one, and then is that alone."""

    opening: str
    before: str  # between the opening and the object
    key: str  # of the arguments
    after: str

    @property
    def many(self) -> bool:
        """Whether there may be several in one answer."""
        return bool(self.opening)

    def written(self, name: str, arguments: object) -> str:
        called = json.dumps({"name": name, self.key: arguments}, ensure_ascii=False)
        return f"{self.opening}{self.before}{called}{self.after}"

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, many: bool, tokens: Mapping[str, int] | None = None
    ) -> str:
        """Of an answer that calls tools, in Lark: `required`, or else any text, which may end in calls; `many`: several
        of them, where the form knows that. `tokens`: see `Grammars.shown_tokens`."""
        tokens = tokens or {}
        opening, after = _spelled(self.opening, tokens), _spelled(self.after, tokens)
        rules = [f"body: {_spelled(self.before, tokens)} ({' | '.join(f'tool_{i}' for i in range(len(tools)))})"]
        for i, tool in enumerate(tools):
            head = f'{{"name": {json.dumps(tool.name)}, "{self.key}": '
            rules.append(f'tool_{i}: {json.dumps(head)} {json_rule(tool.parameters)} "}}"')
        rules.append(f"call: {opening} body {after}")
        rules.append(f"more: {json.dumps(SEPARATOR)} call")
        several = " more*" if many and self.many else ""
        if required:
            return "\n".join([f"start: call{several}", *rules])
        shown = ",".join(str(token) for text, token in tokens.items() if text != self.opening)
        rules.append(f"text: TEXT? (<[{shown}]> TEXT?)*" if shown else "text: TEXT?")
        if not self.opening:
            rules += ["TEXT: /[^{](.|\\n)*/"]
            return "\n".join(["start: text | call", *rules])
        rules += ["TEXT: /(.|\\n)+/", f"spelled[lazy]: /(.|\\n)*/ {json.dumps(self.opening)}"]
        rules.append(f"opened: {f'(TEXT? <[{shown}]>)* ' if shown else ''}spelled")
        if self.opening in tokens:
            rules.append(f"opened_at_once: text {opening}")
        opened = "(opened | opened_at_once)" if self.opening in tokens else "opened"
        return "\n".join([f"start: text | {opened} body {after}{several}", *rules])

    def reader(self) -> CallReader:
        return CallReader(self)


def _spelled(text: str, tokens: Mapping[str, int]) -> str:
    """A text in Lark, whose tokens are tokens where they have one of their own."""
    pieces = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
    return " ".join(f"<[{tokens[piece]}]>" if piece in tokens else json.dumps(piece) for piece in pieces if piece)


SEPARATOR = "\n"
HERMES = CallForm("<tool_call>", "\n", "arguments", "\n</tool_call>")
LLAMA3 = CallForm("", "", "parameters", "")

# What a reader finds: text, the name of a call that begins, a piece of its arguments.
Found = tuple[Literal["text", "call", "arguments"], str]


class CallReader:
    """Finds calls in a text that comes in pieces."""

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._held = ""
        self._state: Literal["start", "text", "name", "arguments", "between"] = "start"
        self._depth = 0  # of the arguments
        self._quoted = False
        self._escaped = False
        self.calls = 0  # that have begun

    @property
    def complete(self) -> bool:
        """There are calls, and the last has ended."""
        return self._state == "between"

    def push(self, text: str) -> Iterator[Found]:
        self._held += text
        while self._held:
            state, held = self._state, len(self._held)
            yield from self._look()
            if state == self._state and len(self._held) == held:  # more must come
                return

    def end(self) -> Iterator[Found]:
        """What was held back when the text ended."""
        if self._state in ("start", "text") and self._held:
            yield "text", self._held
        self._held = ""

    def _look(self) -> Iterator[Found]:
        if self._state == "start":
            called = not self._form.opening and self._held.startswith("{")
            self._state = "name" if called else "text"
        elif self._state == "text":
            yield from self._text()
        elif self._state == "name":
            yield from self._name()
        elif self._state == "arguments":
            yield from self._arguments()
        else:
            self._between()

    def _text(self) -> Iterator[Found]:
        opening = self._form.opening
        at = self._held.find(opening) if opening else -1
        if at >= 0:
            text, self._held, self._state = self._held[:at].rstrip(), self._held[at + len(opening) :], "name"
        else:
            start = next(
                (size for size in range(len(opening) - 1, 0, -1) if self._held.endswith(opening[:size])), 0
            )  # of an opening, maybe
            sure = self._held[: len(self._held) - start]
            sure = sure.rstrip() if opening else sure  # what stands before a call is nobody's
            text, self._held = sure, self._held[len(sure) :]
        if text:
            yield "text", text

    def _name(self) -> Iterator[Found]:
        before, marker = f'{self._form.before}{{"name": "', f'", "{self._form.key}": '
        at = self._held.find(marker)
        if at >= 0:
            name = self._held[len(before) : at]
            self._held, self._state = self._held[at + len(marker) :], "arguments"
            self.calls += 1
            yield "call", name

    def _arguments(self) -> Iterator[Found]:
        """Up to the brace that closes the first."""
        for place, letter in enumerate(self._held):
            if self._quoted:
                self._quoted = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._quoted = True
            else:
                self._depth += (letter in "{[") - (letter in "}]")
            if not self._depth:
                piece, self._held, self._state = self._held[: place + 1], self._held[place + 1 :], "between"
                break
        else:
            piece, self._held = self._held, ""
        yield "arguments", piece

    def _between(self) -> None:
        opening = self._form.opening
        at = self._held.find(opening) if opening else -1
        if at >= 0:
            self._held, self._state = self._held[at + len(opening) :], "name"


def read(reader: CallReader, text: str) -> tuple[str, list[tuple[str, str]]]:
    """What a whole text says, and the calls in it: name and arguments of each, cut short where the text is."""
    said = ""
    calls: list[tuple[str, str]] = []
    for kind, piece in [*reader.push(text), *reader.end()]:
        if kind == "text":
            said += piece
        elif kind == "call":
            calls.append((piece, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + piece)
    return said, calls
