"""`medusa train --kind residual --from HEADS`: from heads that other engines cannot run to heads that they can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import medusa
from exchange import base, heads_in
from medusa.errors import UsageError
from medusa.heads.file import read_config, write_config
from medusa.interop.exporting import way_out
from medusa.training.config import load_config
from medusa.training.parallel import check_fits, settings_from
from test_train_run import SMALL, run, save_model
from tiny_models import CHAT_TEMPLATE, TOKENIZER_VOCAB, make_model, make_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def silent(text: str) -> None:
    raise AssertionError(text)


def test_heads_that_an_engine_refuses_lead_to_heads_that_it_takes(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("train", "--model", str(saved), "--out", str(first), *SMALL, "heads.num_heads=3") == 0
    with pytest.raises(UsageError, match="medusa train --kind residual --from HEADS"):
        medusa.export_heads(first / "heads", "vllm", tmp_path / "export")
    shared = [word for word in SMALL if word.startswith(("engine.", "training."))]
    options = ["--dtype", "float32", "--max-steps", "8", *shared, "--out", str(second)]
    capfd.readouterr()
    assert run("train", "--kind", "residual", "--from", str(first / "heads"), *options) == 0
    assert "Writing text" not in capfd.readouterr().err  # it is that of the first run
    settings = yaml.safe_load((second / "run.yaml").read_text())
    assert settings["model"] == str(saved)
    assert settings["text"]["data"] == [str(first / "text.jsonl")]
    assert settings["text"]["held_out"] == 0.3
    assert settings["training"]["distillation"] == 1
    config = read_config(second / "heads")
    assert (config.kind, config.num_heads, config.mlp_width, config.draft_vocab) == ("residual", 3, 0, 0)
    assert config.feature_layers == ()
    for to in ("vllm", "fasterdecoding"):
        assert medusa.export_heads(second / "heads", to, tmp_path / to).num_heads == 3


def test_what_a_call_says_itself_goes_before_what_the_heads_say(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", kind="sequential", num_heads=5)
    sections = settings_from(str(heads), None, silent)
    plain = load_config(None, {}, sections=sections)
    assert (plain.model, plain.heads.num_heads, plain.heads.kind) == (str(base()), 5, "residual")
    assert plain.out == f"medusa-{base().name}-residual"
    changed = load_config(None, {"out": "here"}, ["heads.num_heads=2", "training.distillation=0"], sections=sections)
    assert (changed.out, changed.heads.num_heads, changed.training.distillation) == ("here", 2, 0)
    assert load_config(None, {}, sections=sections) == plain  # they are not changed by it
    check_fits(str(heads), plain)


def test_heads_that_ship_are_taken_by_their_name_and_their_text_is_written_anew() -> None:
    said: list[str] = []
    found = load_config(None, {}, sections=settings_from("smollm2-135m", None, said.append))
    assert found.model == "smollm2-135m"
    assert (found.text.data, found.text.max_length, found.text.seconds) == ((), 1408, None)
    assert len(said) == 1
    assert "is not there: the model writes its text anew" in said[0]


def test_heads_of_an_adapted_model_are_for_that_model(tmp_path: Path) -> None:
    heads = heads_in(tmp_path / "heads", kind="recurrent")
    write_config(replace(read_config(heads), base_model="X as adapted by Medusa-2 (../model)"), heads)
    with pytest.raises(UsageError, match="do not say what model they belong to: add --model"):
        settings_from(str(heads), None, silent)
    (tmp_path / "model").mkdir()
    assert settings_from(str(heads), None, silent)["model"] == str(tmp_path / "model")


def test_a_model_that_the_heads_do_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    heads = str(heads_in(tmp_path / "heads", kind="recurrent"))
    wider = make_model(vocab_size=TOKENIZER_VOCAB, hidden_size=48)
    wider.save_pretrained(tmp_path / "wider")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "wider")
    wanted = load_config(None, {}, sections=settings_from(heads, str(tmp_path / "wider"), silent))
    with pytest.raises(
        UsageError, match=r"belong to .*tiny-base, and .*wider has another shape or tokenizer: leave out"
    ):
        check_fits(heads, wanted)
    write_config(replace(read_config(heads), vocab_hash="0123456789abcdef"), Path(heads))
    wanted = load_config(None, {}, sections=settings_from(heads, None, silent))
    with pytest.raises(UsageError, match="has another shape or tokenizer"):
        check_fits(heads, wanted)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--from", "HEADS", "--kind", "recurrent"],
            "--from makes parallel heads: take --kind residual, not recurrent",
        ),
        (["--from", "HEADS", "heads.kind=sequential"], "take --kind residual, not sequential"),
        (["--from", "HEADS", "--resume"], "--from begins a run: leave it out beside --config and --resume"),
        (["--from", "HEADS", "--config", "run.yaml"], "--from begins a run"),
        (["--from", "auto"], "--from names heads: a directory, or those shipped"),
        (["--from", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_go_together_is_one_clear_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    heads = str(heads_in(tmp_path / "heads", kind="recurrent"))
    out = tmp_path / "run"
    assert run("train", "--out", str(out), *[heads if word == "HEADS" else word for word in arguments]) == 2
    err = capfd.readouterr().err
    assert err.count("Error: ") == 1
    assert told in err
    assert not out.exists()


def test_the_way_out_names_both_commands() -> None:
    text = way_out("MODEL")
    assert "medusa train --model MODEL heads.kind=residual" in text
    assert "medusa train --kind residual --from HEADS" in text
