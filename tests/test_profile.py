"""The time of a pass: what is measured, not how long it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medusa import cli
from medusa.errors import UsageError
from medusa.models import profile as profile_module
from medusa.models.native_backend import NativeBackend
from medusa.models.native_config import native_config
from medusa.models.profile import Profile, measured_profile, profile
from medusa.models.transformers_backend import TransformersBackend
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
    monkeypatch.setattr("medusa.models.profile._bandwidth", lambda _: 1e9)
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
    backend.prefill(0, [1, 2, 3])
    with pytest.raises(UsageError, match="in use"):
        profile(backend, context=20)
    assert backend.length(0) == 3


def test_info_shows_a_line_for_each_number_of_tokens(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        backend = TransformersBackend(shared_model())

        def describe(self) -> dict[str, object]:
            return {"model": "tiny"}

    monkeypatch.setattr(cli, "load_model", lambda _: Model())
    monkeypatch.setattr("medusa.models.profile.SIZES", (1, 2))
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
    backend.prefill(0, [1])
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
