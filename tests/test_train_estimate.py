"""What `medusa train` tells before it starts, and how a budget fits a run to a time; speeds are given, not measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig
from medusa.settings import OptimiserSettings, TextSettings
from medusa.training import budget as budgets
from medusa.training import speeds as measured
from medusa.training.budget import Budget, check_chosen, fitted, fitted_to_text, parse, with_what_is_left
from medusa.training.config import TrainConfig, load_config
from medusa.training.data import Example
from medusa.training.estimate import (
    END,
    ONE_EPOCH,
    Place,
    Speeds,
    Work,
    check_disk,
    disk_bytes,
    expected_gain,
    gain_told,
    memory_bytes,
    parameters,
    told,
    work_of,
)
from medusa.training.run import heads_shape, load_model
from test_train_run import SMALL, run, save_model
from tiny_models import make_model

SHAPE = HeadsConfig(kind="recurrent", hidden_size=8, vocab_size=100, feature_layers=(1, 2), mlp_width=4)
SPEEDS = Speeds(written=500.0, read=1000.0, step=0.1, judged=2000.0)
GB = 10**9


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how much of the disk is free."""

    def say(count: int) -> None:
        monkeypatch.setattr("medusa.training.estimate.shutil.disk_usage", lambda path: SimpleNamespace(free=count))

    say(100 * GB)
    return say


def place(out: Path, **changes: Any) -> Place:
    return replace(Place(out, SHAPE, slots=4, max_length=512), **changes)


def config(**training: Any) -> TrainConfig:
    options = {"epochs": 2, "batch_size": 100, **training}
    return TrainConfig(text=TextSettings(tokens=10_000, held_out=0.1), training=OptimiserSettings(**options))


def took(found: TrainConfig, speeds: Speeds, at: Place, spent: float = 0.0) -> float:
    """How long a run takes at those speeds, if no deadline ends it."""
    found = found.model_copy(
        update={"text": replace(found.text, seconds=None), "training": replace(found.training, seconds=None)}
    )
    return spent + END + sum(work_of(found, at).seconds(speeds).values())


# --- a time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), (" 1H 5 s", 3605), ("0h10m", 600)],
)
def test_a_budget_is_a_time_as_people_write_it(text: str, seconds: float) -> None:
    assert parse(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 days", "30m1h", "-2h", "0s", "1h30", "2h2h", "1e3s", "nan"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="--budget takes a time such as 2h, 90m, 1h30m or 45s"):
        parse(text)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("text.tokens", "--tokens"),
        ("training.max_steps", "--max-steps"),
        ("text.seconds", "text.seconds"),
        ("training.seconds", "training.seconds"),
    ],
)
def test_what_a_budget_chooses_is_not_given_beside_it(name: str, option: str) -> None:
    with pytest.raises(UsageError, match=f"--budget chooses {name} itself: leave out {option}, or --budget"):
        check_chosen(["model", name])
    check_chosen(["model", "training.epochs"])


def test_a_budget_is_for_the_heads_of_a_new_run_in_one_process() -> None:
    one, lora = config(), config().model_copy(update={"train_base": "lora"})
    Budget(60).check(one, resume=False, processes=1)
    for wrong, resume, processes, words in (
        (one, True, 1, "leave out --budget"),
        (lora, False, 1, "does not know how long Medusa-2 takes"),
        (one, False, 2, "measures one process"),
    ):
        with pytest.raises(UsageError, match=words):
            Budget(60).check(wrong, resume, processes)


# --- what is to be done ---------------------------------------------------------------------------------------------


def test_a_new_run_has_everything_to_do(tmp_path: Path) -> None:
    work = work_of(config(), place(tmp_path))
    assert work == Work(
        write=10_000, read=14_000, rows=9_000, held_out=1_000, steps=180, epochs=2, stored=10_000, lost=4 * 400
    )
    assert work.seconds(SPEEDS) == {
        "write": pytest.approx((12_500 + 1600) / 500),
        "read": pytest.approx(14.0),
        "train": pytest.approx(18.0 + 2 * 1_000 / 2_000),
    }


def test_what_is_done_already_is_left_out(tmp_path: Path) -> None:
    row = json.dumps({"labels": [[3, 1003], [1010, 3010]]})
    (tmp_path / "text.jsonl").write_text(f'{row}\n{row}\n{{"labels": [[0, 50')
    assert work_of(config(), place(tmp_path)).write == 4_000
    (tmp_path / "features").mkdir()
    save_file({"roots": torch.zeros(4_000)}, tmp_path / "features" / "chunk-00000.safetensors")
    work = work_of(config(), place(tmp_path))
    assert (work.read, work.stored, work.steps) == (8_400, 6_000, 180)
    work = work_of(config(), place(tmp_path, keeps=True))  # 2,000 of 6,000 that are written have lost theirs
    assert (work.read, work.stored) == (2_800, 6_000)
    save_file({"roots": torch.zeros(6_000)}, tmp_path / "features" / "chunk-00001.safetensors")
    work = work_of(config(), place(tmp_path))
    assert (work.read, work.stored, work.steps) == (0, 0, 180)
    (tmp_path / "checkpoint.pt").touch()
    (tmp_path / "log.jsonl").write_text('{"step": 99}\n{"step": 100}\n{"stage": "lora", "step": 170}\n{"st')
    work = work_of(config(), place(tmp_path))
    assert (work.write, work.read, work.lost, work.steps) == (0, 0, 0, 80)
    (tmp_path / "log.jsonl").write_text('{"step": 180}\n')
    assert work_of(config(), place(tmp_path)).trivial


def test_hidden_states_that_are_not_kept_are_read_in_each_epoch(tmp_path: Path) -> None:
    work = work_of(config(cache_features=False), place(tmp_path))
    assert (work.read, work.stored) == (math.ceil(14_000 * (0.1 + 2 * 0.9)), 1_000)
    work = work_of(config(), place(tmp_path, on_gpu=True))
    assert (work.read, work.stored) == (14_000, 0)
    work = work_of(config(), place(tmp_path, keeps=True))
    assert (work.read, work.stored) == (0, 10_000)


def test_a_text_that_is_there_is_counted(tmp_path: Path) -> None:
    texts = [Example(list(range(100)), ((20, 60), (70, 90)), "a")] * 5, [Example(list(range(50)), ((0, 50),), "b")]
    work = work_of(config(batch_size=30), place(tmp_path), texts)
    assert (work.write, work.read, work.rows, work.held_out, work.steps) == (0, 550, 300, 49, 20)


def test_few_steps_read_only_a_part_of_the_epochs(tmp_path: Path) -> None:
    work = work_of(config(max_steps=100), place(tmp_path))
    assert (work.steps, work.epochs) == (100, 2)


def test_deadlines_bound_what_a_run_takes(tmp_path: Path) -> None:
    wanted = config(seconds=5.0)
    wanted = wanted.model_copy(update={"text": replace(wanted.text, seconds=3.0)})
    assert work_of(wanted, place(tmp_path)).seconds(SPEEDS) == {"write": 3.0, "read": 14.0, "train": 5.0}


# --- memory, disk, gain ---------------------------------------------------------------------------------------------


def test_the_disk_takes_hidden_states_of_all_layers_in_two_bytes(tmp_path: Path, free: Callable[[int], None]) -> None:
    work = work_of(config(), place(tmp_path))
    heads = 20 * parameters(SHAPE)
    assert disk_bytes(work, place(tmp_path)) == 10_000 * 3 * 8 * 2 + 20 * 10_000 + heads
    free(disk_bytes(work, place(tmp_path)))
    check_disk(work, place(tmp_path), cached=True)
    free(disk_bytes(work, place(tmp_path)) - 1)
    with pytest.raises(MedusaError, match=r"make room .* --tokens, or read them anew .*training.cache_features=false"):
        check_disk(work, place(tmp_path), cached=True)
    with pytest.raises(MedusaError, match=r"fewer --tokens$"):
        check_disk(work, place(tmp_path), cached=False)


def test_memory_is_caches_heads_with_their_optimiser_and_a_batch(tmp_path: Path) -> None:
    model = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, num_hidden_layers=3)
    cache = 2 * 2 * 3 * 2 * 8 * 4 * 512
    heads = 20 * parameters(SHAPE) + 8 * 100 * 24
    plain, distilled = config(), config(distillation=0.5)
    assert memory_bytes(plain, place(tmp_path), model, "cpu") == cache + heads + 16 * 100 * 100 * 4
    assert memory_bytes(distilled, place(tmp_path), model, "cpu") == cache + heads + 30 * 100 * 100 * 4
    assert memory_bytes(plain, place(tmp_path), model, "cuda") == max(cache, heads + 16 * 100 * 100 * 4)


def test_the_gain_is_what_was_measured_and_no_more() -> None:
    assert expected_gain(207_000, 1) == pytest.approx(2.21)
    assert expected_gain(207_000, 3) == pytest.approx(2.44, abs=0.005)
    assert expected_gain(1_620_000, 2) == pytest.approx(2.75)
    middle = math.sqrt(207_000 * 1_620_000)
    assert expected_gain(middle, 1) == pytest.approx((2.21 + 2.69) / 2)
    assert expected_gain(10**9, 1) == 2.69
    assert expected_gain(1_620_000, 100) == expected_gain(1_620_000, 3)  # more epochs were not tried
    work = Work(write=0, read=0, rows=50_000, held_out=0, steps=300, epochs=3, stored=0)
    assert "Expect under 2.4 tokens per step" in gain_told(work, 512, "recurrent")
    assert "docs/decisions.md" in gain_told(work, 512, "recurrent")
    assert "about 2.5 " in gain_told(replace(work, rows=600_000, steps=10**6, epochs=1), 512, "recurrent")
    assert "under" in gain_told(replace(work, rows=600_000), 512, "recurrent")  # few steps see few tokens
    assert "Expect about 2.7 " in gain_told(replace(work, rows=10**8, steps=10**7), 512, "recurrent")
    assert "residual heads had 1.89" in gain_told(work, 512, "residual")


def test_the_table_names_each_stage_with_its_time(tmp_path: Path) -> None:
    work = work_of(config(), place(tmp_path))
    assert told(work, SPEEDS, (2 * GB, 20 * GB), (5 * 10**6, 60 * GB)) == [
        "What this will take here (by a short measurement):",
        "  write 10,000 tokens of answers       28 s",
        "  read hidden states of 14,000 tokens  14 s",
        "  train 180 steps                      19 s",
        "  in all                               76 s",
        "  memory, up to                        2.0 GB (20.0 GB free)",
        "  disk                                 5 MB (60.0 GB free)",
    ]
    lines = told(replace(work, write=0), None, (0, 0), (0, 0))
    assert "one process alone" in lines[0]
    assert not any("in all" in line or "write" in line for line in lines)


# --- a budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "speeds",
    [
        SPEEDS,
        replace(SPEEDS, written=50.0),
        replace(SPEEDS, step=5.0),
        replace(SPEEDS, read=30.0),
        Speeds(1e5, 1e6, 1e-3, 1e6),
    ],
)
@pytest.mark.parametrize("minutes", [20, 200])
@pytest.mark.parametrize(("cached", "keeps"), [(True, False), (True, True), (False, False)])
def test_a_run_that_is_fitted_takes_the_time_it_was_given_and_hardly_less(
    speeds: Speeds, minutes: int, cached: bool, keeps: bool, tmp_path: Path, free: Callable[[int], None]
) -> None:
    free(10**15)
    at, wanted = place(tmp_path, keeps=keeps), config(cache_features=cached)
    found = fitted(Budget(60 * minutes), wanted, at, speeds, 20.0, lost=1600)
    assert 0.95 * 60 * minutes < took(found, speeds, at, 20.0) <= 60 * minutes
    assert found.text.seconds is not None
    assert found.training.seconds is not None
    assert found.text.seconds + found.training.seconds < 60 * minutes  # deadlines, where a measurement was wrong
    assert found.training.max_steps is None


def test_slow_training_gets_fewer_epochs_of_more_tokens_and_slow_writing_more_of_fewer(
    tmp_path: Path, free: Callable[[int], None]
) -> None:
    def chosen(speeds: Speeds) -> tuple[int, int]:
        found = fitted(Budget(20_000), config(), place(tmp_path), speeds, 0.0, 0)
        assert found.text.tokens is not None
        return found.training.epochs, found.text.tokens

    slow_steps, slow_writing = Speeds(1e4, 1e4, 1.0, 1e5), Speeds(100.0, 1e4, 0.01, 1e5)
    assert chosen(slow_steps)[0] == 1
    assert chosen(slow_writing)[0] == 3
    kept = fitted(Budget(20_000, epochs=3), config(), place(tmp_path), slow_steps, 0.0, 0)
    assert kept.training.epochs == 3
    assert kept.text.tokens is not None
    assert chosen(slow_steps)[1] > kept.text.tokens


def test_a_budget_takes_no_more_than_the_disk_holds(tmp_path: Path, free: Callable[[int], None]) -> None:
    free(1_000_000 + 20 * parameters(SHAPE))
    found = fitted(Budget(10**6), config(), place(tmp_path), SPEEDS, 0.0, 0)
    assert found.text.tokens == 13_200  # of (48 + 20) bytes, in 9 tenths of it
    check_disk(work_of(found, place(tmp_path)), place(tmp_path), cached=True)


def test_a_budget_that_is_too_little_says_how_much_would_do(tmp_path: Path, free: Callable[[int], None]) -> None:
    with pytest.raises(UsageError, match="--budget 20 s is too little here: at least 36 s, for 2,000 tokens"):
        fitted(Budget(20), config(), place(tmp_path), SPEEDS, 6.0, lost=1000)
    fitted(Budget(36), config(), place(tmp_path), SPEEDS, 6.0, lost=1000)


def test_with_a_text_that_is_there_the_epochs_are_fitted(tmp_path: Path) -> None:
    texts = [Example(list(range(400)), ((0, 400),), "a")] * 100, [Example(list(range(50)), ((0, 50),), "b")] * 10
    reading, epoch = 40.5, 39.9 + 0.245  # seconds
    wanted = config(max_steps=7)

    def chosen(seconds: float, epochs: int | None = None) -> tuple[int, float | None]:
        found = fitted_to_text(Budget(seconds, epochs), wanted, place(tmp_path), SPEEDS, 10.0, texts)
        assert found.training.max_steps is None
        assert found.text == wanted.text
        return found.training.epochs, found.training.seconds

    assert chosen(10 + END + reading + 2.5 * epoch) == (2, pytest.approx(2.5 * epoch, abs=0.1))
    assert chosen(10 + END + reading + 9 * epoch)[0] == 3
    assert chosen(10 + END + reading + 9 * epoch, epochs=1)[0] == 1
    assert chosen(10 + END + reading + 0.9 * epoch)[0] == 1
    with pytest.raises(UsageError, match="reading its hidden states takes 40 s"):
        chosen(10 + END + reading)


def test_the_training_gets_what_time_is_left_when_it_begins(tmp_path: Path) -> None:
    def left(spent: float) -> float | None:
        return with_what_is_left(Budget(1_000), config(), spent, 2_000, SPEEDS).training.seconds

    assert left(600.0) == 1_000 - 600 - END - 2
    assert left(2_000.0) == 1.0  # reading took it all: a step or two


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def given_speeds(*_: Any) -> Speeds:
    return Speeds(100.0, 1e4, 1e-4, 1e6)


def without(*names: str) -> list[str]:
    """SMALL without those options."""
    words = list(SMALL)
    for name in names:
        at = words.index(name)
        del words[at : at + 2]
    return words


def test_a_run_says_what_it_will_take_before_it_writes(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--model", str(saved), "--out", str(tmp_path / "run"), *SMALL) == 0
    err = capfd.readouterr().err
    table, _, rest = err.partition("Writing text ...")
    for line in (
        "write 400 tokens",
        "read hidden states of 560 tokens",
        "train 8 steps",
        "memory, up to",
        "Expect under",
    ):
        assert line in table
        assert line not in rest
    assert run("train", "--out", str(tmp_path / "run"), "--resume") == 0
    assert "What this will take" not in capfd.readouterr().err  # nothing is left


def test_speeds_are_measured_of_what_there_is_to_do(saved: Path, tmp_path: Path) -> None:
    wanted = load_config(None, {"model": str(saved), "out": str(tmp_path)}, [w for w in SMALL if "=" in w])
    lm = load_model(wanted)
    shape = heads_shape(wanted, lm)
    work = work_of(wanted, Place(tmp_path, shape, 4, 512))
    found = measured.measure(wanted, lm, shape, work, None, torch.device("cpu"))
    assert all(0 < value < math.inf for value in (found.written, found.read, found.step, found.judged))
    assert [lm.backend.length(slot) for slot in range(4)] == [0] * 4
    nothing = measured.measure(wanted, lm, shape, replace(work, write=0, read=0, steps=0), None, torch.device("cpu"))
    assert nothing == Speeds()


def test_where_the_disk_is_too_small_nothing_is_begun(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], free: Callable[[int], None]
) -> None:
    free(1000)
    assert run("train", "--model", str(saved), "--out", str(tmp_path / "run"), *SMALL) == 1
    err = capfd.readouterr().err
    assert "1 MB are free there: make room or name another --out, take fewer --tokens, or read them anew" in err
    assert not (tmp_path / "run" / "text.jsonl").exists()


def test_little_memory_is_warned_of(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa.training.forecast.memory_bytes", lambda *_: 10**15)
    assert run("train", "--model", str(saved), "--out", str(tmp_path / "run"), *SMALL) == 0
    assert "memory may not suffice: 1000000.0 GB may come on top" in capfd.readouterr().err


def test_run_yaml_holds_what_a_budget_chose_and_a_resumed_run_keeps_it(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "measure", given_speeds)
    monkeypatch.setattr(budgets, "LEAST_TOKENS", 300)
    monkeypatch.setattr(budgets, "free_disk", lambda out: 10**9)
    monkeypatch.setattr(budgets, "DISK", 0.0006)
    out = tmp_path / "run"
    arguments = ["train", "--model", str(saved), "--out", str(out), *without("--tokens", "--max-steps")]
    assert run(*arguments, "--budget", "10m") == 0
    assert "--budget 10 min: " in capfd.readouterr().err
    chosen = yaml.safe_load((out / "run.yaml").read_text())
    text, training = chosen["text"], chosen["training"]
    assert training["epochs"] == 3  # all is quick
    assert 300 <= text["tokens"] < 10_000
    assert text["seconds"]
    assert 60 < training["seconds"] < 600
    assert "budget" not in chosen
    assert run("train", "--out", str(out), "--resume", "--budget", "10m") == 2
    assert "leave out --budget" in capfd.readouterr().err
    assert run("train", "--out", str(out), "--resume") == 0
    assert yaml.safe_load((out / "run.yaml").read_text()) == chosen


def test_a_run_that_is_killed_before_its_budget_is_fitted_leaves_no_settings_to_go_on_with(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Speeds:
        raise KeyboardInterrupt

    monkeypatch.setattr(measured, "measure", killed)
    arguments = ["train", "--model", str(saved), "--out", str(tmp_path / "run"), *without("--tokens", "--max-steps")]
    assert run(*arguments, "--budget", "10m") == 130
    assert run("train", "--model", str(saved), "--out", str(tmp_path / "run"), "--resume") == 2
    assert "there is no run in" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told_so"),
    [
        (["--budget", "soon"], "--budget takes a time such as 2h"),
        (["--budget", "2h", "--tokens", "5"], "leave out --tokens, or --budget"),
        (["--budget", "2h", "training.max_steps=5"], "leave out --max-steps, or --budget"),
        (["--budget", "2h", "--train-base", "lora"], "does not know how long Medusa-2 takes"),
        (["--budget", "1s"], "is too little here: at least"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_one_clear_sentence(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], told_so: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(measured, "measure", given_speeds)
    out = tmp_path / "run"
    assert run("train", "--model", str(saved), "--out", str(out), *without("--tokens", "--max-steps"), *arguments) == 2
    assert told_so in capfd.readouterr().err
    assert not (out / "text.jsonl").exists()


def test_the_tokens_to_choose_by_are_the_measured_ones() -> None:
    assert [tokens for tokens, _ in ONE_EPOCH] == [207_000, 1_620_000]


def test_a_gpu_reads_many_texts_at_once() -> None:
    assert 0 < measured.reading_on_gpu(TransformersBackend(make_model())) < math.inf


def test_a_model_whose_conversations_are_slow_to_begin_is_measured_by_passes_alone(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "MOST_SECONDS", 0.0)
    wanted = load_config(None, {"model": str(saved), "out": str(tmp_path)}, [w for w in SMALL if "=" in w])
    lm = load_model(wanted)
    passes: list[int] = []
    verify = lm.backend.verify

    def counted(slots: Any, drafts: Any) -> Any:
        passes.append(len(slots))
        return verify(slots, drafts)

    monkeypatch.setattr(lm.backend, "verify", counted)
    assert 0 < measured.writing(wanted, lm) < math.inf
    assert set(passes) == {4}
    assert [lm.backend.length(slot) for slot in range(4)] == [0] * 4


def test_prompts_that_end_before_the_measurement_does_are_measured_all_the_same(saved: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is it?\n")
    words = [w for w in SMALL if "=" in w]
    wanted = load_config(None, {"model": str(saved), "out": str(tmp_path), "text.prompts": str(prompts)}, words)
    assert 0 < measured.writing(wanted, load_model(wanted)) < math.inf
