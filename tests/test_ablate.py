"""Ablations and what they need: trees, batches of texts, measures of quality; and others' engines as baselines."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import ToyBackend, ToyModel, always_agrees, slow_probabilities
from medusa.decoding.draft import NoDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import GREEDY, Sampling
from medusa.decoding.slots import Slots
from medusa.errors import MedusaError, UsageError
from medusa.evaluation import ablate
from medusa.evaluation.baselines import BaselineOptions, Baselines, ServerMethod, TransformersMethod
from medusa.evaluation.batch import Load, compare_loads, run_load
from medusa.evaluation.methods import medusa_method
from medusa.evaluation.quality import distinct, measure, nats, repetition
from medusa.evaluation.questions import Question
from medusa.evaluation.statistics import figures
from medusa.remote import openai_client
from tiny_lm import make, with_tree, writer
from tiny_models import shared_model

ASKED = [{"role": "user", "content": "Why?"}]


# --- variants ---------------------------------------------------------------------------------------------------------


@given(nodes=st.integers(1, 300), levels=st.integers(1, 5), seed=st.integers(0, 1000))
def test_a_random_tree_is_a_tree_of_that_size(nodes: int, levels: int, seed: int) -> None:
    tree = ablate.random_tree(nodes, levels, seed)
    assert len(tree) == min(nodes, sum(ablate.RANDOM_RANKS**depth for depth in range(levels + 1)))
    assert tree.depth <= levels
    assert tree.widest_rank <= ablate.RANDOM_RANKS
    assert ablate.random_tree(nodes, levels, seed) == tree


def test_trees_of_every_kind_are_verified_whole() -> None:
    lm = with_tree()
    variants = ablate.tree_variants(lm, GREEDY)
    names = [variant.method.name for variant in variants]
    assert len(set(names)) == len(names) == 1 + 3 * len(ablate.TREE_SIZES) + len(ablate.CARTESIAN)
    assert max(variant.facts["nodes"] for variant in variants) == 256
    plain = variants[0].method.answer(ASKED, 6)
    for variant in variants[1:]:
        found = variant.method.answer(ASKED, 6)
        assert found.token_ids == plain.token_ids, variant.method.name
        first_draft = found.drafters["heads"][0]
        assert first_draft >= min(variant.facts["nodes"] - 1, 2), variant.method.name


def test_the_searched_tree_is_the_one_that_calibration_expects_most_of() -> None:
    variants = ablate.tree_variants(with_tree(), GREEDY)
    for size in ablate.TREE_SIZES:
        some = [v.facts for v in variants if v.facts["nodes"] == size and v.facts.get("expected") is not None]
        assert max(some, key=lambda facts: facts["expected"])["kind"] == "searched"


def test_heads_are_added_one_by_one() -> None:
    variants = ablate.heads_variants(with_tree(), GREEDY)
    chains = [v.facts["nodes"] for v in variants if v.facts["kind"] == "chain of best guesses"]
    trees = [v.facts["nodes"] for v in variants if v.facts["kind"] == "searched tree"]
    assert chains == [2, 3, 4, 5]
    assert trees == [min(8, 1 + 4), 8, 8, 8]  # four ranks of one head are all that this tree knows
    assert [v.method.name for v in variants[-2:]] == ["dynamic tree", "dynamic tree and n-grams"]


def test_nodes_are_counted_as_asked_for() -> None:
    variants = ablate.nodes_variants(make(heads=True), GREEDY)
    for variant in variants[1:]:
        stepper = variant.method.stepper  # type: ignore[attr-defined]
        assert stepper.nodes == variant.facts["nodes"] or variant.facts["nodes"] == "auto"
    assert variants[-1].facts == {"kind": "auto", "nodes": "auto"}


@pytest.mark.parametrize("heads", [False, True])
def test_every_drafter_has_its_turn(heads: bool) -> None:
    lm = with_tree() if heads else make()
    names = {variant.facts["drafter"] for variant in ablate.drafters_variants(lm, GREEDY)[1:]}
    assert names == ({"ngram", "heads", "heads-static", "union", "rubbish"} if heads else {"ngram"})


def test_thresholds_vary_and_delta_follows() -> None:
    lm = make(heads=True)
    variants = ablate.threshold_variants(lm, Sampling(temperature=0.7, seed=3))
    typical = {v.facts["epsilon"]: v.method.sampling for v in variants if v.facts["kind"] == "typical"}  # type: ignore[attr-defined]
    assert tuple(typical) == ablate.EPSILONS
    for epsilon, sampling in typical.items():
        assert (sampling.acceptance, sampling.delta) == ("typical", math.sqrt(epsilon))
    exact = next(v for v in variants if v.facts["kind"] == "exact")
    assert exact.method.answer(ASKED, 24).token_ids == variants[0].method.answer(ASKED, 24).token_ids


@pytest.mark.parametrize("make_variants", [ablate.tree_variants, ablate.heads_variants])
def test_an_ablation_of_heads_needs_heads_with_a_tree(make_variants: Any) -> None:
    with pytest.raises(UsageError, match="give --heads"):
        make_variants(make(), GREEDY)
    with pytest.raises(UsageError, match="medusa calibrate"):
        make_variants(make(heads=True), GREEDY)


# --- tables and pictures ----------------------------------------------------------------------------------------------


def measured(kind: str, variants: list[ablate.Variant]) -> list[dict[str, Any]]:
    rows = [
        {"question_id": "1", "category": "all", "turns": [{v.method.name: v.method.answer(ASKED, 6).as_json()}]}
        for v in variants
    ]
    merged = {"question_id": "1", "category": "all", "turns": [{k: a for r in rows for k, a in r["turns"][0].items()}]}
    more = {"perplexity": 2.0} if kind == "threshold" else {}
    return ablate.table(variants, lambda name: figures([merged], name), lambda _: more)


@pytest.mark.parametrize("kind", ["tree", "heads", "nodes", "threshold"])
def test_a_table_becomes_a_csv_file_and_a_picture(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    makers: dict[str, Any] = {
        "tree": ablate.tree_variants,
        "heads": ablate.heads_variants,
        "nodes": ablate.nodes_variants,
        "threshold": lambda lm, how: ablate.threshold_variants(lm, Sampling(temperature=0.7, seed=0)),
    }
    rows = measured(kind, makers[kind](with_tree(), GREEDY))
    assert rows[0]["speedup"] == pytest.approx(1.0)
    ablate.write_csv(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["variant"] for line in read] == [row["variant"] for row in rows]
    assert set(ablate.COLUMNS[kind]) - {"mark", "distinct_2", "repetition"} <= set(read[0])
    ablate.draw(kind, rows, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    table = ablate.cells(rows, ablate.COLUMNS[kind])
    assert len(table) == 1 + len(rows)
    assert all(len(line) == len(table[0]) for line in table)


def test_where_batches_stop_paying_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loads = {
        "plain": [Load(1, 10, 10, 1.0, 10), Load(8, 10, 80, 2.0, 80)],
        "medusa": [Load(1, 10, 25, 1.25, 80), Load(8, 10, 88, 4.4, 100)],
    }
    first, last = ablate.batch_rows(loads)
    assert (first["speedup"], last["speedup"]) == (2.0, 0.5)
    assert (first["medusa_ms_per_token"], last["plain_ms_per_token"]) == (50.0, 200.0)
    assert (first["tokens_per_step"], last["nodes_per_text"]) == (2.5, 1.25)
    ablate.draw("batch", [first, last], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


# --- many texts at once -----------------------------------------------------------------------------------------------


def toy_lm(model: ToyModel, slots: int) -> tuple[Any, ToyBackend]:
    backend = ToyBackend(model, num_slots=slots)
    return SimpleNamespace(eos_token_ids=(), slots=Slots(backend)), backend


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_load_counts_the_tokens_of_all_its_texts(rows: int) -> None:
    model = ToyModel()
    lm, backend = toy_lm(model, rows)
    load = Load(rows)
    prompts = itertools.cycle([[1, 2], [3], [4, 5, 6]])
    run_load(
        lm, ReferenceStepper(backend, NoDrafter(), 1), prompts, load, steps=9, max_new_tokens=5, sampling=Sampling()
    )
    assert (load.steps, load.tokens, load.nodes) == (9, 9 * rows, 9 * rows)
    assert backend.text == {}, "every slot is free again"
    assert load.seconds == pytest.approx(sum(load.step_seconds))
    assert load.tokens_per_step == 1.0
    drafted = Load(rows)
    decoder = ReferenceStepper(backend, always_agrees(model, 3), 4)
    run_load(lm, decoder, prompts, drafted, steps=4, max_new_tokens=9, sampling=Sampling())
    assert drafted.tokens == 4 * 4 * rows, "three right guesses and one of the model's own"


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_texts_are_decoded_to_their_end_the_same_for_each_number_at_once(rows: int) -> None:
    model = ToyModel()
    lm, backend = toy_lm(model, rows)
    stepper = ReferenceStepper(backend, NoDrafter(), 1)
    (load,) = compare_loads(
        lm, {"plain": stepper}, [[1, 2], [3], [4, 5, 6]], [rows], max_new_tokens=5, sampling=GREEDY
    )["plain"]
    assert load.steps >= 3 * 4 // rows  # three texts of four tokens after the first
    assert load.tokens == load.steps * rows  # always as many at once
    assert backend.text == {}


def test_loads_of_all_sizes_take_turns() -> None:
    model = ToyModel()
    lm, backend = toy_lm(model, 4)
    decoders = {
        "plain": ReferenceStepper(backend, NoDrafter(), 1),
        "medusa": ReferenceStepper(backend, always_agrees(model, 2), 3),
    }
    told: list[tuple[int, int]] = []
    loads = compare_loads(
        lm, decoders, [[1], [2, 3]], (1, 4), steps=3, max_new_tokens=30, sampling=GREEDY, rounds=2,
        on_progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(i, 8) for i in range(1, 9)]
    assert [load.steps for some in loads.values() for load in some] == [6, 6, 6, 6]
    assert [load.tokens for load in loads["medusa"]] == [18, 72]


# --- quality ----------------------------------------------------------------------------------------------------------


@given(prompt=st.lists(st.integers(0, 7), min_size=1, max_size=3), answer=st.lists(st.integers(0, 7), max_size=12))
def test_nats_are_those_of_each_token_after_the_ones_before_it(prompt: list[int], answer: list[int]) -> None:
    model = ToyModel()
    backend = ToyBackend(model)
    expected = 0.0
    for i, token in enumerate(answer):
        p, _ = slow_probabilities(model([*prompt, *answer[:i]]), Sampling(temperature=1.0))
        expected -= math.log(p[token])
    assert nats(backend, prompt, answer) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert backend.text == {}


def test_nats_of_a_text_longer_than_a_chunk() -> None:
    model = ToyModel()
    answer = [i * i % 7 for i in range(50)]
    slow = sum(
        -math.log(slow_probabilities(model([1, *answer[:i]]), Sampling(temperature=1.0))[0][token])
        for i, token in enumerate(answer)
    )
    assert nats(ToyBackend(model), [1], answer) == pytest.approx(slow, rel=1e-4)


def test_variety_and_repetition() -> None:
    assert distinct([1, 2, 3, 4]) == 1.0
    assert distinct([1, 2, 1, 2, 1]) == 0.5
    assert distinct([]) == distinct([1]) == 1.0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 8)
    assert repetition([5] * 8) == pytest.approx(4 / 8)
    assert repetition([]) == 0.0


def test_answers_are_measured_by_method() -> None:
    lm = make()
    good = medusa_method("plain", lm, GREEDY).answer(ASKED, 12).as_json()
    bad = {**good, "token_ids": list(reversed(good["token_ids"]))}
    rows = [{"question_id": "1", "category": "all", "turns": [{"plain": good, "bad": bad}]}]
    found = measure(lm, rows, {"1": Question("1", "all", ("Why?",))})
    assert found["plain"]["perplexity"] < found["bad"]["perplexity"]
    assert set(found["plain"]) == {"perplexity", "distinct_2", "repetition"}


class Judge:
    """A client whose server replies one text after the other."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = list(replies), []  # type: ignore[var-annotated]
        self.chat = self.completions = self

    def create(self, **call: Any) -> Any:
        self.asked.append(call)
        message = SimpleNamespace(content=self.replies.pop(0))
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])


def test_a_judge_reads_request_and_answer_and_its_marks_are_averaged() -> None:
    lm = make()
    answer = medusa_method("plain", lm, GREEDY).answer(ASKED, 12).as_json()
    rows = [{"question_id": "1", "category": "all", "turns": [{"a": answer, "b": answer, "c": answer}]}] * 2
    client: Any = Judge("8", "I say 7.5.", "none", "9/10", "11", "none")
    found = measure(lm, rows, {"1": Question("1", "all", ("Why?",))}, client, "big")
    assert [found[name].get("mark") for name in "abc"] == [8.5, 7.5, None]  # 11 and words are no marks
    call = client.asked[0]
    assert call["model"] == "big"
    assert "Why?" in call["messages"][0]["content"]
    assert answer["text"] in call["messages"][0]["content"]


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": "itself"}], ids=["plain", "lookup", "assisted"]
)
def test_transformers_says_what_we_say_and_its_passes_are_counted(options: dict[str, Any]) -> None:
    lm = make()
    if "assistant_model" in options:
        options = {"assistant_model": copy.deepcopy(writer())}  # another object, whose passes are not counted
    plain = medusa_method("plain", lm, GREEDY).answer(ASKED, 40)
    found = TransformersMethod("t", writer(), lm, GREEDY, options).answer(ASKED, 40)
    assert found.token_ids == plain.token_ids
    assert found.text == plain.text
    assert found.new_tokens == plain.new_tokens
    assert found.steps is not None
    if options:
        assert found.steps < found.decoded_tokens
    else:
        assert found.steps == found.decoded_tokens == plain.decoded_tokens
    assert found.ttft_seconds > 0
    assert found.decode_seconds > 0


def test_only_tokens_up_to_the_end_are_counted() -> None:
    lm = make()
    said = TransformersMethod("t", writer(), lm, GREEDY).answer(ASKED, 40).token_ids
    assert said is not None
    ending = make(eos_token_ids=[said[5]])
    first = said.index(said[5])
    for method in (TransformersMethod("t", writer(), ending, GREEDY), medusa_method("union", ending, GREEDY)):
        found = method.answer(ASKED, 40)
        assert found.token_ids == said[: first + 1]
        assert found.new_tokens == first + 1


def test_transformers_samples_with_the_seed() -> None:
    method = TransformersMethod("t", writer(), make(), Sampling(temperature=1.0, seed=3))
    other = TransformersMethod("t", writer(), make(), Sampling(temperature=1.0, seed=4))
    assert method.answer(ASKED, 30).token_ids == method.answer(ASKED, 30).token_ids
    assert method.answer(ASKED, 30).token_ids != other.answer(ASKED, 30).token_ids


def test_baselines_that_lack_an_option_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        baselines = Baselines(make(), BaselineOptions("m", "float32", "cpu"), GREEDY, stack)
        with pytest.raises(UsageError, match="needs --baseline-url"):
            baselines.method("server")
        with pytest.raises(UsageError, match="needs --draft-model"):
            baselines.method("assisted")
        monkeypatch.setattr(
            "medusa.models.zoo.load_model",
            lambda source, **_: writer() if "big" in str(source) else shared_model("llama"),
        )
        monkeypatch.setattr("medusa.models.zoo.resolve", lambda name: name)
        strange = Baselines(make(), BaselineOptions("big", "float32", "cpu", draft_model="small"), GREEDY, stack)
        with pytest.raises(MedusaError, match="small has another vocabulary than big"):
            strange.method("assisted")


@dataclass
class Chat:
    """What the small server below says, piece by piece."""

    pieces: tuple[str, ...] = ("Be", "cause", ".")
    usage: bool = True
    thoughts: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def events(self) -> Iterator[dict[str, Any]]:
        base = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        if self.thoughts:
            yield {**base, "choices": [{"index": 0, "delta": {"reasoning": self.thoughts}, "finish_reason": None}]}
        for piece in self.pieces:
            yield {**base, "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
        yield {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        if self.usage:
            counts = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
            yield {**base, "choices": [], "usage": counts}


@pytest.fixture
def chat() -> Iterator[tuple[Chat, str]]:
    state = Chat()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for event in itertools.chain(map(json.dumps, state.events()), ["[DONE]"]):
                self.wfile.write(f"data: {event}\n\n".encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield state, f"http://127.0.0.1:{http.server_address[1]}/v1"
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_server_is_told_all_of_the_sampling_and_refused_where_it_hides_thoughts(chat: tuple[Chat, str]) -> None:
    pytest.importorskip("openai")
    state, url = chat
    sampling = Sampling(temperature=0.7, seed=5, top_k=9, repetition_penalty=1.2)
    with openai_client(url) as client:
        ServerMethod("server", client, "big", make(), sampling).answer(ASKED, 33)
        (asked,) = state.asked
        assert (asked["top_k"], asked["repetition_penalty"]) == (9, 1.2)
        assert "min_p" not in asked
        state.thoughts = "Hm."
        with pytest.raises(MedusaError, match="takes thoughts out of big's answers"):
            ServerMethod("server", client, "big", make(), sampling).answer(ASKED, 33)


@pytest.mark.parametrize("usage", [True, False])
def test_a_server_is_asked_as_we_are(chat: tuple[Chat, str], usage: bool) -> None:
    pytest.importorskip("openai")
    state, url = chat
    state.usage = usage
    lm = make()
    with openai_client(url) as client:
        found = ServerMethod("server", client, "big", lm, Sampling(temperature=0.7, seed=5)).answer(ASKED, 33)
    assert found.text == "Because."
    assert found.token_ids is None
    counted = len(lm.tokenizer("Because.", add_special_tokens=False)["input_ids"])
    assert found.new_tokens == (7 if usage else counted)
    assert found.decoded_tokens == found.new_tokens - 1
    assert found.steps is None
    (asked,) = state.asked
    assert (asked["model"], asked["max_tokens"], asked["temperature"], asked["seed"]) == ("big", 33, 0.7, 5)
    assert asked["messages"] == ASKED
