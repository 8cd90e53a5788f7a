"""What is asked: a file in the form of MT-bench and Spec-Bench, or the set that comes with Medusa."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.errors import UsageError
from medusa.text.stream import check_whole

BUILT_IN = Path(__file__).parent / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Question:
    """One conversation's user turns. `id` is unique in its file."""

    id: str
    category: str
    turns: tuple[str, ...]


def read_questions(path: Path = BUILT_IN) -> tuple[Question, ...]:
    """JSONL, a question a line: {"question_id": 81, "category": "writing", "turns": ["...", "..."]}.

    `prompt` may stand for a single turn; without an id the number of the line is one, without a category "all".

    Raises:
        UsageError: no such file, or a line that is no question (told with its number).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read the questions in {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the questions in {path} are not UTF-8 text") from None
    questions = [_question(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UsageError(f"there are no questions in {path}")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UsageError(f"{path} holds two questions with the id {question.id}")
        seen.add(question.id)
    return tuple(questions)


def _question(line: str, path: Path, number: int) -> Question:
    where = f"{path}, line {number}"
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    row = row if isinstance(row, dict) else {}
    turns = [row["prompt"]] if "prompt" in row else row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UsageError(f'{where}: a question needs "turns", a list of texts')
    check_whole(turns, f"{where}: it")
    return Question(str(row.get("question_id", number)), str(row.get("category", "all")), tuple(turns))


def choose(questions: Sequence[Question], limit: int | None, categories: Collection[str] = ()) -> tuple[Question, ...]:
    """`limit` of them (None: all), spread evenly over the file, so that every category has its share.

    Raises:
        UsageError: a category that is not there.
    """
    for category in categories:
        if not any(question.category == category for question in questions):
            known = ", ".join(dict.fromkeys(question.category for question in questions))
            raise UsageError(f"there is no category {category}: there are {known}")
    wanted = [question for question in questions if not categories or question.category in categories]
    count = min(limit or len(wanted), len(wanted))
    return tuple(wanted[i * len(wanted) // count] for i in range(count))
