"""`medusa bench` and `medusa ablate` at the command line, with a tiny model in the place of a real one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import medusa
from medusa.cli import main
from medusa.cli.bench import KINDS
from medusa.decoding.budget import NodeBudget
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.times import PassTimes
from medusa.engines.transformers import TransformersBackend
from tiny_lm import make, with_tree, writer

pytest.importorskip("matplotlib")

Run = Callable[..., tuple[int, str, str]]
KEPT, REFRESHED = PassTimes.measured({1: 1.0, 16: 1.3, 32: 9.0}), PassTimes.typical()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Arguments of each `medusa.load`; the tiny model has a tree and needs no measuring: times are KEPT, or REFRESHED
    where they are to be measured anew."""
    calls: list[dict[str, Any]] = []

    def load(**arguments: Any) -> Any:
        calls.append(arguments)
        backend = TransformersBackend(writer(), num_slots=arguments.get("num_slots", 1))
        make_lm = make if arguments["heads"] == "none" else with_tree
        return make_lm(
            backend=backend, times=lambda refresh: REFRESHED if refresh else KEPT,
            **{name: arguments[name] for name in ("nodes", "drafter", "tree") if name in arguments},
        )  # fmt: skip

    monkeypatch.setattr(medusa, "load", load)
    monkeypatch.chdir(tmp_path)
    questions = [
        {"question_id": i, "category": category, "turns": [f"{category}?", "Why?"]}
        for i, category in enumerate(["writing", "math", "roleplay", "math"])
    ]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return calls


@pytest.fixture
def run(loaded: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


SMALL = ("--questions", "q.jsonl", "--limit", "3", "--max-new-tokens", "8")


def test_a_benchmark_ends_with_a_line_of_json_and_leaves_a_report(run: Run) -> None:
    code, out, err = run("bench", *SMALL)
    assert code == 0
    line = json.loads(out.splitlines()[-1])
    assert list(line["methods"]) == ["heads", "ngram", "union"]
    assert {found["identical"] for found in line["methods"].values()} == {3}
    assert line["machine"]["cores"] >= 1
    for expected in ("All questions", "tokens/step", "Where the time of a step goes"):
        assert expected in out
    assert "medusa-bench" in err
    files = {path.name for path in Path("medusa-bench").iterdir()}
    assert files == {
        "run.json", "machine.json", "answers.jsonl", "report.json", "report.md",
        "speedup.svg", "phases.svg", "acceptance.svg",
    }  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ("bench",),
        ("bench", "--temperature", "0.8"),
        ("ablate", "nodes"),
        ("ablate", "drafters"),
        ("ablate", "threshold"),
        ("ablate", "batch"),
    ],
)
def test_every_method_decodes_by_times_that_were_measured_anew(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    used: list[PassTimes] = []
    step = ReferenceStepper.step

    def watched(self: ReferenceStepper, rows: Any) -> Any:
        if isinstance(self.nodes, NodeBudget):
            used.append(self.nodes.times)
        return step(self, rows)

    monkeypatch.setattr(ReferenceStepper, "step", watched)
    assert run(*command, *SMALL, "--json")[0] == 0
    assert used
    # A budget of n-grams alone may hold them without the time of a draft.
    assert {times.seconds for times in used} == {REFRESHED.seconds}


def test_json_is_one_line(run: Run) -> None:
    code, out, _ = run("bench", *SMALL, "--json", "--methods", "union", "--turns", "2", "--follow", "plain")
    assert code == 0
    assert out.count("\n") == 1
    assert json.loads(out)["methods"]["union"]["total"] == 6


def test_a_temperature_adds_typical_acceptance(run: Run) -> None:
    code, out, _ = run("bench", *SMALL, "--json", "--temperature", "0.8")
    assert code == 0
    found = json.loads(out)["methods"]
    assert found["union"]["identical"] == 3, "exact sampling has a seed, so it repeats plain sampling"
    assert "typical" in found


def test_a_model_without_heads_is_measured_with_n_grams(run: Run) -> None:
    code, out, _ = run("bench", *SMALL, "--json", "--heads", "none")
    assert code == 0
    assert list(json.loads(out)["methods"]) == ["ngram", "union"]


def test_a_benchmark_goes_on_only_where_it_is_the_same(run: Run, loaded: list[dict[str, Any]]) -> None:
    assert run("bench", *SMALL)[0] == 0
    answers = Path("medusa-bench/answers.jsonl")
    before = answers.read_text()
    answers.write_text(before[: before.index("\n") + 30])  # killed in the second question
    assert run("bench", *SMALL)[0] == 2
    assert run("bench", *SMALL, "--resume", "--json")[0] == 0
    kept, found = before.splitlines()[0], answers.read_text().splitlines()
    assert found[0] == kept
    assert len(found) == 3
    code, _, err = run("bench", *SMALL, "--resume", "--nodes", "5")
    assert (code, err.count("\n")) == (2, 1)
    assert "differs in nodes" in err
    place = Path("medusa-bench/machine.json")
    facts = json.loads(place.read_text())
    for name in ("threads", "question 1"):
        place.write_text(json.dumps({**facts, name: "another"}))
        code, _, err = run("bench", *SMALL, "--resume")
        assert (code, err.count("\n")) == (2, 1)
        assert f"began with {name} another, and this is" in err
    assert answers.read_text().splitlines() == found


@pytest.mark.parametrize("kind", KINDS)
def test_every_ablation_writes_its_table_and_its_picture(run: Run, kind: str) -> None:
    code, out, _ = run("ablate", kind, *SMALL, "--out", "here")
    assert code == 0
    line = json.loads(out.splitlines()[-1])
    assert line["kind"] == kind
    with Path(f"here/{kind}.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(line["rows"]) > 3
    picture = Path("here/speedup.svg" if kind == "drafters" else f"here/{kind}.svg")
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--methods", "plain,fast"), "unknown method fast: use some of plain, heads"),
        (("bench", "--methods", "typical"), "add --temperature"),
        (("bench", "--methods", "assisted"), "needs --draft-model"),
        (("bench", "--methods", "server"), "needs --baseline-url"),
        (("bench", "--methods", "heads", "--heads", "none"), "needs heads"),
        (("bench", "--acceptance", "typical", "--temperature", "1"), "--methods union,typical"),
        (("bench", "--temperature", "-1"), "temperature must be"),
        (("bench", "--questions", "none.jsonl"), "cannot read the questions in none.jsonl"),
        (("bench", "--resume"), "no run in medusa-bench to resume"),
        (("ablate", "batch", "--max-new-tokens", "1"), "--max-new-tokens must be at least 2"),
        (("bench", "--limit", "2"), "question 1: the prompt has"),  # too long for the tiny model
        (("ablate", "speed"), "'speed' is not one of"),
        (("ablate", "tree", "--drafter", "ngram"), "sets --drafter and --tree itself"),
        (("ablate", "nodes", "--drafter", "none"), "leave out --drafter none"),
        (("ablate", "threshold", "--temperature", "0"), "only above temperature 0"),
        (("ablate", "nodes", "--temperature", "-3"), "temperature must be"),
        (("ablate", "nodes", "--draft-model", "x"), "for medusa ablate threshold"),
        (("ablate", "threshold", "--judge-url", "http://x"), "both --judge-url and --judge-model"),
        (("ablate", "heads", "--heads", "none"), "give --heads"),
    ],
)
def test_a_mistake_is_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("Measuring")]
    assert len(lines) == 1
    assert message in lines[0]
