"""Shrink-grid observers of weights that weigh errors by E[x^2] of the module's inputs."""

from __future__ import annotations

from typing import cast

from loguru import logger
from pydantic import Field

from calipers.grouping import Groups
from calipers.observers.base import Observation, Observer
from calipers.observers.input_moments import InputObserver
from calipers.observers.mse import (
    GridOptions,
    GridSearchObserver,
    NVFP4ExpandedMSEOptions,
)

__all__ = ["IMatrixMSEObserver", "NVFP4ExpandedIMatrixObserver"]


class IMatrixOptions(GridOptions):
    """Options of the weighted shrink grid."""

    maxshrink: float = Field(0.95, ge=0, le=1, description="largest part of the range to give up")
    grid: float = Field(20, gt=0, description="steps that the whole range would have")
    norm: float = Field(3.0, gt=0, description="exponent of the absolute error")
    strict: bool = Field(
        False, description="missing input statistics are an error instead of an unweighted search"
    )


@Observer.register("imatrix_mse")
class IMatrixMSEObserver(InputObserver, GridSearchObserver):
    """Range of the shrink grid with the smallest error weighted by E[x^2] of each input column.

    `attach(module)` sets a forward hook that sums x^2 over the tokens that the module sees, and
    `detach(module)` removes it. Each batch is summed in float32 and the sums are added in float64,
    so that the order of batches and merges does not show. Without inputs (or for an activation)
    errors are weighed alike, with a warning; with the option `strict` that is an error.
    """

    Options = IMatrixOptions
    include_end = True

    def importance(self, observation: Observation) -> list[Groups] | None:
        """E[x^2] / mean(E[x^2]) of each value's column."""
        problem = self._input_problem(observation)
        if problem is None and not bool(self.input_square_sum.any()):
            problem = "has seen nothing but zeros as input"
        if problem is None:
            return list(observation.grouping.split(self.mean_squares(observation)))
        message = f"{self.name}: {type(self).__name__} {problem}"
        if cast(IMatrixOptions, self.options).strict:
            raise ValueError(message)
        logger.warning("{}; errors are weighed alike", message)
        return None


class NVFP4ExpandedIMatrixOptions(NVFP4ExpandedMSEOptions, IMatrixOptions):
    """A grid from 1.8 times the range down to 0.8 times the range."""


@Observer.register("nvfp4_expanded_imatrix")
class NVFP4ExpandedIMatrixObserver(IMatrixMSEObserver):
    """As imatrix_mse, from 1.8 times the range down: NVFP4 may map a maximum to 4."""

    Options = NVFP4ExpandedIMatrixOptions
