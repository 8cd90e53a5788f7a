"""Training on a GPU's terms, on the CPU: rows that stay on the device, losses that are read late, limits of time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from medusa.engines.protocol import MAX_NODES
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads.file import read_config, write_config
from medusa.heads.module import Heads
from medusa.settings import OptimiserSettings
from medusa.steppers import on_one_gpu
from medusa.training import text as training_text
from medusa.training import trainer as training_trainer
from medusa.training.accuracy import Accuracy, ranks
from medusa.training.compare import compare
from medusa.training.config import TrainConfig
from medusa.training.data import Example
from medusa.training.device_features import BATCH_TOKENS, DeviceFeatures, batched, read_table, tokens_at_once
from medusa.training.distill import write_in_order
from medusa.training.features import Rows, count_rows, joined, read_rows
from medusa.training.resume import check_resumed
from medusa.training.stored_features import FeatureCache
from medusa.training.talk import Transcript
from medusa.training.text import slots_that_fit
from medusa.training.text_file import TextFile
from medusa.training.trainer import CHECKPOINT, Progress, Trainer, schedule
from test_train_run import SMALL, save_model
from test_train_run import run as run_command
from test_training import K, examples, make_heads
from tiny_models import make_model

FAMILIES = ("llama", "mistral", "gemma3", "gpt2")


def backend(family: str = "llama", **options: Any) -> TransformersBackend:
    return TransformersBackend(make_model(family), feature_layers=(1,), **options)


def odd_examples() -> list[Example]:
    """With one that has nothing to learn from, one that begins with an answer and one that is longer than a slot."""
    ids = tuple(range(3, 153))
    return [*examples(), Example(ids[:20], (), ""), Example(ids[:9], ((0, 9),), ""), Example(ids, ((90, 150),), "")]


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
def test_texts_that_are_read_together_give_the_rows_of_texts_read_one_by_one(family: str, batch_tokens: int) -> None:
    runner = backend(family, max_length=120)
    found = read_table(runner, odd_examples(), batch_tokens)
    expected = joined([read_rows(runner, example) for example in odd_examples()])
    assert torch.equal(found.roots, expected.roots)
    assert torch.equal(found.ends, expected.ends)
    assert found.features.dtype == torch.bfloat16
    assert torch.allclose(found.features.float(), expected.features.float(), atol=1e-3, rtol=1e-2)
    assert all(runner.length(slot) == 0 for slot in range(runner.num_slots))


def test_texts_of_like_length_are_read_together() -> None:
    lengths = [5, 0, 100, 7, 6, 90]
    groups = list(batched(lengths, 200))
    assert groups == [[0, 4, 3], [5, 2]]
    assert list(batched(lengths, 1)) == [[0], [4], [3], [5], [2]]  # one that is longer is read alone


@pytest.mark.parametrize("room_bytes", [1 << 30, 150 * 2 * 64, 1])
def test_every_row_comes_once_an_epoch_however_many_find_room(room_bytes: int) -> None:
    rows = DeviceFeatures(backend(), examples(), room_bytes)
    assert rows.kept == (room_bytes == 1 << 30)
    assert rows.num_rows == sum(count_rows(e, 256) for e in examples())
    orders = []
    for epoch in range(2):
        batches = list(rows.batches(K, 1, seed=3, epoch=epoch, finals=True))
        orders.append([(tuple(b.tokens[0].tolist()), b.features[0].sum().item()) for b in batches])
        assert len(orders[-1]) == rows.num_rows
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    again = DeviceFeatures(backend(), examples(), room_bytes).batches(K, 1, seed=3, epoch=1, start=17)
    assert [tuple(b.tokens[0].tolist()) for b in again] == [tokens for tokens, _ in orders[1][17:]]
    assert [len(b.tokens) for b in rows.batches(K, 100, seed=3, epoch=0)] == [100] * (rows.num_rows // 100)


@pytest.mark.parametrize("room_bytes", [1 << 30, 150 * 2 * 64])
def test_heads_are_as_good_by_rows_on_the_device_as_by_those_on_disk(room_bytes: int, tmp_path: Path) -> None:
    heads = make_heads()
    cache = FeatureCache.build(tmp_path, backend(), examples(), {})
    rows = DeviceFeatures(backend(), examples(), room_bytes)
    expected = torch.cat([batch.tokens for batch in cache.in_order(K, 64)])
    assert torch.equal(torch.cat([batch.tokens for batch in rows.in_order(K, 64)]), expected)
    found, wanted = (Accuracy.of(ranks(heads, r.in_order(K, 64))) for r in (rows, cache))
    assert found.top[10] == pytest.approx(wanted.top[10], abs=0.01)
    assert found.positions == wanted.positions


def test_slots_are_given_back_and_there_are_others() -> None:
    runner = backend(num_slots=5)
    runner.extend(4, [5, 6, 7])
    logits, features = backend().extend(0, [5, 6, 7])
    runner.resize(2)
    assert runner.num_slots == 2
    assert [runner.length(slot) for slot in range(2)] == [0, 0]
    again = runner.extend(1, [5, 6, 7])
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], features)
    with pytest.raises(UsageError):
        runner.resize(0)


def test_a_cpu_is_no_gpu() -> None:
    assert on_one_gpu(backend()) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_without_making_them(family: str) -> None:
    model = make_model(family)
    total = sum(p.numel() for p in model.parameters())
    sizes = {
        dtype: training_text.weight_bytes(model.config, dtype) for dtype in ("float32", "bfloat16", "int8", "int4")
    }
    assert (sizes["float32"], sizes["bfloat16"]) == (4 * total, 2 * total)
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # which are not packed
    assert sizes["int4"] == int(0.6 * (total - sum(p.numel() for p in ends)) + 2 * sum(p.numel() for p in ends))
    assert sizes["int4"] < sizes["int8"] < sizes["bfloat16"]


def test_a_pass_reads_no_more_than_its_hidden_states_have_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = backend()
    assert tokens_at_once(runner) == BATCH_TOKENS
    monkeypatch.setattr(runner, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    size, config = runner.hidden_size, runner.model.config
    token = 2 * (size * (runner.num_layers + 8) + 3 * config.intermediate_size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 300 * token + 10, 0))
    assert tokens_at_once(runner) == 300


def test_a_gpu_is_asked_for_more_slots_and_its_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = make_model().config
    place = 2 * 2 * 3 * 2 * 8
    assert slots_that_fit(shape, None, 100) == (24, 100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training_text, "weight_bytes", lambda shape, dtype: 0)
    monkeypatch.setattr(training_text, "free_memory", lambda device: 10_000 * place * (100 + MAX_NODES))
    assert slots_that_fit(shape, None, 100, "cuda") == (1024, 100)
    assert slots_that_fit(shape, 7, 100, "cuda") == (7, 100)
    monkeypatch.setattr(training_text, "free_memory", lambda device: 300 * place * (100 + MAX_NODES))
    assert slots_that_fit(shape, None, 100, "cuda:0") == (300, 100)
    # The weights are not there yet when slots are counted.
    monkeypatch.setattr(training_text, "weight_bytes", lambda shape, dtype: 200 * place * (100 + MAX_NODES))
    assert slots_that_fit(shape, None, 100, "cuda:0") == (180, 100)
    assert slots_that_fit(shape, None, 100) == (24, 100)


# --- the trainer ------------------------------------------------------------------------------------------------------


def trainer(
    rows: Rows,
    held_out: FeatureCache | DeviceFeatures,
    directory: Path,
    *,
    heads: Heads | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> Trainer:
    config = OptimiserSettings(**{"batch_size": 32, "epochs": 3, "save_every": 400, "learning_rate": 3e-3, **options})
    heads = heads or make_heads()
    accelerator = Accelerator(cpu=True)
    return Trainer(
        heads, heads.lm_head, rows, held_out, config, directory, accelerator=accelerator, facts={}, on_progress=tell
    )


def device_rows() -> tuple[DeviceFeatures, DeviceFeatures]:
    return DeviceFeatures(backend(), examples()), DeviceFeatures(backend(), examples(3, seed=9))


@pytest.mark.parametrize("distillation", [0.0, 1.0])
def test_heads_learn_the_same_from_rows_on_the_device(
    distillation: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[tuple[float, ...]]] = []
    cached = tuple(
        FeatureCache.build(tmp_path / str(n), backend(), e, {}) for n, e in enumerate([examples(), examples(3, seed=9)])
    )
    for rows, held in (device_rows(), cached):
        losses: list[tuple[float, ...]] = []
        told.append(losses)
        run = trainer(
            rows, held, tmp_path / str(len(told)), tell=lambda p, to=losses: to.append(p.losses),  # type: ignore[misc]
            distillation=distillation,
        )  # fmt: skip
        run.run()
    assert torch.allclose(torch.tensor(told[0]), torch.tensor(told[1]), rtol=0.01)


def test_losses_that_are_read_late_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, held = device_rows()
    told: list[list[Progress]] = [[], []]
    first = trainer(rows, held, tmp_path / "first", tell=told[0].append)
    first.run()
    late = trainer(rows, held, tmp_path / "late", tell=told[1].append, save_every=6)
    late._read_every = 4
    late.run()
    for (name, a), (_, b) in zip(first.heads.state_dict().items(), late.heads.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    steps = [p.step for p in told[1]]
    epoch = first.epoch_steps
    assert steps == [s for s in range(1, first.steps + 1) if s % 4 == 0 or s % 6 == 0 or s % epoch == 0]
    by_step = {p.step: p.losses for p in told[0]}
    assert all(p.losses == by_step[p.step] for p in told[1])


def test_a_loss_that_is_read_late_and_is_no_number_is_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, held = device_rows()
    run = trainer(rows, held, tmp_path, save_every=5, epochs=9)
    run._read_every = 50
    real, count = training_trainer.losses, iter(range(1, 1000))

    def failing(*args: Any) -> Any:
        found = real(*args)
        return type(found)(found.sums * (torch.nan if next(count) == 7 else 1.0), found.counts)

    monkeypatch.setattr(training_trainer, "losses", failing)
    with pytest.raises(MedusaError, match="the loss is not a number at step 7: what was saved before is kept"):
        run.run()
    assert run.state.step == 10  # where it would have been saved
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert saved["state"]["step"] == 5
    assert all(bool(t.isfinite().all()) for t in saved["heads"].values() if t.is_floating_point())


def test_time_that_is_over_ends_the_training_with_a_measured_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of a second a step; the limit is 10 of the steps of 3 epochs. The rate has fallen to nothing by then."""
    clock = [0.0]
    monkeypatch.setattr(training_trainer.time, "perf_counter", lambda: clock[0])
    rates: list[float] = []
    real = training_trainer.losses

    def slow(*args: Any) -> Any:
        clock[0] += 1
        return real(*args)

    monkeypatch.setattr(training_trainer, "losses", slow)

    def tell(progress: Progress) -> None:
        rates.append(progress.learning_rate)

    rows, held = device_rows()
    run = trainer(rows, held, tmp_path, tell=tell, seconds=10)
    assert run.steps > 20
    run.run()
    assert run.state.step == 10
    assert run.state.history[-1]["step"] == 10
    steps = run.steps
    wanted = [3e-3 * schedule(max(s, min(steps - 1, int(s / 10 * steps))), steps, 0.05) for s in range(10)]
    assert rates == pytest.approx(wanted)
    assert rates[-1] < 0.05 * max(rates)
    again = trainer(rows, held, tmp_path, tell=tell, seconds=10)
    assert again.resume()
    assert "its time is over at step 10" in again.standing()
    again.run()
    assert again.state.step == 10
    more = trainer(rows, held, tmp_path, tell=tell, seconds=15)
    assert more.resume()
    more.run()
    assert more.state.step == 15


# --- limits of time ---------------------------------------------------------------------------------------------------


def test_writing_ends_when_its_time_is_over_with_all_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversation 1 is long: those after it wait for their turn in the file."""
    clock = [0.0]
    monkeypatch.setattr("medusa.training.distill.time.perf_counter", lambda: clock[0])

    def talks(start: int, spent: Callable[[int], None]) -> Any:
        for number in (n for n in range(start, 100) if n != 1):
            clock[0] += 1.0
            says = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "It is."}]
            yield number, Transcript(0.0, says, list(range(20)), [(0, 20)], spent=20)

    path = tmp_path / "text.jsonl"
    written = write_in_order(TextFile(path, {}), 10**6, talks, lambda _: None, endless=True, seconds=6)
    numbers = [json.loads(line)["number"] for line in path.read_text().splitlines()]
    assert numbers == [0, 2, 3, 4, 5, 6]
    assert written.tokens == 120
    write_in_order(TextFile(path, {}), 160, talks, lambda _: None, endless=True)
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [*numbers, 7, 8]


def test_limits_of_time_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).touch()
    before = TrainConfig()
    after = before.model_copy(update={"training": OptimiserSettings(seconds=5)})
    check_resumed(tmp_path, before, after)


# --- the whole run ----------------------------------------------------------------------------------------------------


def test_a_run_on_a_gpu_leaves_what_any_run_leaves_but_no_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands for it. Heads are then measured beside each other, on the rows of the run."""
    for module in ("run", "device_talk", "calibrate"):
        monkeypatch.setattr(f"medusa.training.{module}.on_one_gpu", lambda backend: backend)
    model, out = save_model(tmp_path / "model"), tmp_path / "run"
    assert run_command("train", "--model", str(model), "--out", str(out), *SMALL, "log=[]", "text.seconds=100") == 0
    assert not (out / "features").exists()
    config = read_config(out / "heads")
    assert config.training["steps"] == 8
    assert config.tree
    written = (out / "text.jsonl").read_bytes()
    found = compare(out, [out / "heads"])
    facts, told = found[str(out / "heads")], config.training["held_out"]
    assert facts["positions"] == told["positions"]
    assert facts["tokens_per_step"] == pytest.approx(told["tokens_per_step"], abs=0.05)  # saved in bfloat16
    assert json.loads((out / "compared.json").read_text()) == json.loads(json.dumps(found))
    again = run_command("train", "--config", str(out / "run.yaml"), "--resume", "training.max_steps=12")
    assert again == 0
    assert read_config(out / "heads").training["steps"] == 12
    assert (out / "text.jsonl").read_bytes() == written
    other = read_config(out / "heads")
    write_config(replace(other, feature_layers=(2,)), out / "heads")
    with pytest.raises(UsageError, match=r"reads layers \(2,\), those of .* \(1, 2\): compare heads"):
        compare(out, [out / "heads"])
