"""`medusa train`, `distill` and `calibrate` as a user runs them, on a tiny model: what lies on disk, what is said."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import medusa
from medusa.cli import main
from medusa.models.heads import read_config
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
    plain = lm.with_drafter("none")
    for prompt in ("What is it?", "Tell me more."):
        assert lm.generate(prompt, max_new_tokens=40).token_ids == plain.generate(prompt, max_new_tokens=40).token_ids


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
    """With SIGKILL and SIGTERM, at any moment of any stage."""
    out, chance = tmp_path / "run", random.Random(5)
    command = [sys.executable, "-m", "medusa.cli", "train", "--model", str(saved), "--out", str(out), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    patience = 7.0
    for _ in range(12):
        again = ["--resume"] if (out / "run.yaml").exists() else []
        with subprocess.Popen(
            [*command, *again], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as process:
            try:
                process.communicate(timeout=chance.uniform(3, patience))
            except subprocess.TimeoutExpired:
                process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
                process.communicate()
                patience += 3
                continue
        assert process.returncode == 0
        break
    else:
        pytest.fail("it never came to its end")
    assert (out / "text.jsonl").read_bytes() == (trained / "text.jsonl").read_bytes()
    assert read_config(out / "heads").training["steps"] == 8
    first, second = (load_file(d / "heads" / "heads.safetensors") for d in (trained, out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_learn_what_one_learns(saved: Path, trained: Path, tmp_path: Path) -> None:
    """Gradients are shared: after the same steps the weights differ by rounding only."""
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
    first, second = (load_file(d / "heads" / "heads.safetensors") for d in (trained, out))
    assert all(torch.allclose(first[n].float(), second[n].float(), atol=2e-2) for n in first)
    assert any(not torch.equal(first[n], torch.zeros_like(first[n])) for n in first)


def test_features_may_be_computed_as_needed(saved: Path, tmp_path: Path) -> None:
    arguments = ["train", "--model", str(saved), "--out", str(tmp_path / "run"), *SMALL]
    assert run(*arguments, "training.cache_features=false", "training.distillation=0.5") == 0
    assert not (tmp_path / "run" / "features" / "train").exists()
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
    assert (tmp_path / "heads" / "accuracy.svg").is_file()
    assert read_config(trained / "heads") == before


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


def test_a_run_is_not_overwritten(saved: Path, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--model", str(saved), "--out", str(trained), *SMALL) == 2
    assert "add --resume to go on with it" in capfd.readouterr().err


def test_a_finished_run_can_be_resumed_and_changes_nothing(saved: Path, trained: Path) -> None:
    before = (trained / "heads" / "heads.safetensors").read_bytes()
    assert run("train", "--out", str(trained), "--resume") == 0
    assert (trained / "heads" / "heads.safetensors").read_bytes() == before


def test_a_model_without_a_chat_template_learns_from_its_plain_text(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", template=None)
    assert run("train", "--model", str(model), "--out", str(tmp_path / "run"), *SMALL) == 0
    assert read_config(tmp_path / "run" / "heads").training["steps"] == 8
