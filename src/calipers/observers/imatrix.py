"""Shrink-grid observers of weights that weigh errors by the energy of the module's inputs."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from loguru import logger
from pydantic import Field
from torch import Tensor

from calipers.observers.base import Observation, Observer
from calipers.observers.mse import (
    GridOptions,
    GridSearchObserver,
    NVFP4ExpandedMSEOptions,
)
from calipers.observers.statistics import COUNT, SUM, Statistic
from calipers.ranges import GroupedView

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
class IMatrixMSEObserver(GridSearchObserver):
    """Range of the shrink grid with the smallest error weighted by E[x^2] of each input column.

    `attach(module)` sets a forward hook that sums x^2 over the tokens that the module sees, and
    `detach(module)` removes it. Each batch is summed in float32 and the sums are added in float64,
    so that the order of batches and merges does not show. Without inputs (or for an activation)
    errors are weighed alike, with a warning; with the option `strict` that is an error.
    """

    Options = IMatrixOptions
    include_end = True
    needs_data = True
    statistics: ClassVar[dict[str, Statistic]] = {
        "input_square_sum": SUM,
        "num_input_tokens": COUNT,
    }

    #: Sum of x^2 over tokens by input column, shape (cols,), float64.
    input_square_sum: Tensor | None
    #: Tokens behind that sum.
    num_input_tokens: int

    @property
    def has_data(self) -> bool:
        """Whether any token has been seen."""
        return self.num_input_tokens > 0

    def attach(self, module: torch.nn.Module) -> None:
        """Collect E[x^2] of the inputs of `module`; a second call counts nothing twice."""
        self.detach(module)
        module.register_forward_pre_hook(self._see_input, with_kwargs=True)

    def detach(self, module: torch.nn.Module) -> None:
        """Stop collecting; what was collected stays."""
        # By owner rather than by a handle kept here, so that copies of a model detach as well.
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)

    @torch.no_grad()
    def _see_input(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if tensors and tensors[0].numel():
            self.observe_input(tensors[0])

    @torch.no_grad()
    def observe_input(self, inputs: Tensor) -> None:
        """Add a batch of the module's inputs to E[x^2].

        Args:
            inputs: Shape (..., cols). Values that are NaN or Inf are left out and counted.

        Raises:
            ValueError: Another number of columns than before.
        """
        value = self._as_value(inputs)
        tokens = value.reshape(-1, value.shape[-1])
        square_sum = tokens.float().square().sum(0)
        if not bool(square_sum.isfinite().all()):
            self._count_nonfinite(value)
            tokens = torch.where(tokens.isfinite(), tokens, 0)
            square_sum = tokens.double().square().sum(0)
        past = self.input_square_sum
        if past is not None and past.shape != square_sum.shape:
            raise ValueError(
                f"{self.name}: inputs had {past.numel()} columns so far, "
                f"got shape {tuple(inputs.shape)}"
            )
        square_sum = square_sum.double()
        if past is not None:
            square_sum += past.to(square_sum.device)
        self.input_square_sum = square_sum
        self.num_input_tokens += tokens.shape[0]

    def importance(self, observation: Observation) -> list[GroupedView] | None:
        """E[x^2] / mean(E[x^2]) of each value's column."""
        problem = self._problem(observation)
        if problem is None:
            assert self.input_square_sum is not None
            weights = self.input_square_sum / self.input_square_sum.mean()
            columns = weights.float().to(observation.value.device)
            if observation.value.shape[-1] != columns.numel():
                columns = columns.view(observation.value.shape[-2:])
            return list(observation.view_alike(columns.expand(observation.value.shape)))
        message = f"{self.name}: {type(self).__name__} {problem}"
        if cast(IMatrixOptions, self.options).strict:
            raise ValueError(message)
        logger.warning("{}; errors are weighed alike", message)
        return None

    def _problem(self, observation: Observation) -> str | None:
        """Why there are no weights for this value, if so."""
        if self.base_name != "weight":
            return f"weighs errors of weights only, not of {self.base_name!r}"
        if self.input_square_sum is None or not self.has_data:
            return "has seen no input: attach it to the module and run data first"
        if not bool(self.input_square_sum.any()):
            return "has seen nothing but zeros as input"
        if not bool(((self.input_square_sum >= 0) & self.input_square_sum.isfinite()).all()):
            return "holds input statistics that are negative or not finite"
        cols, shape = self.input_square_sum.numel(), observation.value.shape
        # In the canonical layout of groups the columns are the last two dimensions.
        by_column = shape[-1:] == (cols,)
        by_group = len(shape) > 3 and shape[-2] * shape[-1] == cols
        if by_column or by_group:
            return None
        return f"has seen inputs of {cols} columns, which do not fit a shape of {tuple(shape)}"


class NVFP4ExpandedIMatrixOptions(NVFP4ExpandedMSEOptions, IMatrixOptions):
    """A grid from 1.8 times the range down to 0.8 times the range."""


@Observer.register("nvfp4_expanded_imatrix")
class NVFP4ExpandedIMatrixObserver(IMatrixMSEObserver):
    """As imatrix_mse, from 1.8 times the range down: NVFP4 may map a maximum to 4."""

    Options = NVFP4ExpandedIMatrixOptions
