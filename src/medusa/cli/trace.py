"""`medusa trace`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medusa.cli.options import AsJson, load_model, read_prompt, with_options
from medusa.settings import AnswerSettings, EngineSettings, values
from medusa.terminal import collect, notice, wants_colour

if TYPE_CHECKING:
    from medusa.api import Chunk


@with_options
def trace(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from the input.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the steps too, as .svg or .png.", show_default=False)
    ] = None,
    steps: Annotated[
        int, typer.Option(min=0, help="How many steps are printed and drawn; 0 is all, and so is --json.")
    ] = 6,
    as_json: AsJson = False,
    *,
    engine: EngineSettings,
    sampling: AnswerSettings,
) -> None:
    """Show how one answer came about: each step's tree, what was accepted and who proposed it."""
    from medusa.evaluation import trace as tracing
    from medusa.evaluation import trace_picture

    text = read_prompt(prompt, None, raw=False)
    if out is not None:
        trace_picture.check_picture(out)
    lm = load_model(engine)
    chunks: list[Chunk] = []
    answer = collect(lm.stream(text, **values(sampling)), chunks.append)
    found = tracing.trace(chunks, lm.tokenizer)
    if as_json:
        print(json.dumps(found.facts()), flush=True)
    else:
        for line in tracing.lines(found, steps=steps, colour=wants_colour(sys.stdout)):
            print(line)
        sys.stdout.flush()
    if answer.finish_reason == "interrupted":
        raise typer.Exit(130)
    if out is not None:
        trace_picture.draw_trace(found, out, steps=steps)
        notice(f"The picture is in {out}.")


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(trace)
