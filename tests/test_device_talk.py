"""Conversations on a device: what they say, in what order rows are used, how tokens are drawn."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa.api import LanguageModel
from medusa.decoding.draft import NoDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.sampling import Sampling
from medusa.device.stepper import DeviceStepper
from medusa.engines import flash_attention
from medusa.engines.transformers import TransformersBackend
from medusa.errors import UsageError
from medusa.training import device_talk
from medusa.training.device_talk import choose, gumbel, refusal, runs_on_device, talk_on_device
from medusa.training.distill import DistillSettings, distill
from medusa.training.talk import Reply, Talk, Transcript, Turn, talk_in_slots
from tiny_models import TOKENIZER_VOCAB, VOCAB, make_model, make_tokenizer

real_refusal = flash_attention.refusal
ENDS = frozenset(range(60, 75))  # of 160 tokens: a turn soon ends


def backend(slots: int = 4, family: str = "llama", **options: object) -> TransformersBackend:
    return TransformersBackend(make_model(family), num_slots=slots, **options)  # type: ignore[arg-type]


def talk(number: int, heard: list[Reply]) -> Talk:
    """Some turns with prompts, limits and ends of all kinds; what was said is kept in `heard` too."""
    chance = random.Random(number)
    text: list[int] = []
    labels = []
    for turn in range(chance.randrange(1, 5)):
        more = [chance.randrange(3, VOCAB) for _ in range(chance.choice((1, 2, 7, 8, 9, 30)))]
        drop = turn > 0 and chance.random() < 0.5
        if turn and not drop and chance.random() < 0.3:
            more = []  # the model goes on from where it stopped
        ends = ENDS if chance.random() < 0.7 else frozenset()
        said = yield Turn(more, Sampling(), chance.choice((1, 3, 8, 20, 40)), ends, drop)
        heard.append(said)
        text = [*(text[:-1] if drop else text), *more, *said.tokens]
        labels.append((len(text) - len(said.tokens), len(text)))
        if len(text) > 150:
            break
    return Transcript(0.0, token_ids=text, labels=labels)


def talks(count: int, heard: dict[int, list[Reply]]) -> Iterator[tuple[int, Talk]]:
    for number in range(count):
        yield number, talk(number, heard.setdefault(number, []))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("slots", [1, 5, 40])
def test_what_is_said_on_a_device_is_what_is_said_in_slots(family: str, slots: int) -> None:
    """Greedy, for full, sliding and mixed attention: turns that end within a look, at a limit, at once."""
    expected: dict[int, list[Reply]] = {}
    found: dict[int, list[Reply]] = {}
    count = 16 if family == "llama" else 6
    runner = backend(slots, family)
    before = dict(talk_in_slots(ReferenceStepper(runner, NoDrafter(), 1), talks(count, expected)))
    after = dict(talk_on_device(runner, talks(count, found)))
    assert after == before
    assert found == expected
    reasons = {said.finish_reason for heard in found.values() for said in heard}
    assert reasons >= ({"stop", "length"} if family == "llama" else {"length"})
    assert runner.model.config._attn_implementation == "sdpa"


def test_texts_that_loop_are_cut_where_they_are_in_slots() -> None:
    def looping(number: int) -> Talk:
        said = yield Turn([5 + number, 9], Sampling(), 240, frozenset())
        then = yield Turn([7], Sampling(), 4, frozenset(), drop_last=True)
        return Transcript(0.0, token_ids=[*said.tokens, *then.tokens], fault=said.finish_reason)

    model = make_model()
    with torch.no_grad():  # without attention what it says depends on the last token alone
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    runner = TransformersBackend(model, num_slots=3)
    expected = dict(talk_in_slots(ReferenceStepper(runner, NoDrafter(), 1), ((n, looping(n)) for n in range(7))))
    assert dict(talk_on_device(runner, ((n, looping(n)) for n in range(7)))) == expected
    assert {talked.fault for talked in expected.values()} == {"loop"}


def test_a_text_ends_where_the_context_does() -> None:
    def filling(number: int) -> Talk:
        said = yield Turn([5, 6 + number] * 30, Sampling(), 1000, frozenset())
        return Transcript(0.0, token_ids=said.tokens, fault=said.finish_reason)

    runner = backend(2, max_length=96)
    expected = dict(talk_in_slots(ReferenceStepper(runner, NoDrafter(), 1), ((n, filling(n)) for n in range(5))))
    assert dict(talk_on_device(runner, ((n, filling(n)) for n in range(5)))) == expected
    assert {len(talked.token_ids) for talked in expected.values()} == {36}


def test_tokens_that_are_kept_are_counted_and_those_past_an_end_are_not() -> None:
    heard: dict[int, list[Reply]] = {}
    told: list[int] = []
    list(talk_on_device(backend(3), talks(20, heard), told.append))
    assert sum(told) == sum(len(said.tokens) for turns in heard.values() for said in turns)


def test_conversations_that_are_over_at_once_are_given_one_by_one() -> None:
    def over() -> Talk:
        return Transcript(0.0, fault="too long")
        yield Turn([], Sampling(), 1, frozenset())

    endless = talk_on_device(backend(2), ((number, over()) for number in itertools.count()))
    assert [number for number, _ in itertools.islice(endless, 5)] == [0, 1, 2, 3, 4]


def test_what_a_device_does_not_do_is_refused() -> None:
    def odd() -> Talk:
        yield Turn([5], Sampling(temperature=1.0, top_k=3), 4, frozenset())
        return Transcript(0.0)

    with pytest.raises(UsageError, match="by temperature and top_p alone"):
        list(talk_on_device(backend(1), iter([(0, odd())])))
    with pytest.raises(UsageError, match="leaves no room"):
        list(talk_on_device(backend(1, max_length=8), talks(9, {})))
    assert refusal(backend()) == ""
    yarn = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model(rope_parameters=yarn)
    assert "change with the length of a text" in refusal(TransformersBackend(model))
    assert "dynamic" in DeviceStepper(TransformersBackend(model), NoDrafter(), 1).captured.refused
    eight: Any = make_model()
    eight.is_loaded_in_8bit = True  # as transformers marks what bitsandbytes has packed
    assert refusal(TransformersBackend(eight)) == ""  # the table runs, without a graph
    assert "wait for the device" in device_talk.DeviceRows(TransformersBackend(eight))._steps.refused
    assert runs_on_device(backend()) is None  # a CPU


# --- sampling ---------------------------------------------------------------------------------------------------------


def drawn(logits: torch.Tensor, count: int, temperature: float, top_p: float) -> torch.Tensor:
    """How often each token is drawn from one row of logits [V]."""
    rows = logits.expand(count, -1)
    full = torch.full((count,), temperature), torch.full((count,), top_p)
    seeds = torch.arange(count) * 7_919 - 2**62
    tokens = choose(rows, *full, seeds, torch.full((count,), 11))
    return torch.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_tokens_are_drawn_as_the_model_says(temperature: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    count = 40_000
    expected = torch.softmax(logits.double() / temperature, 0) * count
    found = drawn(logits, count, temperature, 1.0)
    statistic = float(((found - expected) ** 2 / expected).sum())
    assert statistic < 31.3  # of chi-square with 11 degrees of freedom, once in a thousand


def test_top_p_leaves_out_what_it_must_and_keeps_the_shares_of_the_rest() -> None:
    shares = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    count = 20_000
    found = drawn(shares.log(), count, 1.0, 0.8)  # 0.4 + 0.3 + 0.15 reach it
    assert found[[0, 2]].tolist() == [0, 0]
    expected = shares[[1, 3, 4]] / 0.85 * count
    assert float(((found[[1, 3, 4]] - expected) ** 2 / expected).sum()) < 13.8
    assert drawn(shares.log(), 500, 1.0, 0.3).tolist() == [0, 500, 0, 0, 0]


def test_of_a_large_vocabulary_the_best_512_are_drawn_from() -> None:
    logits = torch.linspace(0, 0.5, 5_000)
    found = drawn(logits, 4_000, 1.0, 1.0)
    assert int(found[: 5_000 - 512].sum()) == 0
    assert int((found > 0).sum()) > 400


def test_each_row_is_chosen_from_in_its_own_way() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    seeds, places = torch.tensor([5, 6, 7]), torch.tensor([3, 9, 4])
    settings = torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 0.9, 1.0])
    together = choose(logits, *settings, seeds, places)
    assert together[0] == logits[0].argmax()
    for row in range(3):
        part = slice(row, row + 1)
        alone = choose(logits[part], *(s[part] for s in settings), seeds[part], places[part])
        assert alone[0] == together[row]


def test_noise_is_gumbel_and_does_not_depend_on_its_neighbours() -> None:
    ids = torch.arange(200).expand(500, -1)
    noise = gumbel(torch.arange(500), torch.full((500,), 3), ids)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1])) < 0.015
    one = gumbel(torch.tensor([40]), torch.tensor([3]), torch.tensor([[17, 3]]))
    assert one.tolist() == [[float(noise[40, 17]), float(noise[40, 3])]]
    assert not torch.equal(gumbel(torch.arange(5), torch.full((5,), 4), ids[:5]), noise[:5])


# --- attention --------------------------------------------------------------------------------------------------------


def kernel(
    query: torch.Tensor,  # [queries, 1, D]
    key: torch.Tensor,  # [places, 1, D]
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    most_queries: int,
    most_keys: int,
    *rest: object,
    scale: float | None,
    seqused_k: torch.Tensor,
) -> tuple[torch.Tensor]:
    """What torch's kernel does, text by text."""
    assert rest == (0.0, False, False)
    assert seqused_k.dtype == query_bounds.dtype == key_bounds.dtype == torch.int32
    out = torch.empty_like(query)
    for text, count in enumerate(seqused_k.tolist()):
        here = slice(int(query_bounds[text]), int(query_bounds[text + 1]))
        start = int(key_bounds[text])
        assert here.stop - here.start <= most_queries
        assert count <= min(most_keys, int(key_bounds[text + 1]) - start)
        keys, values = key[start : start + count, 0], value[start : start + count, 0]
        out[here, 0] = torch.nn.functional.scaled_dot_product_attention(query[here, 0], keys, values, scale=scale)
    return (out,)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_that_reads_no_further_than_a_row_reaches_says_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's kernel played by a loop, as it is CUDA's alone."""
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> tuple[torch.Tensor]:
        calls.append(1)
        return kernel(*args, **options)

    monkeypatch.setattr(flash_attention.torch.ops.aten, "_flash_attention_forward", counted)
    for heads, kv_heads in ((6, 6), (6, 2), (4, 1)):
        assert flash_attention.error(heads, kv_heads, 8, torch.float32, torch.device("cpu")) < 1e-5
    runner = backend(5, family)
    expected = dict(talk_on_device(runner, talks(9, {})))
    monkeypatch.setattr(flash_attention, "refusal", lambda backend: "")
    calls.clear()
    assert dict(talk_on_device(runner, talks(9, {}))) == expected
    assert calls
    assert runner.model.config._attn_implementation == "sdpa"
    assert "CUDA" in real_refusal(runner)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_steps_are_graphs_that_attend_as_far_as_rows_reach() -> None:
    device = torch.device("cuda")
    assert flash_attention.error(9, 3, 64, torch.bfloat16, device) < flash_attention.NEAR
    plain = TransformersBackend(make_model().to(device), num_slots=5)
    expected = dict(talk_in_slots(ReferenceStepper(plain, NoDrafter(), 1), talks(16, {})))
    found = dict(talk_on_device(plain, talks(16, {})))
    same = [found[number] == talked for number, talked in expected.items()]
    assert sum(same) >= 14  # but for near-ties
    half = TransformersBackend(make_model(dtype=torch.bfloat16, head_dim=64).to(device), num_slots=5)
    table = device_talk.DeviceRows(half)
    table.write([device_talk.Edit(row, 0, [5, 6, 7 + row], Sampling()) for row in range(5)], [])
    first, again = table.run(8).wait(), table.run(16).wait()
    assert table.flash.refused == ""
    assert table._steps.refused == ""
    assert len(table._steps) == 1
    assert [row[:2] for row in first] == [[6, 7 + row] for row in range(5)]
    assert table.position.tolist() == [16] * 5
    assert all(len(row) == device_talk.STEPS for row in again)


# --- whole files ------------------------------------------------------------------------------------------------------

HOT = DistillSettings(
    tokens=300,
    turns=3,
    max_user_tokens=40,
    max_answer_tokens=24,
    temperatures=(0.0, 6.0),
    user_temperature=6.0,
    top_p=0.99,
)


def lm(slots: int, ends: Sequence[int] = (2, *range(10, 30))) -> LanguageModel:
    runner = TransformersBackend(make_model(vocab_size=TOKENIZER_VOCAB, max_position_embeddings=1024), num_slots=slots)
    return LanguageModel("tiny", make_tokenizer(), runner, drafter="none", nodes=1, eos_token_ids=ends)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa.training.device_talk.runs_on_device", lambda backend: backend)


@pytest.mark.usefixtures("on_device")
def test_a_file_is_the_same_for_any_number_of_rows_and_however_often_it_was_killed(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    distill(lm(3), whole, HOT)
    distill(lm(17), tmp_path / "wide.jsonl", HOT)
    assert (tmp_path / "wide.jsonl").read_bytes() == whole.read_bytes()

    class Killed(BaseException):
        pass

    kills = 0
    runner = lm(5)
    for passes in itertools.count(6, 3):
        left = iter(range(passes, -1, -1))

        def tell(written: object, left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise Killed

        try:
            distill(runner, tmp_path / "killed.jsonl", HOT, on_progress=tell)
            break
        except Killed:
            kills += 1
    assert kills > 2
    assert (tmp_path / "killed.jsonl").read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("on_device")
def test_greedy_answers_of_a_file_are_those_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_talk, "STEPS", 3)
    settings = replace(HOT, user_temperature=0.0, temperatures=(0.0,), turns=2)
    distill(lm(4), tmp_path / "device.jsonl", settings)
    monkeypatch.setattr("medusa.training.device_talk.runs_on_device", lambda backend: None)
    distill(lm(4), tmp_path / "slots.jsonl", settings)
    assert (tmp_path / "device.jsonl").read_bytes() == (tmp_path / "slots.jsonl").read_bytes()
