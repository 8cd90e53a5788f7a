"""Heads of other projects here, and ours there: layouts as they are described, and there and back without a change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import medusa
from exchange import TREE, H, V, base, heads_in, inventory, original, residual, said_with, tensors_of, write
from medusa.engines.transformers import TransformersBackend
from medusa.heads.file import load_heads, read_config
from medusa.interop.importing import read
from tiny_lm import writer

GOLDEN = Path(__file__).parent / "golden"
COMMON = ("vllm", "tgi", "tensorrt-llm")
# format -> who it is for, whether the LM head is shared, and heads that it can hold
FORMATS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "common": ("vllm", False, {"num_layers": 2, "tie_lm_head": False}),
    "vllm-shared": ("vllm", True, {"num_layers": 2}),
    "tgi-shared": ("tgi", True, {}),
    "fasterdecoding": ("fasterdecoding", False, {"tie_lm_head": False, "dtype": torch.float16}),
    "hf": ("hf", False, {"kind": "recurrent", "mlp_width": 8, "feature_layers": (1,), "dtype": torch.bfloat16}),
}


def golden(name: str, found: dict[str, Any]) -> None:
    """Compares with tests/golden/NAME.json. The model's path, which is of this machine, stands there as BASE."""
    text = json.dumps(found, indent=1, sort_keys=True).replace(str(base()), "BASE")
    assert json.loads(text) == json.loads((GOLDEN / f"{name}.json").read_text())


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_has_the_keys_shapes_and_config_of_its_golden_file(name: str, tmp_path: Path) -> None:
    to, shared, changes = FORMATS[name]
    heads = heads_in(tmp_path / "heads", tree=TREE, **{"dtype": torch.bfloat16, **changes})
    made = medusa.export_heads(heads, to, tmp_path / "out", shared_lm_head=shared)
    golden(name, inventory(tmp_path / "out"))
    assert made.num_heads == 2
    assert set(made.files) == set(inventory(tmp_path / "out")["files"])
    assert made.size_bytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())


def test_one_directory_serves_vllm_tgi_and_tensorrt_llm(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", tie_lm_head=False)
    for to in COMMON:
        assert medusa.export_heads(heads, to, tmp_path / to).serves == COMMON
    bodies = [{p.name: p.read_bytes() for p in (tmp_path / to).iterdir()} for to in COMMON]
    assert bodies[0] == bodies[1] == bodies[2]
    config = json.loads(bodies[0]["config.json"])
    assert "architectures" not in config, "TGI would take it for a model"
    assert [k for k in config if "num" in k and ("heads" in k or "layers" in k)] == [
        "medusa_num_heads",
        "medusa_num_layers",
    ], "vLLM would take any other for one of these"


def test_a_tied_lm_head_is_copied_from_the_model_for_each_head(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads")
    medusa.export_heads(heads, "tensorrt-llm", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "medusa_lm_head.safetensors")
    rows = writer().get_output_embeddings().weight
    assert torch.equal(tensors["0.1.weight"], rows)
    assert torch.equal(tensors["1.1.weight"], rows)
    ours = tensors_of(heads)
    assert torch.equal(tensors["1.0.linear.bias"], ours["blocks.1.0.linear.bias"])


def test_an_export_computes_what_our_heads_compute(tmp_path: Path) -> None:
    """h + SiLU(W h + b) layer by layer, then the LM head, by the exported tensors alone."""
    heads = heads_in(tmp_path / "heads", num_layers=2, tie_lm_head=False)
    medusa.export_heads(heads, "vllm", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "medusa_lm_head.safetensors")
    h = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
    expected = logits_of(heads, h)
    for k in range(2):
        x = h
        for i in range(2):
            x = x + torch.nn.functional.silu(x @ tensors[f"{k}.{i}.linear.weight"].T + tensors[f"{k}.{i}.linear.bias"])
        torch.testing.assert_close(x @ tensors[f"{k}.2.weight"].T, expected[k])


class ResBlock(nn.Module):
    """As the original project has it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.silu(self.linear(x))


def original_modules(heads: int, layers: int) -> nn.ModuleList:
    """Its heads: all layers of a head are one module."""
    return nn.ModuleList(nn.Sequential(*([ResBlock()] * layers), nn.Linear(H, V, bias=False)) for _ in range(heads))


@pytest.mark.parametrize("layers", [1, 3])
def test_the_originals_own_modules_load_our_export_and_we_load_theirs(layers: int, tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", num_layers=layers, tie_lm_head=False, same_layers=True)
    medusa.export_heads(heads, "fasterdecoding", tmp_path / "out")
    theirs = original_modules(2, layers)
    theirs.load_state_dict(torch.load(tmp_path / "out" / "medusa_lm_head.pt", weights_only=True))  # strict
    h = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
    for k, logits in enumerate(logits_of(heads, h)):
        torch.testing.assert_close(theirs[k](h), logits)
    theirs = original_modules(3, layers)
    medusa.import_heads(original(tmp_path / "in", theirs.state_dict()), str(base()), tmp_path / "back")
    for k, logits in enumerate(logits_of(tmp_path / "back", h)):
        torch.testing.assert_close(theirs[k](h), logits)


def logits_of(directory: Path, hidden: Tensor) -> list[Tensor]:
    """What the heads in a directory say of hidden states [B, H]: K times [B, V]."""
    heads = load_heads(directory, TransformersBackend(writer()).base_weights())
    return heads(hidden, torch.zeros(len(hidden), heads.config.num_heads, dtype=torch.long))


def test_transformers_runs_the_hf_export_and_its_text_is_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    heads = heads_in(tmp_path / "heads", kind="sequential", feature_layers=(1,))
    medusa.export_heads(heads, "hf", tmp_path / "out")
    shutil.rmtree(heads)  # the export stands by itself
    model = writer()
    inputs = {"input_ids": torch.tensor([[70, 71, 72, 73]])}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    asked: list[Any] = []
    make = medusa.custom_generate
    monkeypatch.setitem(vars(medusa), "custom_generate", lambda **given: asked.append(given) or make(**given))
    for _ in range(2):
        found = model.generate(
            **inputs, **options, custom_generate=str(tmp_path / "out"), trust_remote_code=True, drafter="heads", nodes=4
        )
        assert torch.equal(found, model.generate(**inputs, **options))
    assert asked == [{"heads": str(tmp_path / "out"), "drafter": "heads", "nodes": 4}], "made once, for two calls"


# --- there and back ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    to=st.sampled_from(["vllm", "tgi", "tensorrt-llm", "fasterdecoding"]),
    heads=st.integers(1, 4),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    shared=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_export_and_import_give_the_same_heads_and_the_same_texts(
    to: str, heads: int, layers: int, tied: bool, shared: bool, dtype: torch.dtype
) -> None:
    shared = shared and tied and (to == "vllm" or (to == "tgi" and layers == 1))
    with TemporaryDirectory() as room:
        before = heads_in(
            Path(room) / "heads",
            num_heads=heads,
            num_layers=layers,
            tie_lm_head=tied,
            dtype=dtype,
            same_layers=to == "fasterdecoding",
            tree=TREE if heads > 1 else (),
        )
        medusa.export_heads(before, to, Path(room) / "out", shared_lm_head=shared)
        found = medusa.import_heads(Path(room) / "out", str(base()), Path(room) / "back")
        expected, config = tensors_of(before), read_config(before)
        back = tensors_of(Path(room) / "back")
        assert back.keys() == expected.keys()
        for name, tensor in expected.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor), name
        again = read_config(Path(room) / "back")
        same = (
            "kind",
            "num_heads",
            "num_layers",
            "tie_lm_head",
            "hidden_size",
            "vocab_size",
            "base_model",
            "vocab_hash",
        )
        assert [getattr(again, name) for name in same] == [getattr(config, name) for name in same]
        assert {path for path, _ in again.tree} == {path for path, _ in config.tree}
        assert (found.num_heads, found.num_layers) == (heads, layers)
        assert said_with(Path(room) / "back") == said_with(before)


def test_heads_in_8_bits_are_exported_in_bfloat16_and_for_transformers_as_they_are(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", weights="int8", tie_lm_head=False)
    made = medusa.export_heads(heads, "tgi", tmp_path / "out")
    assert made.dtype == "bfloat16"
    assert "the heads were kept in 8 bits, and are written in bfloat16" in made.notes
    tensors = load_file(tmp_path / "out" / "medusa_lm_head.safetensors")
    expected = tensors_of(heads)["blocks.1.0.linear.weight"]
    assert torch.equal(tensors["1.0.linear.weight"], expected.bfloat16())
    assert medusa.export_heads(heads, "hf", tmp_path / "hf").dtype == "int8"
    assert (tmp_path / "hf" / "heads.safetensors").read_bytes() == (heads / "heads.safetensors").read_bytes()


def test_the_hf_export_is_heads_as_they_are(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", kind="recurrent", tree=TREE)
    medusa.export_heads(heads, "hf", tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(heads)
    assert said_with(tmp_path / "out") == said_with(heads)


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_counts_are_those_of_the_tensors_whatever_the_config_says(name: str, tmp_path: Path) -> None:
    path = original(tmp_path / "in", residual(heads=5, layers=2), name=name)
    golden(f"fasterdecoding-v0.1{Path(name).suffix}", inventory(path))
    found = medusa.import_heads(path, str(base()), tmp_path / "out")
    assert (found.num_heads, found.num_layers, found.lm_heads) == (5, 2, "one for each")
    assert found.notes == (
        "the config says medusa_num_heads 2, the tensors are 5",
        "the config says medusa_num_layers 1, the tensors are 2",
    )
    assert torch.equal(tensors_of(tmp_path / "out")["lm_heads.4"], residual(heads=5, layers=2)["4.2.weight"])


def test_version_2_ends_in_the_models_own_lm_head(tmp_path: Path) -> None:
    path = original(tmp_path / "in", residual(lm_heads=False), name="medusa_lm_head.safetensors", version="2")
    golden("version-2", inventory(path))
    found = medusa.import_heads(path, str(base()), tmp_path / "out")
    assert (found.layout, found.lm_heads) == ('"version 2"', "the model's own")
    assert read_config(tmp_path / "out").tie_lm_head


def whole_model(directory: Path) -> Path:
    """v1.0: an ordinary Llama checkpoint with heads among its tensors; without the counts, as some uploads are."""
    shutil.copytree(base(), directory)
    model = load_file(directory / "model.safetensors")
    write(directory / "model.safetensors", model | {f"medusa_head.{k}": t for k, t in residual(heads=3).items()})
    return directory


def test_heads_of_a_whole_model_are_found_and_belong_to_it(tmp_path: Path) -> None:
    path = whole_model(tmp_path / "whole")
    seen = inventory(path)["model.safetensors"]
    golden("fasterdecoding-v1.0", {k: v for k, v in seen.items() if k.startswith("medusa_head.")})
    found = medusa.import_heads(path, out=tmp_path / "out")
    assert (found.num_heads, found.num_layers, found.base_model) == (3, 1, str(path))
    lm = medusa.load(model=str(path), heads=str(tmp_path / "out"), backend="transformers", dtype="float32", nodes=4)
    plain = medusa.load(model=str(path), heads="none", drafter="none", backend="transformers", dtype="float32")
    options: dict[str, Any] = {"raw": True, "max_new_tokens": 12}
    assert lm.generate("The sky", **options).text == plain.generate("The sky", **options).text


def test_a_whole_model_in_several_files_is_read_from_all(tmp_path: Path) -> None:
    path = whole_model(tmp_path / "whole")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in parts.items():
        write(path / file, {name: tensors[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read(path).num_heads == 3
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(medusa.MedusaError, match=r"00002-of-00002\.safetensors is missing"):
        read(path)


def vllm_native(directory: Path, *, shared: bool, bias: bool = True, **config: Any) -> Path:
    tensors = {}
    for name, tensor in residual(heads=2, layers=2).items():
        h, i, *rest = name.split(".")
        if rest == ["weight"]:
            tensors["lm_head.weight" if shared else f"lm_heads.{h}.weight"] = tensor
        elif bias or rest[-1] == "weight":
            tensors[f"blocks.{h}.layers.{i}.{rest[-1]}"] = tensor
    settings = {"model_type": "medusa", "hidden_size": H, "vocab_size": V, "num_heads": 2, "num_hidden_layers": 2}
    settings |= {"original_lm_head": shared, **config}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    write(directory / "model.safetensors", tensors)
    return directory


@pytest.mark.parametrize("shared", [False, True])
def test_vllms_own_layout_is_read(shared: bool, tmp_path: Path) -> None:
    path = vllm_native(tmp_path / "in", shared=shared, medusa_fc_bias=True)
    golden("vllm-native-shared" if shared else "vllm-native", inventory(path))
    found = medusa.import_heads(path, str(base()), tmp_path / "out")
    assert (found.num_heads, found.num_layers, found.notes) == (2, 2, ())
    assert found.lm_heads == ("one for all" if shared else "one for each")
    back = tensors_of(tmp_path / "out")
    assert torch.equal(back["lm_heads.0"], back["lm_heads.1"]) == shared


def test_vllms_heads_without_biases_have_zeros_and_biases_that_vllm_drops_are_reported(tmp_path: Path) -> None:
    found = medusa.import_heads(vllm_native(tmp_path / "a", shared=False, bias=False), str(base()), tmp_path / "a-out")
    assert found.notes == ("the layers have no biases: zeros",)
    assert not tensors_of(tmp_path / "a-out")["blocks.1.1.linear.bias"].any()
    found = medusa.import_heads(vllm_native(tmp_path / "b", shared=False), str(base()), tmp_path / "b-out")
    assert "vLLM drops the biases" in found.notes[0]


def test_a_layer_that_stands_for_all_of_a_heads_is_copied_for_each(tmp_path: Path) -> None:
    tensors = residual(heads=2, layers=3)
    alone = {name: tensor for name, tensor in tensors.items() if ".1.linear" not in name and ".2.linear" not in name}
    found = medusa.import_heads(original(tmp_path / "in", alone), str(base()), tmp_path / "out")
    assert found.num_layers == 3
    assert found.notes[0] == "one layer stands for all 3 of each head"
    back = tensors_of(tmp_path / "out")
    for layer in range(3):
        assert torch.equal(back[f"blocks.1.{layer}.linear.weight"], tensors["1.0.linear.weight"])


def test_layers_that_share_their_memory_in_a_pickle_are_copied_for_each(tmp_path: Path) -> None:
    tensors = residual(heads=1, layers=2)
    for what in ("weight", "bias"):
        tensors[f"0.1.linear.{what}"] = tensors[f"0.0.linear.{what}"]
    found = medusa.import_heads(original(tmp_path / "in", tensors), str(base()), tmp_path / "out")
    back = tensors_of(tmp_path / "out")
    assert found.num_layers == 2
    assert torch.equal(back["blocks.0.0.linear.weight"], back["blocks.0.1.linear.weight"])


def test_lm_heads_that_are_copies_of_the_models_own_are_dropped(tmp_path: Path) -> None:
    rows = writer().get_output_embeddings().weight.detach()
    tensors = residual() | {"0.1.weight": rows, "1.1.weight": rows.clone()}
    found = medusa.import_heads(original(tmp_path / "in", tensors), str(base()), tmp_path / "out")
    assert "copies of the model's own" in found.notes[0]
    assert read_config(tmp_path / "out").tie_lm_head


def test_mixed_dtypes_become_the_one_that_holds_them_all(tmp_path: Path) -> None:
    tensors = residual()
    tensors["0.0.linear.weight"] = tensors["0.0.linear.weight"].half()
    tensors["0.0.linear.bias"] = tensors["0.0.linear.bias"].bfloat16()
    medusa.import_heads(original(tmp_path / "in", tensors), str(base()), tmp_path / "out")
    back = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
    assert torch.equal(back["blocks.0.0.linear.weight"], tensors["0.0.linear.weight"].float())
