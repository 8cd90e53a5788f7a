"""Commands that make heads: `medusa distill`, `medusa train`, `medusa calibrate`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa.cli.options import Of, Only, with_options
from medusa.cli.progress import progress_shown
from medusa.errors import MedusaError, UsageError
from medusa.settings import (
    DistillSettings,
    Dtype,
    EngineSettings,
    HeadsKind,
    HeadsShape,
    OptimiserSettings,
    TextSettings,
    TrainingEngine,
    values,
)
from medusa.terminal import notice

NEEDED = {"yaml": "pyyaml", "pydantic": "pydantic", "accelerate": "accelerate"}

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON at the end.")]


@with_options
def distill(
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSONL file; one that is there is continued.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HUB-ID",
            help="What users say: a file (JSONL, CSV, Parquet, text; also .gz) or a data set; or the model invents it.",
            show_default=False,
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible server that runs the model (key: $OPENAI_API_KEY).",
            show_default=False,
        ),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="The model's name at the endpoint.", show_default="the same name")
    ] = None,
    slots: Annotated[int | None, Of(TrainingEngine, "slots")] = None,
    as_json: AsJson = False,
    *,
    text: Annotated[DistillSettings, Only("tokens", "turns", "max_answer_tokens", "temperatures", "top_p", "seed")],
    engine: Annotated[EngineSettings, Only("model", "backend", "dtype", "device", "threads")],
) -> None:
    """Let the model write training text: questions and its answers to them."""
    _need_extra()
    import medusa
    from medusa.models import zoo
    from medusa.training import distill as writing
    from medusa.training.text import SLOTS, read_prompt_file, shown_by, slots_that_fit

    with progress_shown() as reporter:
        asked = None if prompts is None else read_prompt_file(prompts, reporter.say)
        if endpoint is not None:
            from medusa.training.endpoint import distill_remotely

            written = distill_remotely(
                endpoint,
                engine.model,
                out,
                text,
                served_model=served_model or engine.model,
                prompts=asked,
                parallel=slots or SLOTS,
                on_progress=shown_by(reporter),
            )
        else:
            reporter.stage(f"Loading {engine.model}")
            shape = zoo.load_config(zoo.resolve(engine.model, in_place=True)).get_text_config()
            # What turns of the longest kind take, and as much again for a system prompt and long questions.
            length = 2 * text.turns * (text.max_user_tokens + text.max_answer_tokens)
            slots, length = slots_that_fit(shape, slots, length, engine.device, engine.dtype)
            engine = replace(engine, heads="none", drafter="none", num_slots=slots, max_length=length, progress=False)
            lm = medusa.load(**values(engine))
            reporter.stage("Writing")
            written = writing.distill(lm, out, text, prompts=asked, on_progress=shown_by(reporter))
        reporter.say(written.summary())
    if written.tokens < text.tokens:
        notice(f"The prompts ended before {text.tokens} tokens were written.")
    if as_json:
        print(json.dumps({"file": str(out), "conversations": written.rows, "tokens": written.tokens}))


@with_options
def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Any setting of run.yaml.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings, as run.yaml holds them.", show_default=False)
    ] = None,
    model: Annotated[str | None, Of(EngineSettings, "model")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Directory of the run.", show_default="medusa-MODEL")
    ] = None,
    data: Annotated[list[str] | None, Of(TextSettings, "data")] = None,
    prompts: Annotated[str | None, Of(TextSettings, "prompts")] = None,
    tokens: Annotated[int | None, Of(TextSettings, "tokens")] = None,
    epochs: Annotated[int | None, Of(OptimiserSettings, "epochs")] = None,
    max_steps: Annotated[int | None, Of(OptimiserSettings, "max_steps")] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Take as many tokens and epochs as fit: 2h, 90m, 1h30m.", show_default=False),
    ] = None,
    kind: Annotated[HeadsKind | None, Of(HeadsShape, "kind")] = None,
    from_heads: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="HEADS",
            help="Make parallel heads, which other engines run, for the model of these heads and from their text.",
            show_default=False,
        ),
    ] = None,
    train_base: Annotated[
        str | None, typer.Option(metavar="none|lora", help="Train the model too (Medusa-2).", show_default="none")
    ] = None,
    dtype: Annotated[Dtype | None, Of(TrainingEngine, "dtype")] = None,
    device: Annotated[str | None, Of(TrainingEngine, "device")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in DIR.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make heads for a model, from nothing but the model."""
    _need_extra()
    from medusa.training.accuracy import describe
    from medusa.training.budget import Budget, check_chosen, parse
    from medusa.training.config import load_config
    from medusa.training.parallel import check_fits, settings_from
    from medusa.training.resume import RUN_FILE
    from medusa.training.run import run_directory
    from medusa.training.run import train as run

    options: dict[str, Any] = {
        "model": model,
        "out": out,
        "text.data": data,
        "text.prompts": prompts,
        "text.tokens": tokens,
        "training.epochs": epochs,
        "training.max_steps": max_steps,
        "heads.kind": kind,
        "train_base": train_base,
        "engine.dtype": dtype,
        "engine.device": device,
    }
    if resume and config is None:  # what was asked for then, and what is asked for now
        there = run_directory(load_config(None, options, settings or [])) / RUN_FILE
        config = there if there.is_file() else None
    sections = None
    if from_heads is not None:
        if resume or config is not None:
            raise UsageError("--from begins a run: leave it out beside --config and --resume, whose run.yaml says all")
        sections = settings_from(from_heads, model, notice)
    wanted = load_config(config, options, settings or [], sections=sections)
    named = {"--tokens": tokens, "--prompts": prompts}
    if wanted.text.data and (ignored := [name for name, value in named.items() if value is not None]):
        raise UsageError(f"all of {wanted.text.data[0]} is learned from (--data): leave out {ignored[0]}")
    if from_heads is not None:
        check_fits(from_heads, wanted)
    limit = None
    if budget is not None:
        given = {name for name, value in options.items() if value is not None}
        given |= {setting.partition("=")[0] for setting in settings or []}
        check_chosen(given)
        limit = Budget(parse(budget), wanted.training.epochs if "training.epochs" in given else None)
    with progress_shown() as reporter:
        result = run(wanted, resume=resume, reporter=reporter, budget=limit)
    if not result.main:
        return
    if as_json:
        places = {"heads": result.heads, "model": result.model, "adapter": result.adapter}
        named = {name: str(path) for name, path in places.items() if path is not None}
        print(json.dumps({**named, "steps": result.steps, **result.accuracy.facts()}))
        return
    print(f"Learned from {result.tokens} tokens of {result.rows} conversations in {result.steps} steps.")
    print(f"On held-out text: {describe(result.accuracy)}.")
    for line in result.report:
        print(line)
    where = f"The heads are in {result.heads} ({result.size_bytes / 1e6:.1f} MB, {result.seconds / 60:.1f} min)."
    if result.adapter is not None:
        print(
            where, f"They belong to the model with the adapter in {result.adapter}: its README.md says how to use it."
        )
        return
    print(where, "Try:")
    print(f'    medusa generate "Why is the sky blue?" --model {result.model or wanted.model} --heads {result.heads}')


@with_options
def calibrate(
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|HUB-ID",
            help="Text that the heads have not learned from; may be repeated.",
            show_default="the model writes some",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure on.")] = 20_000,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Save the calibrated heads here.", show_default="where they are"),
    ] = None,
    times: Annotated[
        bool, typer.Option("--times", help="Measure only this machine, for --nodes auto; leave the heads alone.")
    ] = False,
    as_json: AsJson = False,
    *,
    engine: Annotated[EngineSettings, Only("model", "heads", "backend", "dtype", "device", "threads")],
) -> None:
    """Measure heads and this machine: the best tree, and how large it should be here."""
    if times:
        _measure_times(engine, as_json)
        return
    _need_extra()
    from medusa.training.accuracy import describe
    from medusa.training.calibrate import calibrate_heads

    with progress_shown() as reporter:
        result = calibrate_heads(engine, data=data or (), tokens=tokens, out=out, reporter=reporter)
    if as_json:
        print(json.dumps({"heads": str(result.heads), **result.accuracy.facts(), "nodes": result.best.nodes}))
        return
    print(f"{describe(result.accuracy)} ({result.accuracy.positions} positions).")
    for line in result.report:
        print(line)
    print(f"Tree and pictures are in {result.heads}.")


def _measure_times(engine: EngineSettings, as_json: bool) -> None:
    """Times of passes and drafts, measured anew and kept for `--nodes auto`."""
    import medusa

    with progress_shown() as reporter:
        reporter.stage("Loading")
        lm = medusa.load(**values(replace(engine, drafter="none", progress=False)))
        reporter.stage("Measuring this machine")
        found = lm.pass_times(refresh=True)
    sizes = {n: round(1e3 * found(n), 3) for n in (1, 2, 4, 8, 12, 16, 24, 32)}
    if as_json:
        print(json.dumps({"pass_ms": sizes, "draft_ms": round(1e3 * found.draft_seconds, 3)}))
        return
    print(
        f"A pass over {', '.join(map(str, sizes))} tokens takes {', '.join(f'{ms:.1f}' for ms in sizes.values())} ms;"
    )
    print(f"a draft of the heads {1e3 * found.draft_seconds:.1f} ms.")


def _need_extra() -> None:
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise MedusaError(f"{package} is not installed: pip install 'medusa-decode[train]'")


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (distill, train, calibrate):
        app.command()(command)
