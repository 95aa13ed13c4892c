"""Shrink grid: among shrunk copies of a range, the one with the smallest error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.engines.dispatch import run
from calipers.engines.kernels import SHRINK_GRID, GridReference, Problem
from calipers.formats import has_mx_scales
from calipers.ranges import grid_eager
from calipers.ranges.casting import cast_range, expand_range
from calipers.ranges.global_scale import checked_global_scale
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.ties import decide_ties
from calipers.ranges.units import error_units, search_in_float32, times
from calipers.ranges.views import GroupedView

__all__ = ["search_grid_ranges"]

Range = tuple[Tensor, Tensor]


def search_grid_ranges(
    views: Sequence[GroupedView],
    extremes: Sequence[tuple[Tensor, Tensor]],
    args: QuantizationArgs,
    grid: ShrinkGrid,
    *,
    importance: list[GroupedView] | None = None,
    global_scale: Tensor | None = None,
    engine: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Range with the smallest sum of |fake_quantize(x) - x|**norm in each group.

    The first of equally good steps wins. The search ends once `grid.patience` steps in a row made
    no group of any view better. Errors are float32, summed piece by piece, so that scratch memory
    stays at a few pieces whatever the size of the values.

    Args:
        views: The views of one value.
        extremes: For each view the minimum and maximum of its groups, of its `qparam_shape`.
        args: Quantization arguments; the strategy does not count.
        grid: The candidates.
        importance: For each view the weights of its values, >= 0, broadcast to the same shape; None
            weighs all alike.
        global_scale: TENSOR_GROUP only, shape (1,): candidates are then rounded as they will be
            stored. Without it local scales are left unrounded, since rounding needs it.
        engine: "eager", "native" or "triton"; None chooses, see `calipers.engines.dispatch`.

    Returns:
        For each view minimum and maximum, of its `qparam_shape`; float32, float64 where float32
        cannot hold them. A group whose errors are
        not finite keeps the first step.
    """
    if args.strategy == QuantizationStrategy.TENSOR_GROUP and global_scale is None:
        args = args.model_copy(update={"scale_dtype": None})
    if global_scale is not None:
        global_scale = checked_global_scale(global_scale, views[0].values.device)
    weights = [None] * len(views) if importance is None else importance
    weighted = [] if importance is None else importance
    dtype = extremes[0][0].dtype
    values = sum(view.values.numel() for view in views)
    dtypes = tuple(view.values.dtype for view in (*views, *weighted))
    problem = Problem(views[0].values.device, values, dtypes, args, grid.norm)

    def search_part(
        search: Callable[..., list[Range]],
        views: Sequence[GroupedView],
        extremes: Sequence[Range],
        factor: float,
    ) -> list[Range]:
        expanded = [
            (expand_range(low, grid.expand), expand_range(high, grid.expand))
            for low, high in extremes
        ]
        scale = None if global_scale is None else times(global_scale, factor)
        found = search(views, expanded, args, grid, weights, scale, _REFERENCE)
        return found if factor == 1 else [_restored(pair, factor, dtype) for pair in found]

    # Scales that are rounded are absolute, unless they are powers of two or have a global scale
    # beside them; and symmetric ones do not overflow.
    relative = args.scale_dtype is None or (
        dtype == torch.float64 and (global_scale is not None or has_mx_scales(args))
    )
    in_float32 = relative and (dtype == torch.float64 or not args.symmetric)

    def search_whole(search: Callable[..., list[Range]]) -> list[Range]:
        part = functools.partial(search_part, search)
        if in_float32:
            return search_in_float32(views, extremes, part)
        return part(views, extremes, 1.0)

    return run(SHRINK_GRID, _search_eagerly, search_whole, problem, engine)


def _search_eagerly(*arguments: Any) -> list[Range]:
    """The reference, called as a kernel is."""
    *problem, reference = arguments
    found: list[Range] = reference.search(*problem)
    return found


_REFERENCE = GridReference(grid_eager.search, decide_ties, error_units)


def _restored(pair: Range, factor: float, dtype: torch.dtype) -> Range:
    """A range times a factor, at most what the dtype holds, float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    limit = torch.finfo(torch.float64).max
    low, high = ((end.double() * factor).clamp(-limit, limit) for end in pair)
    return cast_range(low, wide), cast_range(high, wide)
