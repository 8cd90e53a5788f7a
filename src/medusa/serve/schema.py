"""What requests may say, field by field. A field that is not here is refused by its name; null is as if it were not
there. Bounds of sampling are those of `medusa.settings.Sampling`, which checks them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from medusa.settings import AcceptanceRule, DrafterName
from medusa.text.stream import is_text

Detail = Literal["counts", "spans", "tree"]
MOST_STOPS = 16
LONGEST_STOP = 500


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _whole_characters(text: str) -> str:
    """JSON can hold half characters (lone surrogates), which no tokenizer takes."""
    if not is_text(text):
        raise ValueError("text must be made of whole characters")
    return text


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
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Labels(Body):
    """What clients send for their own books; no answer depends on it."""

    user: str | None = None
    metadata: dict[str, str] | None = None
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
    logit_bias: dict[str, Number] | None = None
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


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        return {"role": role, "content": content if isinstance(content, str) else "".join(p.text for p in content)}


class PlainFormat(Body):
    type: Literal["text"]


class ChatRequest(SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: PlainFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None


class CompletionRequest(SamplingFields):
    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    n: int = Field(1, ge=1)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    response_format: PlainFormat | None = None


class InputMessage(ChatMessage):
    """What `/v1/responses` reads, an answer of its own too."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None


class TextSettings(Body):
    format: PlainFormat | None = None


class ResponsesRequest(SamplingFields):
    input: Text | list[InputMessage]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    store: Literal[False] | None = None
    text: TextSettings | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None


class TokenizeRequest(Body):
    """One of `prompt` (text as it is) and `messages` (by the chat template)."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]
