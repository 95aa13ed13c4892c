"""Before any test module is imported: asserts of the shared suite explain themselves too."""

import pytest

pytest.register_assert_rewrite(
    "observers.contract_suite",
    "observers.part_construction",
    "observers.part_input",
    "observers.part_statistics",
    "observers.rig",
    "observers.samples",
)


@pytest.fixture(autouse=True)
def _native_unless_asked(monkeypatch):
    """Which engine runs must not depend on what other tests have searched before."""
    monkeypatch.setenv("CALIPERS_ENGINE", "native")
