"""Commands that answer: `medusa generate` and `medusa chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from medusa.chat.session import Chat
from medusa.cli.many import AT_ONCE, Wanted, read_lines
from medusa.cli.options import AsJson, check_text, load_model, read_prompt, with_options
from medusa.cli.progress import progress_shown
from medusa.errors import UsageError
from medusa.settings import AnswerSettings, EngineSettings, values
from medusa.terminal import Printer, collect, notice, show_nothing, stats_line

if TYPE_CHECKING:
    from medusa.api import LanguageModel
    from medusa.completion import Completion

ShowDrafts = Annotated[bool, typer.Option("--show-drafts", help="Colour the tokens that were drafted.")]


@with_options
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; - reads it from the input.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read the prompt from a file (UTF-8).")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as is, without the chat template.")] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End where this text appears; may be repeated.", show_default=False),
    ] = None,
    show_drafts: ShowDrafts = False,
    as_json: AsJson = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Many prompts: lines of JSON in and, in their order, lines of JSON out.")
    ] = False,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Prompts answered at once, with --jsonl.", show_default=f"{AT_ONCE}")
    ] = None,
    *,
    engine: EngineSettings,
    sampling: AnswerSettings,
) -> None:
    """Answer one prompt, or many."""
    text = read_prompt(prompt, prompt_file, raw or jsonl)
    for end in stop or ():
        check_text(end, "the text after --stop")
    if jsonl:
        if show_drafts:
            raise UsageError("--show-drafts is for one answer: leave it out with --jsonl")
        wanted = read_lines(text, prompt_file or "the input", sampling, stop or (), raw)
        _answer_all(load_model(engine, num_slots=slots or min(AT_ONCE, len(wanted))), wanted)
        return
    if slots is not None:
        raise UsageError("--slots is for many prompts: add --jsonl")
    lm = load_model(engine)
    printer = Printer(show_drafts)
    answer = collect(
        lm.stream(text, raw=raw, stop=stop or [], **values(sampling)), show_nothing if as_json else printer
    )
    if as_json:
        print(json.dumps(_as_json(answer)), flush=True)
    else:
        print(flush=True)
        if answer.token_ids:
            notice(stats_line(answer.stats) + (", interrupted" if answer.finish_reason == "interrupted" else ""))
        printer.legend()
    if answer.finish_reason == "interrupted":
        raise typer.Exit(130)


@with_options
def chat(
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.", show_default=False)] = None,
    show_drafts: ShowDrafts = False,
    *,
    engine: EngineSettings,
    sampling: AnswerSettings,
) -> None:
    """Talk with the model; piped input is one turn a line."""
    if system is not None:
        check_text(system, "the system prompt")
    lm = load_model(engine)
    lm.slots.kept = lm.backend.max_length  # the next turn continues from what the slot holds
    raise typer.Exit(Chat(lm, system=system, settings=values(sampling), show_drafts=show_drafts).run())


def _answer_all(lm: LanguageModel, wanted: Sequence[Wanted]) -> None:
    """A line of JSON for each prompt, as soon as it and all before it have been answered."""
    from medusa.completion import in_order

    # Not where the lines themselves are on the screen.
    with progress_shown() if sys.stderr.isatty() and not sys.stdout.isatty() else nullcontext() as reporter:
        ended = 0

        def on_end() -> None:
            nonlocal ended
            ended += 1
            if reporter is not None:
                reporter.progress(ended, len(wanted), "")

        if reporter is not None:
            reporter.stage("Answering")
        chunks = lm.stream_many([prompt for prompt, _ in wanted], each=[options for _, options in wanted])
        for answer in in_order(chunks, len(wanted), on_end):
            print(json.dumps(_as_json(answer)), flush=True)


def _as_json(answer: Completion) -> dict[str, object]:
    """The line that `generate --json` and `--jsonl` print."""
    stats = answer.stats
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "num_new_tokens": len(answer.token_ids),
        "steps": stats.steps,
        "tokens_per_step": round(stats.tokens_per_step, 3),
        "decode_seconds": round(stats.decode_seconds, 4),
        "tokens_per_second": round(stats.tokens_per_second, 2),
        "ttft_seconds": round(stats.ttft_seconds, 4) if answer.token_ids else None,
        "finish_reason": answer.finish_reason,
    }


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (generate, chat):
        app.command()(command)
