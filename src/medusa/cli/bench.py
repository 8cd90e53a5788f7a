"""Commands that measure: `medusa bench` and `medusa ablate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from medusa.cli.options import Only, load_model, options_of, with_options
from medusa.cli.progress import progress_shown
from medusa.errors import UsageError
from medusa.plots import need_matplotlib
from medusa.settings import AnswerSettings, EngineSettings, Sampling, values
from medusa.terminal import notice

if TYPE_CHECKING:
    from medusa.api import LanguageModel
    from medusa.evaluation.ablate import Variant
    from medusa.evaluation.methods import Method
    from medusa.evaluation.questions import Question
    from medusa.evaluation.report import Cells, Report

Kind = Literal["tree", "threshold", "heads", "nodes", "drafters", "batch"]
KINDS = get_args(Kind)
# What a run of each ablation asks, where nothing else is said: enough to see the shape in some minutes on two cores.
QUESTIONS = {"tree": 12, "threshold": 14, "heads": 20, "nodes": 20, "drafters": 24, "batch": 40}
TOKENS = {"tree": 64, "threshold": 128, "heads": 128, "nodes": 128, "drafters": 128, "batch": 128}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")  # what baselines have too
ENGINE = ("model", "heads", "backend", "dtype", "device", "threads", "nodes", "compile")  # all but who drafts

Questions = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSONL with question_id, category and turns, as MT-bench has it.",
        show_default="80 questions that come with Medusa",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Charts = Annotated[Literal["svg", "png"], typer.Option(help="Kind of the pictures.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the line of JSON alone.")]
DraftModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="A smaller model for speculative decoding, as another baseline.", show_default=False
    ),
]


@with_options
def bench(
    questions: Questions = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask so many, spread over the categories.", show_default="all")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each question.")] = 1,
    follow: Annotated[
        Literal["own", "plain"],
        typer.Option(help="Whose first answer a second turn follows on: each method's own, or that of plain decoding."),
    ] = "own",
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="plain, heads, heads-static, ngram, union, typical, rubbish; transformers, lookup, assisted, server.",
            show_default="plain,heads,ngram,union; with a temperature typical too",
        ),
    ] = None,
    draft_model: DraftModel = None,
    baseline_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="An OpenAI-compatible server, as another baseline.", show_default=False),
    ] = None,
    baseline_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name there.", show_default="the same name")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Answers, report and pictures.")] = Path("medusa-bench"),
    resume: Resume = False,
    charts: Charts = "svg",
    as_json: AsJson = False,
    *,
    engine: Annotated[EngineSettings, Only(*ENGINE)],
    sampling: Annotated[AnswerSettings, Only("max_new_tokens", *SAMPLING, "acceptance", "epsilon", "delta")],
) -> None:
    """Compare ways to decode, question by question, with plain decoding."""
    from medusa.evaluation import baselines as others
    from medusa.evaluation import bench as running
    from medusa.evaluation.methods import MEDUSA_METHODS, medusa_method
    from medusa.evaluation.questions import BUILT_IN, choose, read_questions

    if sampling.acceptance == "typical":
        raise UsageError("typical acceptance is a method here: --methods union,typical --temperature 0.7")
    need_matplotlib()
    chosen = Sampling(**values(sampling, Sampling) | {"seed": sampling.seed or 0})
    names = _method_names(methods, not chosen.greedy, draft_model, baseline_url)
    selected = choose(read_questions(questions or BUILT_IN), limit)
    how = running.BenchSettings(sampling.max_new_tokens, turns, follow)
    facts = {
        "questions": str(questions) if questions else "built in",
        **options_of(engine, ENGINE),
        **{name: getattr(chosen, name) for name in SAMPLING},
        **({"epsilon": sampling.epsilon, "delta": sampling.delta} if "typical" in names else {}),
        "max_new_tokens": sampling.max_new_tokens,
        "turns": turns,
        "follow": follow if turns > 1 else None,
        "draft_model": draft_model,
        "baseline_url": baseline_url,
        "baseline_model": baseline_model,
    }
    running.open_run(out, {"methods": names, **facts}, resume=resume)
    lm = _ready(engine)
    with ExitStack() as stack:
        options = others.BaselineOptions(
            engine.model, engine.dtype, engine.device, draft_model, baseline_url, baseline_model
        )
        loader = others.Baselines(lm, options, chosen, stack)
        if "heads" in names and lm.heads is None and methods is None:
            names.remove("heads")
        found: list[Method] = [
            medusa_method(name, lm, chosen) if name in MEDUSA_METHODS else loader.method(name) for name in names
        ]
        report = _run(lm, found, selected, how, out, facts)
    report.write(out, charts)
    _show(report.tables(), report.summary(), out, as_json=as_json)


@with_options
def ablate(
    kind: Annotated[
        Kind,
        typer.Argument(help="What is varied.", show_default=False),
    ],
    questions: Questions = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask so many, spread over the categories.", show_default="12 to 40")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens in one answer.", show_default="64 for tree, else 128")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="0; 0.7 for threshold")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of random trees.")] = 0,
    draft_model: DraftModel = None,
    judge_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="An OpenAI-compatible server that marks answers.", show_default=False),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="Its model.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Table and picture.", show_default="medusa-ablate-KIND")
    ] = None,
    resume: Resume = False,
    charts: Charts = "svg",
    as_json: AsJson = False,
    *,
    engine: EngineSettings,
) -> None:
    """Vary one thing: trees, the threshold of typical acceptance, heads, nodes, drafters, texts at once."""
    from medusa.evaluation import ablate as ablations
    from medusa.evaluation.questions import BUILT_IN, choose, read_questions

    need_matplotlib()
    if kind != "threshold" and (draft_model or judge_url):
        raise UsageError("--draft-model and --judge-url are for medusa ablate threshold")
    if bool(judge_url) != bool(judge_model):
        raise UsageError("a judge needs both --judge-url and --judge-model")
    default = EngineSettings()
    if kind in ("tree", "heads", "drafters") and (engine.drafter, engine.tree) != (default.drafter, default.tree):
        raise UsageError(f"medusa ablate {kind} sets --drafter and --tree itself: leave them out")
    if engine.drafter == "none":
        raise UsageError("an ablation compares drafts with none: leave out --drafter none")
    temperature = (0.7 if kind == "threshold" else 0.0) if temperature is None else temperature
    if kind == "threshold" and temperature == 0:
        raise UsageError("typical acceptance differs from greedy only above temperature 0")
    sampling = Sampling(temperature=temperature, seed=seed)
    tokens = max_new_tokens or TOKENS[kind]
    if kind == "batch" and tokens < 2:
        raise UsageError("texts at once are timed after their first token: --max-new-tokens must be at least 2")
    every = read_questions(questions or BUILT_IN)
    creative = [name for name in ablations.CREATIVE if any(question.category == name for question in every)]
    selected = choose(every, limit or QUESTIONS[kind], creative if kind == "threshold" else ())
    place = out or Path(f"medusa-ablate-{kind}")
    run = _Ablation(kind, engine, sampling, selected, tokens, place)
    run.open(resume, str(questions) if questions else "built in", draft_model)
    rows = run.batch() if kind == "batch" else run.variants(draft_model, judge_url, judge_model, charts)
    ablations.write_csv(place / f"{kind}.csv", rows)
    if kind != "drafters":  # whose picture is that of the benchmark
        ablations.draw(kind, rows, place / f"{kind}.{charts}")
    columns = {key: title for key, title in ablations.COLUMNS[kind].items() if any(key in row for row in rows)}
    _show({f"Ablation: {kind}": ablations.cells(rows, columns)}, {"kind": kind, "rows": rows}, place, as_json=as_json)


@dataclasses.dataclass(slots=True)
class _Ablation:
    """One call of `medusa ablate`."""

    kind: str
    engine: EngineSettings
    sampling: Sampling
    selected: Sequence[Question]
    tokens: int
    out: Path

    def _sampled(self) -> dict[str, Any]:
        return {"temperature": self.sampling.temperature, "seed": self.sampling.seed}

    def open(self, resume: bool, source: str, draft_model: str | None) -> None:
        from medusa.evaluation.bench import open_run

        facts = {
            "ablation": self.kind,
            "questions": source,
            "limit": len(self.selected),
            **options_of(self.engine, ENGINE),
            **self._sampled(),
            "max_new_tokens": self.tokens,
            "draft_model": draft_model,
        }
        if self.kind in ("threshold", "nodes", "batch"):
            tree = self.engine.tree
            if tree == "auto" and not self.engine.device.startswith("cuda"):
                tree = "dynamic"  # what it means, and what runs of before say
            facts |= {"drafter": self.engine.drafter, "tree": tree}
        open_run(self.out, facts, resume=resume)

    def variants(
        self, draft_model: str | None, judge_url: str | None, judge_model: str | None, charts: str
    ) -> list[dict[str, Any]]:
        """All ablations that are benchmarks."""
        from medusa.evaluation import ablate as ablations
        from medusa.evaluation import baselines as others
        from medusa.evaluation.bench import BenchSettings

        lm = _ready(self.engine)
        with ExitStack() as stack:
            if self.kind == "threshold":
                options = others.BaselineOptions(self.engine.model, self.engine.dtype, self.engine.device, draft_model)
                loader = others.Baselines(lm, options, self.sampling, stack)
                baselines = [loader.method(name) for name in ("transformers", "assisted")] if draft_model else []
                variants = ablations.threshold_variants(lm, self.sampling, baselines)
            elif self.kind == "tree":
                variants = ablations.tree_variants(lm, self.sampling)
            else:
                makers: dict[str, Callable[[LanguageModel, Sampling], list[Variant]]] = {
                    "heads": ablations.heads_variants,
                    "nodes": ablations.nodes_variants,
                    "drafters": ablations.drafters_variants,
                }
                variants = makers[self.kind](lm, self.sampling)
            how = BenchSettings(self.tokens)
            methods = [variant.method for variant in variants]
            report = _run(
                lm, methods, self.selected, how, self.out, {**options_of(self.engine, ENGINE), **self._sampled()}
            )
        quality: dict[str, dict[str, Any]] = {}
        if self.kind == "threshold":
            quality = _quality(lm, report.rows, self.selected, judge_url, judge_model)
        if self.kind == "drafters":
            report.write(self.out, charts)
        return ablations.table(variants, report.overall.__getitem__, lambda name: quality.get(name, {}))

    def batch(self) -> list[dict[str, Any]]:
        """Texts side by side, with drafts and without."""
        from medusa.evaluation import ablate as ablations
        from medusa.evaluation.batch import compare_loads
        from medusa.evaluation.methods import PLAIN, first_prompt

        prompts_and_answers = 2048  # positions of a slot; a longer prompt is left out
        slots = max(ablations.BATCH_SIZES)
        lm = _ready(self.engine, num_slots=slots, max_length=prompts_and_answers)
        prompts = [first_prompt(lm, question) for question in self.selected]
        prompts = [prompt for prompt in prompts if len(prompt) + self.tokens <= lm.backend.max_length]
        if not prompts:
            raise UsageError("every question is too long for this ablation")
        steppers = {PLAIN: lm.make_stepper("none"), "medusa": lm.stepper}
        with _bar("texts side by side") as on_progress:
            loads = compare_loads(
                lm,
                steppers,
                prompts,
                ablations.BATCH_SIZES,
                max_new_tokens=self.tokens,
                sampling=self.sampling,
                on_progress=on_progress,
            )
        return ablations.batch_rows(loads)


# --- what the two share -----------------------------------------------------------------------------------------------


def _method_names(wanted: str | None, sampled: bool, draft_model: str | None, url: str | None) -> list[str]:
    """The methods to run, plain decoding first. Raises UsageError for an unknown one, or one named twice."""
    from medusa.evaluation.baselines import BASELINES
    from medusa.evaluation.methods import MEDUSA_METHODS, PLAIN

    if wanted is None:
        names = [PLAIN, "heads", "ngram", "union", *(["typical"] if sampled else [])]
        names += ["transformers", "assisted"] if draft_model else []
        return names + (["server"] if url else [])
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = [*MEDUSA_METHODS, *BASELINES]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown method {name}: use some of {', '.join(known)}")
    return [PLAIN, *(name for name in dict.fromkeys(names) if name != PLAIN)]


def _ready(engine: EngineSettings, **options: Any) -> LanguageModel:
    """The model, and the times of this machine as it is now."""
    lm = load_model(engine, **options)
    if engine.nodes == "auto":
        lm.pass_times(refresh=True)
    return lm


def _run(
    lm: LanguageModel,
    methods: Sequence[Method],
    selected: Sequence[Question],
    how: Any,
    out: Path,
    facts: dict[str, Any],
) -> Report:
    from medusa.decoding.stepper import Request
    from medusa.evaluation.bench import check_place, run_bench
    from medusa.evaluation.machine import SAME, describe_machine, what_is_measured
    from medusa.evaluation.methods import first_prompt
    from medusa.evaluation.report import Report

    for question in selected:
        try:
            Request(first_prompt(lm, question), max_new_tokens=how.max_new_tokens).check(lm.backend.max_length)
        except UsageError as error:
            raise UsageError(f"question {question.id}: {error}") from None
    machine = describe_machine(lm)
    check_place(out, {**{name: machine[name] for name in SAME}, **what_is_measured(lm, selected)})
    with _bar("questions") as on_progress:
        rows = run_bench(methods, selected, how, out, on_progress)
    settings = {**facts, "backend": lm.backend.name, "max_new_tokens": how.max_new_tokens}
    return Report(rows, [method.name for method in methods], settings, machine)


def _quality(
    lm: LanguageModel,
    rows: Sequence[dict[str, Any]],
    selected: Sequence[Question],
    judge_url: str | None,
    judge_model: str | None,
) -> dict[str, dict[str, Any]]:
    """Perplexity, variety and repetition of each variant's answers, and a judge's mark where there is one."""
    from medusa.evaluation.quality import measure

    with ExitStack() as stack:
        client = None
        if judge_url:
            from medusa.remote import openai_client

            client = stack.enter_context(openai_client(judge_url))
        with _bar("answers measured") as on_progress:
            return measure(lm, rows, {question.id: question for question in selected}, client, judge_model, on_progress)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    with progress_shown() as shown:
        shown.stage(f"Measuring: {what}")
        yield lambda done, total: shown.progress(done, total, what)


def _show(tables: dict[str, Cells], summary: dict[str, Any], out: Path, *, as_json: bool) -> None:
    from medusa.evaluation.report import rich_table

    if not as_json:
        from rich.console import Console

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
        for title, cells in tables.items():
            console.print(rich_table(title, cells))
            console.print()
        notice(f"Report, figures and pictures are in {out}.")
    print(json.dumps(summary), flush=True)


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (bench, ablate):
        app.command()(command)
