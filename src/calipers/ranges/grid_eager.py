"""The shrink grid by plain torch operations: the reference of all engines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.formats import Format
from calipers.ranges.casting import cast_range
from calipers.ranges.qparams import fake_quantized, judged_range_dtype, qparams_of_range
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.units import error_units
from calipers.ranges.views import GroupedView

__all__ = ["search", "search_few"]


def search(
    views: Sequence[GroupedView],
    extremes: Sequence[tuple[Tensor, Tensor]],
    args: QuantizationArgs,
    grid: ShrinkGrid,
    importance: Sequence[GroupedView | None],
    global_scale: Tensor | None,
    num_steps: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """As `calipers.ranges.search_grid_ranges`, by compressed-tensors' own functions.

    Args:
        views: The views of one value.
        extremes: For each view the minimum and maximum of its groups, float32, expanded.
        args: Quantization arguments, without the scale's dtype where it is not to be rounded.
        grid: The candidates.
        importance: For each view the weights of its values, or None.
        global_scale: TENSOR_GROUP only, shape (1,).
        num_steps: Number of candidates, if not all.
    """
    searches = [
        _Search(view, low, high, weights, args, grid, global_scale)
        for view, (low, high), weights in zip(views, extremes, importance, strict=True)
    ]
    without_gain = 0
    for step in range(num_steps or grid.num_steps):
        # Every view takes every step: no short-circuit.
        gains = [each.try_step(grid.shrink(step)) for each in searches]
        without_gain = 0 if any(gains) else without_gain + 1
        if grid.patience and without_gain >= grid.patience:
            break
    return [(each.best_min, each.best_max) for each in searches]


def search_few(
    view: GroupedView,
    extremes: tuple[Tensor, Tensor],
    args: QuantizationArgs,
    grid: ShrinkGrid,
    importance: GroupedView | None,
    global_scale: Tensor | None,
    num_steps: int,
) -> tuple[Tensor, Tensor]:
    """As `search` without patience, of a view whose groups are few: all steps in one go.

    Args:
        view: The values, shape (groups, n).
        extremes: Minimum and maximum of each group, float32, expanded.
        args: Quantization arguments, as for `search`.
        grid: The candidates.
        importance: The weights of the values, of the same shape, or None.
        global_scale: TENSOR_GROUP only, shape (1,).
        num_steps: Number of candidates.
    """

    def at_each_step(one: GroupedView) -> GroupedView:
        values = one.values.expand(num_steps, *one.values.shape)
        return GroupedView(values, (2,), finite_only=one.finite_only)

    factors = grid.factors(num_steps, extremes[0].device).unsqueeze(1)
    low, high = (end * factors for end in extremes)
    weights = None if importance is None else at_each_step(importance)
    every = _Search(at_each_step(view), low, high, weights, args, grid, global_scale)
    every.unit = error_units(*extremes, args, grid.expand).expand(num_steps, -1)
    error = every.error(*every.qparams(low, high))
    error = torch.where(error < torch.inf, error, torch.inf)  # NaN is never smaller
    # torch's argmin does not promise the first of equals.
    steps = torch.arange(num_steps, dtype=torch.int64, device=error.device).unsqueeze(1)
    first = torch.where(error == error.amin(0), steps, num_steps).amin(0, keepdim=True)
    return low.gather(0, first)[0], high.gather(0, first)[0]


class _Search:
    """The state of the search in one view."""

    def __init__(
        self,
        view: GroupedView,
        min_vals: Tensor,
        max_vals: Tensor,
        importance: GroupedView | None,
        args: QuantizationArgs,
        grid: ShrinkGrid,
        global_scale: Tensor | None,
    ) -> None:
        self.view, self.importance = view, importance
        self.min_vals, self.max_vals = min_vals, max_vals
        self.args, self.norm, self.global_scale = args, grid.norm, global_scale
        self.dtype = judged_range_dtype(args, view.values.dtype)
        self.unit = error_units(min_vals, max_vals, args, grid.expand)
        self.format = Format.of(args)
        self._buffer: Tensor | None = None
        self.best_min, self.best_max = min_vals.clone(), max_vals.clone()
        self.best_error = torch.full_like(min_vals, torch.inf)

    def try_step(self, shrink: float) -> bool:
        """Try one candidate; returns whether any group became better."""
        low, high = self.min_vals * shrink, self.max_vals * shrink
        error = self.error(*self.qparams(low, high))
        better = error < self.best_error
        self.best_error = torch.where(better, error, self.best_error)
        self.best_min = torch.where(better, low, self.best_min)
        self.best_max = torch.where(better, high, self.best_max)
        return bool(better.any())

    def qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, float32, and zero point of a candidate range, as they will be stored."""
        low, high = cast_range(low, self.dtype), cast_range(high, self.dtype)
        scale, zero_point = qparams_of_range(low, high, self.args, self.global_scale)
        return cast_range(scale, torch.float32), zero_point

    def error(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Sum over each group of weight * |fake_quantize(x) - x|**norm, float32, in its unit."""
        view = self.view
        scale = scale * self.unit
        error = torch.zeros(view.qparam_shape, dtype=torch.float32, device=view.values.device)
        weights = None if self.importance is None else self.importance.pieces()
        for where, piece in view.pieces():
            values = piece.float()
            if view.finite_only:
                # A zero is quantized to zero: what is left out adds no error.
                values = torch.where(values.isfinite(), values, 0)
            behind = (...,) + (None,) * (values.dim() - len(where))
            values = values * self.unit[where][behind]
            rounded = self._fake_quantize(values, scale[where][behind], zero_point[where][behind])
            loss = _power(rounded.sub_(values), self.norm)
            if weights is not None:
                loss *= next(weights)[1]
            error[where] += loss.sum(tuple(range(len(where), loss.dim())))
        return error

    def _fake_quantize(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """As compressed-tensors does it; integers in one buffer, which takes a quarter the time."""
        if not self.format.integer:
            return fake_quantized(values, scale, zero_point, self.args, self.global_scale)
        if self.global_scale is not None:
            scale = scale / self.global_scale
        if self._buffer is None or self._buffer.numel() < values.numel():
            self._buffer = values.new_empty(values.numel())
        codes = self._buffer[: values.numel()].view(values.shape)
        torch.div(values, scale, out=codes)
        if not self.args.symmetric:
            codes += zero_point
        codes.clamp_(self.format.low, self.format.high).round_()
        if not self.args.symmetric:
            codes -= zero_point
        return codes.mul_(scale)


def _power(error: Tensor, norm: float) -> Tensor:
    """|error|**norm, in place or not."""
    if norm < 2:
        return error.abs_().pow_(norm)
    square = error.square_()
    if norm == 2:
        return square
    # A third of the time of pow, and as exact: little of the logarithm's rounding comes through.
    return square.log2().mul_(norm / 2 - 1).exp2_().mul_(square)
