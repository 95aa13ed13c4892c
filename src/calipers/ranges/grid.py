"""Shrink grid: among shrunk copies of a range, the one with the smallest error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from calipers.ranges import grid_inductor
from calipers.ranges.compiling import SchemeKey
from calipers.ranges.engines import Engine, choose_engine, give_up_engine
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.views import GroupedView

__all__ = ["search_grid_ranges"]


def search_grid_ranges(
    views: list[GroupedView] | tuple[GroupedView, ...],
    extremes: list[tuple[Tensor, Tensor]],
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
        engine: "eager", "inductor" or "triton"; None chooses, see `calipers.ranges.engines`.

    Returns:
        For each view minimum and maximum, float32, of its `qparam_shape`. A group whose errors are
        not finite keeps the first step.
    """
    if args.strategy == QuantizationStrategy.TENSOR_GROUP and global_scale is None:
        args = args.model_copy(update={"scale_dtype": None})
    weights = [None] * len(views) if importance is None else importance
    expanded = [(low.float() * grid.expand, high.float() * grid.expand) for low, high in extremes]
    values = sum(view.values.numel() for view in views)
    chosen = choose_engine(views[0].values.device, engine, _count(args, grid, values))
    search = _compiled_search(chosen, args)
    if search is not None:
        try:
            found: list[tuple[Tensor, Tensor]] = search(
                views, expanded, args, grid, weights, global_scale
            )
            return found
        except torch.OutOfMemoryError:  # the reference needs more
            raise
        except Exception as error:  # whatever the compiler may raise: the reference can do it
            give_up_engine(chosen, error)
    return _search_eagerly(views, expanded, args, grid, weights, global_scale)


def _compiled_search(engine: Engine, args: QuantizationArgs) -> Callable[..., Any] | None:
    """The search by an engine; None where it is left to the reference."""
    if engine == "inductor":
        return grid_inductor.search
    if engine == "triton":
        try:
            from calipers.ranges import grid_triton
        except ImportError as error:  # an installation of Triton that does not work
            give_up_engine("triton", error)
            return None
        return grid_triton.search if grid_triton.supports(args) else None
    return None


#: Values searched in this process by each kind of search, to know when compiling pays.
_searched: Counter[tuple[SchemeKey, float]] = Counter()


def _count(args: QuantizationArgs, grid: ShrinkGrid, values: int) -> int:
    kind = (SchemeKey(args), grid.norm)
    _searched[kind] += values
    return _searched[kind]


def _search_eagerly(
    views: Sequence[GroupedView],
    extremes: Sequence[tuple[Tensor, Tensor]],
    args: QuantizationArgs,
    grid: ShrinkGrid,
    importance: Sequence[GroupedView | None],
    global_scale: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """The reference: one candidate after the other, by compressed-tensors' own functions."""
    searches = [
        _Search(view, low, high, weights)
        for view, (low, high), weights in zip(views, extremes, importance, strict=True)
    ]
    without_gain = 0
    for step in range(grid.num_steps):
        # Every view takes every step: no short-circuit.
        gains = [s.try_step(grid.shrink(step), args, grid.norm, global_scale) for s in searches]
        without_gain = 0 if any(gains) else without_gain + 1
        if grid.patience and without_gain >= grid.patience:
            break
    return [(s.best_min, s.best_max) for s in searches]


class _Search:
    """The state of the search in one view."""

    def __init__(
        self, view: GroupedView, min_vals: Tensor, max_vals: Tensor, importance: GroupedView | None
    ) -> None:
        self.view = view
        self.importance = importance
        self.min_vals, self.max_vals = min_vals, max_vals
        self.best_min, self.best_max = min_vals.clone(), max_vals.clone()
        self.best_error = torch.full_like(min_vals, torch.inf)

    def try_step(
        self, shrink: float, args: QuantizationArgs, norm: float, global_scale: Tensor | None
    ) -> bool:
        """Try one candidate; returns whether any group became better."""
        low, high = self.min_vals * shrink, self.max_vals * shrink
        scale, zero_point = calculate_qparams(low, high, args, global_scale=global_scale)
        error = grid_error(
            self.view, scale, zero_point, args, norm, self.importance, global_scale=global_scale
        )
        better = error < self.best_error
        self.best_error = torch.where(better, error, self.best_error)
        self.best_min = torch.where(better, low, self.best_min)
        self.best_max = torch.where(better, high, self.best_max)
        return bool(better.any())


def grid_error(
    view: GroupedView,
    scale: Tensor,
    zero_point: Tensor,
    args: QuantizationArgs,
    norm: float,
    importance: GroupedView | None = None,
    *,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Sum over each group of weight * |fake_quantize(x) - x|**norm.

    Args:
        view: The values.
        scale: Float32, of the view's `qparam_shape`.
        zero_point: Of the same shape.
        args: Quantization arguments; the strategy does not count.
        norm: Exponent of the absolute error.
        importance: Weights of the values, of the same shape; None weighs all alike.
        global_scale: TENSOR_GROUP only, shape (1,).

    Returns:
        Errors, float32, of the view's `qparam_shape`.
    """
    token_args = args.model_copy(update={"strategy": QuantizationStrategy.TOKEN})
    error = torch.zeros(view.qparam_shape, dtype=torch.float32, device=view.values.device)
    weights = None if importance is None else importance.pieces()
    for where, piece in view.pieces():
        values = piece.float()
        if view.finite_only:
            # A zero is quantized to zero: what is left out adds no error.
            values = torch.where(values.isfinite(), values, 0)
        behind = (...,) + (None,) * (values.dim() - len(where))
        rounded = fake_quantize(
            values, scale[where][behind], zero_point[where][behind], token_args, global_scale
        )
        loss = rounded.sub_(values).abs_()
        loss = loss.square_() if norm == 2 else loss.pow_(norm)
        if weights is not None:
            loss *= next(weights)[1]
        error[where] += loss.sum(tuple(range(len(where), loss.dim())))
    return error
