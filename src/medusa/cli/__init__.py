"""The command line: parses, calls a function you could call yourself, prints.

Heavy imports (torch, transformers) happen when a command needs them, so `medusa --help` stays fast.
Exit codes: 0 done, 1 something outside the call is wrong, 2 a wrong argument, 130 Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from medusa.chat.session import (
    OUT_OF_MEMORY,
    Answer,
    Chat,
    Printer,
    collect,
    is_out_of_memory,
    notice,
    stats_line,
    totals,
    wants_colour,
)
from medusa.cli import bench as cli_bench
from medusa.cli import trace as cli_trace
from medusa.cli import training as cli_training
from medusa.cli.options import AsJson, EngineOptions, SamplingOptions, check_text, load_model, read_prompt, with_options
from medusa.errors import MedusaError, UsageError

if TYPE_CHECKING:
    from medusa.api import Chunk
    from medusa.engines.times import Profile

DEMO_PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "List five tips for a good night's sleep, with one sentence on each.",
)
WARM_UP_TOKENS = 16


ShowDrafts = Annotated[bool, typer.Option("--show-drafts", help="Colour the tokens that were drafted.")]


# UsageError of the click that Typer uses, its own or the package: Typer exports only this subclass.
_BAD_CALL: Any = typer.BadParameter.__mro__[1]


# --- the application ----------------------------------------------------------------------------------------


class _Commands(TyperGroup):
    """Turns the errors a user can cause into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _fail(str(error), 2) from None
        except MedusaError as error:
            raise _fail(str(error), 1) from None
        except _BAD_CALL as error:  # an unknown option or value, which Typer would draw a box around
            message = error.format_message().replace("Value error, ", "").rstrip(".")
            raise _fail(f"{message}; see medusa {ctx.invoked_subcommand or ''} --help", 2) from None
        except BrokenPipeError:
            raise  # `| head` went away: Typer ends quietly
        except OSError as error:
            raise _fail(str(error), 1) from None
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise _fail(OUT_OF_MEMORY, 1) from None
            raise


def _fail(message: str, code: int) -> typer.Exit:
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import medusa

        print(f"medusa {medusa.__version__}")
        raise typer.Exit


@app.callback()
def _medusa(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Medusa: faster text from language models, with heads that draft and a model that verifies."""


@app.command()
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
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Answer one prompt."""
    text = read_prompt(prompt, prompt_file, raw)
    settings = sampling.checked()
    for end in stop or ():
        check_text(end, "the text after --stop")
    lm = load_model(engine)
    printer = Printer(show_drafts)
    answer = collect(lm.stream(text, raw=raw, stop=stop or [], **settings), _no_show if as_json else printer)
    if as_json:
        print(json.dumps(_as_json(answer)), flush=True)
    else:
        print(flush=True)
        if answer.stats is not None:
            notice(stats_line(answer.stats) + (", interrupted" if answer.finish_reason == "interrupted" else ""))
        printer.legend()
    if answer.finish_reason == "interrupted":
        raise typer.Exit(130)


@app.command()
@with_options
def chat(
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.", show_default=False)] = None,
    show_drafts: ShowDrafts = False,
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk with the model; piped input is one turn a line."""
    settings = sampling.checked()
    if system is not None:
        check_text(system, "the system prompt")
    lm = load_model(engine)
    raise typer.Exit(Chat(lm, system=system, settings=settings, show_drafts=show_drafts).run())


@app.command()
@with_options
def info(
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure passes of 1 to 32 tokens, beside the limit of memory.")
    ] = False,
    as_json: AsJson = False,
    *,
    engine: EngineOptions,
) -> None:
    """Show what would run: the model, its heads, the backend and why."""
    lm = load_model(engine)
    facts = lm.describe()
    if profile:
        from medusa.engines.times import profile as measure

        if sys.stderr.isatty():
            notice("Measuring ...")
        facts["profile"] = _profile_facts(measure(lm.backend))
    if as_json:
        print(json.dumps(facts, default=str))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _flatten(facts):
        table.add_row(Text(name), Text(value))
    Console(highlight=False).print(table)


@app.command()
@with_options
def demo(
    prompt: Annotated[
        str | None,
        typer.Argument(help="A prompt of your own instead of the three built in.", show_default=False),
    ] = None,
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Decode with Medusa and plainly, on the same engine, and compare."""
    if engine.drafter == "none":
        raise UsageError("the demo compares a drafter with none; leave out --drafter none")
    prompts = DEMO_PROMPTS if prompt is None else (read_prompt(prompt, None, raw=False),)
    if sampling.seed is None:  # plain sampling can only repeat the text when both use one seed
        sampling = dataclasses.replace(sampling, seed=0)
    settings = sampling.checked()
    fast = load_model(engine)
    plain = fast.with_drafter("none")
    for lm in (fast, plain):
        lm.generate(prompts[0], **{**settings, "max_new_tokens": WARM_UP_TOKENS})
    printer = Printer(show_drafts=wants_colour(sys.stdout))
    print(f"> {prompts[0]}", flush=True)
    runs: list[tuple[Answer, Answer]] = []
    for number, text in enumerate(prompts, 1):
        # Interleaved, so that a machine that slows down or speeds up treats both alike.
        drafted = collect(fast.stream(text, **settings), printer if number == 1 else _no_show)
        if number == 1:
            print(flush=True)
            printer.legend()
        if drafted.finish_reason == "interrupted":
            raise KeyboardInterrupt
        notice(f"measuring {number} of {len(prompts)} ...")
        plainly = collect(plain.stream(text, **settings), _no_show)
        if plainly.finish_reason == "interrupted":
            raise KeyboardInterrupt
        runs.append((drafted, plainly))
    print(_comparison(runs), flush=True)


cli_bench.add_to(app)
cli_trace.add_to(app)
cli_training.add_to(app)


def _comparison(runs: Sequence[tuple[Answer, Answer]]) -> str:
    """One line that compares answers decoded with drafts and without, and says whether they are the same."""
    tokens, steps, seconds = totals(one.stats for one, _ in runs if one.stats is not None)
    plain_tokens, _, plain_seconds = totals(one.stats for _, one in runs if one.stats is not None)
    if min(tokens, steps, seconds, plain_tokens, plain_seconds) <= 0:
        return "Too few tokens to compare; ask for more with --max-new-tokens."
    speed, plain_speed = tokens / seconds, plain_tokens / plain_seconds
    ratio = speed / plain_speed
    differing = sum(drafted.token_ids != plain.token_ids for drafted, plain in runs)
    return (
        f"Medusa: {tokens / steps:.2f} tokens per step, {speed:.1f} tokens/s; "
        f"plain: {plain_speed:.1f} tokens/s; "
        + (f"{ratio:.2f}x faster, " if ratio >= 1 else f"{1 / ratio:.2f}x slower, ")
        + (f"output differs in {differing} of {len(runs)}." if differing else "output identical.")
    )


def _as_json(answer: Answer) -> dict[str, object]:
    """The line that `generate --json` prints."""
    stats = answer.stats
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "num_new_tokens": len(answer.token_ids),
        "steps": stats.steps if stats else 0,
        "tokens_per_step": round(stats.tokens_per_step, 3) if stats else 0.0,
        "decode_seconds": round(stats.decode_seconds, 4) if stats else 0.0,
        "tokens_per_second": round(stats.tokens_per_second, 2) if stats else 0.0,
        "ttft_seconds": round(stats.ttft_seconds, 4) if stats else None,
        "finish_reason": answer.finish_reason,
    }


def _flatten(facts: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of a table: {"heads": {"kind": "shared"}} -> [("heads kind", "shared")]."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            if all(isinstance(v, float) for v in value.values()):  # a line of a table, not a section
                rows.append((label, ", ".join(f"{v:g} {k.replace('_', ' ')}" for k, v in value.items())))
            else:
                rows.extend(_flatten(value, f"{label} "))
        else:
            rows.append((label, "none" if value is None else str(value)))
    return rows


def _profile_facts(profile: Profile) -> dict[str, object]:
    """Milliseconds for each number of tokens, beside one token's and what reading the weights takes."""
    one, limit = profile.seconds[1], profile.limit_seconds
    facts: dict[str, object] = {"context": profile.context}
    if limit is not None and profile.bytes and profile.bandwidth:
        facts["weights_MB"] = round(profile.bytes / 1e6, 1)
        facts["read_bandwidth_GB/s"] = round(profile.bandwidth / 1e9, 1)
        facts["limit_ms"] = round(1e3 * limit, 2)
    for size, seconds in profile.seconds.items():
        facts[f"{size}_tokens"] = {
            "ms": round(1e3 * seconds, 2),
            "of_one_token": round(seconds / one, 2),
            **({"of_the_limit": round(seconds / limit, 2)} if limit else {}),
        }
    return facts


def _no_show(_: Chunk) -> None:
    """Print nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `medusa` command; always ends with SystemExit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller (`medusa ... >&-`)
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream, errors="replace")  # a terminal that lacks a character shows ? instead
    if not sys.stdin.isatty():
        _reconfigure(sys.stdin, encoding="utf-8", errors="strict")
    app(args=arguments, prog_name="medusa")


def _reconfigure(stream: TextIO, **settings: str) -> None:
    """Change how a stream encodes, where it can (a replaced sys.stdout may be anything)."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(**settings)
