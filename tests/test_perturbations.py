"""One item of a model's files changed at a time, over every family of the native engine: what is loaded is the model
that transformers loads from the same files, or the engine is not taken and the reason is one sentence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medusa.decoding.draft import NgramDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.scheduler import decode
from medusa.engines.native_config import FAMILIES
from medusa.errors import MedusaError
from medusa.models import loading, zoo
from medusa.models.quiet import quiet
from tiny_models import agrees, make_model

pytest.importorskip("medusa_native")

PROMPT = [5, 9, 77, 31, 5, 9, 40, 12, 88, 3, 5, 9]
NEW = 14  # past the windows of the tiny models
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
ADDED = "model.layers.1.self_attn.q_proj.bias"

Change = Callable[[Path], None]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_hub_is_reachable", lambda: False)


def generated(directory: Path) -> tuple[Any, list[int]]:
    """transformers' own model and its greedy text."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        ids = torch.tensor([PROMPT])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=None,
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
    return model, out[0, len(PROMPT) :].tolist()


def loaded(directory: Path, backend: str) -> loading.LoadedModel:
    settings = loading.EngineSettings(backend=backend, dtype="float32", threads=1, progress=False)
    return loading.load_backend(zoo.resolve(str(directory)), settings)


def written(model: loading.LoadedModel) -> list[int]:
    decoder = ReferenceStepper(model.backend, NgramDrafter(), 6)
    return [token for step in decode(decoder, PROMPT, max_new_tokens=NEW) for token in step.tokens]


def assert_right_or_refused(directory: Path, backend: str) -> str:
    """The name of the backend that was taken, or "" where the files are refused."""
    refusal, model = "", None
    try:
        model = loaded(directory, backend)
    except MedusaError as error:
        refusal = str(error)
    if model is None:
        assert "\n" not in refusal
        assert 20 < len(refusal) < 500
        return ""
    try:
        network, expected = generated(directory)
    except Exception as error:
        raise AssertionError(f"transformers refuses these files: {error}") from error
    assert agrees(network, PROMPT, written(model), expected), model.facts["backend"]
    return str(model.facts["backend"])


# --- the files of each family ---------------------------------------------------------------------------------------


@cache
def _saved(family: str, root: Path) -> Path:
    path = root / family
    # Embeddings of no use as an LM head: with a tied one a random model says the same token for ever.
    make_model(family, tie_word_embeddings=False).save_pretrained(path)
    return path


@pytest.fixture
def files(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.getbasetemp() / "families"
    return Path(shutil.copytree(_saved(request.param, root), tmp_path / "model"))


def _config(directory: Path) -> dict[str, Any]:
    data = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def _edit(change: Callable[[dict[str, Any]], Any]) -> Change:
    def edit(directory: Path) -> None:
        data = _config(directory)
        change(data)
        (directory / "config.json").write_text(json.dumps(data), encoding="utf-8")

    return edit


def _set(**values: Any) -> Change:
    return _edit(lambda data: data.update(values))


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file({name: t.clone() for name, t in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})

    return edit


def _doubled(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {**value, **{name: _doubled(one) for name, one in value.items()}}
    return value + value if value else 7


def _fields(family: str) -> Iterator[tuple[str, Change]]:
    """Each field of the configuration dropped, null, doubled, of another type, and moved."""
    for name in make_model(family).config.to_dict():
        yield f"{name} dropped", _edit(lambda data, name=name: data.pop(name, None))
        yield f"{name} null", _set(**{name: None})
        yield f"{name} doubled", _edit(lambda data, name=name: data.update({name: _doubled(data.get(name))}))
        yield f"{name} as text", _edit(lambda data, name=name: data.update({name: str(data.get(name))}))
        yield f"{name} in a list", _edit(lambda data, name=name: data.update({name: [data.get(name)]}))
        yield f"{name} moved", _edit(lambda data, name=name: data.update(text_config={name: data.pop(name, None)}))


LINEAR = {"rope_type": "linear", "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"
# Fields that some configurations have, and of which a family may take note or not.
FOREIGN: dict[str, Any] = {
    "sliding_window": 6,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": [SLIDING, FULL, SLIDING],
    "no_rope_layers": [1, 0, 1],
    "no_rope_layer_interval": 2,
    "head_dim": 16,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_theta": 100.0,
    "rope_scaling": LINEAR,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 16,
    "per_layer_config": {"1": {"sliding_window": 4}},
    "tie_last_hidden_states": True,
    "transformers_weights": "other.safetensors",
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "attn_implementation": "eager",
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "logit_scale": 0.1,
    "scale_emb": 12.0,
    "residual_multiplier": 0.5,
    "is_decoder": False,
    "is_causal": False,
    "use_bidirectional_attention": True,
    "add_cross_attention": True,
    "pruned_heads": {"1": [0]},
    "temperature": 0.3,
    "repetition_penalty": 1.5,
    "num_local_experts": 4,
    "something_new": 3,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "pretraining_tp": 2,
}
ROPES: dict[str, Any] = {
    "linear": LINEAR,
    "linear, old spelling": {"type": "linear", "factor": 4.0},
    "two kinds": {"type": "linear", "rope_type": "default", "factor": 4.0},
    "no kind": {"factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all said": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5,
        "beta_fast": 16, "beta_slow": 2, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3, half said": {"rope_type": "llama3", "factor": 8.0},
    "unknown": {"rope_type": "spiral", "factor": 8.0},
    "by kind of layer": {FULL: {"rope_type": "default", "rope_theta": 1e4}, SLIDING: {**LINEAR, "rope_theta": 1e4}},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "empty": {},
}  # fmt: skip


def _additions() -> Iterator[tuple[str, Change]]:
    for name, value in FOREIGN.items():
        yield f"{name} added", _set(**{name: value})
    for name, value in ROPES.items():
        yield f"rope_scaling added: {name}", _set(rope_scaling=dict(value))
        yield f"rope_parameters: {name}", _set(rope_parameters={"rope_theta": 1e4, **value})
        yield (
            f"as older files: {name}",
            _edit(lambda d, v=value: (d.pop("rope_parameters"), d.update(rope_scaling=dict(v), rope_theta=5e3))),
        )
    yield (
        "windows said layer by layer only",
        _set(use_sliding_window=False, sliding_window=6, layer_types=[SLIDING, FULL, SLIDING]),
    )
    yield "windows without a window", _set(use_sliding_window=True, sliding_window=None, layer_types=[SLIDING] * 3)
    yield "kinds for two of three layers", _set(layer_types=[FULL, FULL])
    yield "kinds for four layers of three", _set(layer_types=[FULL] * 4, no_rope_layers=[1, 0, 1, 0])
    yield "another architecture", _set(architectures=["LlamaForSequenceClassification"])


def _prefixed(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        if name.startswith(old):
            tensors[new + name.removeprefix(old)] = tensors.pop(name)


def _weights() -> Iterator[tuple[str, Change]]:
    first = "model.layers.0.mlp.up_proj.weight"
    norm = "model.layers.1.input_layernorm.weight"
    yield "a tensor missing", _tensors(lambda t: t.pop(first))
    yield "a norm missing", _tensors(lambda t: t.pop(norm))
    yield "the LM head missing", _tensors(lambda t: t.pop("lm_head.weight"))
    yield "the embeddings missing", _tensors(lambda t: t.pop("model.embed_tokens.weight"))
    yield "a bias added", _tensors(lambda t: t.update({ADDED: torch.ones(32)}))
    yield "an unknown tensor added", _tensors(lambda t: t.update({"model.extra.weight": torch.ones(2)}))
    yield (
        "frequencies of an old file added",
        _tensors(
            lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)})
        ),
    )
    yield "a layer too many", _tensors(lambda t: _copy_layer(t, 2, 3))
    yield "a tensor renamed", _tensors(lambda t: t.update({"model.layers.0.mlp.w1.weight": t.pop(first)}))
    yield "old names of a norm", _tensors(lambda t: t.update({norm.replace("weight", "gamma"): t.pop(norm)}))
    yield "no prefix", _tensors(lambda t: _prefixed(t, "model.", ""))
    yield "no prefix and no LM head", _tensors(lambda t: (_prefixed(t, "model.", ""), t.pop("lm_head.weight", None)))
    yield "a prefix too many", _tensors(lambda t: _prefixed(t, "", "module."))
    yield "the prefix of an adapter", _tensors(lambda t: _prefixed(t, "", "base_model.model."))
    yield "rows too many", _tensors(lambda t: t.update({first: torch.cat([t[first], t[first][:1]])}))
    yield "transposed", _tensors(lambda t: t.update({first: t[first].t().contiguous()}))
    yield "in half precision", _tensors(lambda t: t.update({name: one.half() for name, one in t.items()}))
    yield "in whole numbers", _tensors(lambda t: t.update({first: t[first].to(torch.int32)}))
    yield "in double precision", _tensors(lambda t: t.update({first: t[first].double()}))
    yield (
        "tied by hand",
        _tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})),
    )


def _copy_layer(tensors: dict[str, torch.Tensor], source: int, target: int) -> None:
    names = [name for name in tensors if name.startswith(f"model.layers.{source}.")]
    tensors.update({name.replace(f".{source}.", f".{target}.", 1): tensors[name] for name in names})


def _sharded(directory: Path) -> dict[str, str]:
    """The same weights in shards; what the index says."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory)
        (directory / WEIGHTS).unlink()
        model.save_pretrained(directory, max_shard_size="20KB")
    weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    assert isinstance(weight_map, dict)
    return weight_map


def _index(change: Callable[[Path, dict[str, str]], Any]) -> Change:
    def edit(directory: Path) -> None:
        weight_map = _sharded(directory)
        change(directory, weight_map)
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / INDEX).write_text(text, encoding="utf-8")

    return edit


def _other_model_as_one_file(directory: Path) -> None:
    """Another model saved over a sharded one: shards and index are left behind."""
    _sharded(directory)
    with quiet():
        config = AutoModelForCausalLM.from_pretrained(directory).config
    other = make_model(config.model_type, seed=1, tie_word_embeddings=False)
    save_file({name: t.contiguous() for name, t in other.state_dict().items()}, directory / WEIGHTS, {"format": "pt"})


def _other_model_in_shards(directory: Path) -> None:
    """A sharded model saved over one file, which is left behind."""
    single = (directory / WEIGHTS).read_bytes()
    _tensors(lambda t: t.update({name: 1.1 * one for name, one in t.items()}))(directory)
    _sharded(directory)
    (directory / WEIGHTS).write_bytes(single)


def _with_adapter(directory: Path) -> None:
    peft = pytest.importorskip("peft")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        adapted.save_pretrained(directory)
    data = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    data["base_model_name_or_path"] = str(directory)
    (directory / "adapter_config.json").write_text(json.dumps(data), encoding="utf-8")


def _files() -> Iterator[tuple[str, Change]]:
    yield "in shards", lambda d: (_sharded(d), None)[1]
    yield "a single file over shards", _other_model_as_one_file
    yield "shards beside a single file", _other_model_in_shards
    yield "an index of a missing shard", _index(lambda d, m: (d / sorted(set(m.values()))[-1]).unlink())
    yield "an index that lacks a tensor", _index(lambda d, m: m.pop("model.norm.weight"))
    yield "an index of a tensor that is not there", _index(lambda d, m: m.update({ADDED: next(iter(m.values()))}))
    yield (
        "an index that names another shard",
        _index(lambda d, m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]})),
    )
    yield "a tensor in two shards", _index(_in_two_shards)
    yield "an adapter", _with_adapter
    yield "generation settings", lambda d: (d / "generation_config.json").unlink()


def _in_two_shards(directory: Path, weight_map: dict[str, str]) -> None:
    last = directory / sorted(set(weight_map.values()))[-1]
    other = "model.embed_tokens.weight"
    save_file({**load_file(last), other: torch.ones(160, 32)}, last, {"format": "pt"})


def changes(family: str) -> dict[str, Change]:
    return dict([*_fields(family), *_additions(), *_weights(), *_files()])


@pytest.mark.parametrize("files", FAMILIES, indirect=True, ids=str)
def test_unchanged_files_are_run_natively(files: Path) -> None:
    assert assert_right_or_refused(files, "native") == "native"


PERTURBED = [(family, name) for family in FAMILIES for name in changes(family)]


@pytest.mark.parametrize(
    ("files", "change"), PERTURBED, indirect=["files"], ids=[f"{family}: {name}" for family, name in PERTURBED]
)
def test_a_changed_item_gives_the_model_of_transformers_or_is_refused(files: Path, change: str) -> None:
    changes(_config(files)["model_type"])[change](files)
    assert_right_or_refused(files, "native")


# Public reports in which another model's text came out without a word, and the backend that is right here.
REPORTED = {
    "tie_word_embeddings added": "transformers",  # while the file holds an LM head of its own
    "a single file over shards": "native",
    "shards beside a single file": "native",
    "an adapter": "transformers",
    "rope_scaling added: linear": "native",  # as model cards advise; there are rope_parameters already
    "no prefix and no LM head": "transformers",
}


@pytest.mark.parametrize(("change", "backend"), REPORTED.items())
def test_what_was_reported_is_right_on_auto(tmp_path: Path, change: str, backend: str) -> None:
    make_model("llama", tie_word_embeddings=change.startswith("no prefix")).save_pretrained(tmp_path)
    before = generated(tmp_path)[1]
    changes("llama")[change](tmp_path)
    assert assert_right_or_refused(tmp_path, "auto") == backend
    shows = change in ("a single file over shards", "an adapter", "rope_scaling added: linear")
    assert (generated(tmp_path)[1] != before) == shows


def test_windows_without_a_width_are_refused_in_one_sentence(tmp_path: Path) -> None:
    make_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path)
    changes("qwen2")["windows said layer by layer only"](tmp_path)
    with pytest.raises(MedusaError, match="sliding attention, but no sliding_window") as error:
        loaded(tmp_path, "auto")
    assert "\n" not in str(error.value)
