"""The base of weight observers that look at the inputs of their module first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from calipers.observers.base import Observer
from calipers.observers.masks import current_mask, select_tokens
from calipers.observers.state_checks import Problem, check_sum, count_in
from calipers.observers.statistics import COUNT, SUM, Statistic
from calipers.observers.updates import whole_update
from calipers.ranges.surroundings import undisturbed

__all__ = ["InputEnergyObserver", "first_tensor"]

#: Column sums of x^2 of a batch that float32 holds with room for products of other columns: beyond
#: them the batch is summed in float64.
_USUAL = (1e-30, 1e20)
#: An input of so many times the median size is left out: in float32 the sums of the other columns
#: would vanish beside it.
_FREAK = 2.0**40
#: Largest input whose products float64 can sum over any number of tokens and columns.
_LARGEST = 1e140


def first_tensor(values: Iterable[object]) -> Tensor | None:
    """The input of a module among the arguments that its hook is given; None without one."""
    return next((value for value in values if isinstance(value, Tensor)), None)


class InputEnergyObserver(Observer):
    """Sums x^2 over the tokens that a module sees, by input column.

    `attach(module)` sets a forward hook and `detach(module)` removes it. Each batch is summed in
    float32 and the sums are added in float64, so that the order of batches and merges does not
    show. A batch whose squares are too large or too small for float32 is summed in float64. A value
    of 2^40 times the median size of its batch is left out and counted, like NaN and Inf.
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

    @undisturbed()
    def _see_input(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = first_tensor((*args, *kwargs.values()))
        if inputs is None or not inputs.numel():
            return
        mask = current_mask()
        if mask is not None and mask.fits(inputs.shape):
            inputs = mask.select(inputs.detach())
        self.observe_input(inputs)

    @whole_update
    def observe_input(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of the module's inputs to E[x^2].

        Args:
            inputs: Shape (..., cols). Values that are NaN or Inf are left out and counted.
            mask: Which tokens count, shape (batch, tokens) or (tokens,), 1 where one counts; None
                counts all.

        Raises:
            ValueError: Another number of columns than before, or a mask that does not fit. Nothing
                is changed then.
        """
        value = self._as_value(inputs)
        if mask is not None:
            try:
                value = select_tokens(value, mask)
            except ValueError as error:
                raise ValueError(f"{self._input_name}: {error}") from None
        if value.numel() == 0:
            return
        past = self.input_square_sum
        if past is not None and past.shape != value.shape[-1:]:
            raise ValueError(
                f"{self._input_name}: had {past.numel()} columns so far, "
                f"got shape {tuple(inputs.shape)}"
            )
        tokens = value.reshape(-1, value.shape[-1])
        square_sum = tokens.float().square().sum(0)
        largest = square_sum.amax()
        if not bool((largest > _USUAL[0]) & (largest < _USUAL[1])):  # NaN is neither
            tokens = self._without_freaks(tokens)
            square_sum = tokens.square().sum(0)
        square_sum = square_sum.double()
        if past is not None:
            square_sum += past.to(square_sum.device)
        self._add_products(tokens)
        self.input_square_sum = square_sum
        self.num_input_tokens += tokens.shape[0]

    def _without_freaks(self, tokens: Tensor) -> Tensor:
        """Tokens in float64, with zeros in place of values that cannot be summed."""
        self._count_nonfinite(tokens, self._input_name)
        sizes = tokens.double().abs()
        finite = sizes.isfinite()
        filled = sizes[finite & (sizes > 0)]
        if filled.numel() == 0:
            return torch.where(finite, tokens.double(), 0)
        limit = (filled.median() * _FREAK).clamp(max=_LARGEST)
        freaks = int((finite & (sizes > limit)).sum())
        if freaks:
            self.num_nonfinite += freaks
            kind = "values of 2^40 times the median, or above 1e140,"
            self._left_out = (freaks, sizes.numel(), self._input_name, kind)
        return torch.where(sizes <= limit, tokens.double(), 0)

    @property
    def _input_name(self) -> str:
        """What warnings and errors call the inputs of the module."""
        suffix = f".{self.base_name}"
        module = self.name.removesuffix(suffix)
        return "inputs" if module == self.name else f"inputs of {module}"

    def _add_products(self, tokens: Tensor) -> None:
        """Take in what else a subclass keeps of tokens, shape (tokens, cols), all finite.

        They are float64 where float32 could not hold the products.
        """

    def check_state(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        """As `Observer.check_state`; the sums must be of as many columns as the weight has."""
        yield from super().check_state(state)
        seen = count_in(state, "num_input_tokens") > 0
        found = state.get("input_square_sum")
        shape = None if found is None else (found.numel(),)
        cols = getattr(self.module, "in_features", None)
        if self.base_name == "weight" and isinstance(cols, int):
            shape = (cols,)
        yield from check_sum(state, "input_square_sum", shape, needed=seen)

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
