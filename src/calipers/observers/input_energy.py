"""The base of weight observers that look at the inputs of their module first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from calipers.observers.base import Observer
from calipers.observers.statistics import COUNT, SUM, Statistic
from calipers.ranges.surroundings import undisturbed

__all__ = ["InputEnergyObserver", "first_tensor"]


def first_tensor(values: Iterable[object]) -> Tensor | None:
    """The input of a module among the arguments that its hook is given; None without one."""
    return next((value for value in values if isinstance(value, Tensor)), None)


class InputEnergyObserver(Observer):
    """Sums x^2 over the tokens that a module sees, by input column.

    `attach(module)` sets a forward hook and `detach(module)` removes it. Each batch is summed in
    float32 and the sums are added in float64, so that the order of batches and merges does not
    show.
    """

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

    @undisturbed
    def _see_input(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = first_tensor((*args, *kwargs.values()))
        if inputs is not None and inputs.numel():
            self.observe_input(inputs)

    @undisturbed
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
        self._add_products(tokens)
        self.input_square_sum = square_sum
        self.num_input_tokens += tokens.shape[0]

    def _add_products(self, tokens: Tensor) -> None:
        """Take in what else a subclass keeps of tokens, shape (tokens, cols), all finite."""

    def _input_problem(self, shape: torch.Size) -> str | None:
        """Why what was seen gives no weights for a value of this shape, if so."""
        if self.base_name != "weight":
            return f"weighs errors of weights only, not of {self.base_name!r}"
        if self.input_square_sum is None or not self.has_data:
            return "has seen no input: attach it to the module and run data first"
        if not bool(((self.input_square_sum >= 0) & self.input_square_sum.isfinite()).all()):
            return "holds input statistics that are negative or not finite"
        cols = self.input_square_sum.numel()
        # In the canonical layout of groups the columns are the last two dimensions.
        by_column = shape[-1:] == (cols,)
        by_group = len(shape) > 3 and shape[-2] * shape[-1] == cols
        if by_column or by_group:
            return None
        return f"has seen inputs of {cols} columns, which do not fit a shape of {tuple(shape)}"

    def _mean_squares(self, value: Tensor) -> Tensor:
        """E[x^2] / mean(E[x^2]) of each value's column, float32, expanded to the value's shape."""
        assert self.input_square_sum is not None
        mean = self.input_square_sum.mean().clamp(min=torch.finfo(torch.float64).tiny)
        columns = (self.input_square_sum / mean).float().to(value.device)
        if value.shape[-1] != columns.numel():
            columns = columns.view(value.shape[-2:])
        return columns.expand(value.shape)
