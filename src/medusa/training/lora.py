"""Medusa-2: heads and LoRA adapters of the model learn together, so that the model becomes easier to foresee.

https://arxiv.org/abs/2401.10774, section 2.2.2. The loss of a step, over whole conversations:

    mean over labelled tokens of KL(frozen model || adapted model), or of the text's cross-entropy
    + weight(step) * sum over heads k of lambda^k * the mean loss of head k

The frozen model is the adapted one with its adapters switched off, so there is one copy in memory. Heads read the
hidden states of the adapted model, and their gradient flows through them into the adapters; rows are those of
features.py. The heads have been trained alone before (trainer.py), and their weight rises from nothing, so that their
first errors do not upset the model.

Whatever ran the frozen model for Medusa-1, in however few bits, the model that is adapted is a copy of its own with
plain weights in the precision of the training; heads borrow embeddings and LM head from it from then on. It all runs in
one process.
"""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medusa.engines.transformers import accepts_logits_to_keep, capture_input
from medusa.errors import MedusaError
from medusa.heads.module import BaseWeights, Heads
from medusa.training.accuracy import Accuracy, ranks
from medusa.training.checkpoint import taking_up, write_checkpoint
from medusa.training.config import TrainConfig
from medusa.training.data import Example
from medusa.training.features import Batch, Table, labelled_rows, shuffled
from medusa.training.objective import Losses, draft_labels, head_weights, losses, teacher_logits
from medusa.training.precision import training_dtype
from medusa.training.trainer import (
    JUDGED_NODES,
    NO_LIMIT,
    InterruptedTrainingError,
    not_a_number,
    schedule,
    stop_signals,
    warm_up,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CHECKPOINT = "lora-checkpoint.pt"
LARGEST_LOSS = 700.0  # whose perplexity is still a number


@dataclass(frozen=True, slots=True)
class Quality:
    """Of model and heads on held-out text: perplexity of the labelled tokens, and the heads' accuracy."""

    perplexity: float
    accuracy: Accuracy


@dataclass(frozen=True, slots=True)
class LoraProgress:
    """Where the training stands; `base_loss` and `losses` (per head) are means over the tokens of the last step."""

    step: int
    steps: int
    base_loss: float
    losses: tuple[float, ...]
    heads_weight: float
    learning_rate: float  # of the adapters
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Passage:
    """One conversation as it is read: tokens [T] up to the last position that predicts something, the rows' positions
    [P], their runs as in `Table`, and what follows each, [P, 1 + K] as in `Batch`."""

    ids: Tensor
    positions: Tensor
    roots: Tensor
    ends: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, example: Example, heads: int) -> Passage:
        positions, roots, left = labelled_rows(example, len(example.token_ids))
        count = len(roots)
        ends = torch.arange(count, dtype=torch.int32) + left
        tokens = Table(torch.empty(count, 0), roots, ends).take(torch.arange(count), heads, 0, finals=False).tokens
        last = int(positions[-1]) + 1 if count else 0
        return cls(torch.tensor(example.token_ids[:last]), positions, roots, ends, tokens)

    def batch(self, features: Tensor, hidden_size: int, finals: bool = False) -> Batch:
        """All rows with their features [P, F*H], through which the gradient flows."""
        table = Table(features, self.roots, self.ends)
        return table.take(torch.arange(len(table)), self.tokens.shape[1] - 1, hidden_size, finals)


class LoraTrainer:
    """Trains adapters of `base` and `heads`.

    Args:
        base: a causal language model with plain weights. Adapters are put into it; its own weights do not change
            before `merge`.
        heads: trained for it; a copy that borrows from `base` is trained, see `self.heads`.
        learned, held_out: to learn from, and to measure.
        config: its sections `lora` and, for what both trainings share, `training`.
        directory, facts, on_progress: as in `Trainer`.

    Raises:
        MedusaError: peft is not installed, or there is nothing to learn from.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        heads: Heads,
        learned: Sequence[Example],
        held_out: Sequence[Example],
        config: TrainConfig,
        directory: Path,
        *,
        facts: Mapping[str, Any],
        on_progress: Callable[[LoraProgress], None] = lambda progress: None,
    ) -> None:
        self.config, self._lora, self._shared = config, config.lora, config.training
        self.base = base
        self.peft = with_adapters(base, self._lora.rank, self._lora.alpha, self._shared.seed)
        self.adapters = {name: p for name, p in base.named_parameters() if p.requires_grad}
        self._lm_head: Any = base.get_output_embeddings()
        weights = BaseWeights(cast(Tensor, base.get_input_embeddings().weight), self._lm_head.weight)
        self._device = weights.embedding.device
        self._dtype = training_dtype(self._shared.precision, self._device)
        self.heads = Heads(heads.config, weights, heads.draft_ids).to(self._device)
        self.heads.load_state_dict(heads.state_dict())
        ids = self.heads.draft_ids
        self._draft_lm_head = weights.lm_head if ids is None else weights.lm_head[ids.to(weights.lm_head.device)]
        self._keeps_some_logits = accepts_logits_to_keep(base)

        levels = heads.config.num_heads
        self._learned, self._held_out = (
            [p for p in (Passage.of(e, levels) for e in part) if len(p.roots)] for part in (learned, held_out)
        )
        if not self._learned or not self._held_out:
            raise MedusaError("there is nothing to learn from: no labelled token in the text")
        self.batch_size = min(self._lora.batch_size, len(self._learned))
        self.epoch_steps = len(self._learned) // self.batch_size
        self.steps = min(self._lora.epochs * self.epoch_steps, self._lora.max_steps or NO_LIMIT)
        self.step, self._resumed_at = 0, -1
        self._before: Quality | None = None
        self._directory, self._facts, self._on_progress = directory, dict(facts), on_progress
        self._rates = (self._lora.learning_rate, self._lora.heads_learning_rate)
        groups = zip((list(self.adapters.values()), list(self.heads.parameters())), self._rates, strict=True)
        self._optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for parameters, rate in groups],
            betas=(0.9, 0.95),
            weight_decay=self._shared.weight_decay,
        )

    # --- the run --------------------------------------------------------------------------------------------------

    @property
    def before(self) -> Quality:
        """Of the frozen model and the heads as they came; measured before the first step."""
        if self._before is None:
            if self.step:
                raise RuntimeError("the adapters have changed already")
            self._before = self.measure()
        return self._before

    def resume(self) -> bool:
        """Takes up the checkpoint in the directory; False where there is none. Raises as `taking_up`."""
        path = self._directory / CHECKPOINT
        if not path.is_file():
            return False
        names = ("adapters", "heads", "optimizer", "step", "before")
        with taking_up(path, self._facts, names) as parts, torch.no_grad():
            adapters, heads, optimizer, step, before = parts
            for name, parameter in self.adapters.items():
                parameter.copy_(adapters[name])
            self.heads.load_state_dict(heads)
            self._optimizer.load_state_dict(optimizer)
            self._before = Quality(before["perplexity"], Accuracy(**before["accuracy"]))
        for group in self._optimizer.param_groups:
            group["weight_decay"] = self._shared.weight_decay  # which may have changed
        self.step = self._resumed_at = step
        return True

    def standing(self) -> str:
        """After `resume`, for people: from where it continues."""
        if self.step >= self.steps:
            return f"all {self.steps} steps of Medusa-2 are done: more lora.epochs (or lora.max_steps) would go on"
        return f"going on after step {self.step} of Medusa-2"

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        content = {
            "adapters": {name: parameter.detach() for name, parameter in self.adapters.items()},
            "heads": self.heads.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "before": asdict(self.before),
        }
        write_checkpoint(self._directory / CHECKPOINT, self._facts, content)

    def run(self) -> None:
        """Trains up to the last step. Raises as `Trainer.run`."""
        if not self.step:
            self.save()  # with what was measured before
        started, tokens = time.perf_counter(), 0
        with stop_signals() as stopped:
            for passages in self._batches():
                base_loss, means = self._step(passages)
                tokens += sum(len(passage.roots) for passage in passages)
                self.step += 1
                stop, last = stopped.is_set(), self.step == self.steps
                if stop or last or self.step % self._shared.save_every == 0:
                    self.save()
                done = self.step - 1
                rate = self._rates[0] * schedule(done, self.steps, self._lora.warmup)
                speed = tokens / (time.perf_counter() - started)
                weight = self.heads_weight(done)
                self._on_progress(LoraProgress(self.step, self.steps, base_loss, means, weight, rate, speed))
                if stop:
                    raise InterruptedTrainingError(
                        f"stopped at step {self.step} of {self.steps} of Medusa-2; run the same command again with "
                        "--resume"
                    )

    # --- one step -------------------------------------------------------------------------------------------------

    def heads_weight(self, step: int) -> float:
        """Of the heads' loss in the update after `step` others. It rises linearly from 0, but is not 0 in the first:
        there the KL divergence has no gradient either, and AdamW would magnify rounding errors into a step."""
        return self._lora.heads_weight * warm_up(step, self.steps, self._lora.warmup)

    def _batches(self) -> Iterator[list[Passage]]:
        """The conversations of each step, from the one that comes next to the last."""
        for step in range(self.step, self.steps):
            epoch, place = divmod(step, self.epoch_steps)
            order = shuffled(len(self._learned), self._shared.seed, epoch)
            yield [self._learned[i] for i in order[place * self.batch_size :][: self.batch_size].tolist()]

    def _step(self, passages: Sequence[Passage]) -> tuple[float, tuple[float, ...]]:
        """One update of the weights; the model's own mean loss, and that of each head."""
        base_loss, means = self.accumulate(passages)
        parameters = [*self.adapters.values(), *self.heads.parameters()]
        norm = nn.utils.clip_grad_norm_(parameters, self._shared.clip)
        if not all(map(math.isfinite, (base_loss, *means, float(norm)))):
            path = self._directory / CHECKPOINT
            raise not_a_number(self.step, self._resumed_at, "lora.learning_rate", path, " of Medusa-2")
        factor = schedule(self.step, self.steps, self._lora.warmup)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return base_loss, means

    def accumulate(self, passages: Sequence[Passage]) -> tuple[float, tuple[float, ...]]:
        """Adds the gradient of the step's loss, one conversation at a time: no padding, and memory for one only.

        Sums are divided by the number of tokens of all conversations, so that each token weighs the same.
        """
        positions = sum(len(passage.roots) for passage in passages)
        labels = torch.cat([draft_labels(self.heads, p.tokens[:, 1:].to(self._device)) for p in passages])
        counts = (labels >= 0).sum(0).clamp_min(1)  # [K]
        weights = self.heads_weight(self.step) * head_weights(len(counts), self._shared.lambda_, self._device)
        base_total = torch.zeros((), device=self._device)
        totals = torch.zeros(len(counts), device=self._device)
        for passage in passages:
            base, of_heads = self.passage_losses(passage)
            (base / positions + (weights * of_heads.sums / counts).sum()).backward()
            base_total += base.detach()
            totals += of_heads.sums.detach()
        return float(base_total / positions), tuple((totals / counts).tolist())

    def passage_losses(self, passage: Passage) -> tuple[Tensor, Losses]:
        """Of one conversation, with gradient: the sum of the model's own loss over its rows, and the heads' losses."""
        logits, features = self._read(passage)
        roots = passage.roots.long().to(self._device)
        if self._lora.base_loss == "kl":
            with torch.no_grad(), self.peft.disable_adapter():
                frozen, _ = self._read(passage)
            own, adapted = torch.log_softmax(frozen, dim=-1), torch.log_softmax(logits, dim=-1)
            base = F.kl_div(adapted, own, log_target=True, reduction="sum")
        else:
            base = F.cross_entropy(logits, roots, reduction="sum")
        share = self._shared.distillation
        batch = passage.batch(features, self.base.config.get_text_config().hidden_size, finals=share > 0)
        tokens = batch.tokens.to(self._device)
        with self._autocast():
            levels = self.heads(batch.features.float(), tokens[:, :-1].clamp_min(0))
            teacher = None if batch.finals is None else teacher_logits(batch.finals, self._draft_lm_head)
        return base, losses(levels, draft_labels(self.heads, tokens[:, 1:]), teacher, share, self._shared.overlap)

    def _read(self, passage: Passage) -> tuple[Tensor, Tensor]:
        """One pass over a conversation: float32 logits [P, V] and features [P, F*H] of its rows."""
        rows = passage.positions.to(self._device)
        layers = self.heads.config.feature_layers
        options: dict[str, Any] = {"logits_to_keep": rows} if self._keeps_some_logits else {}
        with self._autocast(), capture_input(self._lm_head) as captured:
            out = self.base(
                input_ids=passage.ids[None].to(self._device),
                use_cache=False,
                output_hidden_states=bool(layers),
                **options,
            )
        logits, final = out.logits[0], captured[0][0]
        if not self._keeps_some_logits:
            logits, final = logits[rows], final[rows]
        middle = [out.hidden_states[i][0, rows].to(self._device) for i in layers]
        return logits.to(self._device).float(), torch.cat([*middle, final.to(self._device)], dim=-1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    # --- what came of it --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self) -> Quality:
        """Model and heads as they are now, on the held-out conversations. Raises MedusaError where the model's loss
        there is not a number."""
        total, tokens, tables = 0.0, 0, []
        size = self.heads.config.hidden_size
        for passage in self._held_out:
            logits, features = self._read(passage)
            total += float(F.cross_entropy(logits, passage.roots.long().to(self._device), reduction="sum"))
            tokens += len(passage.roots)
            tables.append(ranks(self.heads, [passage.batch(features, size)]))
        if not total / tokens < LARGEST_LOSS:  # NaN is not
            raise MedusaError(
                "the model's loss on held-out text is not a number, or so great that the model is spoilt: delete "
                f"{self._directory / CHECKPOINT} and begin Medusa-2 anew with --resume and a smaller lora.learning_rate"
            )
        return Quality(math.exp(total / tokens), Accuracy.of(torch.cat(tables)))

    def merge(self) -> None:
        """Adds the adapters to the weights of `base`, for good."""
        self.peft.merge_and_unload()


def with_adapters(base: PreTrainedModel, rank: int, alpha: float, seed: int) -> PeftModel:
    """Puts new LoRA adapters beside every linear layer but the LM head; they change nothing until they are trained.
    Raises MedusaError where peft is not installed."""
    need_peft()
    import peft
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    options = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # used as a factor only
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),  # GPT-2 keeps them transposed
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks by the name that transformers is about to drop; nothing that a caller could mend.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = peft.get_peft_model(base, options)
    return cast("PeftModel", model.eval())  # no dropout of the model's own: both passes must agree


def need_peft() -> None:
    """Raises MedusaError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MedusaError("--train-base lora needs peft: pip install 'medusa-decode[train]'")


def compare(before: Quality, after: Quality) -> str:
    """What training the model has cost and brought, in one line."""
    change = 100 * (after.perplexity / before.perplexity - 1)
    old, new = (quality.accuracy.expected_tokens(JUDGED_NODES) for quality in (before, after))
    return (
        f"held-out perplexity {before.perplexity:.2f} -> {after.perplexity:.2f} ({change:+.1f}%); "
        f"tokens per step at {JUDGED_NODES} nodes {old:.2f} -> {new:.2f}"
    )
