"""How far a long command is: a bar for people, a line now and then for logs; on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from medusa.terminal import notice

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 10.0


class Lines:
    """For logs: a line now and then, on stderr."""

    def __init__(self) -> None:
        self._title, self._last = "", 0.0

    def stage(self, title: str) -> None:
        self._title, self._last = title, time.monotonic()
        notice(f"{title} ...")

    def progress(self, done: int, total: int, text: str) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            notice(f"{self._title}: {done} of {total}, {text}")

    def say(self, text: str) -> None:
        notice(text)


class Bars:
    """For people: one bar a stage, on stderr."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def stage(self, title: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=None, text="")

    def progress(self, done: int, total: int, text: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, text=text)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)


@contextmanager
def progress_shown() -> Iterator[Lines | Bars]:
    """A reporter for this terminal, or for a log."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # What is left is told by the stages themselves: rows that come in lumps make an estimate from their number jump.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns,
        TextColumn("{task.fields[text]}"),
        console=Console(file=sys.stderr),
        transient=True,
        redirect_stdout=False,  # which may be a file: what is printed must not go where the bar is
    ) as bars:
        yield Bars(bars)
