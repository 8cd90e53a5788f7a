"""A benchmark: every question to every method in turn, each answer on disk as soon as it is there.

    OUT/run.json        the settings, which a run that continues must have too
    OUT/answers.jsonl   a line for each question: all methods' answers with their counts
    OUT/report.json, report.md, *.svg     made of these by `report.py`

The methods take turns within each question, in an order that rotates, so that a machine that slows down or speeds up
treats all alike. Each method's first answer, which also warms it up, is not counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medusa.errors import UsageError
from medusa.evaluation.methods import PLAIN, Method
from medusa.evaluation.questions import Question
from medusa.files import write_whole

RUN_FILE, PLACE_FILE, ANSWERS_FILE = "run.json", "machine.json", "answers.jsonl"
WARM_UP_TOKENS = 16
WARM_UP = "Say hello, and say what you can do."

Row = dict[str, Any]  # {"question_id", "category", "turns": [{method: answer}, ...]}


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """How questions are asked. `turns`: how many of each; `follow`: whose first answer a second turn follows on, each
    method's `own` or, so that all read the same prompt, that of `plain` decoding."""

    max_new_tokens: int = 256
    turns: int = 1
    follow: Literal["own", "plain"] = "own"


def open_run(out: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
    """Makes the directory of a run and notes its settings.

    Raises:
        UsageError: a run is there and is not to be resumed, or has other settings; or there is none to resume.
    """
    path = out / RUN_FILE
    facts = json.loads(json.dumps(facts, default=str))
    if path.is_file() and (resume or (out / ANSWERS_FILE).is_file()):  # more than a first, mistaken call
        if not resume:
            raise UsageError(f"{out} holds a run already: add --resume to continue it, or name another --out")
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in sorted({*before, *facts}) if before.get(name) != facts.get(name)]
        if changed:
            raise UsageError(f"the run in {out} differs in {', '.join(changed)}: name another --out")
        return
    if resume:
        raise UsageError(f"there is no run in {out} to resume: leave out --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {out}: {error.strerror}") from None
    write_whole(path, json.dumps(facts, indent=1) + "\n")


def check_place(out: Path, facts: Mapping[str, Any]) -> None:
    """Notes what a run is measured on, and which questions it asks, or compares that with what it began on: rows of two
    machines do not make one table. What the run has not asked before is added.

    Raises:
        UsageError: it began on something else.
    """
    path = out / PLACE_FILE
    found: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, value in found.items():
        if name in before and before[name] != value:
            raise UsageError(
                f"the run in {out} began with {name} {before[name]}, and this is {value}: name another --out"
            )
    write_whole(path, json.dumps(before | found, indent=1) + "\n")


def read_rows(out: Path) -> list[Row]:
    """The answers so far; a last line that was cut short by a kill is dropped from the file."""
    path = out / ANSWERS_FILE
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_whole(path, whole.decode())
    return [json.loads(line) for line in whole.decode().splitlines()]


def run_bench(
    methods: Sequence[Method],
    questions: Sequence[Question],
    settings: BenchSettings,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Asks what is not answered in `out` yet; returns all rows, in the order of `questions`.

    Args:
        methods: one of them called "plain".
        on_progress: called after each question.
    """
    rows = {row["question_id"]: row for row in read_rows(out)}
    if any(question.id not in rows for question in questions):
        for method in methods:
            method.answer([{"role": "user", "content": WARM_UP}], WARM_UP_TOKENS)
    with (out / ANSWERS_FILE).open("a", encoding="utf-8") as file:
        for number, question in enumerate(questions):
            if question.id in rows:
                continue
            shift = number % len(methods)
            row = _ask([*methods[shift:], *methods[:shift]], question, settings)
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows[question.id] = row
            on_progress(len(rows), len(questions))
    return [rows[question.id] for question in questions]


def _ask(methods: Sequence[Method], question: Question, settings: BenchSettings) -> Row:
    histories: dict[str, list[dict[str, str]]] = {method.name: [] for method in methods}
    turns: list[dict[str, Any]] = []
    for turn in question.turns[: settings.turns]:
        answers = {}
        for method in methods:
            messages = [*histories[method.name], {"role": "user", "content": turn}]
            answers[method.name] = method.answer(messages, settings.max_new_tokens).as_json()
        for name, messages in histories.items():
            text = answers[name if settings.follow == "own" else PLAIN]["text"]
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": text}]
        turns.append(answers)
    return {"question_id": question.id, "category": question.category, "turns": turns}
