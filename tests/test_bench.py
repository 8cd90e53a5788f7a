"""Benchmarks: questions, counts, statistics, the run with its interruptions, reports."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa.decoding.draft import MODEL, Draft
from medusa.decoding.sampling import GREEDY, Sampling
from medusa.decoding.stepper import Step
from medusa.errors import UsageError
from medusa.evaluation.bench import BenchSettings, open_run, read_rows, run_bench
from medusa.evaluation.methods import MEDUSA_METHODS, PHASES, Measurement, PeakMemory, counts, medusa_method
from medusa.evaluation.questions import Question, choose, read_questions
from medusa.evaluation.report import Report, markdown_table
from medusa.evaluation.statistics import figures
from tiny_lm import make

CATEGORIES = 12

# --- questions --------------------------------------------------------------------------------------------------------


def test_the_set_that_comes_with_medusa_has_two_turns_each_in_twelve_categories() -> None:
    found = read_questions()
    assert len(found) == 80
    assert all(len(question.turns) == 2 for question in found)
    assert len({question.category for question in found}) == CATEGORIES
    assert len({question.turns[0] for question in found}) == 80


@pytest.mark.parametrize("limit", [1, 12, 40, 79, 80, 500])
def test_a_limit_takes_questions_from_all_over_the_file(limit: int) -> None:
    found = choose(read_questions(), limit)
    assert len(set(found)) == len(found) == min(limit, 80)
    assert [int(question.id) for question in found] == sorted(int(question.id) for question in found)
    if limit >= 40:
        assert len({question.category for question in found}) == CATEGORIES


def test_categories_are_chosen_by_name() -> None:
    found = choose(read_questions(), None, ("math", "coding"))
    assert {question.category for question in found} == {"math", "coding"}
    with pytest.raises(UsageError, match="no category poetry: there are writing, roleplay"):
        choose(read_questions(), None, ("poetry",))


def test_questions_are_read_in_the_forms_of_others(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 7, "category": "qa", "turns": ["a", "b"]}\n\n{"prompt": "c"}\n')
    assert read_questions(path) == (Question("7", "qa", ("a", "b")), Question("3", "all", ("c",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no questions in"),
        ('{"turns": ["a"]}\n{"turns": []}', 'line 2: a question needs "turns"'),
        ('{"turns": ["a"]}\n{"turns": ["  "]}', "line 2"),
        ('{"turns": "a"}', "line 1"),
        ("[]", "line 1"),
        ("3", "line 1"),
        ("{", "line 1: not JSON"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}', "two questions with the id 1"),
    ],
)
def test_what_is_no_question_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_questions(path)


def test_questions_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the questions in .*: No such file"):
        read_questions(tmp_path / "none.jsonl")


# --- methods ----------------------------------------------------------------------------------------------------------


def test_acceptance_is_counted_by_depth_and_by_drafter() -> None:
    #   0 -> 1 (heads) -> 2 (heads);  0 -> 3 (ngram)
    draft = Draft((9, 1, 2, 3), (-1, 0, 1, 0), (1.0, 0.5, 0.2, 0.1), (MODEL, "heads", "heads", "ngram"))
    steps = [
        Step((9,), (MODEL,), None),
        Step((1, 2, 5), ("heads", "heads", MODEL), None, draft, (0, 1, 2)),
        Step((3, 5), ("ngram", MODEL), None, draft, (0, 3)),
        Step((5,), (MODEL,), None, Draft((9,)), (0,)),
    ]
    depths, drafters = counts(steps)
    assert depths == [[2, 2], [2, 1]]  # two drafts were two deep; both were right once, one twice
    assert drafters == {"heads": [4, 2], "ngram": [2, 1]}


def test_on_a_gpu_all_methods_decode_by_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with a tree that grows would take the loop of the host, beside plain decoding that is captured."""
    monkeypatch.setattr("medusa.steppers.on_one_gpu", lambda backend: backend)
    lm = make(heads=True)
    heads: Any = lm.heads
    monkeypatch.setattr(heads, "config", replace(heads.config, tree=(((0,), 0.5), ((1,), 0.3))))
    monkeypatch.setattr(lm, "tree", "static")
    methods = [medusa_method(name, lm, GREEDY, 4) for name in MEDUSA_METHODS if name != "typical"]
    assert {type(method.stepper).__name__ for method in methods} == {"DeviceStepper"}


@pytest.mark.parametrize("name", [name for name in MEDUSA_METHODS if name not in ("heads-static", "typical")])
def test_every_method_says_what_plain_decoding_says_and_counts_it(name: str) -> None:
    lm = make(heads=True)
    plain = medusa_method("plain", lm, GREEDY).answer([{"role": "user", "content": "Why?"}], 40)
    found = medusa_method(name, lm, GREEDY).answer([{"role": "user", "content": "Why?"}], 40)
    assert found.token_ids == plain.token_ids
    assert (found.text, found.new_tokens) == (plain.text, plain.new_tokens)
    assert found.decoded_tokens == found.new_tokens - 1
    assert plain.steps == plain.decoded_tokens
    assert found.phases is not None
    assert tuple(found.phases) == PHASES
    assert sum(found.phases.values()) == pytest.approx(found.decode_seconds)
    accepted = sum(right for _, right in found.drafters.values())
    assert found.steps is not None
    assert found.decoded_tokens <= found.steps + accepted
    assert sum(right for _, right in found.depths) == accepted


def test_misled_heads_are_never_right() -> None:
    lm = make(heads=True, nodes=16)
    found = medusa_method("rubbish", lm, GREEDY).answer([{"role": "user", "content": "Why?"}], 40)
    honest = medusa_method("union", lm, GREEDY).answer([{"role": "user", "content": "Why?"}], 40)
    nodes, right = found.drafters["heads"]
    assert nodes > 100
    assert right == 0
    assert found.steps == found.decoded_tokens
    assert honest.steps is not None
    assert honest.steps < found.steps


def test_methods_that_cannot_be_had_say_what_is_missing() -> None:
    with pytest.raises(UsageError, match="add --temperature"):
        medusa_method("typical", make(), Sampling(temperature=0.0))
    with pytest.raises(UsageError, match="this model has none: give --heads"):
        medusa_method("rubbish", make(), GREEDY)
    assert medusa_method("typical", make(), Sampling(temperature=0.7)).sampling.acceptance == "typical"


def test_peak_memory_is_that_since_it_was_made() -> None:
    before = PeakMemory().bytes()
    peak = PeakMemory()
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])  # touched, or it takes no memory
    del block
    grown = peak.bytes()
    assert grown >= before + (48 << 20)
    if Path("/proc/self/clear_refs").exists():
        assert PeakMemory().bytes() < grown


# --- statistics -------------------------------------------------------------------------------------------------------


def answer(tokens: int, steps: int | None, seconds: float, **changes: Any) -> dict[str, Any]:
    ids = changes.pop("ids", [1, 2])
    return Measurement("text", ids, tokens + 1, tokens, steps, seconds, 0.5, **changes).as_json()


def row(number: int, category: str = "all", **methods: dict[str, Any]) -> dict[str, Any]:
    return {"question_id": str(number), "category": category, "turns": [methods]}


ANSWERS = st.tuples(st.integers(1, 300), st.floats(0.1, 1), st.floats(1e-3, 10), st.floats(1e-3, 10))


@given(st.lists(ANSWERS, min_size=1, max_size=8))
def test_speed_up_is_tokens_per_step_over_overhead(table: list[tuple[int, float, float, float]]) -> None:
    rows = [
        row(i, plain=answer(tokens, tokens, plain), union=answer(tokens, max(1, int(share * tokens)), seconds))
        for i, (tokens, share, seconds, plain) in enumerate(table)
    ]
    found = figures(rows, "union")
    assert found.tokens_per_step is not None
    assert found.overhead is not None
    assert found.speedup == pytest.approx(found.tokens_per_step / found.overhead)
    tokens = sum(one[0] for one in table)
    assert found.speedup == pytest.approx(
        (tokens / sum(one[2] for one in table)) / (tokens / sum(one[3] for one in table))
    )
    low, high = found.speedup_interval
    if len(table) == 1:
        assert math.isnan(low)
        return
    each = [plain / seconds for _, _, seconds, plain in table]
    assert min(each) * (1 - 1e-9) <= low <= high <= max(each) * (1 + 1e-9)


def test_the_interval_narrows_around_the_speed_up() -> None:
    def interval(count: int) -> tuple[float, float]:
        rows = [row(i, plain=answer(100, 100, 1.0), union=answer(100, 50, 0.4 + 0.2 * (i % 2))) for i in range(count)]
        return figures(rows, "union").speedup_interval

    (low, high), (closer_low, closer_high) = interval(8), interval(200)
    assert low < closer_low < 2 < closer_high < high


def test_answers_are_identical_by_tokens_or_where_there_are_none_by_text() -> None:
    rows = [
        row(1, plain=answer(1, 1, 1, ids=[1]), a=answer(1, 1, 1, ids=[1]), b=answer(1, None, 1, ids=None)),
        row(2, plain=answer(1, 1, 1, ids=[1]), a=answer(1, 1, 1, ids=[2]), b=answer(1, None, 1, ids=None)),
    ]
    rows[1]["turns"][0]["b"]["text"] = "another"
    assert figures(rows, "a").identical == 1
    assert figures(rows, "b").identical == 1
    assert figures(rows, "b").total == 2


def test_what_a_method_cannot_know_is_none() -> None:
    found = figures([row(1, plain=answer(10, 10, 1.0), server=answer(10, None, 0.5))], "server")
    assert found.speedup == pytest.approx(2.0)
    assert found.tokens_per_step is found.overhead is found.milliseconds_per_step is found.phases is None


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """Answers with its name and the number of messages; `calls` is shared by all methods of a run."""

    name: str
    calls: list[tuple[str, Any]] = field(default_factory=list)
    fail_at: int | None = None

    def answer(self, messages: Sequence[Any], max_new_tokens: int) -> Measurement:
        if self.fail_at is not None and len(self.calls) >= self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((self.name, [message["content"] for message in messages]))
        return Measurement(f"{self.name}{len(messages)}", [len(messages)], 3, 2, 2, 0.5, 0.1)


QUESTIONS = tuple(Question(f"q{i}", "all", (f"first {i}", f"second {i}")) for i in range(3))


def test_methods_take_turns_in_an_order_that_rotates(tmp_path: Path) -> None:
    calls: list[tuple[str, Any]] = []
    methods = [Scripted("plain", calls), Scripted("union", calls)]
    rows = run_bench(methods, QUESTIONS, BenchSettings(), tmp_path)
    warm_up = len(methods)
    assert [name for name, _ in calls[warm_up:]] == ["plain", "union", "union", "plain", "plain", "union"]
    assert [row["question_id"] for row in rows] == ["q0", "q1", "q2"]
    assert rows == read_rows(tmp_path)


@pytest.mark.parametrize(("follow", "expected"), [("own", "union1"), ("plain", "plain1")])
def test_a_second_turn_follows_on_the_answer_it_should(tmp_path: Path, follow: Any, expected: str) -> None:
    union = Scripted("union")
    run_bench([Scripted("plain"), union], QUESTIONS[:1], BenchSettings(turns=2, follow=follow), tmp_path)
    assert union.calls[-1] == ("union", ["first 0", expected, "second 0"])


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls: list[tuple[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run_bench([Scripted("plain", calls, fail_at=3)], QUESTIONS, BenchSettings(), tmp_path)
    path = tmp_path / "answers.jsonl"
    assert len(path.read_text().splitlines()) == 2
    with path.open("a") as file:
        file.write('{"question_id": "q2", "cate')  # a kill in the middle of a line
    again = Scripted("plain")
    rows = run_bench([again], QUESTIONS, BenchSettings(), tmp_path)
    assert [said[0] for _, said in again.calls[1:]] == ["first 2"]
    assert [row["question_id"] for row in rows] == ["q0", "q1", "q2"]
    assert len(path.read_text().splitlines()) == 3
    done = Scripted("plain")
    assert run_bench([done], QUESTIONS, BenchSettings(), tmp_path) == rows
    assert done.calls == [], "nothing is left to ask"


def test_a_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"no run in .* to resume"):
        open_run(out, {"model": "a"}, resume=True)
    open_run(out, {"model": "a", "nodes": 8}, resume=False)
    open_run(out, {"model": "b"}, resume=False)  # nothing has been asked yet
    open_run(out, {"model": "a", "nodes": 8}, resume=False)
    (out / "answers.jsonl").touch()
    open_run(out, {"model": "a", "nodes": 8}, resume=True)
    with pytest.raises(UsageError, match="add --resume"):
        open_run(out, {"model": "a", "nodes": 8}, resume=False)
    with pytest.raises(UsageError, match="differs in model, temperature: name another --out"):
        open_run(out, {"model": "b", "nodes": 8, "temperature": 1}, resume=True)


# --- the report -------------------------------------------------------------------------------------------------------


def make_report() -> Report:
    phases = dict.fromkeys(PHASES, 0.1)
    rows = [
        row(
            i,
            category,
            plain=answer(100, 100, 1.0, phases=phases, peak_bytes=10**9),
            union=answer(
                100, 40, 0.5, phases=phases, depths=[[40, 30], [40, 20]], drafters={"heads": [80, 50]}, peak_bytes=10**9
            ),
            server=answer(100, None, 2.0, ids=None),
        )
        for i, category in enumerate(["writing", "coding"])
    ]
    return Report(rows, ["plain", "union", "server"], {"model": "tiny", "nodes": "auto"}, {"processor": "a chip"})


def test_the_line_of_json_has_the_promised_keys() -> None:
    line = json.loads(json.dumps(make_report().summary(), allow_nan=False))
    keys = {"tokens_per_second", "tokens_per_step", "overhead", "speedup", "identical", "total"}
    assert set(line) == {"plain", "methods", "machine"}
    assert set(line["methods"]) == {"union", "server"}
    assert set(line["plain"]) == set(line["methods"]["union"]) == keys
    assert line["methods"]["union"] == {
        "tokens_per_second": 200.0, "tokens_per_step": 2.5, "overhead": 1.25, "speedup": 2.0,
        "identical": 2, "total": 2,
    }  # fmt: skip
    assert line["methods"]["server"]["tokens_per_step"] is None


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_report_is_written_whole(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    written = make_report().write(tmp_path, kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert {path.stem for path in written if path.suffix == f".{kind}"} == {"speedup", "phases", "acceptance"}
    whole = json.loads((tmp_path / "report.json").read_text())
    assert whole["categories"]["coding"]["union"]["speedup"] == pytest.approx(2.0)
    text = (tmp_path / "report.md").read_text()
    for expected in ("# tiny: 2 questions", "| union | 200.0 | 2.50 |", "| coding |", "heads 0.62", "a chip"):
        assert expected in text


def test_a_report_of_one_short_answer_has_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    rows = [row(1, plain=answer(0, 0, 0.0), union=answer(0, 0, 0.0))]
    report = Report(rows, ["plain", "union"], {}, {})
    json.dumps(report.as_json(), allow_nan=False)
    assert math.isnan(report.overall["union"].speedup)
    pytest.importorskip("matplotlib")
    report.write(tmp_path)


def test_a_table_in_markdown() -> None:
    assert markdown_table([["a", "b"], ["x|y", "1"]]) == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]
