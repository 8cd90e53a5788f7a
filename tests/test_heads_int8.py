"""Heads stored in 8 bits: half the size, each weight within half a step, on the native engine the very same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa.errors import MedusaError, UsageError
from medusa.heads.file import CONFIG_FILE, WEIGHTS_FILE, load_heads, read_config, save_heads
from medusa.heads.int8 import GROUP, packed, unpacked
from medusa.models import loading
from medusa.settings import EngineSettings
from test_heads import assert_one_sentence, every_variant, make_base, make_heads


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_each_weight_is_within_half_a_step_of_its_group(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    matrix = torch.randn(5, columns, generator=generator) * torch.logspace(-4, 4, 5)[:, None]
    matrix[0] = 0
    found = packed({"m": matrix, "v": matrix[1]})
    assert found["m"].dtype == torch.int8
    assert found["v"] is not None
    assert torch.equal(found["v"], matrix[1])
    back = unpacked(found)
    assert back.keys() == {"m", "v"}
    for first in range(0, columns, GROUP):
        group, other = matrix[:, first : first + GROUP], back["m"][:, first : first + GROUP]
        # Half a step, and what the largest loses where the step is rounded down.
        assert ((group - other).abs() <= group.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-9)).all()


@every_variant
def test_heads_in_8_bits_come_back_near_and_are_saved_again_as_the_same_bytes(variant: str, tmp_path: Path) -> None:
    heads = make_heads(variant, weights="int8")
    save_heads(heads, tmp_path / "one")
    loaded = load_heads(tmp_path / "one", make_base())
    assert loaded.config == heads.config == read_config(tmp_path / "one")
    for name, tensor in heads.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name].float(), tensor.float(), atol=0.02), name
    save_heads(loaded, tmp_path / "two")
    assert (tmp_path / "two" / WEIGHTS_FILE).read_bytes() == (tmp_path / "one" / WEIGHTS_FILE).read_bytes()


def test_the_file_is_about_half_as_large(tmp_path: Path) -> None:
    matrix = torch.randn(512, 1024)
    sizes = {
        kind: sum(t.numel() * t.element_size() for t in tensors.values())
        for kind, tensors in (("int8", packed({"m": matrix})), ("bfloat16", {"m": matrix.bfloat16()}))
    }
    assert sizes["int8"] == matrix.numel() * (1 + 2 / GROUP) < 0.52 * sizes["bfloat16"]


def test_a_file_in_bfloat16_says_nothing_of_its_weights_as_earlier_versions_would_not_know(tmp_path: Path) -> None:
    save_heads(make_heads(), tmp_path / "heads")
    assert "weights" not in (tmp_path / "heads" / CONFIG_FILE).read_text()
    assert read_config(tmp_path / "heads").weights == "bfloat16"
    with pytest.raises(UsageError, match="weights"):
        make_heads(weights="int3")


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, directory / WEIGHTS_FILE)

    return spoil


def in_bfloat16(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = tensors[NAME].bfloat16()
    del tensors[NAME + ".scales"]


NAME = "blocks.1.0.down.weight"
BAD_FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no scales": ("not in 8 bits", edited(lambda t: t.pop(NAME + ".scales"))),
    "scales of another matrix": ("match", edited(lambda t: t.update({NAME + ".scales": torch.ones(2, 2)}))),
    "scales of nothing": ("match", edited(lambda t: t.update({"more.scales": torch.ones(2, 2)}))),
    "a matrix in bfloat16": ("not in 8 bits", edited(lambda t: t.update({NAME: t[NAME].bfloat16()}))),
    "a matrix in bfloat16 and no scales": ("not in 8 bits", edited(in_bfloat16)),
    "a scale that is not a number": ("not a finite", edited(lambda t: t[NAME + ".scales"].fill_(float("nan")))),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_files_that_do_not_fit_are_refused_in_one_sentence(fault: str, tmp_path: Path) -> None:
    save_heads(make_heads("residual, gated, draft vocabulary", weights="int8"), tmp_path / "heads")
    load_heads(tmp_path / "heads", make_base())  # they are good, until
    reason, spoil = BAD_FILES[fault]
    spoil(tmp_path / "heads")
    with pytest.raises(MedusaError, match=reason) as error:
        load_heads(tmp_path / "heads", make_base())
    assert_one_sentence(error)


def test_weights_in_8_bits_are_refused_where_the_config_does_not_speak_of_them(tmp_path: Path) -> None:
    save_heads(make_heads(weights="int8"), tmp_path / "heads")
    config = tmp_path / "heads" / CONFIG_FILE
    config.write_text(config.read_text().replace(' "weights": "int8",\n', ""))
    with pytest.raises(MedusaError, match="match"):
        load_heads(tmp_path / "heads", make_base())


def test_on_the_native_engine_heads_in_8_bits_guess_the_same_bits_as_before_they_were_stored(tmp_path: Path) -> None:
    pytest.importorskip("medusa_native")
    from medusa.engines.native_heads import NativeHeads
    from medusa.heads.config import HeadsConfig
    from medusa.heads.module import Heads
    from test_native_heads import KINDS, LEVELS, VOCAB, backend
    from tiny_models import stirred

    engine, kind = backend(), "recurrent, gated, middle layers, draft vocabulary"
    config = HeadsConfig(
        hidden_size=engine.hidden_size, vocab_size=VOCAB, num_heads=LEVELS, weights="int8", **KINDS[kind]
    )
    heads = stirred(Heads(config, engine.base_weights(), torch.arange(70)), seed=3)
    save_heads(heads, tmp_path / "heads")
    loaded = loading.LoadedModel(engine, (), {})
    guesses = []
    for runner in (
        NativeHeads(engine, heads, "int8"),
        loading.load_heads(tmp_path / "heads", loaded, EngineSettings()),
    ):
        state = runner.begin(torch.linspace(-1, 1, config.feature_size)[None])
        guesses.append(runner.guess(1, state, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[7]]), 9))
    (one_p, one_ids, _), (other_p, other_ids, _) = guesses
    assert torch.equal(one_p, other_p)
    assert torch.equal(one_ids, other_ids)
