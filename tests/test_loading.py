"""Which backend is taken, and why."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import medusa
from medusa.engines.native_config import is_complete, native_config
from medusa.engines.protocol import MAX_NODES
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.models import loading, zoo
from tiny_models import make_model, make_tokenizer

PROMPT = "the and"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each of two families: the native engine runs one of them."""
    directories = {}
    for family in ("llama", "gpt2"):
        directories[family] = tmp_path_factory.mktemp(family)
        make_model(family, vocab_size=300).save_pretrained(directories[family])
        make_tokenizer().save_pretrained(directories[family])
    return directories


def load(path: Path, **options: object) -> medusa.LanguageModel:
    return medusa.load(str(path), progress=False, **options)  # type: ignore[arg-type]


def test_auto_takes_the_native_engine_where_it_can_run_the_model(saved: dict[str, Path]) -> None:
    pytest.importorskip("medusa_native")
    facts = load(saved["llama"]).describe()
    assert facts["backend"] == "native"
    assert facts["backend_reason"] == "it can run this model here"
    other = load(saved["gpt2"]).describe()
    assert other["backend"] == "transformers"
    assert "not gpt2" in str(other["backend_reason"])


def test_every_backend_takes_trees_of_as_many_nodes() -> None:
    engine = pytest.importorskip("medusa_native")
    assert engine.MAX_NODES == MAX_NODES == TransformersBackend.max_nodes


def test_auto_says_why_it_does_not_take_the_native_engine(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("medusa_native")
    settings = loading.EngineSettings(progress=True)
    for family, told in (("llama", 0), ("gpt2", 1)):
        loading.load_backend(zoo.resolve(str(saved[family])), settings)
        lines = capsys.readouterr().err.splitlines()
        assert (
            sum("runs on transformers, not on the faster native engine: it runs llama" in line for line in lines)
            == told
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_model_on_the_native_engine_writes(saved: dict[str, Path], dtype: str) -> None:
    pytest.importorskip("medusa_native")
    model = load(saved["llama"], dtype=dtype)
    plain = load(saved["llama"], dtype=dtype, drafter="none")
    assert model.generate(PROMPT, max_new_tokens=20).token_ids == plain.generate(PROMPT, max_new_tokens=20).token_ids


def test_both_backends_write_the_same_in_float32(saved: dict[str, Path]) -> None:
    pytest.importorskip("medusa_native")
    texts = {
        load(saved["llama"], dtype="float32", backend=name).generate(PROMPT, max_new_tokens=20).token_ids
        for name in ("native", "transformers")
    }
    assert len(texts) == 1


def test_what_the_native_engine_cannot_do_is_said_where_it_is_asked_for(saved: dict[str, Path]) -> None:
    pytest.importorskip("medusa_native")
    with pytest.raises(MedusaError, match=r"cannot run .* not gpt2"):
        load(saved["gpt2"], backend="native")
    with pytest.raises(MedusaError, match="--compile is for transformers"):
        load(saved["llama"], backend="native", compile=True)
    with pytest.raises(MedusaError, match="not on cuda"):
        load(saved["llama"], backend="native", device="cuda")
    with pytest.raises(UsageError, match="int4 needs the native backend"):
        load(saved["llama"], backend="transformers", dtype="int4")


@pytest.mark.parametrize("backend", ["native", "transformers"])
def test_what_is_done_meanwhile_is_done_by_the_callers_thread(saved: dict[str, Path], backend: str) -> None:
    """Two threads that import transformers get in each other's way."""
    if backend == "native":
        pytest.importorskip("medusa_native")
    threads = []
    source = zoo.resolve(str(saved["llama"]))
    settings = loading.EngineSettings(backend=backend, progress=False)
    loading.load_backend(source, settings, meanwhile=lambda: threads.append(threading.get_ident()))
    assert set(threads) == {threading.get_ident()}


def test_without_the_extension_everything_runs_on_transformers(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "medusa_native", None)
    model = load(saved["llama"])
    assert model.backend.name == "transformers"
    assert "pip install ./native" in str(model.describe()["backend_reason"])
    with pytest.raises(MedusaError, match=r"pip install \./native"):
        load(saved["llama"], backend="native")


def test_a_complete_configuration_file_says_what_transformers_would(saved: dict[str, Path]) -> None:
    data = json.loads((saved["llama"] / "config.json").read_text())
    assert is_complete(data)
    assert native_config(SimpleNamespace(**data)) == native_config(zoo.load_config(zoo.resolve(str(saved["llama"]))))
    for name in ("hidden_size", "rope_parameters", "attention_bias"):
        assert not is_complete({key: value for key, value in data.items() if key != name})
    assert not is_complete({**data, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}})
    assert not is_complete({**data, "model_type": "gpt2"})


def test_an_incomplete_configuration_file_is_filled_in_by_transformers(saved: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("medusa_native")
    for file in saved["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "config.json").read_text())
    del data["attention_bias"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    text = load(tmp_path, dtype="float32").generate(PROMPT, max_new_tokens=20).text
    assert text == load(saved["llama"], dtype="float32").generate(PROMPT, max_new_tokens=20).text


def test_the_tokenizer_is_the_same_with_and_without_a_search_for_its_class(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = zoo.resolve(str(saved["llama"]))
    assert zoo._needs_no_search(source)
    direct = zoo.load_tokenizer(source)
    monkeypatch.setattr(zoo, "_needs_no_search", lambda _: False)
    searched = zoo.load_tokenizer(source)
    assert direct.get_vocab() == searched.get_vocab()
    assert (direct.chat_template, direct.eos_token_id) == (searched.chat_template, searched.eos_token_id)
    assert direct("the and é <|end|>")["input_ids"] == searched("the and é <|end|>")["input_ids"]


def test_end_tokens_come_from_the_generation_config_or_else_from_the_model(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert loading._eos(tmp_path, 2) == (3, 4)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(MedusaError, match="not valid JSON"):
        loading._eos(tmp_path, 2)
    (tmp_path / "generation_config.json").unlink()
    assert loading._eos(tmp_path, 2) == (2,)
    assert loading._eos(tmp_path, None) == ()
