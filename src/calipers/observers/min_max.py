"""Observers that take the range from the smallest and largest value."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from calipers.observers.base import Observation, Observer, Range
from calipers.observers.moving_base import MovingAverageObserverBase
from calipers.observers.statistics import MAX, MIN, Statistic

__all__ = [
    "MemorylessMinMaxObserver",
    "MinMaxObserver",
    "MinMaxTuple",
    "MovingAverageMinMaxObserver",
    "ScaleZpTuple",
    "StaticMinMaxObserver",
]


class _Extremes(Observer):
    """The range of a value is that of its extremes."""

    extremes_only = True
    global_by_extremes = True

    def measure(self, observation: Observation) -> list[Range]:
        """The extremes of each view."""
        return observation.extremes

    def measure_global(self, observation: Observation) -> Range:
        """The extremes of the whole value."""
        return observation.extremes[0]


@Observer.register("memoryless_minmax")
class MemorylessMinMaxObserver(_Extremes):
    """Smallest and largest value of the latest observation alone."""


@Observer.register("static_minmax")
class StaticMinMaxObserver(_Extremes):
    """Smallest and largest value over everything seen."""

    statistics: ClassVar[dict[str, Statistic]] = {
        "min_vals": MIN,
        "max_vals": MAX,
        "global_min_vals": MIN,
        "global_max_vals": MAX,
    }


@Observer.register("minmax")
class MinMaxObserver(_Extremes, MovingAverageObserverBase):
    """Moving average over batches of the smallest and largest value."""


MovingAverageMinMaxObserver = MinMaxObserver
"""The same class as `MinMaxObserver`, by the name that it had in the first generation."""

MinMaxTuple = tuple[Tensor, Tensor]
"""Minimum and maximum: what `get_min_max` returns."""

ScaleZpTuple = tuple[Tensor, Tensor]
"""Scale and zero point: what `forward` returns."""
