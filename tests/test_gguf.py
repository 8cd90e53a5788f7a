"""GGUF files, written here with random weights: what is run is the model that the file describes, or the file is
refused by the name of what nobody reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import medusa
from medusa.errors import MedusaError
from medusa.files import cache_dir
from medusa.models import gguf_cache, zoo
from test_perturbations import loaded, written
from tiny_models import CHAT_TEMPLATE, agrees, make_model, make_tokenizer

PROMPT = [5, 9, 77, 31, 5, 9, 40, 12, 88, 3, 5, 9]
NEW = 14
FAMILIES = ("llama", "qwen2", "qwen3")
VOCAB = 267  # of the tiny tokenizer

Metadata = dict[str, Any]
Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True, params=["converted", "in place"])
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "_hub_is_reachable", lambda: False)
    if request.param == "in place":
        resolve = zoo.resolve
        monkeypatch.setattr(zoo, "resolve", lambda name, **options: resolve(name, **{"in_place": True, **options}))


@cache
def model_of(family: str, changes: str = "{}") -> PreTrainedModel:
    """A float32 model whose weights bfloat16 holds exactly. `changes`, as JSON, go to its configuration."""
    settings = {"vocab_size": VOCAB, "tie_word_embeddings": False, "use_sliding_window": False}
    if family == "llama":
        del settings["use_sliding_window"]
    return make_model(family, **{**settings, **json.loads(changes)}).to(torch.bfloat16).float()


def tensors_of(model: PreTrainedModel) -> Tensors:
    """The weights under the names of GGUF, as llama.cpp's converter lays them out."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        rows = tensor
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if config.model_type == "llama" and part in name:
                rows = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        tensors[f"{names.get_name(stem)}.{suffix}"] = rows.contiguous().numpy()
    return tensors


def metadata_of(model: PreTrainedModel) -> Metadata:
    config = model.config
    arch = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokenizer = make_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    found = {
        "general.architecture": arch,
        "general.name": "tiny",
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if i < 3 else 1 for _, i in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if arch == "qwen3":
        found |= {"qwen3.attention.key_length": head_dim, "qwen3.attention.value_length": head_dim}
    return found


def write(path: Path, metadata: Metadata, tensors: Tensors, kind: str = "F32") -> Path:
    """`kind`: of the matrices. Those of bytes are packed already."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":  # which the writer has written
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        raw = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        packed = tensor if tensor.dtype == np.uint8 else gguf.quants.quantize(tensor.astype(np.float32), raw)
        writer.add_tensor(name, packed, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_file(path: Path, family: str = "llama", *, changes: Mapping[str, Any] | None = None, **metadata: Any) -> Path:
    model = model_of(family)
    tensors = tensors_of(model)
    for name, tensor in (changes or {}).items():
        tensors[name] = tensor
    return write(path / f"{family}.gguf", {**metadata_of(model), **metadata}, tensors)


def text_of(path: Path) -> list[int]:
    with_reader = loaded(path, "auto")
    assert with_reader.facts["backend"] == "native"
    return written(with_reader)


def assert_runs(path: Path, model: PreTrainedModel) -> None:
    """The file gives the greedy text of `model`."""
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )
    assert agrees(model, PROMPT, text_of(path), out[0, len(PROMPT) :].tolist())


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(MedusaError) as error:
        loaded(path, "auto")
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert not list((cache_dir() / "models").glob("*")), "nothing is kept of a file that is refused"


# --- whole files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_text_of_its_model(tmp_path: Path, family: str) -> None:
    path = tiny_file(tmp_path, family)
    assert_runs(path, model_of(family))
    config = json.loads((Path(zoo.resolve(str(path)).location) / "config.json").read_text())
    from medusa.engines.native_config import is_complete

    assert is_complete(config), "so that transformers need not be started"


def test_a_file_without_an_lm_head_is_tied(tmp_path: Path) -> None:
    model = model_of("llama", '{"tie_word_embeddings": true}')
    tensors = tensors_of(model)
    del tensors["output.weight"]
    assert_runs(write(tmp_path / "tied.gguf", metadata_of(model), tensors), model)


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_norm.weight", "output_norm.weight"])
def test_a_missing_tensor_is_refused(tmp_path: Path, name: str) -> None:
    model = model_of("llama")
    tensors = tensors_of(model)
    del tensors[name]
    assert_refused(write(tmp_path / "part.gguf", metadata_of(model), tensors), "missing", "get the file again")


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.3.ffn_up.weight", "rope_factors_long.weight", "extra"])
def test_a_tensor_that_would_be_left_out_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    assert_refused(tiny_file(tmp_path, changes={name: np.ones(32, np.float32)}), name)


def test_one_of_several_parts_is_refused(tmp_path: Path) -> None:
    path = tiny_file(tmp_path, **{"split.no": 0, "split.count": 2, "split.tensors.count": 30})
    assert_refused(path, "one of 2 parts", "join")
    assert_runs(tiny_file(tmp_path, **{"split.count": 1}), model_of("llama"))


def test_a_transformers_that_is_too_old_to_read_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("transformers.integrations.gguf.gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS")
    path = tiny_file(tmp_path)
    with pytest.raises(MedusaError, match=r"transformers 5\.\d+\.\d+ is too old .* pip install 'transformers>=5\.20'"):
        zoo.resolve(str(path), progress=False)


def test_a_conversion_of_an_earlier_version_is_not_used(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    location = Path(zoo.resolve(str(path), progress=False, in_place=False).location)
    manifest = json.loads((location / gguf_cache.MANIFEST).read_text())
    (location / gguf_cache.MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    (location / "model.safetensors").write_bytes(b"noise")
    zoo.resolve(str(path), progress=False, in_place=False)
    assert (location / "model.safetensors").stat().st_size > 1000


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def rope(**settings: Any) -> PreTrainedModel:
    return model_of("llama", json.dumps({"rope_parameters": {"rope_theta": 10_000.0, **settings}}))


def test_linear_scaling_is_taken_over(tmp_path: Path) -> None:
    wanted = rope(rope_type="linear", factor=4.0)
    path = tiny_file(tmp_path, **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert_runs(path, wanted)
    assert_runs(tiny_file(tmp_path, **{"llama.rope.scaling.factor": 4.0}), wanted)
    assert_runs(tiny_file(tmp_path, **{"llama.rope.scaling.type": "none"}), model_of("llama"))


def test_yarn_is_taken_over(tmp_path: Path) -> None:
    said = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    assert_runs(tiny_file(tmp_path, **said), rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64))
    more = {**said, "llama.rope.scaling.yarn_beta_fast": 8.0, "llama.rope.scaling.yarn_beta_slow": 2.0}
    wanted = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=2.0)
    assert_runs(tiny_file(tmp_path, **more), wanted)


def llama3_divisors(head_dim: int, factor: float, original: float) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    divisors = []
    for i in range(0, head_dim, 2):
        length = 2 * math.pi * 10_000.0 ** (i / head_dim)
        if length < original / 4:
            divisors.append(1.0)
        elif length > original / 1:
            divisors.append(factor)
        else:
            smooth = (original / length - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 256), (32.0, 64)])
def test_the_frequencies_of_llama_3_are_taken_over(tmp_path: Path, factor: float, original: int) -> None:
    wanted = rope(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=original,
    )
    assert_runs(tiny_file(tmp_path, changes={"rope_freqs.weight": llama3_divisors(8, factor, original)}), wanted)


def test_the_frequencies_of_real_files_are_recognised() -> None:
    from medusa.models.gguf import Header, _llama3

    for theta, head_dim, factor in ((500_000.0, 128, 8.0), (500_000.0, 64, 32.0)):
        length = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = (8192 / length - 1) / 3
        divisors = np.where(length < 2048, 1, np.where(length > 8192, factor, 1 / ((1 - smooth) / factor + smooth)))
        header = Header(Path("x"), {"general.architecture": "llama"}, (), divisors.astype(np.float32))
        found = _llama3(header, theta, head_dim)
        assert (found["factor"], found["original_max_position_embeddings"]) == (factor, 8192)


def test_other_frequencies_are_refused(tmp_path: Path) -> None:
    odd = np.array([1.0, 1.5, 2.0, 8.0], np.float32)
    assert_refused(tiny_file(tmp_path, changes={"rope_freqs.weight": odd}), "rope_freqs.weight")
    assert_runs(tiny_file(tmp_path, changes={"rope_freqs.weight": np.ones(4, np.float32)}), model_of("llama"))
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    both = tiny_file(tmp_path, changes={"rope_freqs.weight": llama3_divisors(8, 8.0, 256)}, **scaled)
    with pytest.raises(MedusaError, match=r"rope_freqs\.weight and a rope\.scaling\.type"):
        loaded(both, "auto")


# --- ends of texts ------------------------------------------------------------------------------------------------


def test_all_end_tokens_that_the_file_names_end_a_text(tmp_path: Path) -> None:
    path = tiny_file(
        tmp_path,
        **{"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 7},
    )
    assert set(medusa.load(str(path), progress=False, heads="none").eos_token_ids) == {0, 2, 7}


# --- one item at a time -----------------------------------------------------------------------------------------------

# Keys of which another value describes another model, which transformers can be told, too.
OTHER_MODEL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "attention.layer_norm_rms_epsilon": lambda value: {"rms_norm_eps": float(np.float32(value))},
    "rope.freq_base": lambda value: {"rope_parameters": {"rope_type": "default", "rope_theta": value}},
    "context_length": lambda value: {"max_position_embeddings": value},
}
# Keys that some files have: of other models, of no effect, or of a great one.
FOREIGN: Metadata = {
    "attention.sliding_window": 4,
    "attention.scale": 0.5,
    "attention.causal": False,
    "attention.key_length": 4,
    "attention.value_length": 12,
    "attention.clamp_kqv": 1.0,
    "attention.layer_norm_epsilon": 0.1,
    "attention.max_alibi_bias": 8.0,
    "attention.temperature_scale": 0.1,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "logit_scale": 0.5,
    "embedding_scale": 12.0,
    "residual_scale": 0.5,
    "expert_count": 4,
    "expert_used_count": 2,
    "use_parallel_residual": True,
    "tensor_data_layout": "Meta AI original pth",
    "rope.dimension_count": 4,
    "rope.scaling.type": "longrope",
    "rope.scaling.attn_factor": 2.0,
    "rope.scaling.alpha": 2.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.dimension_sections": [2, 1, 1],
    "pooling_type": 1,
    "interleave_moe_layer_step": 1,
}
NEUTRAL: Metadata = {
    "attention.sliding_window": 4096,
    "attention.causal": True,
    "expert_count": 0,
    "rope.scaling.finetuned": True,
    "rope.scaling.attn_factor": 1.0,
}
WHOLE_FILE: Metadata = {
    "general.type": "adapter",
    "adapter.type": "lora",
    "clip.has_vision_encoder": True,
    "gemma2.final_logit_softcapping": 5.0,
    "tokenizer.ggml.pre": "unheard-of",
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.ggml.remove_extra_whitespaces": True,
    "tokenizer.ggml.eos_token_id": 5000,
    "tokenizer.ggml.unheard_of": True,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", FOREIGN)
def test_a_key_that_nobody_reads_is_refused_by_its_name(tmp_path: Path, family: str, key: str) -> None:
    assert_refused(tiny_file(tmp_path, family, **{f"{family}.{key}": FOREIGN[key]}), key.rpartition(".")[2])


@pytest.mark.parametrize("key", WHOLE_FILE)
def test_a_key_of_the_whole_file_that_nobody_reads_is_refused(tmp_path: Path, key: str) -> None:
    assert_refused(
        tiny_file(tmp_path, **{key: WHOLE_FILE[key]}), str(WHOLE_FILE[key]) if key == "general.type" else key
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_no_effect_change_nothing(tmp_path: Path, family: str) -> None:
    notes = {f"{family}.{key}": value for key, value in NEUTRAL.items()}
    notes |= {"quantize.imatrix.file": "x", "general.license": "mit", "tokenizer.ggml.fim_pre_token_id": 5}
    assert_runs(tiny_file(tmp_path, family, **notes), model_of(family))


def _keys(family: str) -> list[str]:
    return [key for key in metadata_of(model_of(family)) if key != "general.architecture"]


@pytest.mark.parametrize(
    ("family", "key", "change"),
    [
        (family, key, change)
        for family in FAMILIES
        for key in _keys(family)
        for change in ("dropped", "doubled", "text")
    ],
)
def test_a_changed_key_gives_the_model_that_it_describes_or_is_refused(
    tmp_path: Path, family: str, key: str, change: str
) -> None:
    model = model_of(family)
    metadata = metadata_of(model)
    value = metadata.pop(key)
    wanted = model
    if change == "doubled":
        metadata[key] = (not value) if isinstance(value, bool) else value + value
        if (name := key.removeprefix(f"{family}.")) in OTHER_MODEL:
            wanted = model_of(family, json.dumps(OTHER_MODEL[name](metadata[key])))
    elif change == "text":
        metadata[key] = "7"
    path = write(tmp_path / "changed.gguf", metadata, tensors_of(model))
    try:
        zoo.resolve(str(path), progress=False)
    except MedusaError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert_runs(path, wanted)
