"""`medusa demo`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from medusa.cli.options import load_model, read_prompt, with_options
from medusa.errors import UsageError
from medusa.settings import AnswerSettings, EngineSettings, values
from medusa.terminal import Printer, collect, notice, show_nothing, totals, wants_colour

if TYPE_CHECKING:
    from medusa.completion import Completion

DEMO_PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "List five tips for a good night's sleep, with one sentence on each.",
)
WARM_UP_TOKENS = 16


@with_options
def demo(
    prompt: Annotated[
        str | None,
        typer.Argument(help="A prompt of your own instead of the three built in.", show_default=False),
    ] = None,
    *,
    engine: EngineSettings,
    sampling: AnswerSettings,
) -> None:
    """Decode with Medusa and plainly, on the same engine, and compare."""
    if engine.drafter == "none":
        raise UsageError("the demo compares a drafter with none; leave out --drafter none")
    prompts = DEMO_PROMPTS if prompt is None else (read_prompt(prompt, None, raw=False),)
    if sampling.seed is None:  # plain sampling can only repeat the text when both use one seed
        sampling = dataclasses.replace(sampling, seed=0)
    lm = load_model(engine)
    plain = lm.make_stepper("none")
    for stepper in (lm.stepper, plain):
        lm.generate(prompts[0], stepper=stepper, **values(dataclasses.replace(sampling, max_new_tokens=WARM_UP_TOKENS)))
    printer = Printer(show_drafts=wants_colour(sys.stdout))
    print(f"> {prompts[0]}", flush=True)
    runs: list[tuple[Completion, Completion]] = []
    for number, text in enumerate(prompts, 1):
        # Interleaved, so that a machine that slows down or speeds up treats both alike.
        drafted = collect(lm.stream(text, **values(sampling)), printer if number == 1 else show_nothing)
        if number == 1:
            print(flush=True)
            printer.legend()
        if drafted.finish_reason == "interrupted":
            raise KeyboardInterrupt
        notice(f"measuring {number} of {len(prompts)} ...")
        plainly = collect(lm.stream(text, stepper=plain, **values(sampling)), show_nothing)
        if plainly.finish_reason == "interrupted":
            raise KeyboardInterrupt
        runs.append((drafted, plainly))
    print(_comparison(runs), flush=True)


def _comparison(runs: Sequence[tuple[Completion, Completion]]) -> str:
    """One line that compares answers decoded with drafts and without, and says whether they are the same."""
    tokens, steps, seconds = totals(one.stats for one, _ in runs)
    plain_tokens, _, plain_seconds = totals(one.stats for _, one in runs)
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


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(demo)
