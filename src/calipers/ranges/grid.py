"""Shrink grid: among shrunk copies of a range, the one with the smallest error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.ranges import grid_eager, grid_inductor, grid_native
from calipers.ranges.casting import cast_range, expand_range
from calipers.ranges.engines import Engine, attempt, choose_engine, give_up_engine
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.units import in_float32_range
from calipers.ranges.views import GroupedView

__all__ = ["search_grid_ranges"]


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
        engine: "eager", "native", "inductor" or "triton"; None chooses, see
            `calipers.ranges.engines`.

    Returns:
        For each view minimum and maximum, of its `qparam_shape`; float32, float64 where float32
        cannot hold them. A group whose errors are
        not finite keeps the first step.
    """
    if args.strategy == QuantizationStrategy.TENSOR_GROUP and global_scale is None:
        args = args.model_copy(update={"scale_dtype": None})
    weights = [None] * len(views) if importance is None else importance
    weighted = [] if importance is None else importance
    factor = 1.0
    dtype = extremes[0][0].dtype
    # Scales that are rounded are absolute, and symmetric ones do not overflow.
    if args.scale_dtype is None and (dtype == torch.float64 or not args.symmetric):
        views, extremes, factor = in_float32_range(views, extremes)
    expanded = [
        (expand_range(low, grid.expand), expand_range(high, grid.expand)) for low, high in extremes
    ]

    def restored(found: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        if factor == 1:
            return found
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [
            tuple(cast_range(end.double() * factor, wide) for end in pair)  # type: ignore[misc]
            for pair in found
        ]

    values = sum(view.values.numel() for view in views)
    chosen = choose_engine(views[0].values.device, engine, values)
    dtypes = [view.values.dtype for view in (*views, *weighted)]
    search = _compiled_search(chosen, args, grid.norm, dtypes)
    if search is not None:
        arguments = (views, expanded, args, grid, weights, global_scale)
        found = attempt(chosen, lambda: search(*arguments))
        if found is not None:
            return restored(cast("list[tuple[Tensor, Tensor]]", found))
    return restored(grid_eager.search(views, expanded, args, grid, weights, global_scale))


def _compiled_search(
    engine: Engine, args: QuantizationArgs, norm: float, dtypes: list[torch.dtype]
) -> Callable[..., Any] | None:
    """The search by an engine; None where it is left to the reference."""
    if engine == "native":
        return grid_native.search if grid_native.supports(args, norm, *dtypes) else None
    if engine == "inductor":
        return grid_inductor.search if grid_inductor.supports(args) else None
    if engine == "triton":
        try:
            from calipers.ranges import grid_triton
        except ImportError as error:  # an installation of Triton that does not work
            give_up_engine("triton", error)
            return None
        return grid_triton.search if grid_triton.supports(args, norm, dtypes[0]) else None
    return None
