"""What requests may say, field by field. A field that is not here is refused by its name; null is as if it were not
there. Bounds of sampling are those of `medusa.settings.Sampling`, which checks them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    model_validator,
)

from medusa.settings import AcceptanceRule, DrafterName
from medusa.text.stream import is_text

Detail = Literal["counts", "spans", "tree"]
MOST_STOPS = 16
LONGEST_STOP = 500
MOST_TOOLS = 128
MOST_FIELDS = 100  # of an object: each that is wrong is told, and takes its time
MOST_LABELS = 64
MOST_BIASES = 1024


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _whole_characters(text: str) -> str:
    """JSON can hold half characters (lone surrogates), which no tokenizer takes."""
    if not is_text(text):
        raise ValueError("text must be made of whole characters")
    return text


def _limited(value: Any, most: int) -> Any:
    if isinstance(value, dict) and len(value) > most:
        raise ValueError(f"an object here may have at most {most} fields")
    return value


class FirstFault(FailFast):
    """A list is read no further than to its first fault: a body may hold a million. (The members of a union must be
    hashable, which FailFast is not.)"""

    __hash__ = object.__hash__


Text = Annotated[str, AfterValidator(_whole_characters)]
Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=LONGEST_STOP)]],
    BeforeValidator(_one_or_many, json_schema_input_type=(str | list[str])),
    Field(max_length=MOST_STOPS),
]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """Strict: "1" is no number, and what is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_there(cls, data: Any) -> Any:
        data = _limited(data, MOST_FIELDS)
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Labels(Body):
    """What clients send for their own books; no answer depends on it."""

    user: str | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(lambda value: _limited(value, MOST_LABELS))] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None


class SamplingFields(Labels):
    """How tokens are chosen; the names of `Sampling`, and Medusa's own beside them."""

    model: str | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], BeforeValidator(lambda value: _limited(value, MOST_BIASES))] | None = None
    seed: int | None = None
    acceptance: AcceptanceRule | None = None
    epsilon: Number | None = None
    delta: Number | None = None
    drafter: DrafterName | None = None
    medusa: bool | Detail | None = Field(
        None,
        description="Tell how it was decoded: counts (or true) with the usage; spans also who proposed each piece of "
        "text, and tree the draft of each step, where the answer is streamed.",
    )

    @property
    def detail(self) -> Detail | None:
        return "counts" if self.medusa is True else self.medusa or None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = Field(None, max_length=0)


Parts = Annotated[list[TextPart], FirstFault()]


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _an_object(text: str) -> str:
    try:
        value = json.loads(text)
        if isinstance(value, dict) and is_text(json.dumps(value, ensure_ascii=False)):  # an escape may be half of one
            return text
    except (ValueError, RecursionError):
        pass
    raise ValueError("arguments must be the text of a JSON object, of whole characters")


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Arguments = Annotated[Text, AfterValidator(_an_object)]


class Called(Body):
    name: FunctionName
    arguments: Arguments


class ToolCall(Body):
    """What the model called in an earlier turn."""

    id: Text
    type: Literal["function"]
    function: Called

    def plain(self) -> dict[str, Any]:
        return _call(self.id, self.function.name, self.function.arguments)


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """As chat templates take it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.loads(arguments)}}


class SaidMessage(Body):
    role: Literal["system", "developer", "user"]
    content: Text | Parts

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": _joined(self.content)}


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Text | Parts | None = None
    tool_calls: Annotated[list[ToolCall], FirstFault()] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and self.tool_calls is None:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": _joined(self.content or ""), **calls}


class ToolMessage(Body):
    role: Literal["tool"]
    content: Text | Parts
    tool_call_id: Text
    name: Text | None = None

    def plain(self) -> dict[str, Any]:
        name = {} if self.name is None else {"name": self.name}
        return {"role": "tool", "content": _joined(self.content), "tool_call_id": self.tool_call_id, **name}


ChatMessage = Annotated[SaidMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class JsonSchema(Body):
    name: FunctionName
    schema_: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None  # it is held to either way


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _of_one_kind(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and the type needs it")
        return self


class PlainFormat(Body):
    type: Literal["text"]


class Function(Body):
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # they are held to either way


class ToolFields(Body):
    type: Literal["function"]
    function: Function


class FunctionChoiceName(Body):
    name: FunctionName


class FunctionChoice(Body):
    type: Literal["function"]
    function: FunctionChoiceName


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], FirstFault()] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolFields], FirstFault()] | None = Field(None, min_length=1, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], FirstFault()] | None = None
    store: Literal[False] | None = None


class CompletionRequest(SamplingFields):
    prompt: (
        Text
        | Annotated[list[Text], FirstFault()]
        | Annotated[list[int], FirstFault()]
        | Annotated[list[Annotated[list[int], FirstFault()]], FirstFault()]
    )
    max_tokens: int = Field(16, ge=1)
    n: int = Field(1, ge=1)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    response_format: PlainFormat | None = None


class InputMessage(Body):
    """What `/v1/responses` reads, an answer of its own too."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None

    def plain(self) -> dict[str, Any]:
        return {"role": "system" if self.role == "developer" else self.role, "content": _joined(self.content)}


class FunctionCallItem(Body):
    """What the model called in an earlier turn."""

    type: Literal["function_call"]
    call_id: Text
    name: FunctionName
    arguments: Arguments
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None

    def plain(self) -> dict[str, Any]:
        return {"role": "assistant", "content": "", "tool_calls": [_call(self.call_id, self.name, self.arguments)]}


class FunctionOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: Text
    output: Text | Parts
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None

    def plain(self) -> dict[str, Any]:
        return {"role": "tool", "content": _joined(self.output), "tool_call_id": self.call_id}


def _kind_of_item(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(_kind_of_item),
]


def turns_of(items: Sequence[InputMessage | FunctionCallItem | FunctionOutputItem]) -> list[dict[str, Any]]:
    """As chat templates take them: what the model called is part of what it said in the same turn."""
    turns: list[dict[str, Any]] = []
    for item in items:
        turn = item.plain()
        if isinstance(item, FunctionCallItem) and turns and turns[-1]["role"] == "assistant":
            turns[-1].setdefault("tool_calls", []).extend(turn["tool_calls"])
        else:
            turns.append(turn)
    return turns


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: Text | None = None
    strict: bool | None = None  # it is held to either way

    @model_validator(mode="after")
    def _of_one_kind(self) -> TextFormat:
        given = [value is not None for value in (self.name, self.schema_)]
        if (not all(given)) if self.type == "json_schema" else any((*given, self.description, self.strict)):
            raise ValueError("name and schema go with the type json_schema, and the type needs them")
        return self


class TextSettings(Body):
    format: TextFormat | None = None


class FunctionTool(Function):
    """As `/v1/responses` has it: flat."""

    type: Literal["function"]


class FunctionToolChoice(FunctionChoiceName):
    type: Literal["function"]


class ResponsesRequest(SamplingFields):
    input: Text | Annotated[list[InputItem], FirstFault()]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: Literal[False] | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], FirstFault()] | None = Field(None, min_length=1, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None


class TokenizeRequest(Body):
    """One of `prompt` (text as it is) and `messages` (by the chat template)."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], FirstFault()] | None = Field(None, min_length=1)


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[int], FirstFault()]
