"""The history of a conversation, and the JSON file that keeps it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medusa.errors import UsageError
from medusa.files import replacing
from medusa.text.stream import is_text


@dataclass(frozen=True, slots=True)
class Entry:
    """One message of a conversation. `interrupted` marks an answer that Ctrl-C cut short."""

    role: str  # "user" or "assistant"; the system prompt is kept beside the history
    content: str
    interrupted: bool = False


def save_history(path: Path, system: str | None, history: Iterable[Entry]) -> None:
    """Write a conversation as JSON; the file is complete or untouched. Raises OSError."""
    messages: list[dict[str, object]] = [] if system is None else [{"role": "system", "content": system}]
    for entry in history:
        marked = {"interrupted": True} if entry.interrupted else {}
        messages.append({"role": entry.role, "content": entry.content, **marked})
    # Through symbolic links, so that the rename replaces the file and not the link to it.
    path = Path(os.path.realpath(path))
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with replacing(path, shared=True) as scratch:
        scratch.touch(mode=0o600)  # what was said is for its owner
        with scratch.open("w", encoding="utf-8") as file:
            json.dump({"messages": messages}, file, ensure_ascii=False, indent=2)
            file.write("\n")


def load_history(path: Path) -> tuple[str | None, list[Entry]]:
    """Read what `save_history` wrote: (system prompt, history). Raises OSError; UsageError when malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not a saved conversation: it is not JSON") from None
    items = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise UsageError(f'{path} is not a saved conversation: it has no list of "messages"')
    history = [_read_entry(path, item) for item in items]
    system = history.pop(0).content if history and history[0].role == "system" else None
    if [entry.role for entry in history] != ["user", "assistant"] * (len(history) // 2):
        raise UsageError(f"{path} is not a saved conversation: questions and answers must alternate")
    return system, history


def _read_entry(path: Path, item: object) -> Entry:
    if isinstance(item, dict):
        role, content, interrupted = item.get("role"), item.get("content"), item.get("interrupted", False)
        if (
            isinstance(role, str)
            and role in ("system", "user", "assistant")
            and isinstance(content, str)
            and is_text(content)
            and isinstance(interrupted, bool)
        ):
            return Entry(role, content, interrupted)
    raise UsageError(f"{path} is not a saved conversation: a message needs a role and a content")
