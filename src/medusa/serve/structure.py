"""What a request says of its answers' form, JSON or calls of tools -> a grammar, and the prompt that tells of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medusa.errors import MedusaError
from medusa.grammar.calls import HERMES, NO_ARGUMENTS, CallForm, Tool
from medusa.grammar.templates import explained, form_of, knows_tools
from medusa.serve.errors import bad
from medusa.text.chat_template import REFUSALS

if TYPE_CHECKING:
    from medusa.api import LanguageModel
    from medusa.grammar.engine import Grammar
    from medusa.serve.schema import ChatRequest, Function, ResponsesRequest
    from medusa.serve.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Schema:
    """A JSON schema, and the field of the request that it came from."""

    schema: Mapping[str, Any]
    param: str


@dataclass(frozen=True, slots=True)
class Asked:
    """The same for every interface. `tools` are those that the model is told of; `named`: the one that it must call."""

    schema: Schema | None = None
    tools: Sequence[Tool] = ()
    params: Sequence[str] = ()  # where the parameters of each tool came from
    required: bool = False
    named: str | None = None
    many: bool = True


@dataclass(frozen=True, slots=True)
class Answering:
    """How answers are decoded and read."""

    grammar: Grammar | None = None
    form: CallForm | None = None  # of the calls that may be in them


ANY = Answering()
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def asked_in_chat(asked: ChatRequest) -> Asked:
    """Raises ApiError."""
    given = asked.response_format
    schema: Schema | None = None
    if given is not None and given.json_schema is not None:
        schema = Schema(given.json_schema.schema_, "response_format.json_schema.schema")
    elif given is not None and given.type == "json_object":
        schema = Schema(ANY_OBJECT, "response_format")
    functions = [tool.function for tool in asked.tools or ()]
    choice = asked.tool_choice
    named = None if choice is None or isinstance(choice, str) else choice.function.name
    return _asked(asked, schema, functions, "tools.{}.function", named)


def asked_of_response(asked: ResponsesRequest) -> Asked:
    """Raises ApiError."""
    given = asked.text.format if asked.text is not None else None
    schema: Schema | None = None
    if given is not None and given.schema_ is not None:
        schema = Schema(given.schema_, "text.format.schema")
    elif given is not None and given.type == "json_object":
        schema = Schema(ANY_OBJECT, "text.format")
    choice = asked.tool_choice
    named = None if choice is None or isinstance(choice, str) else choice.name
    return _asked(asked, schema, asked.tools or (), "tools.{}", named)


def _asked(
    asked: ChatRequest | ResponsesRequest,
    schema: Schema | None,
    functions: Sequence[Function],
    place: str,
    named: str | None,
) -> Asked:
    """`place`: of a function in the request, by its number; `named`: the one that `tool_choice` names."""
    if not functions:
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(asked, name) is not None:
                raise bad(f"{name} needs tools", name)
        return Asked(schema)
    tools: list[Tool] = []
    for i, given in enumerate(functions):
        field = place.format(i)
        if any(tool.name == given.name for tool in tools):
            raise bad(f"{field}.name: there are two tools called {given.name}", f"{field}.name")
        if given.parameters is not None and given.parameters.get("type") != "object":
            raise bad(f"{field}.parameters: the type must be object", f"{field}.parameters")
        parameters = NO_ARGUMENTS if given.parameters is None else given.parameters
        tools.append(Tool(given.name, given.description, parameters))
    if named is not None and all(tool.name != named for tool in tools):
        raise bad(f"tool_choice: there is no tool called {named}", "tool_choice")
    if asked.tool_choice == "none":  # the model is not told of them
        return Asked(schema)
    if schema is not None:
        param = schema.param.partition(".")[0]
        raise bad(f"{param}: JSON and tools do not go together, but with the tool_choice none", param)
    params = [f"{place.format(i)}.parameters" for i in range(len(tools))]
    required = named is not None or asked.tool_choice == "required"
    return Asked(None, tools, params, required, named, asked.parallel_tool_calls is not False)


class Structure:
    """What this server's model makes of it. Its methods take time, compiling and rendering: not for an event loop."""

    def __init__(self, lm: LanguageModel, settings: ServerSettings) -> None:
        self._lm = lm
        self._settings = settings

    @functools.cached_property
    def _knows_tools(self) -> bool:
        return knows_tools(self._lm.tokenizer)

    @functools.cached_property
    def form(self) -> CallForm | None:
        """What the template has the model write; where it knows nothing of tools, what we tell the model to."""
        return form_of(self._lm.tokenizer) if self._knows_tools else HERMES

    def answering(self, asked: Asked, form: CallForm | None) -> Answering:
        """`form`: of this model, where there are tools. Raises ApiError, which names the field of a schema that is too
        large or is not understood."""
        schemas = [Schema(tool.parameters, param) for tool, param in zip(asked.tools, asked.params, strict=True)]
        if asked.schema is not None:
            schemas.append(asked.schema)
        self._check_sizes(schemas)
        if asked.tools and form is None:
            name = self._lm.name
            raise bad(f"tools: the chat template of {name} has calls in a form that is not known here", "tools")
        grammars = [self._compiled(schema) for schema in schemas]  # each by itself, so that its field can be named
        if form is None:
            return Answering(grammars[0] if grammars else None)
        tools = [tool for tool in asked.tools if asked.named in (None, tool.name)]
        many = asked.many and asked.named is None
        try:
            tokens = self._lm.grammars.shown_tokens
            text = form.grammar(tools, required=asked.required, many=many, tokens=tokens)
            return Answering(self._lm.grammars.lark(text), form)
        except MedusaError as error:
            raise bad(f"tools: {error}", "tools") from None

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
    ) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]]]:
        """Messages, and tools, as the chat template takes them."""
        calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if (not tools and not calls) or self._knows_tools:
            return messages, [tool.told() for tool in tools]
        try:
            return explained(self._lm.tokenizer, messages, tools), []
        except REFUSALS:
            return messages, []  # and what it refuses is told where it is rendered

    def _check_sizes(self, schemas: Sequence[Schema]) -> None:
        left = self._settings.max_schema
        for schema in schemas:
            if _deeper(schema.schema, self._settings.max_schema_depth):
                most = self._settings.max_schema_depth
                raise bad(f"{schema.param}: a schema may have at most {most} levels here", schema.param)
            left -= len(json.dumps(schema.schema, ensure_ascii=False).encode(errors="surrogatepass"))
            if left < 0:
                most = self._settings.max_schema
                raise bad(f"{schema.param}: schemas may have at most {most} bytes here", schema.param)

    def _compiled(self, schema: Schema) -> Grammar:
        try:
            return self._lm.grammars.json_schema(schema.schema)
        except MedusaError as error:
            raise bad(f"{schema.param}: {error}", schema.param) from None


def _deeper(value: object, most: int) -> bool:
    """Whether objects and lists are within each other on more levels than that."""
    level = [value]
    for _ in range(most):
        inside = [(v.values() if isinstance(v, Mapping) else v) for v in level if isinstance(v, (Mapping, list))]
        level = [item for items in inside for item in items]
        if not level:
            return False
    return any(isinstance(v, (Mapping, list)) for v in level)
