"""The contract that every observer inherits as tests.

A new observer tests itself by naming itself and what it remembers:

    class TestMyObserver(ObserverContract):
        name = "my_observer"  # as registered
        remembers = "last"  # or "all", or "average"

`defaults`, `options` and `needs_data` are optional: see `ObserverRig`. The suite runs on the CPU
and, under the marker `gpu`, on a CUDA device.
"""

from __future__ import annotations

from observers.part_construction import ConstructionPart
from observers.part_input import InputPart
from observers.part_statistics import StatisticsPart


class ObserverContract(ConstructionPart, StatisticsPart, InputPart):
    """Inherit it in a class whose name starts with Test, and set `name` and `remembers`."""

    def test_says_whether_it_needs_data(self) -> None:
        assert self.cls.needs_data is self.needs_data
