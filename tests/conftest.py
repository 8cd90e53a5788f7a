"""Settings shared by all tests."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: tests run beside others on busy machines, and the first example pays for imports.
settings.register_profile("medusa", deadline=None, print_blob=True)
settings.load_profile("medusa")


@pytest.fixture(autouse=True)
def _profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what was measured of this machine, nor depends on what else runs on it."""
    monkeypatch.setattr("medusa.engines.times.profiles_dir", lambda: tmp_path / "profiles")
    monkeypatch.setattr("medusa.engines.times.BUSY", math.inf)
    monkeypatch.setattr("medusa.engines.times.REFUTED", math.inf)
