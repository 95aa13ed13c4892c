"""Before any test module is imported: asserts of the shared suite explain themselves too."""

import os
from contextlib import nullcontext

import pytest

from upstream import known_breakages

# Tests side by side share the cores: OpenMP's threads wait for each other by spinning, so that two
# processes that take both cores each need five times as long. Set before torch is loaded, and for
# the processes that tests start.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    _SHARE = max(1, (os.cpu_count() or 1) // _WORKERS)
    os.environ.setdefault("OMP_NUM_THREADS", str(_SHARE))

pytest.register_assert_rewrite(
    "observers.contract_suite",
    "observers.part_construction",
    "observers.part_input",
    "observers.part_statistics",
    "observers.rig",
    "observers.samples",
)


def pytest_collection_modifyitems(items):
    """Tests that newer versions of other packages break may fail there."""
    for item in items:
        for why in known_breakages(item.nodeid):
            item.add_marker(pytest.mark.xfail(reason=why, strict=False))


@pytest.fixture
def without_help(monkeypatch):
    """Packed weights that `loading_experts` gets loaded would not load back at all."""
    from calipers.checkpoint import load_check

    monkeypatch.setattr(load_check, "loading_experts", nullcontext)
    monkeypatch.setattr(load_check, "_KNOWN", {})


@pytest.fixture(autouse=True)
def _native_unless_asked(monkeypatch):
    """Which engine runs must not depend on what other tests have searched before."""
    monkeypatch.setenv("CALIPERS_ENGINE", "native")
