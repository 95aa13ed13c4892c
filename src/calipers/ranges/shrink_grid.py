"""Shrink grid: among shrunk copies of a range, the one with the smallest error.

The search by plain torch operations is the reference of all engines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.engines.dispatch import run
from calipers.engines.kernels import (
    SHRINK_GRID,
    GridProblem,
    GridReference,
    Problem,
    ShrinkGrid,
)
from calipers.formats import Format, range_dtype
from calipers.grouping import Groups
from calipers.ranges.in_float32 import has_free_scales, search_in_float32, times
from calipers.ranges.qparams import (
    cast_range,
    checked_global_scale,
    expand_range,
    fake_quantized,
    qparams_of_range,
)
from calipers.ranges.ties import decide_ties

__all__ = ["ShrinkGrid", "search_grid_ranges"]

Range = tuple[Tensor, Tensor]
Search = Callable[[Sequence[GridProblem], GridReference], list[Range]]


def search_grid_ranges(
    views: Sequence[Groups],
    extremes: Sequence[tuple[Tensor, Tensor]],
    args: QuantizationArgs,
    grid: ShrinkGrid,
    *,
    importance: list[Groups] | None = None,
    global_scale: Tensor | None = None,
    engine: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Range with the smallest sum of |fake_quantize(x) - x|**norm in each group.

    The first of equally good candidates wins. The search ends once `grid.patience` candidates in a
    row made no group of any view better. Errors are float32, summed chunk by chunk, so that scratch
    memory stays at a few chunks whatever the size of the values.

    Args:
        views: The views of one value.
        extremes: For each view the minimum and maximum of its groups, of its `qparam_shape`.
        args: Quantization arguments; the strategy does not count.
        grid: The candidates.
        importance: For each view that of its values, >= 0, broadcast to the same shape; None weighs
            all alike.
        global_scale: TENSOR_GROUP only, shape (1,): candidates are then rounded as they will be
            stored. Without it local scales are left unrounded, since rounding needs it.
        engine: "eager", "native" or "triton"; None chooses, see `calipers.engines.dispatch`.

    Returns:
        For each view minimum and maximum, of its `qparam_shape`; float32, float64 where float32
        cannot hold them. A group whose errors are not finite keeps the first candidate.

    Example:
        Of values from -1 to 1 and a 2.0, int4 clips the 2.0 at 1.8: its range is 0.9 of the whole.

        >>> from calipers.grouping import group_values
        >>> from calipers.ranges.min_max import min_max
        >>> args = QuantizationArgs(num_bits=4, strategy="channel")
        >>> value = torch.cat([torch.linspace(-1, 1, 64), torch.tensor([2.0])]).view(1, -1)
        >>> views = group_values(value, "weight", args)
        >>> grid = ShrinkGrid(maxshrink=0.8, grid=10, patience=0, norm=2)
        >>> search_grid_ranges(views, [min_max(view) for view in views], args, grid)
        [(tensor([[-0.9000]]), tensor([[1.8000]]))]
    """
    if args.strategy == QuantizationStrategy.TENSOR_GROUP and global_scale is None:
        args = args.model_copy(update={"scale_dtype": None})
    if global_scale is not None:
        global_scale = checked_global_scale(global_scale, views[0].values.device)
    by_view = [None] * len(views) if importance is None else importance
    dtype = extremes[0][0].dtype

    def search_scaled(
        search: Search, views: Sequence[Groups], extremes: Sequence[Range], factor: float
    ) -> list[Range]:
        scale = None if global_scale is None else times(global_scale, factor)
        problems = [
            GridProblem(view, *_expanded(ends, grid), its_importance, args, grid, scale)
            for view, ends, its_importance in zip(views, extremes, by_view, strict=True)
        ]
        found = search(problems, _REFERENCE)
        return found if factor == 1 else [_restored(pair, factor, dtype) for pair in found]

    # Scales of symmetric formats do not overflow.
    free = dtype == torch.float64 or not args.symmetric
    free = free and has_free_scales(args, dtype, global_scale)

    def search_whole(search: Search) -> list[Range]:
        return search_in_float32(views, extremes, functools.partial(search_scaled, search), free)

    values = sum(view.values.numel() for view in views)
    dtypes = tuple(view.values.dtype for view in (*views, *(importance or ())))
    problem = Problem(views[0].values.device, values, dtypes, args, grid.norm)
    return run(SHRINK_GRID, _search_eagerly, search_whole, problem, engine)


def search(problems: Sequence[GridProblem]) -> list[Range]:
    """The ranges of all views of a value, by compressed-tensors' own functions."""
    searches = [_Search(problem) for problem in problems]
    grid = problems[0].grid

    # Each answer holds up a device, so it is asked for where it may end the search alone.
    may_end = 0 < grid.patience < grid.num_candidates

    def gains() -> Iterator[bool]:
        for candidate in range(grid.num_candidates):
            better = [each.try_candidate(grid.factor(candidate)) for each in searches]
            yield any(bool(each.any()) for each in better) if may_end else True

    grid.last_candidate(gains())
    return [(each.best_min, each.best_max) for each in searches]


def _search_eagerly(problems: Sequence[GridProblem], reference: GridReference) -> list[Range]:
    """The reference, called as a kernel is."""
    return reference.search(problems)


def search_few(problem: GridProblem, num_candidates: int) -> Range:
    """The ranges of few groups, as `search` finds them: all candidates are tried at once.

    Args:
        problem: Its values have the shape (groups, n), its range float32.
        num_candidates: Number of candidates.
    """

    def at_each_candidate(one: Groups) -> Groups:
        values = one.values.expand(num_candidates, *one.values.shape)
        return Groups(values, (2,), finite_only=one.finite_only)

    factors = problem.grid.factors(num_candidates, problem.low.device).unsqueeze(1)
    low, high = problem.low * factors, problem.high * factors
    importance = None if problem.importance is None else at_each_candidate(problem.importance)
    view = at_each_candidate(problem.view)
    every = _Search(replace(problem, view=view, low=low, high=high, importance=importance))
    every.unit = problem.unit.expand(num_candidates, -1)
    error = every.error(*every.qparams(low, high))
    error = torch.where(error < torch.inf, error, torch.inf)  # NaN is never smaller
    # torch's argmin does not promise the first of equals.
    candidates = torch.arange(num_candidates, dtype=torch.int64, device=error.device).unsqueeze(1)
    first = torch.where(error == error.amin(0), candidates, num_candidates).amin(0, keepdim=True)
    return low.gather(0, first)[0], high.gather(0, first)[0]


class _Search:
    """The state of the search in one view."""

    def __init__(self, problem: GridProblem) -> None:
        self.problem, self.view = problem, problem.view
        self.dtype = range_dtype(problem.args, problem.view.values.dtype)
        self.format = Format.of(problem.args)
        self.unit = problem.unit
        self._buffer: Tensor | None = None
        self.best_min, self.best_max = problem.low.clone(), problem.high.clone()
        self.best_error = torch.full_like(problem.low, torch.inf)

    def try_candidate(self, factor: float) -> Tensor:
        """Try one candidate; returns which groups became better."""
        low, high = self.problem.low * factor, self.problem.high * factor
        error = self.error(*self.qparams(low, high))
        better = error < self.best_error
        self.best_error = torch.where(better, error, self.best_error)
        self.best_min = torch.where(better, low, self.best_min)
        self.best_max = torch.where(better, high, self.best_max)
        return better

    def qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, float32, and zero point of a candidate range, as they will be stored."""
        low, high = cast_range(low, self.dtype), cast_range(high, self.dtype)
        scale, zero_point = qparams_of_range(
            low, high, self.problem.args, self.problem.global_scale
        )
        return cast_range(scale, torch.float32), zero_point

    def error(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Sum of importance * |fake_quantize(x) - x|**norm of each group in its unit, float32."""
        problem, view = self.problem, self.view
        scale = scale * self.unit
        error = torch.zeros(view.qparam_shape, dtype=torch.float32, device=view.values.device)
        others = None if problem.importance is None else problem.importance.chunks()
        for where, chunk in view.chunks():
            values = chunk.float()
            if view.finite_only:
                # A zero is quantized to zero: what is left out adds no error.
                values = torch.where(values.isfinite(), values, 0)
            behind = (...,) + (None,) * (values.dim() - len(where))
            values = values * self.unit[where][behind]
            rounded = self._fake_quantize(values, scale[where][behind], zero_point[where][behind])
            loss = _power(rounded.sub_(values), problem.grid.norm)
            if others is not None:
                loss *= next(others)[1]
            error[where] += loss.sum(tuple(range(len(where), loss.dim())))
        return error

    def _fake_quantize(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Values quantized and dequantized; integers in one buffer, in a quarter of the time."""
        args, global_scale = self.problem.args, self.problem.global_scale
        if not self.format.integer:
            return fake_quantized(values, scale, zero_point, args, global_scale)
        if global_scale is not None:
            scale = scale / global_scale
        if self._buffer is None or self._buffer.numel() < values.numel():
            self._buffer = values.new_empty(values.numel())
        codes = self._buffer[: values.numel()].view(values.shape)
        torch.div(values, scale, out=codes)
        if not args.symmetric:
            codes += zero_point
        codes.clamp_(self.format.low, self.format.high).round_()
        if not args.symmetric:
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


_REFERENCE = GridReference(search, functools.partial(decide_ties, search_few))


def _expanded(ends: Range, grid: ShrinkGrid) -> Range:
    """The range of the first candidate, float32."""
    return expand_range(ends[0], grid.expand), expand_range(ends[1], grid.expand)


def _restored(pair: Range, factor: float, dtype: torch.dtype) -> Range:
    """A range times a factor, at most what the dtype holds, float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    limit = torch.finfo(torch.float64).max
    low, high = ((end.double() * factor).clamp(-limit, limit) for end in pair)
    return cast_range(low, wide), cast_range(high, wide)
