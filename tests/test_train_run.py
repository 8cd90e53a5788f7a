"""`medusa train`, `distill` and `calibrate` as a user runs them, on a tiny model: what lies on disk, what is said."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import medusa
from medusa.cli import main
from medusa.errors import MedusaError, UsageError
from medusa.heads.file import read_config
from medusa.training.accuracy import Accuracy
from medusa.training.calibrate import draw
from medusa.training.config import load_config
from medusa.training.resume import check_resumed
from medusa.training.run import check_distillation
from medusa.training.stored_features import FeatureStore
from medusa.training.trainer import schedule
from tiny_models import CHAT_TEMPLATE, TOKENIZER_VOCAB, make_model, make_tokenizer

ENDS = [2, *range(10, 30)]
# What a tiny random model needs to end its turns, and little work.
SMALL = (
    "--tokens", "400", "--max-steps", "8", "--dtype", "float32",
    "text.max_user_tokens=40", "text.max_answer_tokens=30", "text.user_temperature=6.0", "text.temperatures=[3.0]",
    "text.top_p=1.0", "text.held_out=0.3", "engine.backend=transformers", "engine.slots=4", "training.batch_size=16",
    "training.save_every=2", "training.precision=float32",
)  # fmt: skip


def save_model(directory: Path, template: str | None = CHAT_TEMPLATE) -> Path:
    model = make_model(vocab_size=TOKENIZER_VOCAB, max_position_embeddings=512)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(directory)
    make_tokenizer(template).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def trained(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    before = digests(saved)
    assert run("train", "--model", str(saved), "--out", str(out), *SMALL) == 0
    assert digests(saved) == before  # the base is what it was, to the bit
    return out


def test_a_run_leaves_heads_that_decode_and_all_that_made_them(saved: Path, trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"run.yaml", "text.jsonl", "features", "checkpoint.pt", "log.jsonl", "heads"} <= names
    heads = trained / "heads"
    assert {path.name for path in heads.iterdir()} == {
        "config.json", "heads.safetensors", "run.yaml", "tree.svg", "accuracy.svg",
    }  # fmt: skip
    config = read_config(heads)
    assert config.training["steps"] == 8
    assert config.training["run"]["text"]["tokens"] == 400
    assert config.tree
    assert (heads / "tree.svg").read_text().startswith("<?xml")
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert "tokens_per_step" in log[-1]
    lm = medusa.load(str(saved), heads=str(heads), dtype="float32", backend="transformers", nodes=6, progress=False)
    plain = lm.make_stepper("none")
    for prompt in ("What is it?", "Tell me more."):
        expected = lm.generate(prompt, max_new_tokens=40, stepper=plain)
        assert lm.generate(prompt, max_new_tokens=40).token_ids == expected.token_ids


def test_the_same_run_gives_the_same_heads(saved: Path, trained: Path, tmp_path: Path) -> None:
    """From run.yaml alone."""
    config = trained / "heads" / "run.yaml"
    assert run("train", "--config", str(config), "--out", str(tmp_path / "again")) == 0
    assert (tmp_path / "again" / "text.jsonl").read_bytes() == (trained / "text.jsonl").read_bytes()
    first, second = (load_file(d / "heads" / "heads.safetensors") for d in (trained, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(
    saved: Path, trained: Path, tmp_path: Path
) -> None:
    """With SIGKILL and SIGTERM, in every stage: as soon as its first file is there."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "medusa.cli", "train", "--model", str(saved), "--out", str(out), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    deaths = [
        ("text.jsonl", signal.SIGKILL),
        ("features/key", signal.SIGTERM),
        ("checkpoint.pt", signal.SIGKILL),
        ("heads", signal.SIGTERM),
        ("", signal.SIGKILL),  # never there: this one runs to its end
    ]
    codes = []
    for name, death in deaths:
        again = ["--resume"] if (out / "run.yaml").exists() else []
        with subprocess.Popen(
            [*command, *again], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        ) as process:
            while process.poll() is None and not (name and (out / name).exists() and (out / name).stat().st_size):
                time.sleep(0.002)
            process.send_signal(death)  # to one that has ended it does nothing
            process.communicate()
        codes.append(process.returncode)
    assert all(codes[:3])  # the fourth may come to its end before it hears of its death
    assert codes[4] == 0
    assert (out / "text.jsonl").read_bytes() == (trained / "text.jsonl").read_bytes()
    assert read_config(out / "heads").training["steps"] == 8
    first, second = (load_file(d / "heads" / "heads.safetensors") for d in (trained, out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_learn_what_one_learns(saved: Path, trained: Path, tmp_path: Path) -> None:
    """The batch is the whole of both: each step has the losses that one process has in it, and as gradients are shared
    the weights then differ by rounding only. (By 1e-7; where each process learns from its own rows alone, by 6e-3.)"""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        str(29500 + os.getpid() % 1000), "-m", "medusa.cli", "train", "--model", str(saved), "--out", str(out), *SMALL,
    ]  # fmt: skip
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("The heads are in") == 1
    assert read_config(out / "heads").training["processes"] == 2
    logs = [[json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (trained, out)]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 9))
    named = [f"loss_{k}" for k in range(1, 5)]
    losses, others = ([[entry[name] for name in named] for entry in log] for log in logs)  # five digits of each
    assert others == [pytest.approx(step, rel=2e-5) for step in losses]
    first, second = (torch.load(d / "checkpoint.pt", weights_only=True)["heads"] for d in (trained, out))
    assert all(torch.allclose(first[n], second[n], atol=1e-5) for n in first if n != "draft_ids")
    assert first["block.down.weight"].abs().max() > 4e-3  # which began as zeros: so far they have come


def test_features_may_be_computed_as_needed(saved: Path, tmp_path: Path) -> None:
    arguments = ["train", "--model", str(saved), "--out", str(tmp_path / "run"), *SMALL]
    assert run(*arguments, "training.cache_features=false", "training.distillation=0.5") == 0
    (chunk,) = (tmp_path / "run" / "features").glob("chunk-*")
    texts = len((tmp_path / "run" / "text.jsonl").read_text().splitlines())
    with safe_open(chunk, "pt") as file:
        assert 0 < len(json.loads(file.metadata()["texts"])) < texts / 2  # what is measured with
    assert read_config(tmp_path / "run" / "heads").training["steps"] == 8


def test_an_existing_data_set_is_learned_from(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}"},
                {"role": "assistant", "content": f"You said {i}, I think."},
            ]
        }
        for i in range(40)
    ]
    rows[7] = {"messages": "?"}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train", "--model", str(saved), "--out", str(tmp_path / "run"), "--data", str(data)]
    assert run(*arguments, "--max-steps", "3", "engine.backend=transformers", "training.batch_size=16") == 0
    out, err = capfd.readouterr()
    assert "line 8" in err
    assert "Learned from" in out
    assert not (tmp_path / "run" / "text.jsonl").exists()


def test_calibrate_measures_and_stores_tree_and_pictures(
    saved: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = read_config(trained / "heads")
    arguments = ["calibrate", "--model", str(saved), "--heads", str(trained / "heads"), "--dtype", "float32"]
    arguments += ["--backend", "transformers", "--data", str(trained / "text.jsonl"), "--out", str(tmp_path / "heads")]
    assert run(*arguments) == 0
    out, _ = capfd.readouterr()
    assert "Faster than plain" in out
    after = read_config(tmp_path / "heads")
    assert after.tree
    assert after.tree != before.tree  # other text
    assert digests(tmp_path / "heads")["heads.safetensors"] == digests(trained / "heads")["heads.safetensors"]
    assert (tmp_path / "heads" / "run.yaml").read_bytes() == (trained / "heads" / "run.yaml").read_bytes()
    assert (tmp_path / "heads" / "accuracy.svg").is_file()
    assert read_config(trained / "heads") == before


def test_what_is_not_of_a_run_is_not_taken_for_one(
    saved: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("features", "model", "heads"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "mine.txt").write_text("mine")
        assert run("train", "--model", str(saved), "--out", str(tmp_path / name), *SMALL) == 2
        assert f"holds '{name}', which is not of a run: name another --out" in capfd.readouterr().err
        assert (tmp_path / name / name / "mine.txt").read_text() == "mine"
    with pytest.raises(MedusaError, match="holds something else than hidden states"):
        FeatureStore(tmp_path / "features" / "features", {"model": "m"})
    calibrate = ["calibrate", "--model", str(saved), "--heads", str(trained / "heads")]
    assert run(*calibrate, "--out", str(tmp_path / "heads")) == 2
    assert "is there already: name a new directory with --out" in capfd.readouterr().err
    assert (tmp_path / "heads" / "heads" / "mine.txt").is_file()


def test_all_of_given_text_is_learned_from(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for option in (["--tokens", "5"], ["--prompts", "p.jsonl"]):
        arguments = ["train", "--model", str(saved), "--out", str(tmp_path / "run"), "--data", "rows.jsonl"]
        assert run(*arguments, *option) == 2
        assert f"all of rows.jsonl is learned from (--data): leave out {option[0]}" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", [{"logits_scaling": 8.0}, {"final_logit_softcapping": 30.0}, {"logit_scale": 0.06}])
def test_a_model_that_changes_its_logits_is_no_teacher(rule: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    class Config(SimpleNamespace):
        def get_text_config(self) -> Config:
            return self

    lm: Any = SimpleNamespace(backend=SimpleNamespace(model=None))
    monkeypatch.setattr("medusa.training.run.zoo.resolve", lambda *_, **__: None)
    with_kl, without = (
        load_config(None, {"model": "m", "training.distillation": share, "log": []}) for share in (0.5, 0.0)
    )
    for found in ({}, dict.fromkeys(rule, 1.0), dict.fromkeys(rule)):
        monkeypatch.setattr("medusa.training.run.zoo.load_config", lambda source, found=found: Config(**found))
        check_distillation(with_kl, lm)
    monkeypatch.setattr("medusa.training.run.zoo.load_config", lambda source: Config(**rule))
    check_distillation(without, lm)
    with pytest.raises(UsageError, match=f"{next(iter(rule))}, which the KL to them does not know"):
        check_distillation(with_kl, lm)
    monkeypatch.setattr("medusa.training.run.zoo.load_config", lambda source: Config())
    lm.backend.model = SimpleNamespace(lm_head=torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="a bias of the LM head"):
        check_distillation(with_kl, lm)


def test_heads_are_not_lost_for_want_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = Accuracy.of(torch.tensor([[0, 1], [0, 0], [2, 0]]))
    (tmp_path / "with").mkdir()
    draw(accuracy, tmp_path / "with")
    assert {path.name for path in (tmp_path / "with").iterdir()} == {"tree.svg", "accuracy.svg"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "without").mkdir()
    draw(accuracy, tmp_path / "without")
    assert list((tmp_path / "without").iterdir()) == []


def test_calibrate_can_measure_the_machine_alone(saved: Path, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = digests(trained / "heads")
    arguments = ["calibrate", "--times", "--json", "--model", str(saved), "--heads", str(trained / "heads")]
    assert run(*arguments, "--dtype", "float32", "--backend", "transformers") == 0
    times = json.loads(capfd.readouterr().out)
    assert times["pass_ms"]["32"] >= times["pass_ms"]["1"] > 0
    assert times["draft_ms"] > 0
    assert digests(trained / "heads") == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--resume"], 2, "there is no run in"),
        (["heads.colour=red"], 2, "unknown setting heads.colour"),
        (["--data", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["--train-base", "all"], 2, "train_base"),
        (["--max-steps", "0"], 2, "--max-steps"),
        (["heads.feature_layers=[9]"], 2, "feature_layers must be from 1 to 2"),
        (["heads.num_layers=2"], 2, "a recurrent block has num_layers 1"),
        (["text.temperatures=[]"], 2, "temperatures must be one temperature or more"),
        (["text.max_answer_tokens=4"], 2, "text.max_answer_tokens must be at least 5, not 4"),
        (["training.overlap=1"], 2, "training.overlap takes the place of a part of the KL"),
        (["log=[wandb]"], 2, "log: wandb is not installed: pip install wandb"),
    ],
)
def test_a_bad_call_is_one_clear_sentence(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: Sequence[str], code: int, message: str
) -> None:
    assert run("train", "--model", str(saved), "--out", str(tmp_path / "run"), "--tokens", "100", *arguments) == code
    err = capfd.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "text.jsonl").exists()  # it costs no time


def test_a_run_is_not_overwritten(saved: Path, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--model", str(saved), "--out", str(trained), *SMALL) == 2
    assert "add --resume to go on with it" in capfd.readouterr().err


def test_a_finished_run_can_be_resumed_and_changes_nothing(saved: Path, trained: Path) -> None:
    before = (trained / "heads" / "heads.safetensors").read_bytes()
    assert run("train", "--out", str(trained), "--resume") == 0
    assert (trained / "heads" / "heads.safetensors").read_bytes() == before


def test_a_finished_run_goes_on_with_more_epochs_and_another_rate(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    more = ["--resume", "--out", str(out), "--epochs", "4", "--max-steps", "12", "training.learning_rate=1e-4"]
    assert run("train", *more) == 0
    assert "in 12 steps" in capfd.readouterr().out
    settings = yaml.safe_load((out / "run.yaml").read_text())["training"]
    assert [settings[name] for name in ("epochs", "max_steps", "learning_rate")] == [4, 12, 1e-4]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 13))
    rates = [1e-4 * schedule(step, 12, 0.05) for step in range(8, 12)]  # the new schedule from here on
    assert [entry["learning_rate"] for entry in log[8:]] == pytest.approx(rates, rel=1e-4)
    config = read_config(out / "heads")
    assert config.training["steps"] == 12
    assert config.training["precision"] == "float32"
    assert config.training["run"]["training"]["max_steps"] == 12
    assert run("train", "--resume", "--out", str(out)) == 0
    assert "all 12 steps are done: more training.epochs" in capfd.readouterr().err


def test_a_refused_resume_leaves_the_run_as_it_was(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for assignment, told in (
        ("heads.num_heads=5", "heads.num_heads=4, not 5"),
        ("text.seed=1", "text.seed=0, not 1"),
        ("training.batch_size=8", "training.batch_size=16, not 8"),
        ("engine.dtype=bfloat16", "engine.dtype=float32, not bfloat16"),
    ):
        assert run("train", "--out", str(out), "--resume", assignment, "--epochs", "9") == 2
        err = capfd.readouterr().err
        assert f"Error: {out} holds a run with {told}: what may change from here on is train_base, log, " in err
        assert "training (but for batch_size, cache_features, seed), lora; leave the rest as it was" in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # Whatever is refused later, when the model is there, has overwritten nothing either.
    (out / "checkpoint.pt").unlink()
    assert run("train", "--out", str(out), "--resume", "heads.feature_layers=[9]") == 2
    assert run("train", "--out", str(out), "--resume", "heads.num_layers=2") == 2
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "Say", "response": "ab"}\n' * 9)
    assert run("train", "--out", str(out), "--resume", "--data", str(short)) == 1
    assert "Error: the longest held-out answer has" in capfd.readouterr().err
    assert (out / "run.yaml").read_bytes() == before[out / "run.yaml"]
    assert run("train", "--out", str(out), "--resume") == 0


@pytest.mark.parametrize(
    ("files", "setting", "told"),
    [
        ((), "text.seed=1", ""),
        (("text.jsonl",), "text.tokens=9", ""),
        (("text.jsonl",), "heads.num_heads=2", ""),
        (("text.jsonl",), "text.seed=1", "text.seed=0, not 1"),
        (("checkpoint.pt",), "text.held_out=0.1", "text.held_out=0.05, not 0.1"),
        (("checkpoint.pt",), "heads.draft_vocab=9", "heads.draft_vocab=null, not 9"),
        (("checkpoint.pt",), "training.cache_features=false", "training.cache_features=True, not False"),
        (("checkpoint.pt",), "training={clip: 2, distillation: 1, lambda: 0.5, weight_decay: 0, patience: 3}", ""),
        (("checkpoint.pt",), "training.precision=float32", ""),
        (("checkpoint.pt",), "engine={slots: 2, threads: 1, device: cuda}", ""),
        (("checkpoint.pt",), "train_base=lora", ""),
        (("checkpoint.pt",), "log=[]", ""),
        (("checkpoint.pt",), "lora.rank=2", ""),
        (("checkpoint.pt", "lora-checkpoint.pt"), "lora.rank=2", "lora.rank=16, not 2"),
        (("checkpoint.pt", "lora-checkpoint.pt"), "training.patience=2", "training.patience=0, not 2"),
        (("checkpoint.pt", "lora-checkpoint.pt"), "training.clip=2", ""),
        (("checkpoint.pt", "lora-checkpoint.pt"), "lora={epochs: 2, max_steps: 9, learning_rate: 1, merge: false}", ""),
    ],
)
def test_what_went_into_something_on_disk_is_fixed_and_all_else_may_change(
    files: Sequence[str], setting: str, told: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    before, now = load_config(None, {}), load_config(None, {}, [setting])
    assert before != now
    if not told:
        check_resumed(tmp_path, before, now)
        return
    with pytest.raises(UsageError, match=rf"holds a run with {re.escape(told)}: what may change from here on is"):
        check_resumed(tmp_path, before, now)


def test_held_out_answers_too_short_to_measure_the_heads_are_refused_before_anything_is_learned(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {i}", "response": "ab" if i % 5 == 0 else f"You said {i}, I think."} for i in range(20)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train", "--model", str(saved), "--out", str(tmp_path / "run"), "--data", str(data), *SMALL[4:]]
    assert run(*arguments, "text.held_out=0.2") == 1
    err = capfd.readouterr().err
    assert re.search(
        r"Error: the longest held-out answer has \d tokens, and it takes 5 to measure 4 heads: train on", err
    )
    assert not (tmp_path / "run" / "features").exists()


def test_asking_for_bfloat16_where_the_machine_has_none_is_told(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast in (True, False):
        out = tmp_path / str(fast)
        shutil.copytree(trained, out)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda fast=fast: fast)
        assert run("train", "--resume", "--out", str(out), "--max-steps", "9", "training.precision=bfloat16") == 0
        err = capfd.readouterr().err
        assert err.count("training.precision=float32 is many times as fast here") == (0 if fast else 1)
        assert "going on after step 8, in bfloat16; it was float32 until here" in err
        assert yaml.safe_load((out / "run.yaml").read_text())["training"]["precision"] == "bfloat16"


def test_a_log_that_was_cut_short_goes_on_in_a_line_of_its_own(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    whole = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(whole + '{"step": 9, "lo')
    assert run("train", "--resume", "--out", str(out), "--max-steps", "9") == 0
    last = (out / "log.jsonl").read_text().removeprefix(whole).splitlines()
    assert last[0] == '{"step": 9, "lo'
    assert json.loads(last[1])["step"] == 9


def test_no_room_for_the_heads_is_one_clear_sentence(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    out = tmp_path / "run"
    shutil.copytree(trained, out)
    monkeypatch.setattr("medusa.heads.file.save_file", full)
    assert run("train", "--resume", "--out", str(out)) == 1
    assert "No space left on device (os error 28); make room and go on with --resume" in capfd.readouterr().err
    assert digests(out / "heads") == digests(trained / "heads")


@pytest.mark.parametrize("readable", [True, False])
def test_where_calibrated_heads_cannot_be_saved_is_told_before_they_are_measured(
    readable: bool, saved: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("medusa.load", None)  # it is not called
    arguments = ["calibrate", "--model", str(saved), "--heads", str(trained / "heads")]
    if readable:
        (tmp_path / "mine.txt").touch()
        assert run(*arguments, "--out", str(tmp_path)) == 2
        assert "is there already: name a new directory with --out" in capfd.readouterr().err
    else:
        monkeypatch.setattr("os.access", lambda path, mode: False)
        assert run(*arguments) == 1
        assert "permission denied; name another directory with --out" in capfd.readouterr().err


def test_a_model_without_a_chat_template_learns_from_its_plain_text(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", template=None)
    assert run("train", "--model", str(model), "--out", str(tmp_path / "run"), *SMALL) == 0
    assert read_config(tmp_path / "run" / "heads").training["steps"] == 8
