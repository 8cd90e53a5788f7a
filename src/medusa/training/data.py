"""Training text: rows of files and data sets -> conversations -> tokens, with those marked that the model is to write.

    sources.py           "chats.jsonl.gz"  ->  rows, each with its place
    conversations.py     {"messages": [...]}, in any shape  ->  Conversation, or a plain document
    messages.py          {"from": "human", "value"}  ->  {"role": "user", "content"}; tools and what they answer
    labels.py            Conversation  ->  Examples: token ids, and the spans of them that heads learn from

The tables of file kinds and shapes are in the first two. A row that cannot be used is reported with its place and
skipped; many of them end the reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from medusa.errors import MedusaError
from medusa.training.conversations import Conversation, Example, conversation_of, prompt_of
from medusa.training.labels import encode, encode_rows
from medusa.training.sources import MalformedRow, file_of, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Conversation",
    "Example",
    "MalformedRow",
    "Reader",
    "encode",
    "encode_rows",
    "read_conversations",
    "read_prompts",
]

SHOWN = 10  # malformed rows of a source that are reported one by one
MALFORMED_SHARE = 0.1  # a source with a greater share of malformed rows is not what it was taken for
JUDGED_AFTER = 100  # rows; smaller sources are judged at their end

T = TypeVar("T")


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
        """All rows as tokens, in order; those in which nobody answers have no spans. A conversation may give several
        Examples, which then have the same place and follow each other.

        Raises:
            UsageError: also for a conversation, where the model has no chat template.
        """
        others: set[str] = set()

        def read(row: object, where: str) -> list[Example]:
            item = conversation_of(row, where, self.vocab_size)
            if isinstance(item, Conversation):
                return list(encode_rows(item, self.tokenizer, self.name))
            model = row.get("model") if isinstance(row, dict) else None
            # Only reported: one model may have two names.
            if isinstance(model, str) and model not in {self.name, *others}:
                others.add(model)
                self.report(f"{where}: written by {model}, not by {self.name}; are its tokens the same?")
            return [item]

        return chain.from_iterable(_read(sources, read, self.report))


def read_conversations(
    sources: Sequence[str], report: Callable[[str], None], *, vocab_size: int | None = None
) -> Iterator[Conversation | Example]:
    """What there is to learn from, in order; a .txt file has one document a paragraph. Distilled rows are Examples."""
    return _read(sources, partial(conversation_of, vocab_size=vocab_size), report)


def read_prompts(source: str, report: Callable[[str], None]) -> Iterator[Conversation]:
    """What users say: a system message, if there is one, and the user turns; answers are left out, for the model is to
    give its own. A .txt file has one prompt a line; a row may be a question without an answer."""
    return _read([source], prompt_of, report, prompts=True)


def _read(
    sources: Sequence[str], read: Callable[[object, str], T], report: Callable[[str], None], *, prompts: bool = False
) -> Iterator[T]:
    """What `read` makes of each row; it raises MalformedRow for those that are skipped."""
    for source, path in [(source, file_of(source)) for source in sources]:
        count = malformed = 0
        first = ""
        for where, row in rows_of(source, path, prompts):
            count += 1
            try:
                if isinstance(row, MalformedRow):
                    raise row
                item = read(row, where)
            except (MalformedRow, RecursionError) as error:  # brackets hundreds deep
                malformed += 1
                first = first or f"{where}: {error}"
                if malformed <= SHOWN:
                    report(f"{where}: {error}; skipped")
            else:
                yield item
            if count >= JUDGED_AFTER:
                _judge(source, count, malformed, first)
        if not count:
            raise MedusaError(f"{source} is empty")
        _judge(source, count, malformed, first)
        if malformed > SHOWN:
            report(f"{source}: {malformed - SHOWN} more malformed rows; skipped")


def _judge(source: str, count: int, malformed: int, first: str) -> None:
    if malformed > MALFORMED_SHARE * count:
        raise MedusaError(f"{malformed} of {count} rows of {source} are malformed; the first is {first}")
