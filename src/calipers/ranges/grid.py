"""Shrink grid: among shrunk copies of a range, the one with the smallest error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.utils.mxfp_utils import should_generate_mx_scales
from torch import Tensor

from calipers.engines.dispatch import Engine, attempt, choose_engine, give_up_engine
from calipers.engines.native import grid as grid_native
from calipers.ranges import grid_eager
from calipers.ranges.casting import cast_range, expand_range
from calipers.ranges.global_scale import checked_global_scale
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.units import search_in_float32, times
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
    chosen = choose_engine(views[0].values.device, engine, values)
    dtypes = [view.values.dtype for view in (*views, *weighted)]
    compiled = _compiled_search(chosen, args, grid.norm, dtypes)

    def search(
        views: Sequence[GroupedView], extremes: Sequence[Range], factor: float
    ) -> list[Range]:
        expanded = [
            (expand_range(low, grid.expand), expand_range(high, grid.expand))
            for low, high in extremes
        ]
        scale = None if global_scale is None else times(global_scale, factor)
        arguments = (views, expanded, args, grid, weights, scale)
        if compiled is None:
            found = grid_eager.search(*arguments)
        else:
            found = attempt(
                chosen, lambda: compiled(*arguments), lambda: grid_eager.search(*arguments)
            )
        return found if factor == 1 else [_restored(pair, factor, dtype) for pair in found]

    # Scales that are rounded are absolute, unless they are powers of two or have a global scale
    # beside them; and symmetric ones do not overflow.
    relative = args.scale_dtype is None or (
        dtype == torch.float64 and (global_scale is not None or should_generate_mx_scales(args))
    )
    if relative and (dtype == torch.float64 or not args.symmetric):
        return search_in_float32(views, extremes, search)
    return search(views, extremes, 1.0)


def _restored(pair: Range, factor: float, dtype: torch.dtype) -> Range:
    """A range times a factor, at most what the dtype holds, float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    limit = torch.finfo(torch.float64).max
    low, high = ((end.double() * factor).clamp(-limit, limit) for end in pair)
    return cast_range(low, wide), cast_range(high, wide)


def _compiled_search(
    engine: Engine, args: QuantizationArgs, norm: float, dtypes: list[torch.dtype]
) -> Callable[..., list[tuple[Tensor, Tensor]]] | None:
    """The search by an engine; None where it is left to the reference."""
    if engine == "native":
        return grid_native.search if grid_native.supports(args, norm, *dtypes) else None
    if engine == "triton":
        try:
            from calipers.engines.triton import grid as grid_triton
        except ImportError as error:  # an installation of Triton that does not work
            give_up_engine("triton", error)
            return None
        return grid_triton.search if grid_triton.supports(args, norm, dtypes[0]) else None
    return None
