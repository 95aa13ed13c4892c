"""Observers that search a shrink grid for the range with the smallest error of the values."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field

from calipers.grouping import Groups
from calipers.observers.base import Observation, Observer, Range
from calipers.observers.moving_base import MovingAverageObserverBase, MovingAverageOptions
from calipers.observers.options import ObserverOptions
from calipers.ranges import ShrinkGrid, search_grid_ranges
from calipers.ranges.qparams import widened

__all__ = [
    "GridOptions",
    "GridSearchObserver",
    "MemorylessMSEObserver",
    "MovingAverageMSEObserver",
    "NVFP4ExpandedMSEObserver",
]


PATIENCE = "steps in a row without a better group that end the search; 0: never"


class GridOptions(ObserverOptions):
    """Options of a shrink grid."""

    maxshrink: float = Field(0.20, ge=0, le=1, description="largest part of the range to give up")
    patience: int = Field(5, ge=0, description=PATIENCE)
    grid: float = Field(100.0, gt=0, description="steps that the whole range would have")
    norm: float = Field(2.4, gt=0, description="exponent of the absolute error")
    expand: float = Field(1.0, ge=1, description="factor on the range before it shrinks")


class GridSearchObserver(Observer):
    """Base of the grid observers: the range of a value is the best of a shrink grid.

    The error is float32 whatever the dtype of the values. Under TENSOR_GROUP candidates are rounded
    with the module's global scale where it has one, and the global scale leaves room for `expand`.
    """

    Options: ClassVar[type[ObserverOptions]] = GridOptions
    ignored_options = frozenset({"chunk_size", "triton_error_buffer"})
    #: Whether the last step of the grid is a candidate too.
    include_end: ClassVar[bool] = False
    global_by_extremes = True

    @property
    def grid(self) -> ShrinkGrid:
        """The candidates, by this observer's options."""
        options = cast(GridOptions, self.options)
        return ShrinkGrid(
            maxshrink=options.maxshrink,
            grid=options.grid,
            patience=options.patience,
            norm=options.norm,
            expand=options.expand,
            include_end=self.include_end,
        )

    def measure(self, observation: Observation) -> list[Range]:
        """The best candidate range of each view, float32."""
        return search_grid_ranges(
            observation.views,
            observation.extremes,
            self.args,
            self.grid,
            importance=self.importance(observation),
            global_scale=self._global_scale_on(observation.value.device),
        )

    def measure_global(self, observation: Observation) -> Range:
        """Extremes of the whole value times `expand`, so that expanded local scales still fit."""
        return widened(observation.extremes[0], self.grid.expand)

    def importance(self, observation: Observation) -> list[Groups] | None:
        """Weight of each value's error, arranged as the values; None weighs all alike."""
        return None


@Observer.register("memoryless_mse")
class MemorylessMSEObserver(GridSearchObserver):
    """Range of the shrink grid with the smallest error of the latest observation."""


class MovingAverageMSEOptions(GridOptions, MovingAverageOptions):
    """Options of the shrink grid and of moving averages."""


@Observer.register("mse")
class MovingAverageMSEObserver(GridSearchObserver, MovingAverageObserverBase):
    """Moving average over batches of the range with the smallest error of each."""

    Options = MovingAverageMSEOptions


class NVFP4ExpandedMSEOptions(GridOptions):
    """A grid from 1.8 times the range down to 0.8 times the range."""

    maxshrink: float = Field(
        1 - 0.8 / 1.8, ge=0, le=1, description="largest part of the expanded range to give up"
    )
    patience: int = Field(1000, ge=0, description=PATIENCE)
    grid: float = Field(200.0, gt=0, description="steps that the whole range would have")
    expand: float = Field(1.8, ge=1, description="factor on the range before it shrinks")


@Observer.register("nvfp4_expanded_mse", alias="fouroversix")
class NVFP4ExpandedMSEObserver(GridSearchObserver):
    """As memoryless_mse, from 1.8 times the range down: NVFP4 may map a maximum to 4."""

    Options = NVFP4ExpandedMSEOptions
