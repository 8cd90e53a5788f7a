"""The commands that exchange heads, their cards, and the Hub as a stub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors

import medusa
from exchange import TREE, base, heads_in, original, residual, tensors_of
from medusa.cli import main
from medusa.errors import MedusaError, UsageError
from medusa.heads.file import read_config, write_config
from medusa.interop import base as base_room
from medusa.interop import hub
from tiny_models import make_model


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


@pytest.fixture(autouse=True)
def _no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")


def test_export_and_import_say_what_they_did_and_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    heads_in(tmp_path / "heads", tree=TREE)
    code, out, err = run(capsys, "export", "heads", "--to", "tgi", "--out", "for-tgi")
    assert code == 0
    assert "2 heads of 1 layer for vllm, tgi, tensorrt-llm in for-tgi" in out
    assert "no tree: fewer tokens a step" in err
    code, out, err = run(capsys, "import", "for-tgi", "--model", base())
    assert code == 0
    assert out.startswith("Read medusa_lm_head.safetensors (FasterDecoding v0.1):\n2 heads of 1 layer, hidden size 32")
    assert "a tree of 4 nodes" in out
    assert "--heads for-tgi-heads" in out
    assert "Note: the LM heads in the file are copies of the model's own" in err
    assert tensors_of(tmp_path / "for-tgi-heads").keys() == tensors_of(tmp_path / "heads").keys()


def test_json_holds_the_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = heads_in(tmp_path / "heads", num_layers=2)
    code, out, _ = run(capsys, "export", heads, "--to", "vllm", "--out", tmp_path / "out", "--shared-lm-head", "--json")
    made = json.loads(out)
    assert (code, made["serves"], made["num_layers"], made["dtype"]) == (0, ["vllm"], 2, "float32")
    assert made["files"] == ["README.md", "config.json", "model.safetensors"]
    code, out, _ = run(capsys, "import", tmp_path / "out", "--model", base(), "--out", tmp_path / "back", "--json")
    found = json.loads(out)
    assert (code, found["layout"], found["num_heads"], found["lm_heads"]) == (0, "vLLM", 2, "the model's own")
    assert found["heads"] == str(tmp_path / "back")


def test_refusals_are_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = heads_in(tmp_path / "heads", kind="recurrent")
    code, out, err = run(capsys, "export", heads, "--to", "vllm", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith("Error: vLLM cannot run these heads: it runs parallel heads only")
    assert err.count("\n") == 1
    code, _, err = run(capsys, "import", tmp_path / "nowhere", "--model", base())
    assert (code, err.count("\n")) == (1, 1)
    code, _, err = run(capsys, "export", heads, "--to", "llama.cpp", "--out", tmp_path / "out")
    assert code == 2


# --- the card ---------------------------------------------------------------------------------------------------------


def test_a_card_tells_kind_counts_figures_tree_and_how_to_run_the_heads(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", tree=TREE, tie_lm_head=False, base_model="owner/tiny")
    figures = {"held_out": {"positions": 90, "top1": [0.5, 0.25], "tokens_per_step": {"4": 1.75}}}
    write_config(replace(read_config(heads), training=figures), heads)
    (heads / "tree.svg").write_text("<svg/>")
    (heads / "notes.svg").write_text("<svg/>")
    medusa.export_heads(heads, "vllm", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    for words in [
        "base_model: owner/tiny",
        "| kind | residual |",
        "| heads | 2, for the tokens t+2 to t+3 |",
        "| LM heads | one for each head |",
        "| positions | 90 |",
        "| top1 | 0.5, 0.25 |",
        "| tokens per step | 1.75 with 4 nodes |",
        "vllm serve owner/tiny --speculative-config "
        """'{"method": "medusa", "model": "DIR", "num_speculative_tokens": 2}'""",
        "text-generation-launcher --model-id DIR --speculate 2",
        '--medusa_choices "[[0], [1], [0, 0], ...]"',
        "├─ head 1, guess 1: 50%\n│  └─ head 2, guess 1: 30%\n└─ head 1, guess 2: 25%",
        "![tree](tree.svg)",
    ]:
        assert words in text
    assert (tmp_path / "out" / "tree.svg").is_file()
    assert not (tmp_path / "out" / "notes.svg").exists()


def test_a_card_shows_no_probabilities_that_no_one_measured(tmp_path: Path) -> None:
    path = original(tmp_path / "in", residual(), medusa_choices=[[0], [1], [1, 0]])
    medusa.import_heads(path, str(base()), tmp_path / "heads")
    medusa.export_heads(tmp_path / "heads", "vllm", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "└─ head 1, guess 2\n   └─ head 2, guess 1\n" in text
    assert "%" not in text
    assert "base_model:" not in text, "a directory is no model of the Hub"


def test_the_model_of_an_hf_export_can_be_named_anew(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", base_model="elsewhere")
    made = medusa.export_heads(heads, "hf", tmp_path / "out", model=str(base()))
    assert read_config(tmp_path / "out") == replace(read_config(heads), base_model=str(base()))
    assert "which is a directory here" in made.notes[-1]


# --- the Hub ----------------------------------------------------------------------------------------------------------


class StubHub:
    """Keeps repositories in a directory."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self.calls: list[tuple[str, Any]] = []
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append((repo_id, options))

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        shutil.copytree(folder_path, self.room / repo_id)
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")

    def download(self, repo_id: str, *, revision: str | None, local_dir: Path, allow_patterns: list[str]) -> str:
        self.calls.append((repo_id, revision))
        if self.error is not None:
            raise self.error
        (local_dir / ".cache").mkdir()
        for path in (self.room / repo_id).rglob("*"):
            if path.is_file() and any(path.match(pattern) for pattern in allow_patterns):
                target = local_dir / path.relative_to(self.room / repo_id)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        return str(local_dir)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubHub:
    import huggingface_hub

    made = StubHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    return made


def test_pushed_heads_come_back_as_they_were(
    stub: StubHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    heads = heads_in(tmp_path / "heads", kind="sequential", base_model="owner/tiny", tree=TREE)
    code, out, _ = run(capsys, "push", heads, "me/heads", "--private")
    assert (code, stub.calls) == (0, [("me/heads", {"private": True, "exist_ok": True})])
    assert "https://hub/me/heads" in out
    there = {str(p.relative_to(stub.room / "me/heads")) for p in (stub.room / "me/heads").rglob("*") if p.is_file()}
    assert there == {
        "README.md",
        "config.json",
        "heads.safetensors",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
    }
    code, out, _ = run(capsys, "pull", "me/heads", "--out", "back", "--revision", "v1")
    assert (code, stub.calls[-1]) == (0, ("me/heads", "v1"))
    assert "--heads back" in out
    assert read_config(tmp_path / "back") == read_config(heads)
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["README.md", "config.json", "heads.safetensors"]
    code, _, err = run(capsys, "pull", "me/heads", "--out", "back")
    assert (code, "--force" in err) == (2, True)
    assert run(capsys, "pull", "me/heads", "--out", "back", "--force")[0] == 0


def test_an_export_is_pushed_as_it_is_and_a_foreign_checkpoint_is_pulled_for_import(
    stub: StubHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = heads_in(tmp_path / "heads")
    medusa.export_heads(heads, "vllm", tmp_path / "out")
    hub.push(tmp_path / "out", "me/heads")
    assert sorted(p.name for p in (stub.room / "me/heads").iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir()
    )
    with pytest.raises(UsageError, match="export anew with --model owner/tiny"):
        hub.push(tmp_path / "out", "me/heads", model="owner/tiny")
    code, out, _ = run(capsys, "pull", "me/heads", "--out", tmp_path / "back")
    assert (code, f"medusa import {tmp_path / 'back'}" in out) == (0, True)


def test_what_the_hub_refuses_is_one_sentence_and_leaves_nothing(stub: StubHub, tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", base_model="owner/tiny")
    for error, words in [
        (errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (errors.OfflineModeIsEnabled("offline"), "offline"),
        (OSError("no route to host"), "no route to host"),
    ]:
        stub.error = error
        with pytest.raises(MedusaError, match=words):
            hub.push(heads, "me/heads")
        with pytest.raises(MedusaError, match=words):
            hub.pull("me/heads", tmp_path / "back")
        assert not (tmp_path / "back").exists()
    with pytest.raises(UsageError, match="owner/name"):
        hub.push(heads, "heads")
    with pytest.raises(UsageError, match="owner/name"):
        hub.pull("../x/y")


def test_heads_whose_model_others_cannot_find_are_not_pushed(stub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --model HUB-ID"):
        hub.push(heads_in(tmp_path / "heads"), "me/heads")
    assert stub.calls == []


def test_damaged_heads_are_not_kept_when_pulled(stub: StubHub, tmp_path: Path) -> None:
    hub.push(heads_in(tmp_path / "heads", base_model="owner/tiny"), "me/heads")
    path = stub.room / "me/heads" / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MedusaError, match="truncated"):
        hub.pull("me/heads", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_lm_head_is_read_from_the_checkpoint_or_else_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count: list[object] = []
    load = base_room.zoo.load_model
    monkeypatch.setattr(base_room.zoo, "load_model", lambda *a, **k: count.append(a) or load(*a, **k))
    for family, loads in (("llama", 0), ("qwen2", 0), ("gpt_neox", 1)):  # of its own, the embeddings, other names
        model = make_model(family)
        model.save_pretrained(tmp_path / family)
        assert torch.equal(base_room.find_base(str(tmp_path / family)).lm_head(), model.get_output_embeddings().weight)
        assert len(count) == loads


@pytest.mark.real
def test_a_short_name_stands_for_its_hub_id() -> None:
    found = base_room.find_base("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert found.source.name == "smollm2-135m", "it is on this machine, the Hub is not asked"
    assert found.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
