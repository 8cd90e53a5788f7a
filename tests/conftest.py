"""Settings shared by all tests."""

from __future__ import annotations

from hypothesis import settings

# No deadline: tests run beside others on busy machines, and the first example pays for imports.
settings.register_profile("medusa", deadline=None, print_blob=True)
settings.load_profile("medusa")
