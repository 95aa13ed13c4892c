"""The shrink grid on the CPU by torch.compile: each value is loaded once for a tile of candidates.

Two small functions are compiled for a kind of search: one makes the scales of a tile of candidates,
one sums the errors of all of them in one loop over the values. Sizes are dynamic, so that one
compilation serves the weights of a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from calipers.ranges.compiling import SchemeKey, compile_quietly
from calipers.ranges.rounding import Rounding, power_of_square, quantization_error
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.views import GroupedView

__all__ = ["search"]

#: Candidates of one pass over the values: their sums stay in registers. Powers other than squares
#: take longer to compile than it takes to load the values once more.
TILE, TILE_OF_SQUARES = 5, 10
#: Values of a piece: large enough that calls cost nothing, small enough to bound scratch memory.
PIECE = 2**20
#: Longest run of values summed in float32 by one loop; longer groups are summed run by run.
LONGEST_RUN = 4096
#: Sizes up to this are compiled as constants, which is worth it for short groups.
LARGEST_CONSTANT = 512

Range = tuple[Tensor, Tensor]


def search(
    views: Sequence[GroupedView],
    extremes: Sequence[Range],
    args: QuantizationArgs,
    grid: ShrinkGrid,
    importance: Sequence[GroupedView | None],
    global_scale: Tensor | None,
) -> list[Range]:
    """As `calipers.ranges.search_grid_ranges`, whose arguments are checked and completed.

    Args:
        views: The views of one value.
        extremes: For each view the minimum and maximum of its groups, float32, expanded.
        args: Quantization arguments, without the scale's dtype where it is not to be rounded.
        grid: The candidates.
        importance: For each view the weights of its values, or None.
        global_scale: TENSOR_GROUP only, shape (1,).
    """
    searches = [
        _Search(view, low, high, weights, args, grid.norm, global_scale)
        for view, (low, high), weights in zip(views, extremes, importance, strict=True)
    ]
    without_gain, tile = 0, _tile_size(grid.norm)
    for first in range(0, grid.num_steps, tile):
        steps = list(range(first, min(first + tile, grid.num_steps)))
        before = [(s.best_error.clone(), s.best_step.clone()) for s in searches]
        for position, gain in enumerate(gains := _try_tile(searches, steps, grid)):
            without_gain = 0 if gain else without_gain + 1
            if grid.patience and without_gain >= grid.patience:
                if any(gains[position + 1 :]):
                    # Steps that the search would not have come to: back, and without them.
                    for each, (error, best) in zip(searches, before, strict=True):
                        each.best_error, each.best_step = error, best
                    _try_tile(searches, steps[: position + 1], grid)
                return [s.result(grid) for s in searches]
    return [s.result(grid) for s in searches]


def _try_tile(searches: list[_Search], steps: list[int], grid: ShrinkGrid) -> list[bool]:
    """Try the steps in every view; for each whether it made any group better."""
    # A short tile repeats its last step: equals do not win.
    padded = steps + steps[-1:] * (_tile_size(grid.norm) - len(steps))
    shrink = torch.tensor([grid.shrink(step) for step in padded], dtype=torch.float32)
    gains = torch.zeros(len(padded), dtype=torch.bool)
    for each in searches:
        gains |= each.try_tile(shrink, steps[0])
    flags: list[bool] = gains.tolist()
    return flags[: len(steps)]


class _Search:
    """The state of the search in one view."""

    def __init__(
        self,
        view: GroupedView,
        min_vals: Tensor,
        max_vals: Tensor,
        importance: GroupedView | None,
        args: QuantizationArgs,
        norm: float,
        global_scale: Tensor | None,
    ) -> None:
        self.view, self.importance = view, importance
        self.min_vals, self.max_vals = min_vals, max_vals
        self.best_error = torch.full_like(min_vals, torch.inf)
        self.best_step = torch.zeros_like(min_vals, dtype=torch.int32)
        self._scales = _compiled_scales(SchemeKey(args), global_scale is not None)
        self._errors = _compiled_errors(SchemeKey(args), norm, importance is not None)
        self._global_scale = global_scale
        self._symmetric = bool(args.symmetric)
        self._weight: tuple[tuple[object, ...], Tensor] | None = None

    def try_tile(self, shrink: Tensor, first: int) -> Tensor:
        """Take in the errors of a tile of candidates; which of them made a group better."""
        group_size = prod(self.view.shape) // max(1, prod(self.view.qparam_shape))
        if group_size <= PIECE:
            gains = torch.zeros(len(shrink), dtype=torch.bool)
            for where, errors in self._pieces(shrink):
                gains |= self._take(where, errors, first)
            return gains
        # Groups come in several pieces: their errors are brought together first.
        total = self.min_vals.new_zeros(len(shrink), *self.view.qparam_shape)
        for where, errors in self._pieces(shrink):
            index = (slice(None), *where)
            total[index] += errors
        return self._take((), total, first)

    def result(self, grid: ShrinkGrid) -> Range:
        """The range of the best step of each group."""
        factors = torch.tensor([grid.shrink(step) for step in range(grid.num_steps)])
        best = factors[self.best_step.long()]
        return self.min_vals * best, self.max_vals * best

    def _pieces(self, shrink: Tensor) -> Any:
        weights = None if self.importance is None else self.importance.pieces(PIECE)
        for where, piece in self.view.pieces(PIECE):
            low, high = self.min_vals[where], self.max_vals[where]
            scale, zero_point = self._scales(
                low.reshape(-1), high.reshape(-1), shrink, self._global_scale
            )
            if self.view.finite_only:
                piece = torch.where(piece.isfinite(), piece, 0)
            weight = None if weights is None else self._flat(next(weights)[1], where)
            errors = self._sum_errors(piece, scale, zero_point, weight, low.numel())
            yield where, errors.view(-1, *low.shape)

    def _flat(self, weight: Tensor, where: tuple[slice, ...]) -> Tensor:
        """The weights of a piece one after the other; of pieces with the same ones, one copy."""
        if weight.stride(0) != 0:
            return weight.reshape(-1)
        same = (weight.shape, *((part.start, part.stop) for part in where[1:]))
        if self._weight is None or self._weight[0] != same:
            self._weight = same, weight.reshape(-1)
        return self._weight[1]

    def _sum_errors(
        self, piece: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor | None, groups: int
    ) -> Tensor:
        # A piece in float32 stays in the cache; bfloat16 loads beside integer arithmetic would not
        # be vectorized.
        values = piece.float().reshape(groups, -1)
        runs = _runs(values.shape[1])
        if runs > 1:
            scale = scale.repeat_interleave(runs, dim=1)
            zero_point = zero_point.repeat_interleave(runs, dim=1)
            values = values.view(groups * runs, -1)
        if weight is not None:
            weight = weight.view(values.shape)
        torch._dynamo.maybe_mark_dynamic(values, 0)
        if values.shape[1] > LARGEST_CONSTANT:
            torch._dynamo.maybe_mark_dynamic(values, 1)
        errors = self._errors(values, scale, None if self._symmetric else zero_point, weight)
        return errors.view(-1, groups, runs).sum(-1) if runs > 1 else errors

    def _take(self, where: tuple[slice, ...], errors: Tensor, first: int) -> Tensor:
        best, steps = self.best_error[where], self.best_step[where]
        gains = torch.zeros(len(errors), dtype=torch.bool)
        for position, error in enumerate(errors.unbind(0)):
            better = error < best
            gains[position] = better.any()
            torch.minimum(best, error, out=best)
            steps.masked_fill_(better, first + position)
        return gains


def _tile_size(norm: float) -> int:
    return TILE_OF_SQUARES if norm == 2 else TILE


def _runs(length: int) -> int:
    """Number of equal runs, none longer than LONGEST_RUN, that a group is summed in."""
    for runs in range(-(-length // LONGEST_RUN), length // 64 + 1):
        if length % runs == 0:
            return runs
    return 1


@functools.lru_cache(maxsize=64)
def _compiled_scales(key: SchemeKey, has_global: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    args = key.args

    def scales(
        low: Tensor, high: Tensor, shrink: Tensor, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        factors = shrink.unsqueeze(1)
        scale, zero_point = calculate_qparams(
            low * factors, high * factors, args, global_scale=global_scale
        )
        if global_scale is not None:
            scale = scale / global_scale
        return scale, zero_point.float()

    compiled = compile_quietly(scales)

    def call(
        low: Tensor, high: Tensor, shrink: Tensor, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        torch._dynamo.maybe_mark_dynamic(low, 0)
        torch._dynamo.maybe_mark_dynamic(high, 0)
        found: tuple[Tensor, Tensor] = compiled(low, high, shrink, global_scale)
        return found

    return call


@functools.lru_cache(maxsize=64)
def _compiled_errors(key: SchemeKey, norm: float, weighted: bool) -> Callable[..., Tensor]:
    rounding = Rounding.of(key.args)

    def errors(
        values: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        sums = []
        for candidate in range(_tile_size(norm)):
            zero = None if zero_point is None else zero_point[candidate].unsqueeze(-1)
            error = quantization_error(values, scale[candidate].unsqueeze(-1), zero, rounding)
            loss = power_of_square(error * error, norm)
            sums.append((loss if weight is None else loss * weight).sum(-1))
        return torch.stack(sums)

    return compile_quietly(errors)
