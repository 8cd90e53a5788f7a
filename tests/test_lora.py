"""Medusa-2: what changes and what does not, the loss against a slow loop, resuming, and what is saved."""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import medusa
from medusa.cli import main
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.file import read_config
from medusa.heads.module import BaseWeights, Heads
from medusa.models import zoo
from medusa.training.config import TrainConfig
from medusa.training.data import Example
from medusa.training.export import save_adapter, save_model
from medusa.training.features import read_rows
from medusa.training.lora import CHECKPOINT, LoraProgress, LoraTrainer, Passage, compare
from medusa.training.objective import Losses, draft_labels
from medusa.training.trainer import InterruptedTrainingError, schedule
from test_train_run import SMALL
from test_train_run import save_model as save_base
from test_training import make_heads
from tiny_models import FAMILIES, VOCAB, make_model, make_tokenizer, plain_logits

K = 3
LAMBDA = 0.8
IDS = list(range(20, 50))


def examples(count: int = 6, seed: int = 0) -> list[Example]:
    """Texts of 20 to 30 tokens with two answers each, the first of which is short."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (20 + 10 * i // count,), generator=generator).tolist()
        found.append(Example(tuple(ids), ((4, 6), (10, len(ids))), f"text {i}"))
    return found


def make_trainer(
    directory: Path,
    *,
    model: PreTrainedModel | None = None,
    heads: Heads | None = None,
    text: list[Example] | None = None,
    tell: Callable[[LoraProgress], None] = lambda progress: None,
    facts: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **options: Any,
) -> LoraTrainer:
    config = TrainConfig(
        lora={"batch_size": 2, "epochs": 4, "rank": 4, "learning_rate": 1e-3, **options},  # type: ignore[arg-type]
        training={"precision": "float32", "save_every": 4, **(training or {})},  # type: ignore[arg-type]
    )
    return LoraTrainer(
        model or make_model(),
        heads or make_heads(),
        text or examples(),
        examples(2, seed=9),
        config,
        directory,
        facts=facts or {},
        on_progress=tell,
    )


def stirred(trainer: LoraTrainer, size: float = 0.05) -> LoraTrainer:
    """With adapters that are no longer the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.adapters.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return trainer


def own_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Without adapters, under the names that they had before."""
    found = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    return {name.replace(".base_layer.", "."): p for name, p in found.items()}


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing_and_merged_ones_are_the_adapted_model(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    lm_head = model.get_output_embeddings()
    before = plain_logits(model, IDS)
    base = BaseWeights(model.get_input_embeddings().weight, lm_head.weight)
    heads = Heads(HeadsConfig(hidden_size=32, vocab_size=VOCAB, num_heads=K), base)
    trainer = make_trainer(tmp_path, model=model, heads=heads)
    assert torch.equal(plain_logits(model, IDS), before)
    assert model.get_output_embeddings() is lm_head  # no adapter there
    layers = {name.split(".lora_")[0] for name in trainer.adapters}
    assert len(layers) == 3 * (4 if family in ("gpt2", "gpt_neox", "phi3") else 7)  # every other linear layer has one
    stirred(trainer)
    adapted = plain_logits(model, IDS)
    assert (adapted - before).abs().max() > 0.1
    with trainer.peft.disable_adapter():
        assert torch.equal(plain_logits(model, IDS), before)
    trainer.merge()
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert torch.allclose(plain_logits(model, IDS), adapted, atol=1e-3)


def test_features_are_those_that_the_backend_reads(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    backend = TransformersBackend(make_model(), feature_layers=(1,))
    for example, passage in zip(examples(), trainer._learned, strict=True):
        _, roots, _ = read_rows(backend, example)
        expected = backend.extend(0, example.token_ids, every=True)[1][
            passage.positions
        ]  # in float32, before they are kept
        logits, features = trainer._read(passage)
        assert torch.equal(passage.roots, roots)
        assert torch.allclose(features, expected, atol=1e-5)
        whole = plain_logits(backend.model, list(example.token_ids))
        assert torch.allclose(logits, whole[passage.positions], atol=1e-4)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_loss", "distillation", "draft_vocab"), [("kl", 0.0, 0), ("kl", 0.4, 40), ("ce", 0.0, 40), ("ce", 1.0, 0)]
)
def test_the_loss_and_its_gradient_are_those_of_a_slow_loop(
    base_loss: str, distillation: float, draft_vocab: int, tmp_path: Path
) -> None:
    heads = make_heads(draft_vocab)
    options: dict[str, Any] = {"training": {"distillation": distillation}, "base_loss": base_loss, "warmup": 0.5}
    trainer = stirred(make_trainer(tmp_path, heads=heads, text=examples(2), **options))
    trainer.step = 1
    weight = 0.2 * 2 / math.ceil(0.5 * trainer.steps)
    found_base, found_heads = trainer.accumulate(trainer._learned)
    parameters = {**trainer.adapters, **dict(trainer.heads.named_parameters())}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert gradients.keys() == parameters.keys()
    for parameter in parameters.values():
        parameter.grad = None

    frozen, heads = make_model(), trainer.heads
    ids = list(range(VOCAB)) if heads.draft_ids is None else heads.draft_ids.tolist()
    base: list[torch.Tensor] = []
    levels: list[list[torch.Tensor]] = [[] for _ in range(K)]
    for example in examples(2):
        text = torch.tensor([example.token_ids])
        out = trainer.base(input_ids=text, output_hidden_states=True)
        logits, hidden = out.logits[0], out.hidden_states
        log_p = plain_logits(frozen, list(example.token_ids)).log_softmax(-1)
        log_q = logits.log_softmax(-1)
        for start, end in example.spans:
            for t in range(start - 1, end - 1):
                if base_loss == "kl":
                    base.append((log_p[t].exp() * (log_p[t] - log_q[t])).sum())
                else:
                    base.append(-log_q[t, example.token_ids[t + 1]])
                features = torch.cat([hidden[1][0, t], hidden[-1][0, t]])[None]
                after = [example.token_ids[min(i, len(text[0]) - 1)] for i in range(t + 1, t + 1 + K)]
                guesses = heads(features, torch.tensor([after]))
                for k in range(1, K + 1):
                    if t + 1 + k >= end or example.token_ids[t + 1 + k] not in ids:
                        continue
                    log_head = guesses[k - 1][0].log_softmax(-1)
                    hard = -log_head[ids.index(example.token_ids[t + 1 + k])]
                    own = logits[t + k, ids].detach().log_softmax(-1)  # what the adapted model says there
                    soft = (own.exp() * (own - log_head)).sum()
                    levels[k - 1].append((1 - distillation) * hard + distillation * soft)
    means = [torch.stack(level).mean() for level in levels]
    loss = torch.stack(base).mean() + weight * sum(LAMBDA**k * mean for k, mean in enumerate(means, start=1))
    loss.backward()
    assert found_base == pytest.approx(float(torch.stack(base).mean().detach()), rel=1e-4)
    assert found_heads == pytest.approx([float(mean.detach()) for mean in means], rel=1e-4)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5), name


def test_the_heads_loss_reaches_the_adapters_through_middle_and_final_features(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    _, found = trainer.passage_losses(trainer._learned[0])
    found.sums.sum().backward()
    first = [p.grad for name, p in trainer.adapters.items() if "layers.0." in name and "lora_B" in name]
    assert all(grad is not None and bool(grad.abs().max() > 0) for grad in first)


def test_at_the_first_step_the_adapted_model_is_the_frozen_one(tmp_path: Path) -> None:
    seen: list[LoraProgress] = []
    make_trainer(tmp_path, tell=seen.append, max_steps=3).run()
    assert seen[0].base_loss == 0.0
    assert seen[1].base_loss > 0.0


def test_the_heads_weight_and_the_rates_rise_over_the_warm_up(tmp_path: Path) -> None:
    seen: list[LoraProgress] = []
    make_trainer(tmp_path, tell=seen.append, max_steps=10, warmup=0.4, heads_weight=0.2).run()
    assert [p.heads_weight for p in seen] == pytest.approx([0.05, 0.1, 0.15, 0.2, *[0.2] * 6])
    assert [p.learning_rate for p in seen[:5]] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert seen[-1].learning_rate < 1e-4


# --- training ---------------------------------------------------------------------------------------------------------


def test_only_adapters_and_heads_change(tmp_path: Path) -> None:
    given = make_heads()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    trainer = make_trainer(tmp_path, heads=given)
    adapters = {name: parameter.detach().clone() for name, parameter in trainer.adapters.items()}
    trainer.run()
    untouched = dict(make_model().named_parameters())
    weights = own_weights(trainer.base)
    assert weights.keys() == untouched.keys()
    assert all(torch.equal(weights[name], untouched[name]) for name in untouched)
    assert all(not torch.equal(parameter, adapters[name]) for name, parameter in trainer.adapters.items())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trainer.heads.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert torch.equal(trainer.heads.embedding, untouched["model.embed_tokens.weight"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_heads_loss_falls_while_the_model_stays_what_it_was(tmp_path: Path, precision: str) -> None:
    seen: list[LoraProgress] = []
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    trainer = make_trainer(
        tmp_path,
        model=make_model(dtype=dtype),
        tell=seen.append,
        epochs=10,
        heads_learning_rate=3e-3,
        training={"precision": precision},
    )
    trainer.run()
    assert len(seen) == 30
    assert sum(seen[-1].losses) < 0.8 * sum(seen[1].losses)
    assert seen[-1].base_loss < 0.2
    after = trainer.measure()
    assert after.perplexity == pytest.approx(trainer.before.perplexity, rel=0.25)
    assert after.perplexity != trainer.before.perplexity
    assert all(p.dtype == torch.float32 for p in (*trainer.adapters.values(), *trainer.heads.parameters()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_its_own_loss_holds_the_model_where_it_was(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same steps without it, the divergence from the frozen model on held-out text is about half."""
    passage_losses = LoraTrainer.passage_losses

    def heads_alone(self: LoraTrainer, passage: Passage) -> tuple[torch.Tensor, Losses]:
        base, found = passage_losses(self, passage)
        return 0 * base, found

    divergences = []
    for step in (passage_losses, heads_alone):
        monkeypatch.setattr(LoraTrainer, "passage_losses", step)
        model = make_model(dtype=getattr(torch, precision))
        options: dict[str, Any] = {"epochs": 10, "heads_learning_rate": 3e-3, "training": {"precision": precision}}
        trainer = make_trainer(tmp_path / step.__name__, model=model, **options)
        trainer.run()
        with torch.no_grad():
            divergences.append(sum(float(passage_losses(trainer, passage)[0]) for passage in trainer._held_out))
    assert 0 < divergences[0] < 0.7 * divergences[1]


def test_a_training_goes_on_with_more_epochs_and_other_rates(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, epochs=2)
    first.run()
    again = make_trainer(tmp_path, epochs=2)
    again.resume()
    assert again.standing().startswith("all 6 steps of Medusa-2 are done: more lora.epochs")
    rates: list[float] = []
    changed: dict[str, Any] = {"epochs": 3, "learning_rate": 5e-4, "warmup": 0.0, "training": {"weight_decay": 0.5}}
    further = make_trainer(tmp_path, tell=lambda p: rates.append(p.learning_rate), **changed)
    assert further.resume()
    assert further.standing() == "going on after step 6 of Medusa-2"
    further.run()
    assert further.step == further.steps == 9
    assert rates == pytest.approx([5e-4 * schedule(step, 9, 0.0) for step in range(6, 9)])
    assert [group["weight_decay"] for group in further._optimizer.param_groups] == [0.5, 0.5]
    assert further.before == first.before


@pytest.mark.parametrize("fast", [True, False])
def test_the_precision_follows_the_machine(fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast)
    found, named = (
        make_trainer(tmp_path / name, training={"precision": name}).passage_losses
        for name in ("auto", "bfloat16" if fast else "float32")
    )
    passage = make_trainer(tmp_path)._learned[0]
    assert torch.equal(found(passage)[1].sums, named(passage)[1].sums)


def test_what_is_learned_through_the_model_is_learned_better(tmp_path: Path) -> None:
    """Against heads alone, the same steps with adapters that cannot move."""
    losses = []
    for rate in (3e-3, 1e-12):
        seen: list[LoraProgress] = []
        make_trainer(tmp_path / str(rate), tell=seen.append, epochs=10, heads_weight=1.0, learning_rate=rate).run()
        losses.append(sum(seen[-1].losses))
    assert losses[0] < losses[1] - 0.1


@pytest.mark.parametrize("base_loss", ["kl", "ce"])
def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path, base_loss: str) -> None:
    whole = make_trainer(tmp_path / "whole", base_loss=base_loss)
    whole.run()

    class Killed(BaseException):
        pass

    deaths = {2, 5, 8, 10}

    def tell(progress: LoraProgress) -> None:
        if progress.step in deaths:
            deaths.discard(progress.step)
            raise Killed

    while True:
        run = make_trainer(tmp_path / "killed", tell=tell, base_loss=base_loss)
        run.resume()
        try:
            run.run()
            break
        except Killed:
            pass
    assert not deaths
    assert run.step == whole.step == whole.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(whole.adapters.values(), run.adapters.values(), strict=True))
    pairs = zip(whole.heads.parameters(), run.heads.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert run.before == whole.before
    again = make_trainer(tmp_path / "killed", base_loss=base_loss)
    assert again.resume()
    again.run()  # nothing is left to do
    assert again.measure() == whole.measure()


def test_a_signal_saves_before_it_stops(tmp_path: Path) -> None:
    def tell(progress: LoraProgress) -> None:
        if progress.step == 5:  # between two checkpoints
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedTrainingError, match="stopped at step 6 of 12 of Medusa-2; run the same command"):
        make_trainer(tmp_path, tell=tell).run()
    again = make_trainer(tmp_path)
    assert again.resume()
    assert again.step == 6


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    def spoil(progress: LoraProgress) -> None:
        if progress.step == 6:
            with torch.no_grad():
                next(iter(run.adapters.values()))[0, 0] = math.nan

    run = make_trainer(tmp_path, tell=spoil)
    with pytest.raises(MedusaError, match=r"not a number at step 7 of Medusa-2.*smaller lora.learning_rate"):
        run.run()
    again = make_trainer(tmp_path)
    assert again.resume()
    assert again.step == 4
    assert all(bool(torch.isfinite(parameter).all()) for parameter in again.adapters.values())
    with torch.no_grad():
        next(iter(again.adapters.values()))[0, 0] = math.nan
    again.save()
    third = make_trainer(tmp_path)
    third.resume()
    with pytest.raises(MedusaError, match=r"step 5 of Medusa-2, the first after .*its weights are spoilt; delete it"):
        third.run()


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    assert not make_trainer(tmp_path).resume()
    make_trainer(tmp_path, max_steps=1, facts={"text": "a"}).run()
    with pytest.raises(UsageError, match="belongs to a run with another text"):
        make_trainer(tmp_path, facts={"text": "b"}).resume()
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MedusaError, match="is damaged"):
        make_trainer(tmp_path, facts={"text": "a"}).resume()


def test_perplexity_is_that_of_the_labelled_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    terms = []
    for example in examples(2, seed=9):
        log_p = plain_logits(make_model(), list(example.token_ids)).log_softmax(-1)
        terms += [-log_p[t - 1, example.token_ids[t]] for start, end in example.spans for t in range(start, end)]
    assert trainer.before.perplexity == pytest.approx(math.exp(torch.stack(terms).mean()), rel=1e-4)
    labels = draft_labels(trainer.heads, torch.cat([p.tokens for p in trainer._held_out])[:, 1:])
    assert trainer.before.accuracy.positions == int((labels >= 0).all(1).sum())
    assert compare(trainer.before, trainer.before).startswith("held-out perplexity ")
    assert "(+0.0%); tokens per step at 16 nodes 1." in compare(trainer.before, trainer.before)


def test_a_model_whose_perplexity_is_no_number_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for scale in (1e6, math.nan):
        with torch.no_grad():
            trainer.base.get_output_embeddings().weight.mul_(scale)
        with pytest.raises(MedusaError, match=r"begin Medusa-2 anew with --resume and a smaller lora.learning_rate"):
            trainer.measure()


def test_without_peft_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MedusaError, match=r"pip install 'medusa-decode\[train\]'"):
        make_trainer(tmp_path)


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_a_saved_model_and_a_saved_adapter_are_the_adapted_model(tmp_path: Path) -> None:
    import peft

    trainer = stirred(make_trainer(tmp_path))
    adapted = plain_logits(trainer.base, IDS)
    make_model().save_pretrained(tmp_path / "base")
    save_adapter(trainer.peft, "some/model", tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/model"
    assert "lora.merge=true" in (tmp_path / "adapter" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():  # see with_adapters
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(plain_logits(loaded, IDS), adapted)

    (tmp_path / ".model-left").mkdir()  # by a run that was killed while it wrote
    trainer.merge()
    for _ in range(2):  # the second replaces the first
        save_model(trainer.base, make_tokenizer(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(plain_logits(loaded, IDS), plain_logits(trainer.base, IDS))
    assert torch.allclose(plain_logits(loaded, IDS), adapted, atol=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "model"}


def test_a_failed_export_is_one_sentence_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    save_model(model, make_tokenizer(), tmp_path / "model")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(MedusaError, match="No space left on device; make room and go on with --resume"):
        save_model(model, make_tokenizer(), tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_whole_run_leaves_a_model_and_heads_that_decode_losslessly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, out = save_base(tmp_path / "base"), tmp_path / "run"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    lora = ("lora.max_steps=4", "lora.learning_rate=1e-3", "lora.batch_size=2", "lora.epochs=4", "lora.rank=4")
    arguments = ["train", "--model", str(saved), "--out", str(out), "--train-base", "lora", *SMALL, *lora]
    assert run(*arguments, "lora.merge=false") == 0
    said = capfd.readouterr().out
    assert f"They belong to the model with the adapter in {out / 'adapter'}" in said
    assert "Medusa-2: held-out perplexity" in said
    assert not (out / "model").exists()
    assert run("train", "--out", str(out), "--resume", "lora.merge=true") == 0  # merges what is there
    said = capfd.readouterr().out
    assert f"--model {out / 'model'} --heads {out / 'heads'}" in said
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before

    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry.get("stage") == "lora"] == [1, 2, 3, 4]
    config = read_config(out / "heads")
    assert config.base_model.endswith("as adapted by Medusa-2 (../model)")
    assert config.training["lora"]["steps"] == 4
    assert read_config(out / "heads-frozen").training["steps"] == 8
    plain = AutoModelForCausalLM.from_pretrained(saved)
    adapted = AutoModelForCausalLM.from_pretrained(out / "model")
    assert not torch.equal(plain_logits(adapted, IDS), plain_logits(plain, IDS))
    assert adapted.generation_config.eos_token_id == plain.generation_config.eos_token_id
    lm = medusa.load(str(out / "model"), heads=str(out), dtype="float32", backend="transformers", nodes=6)
    drafted = lm.generate("What is it?", max_new_tokens=40)
    assert drafted.token_ids == lm.generate("What is it?", max_new_tokens=40, stepper=lm.make_stepper("none")).token_ids

    # A finished run goes on, here on a machine without bfloat16; but not with what it is built on.
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    dtypes: list[torch.dtype] = []
    load_model = zoo.load_model

    def loading(*arguments: Any, **options: Any) -> Any:
        dtypes.append(options["dtype"])
        return load_model(*arguments, **options)

    monkeypatch.setattr("medusa.models.zoo.load_model", loading)
    before = (out / "run.yaml").read_bytes()
    for assignment, told in (("lora.rank=8", "lora.rank=4, not 8"), ("training.epochs=9", "training.epochs=3, not 9")):
        assert run("train", "--out", str(out), "--resume", assignment) == 2
        assert told in capfd.readouterr().err
    assert (out / "run.yaml").read_bytes() == before
    assert run("train", "--out", str(out), "--resume", "lora.max_steps=6", "training.precision=auto") == 0
    assert dtypes == [torch.float32, torch.float32]  # what read the hidden states, and what is adapted
    assert read_config(out / "heads").training["lora"]["steps"] == 6


def test_several_processes_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    saved = save_base(tmp_path / "base")
    assert run("train", "--model", str(saved), "--out", str(tmp_path / "run"), "--train-base", "lora", *SMALL) == 2
    assert not (tmp_path / "run" / "run.yaml").exists()
