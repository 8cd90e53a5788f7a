"""Medusa-1: heads learn from cached features, the model stays frozen and is not even needed.

Step s is a function of the seed and s alone, so a run that is killed continues from its last checkpoint as if nothing
had happened; with `training.seconds` it is one of the clock too. Several processes (`accelerate launch`) take every
n-th row of each batch and share gradients.

On a GPU the host runs ahead: it reads losses every READ_EVERY steps, and before anything is measured, saved or
reported. So one that is not a number is noticed late, but before it could spoil what is saved.
"""

from __future__ import annotations

import ctypes
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medusa.errors import MedusaError
from medusa.heads.module import Heads
from medusa.settings import OptimiserSettings
from medusa.training.accuracy import Accuracy, ranks
from medusa.training.checkpoint import taking_up, write_checkpoint
from medusa.training.features import Batch, MeasuredRows, Rows
from medusa.training.objective import draft_labels, head_weights, losses, teacher_logits
from medusa.training.precision import training_dtype

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint.pt"
JUDGED_NODES = 16  # early stopping looks at the tokens per step of this tree
EVALUATION_ROWS = 1024
READ_EVERY = 50  # steps between two looks at a GPU
NO_LIMIT = 2**63 - 1


class InterruptedTrainingError(MedusaError):
    """SIGTERM or Ctrl-C: the checkpoint is written."""


@dataclass(slots=True)
class Progress:
    """Where the training stands; `losses` are per head, of the last step. `accuracy` is new after an evaluation."""

    step: int
    steps: int
    losses: tuple[float, ...] = ()
    learning_rate: float = 0.0
    positions_per_second: float = 0.0
    accuracy: Accuracy | None = None


@dataclass(slots=True)
class State:
    """What a checkpoint holds besides weights and optimiser. `best` is the weights of the best evaluation."""

    step: int = 0
    best_score: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    bad_evaluations: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry an evaluation
    precision: str = ""  # in which the last step was computed
    seconds: float = 0.0  # of training, where they are limited


class Trainer:
    """Trains `heads` on `rows`.

    Args:
        heads: on any device; float32 parameters.
        lm_head: the model's LM head rows of the draft vocabulary [V', H], for distillation.
        rows, held_out: to learn from, and to measure.
        config: see OptimiserSettings.
        directory: where checkpoints go.
        facts: what must be the same for a run to continue from a checkpoint.
        on_progress: called after each step.
    """

    def __init__(
        self,
        heads: Heads,
        lm_head: Tensor,
        rows: Rows,
        held_out: MeasuredRows,
        config: OptimiserSettings,
        directory: Path,
        *,
        accelerator: Accelerator,
        facts: Mapping[str, Any],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.config = config
        self.heads = heads.to(accelerator.device)
        self.held_out = held_out
        self.rows = rows
        self.state = State()
        self.dtype = training_dtype(config.precision, accelerator.device)
        self._resumed_at = -1
        self._lm_head = lm_head.to(self.dtype)  # once, not at each step
        self._directory = directory
        self._accelerator = accelerator
        self._facts = dict(facts)
        self._on_progress = on_progress
        self.batch_size = min(config.batch_size, rows.num_rows)
        if self.batch_size < 1:
            raise MedusaError("there is nothing to learn from: no labelled token in the training text")
        self.epoch_steps = rows.num_rows // self.batch_size
        self.steps = min(config.epochs * self.epoch_steps, config.max_steps or NO_LIMIT)
        for parameter in heads.parameters():
            parameter.requires_grad_(True)
        gpu = accelerator.device.type == "cuda"
        self._read_every = READ_EVERY if gpu else 1
        self._spoilt = torch.full((), NO_LIMIT, device=accelerator.device)  # the first step whose loss is no number
        self._begun: tuple[float, float] | None = None  # when the run began, with so many seconds behind it
        self._optimizer = torch.optim.AdamW(
            heads.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True if accelerator.device.type in ("cuda", "cpu") else None,
        )
        self._module = accelerator.prepare_model(heads)

    # --- the run --------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Takes up the checkpoint in the directory; False where there is none. Raises as `taking_up`."""
        path = self._directory / CHECKPOINT
        if not path.is_file():
            return False
        with taking_up(path, self._facts, ("heads", "optimizer", "state")) as (weights, optimizer, state):
            self.heads.load_state_dict(weights)
            self._optimizer.load_state_dict(optimizer)
            self.state = State(**state)
        for group in self._optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay  # which may have changed
        self._resumed_at = self.state.step
        return True

    @property
    def precision(self) -> str:
        """In which the steps are computed."""
        return str(self.dtype).removeprefix("torch.")

    def standing(self) -> str:
        """After `resume`, for people: from where it continues, and what has changed."""
        step = self.state.step
        if step >= self.steps:
            return f"all {self.steps} steps are done: more training.epochs (or training.max_steps) would go on"
        if self._out_of_time():
            return f"its time is over at step {step} of {self.steps}: a greater training.seconds would go on"
        if self._stopped_early():
            return f"early stopping has ended the training at step {step}: a greater training.patience would go on"
        text = f"going on after step {step}"
        if self.state.precision not in ("", self.precision):
            text += f", in {self.precision}; it was {self.state.precision} until here"
        return text

    def _stopped_early(self) -> bool:
        return bool(self.config.patience) and self.state.bad_evaluations >= self.config.patience

    def run(self) -> None:
        """Trains up to the last step, or until evaluations stop getting better; `heads` hold the best weights then.

        Raises:
            MedusaError: the loss is no longer a number; the last good checkpoint stays.
            InterruptedTrainingError: SIGTERM or Ctrl-C, after saving.
        """
        state, config = self.state, self.config
        every = config.eval_every or self.epoch_steps
        started, first = time.perf_counter(), state.step
        self._begun = started, state.seconds
        last = self._out_of_time()
        with stop_signals() as stopped:
            for batch in self._batches():
                if state.step >= self.steps or last or (config.patience and self._any(self._stopped_early())):
                    break
                rate_now = self._learning_rate(state.step)
                means = self._step(batch, rate_now)
                state.step += 1
                state.precision = self.precision
                last = state.step == self.steps or self._any(self._out_of_time())
                stop = self._any(stopped.is_set())
                measure = state.step % every == 0 or last
                save = state.step % config.save_every == 0 or measure or stop
                if not save and state.step % self._read_every:
                    continue
                self._check()
                rate = (state.step - first) * self.batch_size / (time.perf_counter() - started)
                progress = Progress(state.step, self.steps, tuple(means.tolist()), rate_now, rate)
                if measure:
                    progress.accuracy = self._evaluate()
                if save:
                    self.save()
                self._on_progress(progress)
                if stop:
                    raise InterruptedTrainingError(
                        f"stopped at step {state.step} of {self.steps}; run the same command again with --resume"
                    )
        if state.best:
            self.heads.load_state_dict(state.best)

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        if not self._accelerator.is_main_process:
            return
        if self.config.seconds is not None:
            self.state.seconds = self._seconds()
        content = {
            "heads": self.heads.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "state": {name: getattr(self.state, name) for name in State.__dataclass_fields__},
        }
        write_checkpoint(self._directory / CHECKPOINT, self._facts, content)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        """From the step that comes next to the end of the last epoch."""
        epoch, start = divmod(self.state.step, self.epoch_steps)
        while epoch < self.config.epochs:
            yield from self.rows.batches(
                self.heads.config.num_heads,
                self.batch_size,
                seed=self.config.seed,
                epoch=epoch,
                start=start,
                finals=self.config.distillation > 0,
            )
            epoch, start = epoch + 1, 0

    def _step(self, batch: Batch, learning_rate: float) -> Tensor:
        """One update of the weights; the mean loss of each head [K], on the device, which may not be done with it."""
        accelerator, config = self._accelerator, self.config
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        tokens = batch.tokens[mine].to(accelerator.device)
        teacher = None
        half = self.dtype == torch.bfloat16
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=half):
            logits = self._module(batch.features[mine].to(accelerator.device).float(), tokens[:, :-1].clamp_min(0))
            if batch.finals is not None:
                teacher = teacher_logits(batch.finals[mine].to(accelerator.device), self._lm_head)
        of_heads = losses(logits, draft_labels(self.heads, tokens[:, 1:]), teacher, config.distillation, config.overlap)
        # Over all processes; gradients are averaged over them, so each one's share is multiplied by their number.
        counts = accelerator.reduce(of_heads.counts, "sum").clamp_min(1)
        weights = head_weights(len(counts), config.lambda_, counts.device)
        loss = (weights * of_heads.sums / counts).sum() * accelerator.num_processes
        means = accelerator.reduce(of_heads.sums.detach(), "sum") / counts
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self._module.parameters(), config.clip)
        good = torch.isfinite(torch.cat([means, norm[None]])).all()
        self._spoilt = torch.where(good, self._spoilt, self._spoilt.clamp_max(self.state.step))
        if self._read_every == 1:
            self._check()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return torch.as_tensor(means)

    def _check(self) -> None:
        """Waits for the device. Raises MedusaError where a loss was no number."""
        if (step := int(self._spoilt)) < NO_LIMIT:
            raise not_a_number(step, self._resumed_at, "training.learning_rate", self._directory / CHECKPOINT)

    def _learning_rate(self, step: int) -> float:
        """For the update after `step` others; with little time, for the one that would be as far with enough of it."""
        share = 0.0
        if self.config.seconds:
            share = self._seconds() / self.config.seconds
            if self._accelerator.num_processes > 1:  # one rate for all: gradients are shared, weights are not
                share = float(self._accelerator.reduce(torch.tensor(share, device=self._accelerator.device), "mean"))
        at = max(step, min(self.steps - 1, int(share * self.steps)))
        return self.config.learning_rate * schedule(at, self.steps, self.config.warmup)

    def _seconds(self) -> float:
        """Of training up to now, earlier runs included."""
        if self._begun is None:
            return self.state.seconds
        started, before = self._begun
        return before + time.perf_counter() - started

    def _out_of_time(self) -> bool:
        return self.config.seconds is not None and self._seconds() >= self.config.seconds

    def _any(self, flag: bool) -> bool:
        """Whether it is set in any process: all must leave the loop at the same step."""
        if self._accelerator.num_processes == 1:
            return flag
        return bool(self._accelerator.reduce(torch.tensor(float(flag), device=self._accelerator.device), "sum") > 0)

    def _evaluate(self) -> Accuracy:
        """Measures the heads on held-out text and remembers the best."""
        state = self.state
        self.heads.eval()
        accuracy = Accuracy.of(ranks(self.heads, self.held_out.in_order(self.heads.config.num_heads, EVALUATION_ROWS)))
        self.heads.train()
        score = accuracy.expected_tokens(JUDGED_NODES)
        state.history.append({"step": state.step, **accuracy.facts()})
        if score > state.best_score:
            state.best_score, state.bad_evaluations = score, 0
            state.best = {name: tensor.detach().cpu().clone() for name, tensor in self.heads.state_dict().items()}
        else:
            state.bad_evaluations += 1
        return accuracy


def not_a_number(step: int, resumed_at: int, rate: str, checkpoint: Path, part: str = "") -> MedusaError:
    """For a loss or a gradient, in the update after `step` others. `rate` is the setting to make smaller."""
    problem = f"the loss is not a number at step {step + 1}{part}"
    if step == resumed_at:  # nothing was learned in between, so the weights were spoilt before
        return MedusaError(
            f"{problem}, the first after {checkpoint}: its weights are spoilt; delete it and begin anew with --resume "
            f"and a smaller {rate}"
        )
    return MedusaError(f"{problem}: what was saved before is kept; go on with --resume and a smaller {rate}")


def keep_freed_memory() -> None:
    """Makes the C library keep the megabytes that each step frees, instead of giving them back to the system and asking
    for them again page by page; a quarter of the time of a step on a CPU. Elsewhere than on glibc nothing happens."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the greatest there is
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def warm_up(step: int, steps: int, share: float) -> float:
    """Rises linearly over that share of the steps, for the update after `step` others; then 1."""
    warm = math.ceil(share * steps)
    return min(1.0, (step + 1) / warm) if warm else 1.0


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate for the update after `step` others: it rises over the warm-up and falls by a
    cosine to zero."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return warm_up(step, steps, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """SIGTERM and the first Ctrl-C ask for a stop after the step at hand; a second Ctrl-C stops at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
