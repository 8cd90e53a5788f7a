r"""Training text: rows of files and data sets -> conversations -> tokens, with those marked that the model is to write.

    {"messages": [...]}                   a row, in any of the shapes below
    Conversation                          system, user and assistant turns, or a plain document
    Example                               token ids, and the spans of them that heads learn from

    <|im_start|>user\n Hi <|im_end|>\n <|im_start|>assistant\n Hello ! <|im_end|>\n
                                                               ~~~~~~~~~~~~~~~~~~      a span

Shapes of rows, told apart row by row (a field that is null counts as absent):

    {"token_ids", "labels", ...}          what distilling wrote: already tokens
    {"messages": [{"role", "content"}]}   OpenAI; content may be a list of text parts
    {"conversations": [{"from", "value"}]}  ShareGPT; also called "items"
    {"instruction", "input"?, "output"}   Alpaca; any of _QUESTIONS goes with any of _ANSWERS, and "system" with both
    {"text"}                              a plain document, every token of which is learned from

A row that cannot be used is reported with its place and skipped; many of them end the reading.
"""

from __future__ import annotations

import importlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2

from medusa.errors import MedusaError, UsageError
from medusa.training.turns import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (".jsonl", ".json", ".parquet", ".txt")
SHOWN = 10  # malformed rows of a source that are reported one by one
MALFORMED_SHARE = 0.1  # a source with a greater share of malformed rows is not what it was taken for
JUDGED_AFTER = 100  # rows; smaller sources are judged at their end

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
}
_TURNS = ("messages", "conversations", "items")
_QUESTIONS = ("instruction", "prompt", "question")
_ANSWERS = ("output", "response", "completion", "answer")
_ANSWER = "\u241fanswer\u241f"  # stands for an answer where the template's own text is wanted
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REFUSALS = (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError)  # what templates raise

Message = dict[str, str]
T = TypeVar("T")


class MalformedRow(MedusaError):  # noqa: N818 - it is the row that is in error
    """A row that cannot be used; the message says why, the reader adds where."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages {"role": "system", "user" or "assistant", "content": text}, or a plain document without any."""

    messages: tuple[Message, ...]
    where: str  # "file.jsonl, line 12"
    text: str | None = None

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("a conversation holds either messages or a text")


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens to read, and the spans [start, end) of them to learn from: ascending, disjoint, none empty.

    No spans at all is right where nobody answers.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    where: str

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError("there are no tokens")
        if (least := min(self.token_ids)) < 0:
            raise ValueError(f"{least} is not a token")
        before = 0
        for start, end in self.spans:
            if start < before or end <= start:
                raise ValueError(f"the span [{start}, {end}) is empty, or begins before the one before it ends")
            before = end
        if before > len(self.token_ids):
            raise ValueError(f"a span ends at {before}, but there are {len(self.token_ids)} tokens")


# --- reading --------------------------------------------------------------------------------------------------------
# A source is a file or a data set of the Hub, "owner/name" or "owner/name:split". All readers raise
#   UsageError: a source that is not there, or of no known kind.
#   MedusaError: one that cannot be read, is empty, or has too many malformed rows.


@dataclass(slots=True)
class Reader:
    """Examples for one model. `name` is the model's, `report` takes one line for each malformed row."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    vocab_size: int  # of the model; a distilled row with any other token is malformed
    report: Callable[[str], None]

    def examples(self, sources: Sequence[str]) -> Iterator[Example]:
        """All rows as tokens, in order; those in which nobody answers have no spans.

        Raises:
            UsageError: also for a conversation, where the model has no chat template.
        """
        others: set[str] = set()

        def read(row: object, where: str) -> Example:
            found = _conversation(row, where, self.vocab_size)
            if isinstance(found, Conversation):
                return encode(found, self.tokenizer, self.name)
            model = row.get("model") if isinstance(row, dict) else None
            # Only said: one model may have two names.
            if isinstance(model, str) and model not in {self.name, *others}:
                others.add(model)
                self.report(f"{where}: written by {model}, not by {self.name}; are its tokens the same?")
            return found

        return _read(sources, read, self.report)


def read_conversations(
    sources: Sequence[str], report: Callable[[str], None], *, vocab_size: int | None = None
) -> Iterator[Conversation | Example]:
    """What there is to learn from, in order; a .txt file has one document a paragraph. Distilled rows are Examples."""
    return _read(sources, partial(_conversation, vocab_size=vocab_size), report)


def read_prompts(source: str, report: Callable[[str], None]) -> Iterator[Conversation]:
    """What users say: a system message, if there is one, and the user turns; answers are left out, for the model is to
    give its own. A .txt file has one prompt a line; a row may be a question without an answer."""
    return _read([source], _prompt, report, prompts=True)


def _read(
    sources: Sequence[str], read: Callable[[object, str], T], report: Callable[[str], None], *, prompts: bool = False
) -> Iterator[T]:
    """What `read` makes of each row; it raises MalformedRow for those that are skipped."""
    for source, path in [(source, _file(source)) for source in sources]:
        yield from _read_source(source, _rows(source, path, prompts), read, report)


def _read_source(
    source: str,
    rows: Iterator[tuple[str, object]],
    read: Callable[[object, str], T],
    report: Callable[[str], None],
) -> Iterator[T]:
    count = malformed = 0
    first = ""

    def judge() -> None:
        if malformed > MALFORMED_SHARE * count:
            raise MedusaError(f"{malformed} of {count} rows of {source} are malformed; the first is {first}")

    for where, row in rows:
        count += 1
        try:
            if isinstance(row, MalformedRow):
                raise row
            item = read(row, where)
        except MalformedRow as error:
            malformed += 1
            first = first or f"{where}: {error}"
            if malformed <= SHOWN:
                report(f"{where}: {error}; skipped")
        else:
            yield item
        if count >= JUDGED_AFTER:
            judge()
    if not count:
        raise MedusaError(f"{source} is empty")
    judge()
    if malformed > SHOWN:
        report(f"{source}: {malformed - SHOWN} more malformed rows; skipped")


# --- sources -> rows ------------------------------------------------------------------------------------------------


def _file(source: str) -> Path | None:
    """The file that a source is, or None where it is on the Hub."""
    path = Path(source).expanduser()
    kinds = f"a file ({', '.join(FILES)}) or a data set of the Hub (owner/name or owner/name:split)"
    if path.is_dir():
        raise UsageError(f"{source} is a directory: name {kinds}")
    if path.suffix.lower() in FILES:
        if not path.exists():
            raise UsageError(f"there is no file {source}")
        return path
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+)?", source, re.ASCII):
        raise UsageError(f"{source!r} cannot be read: name {kinds}")
    return None


def _rows(source: str, path: Path | None, prompts: bool) -> Iterator[tuple[str, object]]:
    """(where it is, the row) for each row; for one that is no row at all, the error that says so."""
    if path is None:
        yield from _hub_rows(source)
        return
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _parquet_rows(source, path)
        elif kind == ".txt":
            yield from _text_rows(source, path, prompts)
        elif kind == ".json":
            yield from _json_rows(source, path)
        else:
            yield from _json_lines(source, path)
    except OSError as error:
        raise MedusaError(f"cannot read {source}: {error.strerror or error}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json_lines(source: str, path: Path) -> Iterator[tuple[str, object]]:
    for number, line in _lines(path):
        if line.strip():
            yield f"{source}, line {number}", _parsed(line)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError:
        return MalformedRow("not UTF-8 text")
    except json.JSONDecodeError as error:
        return MalformedRow(f"not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return MalformedRow(f"not valid JSON ({error})")


def _json_rows(source: str, path: Path) -> Iterator[tuple[str, object]]:
    """A .json file is an array of rows, one row, or one row a line."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        whole = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if data.lstrip().startswith(b"["):
            raise MedusaError(f"{source} is not valid JSON: {error}") from None
        yield from _json_lines(source, path)
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield f"{source}, row {number}", row


def _text_rows(source: str, path: Path, prompts: bool) -> Iterator[tuple[str, object]]:
    """A prompt a line, or a document a paragraph, which ends at a blank line."""
    paragraph: list[bytes] = []
    begun = 0

    def row(name: str, data: bytes, number: int) -> tuple[str, object]:
        try:
            return f"{source}, line {number}", {name: data.decode("utf-8").replace("\r\n", "\n").strip("\n")}
        except UnicodeDecodeError:
            return f"{source}, line {number}", MalformedRow("not UTF-8 text")

    for number, line in _lines(path):
        if prompts:
            if line.strip():
                yield row("prompt", line.strip(), number)
        elif line.strip():
            begun = begun if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield row("text", b"".join(paragraph), begun)
            paragraph.clear()
    if paragraph:
        yield row("text", b"".join(paragraph), begun)


def _parquet_rows(source: str, path: Path) -> Iterator[tuple[str, object]]:
    # pyarrow is what `datasets` reads parquet with; asked directly, it makes no copy in a cache.
    parquet = _library("pyarrow.parquet", source)
    count = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    count += 1
                    yield f"{source}, row {count}", row
    except Exception as error:
        raise MedusaError(f"{source} is not a valid parquet file: {_first_line(error)}") from error


def _hub_rows(source: str) -> Iterator[tuple[str, object]]:
    datasets = _library("datasets", source)
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise MedusaError(f"cannot load the data set {source}: {_first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _library(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MedusaError(f"reading {source} needs more libraries: pip install 'medusa-decode[train]'") from None


# --- rows -> conversations ------------------------------------------------------------------------------------------


def _conversation(row: object, where: str, vocab_size: int | None = None) -> Conversation | Example:
    """What a row holds to learn from. Raises MalformedRow."""
    fields = _fields(row, "a row")
    if "token_ids" in fields:
        return _distilled(fields, where, vocab_size)
    if name := _present(fields, _TURNS):
        return Conversation(_messages(fields[name]), where)
    question, answer = _present(fields, _QUESTIONS), _present(fields, _ANSWERS)
    if question and answer:
        asked = _question(fields, question)
        return Conversation((*asked, {"role": "assistant", "content": _text(fields, answer)}), where)
    if "text" in fields:
        text = _text(fields, "text")
        if not text.strip():
            raise MalformedRow('"text" is empty')
        return Conversation((), where, text)
    if question:
        raise MalformedRow(f"there is a {question} but no answer ({_listed(_ANSWERS)})")
    raise _unknown(fields)


def _prompt(row: object, where: str) -> Conversation:
    """What a row asks. Raises MalformedRow."""
    fields = _fields(row, "a row")
    if name := _present(fields, _TURNS):
        messages = tuple(message for message in _messages(fields[name]) if message["role"] != "assistant")
    elif question := _present(fields, _QUESTIONS):
        messages = _question(fields, question)
    elif "text" in fields:
        raise MalformedRow('"text" is a document, not a question; call it "prompt"')
    else:
        raise _unknown(fields)
    users = [message["content"] for message in messages if message["role"] == "user"]
    if not users:
        raise MalformedRow("no user says anything")
    if not all(user.strip() for user in users):
        raise MalformedRow("a user turn is empty")
    if any(message["role"] == "system" for message in messages[1:]):
        raise MalformedRow("a system message must be the first")
    return Conversation(messages, where)


def _fields(item: object, what: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise MalformedRow(f"{what} must be an object with named fields, not {_kind(item)}")
    return {name: value for name, value in item.items() if value is not None}


def _kind(value: object) -> str:
    """What JSON calls it."""
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _present(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in fields), None)


def _unknown(fields: Mapping[str, Any]) -> MalformedRow:
    found = f"only {_listed(sorted(fields)[:6])}" if fields else "nothing"
    return MalformedRow(f'no "messages", "conversations", "prompt" with "response", or "text", but {found}')


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise MalformedRow(f'"{name}" must be text, not {_kind(value)}')
    if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
        raise MalformedRow(f'"{name}" holds half a character (a lone surrogate)')
    return value


def _question(fields: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """The system message, if there is one, and the question with what it is about."""
    parts = [_text(fields, name), *(_text(fields, more) for more in ("input", "context") if fields.get(more))]
    system = [_text(fields, key) for key in ("system", "system_prompt") if fields.get(key)]
    user = {"role": "user", "content": "\n\n".join(parts)}
    return (*({"role": "system", "content": content} for content in system[:1]), user)


def _messages(items: object) -> tuple[Message, ...]:
    if not isinstance(items, list):
        raise MalformedRow(f"the conversation must be a list of messages, not {_kind(items)}")
    if not items:
        raise MalformedRow("the conversation is empty")
    return tuple(_message(item) for item in items)


def _message(item: object) -> Message:
    fields = _fields(item, "a message")
    who, said = _present(fields, ("role", "from")), _present(fields, ("content", "value"))
    if who is None or said is None:
        raise MalformedRow(f"a message needs a role and a content, but has {_listed(sorted(fields)[:6]) or 'nothing'}")
    role = _text(fields, who)
    if role not in _ROLES:
        raise MalformedRow(f"unknown role {role!r}")
    if not isinstance(fields[said], list):
        return {"role": _ROLES[role], "content": _text(fields, said)}
    parts = [_fields(part, "a part of a message") for part in fields[said]]
    if other := next((part for part in parts if part.get("type") != "text" or "text" not in part), None):
        raise MalformedRow(f"a message has a part that is not text but {other.get('type')!r}")
    return {"role": _ROLES[role], "content": "".join(_text(part, "text") for part in parts)}


def _distilled(fields: Mapping[str, Any], where: str, vocab_size: int | None) -> Example:
    ids, labels = fields["token_ids"], fields.get("labels")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise MalformedRow('"token_ids" must be a list of integers')
    if not isinstance(labels, list) or not all(
        isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span) for span in labels
    ):
        raise MalformedRow('"labels" must be a list of [start, end]')
    if vocab_size is not None and ids and max(ids) >= vocab_size:
        raise MalformedRow(f"token {max(ids)} is not one of the model's {vocab_size}")
    try:
        return Example(tuple(ids), tuple((start, end) for start, end in labels), where)
    except ValueError as error:
        raise MalformedRow(str(error)) from None


# --- conversations -> tokens ----------------------------------------------------------------------------------------


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, name: str) -> Example:
    """The conversation as the model called `name` reads it, by its chat template, with what it is to write labelled.

    Labelled is what follows the template's opening of an answer, up to the end-of-turn token and with it: the model
    writes all of that itself. A token across a border belongs where its first character is. Messages after the last
    answer are left out. A system message that the template refuses, or does not show, goes into the first user turn.

    A template may rewrite earlier turns, say to take their reasoning out. Such a turn is not labelled, because the
    text before it and in it is not what the model saw and wrote: of a conversation with Qwen 3 the last turn counts.
    Where the template opens an answer in a way that it does not write down itself (DeepSeek R1 opens a thought),
    the content and the end are labelled. A template with {% generation %} blocks says by them which turns count.

    Of a document every token is labelled but those that the tokenizer puts first, or else the first.

    Raises:
        UsageError: a conversation, but no chat template.
        MalformedRow: the template refuses the conversation.
        MedusaError: the tokenizer does not say where in the text its tokens are.
    """
    if conversation.text is not None:
        return _encode_document(conversation.text, tokenizer, conversation.where)
    if not tokenizer.chat_template:
        raise UsageError(f'{name} has no chat template: give plain text rows ({{"text": ...}})')
    if not tokenizer.is_fast:
        raise MedusaError(f"the tokenizer of {name} does not say where its tokens are: let the model write the text")
    messages = list(conversation.messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if answers:
        messages = messages[: answers[-1] + 1]
    messages, text = _rendered(messages, tokenizer, name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if not encoded["input_ids"]:
        raise MalformedRow(f"the chat template of {name} writes nothing")
    spans: list[tuple[int, int]] = []
    if answers:
        find = _marked_answers if _GENERATION.search(tokenizer.get_chat_template()) else _answers
        spans = find(messages, text, tokenizer)
    return Example(tuple(encoded["input_ids"]), _token_spans(spans, encoded["offset_mapping"]), conversation.where)


def _encode_document(text: str, tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if not ids:
        raise MalformedRow("no tokens come of the text")
    start = next((i for i, added in enumerate(special) if not added), len(ids))
    start = max(1, start)  # nothing foretells the first token
    return Example(tuple(ids), ((start, len(ids)),) if start < len(ids) else (), where)


def _rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[list[Message], str]:
    """The messages as the template takes them, and what it makes of them. Raises MalformedRow."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    text, refusal = None, None
    try:
        text = render(tokenizer, messages)
    except _REFUSALS as error:
        refusal = error
    if text is not None and system.strip() in text:
        return messages, text
    user = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    if messages[0]["role"] == "system" and user:
        content = messages[user]["content"]
        joined = {"role": "user", "content": f"{system}\n\n{content}" if system.strip() else content}
        folded = [*messages[1:user], joined, *messages[user + 1 :]]
        try:
            return folded, render(tokenizer, folded)
        except _REFUSALS as error:
            refusal = error
    if text is None:
        raise MalformedRow(f"the chat template of {name} refuses it: {refusal}")
    return messages, text


def _answers(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    r"""Where in the text the answers are, in characters, ends of turns included.

    head      ...<|im_start|>assistant\n                     what the template writes before an answer
    opening   ...<|im_start|>assistant\n                     the prompt at which the model begins to write it
    written   ...<|im_start|>assistant\nHello!<|im_end|>\n   the text once it has written it
    tail                                      <|im_end|>\n   what the template writes after any answer
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:i]
        written = _render(tokenizer, messages[: i + 1])
        shown = _render(tokenizer, [*before, {"role": "assistant", "content": _ANSWER}])
        if written is None or shown is None:
            continue
        head, found, tail = shown.rpartition(_ANSWER)
        if not found or not written.endswith(tail):
            continue
        opening = _render(tokenizer, before, answer=True)
        if opening is None or not written.startswith(opening):
            opening = head
        end = len(written) - len(tail) + len(_end_of_turn(tokenizer, tail))
        if written.startswith(opening) and len(opening) < end and text.startswith(written[:end]):
            spans.append((len(opening), end))
    return spans


def _marked_answers(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """The {% generation %} blocks, in characters. Templates differ in what they put into them beside the answer: the
    opening of the turn is taken out, the end-of-turn token taken in, and the line's end after it taken out."""
    # What `return_assistant_tokens_mask` comes from, which loses blocks that begin within a token.
    from transformers.utils import chat_template_utils

    render_with_blocks: Any = chat_template_utils.render_jinja_template
    rendered, blocks = render_with_blocks(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if rendered != [text]:
        raise MalformedRow("the chat template does not write the same text twice")
    *before, last = messages
    shown = _render(tokenizer, [*before, {**last, "content": _ANSWER}]) or ""
    end_of_turn = _end_of_turn(tokenizer, shown.rpartition(_ANSWER)[2])
    opening = (_render(tokenizer, before, answer=True) or "").removeprefix(_render(tokenizer, before) or "")
    spans: list[tuple[int, int]] = []
    for start, end in blocks[0]:
        opens = bool(opening) and text.startswith(opening, start, end)
        if spans and spans[-1][1] == start and not opens:  # another block of the same answer
            spans[-1] = spans[-1][0], end
        else:
            spans.append((start + len(opening) if opens else start, end))
    return [(start, _end_of_answer(text, start, end, end_of_turn)) for start, end in spans]


def _end_of_answer(text: str, start: int, end: int, end_of_turn: str) -> int:
    """Where the answer in [start, end) ends: after its end-of-turn token, which may be within, or come next."""
    stripped = start + len(text[start:end].rstrip())
    if end_of_turn and text.endswith(end_of_turn, start, stripped):
        return stripped
    return end + len(end_of_turn) if text.startswith(end_of_turn, end) else end


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, answer: bool = False) -> str | None:
    """A part of a conversation, or None where the template refuses it."""
    try:
        return render(tokenizer, messages, answer=answer) if messages else None
    except _REFUSALS:
        return None


@lru_cache(maxsize=256)  # of a template there are few tails, of a tokenizer there may be thousands of added tokens
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """The part of the template's text after an answer that the model writes: up to the first token of its own kind."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
    found = min(((tail.find(token), -len(token)) for token in tokens if token.strip() and token in tail), default=None)
    return tail.rstrip() if found is None else tail[: found[0] - found[1]]


def _token_spans(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans of characters -> spans of the tokens that begin in them."""
    starts: list[int] = []
    covered = 0
    for start, end in offsets:
        # Byte-level tokenizers leave a token's leading space out of its offsets; the token begins at that space.
        starts.append(max(starts[-1] if starts else 0, min(start, covered)))
        covered = max(covered, end)
    found = ((bisect_left(starts, start), bisect_left(starts, end)) for start, end in spans)
    return tuple((start, end) for start, end in found if start < end)
