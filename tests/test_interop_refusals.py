"""What is damaged, incomplete, foreign or dangerous is refused by name; nothing of it is executed, nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import medusa
from exchange import TREE, H, V, base, heads_in, original, residual, tensors_of, write
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.file import save_heads
from medusa.heads.module import Heads
from medusa.interop import exporting
from medusa.interop.choices import format_choices, read_choices
from medusa.interop.importing import read
from medusa.training.config import load_config
from tiny_lm import writer
from tiny_models import make_model

SAFE = "medusa_lm_head.safetensors"


def refused(path: Path, *words: str, error: type[MedusaError] = MedusaError, **options: Any) -> None:
    """The import fails with one sentence that holds these words, and leaves nothing behind."""
    with pytest.raises(error) as caught:
        medusa.import_heads(path, str(base()), path.parent / "out", **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert len(text) < 500
    assert not (path.parent / "out").exists()
    assert not list(path.parent.glob(".out*"))


# --- pickles ----------------------------------------------------------------------------------------------------------


class Malicious:
    """Unpickled with Python's own pickle, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def zipped(data: Any, path: Path) -> None:
    torch.save(data, path)


def legacy(data: Any, path: Path) -> None:
    torch.save(data, path, _use_new_zipfile_serialization=False)


def bare(data: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(data))


@pytest.mark.parametrize("save", [zipped, legacy, bare])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_is_executed(
    save: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    path = original(tmp_path / "in", residual())
    save({**residual(), "x": Malicious(touched)}, path / "medusa_lm_head.pt")
    refused(
        path, "nothing of it was executed", "asks for code to be run" if save is not bare else "no pickle as PyTorch"
    )
    assert not touched.exists()
    if save is bare:  # the same file does its harm where it is trusted
        with (path / "medusa_lm_head.pt").open("rb") as file:
            pickle.load(file)
        assert touched.exists()


def test_a_pickled_module_is_code_and_refused(tmp_path: Path) -> None:
    path = original(tmp_path / "in", {})
    torch.save(torch.nn.Linear(2, 2), path / "medusa_lm_head.pt")
    refused(path, "asks for code to be run")


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", SAFE])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(name: str, share: float, tmp_path: Path) -> None:
    path = original(tmp_path / "in", residual(), name=name)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(share * len(data))])
    refused(path, name, "get it again")


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", SAFE])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes(range(7, 250)), "get it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<html>404</html>" * 9, "get it again"),
    ],
)
def test_a_file_of_something_else_is_refused(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    path = original(tmp_path / "in", {"x": torch.zeros(1)}, name=name)
    (path / name).write_bytes(data)
    refused(path, name, words)


@pytest.mark.parametrize(("name", "save"), [(SAFE, None), ("medusa_lm_head.pt", zipped), ("medusa_lm_head.pt", legacy)])
def test_whatever_bytes_change_in_a_file_it_is_read_or_refused(
    name: str, save: Callable[[Any, Path], None] | None, tmp_path: Path
) -> None:
    small = {"0.0.linear.weight": torch.ones(4, 4), "0.0.linear.bias": torch.ones(4), "0.1.weight": torch.ones(8, 4)}
    path = original(tmp_path / "in", small, name=name)
    if save is not None:
        save(small, path / name)
    whole, chance, refusals = (path / name).read_bytes(), random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(min(len(data), 900))
            data[place : place + chance.randint(0, 2)] = bytes(
                chance.randrange(256) for _ in range(chance.randint(0, 2))
            )
        (path / name).write_bytes(data)
        try:
            read(path)
        except MedusaError:
            refusals += 1
    assert refusals > 200


def test_a_pickle_of_no_tensors_is_refused(tmp_path: Path) -> None:
    path = original(tmp_path / "in", residual())
    torch.save([torch.zeros(2)], path / "medusa_lm_head.pt")
    refused(path, "holds no tensors by name")
    torch.save({**residual(), "epoch": 3}, path / "medusa_lm_head.pt")
    refused(path, "epoch, which is no tensor")


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors_that_are_unknown_missing_or_wrong_are_refused_by_name(tmp_path: Path) -> None:
    rows, wide, nan = torch.zeros(V, H), torch.zeros(H, H + 1), torch.full((H,), float("nan"))
    path = tmp_path / "in"
    for tensors, words in [
        ({**residual(), "0.0.gate.weight": torch.zeros(H, H)}, ("0.0.gate.weight", "no part of Medusa heads")),
        ({**residual(), "optimizer": torch.zeros(1)}, ("optimizer", "no part of Medusa heads")),
        ({**residual(), "00.0.linear.bias": torch.zeros(H)}, ("00.0.linear.bias", "no part")),
        ({k: v for k, v in residual(heads=3).items() if not k.startswith("1.")}, ("1.0.linear.weight is missing",)),
        ({k: v for k, v in residual().items() if k != "1.0.linear.bias"}, ("1.0.linear.bias is missing",)),
        ({k: v for k, v in residual().items() if k != "1.1.weight"}, ("1.1.weight is missing",)),
        ({k: v for k, v in residual(layers=3).items() if not k.startswith("0.1.")}, ("0.1.linear.weight is missing",)),
        ({**residual(), "1.0.linear.weight": wide}, ("1.0.linear.weight", f"[{H}, {H + 1}]", f"[{H}, {H}]")),
        ({**residual(), "0.0.linear.weight": torch.zeros(H)}, ("0.0.linear.weight", f"[{H}]")),
        ({**residual(), "1.1.weight": rows[:-1]}, ("1.1.weight", f"[{V - 1}, {H}]", f"[{V}, {H}]")),
        ({**residual(), "1.0.linear.bias": nan}, ("1.0.linear.bias", "not a finite number")),
        ({**residual(), "1.0.linear.bias": torch.zeros(H, dtype=torch.int8)}, ("1.0.linear.bias is int8",)),
        ({**residual(), "1.3.weight": rows}, ("1.3.weight", "different depth")),
        ({**residual(), "0.1.linear.weight": torch.zeros(H, H)}, ("0.1.linear.weight", "1 layers")),
        ({**residual(), "99999.1.weight": rows}, ("99999.1.weight", "at most 16")),
        ({"0.1.weight": rows}, ("holds no blocks",)),
        ({"model.layers.0.mlp.weight": rows}, ("no Medusa heads", "model.layers.0.mlp.weight")),
    ]:
        original(path, tensors, name=SAFE)
        refused(path, *words)


def test_a_tensor_that_comes_twice_is_refused_by_name(tmp_path: Path) -> None:
    path = original(tmp_path / "in", residual(), name=SAFE)
    data = (path / SAFE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()[:-1] + b"," + data[8 : 8 + size].strip()[1:]
    (path / SAFE).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    refused(path, "twice")
    shutil.rmtree(path)
    path.mkdir()
    write(path / "model.safetensors", {f"medusa_heads.{k}": v for k, v in vllm_names().items()} | vllm_names())
    refused(path, "the same tensor")
    names = {f"medusa_head.{name}": tensor for name, tensor in residual().items()}
    (path / "model.safetensors").unlink()
    for part in "ab":
        write(path / f"{part}.safetensors", names)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    refused(path, "medusa_head.0.0.linear.bias comes twice")


def vllm_names() -> dict[str, Tensor]:
    blocks = {f"blocks.0.layers.0.{what}": t for what, t in (("weight", torch.ones(H, H)), ("bias", torch.ones(H)))}
    return {**blocks, "lm_heads.0.weight": torch.ones(V, H)}


def test_vllms_layout_is_as_strict(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.mkdir()
    rows = torch.zeros(V, H)
    for tensors, config, words in [
        ({k: v for k, v in vllm_names().items() if "lm" not in k}, {}, "lm_heads.0.weight is missing"),
        ({k: v for k, v in vllm_names().items() if "bias" not in k}, {"medusa_fc_bias": True}, "bias is missing"),
        ({**vllm_names(), "lm_head.weight": rows}, {}, "one for each"),
        ({**vllm_names(), "token_map": torch.arange(9)}, {}, "draft vocabulary"),
        ({**vllm_names(), "fc.weight": rows}, {}, "fc.weight"),
        (vllm_names(), {"hidden_size": 2 * H}, f"hidden_size {2 * H}"),
        (vllm_names(), {"vocab_size": V + 1}, f"vocab_size {V + 1}"),
    ]:
        write(path / "model.safetensors", tensors)
        (path / "config.json").write_text(json.dumps(config))
        refused(path, words)


def test_an_index_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.mkdir()
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"medusa_head.0.0.linear.bias": "../secret.safetensors"}}))
    refused(path, "../secret.safetensors", "does not lie beside it")
    index.write_text("[]")
    refused(path, "not a JSON object")
    index.write_text("{}")
    refused(path, "no weight_map")


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    refused(original(tmp_path / "in", residual(size=H // 2, lm_heads=False)), "hidden size 16", "another model")
    tensors = {k: v[:-7] if k.endswith("1.weight") else v for k, v in residual().items()}
    refused(original(tmp_path / "in", tensors), f"know {V - 7} tokens", "another model")


def test_what_is_asked_for_must_make_sense(tmp_path: Path) -> None:
    path = original(tmp_path / "in", residual())
    with pytest.raises(UsageError, match=r"--model MODEL, .*tiny-base says their config"):
        medusa.import_heads(path, out=tmp_path / "out")
    refused(tmp_path / "nowhere", "there is no")
    refused(path / "config.json", "no file of weights", error=UsageError)
    heads = heads_in(tmp_path / "ours")
    refused(heads, "heads of Medusa already", error=UsageError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no weights")
    write(tmp_path / "empty" / "a.pt", residual())
    write(tmp_path / "empty" / "b.pt", residual())
    refused(tmp_path / "empty", "a.pt, b.pt")
    (path / "config.json").write_text("{")
    refused(path, "cannot read", "config.json")


def test_heads_that_are_there_are_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    path, out = original(tmp_path / "in", residual()), heads_in(tmp_path / "out", num_heads=3)
    before = tensors_of(out)
    with pytest.raises(UsageError, match="--force"):
        medusa.import_heads(path, str(base()), out)
    assert tensors_of(out).keys() == before.keys()
    medusa.import_heads(path, str(base()), out, force=True)
    assert tensors_of(out).keys() != before.keys()


# --- trees ------------------------------------------------------------------------------------------------------------

CHOICES = """# trees of the original project
mc_small = [[0], [0, 0], [1]]
mc_wide = [(0,), (1,), (2,), (0, 1), (0, 0)]
"""


def test_trees_are_read_from_json_from_python_and_from_a_config(tmp_path: Path) -> None:
    file = tmp_path / "choices"
    file.write_text("[[0], [0, 0], [1]]")
    assert read_choices(file) == [(0,), (0, 0), (1,)]
    file.write_text(CHOICES)
    assert read_choices(file, "mc_wide") == [(0,), (1,), (2,), (0, 1), (0, 0)]
    path = original(tmp_path / "in", residual())
    found = medusa.import_heads(path, str(base()), tmp_path / "a", tree=f"{file}:mc_small")
    assert found.tree_nodes == 4
    path = original(tmp_path / "in", residual(), medusa_choices=[[0], [1], [1, 0]])
    assert medusa.import_heads(path, str(base()), tmp_path / "b").tree_nodes == 4
    (path / "medusa_choices.json").write_text("[[0]]")
    assert medusa.import_heads(path, str(base()), tmp_path / "c").tree_nodes == 2


def test_a_tree_is_written_as_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(format_choices(TREE))
    assert read_choices(tmp_path / "t") == [(0,), (1,), (0, 0)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[0], [1, 0]]", "but not its prefix"),
        ("[[0], [0]]", "twice"),
        ("[[0], [-1]]", "rank path"),
        ("[[0], [True]]", "rank path"),
        ("[[0], 1.5]", "rank path"),
        ("[]", "no list of rank paths"),
        ("{1: 2}", "no list of rank paths"),
        ("[[0], [i for i in (1,)]]", "no list of rank paths"),
        ("__import__('os').system('touch {touched}')", "no list of rank paths"),
        ("import os\nos.system('touch {touched}')\nt = [[0]]", "more than lists: line 1"),
        ("t = __import__('os').system('touch {touched}')", "no list of rank paths"),
        (CHOICES, "several trees"),
        ("'only a text'", "no tree"),
        ("[[0], [", "no list of rank paths"),
        ("(" * 900, "no list of rank paths"),
    ],
)
def test_a_file_that_is_no_tree_is_refused_and_not_executed(text: str, words: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "t.py").write_text(text.replace("{touched}", str(touched)))
    with pytest.raises(MedusaError, match=words):
        read_choices(tmp_path / "t.py")
    assert not touched.exists()


def test_a_tree_deeper_than_the_heads_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    path = original(tmp_path / "in", residual())
    (tmp_path / "t").write_text("[[0], [0, 0], [0, 0, 0]]")
    refused(path, "3 levels deep", "2 heads", tree=str(tmp_path / "t"))
    refused(path, "cannot read the tree", tree=str(tmp_path / "nowhere"))
    (tmp_path / "t").write_text(CHOICES)
    refused(path, "no tree mc_none", "mc_small, mc_wide", error=UsageError, tree=f"{tmp_path / 't'}:mc_none")


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["vllm", "tgi", "tensorrt-llm", "fasterdecoding"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "sequential"}, "these sequential heads read the ones before"),
        ({"kind": "recurrent"}, "these recurrent heads read the ones before"),
        ({"mlp_width": 8}, "gated MLPs"),
        ({"feature_layers": (1, 2)}, "read layers 1, 2 too"),
    ],
)
def test_heads_that_an_engine_cannot_run_are_refused_with_the_reason_and_the_way_out(
    to: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    heads = heads_in(tmp_path / "heads", **changes)
    with pytest.raises(UsageError) as caught:
        medusa.export_heads(heads, to, tmp_path / "out")
    text = str(caught.value)
    assert reason in text
    assert exporting.ENGINES[to] in text
    assert "medusa train --model" in text
    assert "--to hf" in text
    assert not (tmp_path / "out").exists()


def test_a_draft_vocabulary_is_refused(tmp_path: Path) -> None:
    config = HeadsConfig(kind="residual", hidden_size=H, vocab_size=V, draft_vocab=10)
    save_heads(Heads(config, TransformersBackend(writer()).base_weights(), torch.arange(10)), tmp_path / "heads")
    with pytest.raises(UsageError, match="a draft vocabulary of 10"):
        medusa.export_heads(tmp_path / "heads", "vllm", tmp_path / "out", model=str(base()))


def test_the_way_out_is_a_command_that_makes_heads_for_every_engine() -> None:
    command = exporting.way_out("MODEL").partition(": ")[2].partition(", or")[0]
    words = shlex.split(command)
    assert words[:4] == ["medusa", "train", "--model", "MODEL"]
    found = load_config(None, {"model": "MODEL"}, words[4:]).heads
    assert (found.kind, found.mlp_width, found.draft_vocab, found.feature_layers) == ("residual", 0, 0, ())


def test_a_shared_lm_head_is_refused_where_there_is_no_layout_for_it(tmp_path: Path) -> None:
    for to, changes, words in [
        ("tensorrt-llm", {}, "for vllm and tgi"),
        ("fasterdecoding", {}, "for vllm and tgi"),
        ("hf", {}, "for vllm and tgi"),
        ("vllm", {"tie_lm_head": False}, "have their own"),
        ("tgi", {"num_layers": 2}, "heads of one layer"),
    ]:
        heads = heads_in(tmp_path / "heads", **changes)
        with pytest.raises(UsageError, match=words):
            medusa.export_heads(heads, to, tmp_path / "out", shared_lm_head=True)


def test_the_original_keeps_one_layer_a_head_so_different_ones_are_refused(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", num_layers=2)
    with pytest.raises(UsageError, match="2 different ones"):
        medusa.export_heads(heads, "fasterdecoding", tmp_path / "out")


def test_an_export_replaces_nothing_but_an_export_and_that_only_when_asked_to(tmp_path: Path) -> None:
    heads, out = heads_in(tmp_path / "heads"), tmp_path / "out"
    out.mkdir()
    medusa.export_heads(heads, "tgi", out)
    before = (out / "config.json").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        medusa.export_heads(heads, "fasterdecoding", out)
    assert (out / "config.json").read_bytes() == before
    medusa.export_heads(heads, "fasterdecoding", out, force=True)
    assert not (out / SAFE).exists()
    diary = tmp_path / "diary"
    diary.mkdir()
    (diary / "README.md").write_text("mine")
    for place in (diary, heads, tmp_path):
        with pytest.raises(UsageError, match="another --out"):
            medusa.export_heads(heads, "hf", place, force=True)
    assert (diary / "README.md").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = heads_in(tmp_path / "heads")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(MedusaError, match="make room"):
        medusa.export_heads(heads, "vllm", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heads"]


def test_damaged_heads_and_another_model_are_not_exported(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads")
    other = tmp_path / "other"
    make_model("llama").save_pretrained(other)
    with pytest.raises(MedusaError, match="these heads belong to a model with"):
        medusa.export_heads(heads, "vllm", tmp_path / "out", model=str(other))
    data = (heads / "heads.safetensors").read_bytes()
    (heads / "heads.safetensors").write_bytes(data[:-9])
    with pytest.raises(MedusaError, match="truncated"):
        medusa.export_heads(heads, "vllm", tmp_path / "out")
    with pytest.raises(UsageError, match="there are no heads"):
        medusa.export_heads(tmp_path / "nowhere", "vllm", tmp_path / "out")
    with pytest.raises(UsageError, match="unknown engine"):
        medusa.export_heads(heads, "llama.cpp", tmp_path / "out")  # type: ignore[arg-type]


def test_heads_that_do_not_name_their_model_need_its_name(tmp_path: Path) -> None:
    for name in ("", "tiny as adapted by Medusa-2 (../model)"):
        heads = heads_in(tmp_path / "heads", tie_lm_head=False, base_model=name)
        with pytest.raises(UsageError, match="--model MODEL"):
            medusa.export_heads(heads, "tgi", tmp_path / "out")
    medusa.export_heads(heads, "tgi", tmp_path / "out", model=str(base()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_model_name_or_path"] == str(base())
    assert read(tmp_path / "out").num_heads == 2


def test_a_pickle_holds_its_tensors_and_no_more(tmp_path: Path) -> None:
    for tied in (True, False):
        heads = heads_in(tmp_path / "heads", tie_lm_head=tied)
        medusa.export_heads(heads, "fasterdecoding", tmp_path / "out", force=True)
        tensors = torch.load(tmp_path / "out" / "medusa_lm_head.pt", weights_only=True)
        for tensor in tensors.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert (tensors["0.1.weight"].data_ptr() == tensors["1.1.weight"].data_ptr()) == tied
