"""A training run from nothing but a model to heads that work: write text, read features, train, calibrate, report.

    OUT/run.yaml          every setting; `medusa train --config` takes it
    OUT/text.jsonl        what the model wrote (with its model, settings and seed in each row)
    OUT/features/         hidden states, but for a GPU's, which stay there; may be deleted when the run is over
    OUT/checkpoint.pt     where training stands
    OUT/log.jsonl         losses and evaluations
    OUT/heads/            the result: config.json, heads.safetensors, run.yaml, pictures

and where the base is trained too (Medusa-2):

    OUT/heads-frozen/     the heads of Medusa-1, for the model as it was
    OUT/lora-checkpoint.pt
    OUT/model/            the adapted model, which OUT/heads belong to; or OUT/adapter/, its adapters alone

A run that was killed continues with `--resume`, from wherever it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import medusa
from medusa.api import LanguageModel
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.files import write_whole
from medusa.heads.config import HeadsConfig, vocabulary_hash
from medusa.heads.file import WEIGHTS_FILE
from medusa.heads.module import Heads
from medusa.models import zoo
from medusa.settings import BackendSettings, HeadsSettings, HeadsShape, values
from medusa.steppers import on_one_gpu
from medusa.training.accuracy import Accuracy, ranks
from medusa.training.budget import Budget
from medusa.training.calibrate import speed_report
from medusa.training.config import TrainConfig, load_config
from medusa.training.data import Example
from medusa.training.device_features import DeviceFeatures
from medusa.training.export import ADAPTER_DIR, MODEL_DIR, save_adapter, save_model, write_heads
from medusa.training.features import LiveFeatures, MeasuredRows, Rows, count_rows, longest_answer
from medusa.training.forecast import Forecast
from medusa.training.lora import CHECKPOINT as LORA_CHECKPOINT
from medusa.training.lora import LoraProgress, LoraTrainer, compare, need_peft
from medusa.training.precision import SLOW, has_bfloat16
from medusa.training.resume import RUN_FILE, TEXT_FILE, check_resumed, fixed_settings
from medusa.training.run_log import RunLog, trackers
from medusa.training.stored_features import FEATURES_DIR, FeatureCache, FeatureStore
from medusa.training.text import (
    Reporter,
    Silent,
    frequent_tokens,
    keeps_features,
    read_text,
    slots_that_fit,
    split,
    text_digest,
    write_text,
)
from medusa.training.trainer import CHECKPOINT, EVALUATION_ROWS, Trainer, keep_freed_memory

DEFAULT_DRAFT_VOCAB = 8192
OUTPUTS = (FEATURES_DIR, "heads", "heads-frozen", MODEL_DIR, ADAPTER_DIR)  # directories that a run makes anew
# What some families do with the logits of their LM head.
LOGIT_RULES = ("logits_scaling", "logit_scale", "final_logit_softcapping")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run; `report` are lines for people. `main` is False in all processes but one."""

    heads: Path
    accuracy: Accuracy
    steps: int
    rows: int  # conversations learned from
    tokens: int  # of answers in them
    seconds: float
    size_bytes: int
    report: tuple[str, ...]
    model: Path | None = None  # where the base was trained too and merged
    adapter: Path | None = None  # where it was trained and is not merged
    main: bool = True


def run_directory(config: TrainConfig) -> Path:
    """OUT: as configured, or named after the model."""
    name = re.sub(r"[^\w.-]+", "-", config.model.rstrip("/").split("/")[-1]).removesuffix(".gguf")
    return Path(config.out or f"medusa-{name}").expanduser()


def open_run(config: TrainConfig, resume: bool, whole: bool = True) -> Path:
    """Makes the directory of a run with its run.yaml, unless `config` is not yet `whole`; or checks that the run in it
    can continue with `config`: its run.yaml then stays as it is, for `train` to write once all else is checked too.

    Raises:
        UsageError: a run is there already and is not to be resumed, or there is none to resume, or what it has done so
            far came of other settings; or what a run would write is there, and not of a run.
    """
    out = run_directory(config)
    path = out / RUN_FILE
    if path.is_file():
        if any(child.name != RUN_FILE for child in out.iterdir()):  # more than a first, mistaken call
            if not resume:
                raise UsageError(f"{out} holds a run already: add --resume to go on with it, or name another --out")
            before = load_config(path, {})
            if before.model != config.model:
                raise UsageError(f"{out} holds a run of {before.model}, not of {config.model}: name another --out")
            check_resumed(out, before, config)
            return out
    elif resume:
        raise UsageError(f"there is no run in {out} to resume: leave out --resume")
    elif taken := [name for name in OUTPUTS if (out / name).exists()]:  # a run would replace it
        raise UsageError(f"{out} holds {taken[0]!r}, which is not of a run: name another --out")
    out.mkdir(parents=True, exist_ok=True)
    if whole:
        write_whole(path, config.dump())
    return out


def train(config: TrainConfig, *, resume: bool = False, reporter: Reporter, budget: Budget | None = None) -> Result:
    """The whole run. A `budget` chooses how many tokens and epochs.

    Raises:
        UsageError, MedusaError: see the stages. InterruptedTrainingError: asked to stop; all that was done is saved.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    started = time.perf_counter()
    check_settings(config)
    accelerator = Accelerator(
        cpu=config.engine.device == "cpu",
        log_with=trackers(config.log) or None,  # of none accelerate would warn
        project_dir=run_directory(config),
        # The others wait for the first, which writes the text and reads the features.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    main, lora = accelerator.is_main_process, config.train_base == "lora"
    if lora:
        need_peft()
        if accelerator.num_processes > 1:
            raise UsageError("Medusa-2 runs in one process: train with --train-base none, or without accelerate launch")
    if budget is not None:
        budget.check(config, resume, accelerator.num_processes)
    if main:
        open_run(config, resume, whole=budget is None)
    else:
        reporter = Silent()
    out = run_directory(config)
    reporter.stage("Loading")
    lm = load_model(config)
    shape = heads_shape(config, lm)
    check_distillation(config, lm)
    if config.training.precision == "bfloat16" and not has_bfloat16(accelerator.device):
        reporter.say(SLOW)
    # A text that was cut short by the clock is whole once something has learned from it.
    written = config.text.seconds is not None and (out / CHECKPOINT).is_file()
    alone = accelerator.num_processes == 1
    gpu = on_one_gpu(lm.backend) if alone else None
    forecast = Forecast(lm, shape, out, gpu, accelerator.device, alone, reporter, budget, started)
    if main and not config.text.data:
        config = forecast.told(config)
        if not written:
            store = open_store(config, lm) if keeps_features(config.training, lm.backend) else None
            write_text(config.text, lm, out / TEXT_FILE, reporter, store)
    if gpu is not None:
        gpu.resize(1)  # the memory is for what heads learn from
    accelerator.wait_for_everyone()
    sources = config.text.data or (str(out / TEXT_FILE),)
    learned, held_out = split(read_text(sources, lm, config.text.max_length, reporter.say), config.text.held_out)
    check_held_out(held_out, shape.num_heads, lm.backend.max_length)
    if main and config.text.data:
        config = forecast.told(config, (learned, held_out))
    run = Run(config, lm, out, learned, held_out, resume, reporter)
    if main:
        write_whole(out / RUN_FILE, config.dump())  # what holds from here on; all that can be wrong with it is checked
        if gpu is None:
            run.read_features()
    accelerator.wait_for_everyone()
    rows, held_out_rows = run.features(gpu)
    config = forecast.with_what_is_left(config, sum(count_rows(e, lm.backend.max_length) for e in held_out))
    heads, lm_head = run.new_heads(shape)
    reporter.stage("Training")
    keep_freed_memory()
    log = RunLog(accelerator, out / "log.jsonl", config, reporter)
    trainer = Trainer(
        heads,
        lm_head,
        rows,
        held_out_rows,
        config.training,
        out,
        accelerator=accelerator,
        facts=run.checkpoint_facts(CHECKPOINT),
        on_progress=log.heads,
    )
    tokens = sum(end - start for example in learned for start, end in example.spans)
    report: tuple[str, ...] = ()
    adapted = None
    try:
        if resume and trainer.resume() and not (out / LORA_CHECKPOINT).is_file():
            reporter.say(trainer.standing())
        trainer.run()
        accuracy = Accuracy.of(ranks(heads, held_out_rows.in_order(shape.num_heads, EVALUATION_ROWS)))
        training = {
            "run": config.model_dump(mode="json", by_alias=True),
            "conversations": len({example.where for example in learned}),
            "tokens": tokens,
            "text_sha256": text_digest([*learned, *held_out]),
            "steps": trainer.state.step,
            "precision": trainer.state.precision or trainer.precision,
            "processes": accelerator.num_processes,
            "held_out": accuracy.facts(),
            "medusa": medusa.__version__,
        }
        if main:
            heads.config = replace(heads.config, tree=accuracy.tree, training=training)
            write_heads(heads, accuracy, out / ("heads-frozen" if lora else "heads"), config)
        if lora:
            accuracy, line, adapted = run.adapt(heads, trainer.dtype, log.lora)
            report = (f"Medusa-2: {line}.",)
    finally:
        log.close()
    if main:
        reporter.stage("Measuring this machine")
        report = (*report, *speed_report(accuracy, lm.pass_times()))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Result(
        heads=out / "heads",
        accuracy=accuracy,
        steps=trainer.state.step,
        rows=len(learned),
        tokens=tokens,
        seconds=time.perf_counter() - started,
        size_bytes=(out / "heads" / WEIGHTS_FILE).stat().st_size,
        report=report,
        model=adapted if config.lora.merge else None,
        adapter=None if config.lora.merge else adapted,
        main=main,
    )


# --- what can be wrong, before it costs time -----------------------------------------------------------------------


def check_settings(config: TrainConfig) -> None:
    """Raises UsageError for settings that cannot go together, or that this machine cannot follow."""
    if config.training.overlap and not config.training.distillation:
        raise UsageError(
            "training.overlap takes the place of a part of the KL: set training.distillation=1 too, or leave it out"
        )
    if config.text.data:
        return
    longest, levels = config.text.max_answer_tokens, config.heads.num_heads
    if longest <= levels:
        raise UsageError(
            f"text.max_answer_tokens must be at least {levels + 1}, not {longest}: that is how far heads.num_heads="
            f"{levels} look"
        )


def check_distillation(config: TrainConfig, lm: LanguageModel) -> None:
    """Raises UsageError where the model's own distribution is more than a softmax of its LM head's products."""
    if not config.training.distillation:
        return
    settings = zoo.load_config(zoo.resolve(config.model, in_place=True)).get_text_config()
    rules = [name for name in LOGIT_RULES if getattr(settings, name, None) not in (None, 1)]
    lm_head = getattr(getattr(lm.backend, "model", None), "lm_head", None)
    if getattr(lm_head, "bias", None) is not None:
        rules.append("a bias of the LM head")
    if rules:
        raise UsageError(
            f"the logits of {config.model} go through {rules[0]}, which the KL to them does not know: "
            "set training.distillation=0"
        )


def check_held_out(examples: Sequence[Example], num_heads: int, max_length: int) -> None:
    """Raises MedusaError where no answer is long enough to measure all heads on: not even the best of several
    evaluations could be told then."""
    longest = longest_answer(examples, max_length)
    if longest <= num_heads:
        raise MedusaError(
            f"the longest held-out answer has {longest} tokens, and it takes {num_heads + 1} to measure {num_heads} "
            "heads: train on longer answers, or take fewer heads (heads.num_heads)"
        )


# --- the stages -----------------------------------------------------------------------------------------------------


def load_model(config: TrainConfig) -> LanguageModel:
    """The frozen model, with a slot for each conversation that is written side by side."""
    engine = config.engine
    shape = zoo.load_config(zoo.resolve(config.model, in_place=True)).get_text_config()
    slots = engine.slots if not config.text.data else 1
    slots, length = slots_that_fit(shape, slots, config.text.max_length, engine.device, engine.dtype)
    return medusa.load(
        config.model,
        heads="none",
        drafter="none",
        **values(engine, BackendSettings),
        num_slots=slots,
        max_length=length,
        feature_layers=feature_layers(config.heads, shape.num_hidden_layers),
        progress=False,
    )


def feature_layers(options: HeadsSettings, num_layers: int) -> tuple[int, ...]:
    """The middle layers that heads read: a third and two thirds of the way up, where nothing else is asked for."""
    if options.feature_layers is not None:
        return options.feature_layers
    return tuple(layer for layer in (num_layers // 3, 2 * num_layers // 3) if layer > 0)


def open_store(config: TrainConfig, lm: LanguageModel) -> FeatureStore:
    """Where hidden states of this model, as it runs here, are kept."""
    facts = {
        "model": config.model,
        # others by now, maybe, under the same name
        "weights": zoo.weights_version(zoo.resolve(config.model, in_place=True)),
        "feature_layers": feature_layers(config.heads, lm.backend.num_layers),
        **lm.runs_on(),
    }
    return FeatureStore(run_directory(config) / FEATURES_DIR, facts)


def heads_shape(config: TrainConfig, lm: LanguageModel) -> HeadsConfig:
    """Of the heads that the settings ask for. Raises UsageError where there are no such heads."""
    options, source = config.heads, zoo.resolve(config.model, in_place=True)
    vocab, size = lm.backend.base_weights().embedding.shape
    draft_vocab = min(DEFAULT_DRAFT_VOCAB, vocab) if options.draft_vocab is None else options.draft_vocab
    return HeadsConfig(
        hidden_size=size,
        vocab_size=vocab,
        **values(options, HeadsShape),
        draft_vocab=0 if draft_vocab >= vocab else draft_vocab,
        mlp_width=2 * size if options.mlp_width is None else options.mlp_width,
        feature_layers=feature_layers(options, lm.backend.num_layers),
        base_model=source.hub_id or source.name,
        vocab_hash=vocabulary_hash(lm.tokenizer.get_vocab()),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """The stages that begin once the text is there, with what they share."""

    config: TrainConfig
    lm: LanguageModel
    out: Path
    learned: Sequence[Example]
    held_out: Sequence[Example]
    resume: bool
    reporter: Reporter

    def read_features(self) -> None:
        """Hidden states to disk, where they are not there yet; of the held-out text always, of the rest unless they are
        to be computed as needed."""
        self.reporter.stage("Reading hidden states")
        started = time.perf_counter()

        def on_progress(done: int, count: int) -> None:
            self.reporter.progress(done, count, f"{done / (time.perf_counter() - started):.1f} texts/s")

        examples = [*self.held_out, *(self.learned if self.config.training.cache_features else ())]
        open_store(self.config, self.lm).read_missing(self.lm.backend, examples, on_progress)

    def features(self, gpu: TransformersBackend | None) -> tuple[Rows, MeasuredRows]:
        """To learn from, and to measure: kept on a GPU, read from the disk, or computed as needed."""
        if gpu is not None:
            self.reporter.stage("Reading hidden states")
            held_out = DeviceFeatures(gpu, self.held_out)  # first: what is learned from takes a share of what is left
            return DeviceFeatures(gpu, self.learned), held_out
        store, backend = FeatureStore(self.out / FEATURES_DIR), self.lm.backend
        measured = FeatureCache(store, self.held_out, backend.hidden_size)
        if self.config.training.cache_features:
            return FeatureCache(store, self.learned, backend.hidden_size), measured
        return LiveFeatures(backend, self.learned), measured

    def new_heads(self, shape: HeadsConfig) -> tuple[Heads, Tensor]:
        """New heads, and the rows of the model's LM head for the tokens that they can guess."""
        base, count = self.lm.backend.base_weights(), shape.draft_vocab
        always = self.lm.eos_token_ids
        ids = frequent_tokens(self.learned, shape.vocab_size, count, always) if count else None
        torch.manual_seed(self.config.training.seed)
        return Heads(shape, base, ids), base.lm_head if ids is None else base.lm_head[ids.to(base.lm_head.device)]

    def checkpoint_facts(self, *files: str) -> dict[str, Any]:
        """What must be the same for a run to continue from a checkpoint: the settings that are fixed by it, but the
        text's own content in the place of where it came from."""
        fixed = fixed_settings(self.config, *files)
        settings = {name: value for name, value in fixed.items() if not name.startswith("text.")}
        return {**settings, "model": self.config.model, "text": text_digest(self.learned)}

    def adapt(
        self, heads: Heads, dtype: torch.dtype, on_progress: Callable[[LoraProgress], None]
    ) -> tuple[Accuracy, str, Path]:
        """Medusa-2 (see lora.py): trains the model by adapters, in `dtype`, on with `heads`, and writes both. Returns
        how good the heads are then, what it has cost and brought in a line, and the directory of model or adapters."""
        config, reporter = self.config, self.reporter
        reporter.stage("Loading the model to be adapted")
        trainer = LoraTrainer(
            zoo.load_model(zoo.resolve(config.model), dtype=dtype, device=config.engine.device),
            heads,
            self.learned,
            self.held_out,
            config,
            self.out,
            facts=self.checkpoint_facts(CHECKPOINT, LORA_CHECKPOINT),
            on_progress=on_progress,
        )
        reporter.stage("Training model and heads")
        if self.resume and trainer.resume():
            reporter.say(trainer.standing())
        trainer.run()
        reporter.stage("Measuring model and heads")
        directory = self.out / (MODEL_DIR if config.lora.merge else ADAPTER_DIR)
        name = heads.config.base_model
        if config.lora.merge:
            trainer.merge()  # before measuring: the report is of the weights that are saved, rounding and all
        after = trainer.measure()
        if config.lora.merge:
            save_model(trainer.base, self.lm.tokenizer, directory)
        else:
            save_adapter(trainer.peft, name, directory)
        figures = {"steps": trainer.step, "perplexity": [trainer.before.perplexity, after.perplexity]}
        trainer.heads.config = replace(
            heads.config,
            base_model=f"{name} as adapted by Medusa-2 (../{directory.name})",
            tree=after.accuracy.tree,
            training={**heads.config.training, "held_out": after.accuracy.facts(), "lora": figures},
        )
        write_heads(trainer.heads, after.accuracy, self.out / "heads", config)
        return after.accuracy, compare(trainer.before, after), directory
