"""The shrink grid on the CPU by torch.compile: a value is loaded once for a tile of candidates.

Where the native engine works it is several times faster and needs no compilation for each kind of
search; this one is taken when it is asked for. One small function is compiled for a format and a
norm. Sizes are dynamic, so that one compilation serves the weights of a model.

Compiled errors are off by some millionths. Groups whose two best candidates lie closer than that
are searched again by the reference, so that it is the reference's step that is chosen there too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

from calipers.ranges.casting import cast_range
from calipers.ranges.close_calls import decide_close_calls
from calipers.ranges.compiling import compile_quietly
from calipers.ranges.group_pieces import (
    GroupPiece,
    group_pieces,
    group_size,
    mark_dynamic,
    number_of_runs,
)
from calipers.ranges.qparams import judged_range_dtype, qparams_of_range
from calipers.ranges.rounding import Rounding, power_of_square, quantization_error
from calipers.ranges.shrink import ShrinkGrid, last_step
from calipers.ranges.units import error_units
from calipers.ranges.views import GroupedView

__all__ = ["search", "supports"]

#: Candidates of one pass over the values: their sums stay in registers.
TILE = 5
#: Part of the smallest error by which the next one must be larger to leave no doubt.
CLOSE = 5e-6
#: Values of a piece: large enough that calls cost nothing, small enough to bound scratch memory.
PIECE = 2**20

Range = tuple[Tensor, Tensor]


def supports(args: QuantizationArgs) -> bool:
    """Whether this engine rounds to a number format."""
    if args.type == QuantizationType.INT:
        return True
    return args.num_bits in (4, 8) and bool(args.symmetric)


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
        _Search(view, low, high, weights, args, grid, global_scale)
        for view, (low, high), weights in zip(views, extremes, importance, strict=True)
    ]
    steps = grid.num_steps
    gains: list[bool] = torch.stack([each.try_steps(steps) for each in searches]).any(0).tolist()
    last = last_step(gains, grid.patience)
    if any(gains[last + 1 :]):  # by steps that the search would not have come to
        steps = last + 1
        for each in searches:
            each.try_steps(steps)
    return [each.result(steps) for each in searches]


class _Search:
    """The search in one view."""

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
        self.args, self.grid, self.global_scale = args, grid, global_scale
        self.unit = error_units(min_vals, max_vals, args, grid.expand)
        self.best_step = torch.zeros_like(min_vals, dtype=torch.long)
        self.close = torch.zeros_like(min_vals, dtype=torch.bool)
        self._errors = _compiled_errors(Rounding.of(args), grid.norm)

    def try_steps(self, steps: int) -> Tensor:
        """Search the first steps; which of them made any group better, shape (steps,)."""
        gains = torch.zeros(steps, dtype=torch.bool, device="cpu")
        walk = group_pieces(self.view, self.importance, PIECE)
        if group_size(self.view) > PIECE:  # parts of groups
            everything = tuple(slice(None) for _ in self.view.qparam_shape)
            errors = self.min_vals.new_zeros(steps, *self.min_vals.shape)
            for piece in walk:
                index = (slice(None), *piece.where)
                part = errors[index]
                part += self._sum_errors(piece, steps)[0].view(part.shape)
            scales = self._scales(everything, range(steps))[0]
            return self._choose(everything, errors.view(steps, -1), scales)
        for piece in walk:
            gains |= self._choose(piece.where, *self._sum_errors(piece, steps))
        return gains

    def _scales(self, where: tuple[slice, ...], steps: range) -> tuple[Tensor, Tensor]:
        """Scales, the global one divided out, and zero points, each (steps, groups), float32."""
        low, high = self.min_vals[where].reshape(1, -1), self.max_vals[where].reshape(1, -1)
        factors = self.grid.factors(steps.stop)[steps.start :].unsqueeze(1)
        dtype = judged_range_dtype(self.args, self.view.values.dtype)
        scale, zero_point = qparams_of_range(
            cast_range(low * factors, dtype),
            cast_range(high * factors, dtype),
            self.args,
            self.global_scale,
        )
        scale = cast_range(scale, torch.float32)
        if self.global_scale is not None:
            scale = scale / self.global_scale
        return scale * self.unit[where].reshape(1, -1), zero_point.float()

    def _sum_errors(self, piece: GroupPiece, steps: int) -> tuple[Tensor, Tensor]:
        """Errors of a piece's groups at each step, and their scales, both (steps, groups)."""
        errors, scales = [], []
        for first in range(0, steps, TILE):
            tile = range(first, min(first + TILE, steps))
            scale, zero_point = self._scales(piece.where, tile)
            # A short tile is filled up: one compilation for all.
            pad = (0, 0, 0, TILE - len(tile))
            padded = (torch.nn.functional.pad(t, pad, value=1) for t in (scale, zero_point))
            errors.append(self._sum_tile(piece, *padded)[: len(tile)])
            scales.append(scale)
        return torch.cat(errors), torch.cat(scales)

    def _sum_tile(self, piece: GroupPiece, scale: Tensor, zero_point: Tensor) -> Tensor:
        values = piece.values * self.unit[piece.where].reshape(-1, 1)
        weight = piece.weight
        groups, runs = len(values), number_of_runs(values.shape[1])
        if runs > 1:
            scale, zero_point = (t.repeat_interleave(runs, dim=1) for t in (scale, zero_point))
            values = values.view(groups * runs, -1)
            weight = None if weight is None else weight.view(values.shape)
        inverse = 1 / scale
        rows = mark_dynamic([values, weight], [scale, inverse, zero_point])
        zero = None if self.args.symmetric else zero_point
        errors: Tensor = self._errors(rows[0], scale, inverse, zero, rows[1])
        return errors.view(-1, groups, runs).sum(-1) if runs > 1 else errors

    def _choose(self, where: tuple[slice, ...], errors: Tensor, scales: Tensor) -> Tensor:
        """Keep the first best step of some groups; which steps made a group better."""
        errors = errors.nan_to_num(torch.inf)
        best, step = errors.min(0)
        # The same scale again, as rounded scales come, is no other candidate.
        others = errors.masked_fill(scales == scales.gather(0, step.unsqueeze(0)), torch.inf)
        shape = self.best_step[where].shape
        self.best_step[where] = step.view(shape)
        self.close[where] = (others.amin(0) <= best * (1 + CLOSE)).view(shape)
        before = torch.full_like(errors[:1], torch.inf)
        running = torch.cat([before, errors]).cummin(0).values[:-1]
        return (errors < running).any(1)

    def result(self, steps: int) -> Range:
        """The range of the best of the first steps in each group."""
        factors = self.grid.factors(steps)[self.best_step]
        low, high = self.min_vals * factors, self.max_vals * factors
        if bool(self.close.any()):
            decide_close_calls(
                self.close,
                (low, high),
                self.view,
                (self.min_vals, self.max_vals),
                self.args,
                self.grid,
                self.importance,
                self.global_scale,
                steps,
            )
        return low, high


@functools.lru_cache(maxsize=64)
def _compiled_errors(rounding: Rounding, norm: float) -> Callable[..., Any]:
    def errors(
        values: Tensor,
        scale: Tensor,
        inverse: Tensor,
        zero_point: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        sums = []
        for i in range(TILE):
            zero = None if zero_point is None else zero_point[i].unsqueeze(-1)
            error = quantization_error(
                values, scale[i].unsqueeze(-1), inverse[i].unsqueeze(-1), zero, rounding
            )
            loss = power_of_square(error * error, norm)
            sums.append((loss if weight is None else loss * weight).sum(-1))
        return torch.stack(sums)

    return compile_quietly(errors)
