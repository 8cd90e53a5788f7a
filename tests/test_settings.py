"""Settings are declared once: the command line, `medusa.load`, run.yaml and errors say what the dataclasses say."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import medusa
from medusa import settings as declared
from medusa.errors import UsageError
from medusa.settings import EngineSettings, Sampling, check, setting, typed_fields, values
from medusa.steppers import DRAFTERS, TREES
from medusa.training.config import TrainConfig, load_config

ALL = [kind for kind in vars(declared).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
SECTIONS = ("text", "engine", "heads", "training", "lora")
FACTS = {"ge", "gt", "le", "lt", "good", "rule", "more", "unset", "metavar", "option", "alias", "help"}
BEYOND = {"ge": -1, "gt": 0, "le": 1, "lt": 0}  # a bound and this is a bad value
# As Medusa wrote it before sections were dataclasses.
OLD_RUN = """\
# medusa train --config run.yaml
model: m
out: null
train_base: none
log: []
text:
  data: [a, b]
  prompts: null
  tokens: 300000
  turns: 3
  max_user_tokens: 96
  max_answer_tokens: 320
  temperatures: [0.0, 0.0, 0.7]
  user_temperature: 1.0
  top_p: 0.95
  seed: 0
  held_out: 0.05
  max_length: 2048
  seconds: null
engine: {backend: auto, dtype: bfloat16, device: cpu, threads: null, slots: null}
heads:
  kind: recurrent
  num_heads: 4
  num_layers: 1
  tie_lm_head: true
  draft_vocab: null
  mlp_width: null
  feature_layers: [1, 2]
training:
  epochs: 3
  max_steps: null
  seconds: null
  batch_size: 512
  learning_rate: 0.001
  weight_decay: 0.01
  warmup: 0.05
  clip: 1.0
  lambda: 0.9
  distillation: 0.0
  precision: auto
  cache_features: true
  eval_every: null
  patience: 0
  save_every: 200
  seed: 0
lora:
  rank: 16
  alpha: 32.0
  epochs: 1
  max_steps: null
  batch_size: 8
  learning_rate: 0.0001
  heads_learning_rate: 0.0002
  heads_weight: 0.2
  warmup: 0.1
  base_loss: kl
  merge: true
"""


def test_every_setting_has_a_line_of_help_and_nothing_that_nobody_reads() -> None:
    for field in itertools.chain.from_iterable(map(dataclasses.fields, ALL)):
        assert field.metadata["help"].endswith("."), field.name
        assert "\n" not in field.metadata["help"]
        assert set(field.metadata) <= FACTS, field.name


def test_every_default_is_good() -> None:
    for kind in ALL:
        kind()


def test_load_shows_each_setting_with_its_default_and_its_help() -> None:
    parameters = inspect.signature(medusa.load).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == values(EngineSettings())
    kinds = [parameter.kind for parameter in parameters.values()]
    assert kinds[0] is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds[1:]) == {inspect.Parameter.KEYWORD_ONLY}
    text = " ".join((medusa.load.__doc__ or "").split())
    for name, (field, _) in typed_fields(EngineSettings).items():
        assert f" {name}: " in text
        assert field.metadata["help"] in text
    assert "{settings}" not in text
    assert max(map(len, (medusa.load.__doc__ or "").splitlines())) <= 120


def test_load_refuses_what_it_does_not_know_by_name() -> None:
    with pytest.raises(TypeError, match=r"^load\(\) got an unexpected keyword argument 'colour'"):
        medusa.load(colour="red")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="load"):
        medusa.load("model", "heads")  # type: ignore[misc, call-arg]


@pytest.mark.parametrize("section", SECTIONS)
def test_run_yaml_and_the_dataclass_refuse_the_same_values(section: str) -> None:
    kind = type(getattr(TrainConfig(), section))
    refused = 0
    for (name, (field, _)), bound in itertools.product(typed_fields(kind).items(), BEYOND):
        if bound not in field.metadata:
            continue
        bad, refused = field.metadata[bound] + BEYOND[bound], refused + 1
        with pytest.raises(UsageError, match=rf"^{name} must be "):
            kind(**{name: bad})
        with pytest.raises(UsageError, match=rf"^{section}\.{field.metadata.get('alias', name)}: "):
            load_config(None, {f"{section}.{field.metadata.get('alias', name)}": bad})
    assert refused or section == "engine"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("text.temperatures=[]", "text.temperatures must be one temperature or more, not ()"),
        ("text.top_p=2", "text.top_p must be above 0 and at most 1 (off), not 2.0"),
        ("engine.heads=none", "unknown setting engine.heads; run.yaml of any run lists all there are"),
        ("text=5", "text: input should be a dictionary"),
    ],
)
def test_what_a_section_says_of_itself_is_one_sentence_too(assignment: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, {}, [assignment])
    assert str(caught.value).startswith(message)


def test_a_run_file_of_before_is_read_and_written_with_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(OLD_RUN)
    config = load_config(path, {})
    assert config.training.lambda_ == 0.9
    written = yaml.safe_load(config.dump())
    # What has come since means what was done before.
    assert (written["training"].pop("overlap"), written["heads"].pop("weights")) == (0.0, "bfloat16")
    assert written == yaml.safe_load(OLD_RUN)


def test_a_value_of_another_kind_is_refused_in_the_same_words() -> None:
    with pytest.raises(UsageError, match=r"top_k must be 0 \(off\) or more, not None"):
        Sampling(top_k=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads must be at least 1, not many"):
        EngineSettings(threads="many")  # type: ignore[arg-type]


def test_a_rule_is_made_of_the_bounds_where_none_is_written() -> None:
    @dataclasses.dataclass
    class Made:
        share: float = setting(0.5, "A share.", gt=0, le=1)

    check(Made(1))
    with pytest.raises(UsageError, match=r"^here: share must be above 0 and at most 1, not 1.5$"):
        check(Made(1.5), "here: ")
    with pytest.raises(UsageError, match="not nan"):
        check(Made(float("nan")))


def test_names_of_drafters_and_trees_are_those_that_are_made() -> None:
    assert get_args(declared.DrafterName) == DRAFTERS
    assert get_args(declared.TreeName) == TREES


def test_the_command_line_waits_for_nothing_that_only_some_commands_need() -> None:
    code = (
        "import sys, medusa.cli\n"
        "print({'numpy', 'torch', 'transformers', 'pydantic', 'yaml', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    code = "import sys, medusa.settings\nprint({'numpy', 'typer', 'rich', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_each_option_of_the_command_line_is_the_setting_of_that_name() -> None:
    """Its default and its help."""
    import typer

    from medusa.cli import app

    commands: Any = typer.main.get_command(app)
    options = {option.name: option for option in commands.commands["generate"].params}
    for kind in (EngineSettings, declared.AnswerSettings):
        for name, (field, _) in typed_fields(kind).items():
            if field.metadata.get("option", name):
                assert options[name].help == field.metadata["help"]
                assert options[name].default == field.default
            else:
                assert name not in options
