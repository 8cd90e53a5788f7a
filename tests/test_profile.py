"""The time of a pass: what is measured, not how long it takes."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from medusa import cli
from medusa.errors import UsageError
from medusa.models.profile import profile
from medusa.models.native_backend import NativeBackend
from medusa.models.native_config import native_config
from medusa.models.transformers_backend import TransformersBackend
from tiny_models import make_model, shared_model


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

    monkeypatch.setattr(cli, "_load", lambda _: Model())
    monkeypatch.setattr("medusa.models.profile.SIZES", (1, 2))
    shown = CliRunner().invoke(cli.app, ["info", "--profile"])
    assert shown.exit_code == 0, shown.output
    assert "profile 1 tokens" in shown.output
    assert "of one token" in shown.output
