# ruff: noqa: E402  # the server's packages are an extra: without them these tests are skipped
"""The engine's thread: every answer is the one it would be alone, and nobody waits for what another did."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(package)

from medusa.api import LanguageModel
from medusa.completion import Chunk, TextOfSteps
from medusa.decoding.sampling import Sampling
from medusa.decoding.stepper import Request
from medusa.errors import MedusaError
from medusa.serve.engine import Engine, Job
from medusa.serve.errors import ClosingError, DeadlineError, QueueFullError
from medusa.serve.metrics import Metrics
from medusa.serve.queue import FairQueue
from medusa.serve.settings import ServerSettings
from medusa.text.stream import StopStrings
from serving import model, server, wait_for
from tiny_lm import make


class Listener:
    """What a job tells."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None
        self.over = threading.Event()
        self.threads: set[str] = set()

    def __call__(self, event: Chunk | Exception) -> None:
        self.threads.add(threading.current_thread().name)
        assert not self.over.is_set(), "nothing is told after the end"
        if isinstance(event, Exception):
            self.error = event
        else:
            self.chunks.append(event)
        if self.error is not None or self.chunks[-1].finish_reason is not None:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    def wait(self) -> list[int]:
        assert self.over.wait(30), "it hangs"
        return self.tokens


class Bench:
    """An engine on a tiny model."""

    def __init__(self, lm: LanguageModel, **settings: Any) -> None:
        self.lm = lm
        self.metrics = Metrics()
        self.engine = Engine(lm, ServerSettings(**settings), self.metrics)

    def job(
        self, prompt: list[int], sampling: Sampling | None = None, tokens: int = 20, **more: Any
    ) -> tuple[Job, Listener]:
        request = Request(prompt, sampling or Sampling(seed=0), tokens)
        listener = Listener()
        return Job(request, TextOfSteps(self.lm.tokenizer, StopStrings(), (), len(prompt)), listener, **more), listener

    def ask(self, *arguments: Any, **more: Any) -> tuple[Job, Listener]:
        job, listener = self.job(*arguments, **more)
        self.engine.submit([job])
        return job, listener

    def held(self) -> int:
        return sum(self.lm.backend.length(slot) for slot in range(self.lm.backend.num_slots))


@pytest.fixture
def make_bench() -> Iterator[Any]:
    made: list[Bench] = []

    def bench(lm: LanguageModel | None = None, slots: int = 3, **settings: Any) -> Bench:
        made.append(Bench(lm or model(slots), **{"slots": slots, **settings}))
        return made[-1]

    yield bench
    for one in made:
        one.engine.close(10)
        assert not one.engine._thread.is_alive()


def alone(prompt: list[int], sampling: Sampling, tokens: int) -> list[int]:
    """By the library, with nobody beside it."""
    lm = model(1, drafter="none")
    request = Request(prompt, sampling, tokens)
    text = TextOfSteps(lm.tokenizer, StopStrings(), (), len(prompt))
    return [token for _, chunk in lm._decode([(request, text)], None) for token in chunk.token_ids]


SAMPLINGS = [
    Sampling(seed=0),
    Sampling(temperature=1.0, seed=11),
    Sampling(temperature=0.7, top_p=0.9, seed=4),
    Sampling(temperature=1.0, seed=5, presence_penalty=1.0, repetition_penalty=1.2),
]


# --- the same answer, whoever is beside it ----------------------------------------------------------------------------


def native_model(slots: int) -> LanguageModel:
    pytest.importorskip("medusa_native")
    from medusa.engines.native import NativeBackend
    from medusa.engines.native_config import native_config
    from tiny_models import TOKENIZER_VOCAB, make_model

    weights = make_model("llama", vocab_size=TOKENIZER_VOCAB)
    backend = NativeBackend(native_config(weights.config), weights.state_dict(), num_slots=slots, threads=1)
    return make(backend=backend, drafter="ngram", nodes=8)


def test_two_hundred_answers_in_random_order_are_those_they_are_alone(make_bench: Any) -> None:
    """On the native engine, bit for bit: with and without drafts, in slots that hold something or nothing, read in
    pieces or by copies of others' prompts, and while some leave."""
    rng = random.Random(3)
    bench = make_bench(native_model(5), slots=5, max_queue=999, piece=7, cached_tokens=300)
    single = native_model(1)
    beginnings = [[rng.randrange(3, 250) for _ in range(40)] for _ in range(4)]
    wanted: dict[tuple[int, ...], Any] = {}
    asked = []
    for number in range(200):
        beginning = rng.choice(beginnings)
        prompt = [*beginning[: rng.choice([3, 20, 40])], *(rng.randrange(3, 250) for _ in range(rng.randrange(1, 4)))]
        if number % 3 == 0 and asked:
            prompt = list(rng.choice(asked)[0].request.prompt)
        sampling = rng.choice(SAMPLINGS)
        asked.append(bench.ask(prompt, sampling, rng.choice([1, 8, 24]), drafter=rng.choice(["", "none", "ngram"])))
        if number % 10 == 0:
            bench.engine.cancel(rng.choice(asked)[0])
    left = 0
    for job, listener in asked:
        wait_for(lambda job=job: job.ended)
        key = (*job.request.prompt, job.request.sampling, job.request.max_new_tokens)
        if key not in wanted:
            text = TextOfSteps(single.tokenizer, StopStrings(), (), 1)
            chunks = single._decode([(job.request, text)], single.make_stepper("none"))
            wanted[key] = [token for _, chunk in chunks for token in chunk.token_ids]
        left += not listener.over.is_set()
        assert listener.error is None
        assert listener.tokens == wanted[key][: len(listener.tokens)]
        assert listener.tokens == wanted[key] or not listener.over.is_set()
        assert listener.threads <= {"medusa-engine"}
    assert left < 25, "only those that were cancelled"
    assert sum(job.reused > 0 for job, _ in asked) > 50


def test_answers_with_other_drafters_take_turns(make_bench: Any) -> None:
    bench = make_bench(slots=3)
    jobs = [bench.ask([5, 6, 7], SAMPLINGS[1], 30, drafter=drafter) for drafter in ("none", "ngram", "")]
    expected = alone([5, 6, 7], SAMPLINGS[1], 30)
    assert [listener.wait() for _, listener in jobs] == [expected] * 3
    sources = [{s for chunk in listener.chunks for s in chunk.step.sources} for _, listener in jobs]
    assert sources[0] == {"model"}


def test_a_prompt_with_many_answers_is_read_once(make_bench: Any) -> None:
    bench = make_bench(slots=3, piece=8)
    prompt = list(range(10, 60))
    leader, first = bench.job(prompt, SAMPLINGS[1])
    others = [bench.job(prompt, Sampling(temperature=1.0, seed=seed), leader=leader) for seed in (12, 13, 14)]
    bench.engine.submit([leader, *(job for job, _ in others)])
    first.wait()
    assert [listener.wait() == alone(prompt, job.request.sampling, 20) for job, listener in others] == [True] * 3
    assert leader.reused == 0
    assert [job.reused for job, _ in others] == [49] * 3


def test_the_next_turn_of_a_chat_reads_what_is_new(make_bench: Any) -> None:
    bench = make_bench(slots=2)
    prompt = list(range(10, 80))
    _, first = bench.ask(prompt)
    said = first.wait()
    job, second = bench.ask([*prompt, *said, 9, 8, 7])
    assert second.wait() == alone([*prompt, *said, 9, 8, 7], Sampling(seed=0), 20)
    assert job.reused == len(prompt) + len(said) - 1, "the last token that was said is not in the cache"


def test_nothing_is_kept_where_nothing_may_be(make_bench: Any) -> None:
    bench = make_bench(slots=2, cached_tokens=0)
    for _ in range(2):
        job, listener = bench.ask(list(range(10, 80)))
        listener.wait()
        assert job.reused == 0
    bench.engine.close(10)
    assert bench.held() == 0


# --- who leaves, who is refused, who is late --------------------------------------------------------------------------


class Held:
    """A stepper whose passes wait until they are let through."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Semaphore(0)
        self.begun = 0
        step = bench.lm.stepper.step

        def held(rows: Any) -> Any:
            self.begun += 1
            assert self.gate.acquire(timeout=20)
            return step(rows)

        monkeypatch.setattr(bench.lm.stepper, "step", held)

    def let(self, passes: int = 10_000) -> None:
        self.gate.release(passes)


def test_a_job_that_is_cancelled_is_in_no_further_pass(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=1, cached_tokens=0)
    held = Held(bench, monkeypatch)
    job, listener = bench.ask([5, 6], tokens=100)
    wait_for(lambda: held.begun == 1)
    bench.engine.cancel(job)
    held.let(1)
    wait_for(lambda: job.ended)
    assert held.begun == 1
    assert bench.held() == 0
    assert not listener.over.is_set()
    held.let()
    _, after = bench.ask([5, 6], tokens=3)
    assert after.wait() == alone([5, 6], Sampling(seed=0), 3)


def test_an_engine_whose_last_job_was_cancelled_shows_none(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=1)
    held = Held(bench, monkeypatch)
    job, _ = bench.ask([5, 6], tokens=100)
    held.let(1)
    wait_for(lambda: held.begun == 2)
    assert b"medusa_requests_running 1.0" in bench.metrics.text()
    held.let(1)
    bench.engine.cancel(job)
    held.let()
    wait_for(lambda: job.ended)
    wait_for(lambda: b"medusa_requests_running 0.0" in bench.metrics.text())


def test_as_many_wait_as_may(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=2, max_queue=3)
    held = Held(bench, monkeypatch)
    jobs = [bench.ask([5, number], tokens=4) for number in range(3, 8)]
    with pytest.raises(QueueFullError):
        bench.ask([5, 9])
    bench.engine.cancel(jobs[-1][0])
    held.let(1)
    wait_for(lambda: jobs[-1][0].ended)
    with pytest.raises(QueueFullError):
        bench.engine.submit([bench.job([5, 9])[0], bench.job([5, 9])[0]])
    jobs[-1] = bench.ask([5, 9], tokens=4)
    held.let()
    for _, listener in jobs:
        assert len(listener.wait()) == 4


def test_a_client_gets_in_where_another_has_filled_the_queue(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=2, max_queue=4)
    held = Held(bench, monkeypatch)
    jobs = [bench.ask([5, number], tokens=2, client="greedy") for number in range(3, 9)]
    with pytest.raises(QueueFullError):
        bench.ask([5, 9], client="greedy")
    jobs += [bench.ask([6, number], tokens=2, client="other") for number in range(3, 6)]
    with pytest.raises(QueueFullError):  # that was its share
        bench.ask([6, 9], client="other")
    jobs += [bench.ask([7, number], tokens=2, client="third") for number in range(3, 5)]
    with pytest.raises(QueueFullError):
        bench.ask([7, 9], client="third")
    held.let()
    for _, listener in jobs:
        assert len(listener.wait()) == 2
    wait_for(lambda: bench.engine.unfinished == 0)
    assert not bench.engine._of_client


def test_what_a_drafter_by_name_cannot_do_on_a_gpu_the_reference_does(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medusa.decoding.draft import NgramDrafter
    from medusa.device.stepper import DeviceStepper

    bench = make_bench(slots=2)
    backend: Any = bench.lm.backend
    monkeypatch.setattr(bench.lm, "make_stepper", lambda name: DeviceStepper(backend, NgramDrafter(), 8))
    request = Request([5, 6, 5], Sampling(seed=0), 6, logprobs=2)
    listener = Listener()
    text = TextOfSteps(bench.lm.tokenizer, StopStrings(), (), 3)
    bench.engine.submit([Job(request, text, listener, drafter="heads")])
    assert listener.wait() == alone([5, 6, 5], Sampling(seed=0), 6)
    assert listener.chunks[0].step.logprobs


def test_a_job_that_takes_too_long_is_given_up(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=1, deadline=100)
    held = Held(bench, monkeypatch)
    late, told = bench.ask([5, 6], tokens=100)
    waiting, also = bench.ask([5, 7], tokens=100)
    _, fine = bench.ask([5, 8], tokens=3)
    for job in (late, waiting):
        job.queued -= 101
    held.let()
    for listener in (told, also):
        listener.wait()
        assert isinstance(listener.error, DeadlineError)
    assert len(fine.wait()) == 3
    assert bench.metrics.registry.get_sample_value("medusa_requests_finished_total", {"reason": "deadline"}) == 2


def test_at_its_end_the_engine_refuses_and_says_what_it_has_promised(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(slots=1)
    held = Held(bench, monkeypatch)
    jobs = [bench.ask([5, number], tokens=5) for number in (3, 4)]
    bench.engine.refuse()
    assert bench.engine.trouble() == "the server is ending"
    with pytest.raises(ClosingError):
        bench.ask([5, 6])
    held.let()
    bench.engine.close(10)
    assert [len(listener.tokens) for _, listener in jobs] == [5, 5]


def test_the_engine_can_be_ended_between_two_steps(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=1)
    held = Held(bench, monkeypatch)
    _, listener = bench.ask([5, 6], tokens=100)
    wait_for(lambda: held.begun == 1)
    assert not bench.engine.abort(0.01)
    held.let()
    assert bench.engine.abort(20)
    assert held.begun == 1
    assert len(listener.tokens) < 100


def test_who_asks_for_much_does_not_keep_others_waiting() -> None:
    queue: FairQueue[Any] = FairQueue()
    jobs = {name: Named(name) for name in ("a1", "a2", "a3", "b1", "c1", "c2")}
    for job in jobs.values():
        queue.push(job)
    assert queue.remove(jobs["a2"])
    assert not queue.remove(jobs["a2"])
    queue.push(Named("c0"), first=True)
    assert len(queue) == 6
    assert [queue.pop().name for _ in range(6)] == ["a1", "b1", "c0", "a3", "c1", "c2"]
    assert len(queue) == 0


class Named:
    def __init__(self, name: str) -> None:
        self.name, self.client = name, name[0]


# --- faults -----------------------------------------------------------------------------------------------------------


class Poisoned:
    """A constraint that fails once so many tokens have been said."""

    def __init__(self, after: int) -> None:
        self.left = after

    def allowed(self, path: Any) -> None:
        if len(path) >= self.left:
            raise RuntimeError("poison")

    def keep(self, tokens: Any) -> None:
        self.left -= len(tokens)


def test_one_poisoned_answer_fails_alone_and_the_others_are_whole(
    make_bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(slots=3)
    good = [bench.job([5, 6, number], sampling, 40) for number, sampling in enumerate(SAMPLINGS[:2], start=9)]
    bad, told = bench.job([7, 8, 9], tokens=40)
    bad.request = Request([7, 8, 9], Sampling(seed=0), 40, constraint=Poisoned(7))
    bench.engine.submit([good[0][0], bad, good[1][0]])
    told.wait()
    assert isinstance(told.error, (RuntimeError, MedusaError))
    for job, listener in good:
        assert listener.wait() == alone(list(job.request.prompt), job.request.sampling, 40)
        assert listener.error is None
    assert "goes on by itself" in caplog.text
    _, after = bench.ask([5, 6], tokens=3)
    assert len(after.wait()) == 3


def test_a_pass_that_fails_now_and_then_costs_time_and_no_answer(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(slots=3)
    step, calls = bench.lm.stepper.step, Counter[int]()

    def sometimes(rows: Any) -> Any:
        calls[len(rows)] += 1
        if len(rows) == 3 and calls[3] in (2, 6):
            raise MemoryError
        return step(rows)

    monkeypatch.setattr(bench.lm.stepper, "step", sometimes)
    jobs = [bench.job([5, 6, number], SAMPLINGS[1], 30) for number in range(9, 12)]
    bench.engine.submit([job for job, _ in jobs])
    for job, listener in jobs:
        assert listener.wait() == alone(list(job.request.prompt), SAMPLINGS[1], 30)
    assert calls[1] > 0


def test_a_prompt_that_cannot_be_read_fails_alone(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=2)
    extend = bench.lm.backend.extend

    def broken(slot: int, tokens: Any, *more: Any) -> Any:
        if tokens[0] == 99:
            raise MemoryError
        return extend(slot, tokens, *more)

    monkeypatch.setattr(bench.lm.backend, "extend", broken)
    _, good = bench.ask([5, 6], tokens=9)
    _, bad = bench.ask([99, 6], tokens=9)
    bad.wait()
    assert isinstance(bad.error, MemoryError)
    assert good.wait() == alone([5, 6], Sampling(seed=0), 9)


def test_an_engine_without_progress_is_not_ready(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=1, stall=0.05)
    held = Held(bench, monkeypatch)
    assert bench.engine.trouble() is None
    _, listener = bench.ask([5, 6], tokens=3)
    wait_for(bench.engine.trouble)
    assert "no step has ended" in bench.engine.trouble()
    held.let()
    listener.wait()
    wait_for(lambda: bench.engine.trouble() is None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_dies_nobody_waits_for_ever(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(slots=1)
    held = Held(bench, monkeypatch)
    jobs = [bench.ask([5, number], tokens=9) for number in (6, 7)]
    monkeypatch.setattr(bench.metrics, "look", lambda *_: 1 / 0)
    held.let()
    for _, listener in jobs:
        listener.wait()
        assert isinstance(listener.error, MedusaError)
    with pytest.raises(ClosingError):
        bench.ask([5, 6])
    assert bench.engine.trouble() == "the engine has died"


def test_a_server_ends_where_its_engine_has_died(make_bench: Any) -> None:
    import asyncio

    from medusa.serve.run import Server, configure

    bench = make_bench()
    config = configure(lambda *_: None, ServerSettings())
    config.load()
    running = Server(config, bench.engine)
    assert asyncio.run(running.on_tick(1)) is False
    bench.engine.died = True
    assert asyncio.run(running.on_tick(1)) is True
    assert config.timeout_graceful_shutdown == 5  # nothing more is to be said, whoever has not read all
    assert configure(lambda *_: None, ServerSettings(deadline=float("inf"))).timeout_graceful_shutdown is None


def test_a_signal_takes_no_lock_that_the_code_it_interrupts_may_hold(make_bench: Any) -> None:
    import asyncio
    import signal

    from medusa.serve.run import Server, configure

    bench = make_bench()
    running = Server(configure(lambda *_: None, ServerSettings()), bench.engine)

    async def interrupted() -> None:
        with bench.engine._lock:  # as `submit` holds it
            running.handle_exit(signal.SIGTERM, None)
        await asyncio.sleep(0)

    asyncio.run(interrupted())
    assert running.should_exit
    with pytest.raises(ClosingError):
        bench.ask([5, 6])


def test_what_is_counted_adds_up() -> None:
    with server() as client:
        for number in range(3):
            client.chat(f"Hello {number // 2}", max_tokens=40)
        assert client.metric("requests_finished_total", reason="length") == 3
        assert client.metric("prefix_cache_queries_total") == 3
        assert client.metric("prefix_cache_hits_total") == 2, "a beginning is enough"
        drafted, accepted = (client.metric(f"spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted"))
        assert drafted >= accepted > 0
        assert client.metric("generated_tokens_total", drafter="ngram") == accepted
        places = [client.metric("spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(6)]
        assert sum(places) == accepted
        assert places == sorted(places, reverse=True)
        assert client.metric("time_to_first_token_seconds_count") == 3
        assert client.metric("request_seconds_count") == 3
        wait_for(lambda: client.metric("requests_running") == 0)
        assert client.metric("http_responses_total", status="200") >= 3


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    board = (Path(__file__).parents[1] / "docs" / "grafana.json").read_text(encoding="utf-8")
    known = {
        sample.name
        for family in Metrics().registry.collect()
        for sample in [*family.samples, type("", (), {"name": family.name + "_total"})]
    }
    histograms = {family.name + "_bucket" for family in Metrics().registry.collect()}
    assert set(re.findall(r"medusa_\w+", board)) <= known | histograms
