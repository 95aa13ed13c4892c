"""The observers of the page "Write your own observer" pass the contract suite."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from docs.pages import ROOT, run_page
from observers.contract_suite import ObserverContract

PAGE = ROOT / "docs" / "write-your-own-observer.md"


@pytest.fixture(scope="module", autouse=True)
def _page() -> None:
    """Register the observers of the page."""
    run_page(PAGE)


class TestStaticAbsMax(ObserverContract):
    name = "static_absmax"
    remembers = "all"
    defaults: ClassVar[dict[str, Any]] = {}


def test_the_page_shows_this_suite() -> None:
    shown = run_page(PAGE)["TestStaticAbsMax"]
    assert issubclass(shown, ObserverContract)
    for member in ("name", "remembers", "defaults"):
        assert getattr(shown, member) == getattr(TestStaticAbsMax, member)
