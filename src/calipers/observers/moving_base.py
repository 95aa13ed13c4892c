"""The base of observers that average their ranges over batches."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from calipers.observers.base import Observation, Observer, Range
from calipers.observers.options import ObserverOptions
from calipers.observers.statistics import Statistic
from calipers.ranges.surroundings import undisturbed

__all__ = ["MovingAverageObserverBase", "MovingAverageOptions"]


class MovingAverageOptions(ObserverOptions):
    """Options of moving averages."""

    averaging_constant: float = Field(
        0.01, gt=0, le=1, description="weight of the newest batch; 1 takes each batch alone"
    )


class MovingAverageObserverBase(Observer):
    """Moving average of the ranges of batches: `past * (1 - c) + current * c`.

    The first batch is taken as it is. The average is float32 (float64 for float64 values) and is
    cast to the observed dtype when qparams are derived. Local and global ranges are averaged apart.

    A subclass overrides `get_current_min_max` and `get_current_global_min_max` (or `measure`): the
    range of this batch alone.
    """

    Options: ClassVar[type[ObserverOptions]] = MovingAverageOptions
    range_names = ("past_min_vals", "past_max_vals")
    global_range_names = ("past_global_min_vals", "past_global_max_vals")
    statistics: ClassVar[dict[str, Statistic]] = {
        "past_min_vals": Statistic("mean"),
        "past_max_vals": Statistic("mean"),
        "past_global_min_vals": Statistic("mean", count="num_global_batches"),
        "past_global_max_vals": Statistic("mean", count="num_global_batches"),
    }

    past_min_vals: Tensor | None
    past_max_vals: Tensor | None
    past_global_min_vals: Tensor | None
    past_global_max_vals: Tensor | None

    @property
    def avg_constant(self) -> float:
        """The option `averaging_constant`."""
        constant: float = getattr(self.options, "averaging_constant")  # noqa: B009
        return constant

    def measure(self, observation: Observation) -> list[Range]:
        """Range of this batch for each view, by `get_current_min_max` unless overridden."""
        return [self.get_current_min_max(view.canonical()) for view in observation.views]

    def measure_global(self, observation: Observation) -> Range:
        """Range of this whole batch, by `get_current_global_min_max`."""
        return self.get_current_global_min_max(observation.views[0].canonical())

    @undisturbed()
    def get_current_min_max(self, observed: Tensor) -> Range:
        """Range of this batch alone.

        Args:
            observed: `(num_observations, *qparam_shape, group_size)`.

        Returns:
            Minimum and maximum, each of `qparam_shape`.
        """
        if type(self).measure is MovingAverageObserverBase.measure:
            raise NotImplementedError(f"{type(self).__name__} must override get_current_min_max")
        return self.measure(self._look_at_canonical(observed))[0]

    @undisturbed()
    def get_current_global_min_max(self, observed: Tensor) -> Range:
        """Range of this whole batch alone.

        Args:
            observed: `(num_observations, 1, group_size)`.

        Returns:
            Minimum and maximum, each of shape (1,).
        """
        if type(self).measure_global is MovingAverageObserverBase.measure_global:
            raise NotImplementedError(
                f"{type(self).__name__} must override get_current_global_min_max"
            )
        return self.measure_global(self._look_at_canonical(observed))
