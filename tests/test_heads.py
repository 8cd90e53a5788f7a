"""Heads on their own: configs, what a new head says, teacher forcing against drafting, files that are whole or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads import file as heads_file
from medusa.heads.config import KINDS, HeadsConfig, vocabulary_hash
from medusa.heads.file import CONFIG_FILE, WEIGHTS_FILE, load_heads, read_config, save_heads, write_config
from medusa.heads.module import BaseWeights, Heads
from tiny_models import make_tokenizer, shared_model

H, V = 16, 40

VARIANTS: dict[str, dict[str, Any]] = {
    "residual": {"kind": "residual"},
    "residual, two layers, own LM heads": {"kind": "residual", "num_layers": 2, "tie_lm_head": False},
    "residual, gated, draft vocabulary": {"kind": "residual", "mlp_width": 24, "draft_vocab": 10},
    "sequential": {"kind": "sequential", "num_layers": 2},
    "sequential, gated, own LM heads, draft vocabulary": {
        "kind": "sequential",
        "mlp_width": 24,
        "tie_lm_head": False,
        "draft_vocab": 10,
    },
    "recurrent": {"kind": "recurrent"},
    "recurrent, gated, features": {"kind": "recurrent", "mlp_width": 24, "feature_layers": (1, 2), "draft_vocab": 7},
    "residual, features": {"kind": "residual", "feature_layers": (2,)},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make_base(seed: int = 0) -> BaseWeights:
    generator = torch.Generator().manual_seed(seed)
    return BaseWeights(torch.randn(V, H, generator=generator), torch.randn(V, H, generator=generator))


def make_config(**changes: Any) -> HeadsConfig:
    return HeadsConfig(**{"hidden_size": H, "vocab_size": V, "num_heads": 3, **changes})


def make_heads(variant: str = "residual", *, trained: bool = True, **changes: Any) -> Heads:
    config = make_config(**VARIANTS[variant], **changes)
    draft_ids = torch.arange(0, V, 3)[: config.draft_vocab] if config.draft_vocab else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = Heads(config, make_base(), draft_ids)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return heads


def random_features(heads: Heads, rows: int) -> Tensor:
    return torch.randn(rows, heads.config.feature_size, generator=torch.Generator().manual_seed(2))


def assert_one_sentence(error: pytest.ExceptionInfo[Exception]) -> None:
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert len(text) < 400


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "linear"),
        ("hidden_size", 0),
        ("vocab_size", -1),
        ("num_heads", 0),
        ("num_heads", 17),
        ("num_layers", 0),
        ("draft_vocab", -1),
        ("draft_vocab", V + 1),
        ("mlp_width", -1),
        ("feature_layers", (0,)),
        ("feature_layers", (1, -2)),
    ],
)
def test_a_bad_setting_is_an_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as error:
        make_config(**{name: value})
    assert_one_sentence(error)


def test_a_recurrent_block_has_one_layer() -> None:
    with pytest.raises(UsageError, match="num_layers"):
        make_config(kind="recurrent", num_layers=2)


def test_a_config_survives_json() -> None:
    config = make_config(
        kind="recurrent",
        feature_layers=(3, 5),
        draft_vocab=7,
        base_model="someone/model",
        vocab_hash="abc",
        tree=(((0,), 0.5), ((0, 1), 0.25)),
        training={"epochs": 2},
    )
    assert HeadsConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


def test_features_are_as_wide_as_the_layers_asked_for() -> None:
    assert make_config().feature_size == H
    assert make_config(feature_layers=(1, 2)).feature_size == 3 * H


def test_draft_ids_are_needed_exactly_where_there_is_a_draft_vocabulary() -> None:
    with pytest.raises(UsageError, match="draft_ids"):
        Heads(make_config(draft_vocab=4), make_base())
    with pytest.raises(UsageError, match="draft_ids"):
        Heads(make_config(), make_base(), torch.arange(4))


# --- what they say ----------------------------------------------------------------------------------------------------


@every_variant
def test_every_level_of_new_heads_is_the_models_own_lm_head(variant: str) -> None:
    heads = make_heads(variant, trained=False)
    features = random_features(heads, 5)
    expected = F.linear(features[:, -H:], make_base().lm_head)  # [5, V]
    tokens = torch.randint(0, V, (5, 3), generator=torch.Generator().manual_seed(3))
    for logits in heads(features, tokens):
        assert logits.shape == (5, heads.lm_head_rows)
        torch.testing.assert_close(logits, expected[:, heads.to_token_ids(torch.arange(heads.lm_head_rows))])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_new_heads_on_a_real_architecture_give_the_logits_of_the_model(family: str) -> None:
    backend = TransformersBackend(shared_model(family))
    logits, features = backend.extend(0, [5, 9, 17, 3])
    config = HeadsConfig(hidden_size=backend.hidden_size, vocab_size=backend.vocab_size)
    heads = Heads(config, backend.base_weights())
    with torch.inference_mode():
        (first, *_) = heads(features[None], torch.tensor([[1, 2, 3, 4]]))
    torch.testing.assert_close(first[0], logits, atol=1e-4, rtol=1e-4)


@every_variant
def test_teacher_forcing_equals_drafting_level_by_level(variant: str) -> None:
    heads = make_heads(variant)
    features = random_features(heads, 2)
    # Two rows, a tree of 1, 3 and 4 nodes per level; every path is then compared with its own teacher-forced row.
    generator = torch.Generator().manual_seed(4)
    levels = [torch.randint(0, V, (2, width), generator=generator) for width in (1, 3, 4)]
    parents = [
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.tensor([[0, 2, 2, 1], [1, 1, 0, 2]]),
    ]
    state, drafted = heads.begin(features), []
    for k in (1, 2, 3):
        logits, state = heads.level(k, state, parents[k - 1], levels[k - 1])
        assert logits.shape[0] == 2
        assert logits.shape[1] in (1, levels[k - 1].shape[1])
        drafted.append(logits.expand(2, levels[k - 1].shape[1], -1))
    for row in range(2):
        for node in range(4):
            above = int(parents[2][row, node])
            path = torch.stack([levels[0][row, 0], levels[1][row, above], levels[2][row, node]])
            forced = heads(features[row : row + 1], path[None])
            for level, place in enumerate((0, above, node)):
                torch.testing.assert_close(forced[level][0], drafted[level][row, place], atol=1e-3, rtol=1e-4)


def test_sequential_and_recurrent_heads_see_the_path_and_residual_ones_do_not() -> None:
    for variant, sees in (("residual", False), ("sequential", True), ("recurrent", True)):
        heads = make_heads(variant)
        features = random_features(heads, 1)
        a, b = (heads(features, torch.tensor([tokens])) for tokens in ([1, 2, 3], [1, 7, 3]))
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1]) is not sees


def test_middle_layers_change_the_answer_once_trained() -> None:
    heads = make_heads("residual, features")
    features = random_features(heads, 1)
    other = features.clone()
    other[:, :H] = -other[:, :H]
    assert not torch.equal(*(heads(x, torch.zeros(1, 3, dtype=torch.int64))[0] for x in (features, other)))


def test_draft_ids_map_back_to_the_models_tokens() -> None:
    heads = make_heads("residual, gated, draft vocabulary")
    assert heads.lm_head_rows == 10
    assert heads.to_token_ids(torch.tensor([[0, 9]])).tolist() == [[0, 27]]
    plain = make_heads("residual")
    assert plain.lm_head_rows == V
    assert plain.to_token_ids(torch.tensor([5])).tolist() == [5]


def test_only_what_is_trained_is_a_parameter_and_saved() -> None:
    heads = make_heads("residual")
    assert heads.num_parameters() == 3 * (H * H + H)
    assert not {"embedding", "lm_head"} & set(heads.state_dict())


def test_the_vocabulary_hash_follows_every_token_and_id() -> None:
    vocabulary = make_tokenizer().get_vocab()
    digest = vocabulary_hash(vocabulary)
    assert digest == vocabulary_hash(dict(reversed(vocabulary.items()))), "the order of the mapping does not matter"
    assert digest != vocabulary_hash({**vocabulary, "more": len(vocabulary)})
    a, b = list(vocabulary)[:2]
    assert digest != vocabulary_hash({**vocabulary, a: vocabulary[b], b: vocabulary[a]})


# --- files ------------------------------------------------------------------------------------------------------------


@every_variant
def test_saved_heads_come_back_equal(variant: str, tmp_path: Path) -> None:
    heads = make_heads(variant, tree=(((0,), 0.5), ((1,), 0.125)), training={"epochs": 1}, vocab_hash="x")
    save_heads(heads, tmp_path / "a" / "b", dtype=torch.float32)
    assert read_config(tmp_path / "a" / "b") == heads.config
    loaded = load_heads(tmp_path / "a" / "b", make_base(), vocab_hash="x", num_layers=3)
    assert loaded.config == heads.config
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    features, tokens = random_features(heads, 4), torch.arange(12).reshape(4, 3)
    for a, b in zip(heads(features, tokens), loaded(features, tokens), strict=True):
        assert torch.equal(a, b)
    names = torch.arange(heads.lm_head_rows)
    assert torch.equal(heads.to_token_ids(names), loaded.to_token_ids(names))


@every_variant
def test_saved_heads_are_bfloat16_unless_asked(variant: str, tmp_path: Path) -> None:
    heads = make_heads(variant)
    save_heads(heads, tmp_path / "heads")
    loaded = load_heads(tmp_path / "heads", make_base(), dtype=torch.bfloat16)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].float(), tensor.bfloat16().float())
    if heads.draft_ids is not None:
        assert loaded.draft_ids is not None
        assert loaded.draft_ids.dtype == torch.int64, "indices are no weights"


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def fails(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def replaces_once(calls: int) -> Callable[..., Any]:
    """`Path.replace` that fails at its n-th call, counted from 0."""
    real, count = Path.replace, iter(range(100))

    def replace(self: Path, target: Path) -> Path:
        if next(count) == calls:
            raise KeyboardInterrupt
        return real(self, target)

    return replace


def interrupt(patch: pytest.MonkeyPatch, moment: str) -> None:
    """Ctrl-C at some moment of a save."""
    if moment == "before the weights":
        patch.setattr(heads_file, "save_file", fails)
    elif moment == "after the weights":
        patch.setattr(Path, "write_text", fails)
    else:
        patch.setattr(Path, "replace", replaces_once(["first rename", "second rename"].index(moment)))


@pytest.mark.parametrize("moment", ["before the weights", "after the weights", "first rename"])
def test_a_save_that_is_interrupted_leaves_nothing(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, moment)
        with pytest.raises(KeyboardInterrupt):
            save_heads(make_heads(), tmp_path / "heads")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("moment", ["before the weights", "after the weights", "first rename", "second rename"])
def test_a_save_that_is_interrupted_leaves_the_heads_that_were_there(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_heads(make_heads("recurrent"), tmp_path / "heads")
    before = {path.name: path.read_bytes() for path in (tmp_path / "heads").iterdir()}
    with monkeypatch.context() as patch:
        interrupt(patch, moment)
        with pytest.raises(KeyboardInterrupt):
            save_heads(make_heads("residual"), tmp_path / "heads")
    assert {path.name: path.read_bytes() for path in (tmp_path / "heads").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["heads"], "no scratch directory is left"


def test_a_save_replaces_what_was_there(tmp_path: Path) -> None:
    save_heads(make_heads("recurrent"), tmp_path / "heads")
    (tmp_path / "heads" / "notes.txt").write_text("old")
    save_heads(make_heads("sequential"), tmp_path / "heads")
    assert listing(tmp_path) == ["heads", f"heads/{CONFIG_FILE}", f"heads/{WEIGHTS_FILE}"]
    assert load_heads(tmp_path / "heads", make_base()).config.kind == "sequential"


@pytest.mark.parametrize("what", ["a file", "a directory of other things"])
def test_a_save_does_not_delete_what_is_not_heads(what: str, tmp_path: Path) -> None:
    target = tmp_path / "work"
    if what == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(UsageError, match="does not hold heads") as error:
        save_heads(make_heads(), target)
    assert_one_sentence(error)
    assert listing(tmp_path) == before


def test_a_save_takes_an_empty_directory_and_everyone_may_read_the_result(tmp_path: Path) -> None:
    (tmp_path / "heads").mkdir()
    save_heads(make_heads(), tmp_path / "heads")
    load_heads(tmp_path / "heads", make_base())
    fresh = tmp_path / "other"
    fresh.mkdir()
    save_heads(make_heads(), tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == fresh.stat().st_mode, "as the umask has it"


# --- files that do not fit --------------------------------------------------------------------------------------------


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / WEIGHTS_FILE).items()}
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.1.0.down.weight"].view(-1)[3] = value

    return change


BAD_FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "another hidden size": ("hidden size", lambda d: edit_config(d, hidden_size=H + 1)),
    "another vocabulary size": ("vocabulary", lambda d: edit_config(d, vocab_size=V + 1)),
    "more heads than weights": ("4 heads", lambda d: edit_config(d, num_heads=4)),
    "fewer heads than weights": ("2 heads", lambda d: edit_config(d, num_heads=2)),
    "another kind": ("kind", lambda d: edit_config(d, kind="sequential")),
    "an unknown kind": ("kind", lambda d: edit_config(d, kind="linear")),
    "an unknown setting": ("colour", lambda d: edit_config(d, colour="red")),
    "another format": ("format", lambda d: edit_config(d, format=2)),
    "a setting of the wrong type": ("not valid", lambda d: edit_config(d, num_heads="three")),
    "settings missing": ("not valid", lambda d: (d / CONFIG_FILE).write_text('{"format": 1}')),
    "a tree that is none": ("not valid", lambda d: edit_config(d, tree=[[1, 2]])),
    "a config of someone else": ("format", lambda d: (d / CONFIG_FILE).write_text('{"model_type": "llama"}')),
    "a config that is a list": ("format", lambda d: (d / CONFIG_FILE).write_text("[]")),
    "a config that is no JSON": ("cannot read", lambda d: (d / CONFIG_FILE).write_text("{")),
    "a config that is no text": ("cannot read", lambda d: (d / CONFIG_FILE).write_bytes(b"\xff\xfe{}")),
    "no config": ("missing", lambda d: (d / CONFIG_FILE).unlink()),
    "no weights": ("missing", lambda d: (d / WEIGHTS_FILE).unlink()),
    "weights cut short": ("truncated", lambda d: truncate(d / WEIGHTS_FILE, 500)),
    "weights cut in the header": ("truncated", lambda d: truncate(d / WEIGHTS_FILE, 20)),
    "empty weights": ("truncated", lambda d: truncate(d / WEIGHTS_FILE, 0)),
    "a weight that is not a number": ("not a finite", lambda d: edit_weights(d, poison(float("nan")))),
    "an infinite weight": ("not a finite", lambda d: edit_weights(d, poison(float("inf")))),
    "a tensor too many": ("match", lambda d: edit_weights(d, lambda t: t.update(more=torch.ones(1)))),
    "a tensor missing": ("missing", lambda d: edit_weights(d, lambda t: t.pop("blocks.0.0.gate.weight"))),
    "no draft ids": ("draft vocabulary", lambda d: edit_weights(d, lambda t: t.pop("draft_ids"))),
    "draft ids of another size": ("draft vocabulary", lambda d: edit_config(d, draft_vocab=9)),
    "draft ids past the end": ("outside the vocabulary", lambda d: edit_weights(d, lambda t: t["draft_ids"].fill_(V))),
    "negative draft ids": ("outside the vocabulary", lambda d: edit_weights(d, lambda t: t["draft_ids"].fill_(-1))),
    "draft ids that are not wanted": ("match", lambda d: edit_config(d, draft_vocab=0)),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_heads_that_do_not_fit_are_refused_in_one_sentence(fault: str, tmp_path: Path) -> None:
    directory = tmp_path / "heads"
    save_heads(make_heads("residual, gated, draft vocabulary"), directory)
    load_heads(directory, make_base())  # they are good, until
    reason, spoil = BAD_FILES[fault]
    spoil(directory)
    with pytest.raises(MedusaError, match=reason) as error:
        load_heads(directory, make_base())
    assert_one_sentence(error)


def test_heads_of_another_tokenizer_are_refused_and_unknown_ones_are_not(tmp_path: Path) -> None:
    save_heads(make_heads("residual", vocab_hash="0123", base_model="someone/model"), tmp_path / "heads")
    load_heads(tmp_path / "heads", make_base(), vocab_hash="0123")
    load_heads(tmp_path / "heads", make_base())
    with pytest.raises(MedusaError, match="someone/model") as error:
        load_heads(tmp_path / "heads", make_base(), vocab_hash="4567")
    assert_one_sentence(error)
    save_heads(make_heads("residual"), tmp_path / "heads")
    load_heads(tmp_path / "heads", make_base(), vocab_hash="4567")


def test_heads_that_read_a_layer_beyond_the_model_are_refused(tmp_path: Path) -> None:
    save_heads(make_heads("recurrent, gated, features"), tmp_path / "heads")
    load_heads(tmp_path / "heads", make_base(), num_layers=3)
    with pytest.raises(MedusaError, match="read layer 2, but the model has 2") as error:
        load_heads(tmp_path / "heads", make_base(), num_layers=2)
    assert_one_sentence(error)


def test_a_path_that_is_no_directory_of_heads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        with pytest.raises(MedusaError) as error:
            load_heads(path, make_base())
        assert_one_sentence(error)


def test_every_kind_is_tested() -> None:
    assert {settings["kind"] for settings in VARIANTS.values()} == set(KINDS)


def test_a_config_has_a_path_of_the_tree_on_each_line(tmp_path: Path) -> None:
    tree = (((0,), 0.5), ((0, 12), 1e-05), ((1,), 0.0))
    training = {"held_out": {"top1": [0.5, 1e-07]}, "text": ["[1,\n 2]", "[ [1], 2 ]"], "none": [], "rates": [0.0]}
    config = HeadsConfig(
        hidden_size=H, vocab_size=V, kind="recurrent", feature_layers=(1, 2), tree=tree, training=training
    )
    write_config(config, tmp_path)
    text = (tmp_path / CONFIG_FILE).read_text()
    assert read_config(tmp_path) == config
    for line in ("  [[0], 0.5],", "  [[0, 12], 1e-05],", ' "feature_layers": [1, 2],'):
        assert line in text.splitlines()
