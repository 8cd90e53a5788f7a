"""The time of a pass: what is measured, not how long it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers import ToyBackend, ToyModel, fill
from medusa import cli
from medusa.api import measured_times
from medusa.engines import times as profile_module
from medusa.engines.native import NativeBackend
from medusa.engines.native_config import native_config
from medusa.engines.times import Profile, measured_profile, profile
from medusa.engines.transformers import TransformersBackend
from medusa.errors import UsageError
from tiny_models import make_model, shared_model


def profiles_dir() -> Path:
    return profile_module.profiles_dir()  # which conftest.py has replaced


def test_a_profile_of_transformers_has_times_and_no_limit() -> None:
    backend = TransformersBackend(shared_model())
    found = profile(backend, sizes=(1, 4), context=20, repeats=2)
    assert list(found.seconds) == [1, 4]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.limit_seconds is None
    assert backend.length(0) == 0, "the slot is free again"


def test_a_profile_of_the_native_engine_knows_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("medusa_native")
    monkeypatch.setattr("medusa.engines.times._bandwidth", lambda _: 1e9)
    model = make_model(head_dim=16)  # no output is padded
    backend = NativeBackend(native_config(model.config), model.state_dict(), dtype="float32")
    found = profile(backend, sizes=(1, 2), context=20, repeats=6)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert found.bytes == 4 * matrices
    assert found.limit_seconds == pytest.approx(4 * matrices / 1e9)


def test_a_slot_in_use_or_a_short_context_is_refused() -> None:
    backend = TransformersBackend(shared_model())
    with pytest.raises(UsageError, match="positions"):
        profile(backend, context=backend.max_length)
    fill(backend, 0, [1, 2, 3])
    with pytest.raises(UsageError, match="in use"):
        profile(backend, context=20)
    assert backend.length(0) == 3


def test_info_shows_a_line_for_each_number_of_tokens(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        backend = TransformersBackend(shared_model())

        def describe(self) -> dict[str, object]:
            return {"model": "tiny"}

    monkeypatch.setattr("medusa.cli.info.load_model", lambda _: Model())
    monkeypatch.setattr("medusa.engines.times.SIZES", (1, 2))
    shown = CliRunner().invoke(cli.app, ["info", "--profile"])
    assert shown.exit_code == 0, shown.output
    assert "profile 1 tokens" in shown.output
    assert "of one token" in shown.output


# --- kept in the cache ------------------------------------------------------------------------------------------------

FACTS: dict[str, object] = {"dtype": "float32", "threads": 2, "heads": ["recurrent", 4]}


@pytest.fixture(name="measured")
def measured_fixture(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing is measured: the n-th time that it is asked for, a pass over one token takes n seconds."""
    calls: list[float] = []

    def pretend(backend: object, **options: Any) -> Profile:
        calls.append(len(calls) + 1.0)
        drafting = None if options["draft"] is None else 0.5
        return Profile(options["context"], {1: calls[-1], 8: 9.5}, None, None, drafting)

    monkeypatch.setattr(profile_module, "profile", pretend)
    monkeypatch.setattr(profile_module, "_refuted", lambda kept, backend, draft: False)
    return calls


def one(**options: Any) -> float:
    """The time of a pass over one token, by the profile that is kept or measured."""
    facts = options.pop("facts", FACTS)
    backend = options.pop("backend", None) or TransformersBackend(shared_model())
    found = measured_profile(backend, facts, **options)
    assert found is not None
    return found.seconds[1]


def test_a_profile_is_measured_once(measured: list[float]) -> None:
    assert measured_profile(TransformersBackend(shared_model()), FACTS) == measured_profile(
        TransformersBackend(shared_model()), dict(reversed(FACTS.items()))
    )
    assert len(measured) == 1
    assert len(list(profiles_dir().iterdir())) == 1, "no scratch file is left"


def test_a_profile_is_measured_anew_on_demand(measured: list[float]) -> None:
    assert [one(), one(refresh=True), one()] == [1, 2, 2]


def test_another_engine_has_another_profile(measured: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    one()
    others = [{**FACTS, "dtype": "int8"}, {**FACTS, "threads": 1}, {**FACTS, "heads": ["residual", 4]}]
    assert [one(facts=facts) for facts in others] == [2, 3, 4]
    assert one(backend=TransformersBackend(make_model(num_hidden_layers=2))) == 5
    with monkeypatch.context() as patch:
        patch.setattr(profile_module, "machine", lambda: ["another processor", 2, ""])
        assert one() == 6
    with monkeypatch.context() as patch:
        patch.setattr("medusa.__version__", "99")
        assert one() == 7
    assert one() == 1, "the first is still there"


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda _: "{",
        lambda _: "[1, 2]",
        lambda _: "\ud800",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"float32"', '"int8"'),
        lambda text: text.replace('"1": 1.0', '"1": NaN'),
        lambda text: text.replace('"1": 1.0', '"1": -1.0'),
        lambda text: text.replace('"1": 1.0', '"2": 1.0'),
        lambda text: text.replace('"1": 1.0', '"1": null'),
        lambda text: text.replace('"8": 9.5', '"0": 9.5'),
        lambda text: text.replace('"far": {}', '"far": {"1": 2.0}'),
        lambda text: text.replace('"far": {}', '"far": {"1": 2.0, "8": 0}'),
        lambda text: text.replace('"far": {}', '"far": {"1": 2.0, "9": 9.7}'),
        lambda text: text.replace('"far": {}', '"far": {"1": 2.0, "8": 9.7}'),  # after no longer text
        lambda text: text.replace('"far": {}', '"far": []'),
    ],
)
def test_a_damaged_or_foreign_profile_is_measured_anew(measured: list[float], damage: Callable[[str], str]) -> None:
    one()
    (path,) = profiles_dir().iterdir()
    whole = path.read_text()
    assert damage(whole) != whole
    path.write_bytes(damage(whole).encode(errors="surrogatepass"))
    assert [one(), one()] == [2, 2]


def test_where_nothing_can_be_written_it_is_measured_and_not_kept(
    measured: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(profile_module, "profiles_dir", lambda: tmp_path / "file" / "profiles")
    assert [one(), one()] == [1, 2]


def test_a_profile_without_the_draft_is_measured_anew_where_that_is_wanted(measured: list[float]) -> None:
    assert [one(), one(draft=len), one(draft=len), one()] == [1, 2, 2, 2]


def test_where_nothing_can_be_measured_there_is_no_profile() -> None:
    assert measured_profile(TransformersBackend(shared_model(), max_length=6), FACTS) is None
    backend = TransformersBackend(shared_model())
    fill(backend, 0, [1])
    assert measured_profile(backend, FACTS) is None


def test_a_short_context_is_measured_with_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    backend = TransformersBackend(shared_model(), max_length=20)
    drafted: list[object] = []
    found = measured_profile(backend, FACTS, draft=lambda features: drafted.append(features.shape), progress=True)
    assert found is not None
    assert found.context == 14
    assert list(found.seconds) == list(profile_module.QUICK_SIZES)
    assert found.draft_seconds is not None
    assert set(drafted) == {(32,)}
    assert backend.length(0) == 0
    assert capsys.readouterr().err == "measuring this machine once ...\n"
    assert measured_profile(backend, FACTS, progress=True) == found
    assert capsys.readouterr().err == ""


def test_past_its_time_a_measurement_keeps_to_four_sizes_and_two_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TransformersBackend(shared_model())
    passes: list[int] = []
    verify = backend.verify
    monkeypatch.setattr(
        backend, "verify", lambda slots, trees: (passes.append(len(trees[0].tokens)), verify(slots, trees))[1]
    )
    found = profile(backend, sizes=(1, 2, 3, 4, 5, 6), context=8, seconds=0.0)
    assert list(found.seconds) == [1, 2, 3, 4]
    assert passes == [1, 2, 3, 4] * 3  # once to warm up


# --- a machine whose times are known ----------------------------------------------------------------------------------


class ClockedBackend(ToyBackend):
    """On a clock that moves with its passes alone: a pass takes what `seconds` says of nodes and text; what others do
    makes some turns longer. A token of a prompt takes `reading`."""

    def __init__(self, seconds: Callable[[int, int], float], *, max_length: int = 4096, reading: float = 1e-4) -> None:
        super().__init__(ToyModel(order=1), max_length=max_length)
        self.seconds, self.reading = seconds, reading
        self.now = 0.0
        self.disturbed: Callable[[int], float] = lambda turn: 1.0
        self.prompts: list[int] = []

    def extend(self, slot: int, token_ids: Sequence[int], every: bool = False) -> Any:
        self.prompts.append(len(token_ids))
        self.now += self.reading * len(token_ids)
        return super().extend(slot, token_ids, every)

    def verify(self, slots: Sequence[int], drafts: Sequence[Any]) -> Any:
        nodes, text = len(drafts[0].tokens), self.length(slots[0])
        self.now += self.seconds(nodes, text) * self.disturbed(self.forwards)
        done = super().verify(slots, drafts)
        self.waiting = None  # passes that are timed keep nothing
        return done

    def release(self, slot: int) -> None:
        if self.length(slot):
            super().release(slot)


Clocked = Callable[..., ClockedBackend]


@pytest.fixture(name="clocked")
def clocked_fixture(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    def make(seconds: Callable[[int, int], float], **options: Any) -> ClockedBackend:
        backend = ClockedBackend(seconds, **options)
        monkeypatch.setattr(profile_module.time, "perf_counter", lambda: backend.now)
        return backend

    return make


def linear(nodes: int, text: int) -> float:
    return 5e-3 + 2e-4 * nodes + 1e-6 * text + 2e-7 * nodes * text


def test_what_a_longer_text_adds_is_measured(clocked: Clocked) -> None:
    backend = clocked(linear)
    found = measured_profile(backend, FACTS)
    assert found is not None
    assert found.seconds == pytest.approx({n: linear(n, 64) for n in profile_module.QUICK_SIZES})
    assert found.far == pytest.approx({n: linear(n, 1024) for n in (1, 16)})
    assert found.far_context == 1024
    assert backend.now < 4.0, "seconds in all"
    times = measured_times(backend, None, FACTS)
    assert times is not None
    backend.prompts.clear()
    assert measured_times(backend, None, FACTS) == times
    assert backend.prompts == [8], "kept, and not measured again"
    assert [times.after([c])(n) for n, c in ((1, 64), (8, 700), (24, 4000))] == pytest.approx(
        [linear(n, c) for n, c in ((1, 64), (8, 700), (24, 4000))]
    )


@pytest.mark.parametrize(
    ("seconds", "options", "prompts"),
    [
        (linear, {"max_length": 300}, [64, 295]),  # as long as it may be
        (linear, {"max_length": 200}, [64]),
        (lambda nodes, text: 40 * linear(nodes, text), {}, [64]),  # to read 256 tokens would take 4 seconds
        (lambda nodes, text: 4 * linear(nodes, text), {}, [64, 511]),
    ],
)
def test_a_long_text_is_measured_where_it_fits_and_is_read_in_a_moment(
    clocked: Clocked, seconds: Callable[[int, int], float], options: dict[str, Any], prompts: list[int]
) -> None:
    backend = clocked(seconds, **options)
    found = measured_profile(backend, FACTS)
    assert found is not None
    assert [*backend.prompts[:1], *(pytest.approx(n, rel=0.1) for n in backend.prompts[1:])] == prompts
    assert (found.far_context, list(found.far)) == ((backend.prompts[-1], [1, 16]) if len(prompts) > 1 else (0, []))


def test_times_are_right_though_every_second_turn_is_disturbed(clocked: Clocked) -> None:
    backend = clocked(linear)
    backend.disturbed = lambda turn: 18.0 if turn // 5 % 2 else 1.0
    found = profile(backend, sizes=(1, 2, 4, 8, 16), context=64)
    assert found.seconds == pytest.approx({n: linear(n, 64) for n in (1, 2, 4, 8, 16)})


class ClockedDraft:
    """A draft that takes 3.6 ms of the backend's clock; `disturbed` says how much longer its n-th call takes."""

    def __init__(self, backend: ClockedBackend, disturbed: Callable[[int], float] = lambda call: 1.0) -> None:
        self.backend, self.disturbed = backend, disturbed
        self.after: list[int] = []  # the passes before each call

    def __call__(self, features: object) -> None:
        self.backend.now += 3.6e-3 * self.disturbed(len(self.after))
        self.after.append(self.backend.forwards)


def test_a_draft_is_timed_after_every_pass_as_it_is_decoded(clocked: Clocked) -> None:
    backend = clocked(linear)
    draft = ClockedDraft(backend)
    found = profile(backend, sizes=(1, 2, 4, 8, 16), context=64, repeats=3, draft=draft)
    assert found.draft_seconds == pytest.approx(3.6e-3)
    passes = [after - draft.after[0] for after in draft.after]
    assert passes == [0, *range(1, 16)], "once to warm up, then after each of 5 passes in 3 turns"


def test_the_time_of_a_draft_is_right_though_most_of_the_first_drafts_are_disturbed(clocked: Clocked) -> None:
    backend = clocked(linear)
    draft = ClockedDraft(backend, disturbed=lambda call: 2.0 if call <= 16 or call % 8 == 0 else 1.0)
    found = profile(backend, sizes=profile_module.QUICK_SIZES, context=64, repeats=3, draft=draft)
    assert len(draft.after) == 1 + 3 * 8
    assert found.draft_seconds == pytest.approx(3.6e-3)


def test_a_kept_draft_that_one_now_refutes_is_measured_anew(clocked: Clocked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "REFUTED", 1.5)
    backend = clocked(linear)
    draft = ClockedDraft(backend, disturbed=lambda call: 2.0)

    def drafting() -> float | None:
        found = measured_profile(backend, FACTS, draft=draft)
        assert found is not None
        return found.draft_seconds

    assert drafting() == pytest.approx(7.2e-3)
    draft.disturbed = lambda call: 1.5
    assert drafting() == pytest.approx(7.2e-3), "not so different"
    draft.disturbed = lambda call: 1.0
    assert drafting() == pytest.approx(3.6e-3)
    drafts = len(draft.after)
    assert drafting() == pytest.approx(3.6e-3)
    assert len(draft.after) - drafts == 3, "a look at two drafts after one to warm up, and no more"


@pytest.fixture(name="processor")
def processor_fixture(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Processor times of two cores: each look at them is a second later, of which this program took one core."""
    import psutil

    monkeypatch.setattr(profile_module, "BUSY", 0.1)
    state = SimpleNamespace(others=0.0, second=0)

    class Times(SimpleNamespace):
        def _asdict(self) -> dict[str, float]:
            return dict(self.__dict__)

    def cpu_times() -> Times:
        state.second += 1
        t = float(state.second)
        used = t * (1.0 + state.others)
        return Times(user=used - 0.1 * t, system=0.1 * t, idle=1.5 * t - used, iowait=0.5 * t, guest=used)

    process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=0.75 * state.second, system=0.25 * state.second))
    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(psutil, "Process", lambda: process)
    return state


def test_times_of_a_busy_machine_are_used_and_not_kept(
    measured: list[float], processor: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    processor.others = 0.3  # of a core: 0.15 of the machine
    assert [one(), one(progress=True)] == [1, 2]
    assert "busy: it will be measured again next time" in capsys.readouterr().err
    processor.others = 0.15
    assert [one(progress=True), one()] == [3, 3]
    assert "busy" not in capsys.readouterr().err
    processor.others = 0.3
    assert [one(refresh=True), one()] == [4, 3], "what a quiet machine gave is still there"


def test_where_the_system_does_not_tell_what_others_do_times_are_kept(
    measured: list[float], processor: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden() -> None:
        raise PermissionError("/proc/stat")

    monkeypatch.setattr("psutil.cpu_times", hidden)
    assert [one(), one()] == [1, 1]


def test_kept_times_that_a_pass_now_refutes_are_measured_anew(
    clocked: Clocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_module, "REFUTED", 1.5)
    backend = clocked(lambda nodes, text: 18 * linear(nodes, text))  # 954 ms a pass, truly 54
    assert one(backend=backend) == pytest.approx(18 * linear(1, 64))
    backend.seconds = lambda nodes, text: 15 * linear(nodes, text)
    assert one(backend=backend) == pytest.approx(18 * linear(1, 64)), "not so different"
    backend.seconds = lambda nodes, text: 40 * linear(nodes, text)
    assert one(backend=backend) == pytest.approx(18 * linear(1, 64)), "the machine is busy now"
    backend.seconds = linear
    assert one(backend=backend) == pytest.approx(linear(1, 64))
    prompts = len(backend.prompts)
    assert one(backend=backend) == pytest.approx(linear(1, 64))
    assert backend.prompts[prompts:] == [8], "a look at one short text, and no more"


def test_kept_times_are_taken_as_they_are_while_the_slot_is_in_use(clocked: Clocked) -> None:
    backend = clocked(linear)
    kept = one(backend=backend)
    fill(backend, 0, [1, 2])
    assert one(backend=backend) == kept
    assert backend.length(0) == 2


def test_profiles_of_earlier_versions_are_not_read(measured: list[float]) -> None:
    one()
    (path,) = profiles_dir().iterdir()
    assert json.loads(path.read_text())["key"]["format"] == profile_module.FORMAT >= 2


def test_a_native_engine_that_was_built_anew_is_measured_anew(
    clocked: Clocked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = tmp_path / "_engine.so"
    build.write_bytes(b"first")
    module = SimpleNamespace(_engine=SimpleNamespace(__file__=str(build)))
    monkeypatch.setattr(profile_module, "native_module", lambda: module)
    backend = clocked(linear)
    monkeypatch.setattr(backend, "name", "native")
    kept = one(backend=backend)
    backend.seconds = lambda nodes, text: 0.9 * linear(nodes, text)
    assert one(backend=backend) == kept, "not so much faster that it would be refuted"
    build.write_bytes(b"of the same version")
    assert one(backend=backend) == pytest.approx(0.9 * kept)
