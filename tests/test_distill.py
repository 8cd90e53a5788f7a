"""Distilling: conversations side by side, the same file whatever the slots and however often a run is killed."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import RandomTreeDrafter, ToyBackend, ToyModel
from medusa.api import LanguageModel
from medusa.decoding.draft import NoDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.decoding.stepper import Request
from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.text.turns import Turns
from medusa.training import openings
from medusa.training.conversations import Example
from medusa.training.distill import DistillSettings, Prompt, Written, distill, write_in_order
from medusa.training.stored_features import FeatureCache, FeatureStore
from medusa.training.talk import LoopWatch, Talk, Transcript, Turn, talk_in_slots
from medusa.training.text import Silent, read_text, shown_by
from medusa.training.text_file import TextFile
from tiny_models import CHAT_TEMPLATE, TOKENIZER_VOCAB, make_model, make_tokenizer

# A tiny random model ends a turn only by chance: it must be hot, and many tokens must end a text.
ENDS = (2, *range(10, 30))
HOT = DistillSettings(
    tokens=200,
    turns=3,
    max_user_tokens=40,
    max_answer_tokens=24,
    temperatures=(0.0, 6.0),
    user_temperature=6.0,
    top_p=1.0,
)


def model(slots: int = 3, template: str | None = CHAT_TEMPLATE, ends: Sequence[int] = ENDS) -> LanguageModel:
    backend = TransformersBackend(make_model(vocab_size=TOKENIZER_VOCAB, max_position_embeddings=1024), num_slots=slots)
    return LanguageModel("tiny", make_tokenizer(template), backend, drafter="none", nodes=1, eos_token_ids=ends)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "text.jsonl"
    distill(model(), path, HOT)
    return path


def test_rows_say_where_they_come_from_and_what_is_learned(whole: Path) -> None:
    tokenizer = make_tokenizer()
    rows = rows_of(whole)
    assert sum(end - start for row in rows for start, end in row["labels"]) >= HOT.tokens
    assert [row["number"] for row in rows] == sorted({row["number"] for row in rows})
    assert any(len(row["labels"]) > 1 for row in rows)  # some conversations have several turns
    for row in rows:
        assert row["model"] == "tiny"
        assert row["seed"] == 0
        assert row["settings"]["max_answer_tokens"] == 24
        assert row["settings"]["backend"] == "transformers"
        assert row["temperature"] == HOT.temperatures[row["number"] % 2]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        found = [
            tokenizer.decode(row["token_ids"][start:end], skip_special_tokens=True) for start, end in row["labels"]
        ]
        # An end of text that is not the template's own end of a turn gives way to that one, where the text goes on.
        # From an answer that is nothing else nothing is learned.
        for answer in answers:
            part = found.pop(0) if found and answer.startswith(found[0]) else ""
            assert answer.startswith(part)
            assert len(answer) - len(part) <= 1
        assert not found
        text = tokenizer.decode(row["token_ids"])
        assert text.startswith("<|start|>user: ")
        for start, _ in row["labels"]:
            assert tokenizer.decode(row["token_ids"][:start]).endswith("<|end|><|start|>assistant: ")


def test_a_turn_goes_on_from_the_text_before_it(whole: Path) -> None:
    """Greedy answers are those that the model gives to the whole text so far, read at once."""
    lm = model(1)
    checked = 0
    for row in rows_of(whole):
        if row["temperature"] == 0 and len(row["labels"]) > 1:
            start, end = row["labels"][-1]
            decoder = ReferenceStepper(lm.backend, NoDrafter(), 1)
            decoded, _ = decoder.start(
                0, Request(row["token_ids"][:start], Sampling(), max_new_tokens=24, eos_token_ids=ENDS)
            )
            while decoded.finish_reason is None:
                decoder.step([decoded])
            assert decoded.tokens[: len(row["token_ids"])] == row["token_ids"]
            assert end == len(row["token_ids"])
            decoder.finish(decoded)
            checked += 1
    assert checked


@pytest.mark.parametrize("slots", [1, 5])
def test_the_file_is_the_same_for_any_number_of_slots(whole: Path, slots: int, tmp_path: Path) -> None:
    distill(model(slots), tmp_path / "text.jsonl", HOT)
    assert (tmp_path / "text.jsonl").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_goes_on_without_a_lost_or_doubled_row(whole: Path, seed: int, tmp_path: Path) -> None:
    path, chance = tmp_path / "text.jsonl", random.Random(seed)

    class Killed(BaseException):
        pass

    kills = 0
    lm = model()
    while kills < 40:
        passes = chance.randrange(5, 150)

        def tell(written: Written) -> None:
            nonlocal passes
            passes -= 1
            if passes == 0:
                raise Killed

        try:
            distill(lm, path, HOT, on_progress=tell)
            break
        except Killed:
            kills += 1
            assert all(lm.backend.length(slot) == 0 for slot in range(3))
            if chance.random() < 0.5 and path.exists():  # in the middle of a write
                with path.open("ab") as file:
                    file.write(b'{"number": 99, "model": "ti')
    assert kills
    assert path.read_bytes() == whole.read_bytes()


def test_a_finished_file_is_left_as_it_is_and_more_tokens_go_on(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(whole.read_bytes())
    written = distill(model(), path, HOT)
    assert written.spent == 0
    assert path.read_bytes() == whole.read_bytes()
    more = DistillSettings(**{**{n: getattr(HOT, n) for n in HOT.__dataclass_fields__}, "tokens": HOT.tokens + 100})
    distill(model(), path, more)
    assert path.read_bytes().startswith(whole.read_bytes())
    assert len(path.read_bytes()) > len(whole.read_bytes())


def test_other_settings_do_not_go_on_with_a_file(whole: Path) -> None:
    changed = DistillSettings(tokens=10_000, seed=1)
    with pytest.raises(UsageError, match=r"was made with seed 0, not 1"):
        distill(model(), whole, changed)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(MedusaError, match="line 1, is not a row of distilled text"):
        distill(model(), path, HOT)
    assert path.read_text() == '{"messages": []}\n'
    path.write_text('["Why?"]')  # one line without an end is not what a kill has left
    with pytest.raises(MedusaError, match="line 1, is not a row of distilled text"):
        distill(model(), path, HOT)
    assert path.read_text() == '["Why?"]'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_clear_sentence(tmp_path: Path) -> None:
    file = TextFile(tmp_path / "text.jsonl", {})
    file.close()
    file._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - `file` closes it
    with pytest.raises(MedusaError, match=r"cannot write .*text.jsonl: No space left on device; make room"):
        file.add(0, Transcript(0.0, [], list(range(20)), [(0, 20)]))
    file.close()


def test_given_prompts_are_answered_once_each(tmp_path: Path) -> None:
    prompts = [Prompt(("What is it?", "And why is that?")), Prompt(("Tell me more.",)), Prompt(("what is  IT?",))]
    written = distill(model(2, ends=[2]), tmp_path / "text.jsonl", HOT, prompts=prompts)
    rows = rows_of(tmp_path / "text.jsonl")
    assert [row["number"] for row in rows] == [0, 1]
    assert written.dropped == {"repeated": 1}
    assert rows[0]["messages"][0] == {"role": "user", "content": "What is it?"}
    assert (
        make_tokenizer()
        .decode(rows[1]["token_ids"])
        .startswith("<|start|>user: Tell me more.<|end|><|start|>assistant: ")
    )


def test_a_system_prompt_joins_the_first_turn_where_the_template_has_no_such_role(tmp_path: Path) -> None:
    distill(model(2), tmp_path / "text.jsonl", HOT, prompts=[Prompt(("Who are you?",), "Be brief.")])
    (row,) = rows_of(tmp_path / "text.jsonl")
    assert make_tokenizer().decode(row["token_ids"]).startswith("<|start|>user: Be brief.\n\nWho are you?<|end|>")


def test_a_model_without_a_chat_template_writes_plain_text(tmp_path: Path) -> None:
    distill(model(template=None), tmp_path / "text.jsonl", HOT)
    rows = rows_of(tmp_path / "text.jsonl")
    assert all(row["token_ids"][0] == 1 and row["labels"] == [[1, len(row["token_ids"])]] for row in rows)


def test_loops_are_noticed_and_other_text_is_not() -> None:
    watch = LoopWatch(window=16)
    assert not any(watch.push(token) for token in range(200))
    pushed = [watch.push(token % 5) for token in range(60)]
    assert True in pushed
    assert not any(pushed[:14])


def test_turns_are_the_seams_of_the_template() -> None:
    turns = Turns.of(make_tokenizer())
    assert turns == Turns("<|start|>user: ", "<|end|><|start|>assistant: ", "<|end|><|start|>user: ")
    forgetful = CHAT_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")
    assert Turns.of(make_tokenizer(forgetful)).before_next is None
    with pytest.raises(UsageError, match="no chat template"):
        Turns.of(make_tokenizer(None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"temperatures": ()}, "temperatures must be one temperature or more"),
        ({"temperatures": (-1.0,)}, "temperature must be 0"),
        ({"top_p": 1.5}, "top_p must be"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistillSettings(**changes)


def test_resuming_a_row_equals_starting_with_its_text() -> None:
    """Whatever was drafted, and wherever in a draft the text ended."""
    toy = ToyModel(seed=3)
    for seed in range(20):
        chance = random.Random(seed)
        backend = ToyBackend(toy, num_slots=1)
        decoder = ReferenceStepper(backend, RandomTreeDrafter(toy, seed, right=0.7), 14)
        row, _ = decoder.start(
            0, Request([1, 2], Sampling(seed=seed, temperature=1.0), max_new_tokens=chance.randrange(2, 9))
        )
        while row.finish_reason is None:
            decoder.step([row])
        more = [chance.randrange(toy.vocab) for _ in range(chance.randrange(1, 40))]
        text = [*row.tokens, *more]
        row, _ = decoder.start(0, Request(text, Sampling(), max_new_tokens=6), backend.length(0))
        while row.finish_reason is None:
            decoder.step([row])
        fresh = ReferenceStepper(ToyBackend(toy, num_slots=1), NoDrafter(), 1)
        expected, _ = fresh.start(0, Request(text, Sampling(), max_new_tokens=6))
        while expected.finish_reason is None:
            fresh.step([expected])
        assert row.tokens == expected.tokens


@pytest.mark.parametrize(
    ("template", "long"),
    [
        (None, Prompt(("why? " * 300,))),
        (CHAT_TEMPLATE, Prompt(("why? " * 300,))),
        (CHAT_TEMPLATE, Prompt(("Why?",), "Be brief. " * 200)),
    ],
)
def test_a_prompt_longer_than_the_context_is_dropped_and_the_run_goes_on(
    template: str | None, long: Prompt, tmp_path: Path
) -> None:
    prompts = [Prompt(("What is it?",)), long, Prompt(("Tell me more.",))]
    for _ in range(2):  # a run that is started again meets it again
        distill(model(2, template, ends=[2]), tmp_path / "text.jsonl", HOT, prompts=prompts)
        assert [row["number"] for row in rows_of(tmp_path / "text.jsonl")] == [0, 2]
    (tmp_path / "text.jsonl").unlink()
    written = distill(model(2, template, ends=[2]), tmp_path / "text.jsonl", HOT, prompts=prompts)
    assert written.dropped == {"too long": 1}


def slots_of_toy(slots: int = 2) -> ReferenceStepper:
    return ReferenceStepper(ToyBackend(ToyModel(seed=3), num_slots=slots), NoDrafter(), 1)


def test_a_turn_that_fails_leaves_no_slot_in_use() -> None:
    def talk(number: int) -> Talk:
        yield Turn([1, 2], Sampling(), 4, frozenset())
        if number == 1:
            raise RuntimeError("no next turn")
        yield Turn([3], Sampling(), 4, frozenset())
        return Transcript(0.0)

    for slots in (1, 2):
        decoder = slots_of_toy(slots)
        with pytest.raises(RuntimeError, match="no next turn"):
            list(talk_in_slots(decoder, ((number, talk(number)) for number in range(5))))
        assert [decoder.backend.length(slot) for slot in range(slots)] == [0] * slots


def test_conversations_that_end_at_once_are_given_one_by_one() -> None:
    """Else a run in which none has room would never hear of it."""

    def talk() -> Talk:
        return Transcript(0.0, fault="too long")
        yield Turn([], Sampling(), 1, frozenset())

    talks = talk_in_slots(slots_of_toy(), ((number, talk()) for number in itertools.count()))
    assert [number for number, _ in itertools.islice(talks, 5)] == [0, 1, 2, 3, 4]


def test_invented_turns_begin_with_the_words_of_a_user(whole: Path) -> None:
    rows = rows_of(whole)
    assert {row["settings"]["openings"] for row in rows} == {openings.digest()}
    for row in rows:
        first, *later = [m["content"] for m in row["messages"] if m["role"] == "user"]
        assert first.startswith((*openings.FIRST, *openings.PROGRAMMING))
        assert all(user.startswith(openings.LATER) for user in later)
    assert len({row["messages"][0]["content"][:6] for row in rows}) > len(rows) / 2


@pytest.mark.parametrize(("template", "room", "reason"), [(CHAT_TEMPLATE, 60, "too long"), (None, 1024, "too short")])
def test_a_run_that_keeps_nothing_ends_and_says_why(
    template: str | None, room: int, reason: str, tmp_path: Path
) -> None:
    """One without room for a question, and one of a model that ends every text at once."""
    backend = TransformersBackend(make_model(vocab_size=TOKENIZER_VOCAB, max_position_embeddings=room), num_slots=3)
    ends = range(TOKENIZER_VOCAB)
    lm = LanguageModel("tiny", make_tokenizer(template), backend, drafter="none", nodes=1, eos_token_ids=ends)
    with pytest.raises(
        MedusaError, match=rf"of the last 200 conversations 200 were dropped \(200 {reason}\): give prompts"
    ):
        distill(lm, tmp_path / "text.jsonl", HOT)
    assert (tmp_path / "text.jsonl").read_bytes() == b""


def ended(*talks: Transcript) -> Callable[[int, Callable[[int], None]], Iterator[tuple[int, Transcript]]]:
    return lambda start, spent: (pair for pair in enumerate(talks[start:], start))


def answered(number: int, tokens: int = 20) -> Transcript:
    says = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "It is."}]
    return Transcript(0.0, says, list(range(tokens)), [(0, tokens)], spent=tokens)


def test_a_run_is_judged_by_its_last_conversations(tmp_path: Path) -> None:
    """One in ten that is kept is enough, and prompts that come again and again are no reason to end."""
    many = [answered(n) if n % 10 == 0 else Transcript(0.0, fault="no question") for n in range(500)]
    written = write_in_order(TextFile(tmp_path / "a", {}), 10**6, ended(*many), lambda _: None, endless=True)
    assert written.rows == 50
    again = [answered(0)] * 500
    written = write_in_order(TextFile(tmp_path / "b", {}), 10**6, ended(*again), lambda _: None, endless=False)
    assert written.dropped == {"repeated": 499}
    with pytest.raises(MedusaError, match=r"199 were dropped \(199 repeated\)"):
        write_in_order(TextFile(tmp_path / "c", {}), 10**6, ended(*again), lambda _: None, endless=True)
    failing = [answered(n) if n < 300 else Transcript(0.0, fault="too long") for n in range(1000)]
    with pytest.raises(MedusaError, match=r"191 were dropped \(191 too long\): mend the prompts"):
        write_in_order(TextFile(tmp_path / "d", {}), 10**6, ended(*failing), lambda _: None, endless=False)


def test_a_file_of_an_older_way_of_inventing_is_kept_but_not_gone_on_with(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)

    def older(line: str) -> str:
        row = json.loads(line)
        del row["settings"]["openings"]
        return json.dumps(row, ensure_ascii=False) + "\n"

    path.write_text("".join(map(older, lines)), encoding="utf-8")
    before = path.read_bytes()
    assert distill(model(), path, HOT).spent == 0  # it is whole
    assert path.read_bytes() == before
    path.write_text("".join(map(older, lines[:2])), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(
        UsageError, match="begun by an older version of Medusa, which invented questions in another way"
    ):
        distill(model(), path, HOT)
    assert path.read_bytes() == before


def test_the_setting_that_differs_is_named(whole: Path) -> None:
    with pytest.raises(UsageError, match=r"was made with max_answer_tokens 24, not 25: go on with the same settings"):
        distill(model(), whole, replace(HOT, max_answer_tokens=25, tokens=10_000))
    with pytest.raises(UsageError, match=r"was made with prompts null, not \"[0-9a-f]{16}\""):
        distill(model(), whole, replace(HOT, tokens=10_000), prompts=[Prompt(("Why?",))])


@pytest.mark.parametrize("seed", range(4))
def test_the_time_that_is_left_is_told_once_it_is_known_and_steadily(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations of 60 to 1,000 tokens in 24 slots, a pass a second, rows in order; those of 96 have no question."""
    clock = [0.0]
    monkeypatch.setattr("medusa.training.distill.time.perf_counter", lambda: clock[0])
    chance = random.Random(seed)

    def simulated(start: int, spent: Callable[[int], None]) -> Iterator[tuple[int, Transcript]]:
        numbers = itertools.count(start)
        running: dict[int, list[int]] = {}
        while True:
            while len(running) < 24:
                size = chance.choice((96, 60, 300, 1000))
                running[next(numbers)] = [size, size]
            clock[0] += 1.0
            spent(len(running))
            for number, (size, left) in list(running.items()):
                running[number][1] = left - 1
                if left == 1:
                    del running[number]
                    fault = "no question" if size == 96 else ""
                    yield number, replace(answered(number, size - size // 5), spent=size, fault=fault)

    told: list[tuple[float, float | None]] = []
    for wanted in (100_000, 250_000):  # the second run goes on with what the first has left
        clock[0] = 0.0
        told.clear()
        file = TextFile(tmp_path / "text.jsonl", {})
        tell = lambda written: told.append((written.seconds, written.seconds_left))  # noqa: E731
        write_in_order(file, wanted, simulated, tell, endless=True)
        end = told[-1][0]
        assert told[0][1] is None
        known = [(at, at + left) for at, left in told if left is not None]
        assert known[0][0] < end / 3
        # The hour of the end that is told: never far off, and it does not jump.
        assert all(abs(hour - end) < 0.4 * end for _, hour in known)
        later = [hour for at, hour in known if at > 0.5 * end]
        assert all(abs(hour - end) < 0.2 * end for hour in later)
        assert all(abs(a - b) < 0.25 * end for (_, a), (_, b) in itertools.pairwise(known))


def test_a_reporter_hears_no_time_before_it_is_known() -> None:
    heard: list[str] = []

    class Reporter(Silent):
        def progress(self, done: int, total: int, text: str) -> None:
            heard.append(text)

    tell = shown_by(Reporter())
    tell(Written(wanted=1000, spent=100, seconds=10.0))
    tell(Written(rows=2, tokens=90, wanted=1000, spent=200, seconds=20.0, ended_spent=150, ended_kept=135))
    assert heard == ["0 conversations, 10 tokens/s", "2 conversations, 10 tokens/s, 2 min left"]


@pytest.fixture(scope="module")
def native() -> LanguageModel:
    pytest.importorskip("medusa_native")
    from medusa.engines.native import NativeBackend
    from medusa.engines.native_config import native_config

    weights = make_model(vocab_size=TOKENIZER_VOCAB, max_position_embeddings=1024)
    backend = NativeBackend(
        native_config(weights.config), weights.state_dict(), dtype="int8", feature_layers=(1,), num_slots=3, threads=1
    )
    return LanguageModel("tiny", make_tokenizer(), backend, drafter="none", nodes=1, eos_token_ids=ENDS)


def learned_from(path: Path, lm: LanguageModel) -> list[Example]:
    examples = read_text([str(path)], lm, 1024, print)
    assert len(examples) == len(rows_of(path))
    return examples


def test_features_that_decoding_computes_are_those_that_reading_gives(native: LanguageModel, tmp_path: Path) -> None:
    """To the bit, answers of which the template changes the end and later turns included; no text is read again."""
    store = FeatureStore(tmp_path / "kept", {})
    distill(native, tmp_path / "text.jsonl", HOT, features=store)
    examples = learned_from(tmp_path / "text.jsonl", native)
    assert any(len(example.spans) > 1 for example in examples)
    assert all(example in store for example in examples)
    kept = FeatureCache(store, examples, 32)
    read = FeatureCache.build(tmp_path / "read", native.backend, examples, {})
    assert kept.num_rows == read.num_rows > HOT.tokens
    for a, b in zip(kept.in_order(2, 64), read.in_order(2, 64), strict=True):
        assert a.features.dtype == torch.bfloat16
        assert torch.equal(a.features, b.features)
        assert torch.equal(a.tokens, b.tokens)


def test_features_of_a_run_that_was_killed_are_read_where_they_are_lost(native: LanguageModel, tmp_path: Path) -> None:
    class Lost(FeatureStore):
        def flush(self) -> None: ...

    calls = itertools.count()

    def die(_: Written) -> None:
        if next(calls) == 60:
            raise KeyboardInterrupt

    path = tmp_path / "text.jsonl"
    with pytest.raises(KeyboardInterrupt):
        distill(native, path, HOT, on_progress=die, features=Lost(tmp_path / "kept", {}))
    native.backend.release(0)
    lost = len(rows_of(path))
    assert lost
    distill(native, path, HOT, features=FeatureStore(tmp_path / "kept", {}))
    examples = learned_from(path, native)
    store = FeatureStore(tmp_path / "kept")
    assert [example in store for example in examples] == [n >= lost for n in range(len(examples))]
    told: list[tuple[int, int]] = []
    store.read_missing(native.backend, examples, lambda *done: told.append(done))
    assert told[-1] == (lost, lost)
    assert FeatureCache(store, examples, 32).num_rows > HOT.tokens


def test_a_backend_whose_numbers_depend_on_who_shares_a_pass_keeps_no_features(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the transformers backend cannot keep features"):
        distill(model(), tmp_path / "text.jsonl", HOT, features=FeatureStore(tmp_path / "kept", {}))
