"""A conversation at the terminal: reads turns, streams answers, keeps the history.

No option parsing here. Answers go to stdout and the rest to stderr, so a piped conversation (one turn a
line) leaves the answers alone on stdout.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.chat.history import Entry, load_history, save_history
from medusa.errors import ContextFullError, MedusaError, UsageError
from medusa.terminal import (
    OUT_OF_MEMORY,
    Printer,
    collect,
    count,
    is_out_of_memory,
    notice,
    short_number,
    stats_line,
    totals,
)
from medusa.text.stream import is_text

if TYPE_CHECKING:
    from medusa.api import Chunk, LanguageModel, Stats

HELP = """\
/reset         forget the conversation (the system prompt stays)
/drop          forget the oldest turn, or as many as make room for a question that did not fit, and answer it
/regen         answer the last question again
/save FILE     write the conversation as JSON
/load FILE     continue a saved conversation
/system TEXT   set the system prompt; without TEXT, show it
/stats         how fast the answers were
/help          this list
/exit          leave (so does Ctrl-D)
//TEXT         say something that begins with a slash
Ctrl-C stops an answer; what was said so far stays in the conversation."""

FREE = 0.25  # of the context, for the answer, where /drop makes room


class Chat:
    """A conversation with one model. `settings` are keyword arguments of `LanguageModel.stream`."""

    def __init__(
        self,
        lm: LanguageModel,
        *,
        system: str | None = None,
        settings: Mapping[str, Any] | None = None,
        show_drafts: bool = False,
    ) -> None:
        self.lm = lm
        self.system = system
        self.history: list[Entry] = []  # user and assistant in turn
        self.settings = dict(settings or {})
        self.printer = Printer(show_drafts)
        self.answered: list[Stats] = []  # one entry an answer, since the start or the last /reset
        self.failed = False  # an answer or a command went wrong
        self._attempt = 0  # how often the last question was asked again
        self._waiting: str | None = None  # a question that did not fit into the context
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/drop": self._drop,
            "/regen": self._regen,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/system": self._system,
            "/help": lambda _: notice(HELP),
        }

    def run(self) -> int:
        """Read turns until /exit, the end of the input or two Ctrl-C; return the exit code.

        At a terminal that is 0; a piped conversation in which a turn failed gives 1. Raises UsageError when
        the piped text is not UTF-8.
        """
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            _enable_line_editing()
            notice(f"Chat with {self.lm.name}. /help lists the commands, Ctrl-D leaves.")
            self.printer.legend()
        leaving = False
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                if interactive:
                    print()
                break
            except KeyboardInterrupt:
                if leaving:
                    notice("")
                    break
                notice("\nPress Ctrl-C again or Ctrl-D to leave.")
                leaving = True
                continue
            except UnicodeDecodeError:
                raise UsageError("the input is not UTF-8 text") from None
            leaving = False
            try:
                if not self.handle(line):
                    break
            except KeyboardInterrupt:  # outside an answer: a command, or between two chunks' output
                notice("\nInterrupted.")
        return 1 if self.failed and not interactive else 0

    def handle(self, line: str) -> bool:
        """Do what one line asks: a command or a turn. False when it asks to leave."""
        line = line.strip()
        name, _, argument = line.partition(" ")
        if name == "/exit":
            return False
        try:
            if line.startswith("//"):
                self.say(line[1:])
            elif name in self._commands:
                self._commands[name](argument.strip())
            elif line.startswith("/"):
                raise UsageError(f"there is no command {name}; /help lists them")
            elif line:
                self.say(line)
        except MedusaError as error:
            self.failed = True
            print(f"Error: {error}", file=sys.stderr, flush=True)
        return True

    def say(self, text: str) -> None:
        """Put one user turn to the model and stream the answer. A turn that cannot be answered is dropped: raises
        MedusaError where that is not by Ctrl-C."""
        _check_text(text)
        self._waiting = None
        self.history.append(Entry("user", text))
        answer = None
        try:
            answer = self._answer()
        except ContextFullError as error:
            if len(self.history) > 1:
                self._waiting = text
            raise self._context_full(error) from None
        finally:
            if answer is None:
                self.history.pop()
        if answer is not None:
            self.history.append(answer)
            self._attempt = 0

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation as the chat template takes it."""
        return self._messages(self.history)

    def _messages(self, history: Iterable[Entry]) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [{"role": entry.role, "content": entry.content} for entry in history]

    def _answer(self, **changed: Any) -> Entry | None:
        """Stream an answer to the history; None, after saying so, when Ctrl-C came before it began.

        Raises MedusaError; ContextFullError with nothing said."""
        shown = False

        def show(chunk: Chunk) -> None:
            nonlocal shown
            shown = shown or bool(chunk.text)
            self.printer(chunk)

        try:
            answer = collect(self.lm.stream(self.messages(), **{**self.settings, **changed}), show)
        except (MedusaError, MemoryError, RuntimeError) as error:
            out_of_memory = is_out_of_memory(error)
            if shown and (out_of_memory or isinstance(error, MedusaError)):
                print(flush=True)
            if out_of_memory:
                raise MedusaError(OUT_OF_MEMORY) from None
            raise
        print(flush=True)
        interrupted = answer.finish_reason == "interrupted"
        if interrupted and not answer.text:
            notice("Interrupted before the answer began; the conversation is as it was.")
            return None
        if answer.token_ids:
            self.answered.append(answer.stats)
        if interrupted:
            notice("Interrupted; what was said so far stays in the conversation.")
        elif answer.finish_reason == "length":
            limit = self.settings.get("max_new_tokens")
            if limit is None or len(answer.token_ids) >= limit:
                notice("The answer reached its limit of tokens (--max-new-tokens).")
            else:
                notice("The answer filled the context: /drop forgets the oldest turn, /reset all.")
        return Entry("assistant", answer.text, interrupted)

    def _context_full(self, error: ContextFullError) -> MedusaError:
        """The error as a conversation has it; as it is where the question alone is too long."""
        if len(self.history) == 1:
            return error
        return UsageError(
            f"the conversation has {error.tokens} tokens and the context holds {error.context}: /drop forgets the "
            "oldest turns to make room and answers, /reset forgets all"
        )

    # commands: each takes the text after its name, and raises MedusaError where it cannot be done

    def _drop(self, _: str) -> None:
        if not self.history:
            raise UsageError("there is no turn to forget")
        question = self._waiting
        turns = 1 if question is None else self._turns_too_many(question)
        del self.history[: 2 * turns]
        if turns:
            notice(f"Forgot the oldest {count(turns, 'turn')}; {count(len(self.history) // 2, 'turn')} left.")
        if question is not None:
            self.say(question)

    def _turns_too_many(self, question: str) -> int:
        """How many of the oldest turns must go for `question` to fit, and an answer of a quarter of the context.

        Raises ContextFullError when the question does not fit even alone."""
        context = self.lm.backend.max_length
        fitting = None
        for turns in range(len(self.history) // 2 + 1):
            tokens = len(self.lm.encode(self._messages([*self.history[2 * turns :], Entry("user", question)])))
            if tokens <= (1 - FREE) * context:
                return turns
            if fitting is None and tokens < context:
                fitting = turns
        if fitting is None:
            raise ContextFullError(tokens, context)
        return fitting

    def _reset(self, _: str) -> None:
        self._waiting = None
        self.history.clear()
        self.answered.clear()
        notice("The conversation is empty.")

    def _regen(self, _: str) -> None:
        if not self.history:
            raise UsageError("there is no answer to give again yet")
        changed = {}
        if not self.settings.get("temperature"):
            notice("At temperature 0 the answer stays the same; start with --temperature 0.8 for another.")
        elif self.settings.get("seed") is not None:
            # The same seed would give the same answer; counting up keeps the session reproducible.
            changed["seed"] = self.settings["seed"] + self._attempt + 1
        before = self.history.pop()
        answer = None
        try:
            answer = self._answer(**changed)
        except ContextFullError as error:  # since then the system prompt has grown
            raise self._context_full(error) from None
        finally:
            self.history.append(answer or before)
        self._attempt += answer is not None

    def _save(self, name: str) -> None:
        path = _path("/save", name)
        try:
            save_history(path, self.system, self.history)
        except OSError as error:
            raise MedusaError(f"cannot write {path}: {error.strerror}") from None
        notice(f"Saved {count(len(self.history) // 2, 'turn')} to {path}.")

    def _load(self, name: str) -> None:
        path = _path("/load", name)
        try:
            self.system, self.history = load_history(path)
        except OSError as error:
            raise MedusaError(f"cannot read {path}: {error.strerror}") from None
        self._attempt, self._waiting = 0, None
        notice(f"Loaded {count(len(self.history) // 2, 'turn')} from {path}.")

    def _system(self, text: str) -> None:
        _check_text(text)
        if text:
            self.system = text
        notice(f"System prompt: {self.system}" if self.system is not None else "There is no system prompt.")

    def _stats(self, _: str) -> None:
        if not self.answered:
            notice("No answers yet.")
            return
        notice(f"Last answer: {stats_line(self.answered[-1])}")
        tokens, steps, seconds = totals(self.answered)
        if len(self.answered) > 1 and steps and seconds:
            notice(
                f"All {len(self.answered)} answers: {tokens} tokens in {steps} steps = {tokens / steps:.1f} "
                f"tokens per step, {short_number(tokens / seconds)} tokens/s"
            )


def _check_text(text: str) -> None:
    if not is_text(text):
        raise UsageError("the input is not UTF-8 text")


def _path(command: str, name: str) -> Path:
    """The file a user named; ~ is their home where it can be found. Raises UsageError: there is no name."""
    if not name:
        raise UsageError(f"{command} needs the name of a file")
    path = Path(name.replace("\0", ""))  # no system call takes a zero byte
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def _enable_line_editing() -> None:
    """Arrow keys and recall of earlier lines in `input()`, where the platform has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
