"""The file of a run: conversations as JSON lines, which only grow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa.errors import MedusaError, UsageError, shortened
from medusa.training.talk import Transcript

SHORTEST_ANSWER = 8  # tokens of a conversation's answers
REPEATED = "repeated"
BEGINNING = b'{"number": '  # of every row
OPENINGS = "openings"  # the setting that rows of an older way of inventing do not have


def fault_of(transcript: Transcript) -> str:
    """Why a conversation is not kept whatever else was said; "" if it may be."""
    return transcript.fault or ("too short" if transcript.answer_tokens < SHORTEST_ANSWER else "")


class TextFile:
    """The JSONL of a run, which only grows, one whole row at a time. Opening it takes up what an earlier run left."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Raises UsageError when the file was made with other settings, MedusaError when it is not such a file."""
        self.path = path
        self.header = dict(header)  # what every row says of how it came about
        self.rows = 0
        self.tokens = 0  # of answers
        self.next_number = 0
        self.older = False  # rows came about in an older way of inventing; none must be added
        self._seen: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._take_up()
        self._file = path.open("a", encoding="utf-8")

    def _take_up(self) -> None:
        whole = 0  # bytes up to the end of the last whole row
        with self.path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if not line.endswith(b"\n") and line.startswith(BEGINNING[: len(line)]):
                    break  # the run was killed while writing
                try:
                    row = json.loads(line)
                    header = {name: row[name] for name in self.header}
                    header["settings"] = dict(row.get("settings", {}))
                    number, labels = int(row["number"]), row["labels"]
                    tokens = sum(end - start for start, end in labels)
                except (ValueError, KeyError, TypeError):
                    raise MedusaError(
                        f"{self.path}, line {line_number}, is not a row of distilled text: name a new file"
                    ) from None
                self._compare(header)
                whole += len(line)
                self._count(row, number, tokens)
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)

    def _compare(self, header: Mapping[str, Any]) -> None:
        """Raises UsageError where a row came about in another way."""
        before, now = ({**h, **h.get("settings", {})} for h in (header, self.header))
        if OPENINGS in now and OPENINGS not in before:
            self.older = True
            before[OPENINGS] = now[OPENINGS]
        for name in [*now, *before]:
            if name != "settings" and before.get(name) != now.get(name):
                was, wanted = (shortened(json.dumps(values.get(name))) for values in (before, now))
                raise UsageError(
                    f"{self.path} was made with {name} {was}, not {wanted}: "
                    "go on with the same settings, or name a new file"
                )

    def add(self, number: int, transcript: Transcript) -> str:
        """Writes a conversation, unless there is a reason not to, which is returned. Numbers must ascend."""
        if fault := fault_of(transcript):
            return fault
        row = {
            "number": number,
            **self.header,
            "temperature": transcript.temperature,
            "messages": transcript.messages,
            "token_ids": transcript.token_ids,
            "labels": transcript.labels,
        }
        if self._seen & _keys(row):
            return REPEATED
        # One write of a whole line: what is cut short by a kill is one row, which the next run drops.
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise MedusaError(
                f"cannot write {self.path}: {error.strerror}; make room and run the same command again"
            ) from None
        self._count(row, number, transcript.answer_tokens)
        return ""

    def _count(self, row: Mapping[str, Any], number: int, tokens: int) -> None:
        self._seen |= _keys(row)
        self.rows += 1
        self.tokens += tokens
        self.next_number = number + 1

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a row that found no room, which has been reported
            self._file.close()


def _keys(row: Mapping[str, Any]) -> set[str]:
    """What two conversations must not share: the first question, or all that was said."""
    turns = [f"{message['role']} {' '.join(message['content'].lower().split())}" for message in row["messages"]]
    parts = ["\n".join(turns or [repr(row["token_ids"])])]
    if len(turns) > 1 and turns[0].startswith("user"):
        parts.append(turns[0])
    return {hashlib.sha256(part.encode("utf-8", "replace")).hexdigest()[:24] for part in parts}
